"""An experiment's results: Markdown tables and a picture, made of the two CSVs alone."""
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from timm_multilabel.errors import UserError
from timm_multilabel.escaping import markdown_code, markdown_text, picture_text, shown
from timm_multilabel.heads import SoftmaxHead
from timm_multilabel.metric_names import Metric, of_head
from timm_multilabel.reports.bootstrap import LEVEL, RESAMPLES
from timm_multilabel.reports.experiments import BETTER, SEEDS_AND_IMAGES, SURE, TOP1, WORSE, verdict
from timm_multilabel.reports.experiments import MEAN as MEAN_HEAD
from timm_multilabel.reports.tables import markdown_table

MEAN = 'mean'
"""The column of the plain mean over heads."""

_COLORS = ('#000000', '#4477aa', '#66ccee', '#228833', '#ccbb44', '#ee6677', '#aa3377', '#bbbbbb',
           '#994f00')
_NAME, _TITLE = 32, 60  # letters of a name in the picture, and of the title
_BESIDE = 4  # panels in a row of the picture
_ASIDE = 0.25  # of the least distance of two values, over which their settings are spread


@dataclass(frozen=True)
class GridResults:
    """What came of an experiment.

    Args:
        title: What it is called.
        about: What it asks.
        split: The split that the metrics are of.
        axis: The column of what varies, or None.
        settings: The settings in their order; the others were compared with the first one.
        runs: A row a run: 'setting', the axis, 'seed', a column for each metric, 'mean' (of the heads' top-1),
            'minutes', 'cpu_minutes' (its own and those of what it started from), and where it ran.
        differences: A row a comparison with the first setting: the axis, 'setting', 'head', 'difference', 'low',
            'high', 'p', 'holm', 'over' (see `compare_groups`).
        metrics: The metrics by their column, which is the head of a top-1, else 'HEAD/METRIC'.
    """
    title: str
    about: str
    split: str
    axis: str | None
    settings: Sequence[str]
    runs: pd.DataFrame
    differences: pd.DataFrame
    metrics: Mapping[str, Metric]

    @property
    def columns(self) -> list[str]:
        """The columns that are shown: the mean over heads, where several have a top-1, and each metric."""
        return [MEAN] * (len(self._top1) > 1) + list(self.metrics)

    @property
    def _top1(self) -> list[str]:
        return [column for column, metric in self.metrics.items() if metric.name == TOP1]

    @property
    def only_top1(self) -> bool:
        """Whether there is no other metric than the heads' top-1."""
        return len(self._top1) == len(self.metrics)

    def metric(self, column: str) -> Metric:
        """The metric of a column."""
        return self.metrics[self._top1[0] if column == MEAN and self._top1 else column]

    @property
    def values(self) -> list[Any]:
        """The values of what varies."""
        return [] if self.axis is None else list(dict.fromkeys(self.runs[self.axis]))

    def of(self, setting: str, value: object = None) -> pd.DataFrame:
        """The runs of a setting, with a value where something varies, by seed."""
        found = self.runs[self.runs['setting'] == setting]
        return (found if self.axis is None or value is None else found[found[self.axis] == value]).sort_values('seed')

    def verdict(self, row: Mapping[str, Any]) -> str:
        """What a row of the differences says."""
        value = None if self.axis is None else row[self.axis]
        ours, theirs = (self.of(name, value)[row['head']].count() for name in (row['setting'], self.settings[0]))
        return verdict(
            row['difference'], row['holm'], self.metric(row['head']).lower_is_better, row['over'], (ours, theirs))

    def by_seed(self, setting: str, value: object, head: str) -> np.ndarray:
        """The differences of a setting to the first one, seed by seed."""
        ours, base = (self.of(name, value).set_index('seed')[head] for name in (setting, self.settings[0]))
        return np.asarray((ours - base).dropna())


