"""Runs beside each other: their settings, their metrics, and which differences are more than chance."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from timm_multilabel.data.pool import real_paths
from timm_multilabel.errors import UserError, escaped
from timm_multilabel.heads import standard_head
from timm_multilabel.inference.predictions import OwnMetrics, Predictions
from timm_multilabel.labels import Labels, Quantity
from timm_multilabel.metric_names import Metric
from timm_multilabel.places import path_of
from timm_multilabel.reports.bootstrap import (
    Difference,
    describe_difference,
    holm,
    resampled_means,
    seed_spread,
    with_seeds,
)

WHEREABOUTS = (
    'seed', 'output', 'experiment', 'resume', 'workers', 'device', 'cache', 'cache_dir', 'validation_batch_size',
    'checkpoint_steps', 'checkpoint_hist', 'log_interval', 'log_tensorboard', 'log_wandb')
"""Settings of a run that are not of its experiment: runs that differ in nothing else form a group."""

MEAN = ''
"""What stands in place of a head, none of which is called so, for the mean over the heads that have a top-1."""

TOP1 = 'top1'
"""The metric that has a mean over heads."""

SURE = 0.05
"""A difference holds where its corrected p is below."""

IMAGES, SEEDS_AND_IMAGES = 'images', 'seeds and images'
"""What the interval and p of a difference are over."""

BETTER, WORSE = 'better', 'worse'
"""The verdicts on differences that hold."""


@dataclass(frozen=True)
class Run:
    """A run, without its predictions.

    Args:
        name: As the tables call it.
        settings: Flags and values as texts, as `flat_settings` gives them.
        seed: Its seed.
        best_epoch: That of its best checkpoint, from 1.
        epochs: Epochs that it has finished, of its last phase.
    """
    name: str
    settings: Mapping[str, str]
    seed: str
    best_epoch: int
    epochs: int


@dataclass(frozen=True)
class RunPredictions:
    """What is kept of a run's predictions of a split: what each head should have said (N, ...), and what it did say.

    Of classes indices (N,), of tags (N, C) zeros and ones and probabilities, of numbers the standardised ones (N,).
    `images` are the images' paths (N,); `own` has the metrics of heads of kinds with their own ones.
    """
    images: np.ndarray
    labels: Mapping[str, Labels]
    targets: Mapping[str, np.ndarray]
    said: Mapping[str, np.ndarray]
    own: Mapping[str, OwnMetrics] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: Predictions) -> 'RunPredictions':
        """Without the features and probabilities that a comparison does not need."""
        labels = {head.name: head for head in predictions.label_space.heads}
        said = {name: head.predicted(predictions.outputs[name]) for name, head in labels.items()}
        images = np.array(real_paths(predictions.images))
        return cls(images, labels, {name: predictions.target(name) for name in labels}, said,
                   predictions.own_metrics or {})

    def select(self, rows: np.ndarray) -> 'RunPredictions':
        """Some rows, by number."""
        return RunPredictions(
            self.images[rows], self.labels, {name: values[rows] for name, values in self.targets.items()},
            {name: values[rows] for name, values in self.said.items()},
            {name: own.select(rows, len(self.images)) for name, own in self.own.items()})

    def known(self, head: str) -> np.ndarray:
        """Which images have a label of a head (N,)."""
        return self.labels[head].known(torch.from_numpy(self.targets[head])).numpy()

    def metrics(self, head: str) -> tuple[Metric, ...]:
        """The metrics of a head."""
        if head in self.own:
            return self.own[head].metrics
        kind = standard_head(self.labels[head])
        return tuple(map(kind.metric, kind.compared))

    def of_images(self, head: str) -> dict[str, np.ndarray]:
        """Those that are means over images, by name: what they are the means of (N,), NaN where there is no label."""
        if head in self.own:
            return dict(self.own[head].of_rows)
        known = self.known(head)
        return {name: np.where(known, values, np.nan)
                for name, values in standard_head(self.labels[head]).row_metrics(*self._measured(head)).items()}

    def value(self, head: str, metric: str) -> float:
        """A metric of a head over its labels; NaN without any."""
        known, of_images = self.known(head), self.of_images(head)
        if head in self.own and metric in self.own[head].values:
            return self.own[head].values[metric]
        if head in self.own or not known.any():
            return np.nan
        if metric in of_images:
            return float(np.nanmean(of_images[metric]))
        return float(standard_head(self.labels[head]).metrics(*(of[known] for of in self._measured(head)))[metric])

    def with_standard_metrics(self, head: str) -> 'RunPredictions':
        """The same, where a head of a kind with its own metrics has those of the default kind of its labels too."""
        if head not in self.own:
            return self
        own = self.own[head]
        standard = replace(self, own={name: its for name, its in self.own.items() if name != head})
        added = [metric for metric in standard.metrics(head) if metric.name not in own.values]
        of_images = standard.of_images(head)
        return replace(self, own={**self.own, head: replace(
            own, metrics=(*own.metrics, *added),
            values={**own.values, **{metric.name: standard.value(head, metric.name) for metric in added}},
            of_rows={**own.of_rows, **{
                metric.name: of_images[metric.name] for metric in added if metric.name in of_images}})})

    def _measured(self, head: str) -> tuple[np.ndarray, np.ndarray]:
        """Targets (N, W) and what `Head.measure` keeps (N, K)."""
        count = len(self.images)
        return self.targets[head].reshape(count, -1), self.said[head].reshape(count, -1)


def flat_settings(
        settings: Mapping[str, Any],
        flags: Mapping[str, str],
        prefix: str = '',
) -> dict[str, str]:
    """Settings as texts, nested ones beside the others: `--lr`, `--head color:loss`, `pretrain: --lr` of a phase.

    Args:
        settings: Those of args.yaml, or of one of its 'phases', which are mappings with a 'name'.
        flags: How the command line calls them.
        prefix: What stands before their names.
    """
    flat = {}
    for key, value in settings.items():
        name = f'{prefix}{flags.get(key, f"--{key}")}'
        if key in WHEREABOUTS or key == 'name' and prefix:
            continue
        if key == 'data_dir':
            value = str(path_of(value).resolve())  # however it was spelt
        if key == 'phases':
            flat[key] = ' '.join(phase['name'] for phase in value)
            for phase in value:
                flat |= flat_settings(phase, flags, f'{phase["name"]}: ')
        elif isinstance(value, dict):
            for part, inner in value.items():
                if isinstance(inner, dict):
                    flat |= {f'{name} {part}:{option}': _shown(of_option) for option, of_option in inner.items()}
                else:
                    flat[f'{name} {part}'] = _shown(inner)
        else:
            flat[name] = _shown(value)
    return flat


def _shown(value: Any) -> str:
    """A value as the command line and YAML have it; nothing where a flag was not given."""
    if value is None:
        return ''
    if isinstance(value, list):
        return ' '.join(map(_shown, value))
    if isinstance(value, float):
        return f'{value:.12g}'
    return str(value).lower() if isinstance(value, bool) else escaped(value)


def group_runs(runs: Sequence[Run]) -> list[list[int]]:
    """The runs by number in groups of the same settings, both in their order."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for number, run in enumerate(runs):
        settled = {name: value for name, value in run.settings.items() if value}
        groups.setdefault(tuple(sorted(settled.items())), []).append(number)
    return list(groups.values())


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings that not all runs have alike, in the order of args.yaml."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name, '') for run in runs}) > 1]


