"""The curves of a run, of its summary.csv alone: accuracy, losses and learning rate over the epochs."""
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from timm_multilabel.errors import abbreviated
from timm_multilabel.escaping import picture_text
from timm_multilabel.files import write_atomic
from timm_multilabel.metric_names import heads_of_summary, in_summary, of_head
from timm_multilabel.reports.pictures import png
from timm_multilabel.training.run_folder import running_epochs
from timm_multilabel.training.trackers import Tracker

# Of the palettes of Okabe and Ito and of Paul Tol, in an order in which the first N differ most for every kind of color
# blindness (a test computes it). Lines have markers of their own too.
_COLORS = ('#0072b2', '#e69f00', '#66ccee', '#882255', '#ddcc77', '#ee6677', '#332288', '#cc79a7', '#999933', '#228833',
           '#a020e0', '#004000')
_MARKERS = 'os^DvPX<>*dp'
_WIDTH, _DPI = 8.0, 150  # inches, and dots in one of them: twice what a README shows, nearly
_MARKED = 12  # epochs with a marker, about, of a long run
_SIZE = 3.5  # points of a marker
_NAME = 20  # letters of a name
_HEADS = 12  # that can be told apart: of more, the best and the worst have a look of their own, and the others are gray
_PICKED = 5  # of the best, and as many of the worst
_GRAY = '#c8c8c8'
_LARGEST = 1e30  # value that can be drawn
_LETTERS = 75  # that stand side by side on the x axis


@dataclass(frozen=True)
class _Curve:
    """A line: its name, its values (N,), how it looks, and which of its values is the best."""
    name: str
    values: np.ndarray
    color: str
    marker: str = 'o'
    style: Literal['-', '--', ':'] = '-'
    width: float = 1.4
    best: Callable[[np.ndarray], int] | None = None  # np.nanargmax, np.nanargmin
    layer: int = 2  # the higher ones are drawn over the lower ones


@dataclass(frozen=True)
class _Panel:
    """What shares a y axis."""
    label: str
    height: float  # inches
    curves: tuple[_Curve, ...]
    floor: float | None = None  # values below are cut off


class CurvesTracker(Tracker):
    """A picture of all curves, drawn again after each epoch.

    Args:
        path: The picture; its folder must exist.
    """
    name = 'Curves'

    def __init__(self, path: Path):
        self.path = path

    def add_epoch(self, summary: pd.DataFrame) -> None:
        write_curves(summary, self.path)


def write_curves(summary: pd.DataFrame, path: Path) -> None:
    """Write `all_curves` of a run as a PNG, under the name of its folder; nothing without a row.

    Args:
        summary: summary.csv, as `read_summary` gives it.
        path: The picture; its folder must exist.

    Raises:
        UserError: It cannot be written.
    """
    figure = all_curves(summary)
    if figure is not None:
        figure.suptitle(picture_text(path.resolve().parent.name, _LETTERS), fontsize=10)
        write_atomic(path, png(figure, _DPI))


def all_curves(summary: pd.DataFrame) -> Figure | None:
    """All curves of a run above one another, with the same edges and epochs; None without a row.

    The best epoch of a curve has a large mark and is named in the legend. Epochs count from 1, as on the progress line,
    over all phases. The axes have as labels those of 'accuracy' (of the validation, per head and mean), 'loss'
    (training and validation), 'terms' (of the training loss, weighted), 'head_losses' (unweighted) and 'learning_rate'
    that the run has.

    Args:
        summary: summary.csv, as `read_summary` gives it.
    """
    panels = _panels(summary)
    if not panels:
        return None
    heights = [panel.height for panel in panels.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout='constrained')
    axes = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for name, each in zip(panels, axes, strict=True):
        each.set_label(name)
    _draw(axes, list(panels.values()), summary)
    return figure


def _panels(summary: pd.DataFrame) -> dict[str, _Panel]:
    """The panels that have something to show, by name."""
    if summary.empty:
        return {}
    found = {
        'accuracy': _accuracy(summary), 'loss': _loss(summary), 'terms': _terms(summary),
        'head_losses': _head_losses(summary), 'learning_rate': _learning_rate(summary)}
    return {name: panel for name, panel in found.items() if panel.curves}


