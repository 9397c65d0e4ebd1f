"""Checkpoints as teachers: what they say of images, in the form that the heads of another model learn from."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_multilabel.inference.loaded import LoadedModel, check_finite
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.losses import mean_of_classes, mean_of_tags
from timm_multilabel.training.trainer import Precision


class Teachers:
    """The mean of what several checkpoints say of images: `answers`.

    Args:
        loaded: The checkpoints' models.
        taught: The labels that learn from them; each is the head of one of them at least.
        mean: Of each channel, that the student's images are normalised with.
        std: Likewise the standard deviation.
    """

    def __init__(
            self,
            loaded: Sequence[LoadedModel],
            taught: LabelSpace,
            mean: Sequence[float],
            std: Sequence[float],
    ):
        self.loaded, self.taught = list(loaded), taught
        self.width = sum(taught.sizes)
        self._places = [_places(each.model.label_space, taught, each.precision.device) for each in loaded]
        self._adapters = [Adapter(each.checkpoint.data_config, mean, std, each.precision) for each in loaded]

    @torch.no_grad()
    def answers(self, images: Sequence[torch.Tensor], check: bool = False) -> torch.Tensor:
        """What they say on average (B, S), see `Head.answer`; the heads side by side, in float32.

        Args:
            images: The images as each of them takes them (B, 3, H, W).
            check: Raise where an output is not finite, which waits for the device.

        Raises:
            CheckpointError: An output is not finite.
        """
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.taught.names}
        for loaded, places, its in zip(self.loaded, self._places, images, strict=True):
            with loaded.precision.autocast():
                outputs = loaded.model(its)
            heads = loaded.model.named_heads
            said = {name: heads[name].answer(outputs[name]).float() for name in places}
            if check:
                check_finite(said.values(), loaded.checkpoint.path)
            for labels in self.taught.heads:
                if labels.name in places:
                    found[labels.name].append(
                        _translated(said[labels.name], heads[labels.name].labels, labels, places[labels.name]))
        return torch.cat([_mean(labels, found[labels.name]) for labels in self.taught.heads], dim=1)

    def of_views(self, images: torch.Tensor) -> torch.Tensor:
        """Their answers (B, S) for views (B, 3, H, W) as the student gets them, in the size and the normalisation of
        each teacher.
        """
        return self.answers([adapt(images) for adapt in self._adapters])


class Adapter:
    """Views as a student gets them -> those that a teacher takes: resized and normalised on the device.

    Args:
        config: timm's data config of the teacher.
        mean: Of each channel, that the student's images are normalised with.
        std: Likewise the standard deviation.
        precision: Of the teacher.
    """

    def __init__(self, config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], precision: Precision):
        self.size, self.precision = tuple(config['input_size'][-2:]), precision
        self.mode = 'bilinear' if config['interpolation'] == 'bilinear' else 'bicubic'
        ours, theirs = (torch.tensor([*map(list, pair)], device=precision.device)[..., None, None].float()
                        for pair in ((mean, std), (config['mean'], config['std'])))
        self.factor, self.shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3, H', W')."""
        images = images.float()
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True)
        return self.precision.layout(images * self.factor + self.shift)


class FeatureTeacher:
    """The features of a backbone that stays as it is, for views of a student.

    Args:
        backbone: The backbone, on its device.
        adapt: Makes of the student's views what it takes.
    """

    def __init__(self, backbone: nn.Module, adapt: Adapter):
        self.backbone, self.adapt = backbone.eval().requires_grad_(False), adapt

    @torch.no_grad()
    def of_views(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, F) of views (B, 3, H, W) as the student gets them, in float32."""
        with self.adapt.precision.autocast():
            features: torch.Tensor = self.backbone(self.adapt(images))
        return features.float()


def _places(theirs: LabelSpace, taught: LabelSpace, device: torch.device) -> dict[str, torch.Tensor]:
    """By head the place of each of our classes among theirs (C,), -1 where they have it not."""
    known = dict(zip(theirs.names, theirs.heads, strict=True))
    return {
        ours.name: torch.tensor([_index(known[ours.name]).get(text, -1) for text in ours.classes], device=device)
        for ours in taught.heads if ours.name in known}


def _index(labels: Labels) -> dict[str, int]:
    return {text: place for place, text in enumerate(labels.classes)}


def _translated(answer: torch.Tensor, theirs: Labels, ours: Labels, places: torch.Tensor) -> torch.Tensor:
    """An answer in our classes: classes that they have not get none, and what they said of others is left out."""
    if isinstance(ours, Quantity):
        assert isinstance(theirs, Quantity)  # a head of one name is of one kind of labels
        return (answer * theirs.std + theirs.mean - ours.mean) / ours.std
    if theirs.classes == ours.classes:
        return answer
    nothing = float('-inf') if isinstance(ours, LabelSet) else float('nan')
    picked = F.pad(answer, (0, 1), value=nothing)[:, places]
    return picked.log_softmax(dim=1) if isinstance(ours, LabelSet) else picked


def _mean(labels: Labels, answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of several teachers' answers."""
    if len(answers) == 1:
        return answers[0]
    if isinstance(labels, LabelSet):
        return mean_of_classes(answers)
    return mean_of_tags(answers) if isinstance(labels, TagSet) else torch.stack([*answers]).mean(dim=0)
