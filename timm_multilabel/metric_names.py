"""The names of metrics: `<metric>` of all heads together, `<head>/<metric>` of one head.

A metric's own name has no '/' (`check_metric_names`), so no two metrics share a name, whatever the heads are called.
summary.csv, the trackers and `--eval-metric` all use these names.
"""
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_RESERVED = ('loss', 'labels', 'head', 'knn_top1', 'balanced_accuracy', 'macro_f1', 'tags', 'tag', 'ones')
"""Names that validation's results, or the evaluation itself, give to something else."""


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