def _accuracy(summary: pd.DataFrame) -> _Panel:
    """The main metric of each head, and their mean; the heads of the weights that did better, the mean of both."""
    metrics = {head: _main_metric(summary, head) for head in heads_of_summary(summary)}
    means = [_mean(summary, part) for part in ('eval', 'eval_ema')]
    values, curves = _main_values(summary), []
    for head, look in _looks(values).items():
        metric = metrics.get(head)
        name = _name(head) + ('' if metric in ('top1', None) else f', {_name(metric)}')
        curves.append(_head_curve(values[head], name, look, best=np.nanargmax))
    curves = _with_others(curves)
    if len(metrics) > 1:
        curves.append(_Curve('mean', means[0], 'black', width=2.2, best=np.nanargmax))
        curves.append(_Curve('mean of EMA', means[1], '#555555', 'o', '--', 2.2, np.nanargmax))
    label = 'val accuracy (%)' if set(metrics.values()) <= {'top1', None} else 'val metric (%)'
    drawn = _drawable(curves)
    return _Panel(label + (',\nheads of EMA' if _ema_is_better(summary) else ''),
                  2.5 + 0.16 * max(0, _named(drawn) - 11), drawn, floor=0)


def _loss(summary: pd.DataFrame) -> _Panel:
    """The objective of the training, and the heads' loss of the validation."""
    one_objective = 'phase' not in summary or summary['phase'].nunique() == 1  # else the least is not the best
    return _Panel('loss', 1.6, _drawable([
        _Curve('train, all terms', _values(summary, 'train_loss'), _COLORS[0],
               best=np.nanargmin if one_objective else None),
        _Curve('val, heads', _values(summary, 'eval_loss'), _COLORS[1], 's', best=np.nanargmin),
        _Curve('val, heads of EMA', _values(summary, 'eval_ema_loss'), _COLORS[3], '^', '--', best=np.nanargmin)]))


def _terms(summary: pd.DataFrame) -> _Panel:
    """The terms that add up to the training loss, where they are several."""
    names = [match[1] for match in (re.fullmatch('(?!train_|eval_)(.+)_loss', column) for column in summary) if match]
    curves = [
        _head_curve(_values(summary, f'{name}_loss'), _name(name.replace('_', ' ').replace('simclr', 'SimCLR')), number)
        for number, name in enumerate(names)]
    drawn = _drawable(curve for curve in curves if np.nan_to_num(curve.values).any())
    return _Panel('weighted terms of\ntrain loss', 1.6, drawn if len(drawn) > 1 else ())


def _head_losses(summary: pd.DataFrame) -> _Panel:
    """The loss of each head, in training and validation."""
    curves = []
    losses = {part: {head: _values(summary, in_summary(part, of_head(head, 'loss')))
                     for head in heads_of_summary(summary)} for part in ('train', 'eval')}
    for head, look in _looks(_main_values(summary)).items():
        curves.append(_head_curve(losses['train'][head], '', look, style=':'))
        curves.append(_head_curve(losses['eval'][head], _name(head), look, best=np.nanargmin))
    drawn = _drawable(_with_others(curves))
    return _Panel('loss of each head\n(dotted: train, full: val)', 2.1 + 0.16 * max(0, _named(drawn) - 9), drawn)


def _learning_rate(summary: pd.DataFrame) -> _Panel:
    return _Panel('learning rate', 1.0, _drawable([_Curve('', _values(summary, 'lr'), '#555555')]))


def _mean(summary: pd.DataFrame, part: str) -> np.ndarray:
    """The mean of the heads' main metrics (N,)."""
    return _values(summary, in_summary(part, 'score' if 'eval_score' in summary else 'top1'))


def _ema_is_better(summary: pd.DataFrame) -> bool:
    plain, ema = (_best(_mean(summary, part)) for part in ('eval', 'eval_ema'))
    return ema > -np.inf and ema >= plain


