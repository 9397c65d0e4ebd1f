"""Train a timm backbone on several labels at once, together with SimCLR and with images that have no label."""
import argparse
import gc
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import random_seed

from timm_multilabel.cli import build, head_options, train_flags
from timm_multilabel.cli.batches import Loaders
from timm_multilabel.cli.checks import check_metric, check_phases, check_terms, resolve_weights
from timm_multilabel.cli.data import read_data
from timm_multilabel.cli.device import choose_precision, start_device
from timm_multilabel.cli.output import say as print_line
from timm_multilabel.cli.resumed_flags import flags_of_resumed
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError, escaped, is_utf8
from timm_multilabel.reports.curves import CurvesTracker
from timm_multilabel.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    of_task,
    read_checkpoint,
    resume,
    set_aside_later,
    start_from,
    what_differs,
)
from timm_multilabel.training.progress_bar import fitted, line_width
from timm_multilabel.training.run_folder import (
    RunFolder,
    RunLock,
    find_launched,
    launcher,
    phase_folder,
    run_folder_path,
)
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.signals import LAUNCHER_ENDS, Stopped, StopSignals
from timm_multilabel.training.trackers import TensorBoardTracker, Tracker, Trackers, WandbTracker, need
from timm_multilabel.training.trainer import Trainer
from timm_multilabel.training.training_progress import TrainingProgress

NAME = 'train'
HELP = 'train a backbone on the labels of a CSV, together with SimCLR'

add_flags = train_flags.add_flags

Say = Callable[[str], None]


def run(args: argparse.Namespace) -> None:
    """Train."""
    flags = check_phases(args)
    for package in ('tensorboard', 'wandb'):
        if getattr(args, f'log_{package}'):
            need(package, f'--log-{package}')
            path = os.path.abspath(os.path.join(args.output, args.experiment or '', args.resume or ''))
            if not is_utf8(path):  # else the tracker would fail once training has begun
                raise UserError(f'--log-{package}: the path {escaped(path)} is not UTF-8, as {package} needs it; name '
                                'another with --output and --experiment')
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(visible=not int(os.environ.get('RANK', 0))))
        if os.environ.get(LAUNCHER_ENDS):
            raise Stopped('stopped before it began')
        device = start_device(args.device)
        lock = stack.enter_context(closing(RunLock()))
        say = print_line if world()[0] == 0 else _silent
        if args.old_amp:
            say('--apex-amp and --native-amp are read as --amp: PyTorch has mixed precision of its own')
        phases = [Phase(each, device, say) for each in flags]
        launchers = all_objects(launcher())
        checkpoint = find_checkpoint(args, launchers, lock, say)
        start = read_checkpoint(args.initial_checkpoint) if args.initial_checkpoint and checkpoint is None else None
        names = [phase.name for phase in phases] if args.phases else []
        first_phase = find_phase(checkpoint, names) if checkpoint is not None else 0
        if len(phases) > 1:
            rehearse(phases[first_phase:], start, checkpoint)

        folder, writer, trackers, last_lines = None, None, None, []
        for index in range(first_phase, len(phases)):
            phase = phases[index]
            phase.make(start, checkpoint, say)
            phase.task.metadata |= {'phase': index, 'phases': names}
            start = None  # it holds the weights of the phase before
            if folder is None:
                folder = find_folder(args, phase, checkpoint, names, index)
                if world()[0] == 0:
                    lock.take(folder)
                    if checkpoint is not None and (line := set_aside_later(folder, checkpoint)):
                        say(line)
                    flags = settings(args)
                    if checkpoint is not None:
                        flags = flags_of_resumed(args, flags, folder, say)
                    writer = RunFolder(folder, flags, phases[-1].data.label_space, names, launchers)
                    trackers = stack.enter_context(closing(
                        Trackers(choose_trackers(args, folder, checkpoint is not None), say)))
            phase.fit(phase_folder(folder, names, index), writer, trackers, checkpoint, signals, say)
            start, checkpoint = of_task(phase.task, f"phase '{phase.name}'"), None
            last_lines = list(closing_lines(phase, folder))
            phase.forget()
    say(f'{folder}: {"all phases" if names else phase.length} done')
    for line in last_lines:
        say(line)
    if dist.is_initialized():
        dist.destroy_process_group()