def share(
        answers: Sequence[RunPredictions],
        names: Sequence[str],
        split: str,
        say: Callable[[str], None],
) -> list[RunPredictions]:
    """The answers of each run to the images that all have, in one order.

    Args:
        answers: Those of each run.
        names: What the runs are called.
        split: The split, for messages.
        say: Prints a line.

    Raises:
        UserError: There is no such image, or one has another label for another run.
    """
    keys = [_keys(each.images) for each in answers]
    shared = keys[0]
    for each in keys[1:]:
        shared = shared if each.equals(shared) else shared[shared.isin(each)]
    if not len(shared):
        raise UserError(
            f'{split}: no image is in the {split} of all runs ({", ".join(names)}); score them all on one data '
            'directory with --data DIR')
    if any(len(each) > len(shared) for each in keys):
        counts = ', '.join(f'{name} {len(each)}' for name, each in zip(names, keys))
        say(f'{split}: compared on the {len(shared)} images that all runs share (of {counts})')
    found = [each.select(own.get_indexer(shared)) for each, own in zip(answers, keys)]
    heads, first = shared_heads(found), found[0]
    for head in heads:
        if len({each.metrics(head) for each in found}) > 1:  # kinds that measure themselves differently
            found = [each.with_standard_metrics(head) for each in found]
    for name, each in zip(names[1:], found[1:]):
        for head in heads:
            differ = ~_same_labels(first, each, head) & first.known(head) & each.known(head)
            if differ.any():
                raise UserError(
                    f"{split}: {differ.sum()} images have another label of '{head}' for {name} than for {names[0]}, "
                    f'{first.images[differ.argmax()]} for one; remove predictions-{split}.npz from their folders, so '
                    'that they are made again, or score them all on one data directory with --data DIR')
    return found