def _main_values(summary: pd.DataFrame) -> dict[str, np.ndarray]:
    """The main metric (N,) of each head, of the weights that did better."""
    found, ema_is_better = {}, _ema_is_better(summary)
    for head in heads_of_summary(summary):
        column = of_head(head, _main_metric(summary, head) or 'top1')
        found[head], of_ema = (_values(summary, in_summary(part, column)) for part in ('eval', 'eval_ema'))
        if ema_is_better:  # a phase may be without
            found[head] = np.where(np.isnan(of_ema), found[head], of_ema)
    return found


def _looks(values: dict[str, np.ndarray]) -> dict[str, int | None]:
    """The number of each head's look; of many heads that of the best and the worst, the best first, None between them.

    Args:
        values: The main metric (N,) of each head.
    """
    if len(values) <= _HEADS:
        return {head: number for number, head in enumerate(values)}
    ranked = sorted(values, key=lambda head: -_best(values[head]))
    ranked = [head for head in ranked if _best(values[head]) > -np.inf] or ranked
    if len(ranked) <= _HEADS:
        return {head: number for number, head in enumerate(ranked)}
    picked = [*ranked[:_PICKED], *ranked[-_PICKED:]]
    return {head: picked.index(head) if head in picked else None for head in ranked}


def _with_others(curves: Sequence[_Curve]) -> list[_Curve]:
    """Curves in the order of the legend, of which those without a look of their own have one name for all of them."""
    others = [number for number, curve in enumerate(curves) if curve.color == _GRAY and curve.name]
    made = list(curves)
    for number in others:
        named = f'{len(others)} others' if number == others[0] else ''
        made[number] = replace(curves[number], name=named, best=None)
    return made


def _named(curves: Sequence[_Curve]) -> int:
    """Lines of a legend."""
    return sum(bool(curve.name) for curve in curves)


def _main_metric(summary: pd.DataFrame, head: str) -> str | None:
    """The metric that comes first after a head's loss: 'top1', 'map', 'r2' or one of the user's own."""
    before = in_summary('eval', of_head(head, 'loss'))
    its = [column for column in summary if column.rpartition('/')[0] == before.rpartition('/')[0]]
    return next((column.rpartition('/')[2] for column in its if column != before), None)


def _values(summary: pd.DataFrame, column: str) -> np.ndarray:
    """A column as numbers (N,); NaN where there is none, or one beyond what can be drawn."""
    if column not in summary:
        return np.full(len(summary), np.nan)
    values = pd.to_numeric(summary[column], errors='coerce').to_numpy(float)
    return np.where(np.abs(values) < _LARGEST, values, np.nan)


def _best(values: np.ndarray) -> float:
    """The largest of some values that may all be NaN; then minus infinity."""
    return max(values[~np.isnan(values)], default=-np.inf)


def _head_curve(
        values: np.ndarray,
        name: str,
        number: int | None,
        style: Literal['-', '--', ':'] = '-',
        best: Callable[[np.ndarray], int] | None = None,
) -> _Curve:
    """A curve with the color and the marker of the head, or term, of this number; thin and gray without a number."""
    if number is None:
        return _Curve(name, values, _GRAY, '', style, 0.8, best, layer=1)
    turn, color = divmod(number, len(_COLORS))
    marker = _MARKERS[(color + turn) % len(_MARKERS)]  # so that no two of many have both in common
    return _Curve(name, values, _COLORS[color], marker, style, best=best)


def _drawable(curves: Iterable[_Curve]) -> tuple[_Curve, ...]:
    """The curves that have any value."""
    return tuple(curve for curve in curves if not np.isnan(curve.values).all())


def _name(name: str) -> str:
    """A name of a column, a head or a phase."""
    return picture_text(abbreviated(name, _NAME), _NAME)


