"""The experiments table as CSV, Markdown and HTML."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from timm_multilabel.errors import one_line
from timm_multilabel.escaping import markdown_text, spreadsheet_csv
from timm_multilabel.metric_names import Metric
from timm_multilabel.reports.bootstrap import LEVEL, RESAMPLES
from timm_multilabel.reports.experiments import (
    BETTER,
    MEAN,
    SURE,
    WORSE,
    Run,
    RunPredictions,
    describe_metrics,
    differing_settings,
    run_metrics,
    verdict,
)
from timm_multilabel.reports.tables import html_table, markdown_table
from timm_multilabel.reports.templates import render_template

_OF_GROUP = {'difference': 'difference', 'low': 'low', 'high': 'high', 'p': 'p', 'holm': 'p Holm'}  # in the CSV
_INTERVAL = f'{100 * LEVEL:.0f} %'


@dataclass(frozen=True)
class SplitResult:
    """What runs and groups of them did on a split.

    Args:
        name: The split.
        images: How many images of it all runs share.
        metrics: Of `run_metrics`.
        described: Of `describe_metrics`.
        differences: Of `compare_groups`.
    """
    name: str
    images: int
    metrics: pd.DataFrame
    described: Mapping[tuple[str, str], Metric]
    differences: pd.DataFrame

    @classmethod
    def of(cls, name: str, answers: Sequence[RunPredictions], differences: pd.DataFrame) -> 'SplitResult':
        """The results of runs' answers to the images that they share."""
        return cls(name, len(answers[0].images), run_metrics(answers), describe_metrics(answers), differences)

    def title(self, head: str, metric: str) -> str:
        """What a column of a metric is called."""
        return f'{self.name} {metric} (mean)' if head == MEAN else f'{self.name} {head} {metric}'


@dataclass(frozen=True)
class Experiments:
    """All that the tables show.

    Args:
        runs: The runs.
        groups: Their groups, by number.
        baseline: The group that others are compared with, by number.
        splits: Their results.
        remarks: Lines on what was not compared, and the like.
    """
    runs: Sequence[Run]
    groups: Sequence[Sequence[int]]
    baseline: int
    splits: Sequence[SplitResult]
    remarks: Sequence[str] = ()

    def name(self, group: int) -> str:
        """What a group is called: its runs."""
        return ', '.join(self.runs[number].name for number in self.groups[group])

    def verdict(self, split: SplitResult, row: pd.Series) -> str:
        """What a row of `compare_groups` of a split says."""
        ours, theirs = (len({self.runs[number].seed for number in self.groups[group]})
                        for group in (row['group'], self.baseline))
        lower_is_better = split.described[row['head'], row['metric']].lower_is_better
        return verdict(row['difference'], row['holm'], lower_is_better, row['over'], (ours, theirs))

    def rows(self) -> list[tuple[int, list[int]]]:
        """The rows of the table: a group and the runs that they are of, each run alone, then several as a group."""
        rows = []
        for group, numbers in enumerate(self.groups):
            rows += [(group, [number]) for number in numbers]
            rows += [(group, list(numbers))] if len(numbers) > 1 else []
        return rows


def _about(experiments: Experiments, numbers: list[int]) -> dict[str, str]:
    """What a row says of its runs beside their metrics."""
    runs = [experiments.runs[number] for number in numbers]
    settings = {name: runs[0].settings.get(name, '') for name in differing_settings(experiments.runs)}
    return {
        'runs': ', '.join(run.name for run in runs),
        'seed': ', '.join(str(run.seed) for run in runs),
        **settings,
        'best epoch': ', '.join(str(run.best_epoch) for run in runs),
        'epochs trained': ', '.join(str(run.epochs) for run in runs),
    }


def experiments_csv(experiments: Experiments) -> str:
    """One table of everything: a row a run and one a group of several, with full precision.

    Columns of a metric: '<title>', the value, or of a group the mean; '<title> sd' over the runs of a group (n - 1);
    and of the rows that stand for a group, which for one of one run is the run's, '<title> difference', 'low', 'high',
    'p', 'p Holm' and 'verdict'.
    """
    made = []
    for group, numbers in experiments.rows():
        row: dict[str, str | float] = {**_about(experiments, numbers)}
        for split in experiments.splits:
            for head, metric in split.metrics.columns:
                title, values = split.title(head, metric), split.metrics[head, metric].iloc[numbers]
                row[title] = values.mean(skipna=False)
                row[f'{title} sd'] = values.std(ddof=1, skipna=False)
                stands_for = group if len(numbers) == len(experiments.groups[group]) else None
                differs = _difference(experiments, split, stands_for, head, metric)
                row |= {f'{title} {name}': value for name, value in differs.items()}
        made.append(row)
    table = pd.DataFrame(made)
    # The dashes of flags would be a formula; recipes and args.yaml have none either.
    return spreadsheet_csv(table.rename(columns=lambda name: name.lstrip('-')), index=False)


def _difference(
        experiments: Experiments,
        split: SplitResult,
        group: int | None,
        head: str,
        metric: str,
) -> dict[str, float | str]:
    """What a group differs by in a metric: NaN for the baseline and for None; empty where no group was compared."""
    compared = split.differences
    of_metric = compared[(compared['head'] == head) & (compared['metric'] == metric)]
    if not len(of_metric):
        return {}
    found = of_metric[of_metric['group'] == group]
    if not len(found):
        return dict.fromkeys((*_OF_GROUP.values(), 'verdict'), np.nan)
    row = found.iloc[0]
    return {**{name: row[key] for key, name in _OF_GROUP.items()}, 'verdict': experiments.verdict(split, row)}


