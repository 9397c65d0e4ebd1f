"""Several labels a photo and SimCLR, on any timm backbone."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_multilabel.api.check import check
    from timm_multilabel.api.compare import compare
    from timm_multilabel.api.convert import convert
    from timm_multilabel.api.embed import embed
    from timm_multilabel.api.export import export
    from timm_multilabel.api.grid import grid
    from timm_multilabel.api.predict import predict
    from timm_multilabel.api.probe import probe
    from timm_multilabel.api.report import report
    from timm_multilabel.api.sample import sample
    from timm_multilabel.api.search import search
    from timm_multilabel.api.split import split
    from timm_multilabel.api.train import train
    from timm_multilabel.api.validate import validate
    from timm_multilabel.data.table import encode_rows, find_label_space, read_table
    from timm_multilabel.errors import CheckpointError, DataError, OutputError, SettingError, UserError
    from timm_multilabel.inference.predictor import Predictor
    from timm_multilabel.labels import LabelSpace
    from timm_multilabel.loading.dataset import MultiLabelDataset
    from timm_multilabel.model import MultiLabelModel, create_backbone
    from timm_multilabel.optim import create_optimizer
    from timm_multilabel.task import JointTask

__version__ = '0.2.0'

_COMMANDS = (
    'check', 'compare', 'convert', 'embed', 'export', 'grid', 'predict', 'probe', 'report', 'sample', 'search', 'split',
    'train', 'validate')
_MODULES = {
    **{name: f'api.{name}' for name in _COMMANDS},
    'JointTask': 'task',
    'LabelSpace': 'labels',
    'MultiLabelDataset': 'loading.dataset',
    'MultiLabelModel': 'model',
    'Predictor': 'inference.predictor',
    'CheckpointError': 'errors',
    'DataError': 'errors',
    'OutputError': 'errors',
    'SettingError': 'errors',
    'UserError': 'errors',
    'create_backbone': 'model',
    'create_optimizer': 'optim',
    'encode_rows': 'data.table',
    'find_label_space': 'data.table',
    'read_table': 'data.table',
}
__all__ = [
    'JointTask',
    'LabelSpace',
    'MultiLabelDataset',
    'MultiLabelModel',
    'Predictor',
    'CheckpointError',
    'DataError',
    'OutputError',
    'SettingError',
    'UserError',
    'check',
    'compare',
    'convert',
    'create_backbone',
    'create_optimizer',
    'embed',
    'encode_rows',
    'export',
    'find_label_space',
    'grid',
    'predict',
    'probe',
    'read_table',
    'report',
    'sample',
    'search',
    'split',
    'train',
    'validate',
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
