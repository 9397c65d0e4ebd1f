"""A plain timm backbone: safetensors that timm reads, with JSON of how, for programs that know nothing of heads."""
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import resolve_model_input_args

from timm_multilabel.exports.compare import Run
from timm_multilabel.exports.exportable import Exportable
from timm_multilabel.exports.weights import write_tensors
from timm_multilabel.files import write_atomic

NAME = 'backbone'
FILES = ('backbone.safetensors', 'backbone.json')
OF_HEADS = False
LIBRARIES = ()


def model_arguments(exportable: Exportable) -> dict[str, Any]:
    """The arguments of `timm.create_model` that make the backbone, plain values."""
    checkpoint = exportable.checkpoint
    arguments = resolve_model_input_args(
        checkpoint.arch,
        {'input_size': checkpoint.data_config['input_size']},
        **{**(checkpoint.state.get('model_kwargs') or {}), 'num_classes': 0},
    )
    del arguments['pretrained_cfg']
    if arguments.get('in_chans') == 3:
        del arguments['in_chans']
    plain: dict[str, Any] = json.loads(json.dumps(arguments))
    return plain


def note(exportable: Exportable, path: Path) -> str:
    """What to say of a file that was written."""
    name, *others = [f'{value!r}' if key == 'model_name' else f'{key}={value!r}'
                     for key, value in model_arguments(exportable).items()]
    arguments = ', '.join([name, *others, 'pretrained=True', f'pretrained_cfg_overlay=dict(file={str(path)!r})'])
    return f'timm.create_model({arguments})'


def write(exportable: Exportable, path: Path) -> None:
    """Write the weights, and as .json beside them the arguments of `timm.create_model` and the preprocessing."""
    write_tensors(path, exportable.model.backbone.state_dict())
    description = {
        'create_model': model_arguments(exportable),
        'preprocessing': exportable.description['preprocessing'],
        'features': exportable.model.num_features,
    }
    write_atomic(path.with_suffix('.json'), json.dumps(description, indent=1, ensure_ascii=False) + '\n')


def load(exportable: Exportable, path: Path) -> Run:
    """The backbone of a file, by timm alone."""
    description = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    model = timm.create_model(
        **description['create_model'], pretrained=True, pretrained_cfg_overlay={'file': str(path)})
    model.eval()
    return lambda images: [model(images)]
