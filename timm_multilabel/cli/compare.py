"""Compare runs: their settings, their metrics, and which differences are more than chance, as one table."""
import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from timm_multilabel.cli import build, train_flags
from timm_multilabel.cli.device import loader_workers, start_device
from timm_multilabel.cli.flags import Parser, add_trust_flags, count
from timm_multilabel.cli.output import say
from timm_multilabel.cli.run_flags import read_run_flags
from timm_multilabel.cli.stored import predictions_path, stored_predictions
from timm_multilabel.data.split_names import find_split
from timm_multilabel.errors import UserError, escaped
from timm_multilabel.files import write_atomic
from timm_multilabel.reports.bootstrap import RESAMPLES
from timm_multilabel.reports.experiment_pages import (
    Experiments,
    SplitResult,
    experiments_csv,
    experiments_html,
    experiments_markdown,
)
from timm_multilabel.reports.experiments import (
    Run,
    RunPredictions,
    compare_groups,
    flat_settings,
    group_runs,
    share,
    shared_heads,
)
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.run_folder import read_summary

NAME = 'compare'
HELP = 'compare runs: settings that differ, metrics, and which differences are more than chance'

_WRITERS = {'.csv': experiments_csv, '.md': experiments_markdown, '.html': experiments_html}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folders; those of one experiment, with other '
                        'seeds, form a group')
    parser.add_argument('--out', metavar='DIR',
                        help='write experiments.csv, experiments.md and experiments.html there (default: print only)')
    parser.add_argument('--baseline', metavar='RUN',
                        help='a run of the group that the others are compared with (default: the first run)')
    parser.add_argument('--data', metavar='DIR',
                        help='data directory to score all runs on (default: what each was trained with)')
    add_trust_flags(parser)
    parser.add_argument('-j', '--workers', type=count, default=4, metavar='N',
                        help='loader processes, where predictions have to be made')
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda, ... (default: cuda where there is one)')
    parser.add_argument('--force', action='store_true', help='overwrite what is there')


def run(args: argparse.Namespace) -> None:
    """Compare."""
    paths = _run_paths(args.runs)
    outputs = _prepare_outputs(args.out, args.force)
    settings, flags = [_read_settings(path, args.head_module) for path in paths], _flag_names()
    runs = [_read_run(path, name, of_run, flags) for (path, name), of_run in zip(_names(paths).items(), settings)]
    groups = group_runs(runs)
    baseline = _find_baseline(args.baseline, paths, groups)
    folders = [Path(args.data or _of_last_phase(of_run, 'data_dir')) for of_run in settings]
    device = start_device(args.device)

    results, remarks = [], _repeated(runs, groups)

    def remark(line: str) -> None:
        remarks.append(line)

    for split in ('val', 'test'):
        names = [_of_last_phase(of_run, 'val_split') if split == 'val' else split for of_run in settings]
        missing = {run.name: name for run, path, folder, name in zip(runs, paths, folders, names)
                   if not predictions_path(path, name).is_file() and find_split(folder, name) is None}
        if split == 'val' and missing:
            run, name = next(iter(missing.items()))
            raise UserError(f'{run}: its data directory has no {name} (any more); name one with --data DIR')
        if missing:
            if len(missing) < len(runs):
                remark(f'test is left out: there is none for {", ".join(missing)}')
            continue
        answers = [
            RunPredictions.of(stored_predictions(
                path, name, Path(args.data) if args.data else None, device, loader_workers(args.workers), _say,
                head_module=args.head_module, allow_hub=args.allow_hub))
            for path, name in zip(paths, names)]
        results.append(_compare_split(split, answers, runs, groups, baseline, remark))
    experiments = Experiments(runs, groups, baseline, results, remarks)
    for ending, path in outputs.items():
        write_atomic(path, _WRITERS[ending](experiments))
    print(experiments_markdown(experiments), end='')
    if outputs:
        _say(f'Wrote {", ".join(map(str, outputs.values()))}')


def _say(line: str) -> None:
    """Standard output is for the table."""
    say(line, sys.stderr)


def _run_paths(words: list[str]) -> list[Path]:
    """The run folders.

    Raises:
        UserError: One is none, or named twice, or has no finished epoch.
    """
    paths = [Path(word) for word in words]
    for path in paths:
        if not (path / 'args.yaml').is_file():
            way_out = f'name its folder, {path.parent}' if path.is_file() else 'name one such as output/train/<run>'
            raise UserError(f'{path}: is no run folder (there is no args.yaml in it); {way_out}')
        if not (path / 'summary.csv').is_file() or not (path / 'model_best.pth.tar').is_file():
            raise UserError(f'{path}: no epoch of this run (with phases, of its last one) is finished, so it has no '
                            'figures yet; leave it out')
    places = [path.resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f'{paths[number]}: is named twice; name each run once')
    return paths