def _keys(images: np.ndarray) -> pd.MultiIndex:
    """What tells rows apart: the image, and which of the rows of the same image it is."""
    names = pd.Series([image.encode('utf-8', 'surrogatepass') for image in images])  # pandas takes no other text
    return pd.MultiIndex.from_arrays([names, names.groupby(names).cumcount()])


def _same_labels(a: RunPredictions, b: RunPredictions, head: str) -> np.ndarray:
    """Which images have the same label for two runs (N,)."""
    ours, theirs, labels = a.targets[head], b.targets[head], a.labels[head]
    if isinstance(labels, Quantity):
        ours, theirs = labels.in_unit(ours), b.labels[head].in_unit(theirs)
        return np.asarray(np.isclose(ours, theirs, rtol=1e-4, atol=1e-4 * labels.std))
    return np.asarray((ours == theirs).reshape(len(ours), -1).all(axis=1))


def shared_heads(answers: Sequence[RunPredictions]) -> list[str]:
    """The heads that all runs have, with the same classes or tags."""
    first = answers[0].labels
    return [name for name, labels in first.items() if all(
        _alike(labels, each.labels.get(name)) for each in answers[1:])]


def _alike(a: Labels, b: Labels | None) -> bool:
    return b is not None and (a.kind, a.columns, a.classes) == (b.kind, b.columns, b.classes)


def run_metrics(answers: Sequence[RunPredictions]) -> pd.DataFrame:
    """The metrics of each run (rows), by head and metric (columns), then the mean over the heads that have a top-1.

    The mean is plain, and over those heads that all runs share and that have labels; there is none where they are less
    than two.
    """
    metrics = [{(name, metric.name): each.value(name, metric.name) for name in each.labels
                for metric in each.metrics(name)} for each in answers]
    table = pd.DataFrame({key: [of_run.get(key, np.nan) for of_run in metrics]
                          for key in dict.fromkeys(key for of_run in metrics for key in of_run)})
    averaged = [name for name, metric in shared_metrics(answers) if metric == TOP1]
    if len(averaged) > 1:
        table[MEAN, TOP1] = table[[(name, TOP1) for name in averaged]].mean(axis=1)
    return table


def describe_metrics(answers: Sequence[RunPredictions]) -> dict[tuple[str, str], Metric]:
    """What there is to say of each column of `run_metrics`."""
    found = {(name, metric.name): metric for each in answers for name in each.labels for metric in each.metrics(name)}
    top1 = next((metric for metric in found.values() if metric.name == TOP1), None)
    return found if top1 is None else {**found, (MEAN, TOP1): top1}


def shared_metrics(answers: Sequence[RunPredictions]) -> list[tuple[str, str]]:
    """The metrics, with their heads, that are means over images, for all runs, and have labels."""
    return [
        (name, metric.name) for name in shared_heads(answers) if _known_by_all(answers, name).any()
        for metric in answers[0].metrics(name) if all(
            metric in each.metrics(name) and metric.name in each.of_images(name) for each in answers)]


def _known_by_all(answers: Sequence[RunPredictions], head: str) -> np.ndarray:
    return np.asarray(np.all([each.known(head) for each in answers], axis=0))


def verdict(difference: float, corrected: float, lower_is_better: bool, over: str, seeds: tuple[int, int]) -> str:
    """What a difference says, in words.

    Args:
        difference: Ours less theirs.
        corrected: Its p, corrected for the comparisons beside it.
        lower_is_better: Whether it is of an error.
        over: What its p is over: IMAGES or SEEDS_AND_IMAGES.
        seeds: How many seeds each side has.
    """
    if min(seeds) < 2:
        return f'one run {"each" if max(seeds) < 2 else "on a side"}: nothing said of other runs'
    if over == IMAGES:
        return 'images alone resampled: nothing said of other runs'
    if not corrected < SURE:
        return 'no difference shown'
    return BETTER if (difference > 0) != lower_is_better else WORSE