def _draw(axes: Iterable[Axes], panels: Iterable[_Panel], summary: pd.DataFrame) -> None:
    """Draw panels above one another, with the legends to their right."""
    axes, epochs = list(axes), np.array(running_epochs(summary))
    begins = _phases(summary)
    for each, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            _draw_curve(each, curve, epochs, begins)
        each.set_ylabel(panel.label, fontsize=9)
        each.grid(color='#e5e5e5', linewidth=0.7)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8.5)
        each.spines[['top', 'right']].set_visible(False)
        if panel.floor is not None and each.get_ylim()[0] < panel.floor:
            each.set_ylim(bottom=panel.floor)
        _legend(each, panel, epochs)
        _mark_phases(each, begins, epochs, named=each is axes[0])
    axes[-1].set_xlabel('epoch', fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = min(0.02 * len(epochs), 0.9) if len(epochs) > 1 else 0.5  # no room for an epoch that is none
    axes[-1].set_xlim(epochs[0] - margin, epochs[-1] + margin)


def _draw_curve(axes: Axes, curve: _Curve, epochs: np.ndarray, begins: dict[int, str]) -> None:
    """Draw a line, from the beginning of a phase to its end, and a larger mark at its best epoch."""
    ends = [*begins, len(epochs)] if begins else [0, len(epochs)]
    every = max(1, len(epochs) // _MARKED)
    for first, end in zip(ends, ends[1:]):
        axes.plot(
            epochs[first:end], curve.values[first:end], color=curve.color, linestyle=curve.style,
            linewidth=curve.width, marker=curve.marker, markersize=_SIZE, markevery=every, label=curve.name or '_',
            zorder=curve.layer)
    if curve.best is not None:
        best = curve.best(curve.values)
        axes.plot(epochs[best], curve.values[best], color=curve.color, marker=curve.marker, markersize=2.4 * _SIZE,
                  markeredgecolor='black', markeredgewidth=0.9, label='_', zorder=3)


def _legend(axes: Axes, panel: _Panel, epochs: np.ndarray) -> None:
    """The named curves; those with a best epoch with its value and, in brackets, its number."""
    curves = [curve for curve in panel.curves if curve.name]
    if not curves:
        return
    labels = []
    for curve in curves:
        label = curve.name
        if curve.best is not None:
            best = curve.best(curve.values)
            label += f'  {_short(curve.values[best])} ({epochs[best]})'
        labels.append(' ' * label.startswith('_') + label)  # matplotlib leaves out what starts so
    handles = [Line2D([], [], color=curve.color, linestyle=curve.style, linewidth=curve.width, marker=curve.marker,
                      markersize=4.5) for curve in curves]
    axes.legend(
        handles, labels, loc='upper left', bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize=8.5,
        title='best (at epoch)' if any(curve.best is not None for curve in curves) else None, title_fontsize=8.5,
        alignment='left', labelspacing=0.35, handlelength=1.8)


def _short(value: float) -> str:
    """A number with three digits, or one behind the point."""
    return f'{value:.1f}' if 10 <= abs(value) < 1e5 else f'{value:#.3g}'


def _phases(summary: pd.DataFrame) -> dict[int, str]:
    """The row that each phase begins with, and its name; none where there are no phases."""
    if 'phase' not in summary:
        return {}
    names = summary['phase'].astype(str).tolist()
    return {row: name for row, name in enumerate(names) if row == 0 or name != names[row - 1]}


def _mark_phases(axes: Axes, begins: dict[int, str], epochs: np.ndarray, named: bool) -> None:
    """A line where a phase begins, and its name at the top of it, one line higher where it would meet another."""
    taken = [-np.inf, -np.inf]  # where names end, at each height, in letters
    letters = _LETTERS / max(1, epochs[-1] - epochs[0])
    for row, name in begins.items():
        place = epochs[row] - 0.5 if row else epochs[0]
        if row:
            axes.axvline(place, color='#777777', linewidth=0.9, linestyle=(0, (1, 2)))
        if named:
            height = 0 if taken[0] <= place * letters or taken[0] <= taken[1] else 1
            taken[height] = place * letters + len(_name(name)) + 1
            axes.annotate(
                _name(name), (place, 1), (3 if row else 0, 3 + 11 * height), xycoords=axes.get_xaxis_transform(),
                textcoords='offset points', fontsize=8.5, color='#444444')
