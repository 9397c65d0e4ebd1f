"""What the studies share: runs in processes of their own, one thread each, what has run is not run again, one table."""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

Run = tuple[str, int, int]
"""Arm, number of labels and seed."""


@dataclass(frozen=True)
class Places:
    """Where a study finds and puts its files."""
    data: Path
    output: Path
    weights: Path

    def result(self, run: Run) -> Path:
        return self.output / 'results' / f'{name_of(run)}.json'

    def folder(self, labels: int, seed: int, pool: int) -> Path:
        """A data directory with this many labelled rows, and a pool; the classes are those of all rows."""
        import numpy as np

        if labels == 32_000:
            return self.data
        folder = self.output / 'data' / f'{labels}-{seed}'
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(mkdtemp(dir=folder.parent))  # renamed when it is whole: another run may make it too
            header, *rows = (self.data / 'train.csv').read_text().splitlines(keepends=True)
            order = np.random.default_rng(seed).permutation(len(rows))
            (made / 'all.csv').write_text(header + ''.join(rows))
            (made / 'val.csv').write_text((self.data / 'val.csv').read_text())
            (made / 'unlabelled.csv').write_text(
                'image_path\n' + ''.join(rows[each].split(',')[0] + '\n' for each in order[labels:labels + pool]))
            (made / 'train.csv').write_text(header + ''.join(rows[each] for each in order[:labels]))
            with suppress(OSError):
                made.rename(folder)
        images = self.output / 'data' / 'fashion-product-images'
        with suppress(FileExistsError):
            images.symlink_to(self.data / 'fashion-product-images')
        return folder


