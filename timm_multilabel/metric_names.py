"""The names of metrics: `<metric>` of all heads together, `<head>/<metric>` of one head.

A metric's own name has no '/' (`check_metric_names`), so no two metrics share a name, whatever the heads are called.
summary.csv, the trackers and `--eval-metric` all use these names.
"""
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_RESERVED = ('loss', 'labels', 'head', 'knn_top1', 'balanced_accuracy', 'macro_f1', 'tags', 'tag', 'ones')
"""Names that validation's results, or the evaluation itself, give to something else."""


@dataclass(frozen=True)
class Metric:
    """A metric of a head, as people read it.

    Args:
        name: Such as 'top1'.
        title: Such as 'top-1 accuracy'; the name by default.
        lower_is_better: As of an error.
        form: How a value is written: a format of Python's, and after a blank the unit, as '.2f %'.
    """
    name: str
    title: str = ''
    lower_is_better: bool = False
    form: str = '.2f'

    def __post_init__(self) -> None:
        if not isinstance(self.title, str) or not isinstance(self.lower_is_better, bool):
            raise ValueError(f"the metric '{self.name}' has a title that is no text, or no direction")
        if not re.fullmatch(r'\.\d[efg]( .{1,20})?', self.form):
            raise ValueError(f"the metric '{self.name}' has the format '{self.form}'; expected one such as .2f, .4g or "
                             "'.2f %'")

    def text(self, value: float, sign: str = '') -> str:
        """A value without its unit, with a '+' before what is above 0 where that is the sign; '' of NaN."""
        return '' if math.isnan(value) else format(value, sign + self.form.partition(' ')[0])

    @property
    def unit(self) -> str:
        """What follows a value, with a blank before it; '' of a metric without a unit."""
        return ''.join(self.form.partition(' ')[1:])


def of_head(head: str, metric: str) -> str:
    """The name of a head's metric."""
    return f'{head}/{metric}'


def earlier_name(name: str) -> str:
    """What earlier versions called a metric, in `--eval-metric` and in checkpoints: `<head>_<metric>`."""
    return '_'.join(name.rsplit('/', 1))


def in_summary(part: str, name: str) -> str:
    """The column of summary.csv of a metric.

    Args:
        part: 'train', 'eval' or 'eval_ema'.
        name: Of a mean ('top1' -> 'eval_top1') or of a head ('color/top1' -> 'eval/color/top1').
    """
    return f'{part}/{name}' if '/' in name else f'{part}_{name}'


def heads_of_summary(columns: Iterable[str]) -> list[str]:
    """The heads that a summary.csv has columns of."""
    return [match[1] for match in (re.fullmatch('(?s:train/(.+)/loss)', column) for column in columns) if match]


def current_names(columns: Sequence[str]) -> list[str]:
    """The columns of a summary.csv under the names of this version.

    Earlier versions wrote `train_<head>_loss` and `eval_<head>_<metric>`. Where such a name could be of two heads
    (`eval_x_micro_f1`), it is taken for that of the longer one, whose value was the one that was kept.
    """
    heads = [match[1] for match in (re.fullmatch('(?s:train_(.+)_loss)', column) for column in columns) if match]
    heads.sort(key=len, reverse=True)
    return [_current_name(column, heads) for column in columns] if heads else list(columns)


def _current_name(column: str, heads: Sequence[str]) -> str:
    for part in ('eval_ema', 'eval', 'train'):
        for head in heads:
            start = f'{part}_{head}_'
            if column.startswith(start) and '/' not in column[len(start):]:
                return in_summary(part, of_head(head, column[len(start):]))
    return column


def check_metric_names(kind: str, names: Sequence[str]) -> None:
    """Raise ValueError unless a kind of head names metrics, each once, with names that nothing else has."""
    if not names:
        raise ValueError(f"'{kind}' names no metrics")
    for name, count in Counter(names).items():
        if not isinstance(name, str) or not re.fullmatch(r'[^\W\d]\w*', name):
            raise ValueError(f"'{kind}' has a metric called '{name}'; use letters, digits and underscores")
        if name in _RESERVED or count > 1:
            raise ValueError(f"'{kind}' has a metric called '{name}', " + (
                'twice' if count > 1 else 'which is the name of something else; give it another name'))