def closing_lines(phase: 'Phase', folder: Path) -> Iterator[str]:
    """The best epoch of a run's last phase with its checkpoint, and the command that comes next; on the first rank."""
    args, saver = phase.args, phase.saver
    if saver is None:
        return
    if saver.best_metric is not None:
        yield f'Best {phase.metric}: {saver.best_metric:.4g} in epoch {saver.best_epoch + 1}, {saver.best}'
    own = [*(['--head-module', args.head_module] if args.head_module else []), *['--allow-hub'] * args.allow_hub]
    if isinstance(phase.data.eval_rows, StreamedRows):
        command = ['validate', args.data_dir, '--split', args.val_split, '--checkpoint', str(saver.best), *own]
    elif phase.task.heads:
        command = ['report', str(folder), *own]
    else:
        size = ['--img-size', str(args.img_size)] if args.img_size else []
        command = ['train', args.data_dir, '--model', args.model, *size, '--initial-checkpoint', str(saver.last), *own]
    yield f'Next: timm-multilabel {shlex.join(command)}'


def rehearse(phases: 'list[Phase]', start: Checkpoint | None, checkpoint: Checkpoint | None) -> None:
    """Make phases without training them: what is wrong with a later one shows now, not after hours."""
    for phase in phases:
        phase.make(start, checkpoint, _silent, cache=False)
        start, checkpoint = of_task(phase.task, 'the phase before it'), None
        phase.forget()


