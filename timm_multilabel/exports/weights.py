"""safetensors: the weights of backbone, heads and projector, with the description as JSON beside them."""
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from timm_multilabel.exports.compare import Run
from timm_multilabel.exports.exportable import Exportable, readable
from timm_multilabel.files import read_json, reading, write_atomic
from timm_multilabel.heads import REGISTRY, Head
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.training.checkpoint import Checkpoint, checkpoint_of, load_model

NAME = 'safetensors'
FILES = ('multilabel.safetensors', 'multilabel.json')
OF_HEADS = True
LIBRARIES = ()


def note(exportable: Exportable, path: Path) -> str:
    """What to say of a file that was written."""
    return f'outputs {", ".join(exportable.model.label_space.names)}'


def write(exportable: Exportable, path: Path) -> None:
    """Write the weights, and the description as .json beside them."""
    write_tensors(path, exportable.model.state_dict())
    write_atomic(path.with_suffix('.json'), exportable.text)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, each with memory of its own, as the format demands."""
    write_atomic(path, save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, {'format': 'pt'}))


def read_exported(path: str | Path) -> Checkpoint:
    """Read exported weights and the JSON beside them, as a checkpoint that `load_model` takes.

    Raises:
        UserError: A file is missing, damaged or something else.
    """
    path = Path(path)
    described = path.with_suffix('.json')
    way_out = 'export the model again'
    with reading(path, f'exported weights with {described.name} beside them', way_out):
        description = read_json(
            described, 'the description of an exported model', way_out, lambda value: isinstance(value, dict))
        tensors = load_file(path)
    settings = {name: description[name] for name in (
        'arch', 'model_kwargs', 'head_options', 'projection_dim', 'projector_layers', 'projector_width', 'label_space')
        if name in description}
    if 'preprocessing' in description:
        settings['data_config'] = description['preprocessing']
    return checkpoint_of(path, {**settings, 'state_dict': tensors}, path.stat().st_size)


def load_exported(
        path: str | Path,
        registry: Mapping[str, type[Head]] = REGISTRY,
        allow_hub: bool = False,
) -> MultiLabelModel:
    """The model of exported weights, in evaluation mode.

    Raises:
        UserError: See `read_exported` and `load_model`.
    """
    return load_model(read_exported(path), 'plain', registry, allow_hub)


def load(exportable: Exportable, path: Path) -> Run:
    """The model of a file, by this library."""
    registry = dict(REGISTRY)
    for head in exportable.model.named_heads.values():
        registry[head.kind] = type(head)
    model = load_exported(path, registry, allow_hub=True)  # as the checkpoint, whose model is loaded already

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        outputs = model(images)
        return [readable(head, outputs[name]) for name, head in model.named_heads.items()]

    return run
