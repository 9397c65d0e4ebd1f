"""Several labels a photo and SimCLR, on any timm backbone."""
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.inference.predictor import Predictor
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.dataset import MultiLabelDataset
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask

__version__ = '0.1.0'

__all__ = [
    'JointTask',
    'LabelSpace',
    'MultiLabelDataset',
    'MultiLabelModel',
    'Predictor',
    'create_backbone',
    'create_optimizer',
    'encode_rows',
    'find_label_space',
    'read_table',
]