def shown_experiments(experiments: Experiments) -> tuple[pd.DataFrame, list[int]]:
    """The table for reading, and its rows that are groups."""
    made: list[dict[str, str]] = []
    strong: list[int] = []
    for _, numbers in experiments.rows():
        row = _about(experiments, numbers)
        for split in experiments.splits:
            for head, name in split.metrics.columns:
                metric, values = split.described[head, name], split.metrics[head, name].iloc[numbers]
                row[split.title(head, name)] = metric.text(values.mean(skipna=False)) + (
                    f' ± {metric.text(values.std(ddof=1, skipna=False))}' if len(numbers) > 1 else '')
        strong += [len(made)] if len(numbers) > 1 else []
        made.append(row)
    return pd.DataFrame(made), strong


def shown_differences(experiments: Experiments) -> pd.DataFrame:
    """The differences for reading, a row each."""
    made: list[dict[str, str]] = []
    for split in experiments.splits:
        for _, row in split.differences.iterrows():
            metric = split.described[row['head'], row['metric']]
            shown = {name: metric.text(row[name], '+') for name in ('difference', 'low', 'high')}
            made.append({
                'runs': experiments.name(row['group']),
                'metric': split.title(row['head'], row['metric']),
                'difference': shown['difference'],
                f'{_INTERVAL} interval': f'{shown["low"]} to {shown["high"]}',
                'p': f'{row["p"]:.4f}',
                'p (Holm)': f'{row["holm"]:.4f}',
                'verdict': experiments.verdict(split, row),
            })
    return pd.DataFrame(made)


def _notes(experiments: Experiments) -> list[str]:
    """How to read the tables."""
    metrics = {metric.name: metric for split in experiments.splits for metric in split.described.values()}
    compared = {name for split in experiments.splits for name in split.differences['metric']}
    images = ', '.join(f'{split.images} images of {split.name}' for split in experiments.splits)
    notes = [
        f'Metrics are of the best checkpoint of each run, on {images}. An '
        'empty setting was not given.']
    words = {
        'top1': "top1: accuracy in percent; its mean is the plain one over the heads, whatever their weights.",
        'map': 'map: mean average precision in percent; no mean over images, so it is not compared.',
        'mae': "mae: mean absolute error in the column's unit; less is better.",
    }
    notes += [text for name, text in words.items() if name in metrics]
    for name, metric in metrics.items():
        said = [metric.title] * (metric.title != name) + ['lower is better'] * metric.lower_is_better + [
            'no mean over images, so it is not compared'] * (bool(compared) and name not in compared)
        if said and name not in words:
            notes.append(f'{name}: {"; ".join(said)}.')
    if any(len(numbers) > 1 for numbers in experiments.groups):
        notes.append('Runs that differ in nothing but seed and whereabouts form a group, in bold: mean ± standard '
                     'deviation over its runs (n - 1).')
    if any(len(split.differences) for split in experiments.splits):
        notes += [
            f'Differences: bootstrap of {RESAMPLES:,} resamples, over images and seeds. The images of a split are '
            'drawn with replacement, the same for both sides; what each image adds is averaged over the runs of a '
            'group first. An image counts for the heads that it has a label of. What other seeds would add is drawn '
            "from Student's t distribution with the standard error of the seeds: of pairs where both sides have the "
            'same seeds, else of two samples (Welch). Two seeds can hardly show a difference; take five.',
            f'{_INTERVAL} percentile intervals, two-sided p; Holm corrects those of the mean over the groups, those of '
            f'single heads over groups and heads, in each split. The verdict is "{BETTER}" or "{WORSE}" where the '
            f'corrected p is below {SURE}.',
            'With one run on a side, interval and p are over the images alone: they say what these models would do on '
            'other images, and nothing of other runs.',
            'The best epoch was chosen on val, which flatters metrics on it; test is the fairer judge.',
        ]
    return [*notes, *experiments.remarks]


def experiments_markdown(experiments: Experiments) -> str:
    """The tables as Markdown."""
    differences = shown_differences(experiments)
    parts = [markdown_table(*shown_experiments(experiments))]
    if len(differences):
        parts += [f'Against {markdown_text(one_line(experiments.name(experiments.baseline)))}:',
                  markdown_table(differences)]
    return '\n\n'.join([*parts, '\n'.join(f'- {markdown_text(one_line(note))}' for note in _notes(experiments))]) + '\n'


def experiments_html(experiments: Experiments) -> str:
    """The tables as a page that needs nothing else."""
    differences = shown_differences(experiments)
    table, groups = shown_experiments(experiments)
    colors = {number: said for number, said in enumerate(differences.get('verdict', ())) if said in (BETTER, WORSE)}
    return render_template(
        'experiments.html',
        title=f'{len(experiments.runs)} runs on {", ".join(split.name for split in experiments.splits)}',
        runs=html_table(table, dict.fromkeys(groups, 'group')),
        baseline=one_line(experiments.name(experiments.baseline)),
        differences=html_table(differences, colors) if len(differences) else None,
        notes=[one_line(note) for note in _notes(experiments)])
