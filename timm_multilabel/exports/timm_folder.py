"""The backbone as timm's `hf-hub:` and `local-dir:` read it: model.safetensors with config.json beside it."""
import json
from pathlib import Path

import timm
from timm.models import save_for_hf

from timm_multilabel.exports.compare import Run
from timm_multilabel.exports.exportable import Exportable
from timm_multilabel.exports.weights import write_tensors
from timm_multilabel.files import write_atomic

FILES = ('model.safetensors', 'config.json')
OF_HEADS = False


def write(exportable: Exportable, path: Path) -> None:
    """Write the weights, and beside them config.json as timm's own pushing does.

    It takes over licence and tag of the weights that timm has of this name; these are others.
    """
    preprocessing = dict(exportable.description['preprocessing'])
    del preprocessing['pixels']
    save_for_hf(
        exportable.model.backbone, str(path.parent), safe_serialization=True, data_config=preprocessing,
        model_args=exportable.description['model_kwargs'])
    write_tensors(path, exportable.model.backbone.state_dict())  # safetensors' own files none but their owner can read
    config = json.loads((path.parent / 'config.json').read_text(encoding='utf-8'))
    for name in ('license', 'tag'):
        config['pretrained_cfg'].pop(name, None)
    write_atomic(path.parent / 'config.json', json.dumps(config, indent=1) + '\n')


def load(exportable: Exportable, path: Path) -> Run:
    """The backbone of a folder, by timm alone."""
    model = timm.create_model(f'local-dir:{path.parent}', pretrained=True)
    model.eval()
    return lambda images: [model(images)]