def metric_columns(metrics: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The column of results for each column (head, metric) of `run_metrics` but the mean.

    Raises:
        UserError: Two would have the same name.
    """
    keys = [(head, metric) for head, metric in metrics.columns if head != MEAN_HEAD]
    columns = {head if metric == TOP1 else of_head(head, metric): (head, metric) for head, metric in keys}
    if len(columns) < len(keys):
        raise UserError(f'two metrics would have one column of the results ({", ".join(columns)}); rename a head')
    return columns


def metrics_text(metrics: Mapping[str, Metric]) -> str:
    """What `read_metrics` reads: metrics by their column as JSON."""
    return json.dumps({column: asdict(metric) for column, metric in metrics.items()})


def read_metrics(runs: pd.DataFrame, columns: Sequence[str]) -> dict[str, Metric]:
    """The metrics by their column, of the column 'metrics' of results; without it, all are top-1.

    Raises:
        ValueError: They are not those of the columns.
    """
    if 'metrics' not in runs:
        return dict.fromkeys(columns, SoftmaxHead.metric(TOP1))
    try:
        found = {column: Metric(**each) for column, each in json.loads(runs['metrics'].iloc[0]).items()}
    except (AttributeError, TypeError) as error:
        raise ValueError("the column 'metrics' does not describe any") from error
    if list(found) != list(columns):
        raise ValueError("the column 'metrics' describes other columns")
    return found


def grid_markdown(results: GridResults) -> str:
    """The tables."""
    parts = [f'# {markdown_text(results.title)}', _about(results.about)]
    split = markdown_text(results.split)
    if results.axis is None:
        what = 'Top-1' if results.only_top1 else 'Metrics'
        parts += [f'{what} on {split}, mean ± standard deviation over seeds:', markdown_table(_by_setting(results))]
    else:
        for column in results.columns:
            what = 'mean over heads' if column == MEAN else markdown_text(column)
            of_top1 = results.metric(column).name == TOP1
            parts += [f'## Top-1, {what}' if of_top1 else f'## {what}', markdown_table(_by_value(results, column))]
    if len(results.differences):
        parts += [f'## Against {markdown_text(results.settings[0])}', markdown_table(_differences(results))]
    seeds = ', '.join(map(str, sorted(set(results.runs['seed']))))
    parts.append('\n'.join(f'- {note}' for note in [
        f'Metrics: {_described(results)} on {split}, of the checkpoint that was best on val; mean ± '
        f'standard deviation (n - 1) over the seeds {seeds}. The mean is the plain one over heads.',
        *_on_differences(results),
        'CPU minutes: of all threads of a run, its evaluations and its start from the command line included, and those '
        'of the run that it started from; the mean over ' + ('seeds and values.' if results.axis else 'seeds.'),
        _where(results.runs),
    ]))
    return '\n\n'.join(part for part in parts if part) + '\n'


def _described(results: GridResults) -> str:
    """What the columns are."""
    if results.only_top1:
        return 'top-1 in percent'
    words = []
    for column, metric in results.metrics.items():
        more = (metric.title != metric.name) * f' is {metric.title}' + metric.lower_is_better * ' (lower is better)'
        words.append(markdown_text(f'{column}{more}'))
    return ', '.join(words)


def _on_differences(results: GridResults) -> list[str]:
    """How the differences were made, for all kinds of them that there are."""
    if not len(results.differences):
        return []
    old = results.differences['over'] != SEEDS_AND_IMAGES
    notes = [
        f'Differences: bootstrap of {RESAMPLES:,} resamples of the images, the same for both sides, what an image adds '
        f'averaged over the seeds first; {100 * LEVEL:.0f} % percentile intervals; Holm corrects p over the settings '
        '(the mean), or over settings and heads' + (', for each value' if results.axis else '')
        + '. *By seed*: the difference of each pair of runs.']
    if not old.all():
        notes.append(
            "What other seeds would add to each resample is drawn from Student's t distribution with the standard "
            f'error of the differences by seed. The verdict is "{BETTER}" or "{WORSE}" where the corrected p is below '
            f'{SURE}.')
    if old.any():
        notes.append(
            'Where the verdict says that nothing is said of other runs, the images alone were resampled: interval and '
            'p are of the models that were trained, on other images, and other seeds may contradict them.')
    return notes


def _where(runs: pd.DataFrame) -> str:
    said = [f'{name} {", ".join(dict.fromkeys(runs[name].astype(str)))}' for name in ('commit', 'machine', 'torch')]
    return f'Made by {markdown_code(runs["command"].iloc[-1])}; {markdown_text("; ".join(said))}.'


def _about(text: str) -> str:
    """What an experiment asks, which is Markdown, without HTML."""
    return shown(text).replace('<', '&lt;').strip()


def _spread(values: pd.Series, metric: Metric) -> str:
    values = values.dropna()
    return metric.text(values.mean()) + (f' ± {metric.text(values.std(ddof=1))}' if len(values) > 1 else '')


def _minutes(runs: pd.DataFrame) -> str:
    minutes = runs['cpu_minutes'].dropna()
    return f'{minutes.mean():.1f}' if len(minutes) else ''


def _by_setting(results: GridResults) -> pd.DataFrame:
    return pd.DataFrame([
        {'setting': name, **{column: _spread(results.of(name)[column], results.metric(column))
                             for column in results.columns}, 'CPU minutes': _minutes(results.of(name))}
        for name in results.settings])


def _by_value(results: GridResults, column: str) -> pd.DataFrame:
    return pd.DataFrame([
        {'setting': name, **{f'{results.axis} {value}': _spread(results.of(name, value)[column], results.metric(column))
                             for value in results.values}, 'CPU minutes': _minutes(results.of(name))}
        for name in results.settings])


def _differences(results: GridResults) -> pd.DataFrame:
    made = []
    for row in results.differences.to_dict('records'):
        value = None if results.axis is None else row[results.axis]
        seeds, metric = results.by_seed(row['setting'], value, row['head']), results.metric(row['head'])
        shown = {name: metric.text(row[name], '+') for name in ('difference', 'low', 'high')}
        made.append({
            **({} if value is None else {results.axis: value}),
            'setting': row['setting'],
            'metric': row['head'],
            'difference': shown['difference'],
            f'{100 * LEVEL:.0f} % interval': f'{shown["low"]} to {shown["high"]}',
            'by seed': ' '.join(f'{each:+.1f}' if metric.name == TOP1 else metric.text(each, '+') for each in seeds),
            'p (Holm)': f'{row["holm"]:.4f}',
            'verdict': results.verdict(row),
        })
    return pd.DataFrame(made)


def draw_grid(results: GridResults) -> Figure:
    """A panel for the mean and one a metric: by what varies a line a setting, else a bar; whiskers are a deviation."""
    columns, axis = results.columns, 'top-1, %' if results.only_top1 else ''
    height = 3.4 if results.axis else 0.9 + 0.3 * len(results.settings)
    lines, beside = -(-len(columns) // _BESIDE), min(len(columns), _BESIDE)
    figure = Figure(figsize=(max(6, 3.1 * beside), lines * height + (1.1 if results.axis else 0.3)),
                    layout='constrained')
    panels = figure.subplots(lines, beside, squeeze=False, sharey=results.axis is None).ravel()
    for panel in panels[len(columns):]:
        panel.remove()
    for panel, name in zip(panels, columns):
        (_draw_bars if results.axis is None else _draw_lines)(panel, results, name)
        panel.set_title('mean over heads' if name == MEAN else picture_text(name, _NAME), fontsize=10)
        panel.spines[['top', 'right']].set_visible(False)
        panel.grid(color='#e5e5e5', linewidth=0.7, axis='x' if results.axis is None else 'both')
        panel.set_axisbelow(True)
    title, split = picture_text(results.title, _TITLE), picture_text(results.split, _NAME)
    bars = '; bars are one standard deviation over the seeds' if results.runs['seed'].nunique() > 1 else ''
    figure.suptitle(f'{title}: {"top-1" if results.only_top1 else "metrics"} on {split}{bars}', fontsize=10)
    if results.axis:
        panels[0].set_ylabel(axis)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False, fontsize=9)
    else:
        panels[0].set_ylim(len(results.settings) - 0.5, -0.5)
        figure.supxlabel(axis, fontsize=10)
    return figure


def _draw_bars(panel: Axes, results: GridResults, column: str) -> None:
    for place, name in enumerate(results.settings):
        values = results.of(name)[column].dropna()
        panel.errorbar(values.mean(), place, xerr=values.std(ddof=1) if len(values) > 1 else None, fmt='o', capsize=3,
                       markersize=5, color='#000000' if not place else '#4477aa')
    base = results.of(results.settings[0])[column].mean()
    panel.axvline(base, color='black', linewidth=0.7, linestyle=':')
    panel.set_yticks(range(len(results.settings)), [picture_text(name, _NAME) for name in results.settings], fontsize=9)


def _draw_lines(panel: Axes, results: GridResults, column: str) -> None:
    numbers = all(isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)
                  for value in results.values)
    places = np.array(results.values, dtype=float) if numbers else np.arange(len(results.values), dtype=float)
    logarithmic = numbers and places.min() > 0 and places.max() > 20 * places.min()
    scaled = np.sort(np.log(places) if logarithmic else places)
    gap = _ASIDE * np.diff(scaled).min() if len(places) > 1 else 0.1
    for order, name in enumerate(results.settings):
        runs = [results.of(name, value)[column].dropna() for value in results.values]
        there = [bool(len(each)) for each in runs]
        runs = [each for each in runs if len(each)]
        # Apart, so that whiskers do not hide each other.
        aside = gap * (order - (len(results.settings) - 1) / 2) / len(results.settings)
        at = places * np.exp(aside) if logarithmic else places + aside
        panel.errorbar(
            at[there], [each.mean() for each in runs], yerr=[each.std(ddof=1) if len(each) > 1 else 0 for each in runs],
            label=_legend_text(name), color=_COLORS[order % len(_COLORS)], marker='o', markersize=3.5,
            linewidth=1.3, capsize=2, linestyle='-' if order < len(_COLORS) else '--')
    if logarithmic:
        panel.set_xscale('log')
    panel.set_xticks(places, [f'{value:,}' if numbers else picture_text(str(value), _NAME) for value in results.values])
    panel.minorticks_off()
    panel.set_xlabel(picture_text(str(results.axis).replace('_', ' '), _NAME))


def _legend_text(name: str) -> str:
    """A name that matplotlib puts into a legend, from which it leaves out what starts with an underscore."""
    return ' ' * name.startswith('_') + picture_text(name, _NAME)
