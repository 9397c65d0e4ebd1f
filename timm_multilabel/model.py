"""A timm backbone with a head for each label, and the projector."""
import difflib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants
import timm
import torch
from timm.models import resolve_model_input_args
from torch import nn

from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.config.train import ObjectiveSettings
from timm_multilabel.errors import SettingError, UserError
from timm_multilabel.heads import REGISTRY, Head, JoinedWeights, create_head, group_heads, resolve_options
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.model_names import is_joined, names_of
from timm_multilabel.projector import Projector
from timm_multilabel.weights_file import create_from_file


class MultiLabelModel(nn.Module):
    """A backbone with pooled features and one head for each label: what is evaluated, saved and exported.

    It has a projector only where a head reads projections; else the projector is the task's. `head_options` holds, by
    head, all that makes it.

    Args:
        backbone: A timm model made with `num_classes=0`: images (B, 3, H, W) -> features (B, F).
        label_space: The heads and their labels.
        drop: Dropout rate of the heads.
        smoothing: Label smoothing of the heads.
        head_options: Options of heads by name: 'loss' (the kind), 'input' ('features' or 'projection'), 'views' ('all'
            or 'plain', which `JointTask` keeps to) and those that the kind has.
        registry: The kinds of heads by name.
        projection_dim: Width of the projections.
        projector_layers: See `Projector`.
        projector_width: Likewise.

    Raises:
        ValueError: Options of a head that there is none of, or that do not fit it.
    """

    def __init__(
            self,
            backbone: nn.Module,
            label_space: LabelSpace,
            drop: float = 0.0,
            smoothing: float = ObjectiveSettings.smoothing,
            head_options: Mapping[str, Mapping[str, Any]] | None = None,
            registry: Mapping[str, type[Head]] = REGISTRY,
            projection_dim: int = ObjectiveSettings.projection_dim,
            projector_layers: int = ObjectiveSettings.projector_layers,
            projector_width: int | None = ObjectiveSettings.projector_width,
    ):
        super().__init__()
        self.backbone = backbone
        self.label_space = label_space
        self.num_features = _width(backbone)
        given = dict(head_options or {})
        for name in given:
            if name not in label_space.names:
                raise ValueError(f"there is no head '{name}' (there are: {', '.join(label_space.names)})")
        defaults = {'drop': drop, 'smoothing': smoothing}
        self.head_options: dict[str, dict[str, Any]] = {}
        heads = []
        for labels in label_space.heads:
            try:
                options = resolve_options(labels, given.get(labels.name, {}), defaults, registry)
                width = projection_dim if options['input'] == 'projection' else self.num_features
                heads.append(create_head(labels, width, options, registry))
            except (TypeError, ValueError) as error:
                raise ValueError(f"head '{labels.name}': {error}") from error
            self.head_options[labels.name] = options
        projected = any(options['input'] == 'projection' for options in self.head_options.values())
        self.projector = None
        if projected:
            self.projector = Projector(self.num_features, projection_dim, projector_layers, projector_width)
        # A list, not a dict by name: a column may be called 'type' or 'a.b', which no submodule can be.
        self.heads = nn.ModuleList(heads)
        by_input = {input: {name: head for name, head in zip(label_space.names, heads)
                            if self.head_options[name]['input'] == input} for input in ('features', 'projection')}
        self.groups = {input: group_heads(its) for input, its in by_input.items()}

    @property
    def named_heads(self) -> dict[str, Head]:
        """The heads by name, in the order of the label space."""
        heads: Iterable[Any] = self.heads  # whose type says no more than that it holds modules
        return dict(zip(self.label_space.names, heads, strict=True))

    @property
    def without_probabilities(self) -> frozenset[str]:
        """The heads of classes whose kind has no probabilities."""
        return frozenset(name for name, head in self.named_heads.items()
                         if isinstance(head.labels, LabelSet) and not head.has_probabilities)

    @property
    def num_classes(self) -> int:
        """The outputs of all heads together; timm's scripts ask for it."""
        return sum(self.label_space.sizes)

    @property
    def pretrained_cfg(self) -> Mapping[str, Any]:
        """The backbone's, from which `timm.data.resolve_data_config` takes image size and normalisation."""
        return getattr(self.backbone, 'pretrained_cfg', {})

    def no_weight_decay(self) -> set[str]:
        """The names of the weights that the backbone exempts from weight decay, which timm's optimizers ask for."""
        return {f'backbone.{name}' for name in getattr(self.backbone, 'no_weight_decay', set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, or not."""
        switch = self.backbone.set_grad_checkpointing
        assert callable(switch)  # as timm's models have it
        switch(enable=enable)

    def forward_heads(
            self,
            features: torch.Tensor,
            projections: torch.Tensor | None = None,
            joined: Iterable[JoinedWeights] = (),
    ) -> dict[str, torch.Tensor]:
        """Outputs by head.

        Args:
            features: Features (B, F).
            projections: Their projections (B, D), where they are known already.
            joined: The weights of groups of heads that are trained as one.
        """
        if projections is None and self.projector is not None:
            projections = self.projector(features)
        heads, inputs = self.named_heads, {'features': features}
        if projections is not None:
            inputs['projection'] = projections
        outputs: dict[str, torch.Tensor] = {}
        weights = {each.names: each for each in joined}
        for input, groups in self.groups.items():
            for group in groups:
                its = weights.get(group.names)
                if its is None:
                    logits = group.logits(heads, inputs[input])
                else:
                    logits = group.logits(heads, inputs[input], (its.weight, its.bias)) or its.one_by_one(
                        heads, inputs[input])
                outputs |= zip(group.names, logits, strict=True) if logits is not None else ()
        return {
            name: outputs[name] if name in outputs else head(inputs[self.head_options[name]['input']])
            for name, head in heads.items()
        }

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) -> {head: output}: logits (B, C), or (B,) of a number."""
        return self.forward_heads(self.backbone(images))


def _width(backbone: nn.Module) -> int:
    width = backbone.head_hidden_size
    assert isinstance(width, int)  # as timm's models have it
    return width


def create_backbone(
        name: str,
        *,
        pretrained: bool = False,
        pretrained_path: str | None = None,
        input_size: dict[str, Any] | None = None,
        drop_path: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
) -> nn.Module:
    """Make a timm model without a classifier, or several as one (see `JoinedBackbones`).

    Args:
        name: Any name that `timm.create_model` takes; several with '+' between, whose features are concatenated.
        pretrained: Load timm's pretrained weights.
        pretrained_path: Load the weights of this local file (timm checkpoint or safetensors) instead; of several models
            a file for each, with ':' between.
        input_size: timm's `img_size` or `input_size` request, for models made for one size. By default all models have
            the size of the first.
        drop_path: Rate of stochastic depth (`drop_path_rate`).
        model_kwargs: Further arguments of the models. `mirrored=True` gives the mean of the features of an image and
            its mirror image.
        say: Prints a line on what of a local file was taken, where it is not all.

    Raises:
        SettingError: A model is unknown, has no pooled features, does not take an argument, or weights cannot be had.
    """
    kwargs, names = dict(model_kwargs or {}), names_of(name)
    mirrored = bool(kwargs.pop('mirrored', False))
    if drop_path is not None:
        kwargs['drop_path_rate'] = drop_path
    paths: list[str | None] = [None] * len(names)
    if pretrained_path:
        paths = [*pretrained_path.split(os.pathsep)] if len(names) > 1 else [pretrained_path]
    if len(paths) != len(names):
        raise SettingError(f'--pretrained-path: {len(paths)} files for {len(names)} models; name one for each')
    made: list[nn.Module] = []
    for each, path in zip(names, paths, strict=True):
        made.append(_create_one(each, pretrained, path, input_size, kwargs, say))
        if len(names) > 1 and not any((input_size or {}).values()):
            input_size = {'input_size': made[0].pretrained_cfg['input_size']}  # type: ignore[index]  # a dict of timm's
    return JoinedBackbones(made, mirrored) if is_joined(name, {'mirrored': mirrored}) else made[0]


def _create_one(
        name: str,
        pretrained: bool,
        pretrained_path: str | None,
        input_size: dict[str, Any] | None,
        model_kwargs: dict[str, Any],
        say: Callable[[str], None],
) -> nn.Module:
    """One model, as `create_backbone` makes it."""
    kwargs = dict(model_kwargs, num_classes=0)
    asks_hub = pretrained and not pretrained_path or name.startswith('hf-hub:')
    try:
        with _offline_if_cut_off() if asks_hub else nullcontext():
            kwargs = resolve_model_input_args(name, input_size, **kwargs)
            if pretrained_path:
                if not Path(pretrained_path).is_file():
                    raise SettingError(f'--pretrained-path {pretrained_path}: no such file')
                backbone = create_from_file(kwargs, pretrained_path, say)
            else:
                backbone = timm.create_model(**kwargs, pretrained=pretrained)
    except UserError:
        raise
    except Exception as error:  # timm, its models, safetensors and the hub each raise their own kind
        raise _explain(error, name, pretrained, pretrained_path) from error
    if not getattr(backbone, 'head_hidden_size', None):
        raise SettingError(f"--model {name}: the model has no pooled features to put heads on; choose another")
    return backbone


def _explain(error: Exception, name: str, pretrained: bool, pretrained_path: str | None) -> Exception:
    """What to tell the user about a model that could not be made; the error itself where nothing is known better."""
    reason = ' '.join(str(error).split())
    if 'Unknown model' in reason or 'has no source prefix' in reason:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f'; did you mean {" or ".join(near)}?' if near else ''
        return SettingError(f'--model {name}: timm {timm.__version__} has no such model{hint}')
    if ':' in name:
        return SettingError(f'--model {name}: cannot be had ({reason[:200]})')
    if pretrained_path:
        return SettingError(
            f'--pretrained-path {pretrained_path}: its weights do not load into {name} ({reason[:300]})')
    if pretrained:
        return SettingError(
            f'--pretrained: the weights of {name} could not be downloaded ({type(error).__name__}); '
            'pass a local timm checkpoint or safetensors file with --pretrained-path FILE instead')
    if isinstance(error, TypeError | ValueError | AssertionError):
        return SettingError(f'--model {name}: timm cannot make it so ({reason[:300]})')
    return error


@contextmanager
def _offline_if_cut_off() -> Iterator[None]:
    """Within it, where the hub's host is unknown, the hub answers from its cache at once, not after a minute of tries.

    The hub knows this as a constant of its module alone, which afterwards is what it was.
    """
    constants, before = huggingface_hub.constants, huggingface_hub.constants.HF_HUB_OFFLINE
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        if not getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