class Phase:
    """A phase of a run, or the whole of a run that has none: first its data, then its task and optimizer.

    Args:
        args: Its flags.
        device: Where it runs.
        say: Prints a line.
    """

    def __init__(self, args: argparse.Namespace, device: Any, say: Say):
        self.args = args
        self.name = getattr(args, 'phase', None)
        self.saver: WholeSaver | None = None  # on the first rank, once it is trained
        args.amp = args.amp or args.old_amp
        with self.named():
            self.precision = choose_precision(device, args.amp, args.amp_dtype, args.channels_last)
            self.data = read_data(args, lambda line: say(f'Phase {self.name}: {line}' if self.name else line))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the phase's name before an error."""
        try:
            yield
        except UserError as error:
            if self.name is None:
                raise
            raise UserError(f"{self.args.config}, phase '{self.name}': {error.line}") from error

    def make(self, start: Checkpoint | None, checkpoint: Checkpoint | None, say: Say, cache: bool = True) -> None:
        """Make task, optimizer and loaders.

        Args:
            start: What to start from.
            checkpoint: One of its own, to go on from.
            say: Prints a line.
            cache: Open the cache that the flags ask for.
        """
        with self.named():
            self._make(start, checkpoint, say, cache)

    def _make(self, start: Checkpoint | None, checkpoint: Checkpoint | None, say: Say, cache: bool) -> None:
        args, data = self.args, self.data
        random_seed(args.seed, 0)  # the same first weights on every rank
        targets = data.label_space.split(data.train_rows.targets)
        options, weights = head_options.resolve(data.head, data.registry, data.label_space, targets)
        weights = resolve_weights(args, data, weights)
        fresh = checkpoint is None and start is None
        model, self.data_config = build.model(args, data, options, fresh, say)
        for name, head in model.named_heads.items():
            if head.remark:
                say(f"head '{name}': {head.remark}")
        check_terms(args, model.heads)
        self.metric = check_metric(args, data, model.heads, weights, say)
        if args.eval_metric and data.eval_rows is not None:
            args.eval_metric = self.metric  # which earlier versions may have called otherwise
        self.task = build.task(args, model, data, self.data_config, weights, self.precision.device)
        self.task.metadata['eval_metric'] = self.metric
        if start is not None:
            say(start_from(self.task, start, start.best_weights))
        build.setup_ema_and_compile(args, self.task)
        self.optimizer_step, self.length = build.optimizer_step(
            args, self.task, self.precision, data.steps, self.metric, say)
        self.start = TrainingProgress(0)
        if checkpoint is not None:
            self.start = resume(checkpoint, self.task, self.optimizer_step, data.steps)
        self.loaders = Loaders(args, self.task, data, self.data_config, self.precision.device, say, cache)
        if checkpoint is not None:
            differs = what_differs(
                checkpoint, ranks=world()[1], images_per_step=self.images_per_step, accumulate=args.grad_accum_steps,
                seed=args.seed, loader_processes=self.loaders.train.order_depends_on)
            if differs:
                say(differs)

    def forget(self) -> None:
        """Give the memory of task, optimizer and loaders back."""
        self.task = self.optimizer_step = self.loaders = self.saver = None
        if self.precision.device.type == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()  # else the next phase's --cache device would take it for used

    @property
    def images_per_step(self) -> int:
        """Photos of a step, over all ranks."""
        return (self.data.batch_size + self.data.pool_batch_size) * world()[1]

    def fit(
            self,
            folder: Path,
            writer: RunFolder | None,
            trackers: Trackers | None,
            checkpoint: Checkpoint | None,
            signals: StopSignals,
            say: Say,
    ) -> None:
        """Train it.

        Args:
            folder: Where its checkpoints go.
            writer: The run folder, on the first rank.
            trackers: What else is told of the run, there.
            checkpoint: What it goes on from, for the history of the best.
            signals: What may tell it to stop.
            say: Prints a line.
        """
        args, data, task, device, ranks = self.args, self.data, self.task, self.precision.device, world()[1]
        if ranks > 1:
            task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
        title = (f'Phase {self.name}: ' if self.name else '') + f'{args.model}, {self.length}, heads: '
        heads = list(map(str, data.label_space.heads)) or ['no heads']
        say(title + fitted(heads, line_width() - len(title), ', '))
        say(f'{data}, {ranks} x {device}, {data.steps} step{"s" * (data.steps > 1)} an epoch, run folder {folder}')
        fit = Trainer(
            self.optimizer_step,
            self.precision,
            self.loaders.train,
            self.loaders.eval,
            images_per_step=self.images_per_step,
            seed=args.seed,
            metric=self.metric,
            phase=self.name,
            run_folder=writer,
            trackers=trackers,
            bad_images=self.loaders.bad,
            log_interval=args.log_interval,
            save_interval=args.checkpoint_steps,
            signals=signals,
        )
        if writer is not None:
            folder.mkdir(exist_ok=True)
            self.saver = fit.saver = build.saver(args, task, self.optimizer_step, self.metric, folder, checkpoint)
        if checkpoint is not None and self.loaders.bad is not None:
            self.loaders.bad.known.update(checkpoint.state.get('run', {}).get('bad_images', []))
        with signals.noted():
            fit.run(self.start, self.length)


def _silent(line: str) -> None:
    """Say nothing."""


def find_checkpoint(
        args: argparse.Namespace,
        launchers: Sequence[str],
        lock: RunLock,
        say: Say,
) -> Checkpoint | None:
    """The checkpoint to go on from: that of --resume, or, where torchrun starts a run again, its newest one.

    All ranks call it; the first one decides.

    Raises:
        UserError: There is none, or it is not whole.
    """
    restarted = any(all_objects(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))))  # a machine may have joined
    path, lines, wrong = None, [], None
    if world()[0] == 0:
        try:
            path, lines = choose_checkpoint(args, restarted, launchers, lock)
        except UserError as error:
            wrong = error.line
    path, lines, wrong = all_objects((path, lines, wrong))[0]
    if wrong is not None:
        raise UserError(wrong)
    for line in lines:
        say(line)
    return None if path is None else read_or_offer(path)