@dataclass(frozen=True)
class Study:
    """The arms of a study, and the order in which to run them.

    `needs` has the arms that must have run before an arm; `train` makes a run, and returns a `tm.TrainingRun`.
    """
    file: str
    arms: Sequence[str]
    runs: Sequence[Run]
    needs: Callable[[Run], Sequence[Run]]
    train: Callable[[Run, Places, dict[str, Any]], Any]
    tuning: int = -1
    """The seed of runs that only chose settings."""

    def main(self) -> None:
        parser = argparse.ArgumentParser(description='Run what is missing of this study.')
        parser.add_argument('data', type=Path, help='the fashion photos')
        parser.add_argument('output', type=Path)
        parser.add_argument('--weights', type=Path, default=Path('output'), help='folder with lite0.safetensors')
        parser.add_argument('--workers', type=int, default=1)
        parser.add_argument('--one', metavar='ARM-LABELS-SEED', help=argparse.SUPPRESS)
        parser.add_argument('--table', action='store_true', help='only write results.csv and results.md')
        args = parser.parse_args()
        places = Places(args.data.resolve(), args.output.resolve(), args.weights.resolve())
        if args.table:
            self._table(places)
        elif args.one:
            self._run(places, parse(args.one))
        else:
            self._schedule(places, args.workers)

    def _schedule(self, places: Places, workers: int) -> None:
        waiting = [run for run in self.runs if not places.result(run).exists()]
        running: dict[Future[int], str] = {}
        (places.output / 'results').mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers) as pool:
            while waiting or running:
                for run in list(waiting):
                    ready = all(places.result(each).exists() for each in self.needs(run))
                    if len(running) < workers and ready:
                        waiting.remove(run)
                        running[pool.submit(self._process, places, name_of(run))] = name_of(run)
                if not running:
                    sys.exit(f'{self.file}: {len(waiting)} runs wait for others that failed')
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    ended = 'done' if done.result() == 0 else 'failed'
                    print(f'{time.strftime("%H:%M")} {running.pop(done)}: {ended}', flush=True)

    def _process(self, places: Places, name: str) -> int:
        command = [sys.executable, self.file, str(places.data), str(places.output), '--weights', str(places.weights),
                   '--one', name]
        with (places.output / 'results' / f'{name}.log').open('w') as log:
            return subprocess.call(command, stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def _run(self, places: Places, run: Run) -> None:
        arm, labels, seed = run
        where = {'seed': seed, 'experiment': name_of(run), 'output': places.output / 'runs',
                 'cache_dir': places.output / 'cache'}
        started = time.perf_counter()
        made = self.train(run, places, where)
        summary = made.summary.iloc[-1]
        usage = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        written = {
            'arm': arm, 'labels': labels, 'seed': seed, 'mean': summary.get('eval_top1'),
            **{head: summary.get(f'eval/{head}/top1') for head in ('gender', 'article', 'color')},
            'cpu_minutes': sum(each.ru_utime + each.ru_stime for each in usage) / 60,
            'minutes': (time.perf_counter() - started) / 60,
            'checkpoint': str(made.last_checkpoint)}
        places.result(run).write_text(json.dumps(written))

    def _table(self, places: Places) -> None:
        import pandas as pd

        read = [json.loads(each.read_text()) for each in sorted((places.output / 'results').glob('*.json'))]
        runs = pd.DataFrame(read).drop(columns='checkpoint')
        runs = runs[runs['arm'].isin(self.arms)]
        spent = {(run['arm'], run['labels'], run['seed']): run['cpu_minutes'] for run in read}
        runs['total_cpu_minutes'] = [
            sum(spent[run] for run in self._with_needed(run))
            for run in runs[['arm', 'labels', 'seed']].itertuples(index=False, name=None)]
        runs = runs.sort_values(['labels', 'arm', 'seed'], key=lambda of: of.map(list(self.arms).index)
                                if of.name == 'arm' else of)
        here = Path(self.file).parent
        runs.round(3).to_csv(here / 'results.csv', index=False)
        runs = runs[(runs['seed'] != self.tuning) & runs['mean'].notna()]
        lines = ['| labels | arm | seeds | mean top-1 | spread | gender | article | color | CPU minutes | in all |',
                 '| --- ' * 10 + '|']
        for (labels, arm), of in runs.groupby(['labels', 'arm'], sort=False):
            heads = ' | '.join(f'{of[head].mean():.2f}' for head in ('gender', 'article', 'color'))
            spread = f'{of["mean"].min():.2f} to {of["mean"].max():.2f}' if len(of) > 1 else ''
            lines.append(f'| {labels:,} | {arm} | {len(of)} | {of["mean"].mean():.2f} | {spread} | {heads} | '
                         f'{of["cpu_minutes"].mean():.1f} | {of["total_cpu_minutes"].mean():.1f} |')
        (here / 'results.md').write_text('\n'.join(lines) + '\n')
        print('\n'.join(lines))
        draw(runs, self.arms, here / 'results.png')

    def _with_needed(self, run: Run) -> set[Run]:
        """A run and all that must have run before it."""
        return {run}.union(*map(self._with_needed, self.needs(run)))


def draw(runs: Any, arms: Sequence[str], path: Path) -> None:
    """Accuracy against all processor time, a panel for each number of labels; bars span the seeds."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    counts = sorted(runs['labels'].unique())
    figure, panels = plt.subplots(1, len(counts), figsize=(5 * len(counts), 4), squeeze=False, layout='constrained')
    for panel, labels in zip(panels[0], counts, strict=True):
        means = runs[runs['labels'] == labels].groupby('arm')[['mean', 'total_cpu_minutes']].agg(['mean', 'min', 'max'])
        for place, (arm, of) in enumerate(means.sort_values(('mean', 'mean')).iterrows()):
            (mean, least, most), spent = of['mean'], of['total_cpu_minutes', 'mean']
            panel.errorbar(spent, mean, [[mean - least], [most - mean]], fmt='o', capsize=3,
                           color=f'C{list(arms).index(arm) % 10}')
            panel.annotate(arm, (spent, mean), xytext=(7, 4) if place % 2 else (7, -11), textcoords='offset points',
                           fontsize=8)
        panel.set(title=f'{labels:,} labels', xlabel='CPU minutes, with all that must run before',
                  ylabel='mean top-1 (%)', xscale='log')
        panel.set_xticks([1, 2, 5, 10, 20, 50], ['1', '2', '5', '10', '20', '50'])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(means['total_cpu_minutes', 'mean'].min() / 1.4, means['total_cpu_minutes', 'mean'].max() * 6)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def name_of(run: Run) -> str:
    arm, labels, seed = run
    return f'{arm}-{labels}-{seed}'


def parse(name: str) -> Run:
    arm, labels, seed = name.rsplit('-', 2)
    return arm, int(labels), int(seed)


def checkpoint_of(places: Places, run: Run) -> str:
    found: str = json.loads(places.result(run).read_text())['checkpoint']
    return found