def _prepare_outputs(out: str | None, force: bool) -> dict[str, Path]:
    """Find out that the files could not be written before the work, not after it; the files by ending."""
    if out is None:
        return {}
    folder = Path(out)
    paths = {ending: folder / f'experiments{ending}' for ending in _WRITERS}
    for path in paths.values():
        if path.is_dir() or path.exists() and not force:
            raise UserError(f'{path}: exists already; ' + (
                'it is a folder, remove it' if path.is_dir() else 'overwrite it with --force, or name another --out'))
    folder.mkdir(parents=True, exist_ok=True)
    return paths


def _flag_names() -> dict[str, str]:
    """What the command line of training calls its flags, by their names in args.yaml."""
    parser = Parser()
    train_flags.add_flags(parser)
    return {action.dest: next(word for word in action.option_strings if word.startswith('--'))
            for action in parser._actions if action.option_strings}


def _read_settings(path: Path, head_module: str | None) -> dict[str, object]:
    """The settings of a run as args.yaml holds them; flags that it is older than have their defaults."""
    args = read_run_flags(path, head_module)
    if not args.phases:  # a run that has the default is the same as one that gave this number
        args.cooldown_epochs = build.cooldown_epochs(args)
    settings = vars(args)
    phases = [{'name': phase.phase, **phase.given} for phase in settings['phases']]
    return {**{name: value for name, value in settings.items() if name not in ('config', 'old_amp', 'allow_hub')},
            'phases': phases}


def _names(paths: list[Path]) -> Mapping[Path, str]:
    """What runs are called: their folder, or the path where two folders are called alike."""
    names = [path.resolve().name for path in paths]
    return {path: escaped(path if names.count(name) > 1 else name) for path, name in zip(paths, names)}


def _read_run(path: Path, name: str, settings: Mapping[str, object], flags: Mapping[str, str]) -> Run:
    checkpoint = read_checkpoint(path / 'model_best.pth.tar', mapped=True)
    if not checkpoint.label_space.heads:
        raise UserError(f'{path}: trained with -wlc 0, so it has no heads to compare; leave it out')
    summary = read_summary(path / 'summary.csv')
    phases = summary['phase'].tolist() if 'phase' in summary else [None] * len(summary)
    return Run(name, flat_settings(settings, flags), str(settings['seed']), checkpoint.state.get('epoch', 0) + 1,
               phases.count(phases[-1]) if phases else 0)


def _find_baseline(word: str | None, paths: list[Path], groups: list[list[int]]) -> int:
    """The group that others are compared with, by number."""
    places = [path.resolve() for path in paths]
    wanted = places[0] if word is None else Path(word).resolve()
    if wanted not in places:
        raise UserError(f'--baseline {word}: is none of the runs to compare ({", ".join(map(str, paths))})')
    number = places.index(wanted)
    return next(group for group, numbers in enumerate(groups) if number in numbers)


def _repeated(runs: list[Run], groups: list[list[int]]) -> list[str]:
    """Lines on runs of a group that have the same seed, which count as one."""
    lines = []
    for numbers in groups:
        seeds = [runs[number].seed for number in numbers]
        if len(set(seeds)) < len(seeds):
            lines.append(f'{", ".join(runs[number].name for number in numbers)}: the same settings, and some of them '
                         'the same seed: those count as one run in a verdict, and the spread says less than it seems')
    return lines


def _of_last_phase(settings: Mapping[str, object], name: str) -> str:
    """A setting of the phase that a run's best checkpoint is of; of a run without phases, of the run."""
    phases = settings['phases']
    return str((phases[-1] if phases else {}).get(name, settings[name]))


def _compare_split(
        split: str,
        answers: list[RunPredictions],
        runs: list[Run],
        groups: list[list[int]],
        baseline: int,
        remark: Callable[[str], None],
) -> SplitResult:
    """The metrics and differences on a split."""
    names = [run.name for run in runs]
    heads = shared_heads(answers)
    if not heads:
        raise UserError(f'{split}: the runs ({", ".join(names)}) share no head of the same classes; compare those that '
                        'do')
    answers = share(answers, names, split, remark)
    others = dict.fromkeys(name for each in answers for name in each.labels if name not in heads)
    if others:
        remark(f'{split}: not a head of the same classes in every run, so not compared and not in the mean: '
               f'{", ".join(others)}')
    with tqdm(total=RESAMPLES, desc=f'{split}: bootstrap', leave=False, disable=None) as bar:
        differences = compare_groups(answers, groups, [run.seed for run in runs], baseline, bar.update)
    return SplitResult.of(split, answers, differences)
