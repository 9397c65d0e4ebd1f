"""What is exported: a model whose outputs are what people read, and a description that travels with its weights."""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timm_multilabel.errors import UserError
from timm_multilabel.heads import Head
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.projector import projector_shape
from timm_multilabel.training.checkpoint import Checkpoint

INPUT = 'images'
"""The name of the input: (B, 3, H, W), float32."""

DESCRIPTION = 'timm-multilabel.json'
"""The name of the description inside ONNX (its metadata) and pt2 (its extra files)."""


class ReadableModel(nn.Module):
    """A model with the outputs that are exported: probabilities of classes or tags, numbers in their column's unit.

    Args:
        model: In evaluation mode.
        names: The name of each output, in the order of the heads.
    """

    def __init__(self, model: MultiLabelModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) -> {name: probabilities (B, C), or numbers (B, 1)}."""
        outputs = self.model(images)
        return {
            name: readable(head, outputs[head.labels.name])
            for name, head in zip(self.names, self.model.named_heads.values(), strict=True)}


def readable(head: Head, output: torch.Tensor) -> torch.Tensor:
    """A head's output as probabilities (B, C), or numbers in their column's unit (B, 1)."""
    values: torch.Tensor = head.labels.in_unit(head.probabilities(output))
    return values


@dataclass(frozen=True)
class Exportable:
    """A checkpoint's model with all that its exports need.

    Args:
        checkpoint: It.
        model: Made of it, in evaluation mode, on the CPU.
        description: See `describe`.
        images: Real images (N, 3, H, W) as evaluation has them, two or more.
    """
    checkpoint: Checkpoint
    model: MultiLabelModel
    description: dict[str, Any]
    images: torch.Tensor

    @property
    def names(self) -> list[str]:
        """The names of the outputs, in the order of the heads."""
        return [output['name'] for output in self.description['outputs']]

    @property
    def text(self) -> str:
        """The description as JSON."""
        return json.dumps(self.description, indent=1, ensure_ascii=False) + '\n'


def describe(checkpoint: Checkpoint, weights: str, model: MultiLabelModel) -> dict[str, Any]:
    """What a program must know to use a model, and to make it again: plain values, as JSON gives them back.

    Args:
        checkpoint: The model's.
        weights: 'plain' or 'ema'.
        model: Made of it.

    Raises:
        UserError: A setting of the checkpoint is nothing that JSON knows.
    """
    state, labels = checkpoint.state, checkpoint.label_space
    outputs = [
        {'name': name, 'head': head.labels.name, 'columns': head.labels.outputs, 'values': head.gives}
        for name, head in zip(output_names(labels.names), model.named_heads.values(), strict=True)]
    config = checkpoint.data_config
    preprocessing = {
        **{name: list(config[name]) for name in ('input_size', 'mean', 'std')},
        **{name: config[name] for name in ('interpolation', 'crop_pct', 'crop_mode')},
        'pixels': 'RGB / 255, less mean, divided by std',
    }
    description = {
        'format': 'timm-multilabel 1',
        'arch': checkpoint.arch,
        'model_kwargs': state.get('model_kwargs') or {},
        'weights': weights,
        'epochs': state['epoch'] + 1 if 'epoch' in state else None,
        'input': INPUT,
        'outputs': outputs,
        'preprocessing': preprocessing,
        'label_space': labels.to_dict(),
        'head_options': state.get('head_options') or {},
        **projector_shape(state),
    }
    try:
        found: dict[str, Any] = json.loads(json.dumps(description))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{checkpoint.path}: its settings cannot be written as JSON ({error})') from error
    return found


def output_names(heads: Sequence[str]) -> list[str]:
    """A name for the output of each head that every program takes: ASCII letters, digits and `_`, each name once.

    A head's own name where it is such a one; `a.b` becomes `a_b`, and `a_b_2` where that is taken.
    """
    plain = [name for name in heads if re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]*', name) and name != INPUT]
    names: list[str] = []
    for head in heads:
        name = head
        if head not in plain:
            stem = re.sub(r'[^A-Za-z0-9_]', '_', head)
            stem = name = stem if not stem[0].isdigit() else f'_{stem}'
            number = 1
            while name == INPUT or name in names or name in plain:
                number += 1
                name = f'{stem}_{number}'
        names.append(name)
    return names