def choose_checkpoint(
        args: argparse.Namespace,
        restarted: bool,
        launchers: Sequence[str],
        lock: RunLock,
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and lines about the choice.

    Raises:
        UserError: No checkpoint of the run folder is whole, or another process trains in it.
    """
    named = None if args.resume in ('auto', None) else Path(args.resume)
    experiment = Path(args.output) / args.experiment if args.experiment else None
    folder = None
    if restarted:
        folder = find_launched([named, *named.absolute().parents[:2]] if named else
                               [experiment] if experiment else Path(args.output).glob('*'), launchers)
    if folder is None and named is not None and not named.is_dir():
        return named, []
    if folder is None and args.resume is not None:
        folder = named or experiment
    if folder is None or not folder.is_dir():
        return None, []
    lock.take(folder)  # else another process may write while this one chooses
    path, damaged = newest_checkpoint(folder)
    if path is None and (damaged or named is not None):
        raise UserError(f'{folder}: no whole checkpoint in this run folder; start anew under another --experiment')
    return path, [f'{line}: passed over' for line in damaged] + [f'{path}: goes on from here'] * (path is not None)


def read_or_offer(path: Path) -> Checkpoint:
    """Read a checkpoint; where it is damaged, the error names the newest whole one beside it."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        before, _ = newest_checkpoint(path.parent)
        if before is None:
            raise
        raise UserError(f'{error.line}; the newest whole one beside it: --resume {before}') from error


def find_phase(checkpoint: Checkpoint, names: list[str]) -> int:
    """The phase that a checkpoint is of.

    Args:
        checkpoint: It.
        names: The phases of this run.

    Raises:
        UserError: The run that it is of has other phases.
    """
    theirs = checkpoint.state.get('phases') or []
    if theirs != names:
        described = [f'a run with the phases {", ".join(each)}' if each else 'a run without phases'
                     for each in (theirs, names)]
        raise UserError(
            f'{checkpoint.path}: a checkpoint of {described[0]}, and this is {described[1]}; resume with what it was '
            'trained with (-c args.yaml of its run folder)')
    return checkpoint.state.get('phase', 0)


def find_folder(
        args: argparse.Namespace,
        phase: Phase,
        checkpoint: Checkpoint | None,
        names: list[str],
        index: int,
) -> Path:
    """The run folder: that of the checkpoint to resume from, or a new one.

    Raises:
        UserError: The checkpoint lies where its run would not have put it.
    """
    if checkpoint is None:
        return run_folder_path(args.output, args.experiment, args.model, phase.data_config['input_size'][-1])
    folder = checkpoint.path.absolute().parent
    run = folder if index + 1 >= len(names) else folder.parent
    if phase_folder(run, names, index) != folder:
        raise UserError(
            f"{checkpoint.path}: a checkpoint of phase '{names[index]}' that lies elsewhere than its run put it; put "
            f'it back into the folder {phase_folder(run, names, index).name} of a run folder')
    return run


def choose_trackers(args: argparse.Namespace, folder: Path, goes_on: bool) -> list[Tracker]:
    """What is told of the run beside its summary.csv: its curves, always, and the trackers that flags ask for."""
    trackers = [CurvesTracker(folder / 'curves.png')]
    if args.log_tensorboard:
        trackers.append(TensorBoardTracker(folder, settings(args)))
    if args.log_wandb:
        trackers.append(WandbTracker(folder, settings(args), goes_on))
    return trackers


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as args.yaml holds them: what `-c` takes, without what names this one start."""
    hidden = ('config', 'old_amp', 'resume', 'phases', 'phase', 'given', 'allow_hub')
    flags = {key: value for key, value in vars(args).items() if key not in hidden}
    flags['amp'] = args.amp or args.old_amp
    if not args.phases:
        return flags
    # A phase's own flags, with what the command line said over them.
    return {**flags, 'phases': [
        {'name': phase.phase, **{name: getattr(phase, name) for name in phase.given if name not in hidden}}
        for phase in args.phases]}