def compare_groups(
        answers: Sequence[RunPredictions],
        groups: Sequence[Sequence[int]],
        seeds: Sequence[object],
        baseline: int,
        advance: Callable[[int], object] = lambda number: None,
) -> pd.DataFrame:
    """The differences of groups of runs to one of them, by a bootstrap over images and seeds.

    What each image adds to a metric is first averaged over the runs of a group. See `reports.bootstrap` for what is
    resampled. p is corrected (Holm) over the groups for the mean over heads, and over groups and heads for the single
    heads.

    Args:
        answers: Those of each run, to the same images in the same order.
        groups: The runs of each group, by number.
        seeds: The seed of each run; runs of a group with the same one count as one.
        baseline: The group to compare with, by number.
        advance: See `resampled_means`.

    Returns:
        A row a comparison: 'group' (number), 'head', 'metric', 'difference', 'low', 'high', 'p', 'holm', 'over' (what
        interval and p are over: IMAGES with one seed on a side, else SEEDS_AND_IMAGES); the means over heads first.
    """
    columns = ['group', 'head', 'metric', 'difference', 'low', 'high', 'p', 'holm', 'over']
    metrics = shared_metrics(answers)
    others = [number for number in range(len(groups)) if number != baseline]
    if not metrics or not others:
        return pd.DataFrame(columns=columns)
    of_images = np.stack([_image_values(answers, head, metric) for head, metric in metrics], axis=2)
    of_groups = [of_images[list(group)].mean(axis=0) for group in groups]
    differences = np.concatenate([of_groups[number] - of_groups[baseline] for number in others], axis=1)
    resampled = resampled_means(differences, advance=advance).reshape(-1, len(others), len(metrics))
    found = np.nanmean(differences, axis=0).reshape(len(others), len(metrics))
    of_runs = np.nanmean(of_images, axis=1)
    hits = [bool(np.isin(values[~np.isnan(values)], (0, 100)).all()) for values in np.moveaxis(of_images, 2, 0)]

    def describe(row: int, chosen: list[int]) -> tuple[Difference, str]:
        """The mean difference of some of the metrics, and what it is over."""
        ours, theirs = (_by_seed(of_runs[:, chosen].mean(axis=1), groups[group], seeds)
                        for group in (others[row], baseline))
        # Shares of images that are right, in percent, come in steps.
        spread = seed_spread(ours, theirs, 100 / (len(answers[0].images) * len(chosen)) if hits[chosen[0]] else 0.0)
        drawn = resampled[:, row, chosen].mean(axis=1)
        if spread is not None:
            drawn = with_seeds(drawn, spread)
            if hits[chosen[0]]:
                drawn = np.clip(drawn, -100, 100)  # Student's t knows no largest difference
        return (describe_difference(float(found[row, chosen].mean()), drawn),
                IMAGES if spread is None else SEEDS_AND_IMAGES)

    averaged = [place for place, (_, metric) in enumerate(metrics) if metric == TOP1]
    means, singles = [], []
    for row, group in enumerate(others):
        if len(averaged) > 1:
            means.append((group, MEAN, TOP1, *describe(row, averaged)))
        for place, (head, metric) in enumerate(metrics):
            singles.append((group, head, metric, *describe(row, [place])))
    rows = []
    for family in (means, singles):
        for (*which, each, over), corrected in zip(family, holm([each.p for *_, each, _ in family])):
            rows.append((*which, each.value, each.low, each.high, each.p, corrected, over))
    return pd.DataFrame(rows, columns=columns)


def _image_values(answers: Sequence[RunPredictions], head: str, metric: str) -> np.ndarray:
    """What images add to a metric of each run (R, N), NaN where not all runs have a label."""
    values = np.stack([each.of_images(head)[metric] for each in answers])
    return np.where(_known_by_all(answers, head), values, np.nan)


def _by_seed(values: np.ndarray, runs: Sequence[int], seeds: Sequence[object]) -> dict[str, float]:
    """The mean of some runs' values by their seed."""
    of_runs = pd.Series(values[list(runs)], [str(seeds[run]) for run in runs])
    return {str(seed): float(value) for seed, value in of_runs.groupby(level=0).mean().items()}
