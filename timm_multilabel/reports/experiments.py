"""Runs beside each other: their settings, their metrics, and which differences are more than chance."""
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from timm_multilabel.errors import UserError, escaped
from timm_multilabel.heads import TagsHead
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import Labels, LabelSet, Quantity, TagSet
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
"""What stands in place of a head, none of which is called so, for the mean over the heads of classes."""

FIGURES = {LabelSet: 'top1', TagSet: 'map', Quantity: 'mae'}
"""The figure of a head of each kind of labels."""

COMPARED = ('top1', 'mae')
"""The figures that are means over images, as a bootstrap over images needs them."""

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
    `images` are the images' paths (N,).
    """
    images: np.ndarray
    labels: Mapping[str, Labels]
    targets: Mapping[str, np.ndarray]
    said: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, predictions: Predictions) -> 'RunPredictions':
        """Without the features and probabilities that a comparison does not need."""
        labels = {head.name: head for head in predictions.label_space.heads}
        said = dict(predictions.outputs)
        for name, head in labels.items():
            if isinstance(head, LabelSet):
                said[name] = said[name].argmax(axis=1)
            elif isinstance(head, Quantity):
                said[name] = said[name][:, 0]
        images = np.array([os.path.realpath(image) for image in predictions.images])
        return cls(images, labels, {name: predictions.target(name) for name in labels}, said)

    def select(self, rows: np.ndarray) -> 'RunPredictions':
        """Some rows, by number."""
        return RunPredictions(
            self.images[rows], self.labels, {name: values[rows] for name, values in self.targets.items()},
            {name: values[rows] for name, values in self.said.items()})

    def known(self, head: str) -> np.ndarray:
        """Which images have a label of a head (N,)."""
        target, labels = self.targets[head], self.labels[head]
        if isinstance(labels, Quantity):
            return ~np.isnan(target)
        return target >= 0 if target.ndim == 1 else (target >= 0).any(axis=1)

    def of_images(self, head: str) -> np.ndarray:
        """What the figure of a head of classes or a number is the mean of (N,), NaN where there is no label."""
        target, said, labels = self.targets[head], self.said[head], self.labels[head]
        each = 100.0 * (said == target) if isinstance(labels, LabelSet) else labels.std * np.abs(said - target)
        return np.where(self.known(head), each, np.nan)

    def figure(self, head: str) -> float:
        """The figure of a head over its labels; NaN without any."""
        known = self.known(head)
        if not known.any():
            return np.nan
        if isinstance(self.labels[head], TagSet):
            measured = TagsHead(self.labels[head], 1).metrics(self.targets[head][known], self.said[head][known])
            return float(measured['map'])
        return float(np.nanmean(self.of_images(head)))


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
            value = os.path.realpath(value)  # however it was spelt
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
    groups: dict[tuple, list[int]] = {}
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
    first = found[0]
    for name, each in zip(names[1:], found[1:]):
        for head in shared_heads(found):
            differ = ~_same_labels(first, each, head) & first.known(head) & each.known(head)
            if differ.any():
                raise UserError(
                    f"{split}: {differ.sum()} images have another label of '{head}' for {name} than for {names[0]}, "
                    f'{first.images[differ.argmax()]} for one; remove predictions-{split}.npz from their folders, so '
                    'that they are made again, or score them all on one data directory with --data DIR')
    return found


def _keys(images: np.ndarray) -> pd.MultiIndex:
    """What tells rows apart: the image, and which of the rows of the same image it is."""
    images = pd.Series([image.encode('utf-8', 'surrogatepass') for image in images])  # pandas takes no other text
    return pd.MultiIndex.from_arrays([images, images.groupby(images).cumcount()])


def _same_labels(a: RunPredictions, b: RunPredictions, head: str) -> np.ndarray:
    """Which images have the same label for two runs (N,)."""
    ours, theirs, labels = a.targets[head], b.targets[head], a.labels[head]
    if isinstance(labels, Quantity):
        other = b.labels[head]
        return np.isclose(ours * labels.std + labels.mean, theirs * other.std + other.mean, rtol=1e-4,
                          atol=1e-4 * labels.std)
    return ours == theirs if ours.ndim == 1 else (ours == theirs).all(axis=1)


def shared_heads(answers: Sequence[RunPredictions]) -> list[str]:
    """The heads that all runs have, with the same classes or tags."""
    first = answers[0].labels
    return [name for name, labels in first.items() if all(
        _alike(labels, each.labels.get(name)) for each in answers[1:])]


def _alike(a: Labels, b: Labels | None) -> bool:
    return isinstance(b, Quantity) if isinstance(a, Quantity) else a == b


def run_figures(answers: Sequence[RunPredictions]) -> pd.DataFrame:
    """The figures of each run (rows), by head and figure (columns), then the mean over the heads of classes.

    The mean is plain, and over those heads that all runs share and that have labels; there is none where they are less
    than two.
    """
    figures = [
        {(name, FIGURES[type(labels)]): each.figure(name) for name, labels in each.labels.items()}
        for each in answers]
    table = pd.DataFrame({key: [of_run.get(key, np.nan) for of_run in figures]
                          for key in dict.fromkeys(key for of_run in figures for key in of_run)})
    averaged = _averaged(answers)
    if len(averaged) > 1:
        table[MEAN, 'top1'] = table[[(name, 'top1') for name in averaged]].mean(axis=1)
    return table


def _averaged(answers: Sequence[RunPredictions]) -> list[str]:
    return [name for name in shared_heads(answers)
            if isinstance(answers[0].labels[name], LabelSet) and _known_by_all(answers, name).any()]


def _known_by_all(answers: Sequence[RunPredictions], head: str) -> np.ndarray:
    return np.all([each.known(head) for each in answers], axis=0)


def verdict(difference: float, corrected: float, figure: str, over: str, seeds: tuple[int, int]) -> str:
    """What a difference says, in words.

    Args:
        difference: Ours less theirs.
        corrected: Its p, corrected for the comparisons beside it.
        figure: Of 'mae' less is better, of others more.
        over: What its p is over: IMAGES or SEEDS_AND_IMAGES.
        seeds: How many seeds each side has.
    """
    if min(seeds) < 2:
        return f'one run {"each" if max(seeds) < 2 else "on a side"}: nothing said of other runs'
    if over == IMAGES:
        return 'images alone resampled: nothing said of other runs'
    if not corrected < SURE:
        return 'no difference shown'
    return BETTER if (difference > 0) != (figure == 'mae') else WORSE


def compare_groups(
        answers: Sequence[RunPredictions],
        groups: Sequence[Sequence[int]],
        seeds: Sequence[object],
        baseline: int,
        advance: Callable[[int], object] = lambda number: None,
) -> pd.DataFrame:
    """The differences of groups of runs to one of them, by a bootstrap over images and seeds.

    What each image adds to a figure is first averaged over the runs of a group. See `reports.bootstrap` for what is
    resampled. p is corrected (Holm) over the groups for the mean over heads, and over groups and heads for the single
    heads.

    Args:
        answers: Those of each run, to the same images in the same order.
        groups: The runs of each group, by number.
        seeds: The seed of each run; runs of a group with the same one count as one.
        baseline: The group to compare with, by number.
        advance: See `resampled_means`.

    Returns:
        A row a comparison: 'group' (number), 'head', 'figure', 'difference', 'low', 'high', 'p', 'holm', 'over' (what
        interval and p are over: IMAGES with one seed on a side, else SEEDS_AND_IMAGES); the means over heads first.
    """
    columns = ['group', 'head', 'figure', 'difference', 'low', 'high', 'p', 'holm', 'over']
    heads = [name for name in shared_heads(answers)
             if FIGURES[type(answers[0].labels[name])] in COMPARED and _known_by_all(answers, name).any()]
    others = [number for number in range(len(groups)) if number != baseline]
    if not heads or not others:
        return pd.DataFrame(columns=columns)
    figures = [FIGURES[type(answers[0].labels[name])] for name in heads]
    values = [_group_values(answers, groups, number, heads) for number in range(len(groups))]
    differences = np.concatenate([values[number] - values[baseline] for number in others], axis=1)
    resampled = resampled_means(differences, advance=advance).reshape(-1, len(others), len(heads))
    found = np.nanmean(differences, axis=0).reshape(len(others), len(heads))
    of_runs = _run_means(answers, heads)

    def describe(row: int, chosen: Sequence[int]) -> tuple[Difference, str]:
        """The mean difference of some of the heads, and what it is over."""
        spread = seed_spread(*(_by_seed(of_runs[:, chosen].mean(axis=1), groups[group], seeds)
                               for group in (others[row], baseline)),
                             step=100 / (len(answers[0].images) * len(chosen)) if figures[chosen[0]] == 'top1' else 0.0)
        drawn = resampled[:, row, chosen].mean(axis=1)
        if spread is not None:
            drawn = with_seeds(drawn, spread)
            if figures[chosen[0]] == 'top1':
                drawn = np.clip(drawn, -100, 100)  # Student's t knows no largest difference
        return (describe_difference(float(found[row, chosen].mean()), drawn),
                IMAGES if spread is None else SEEDS_AND_IMAGES)

    averaged = [heads.index(name) for name in _averaged(answers)]
    means, singles = [], []
    for row, group in enumerate(others):
        if len(averaged) > 1:
            means.append((group, MEAN, 'top1', *describe(row, averaged)))
        for column, name in enumerate(heads):
            singles.append((group, name, figures[column], *describe(row, [column])))
    rows = []
    for family in (means, singles):
        for (*which, each, over), corrected in zip(family, holm([each.p for *_, each, _ in family])):
            rows.append((*which, each.value, each.low, each.high, each.p, corrected, over))
    return pd.DataFrame(rows, columns=columns)


def _run_means(answers: Sequence[RunPredictions], heads: Sequence[str]) -> np.ndarray:
    """The figures of heads, of each run on the images that all have a label of (R, H)."""
    known = {name: _known_by_all(answers, name) for name in heads}
    return np.array([[each.of_images(name)[known[name]].mean() for name in heads] for each in answers])


def _by_seed(values: np.ndarray, runs: Sequence[int], seeds: Sequence[object]) -> dict[str, float]:
    """The mean of some runs' values by their seed."""
    return pd.Series(values[runs], [str(seeds[run]) for run in runs]).groupby(level=0).mean().to_dict()


def _group_values(
        answers: Sequence[RunPredictions],
        groups: Sequence[Sequence[int]],
        number: int,
        heads: Sequence[str],
) -> np.ndarray:
    """What images add to the figures of heads, averaged over the runs of a group (N, H)."""
    columns = []
    for name in heads:
        of_group = np.mean([answers[run].of_images(name) for run in groups[number]], axis=0)
        columns.append(np.where(_known_by_all(answers, name), of_group, np.nan))
    return np.stack(columns, axis=1)
