"""Stored predictions."""
import numpy as np
import pytest
import torch
from common import SPACE, TinyBackbone, write_data

from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.heads import NumericHead, SoftmaxHead, TagsHead
from timm_multilabel.inference.predictions import Predictions, predict_rows
from timm_multilabel.labels import LabelSet, Quantity, TagSet
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Precision
from timm_multilabel.views.pillow import eval_views


def test_predictions_are_the_models_and_survive_a_file(tmp_path):
    torch.manual_seed(0)
    folder = write_data(tmp_path / 'data', train=7, val=1, size=16)
    rows = encode_rows(read_table(folder / 'train.csv'), SPACE)
    model = MultiLabelModel(TinyBackbone(), SPACE).eval()
    loader = create_eval_loader(
        ImageDataset(rows, FilePhotos(rows), eval_views((16, 16), 'bilinear', 1.0, 'center')), 3, mean=(0.5,) * 3,
        std=(0.5,) * 3, device=torch.device('cpu'), workers=0)
    made = predict_rows(model, loader, rows, Precision(torch.device('cpu')), ProgressBar('', 3, False))
    made.save(tmp_path / 'x.npz')
    read = Predictions.load(tmp_path / 'x.npz')
    assert len(read) == 7 and read.label_space == SPACE
    assert read.rows[2] == f'{folder}/train.csv row 4' and read.images[2].endswith('2.png')
    assert read.target('color').tolist() == [2, 1, 0, 2, 1, 0, 2]
    images = torch.cat([images for images, _ in loader])
    with torch.no_grad():
        features = model.backbone(images)
        output = model(images)
    np.testing.assert_allclose(read.features, features.numpy(), rtol=1e-5, atol=1e-6)
    for name in SPACE.names:
        np.testing.assert_allclose(read.outputs[name], output[name].softmax(1).numpy(), rtol=1e-5)


def test_probabilities_of_the_kinds():
    tags, number = TagSet('t', ('a', 'b')), Quantity('n', 3.0, 2.0)
    assert TagsHead(tags, 2).probabilities(torch.tensor([[0.0, 100.0]])).tolist() == [[0.5, 1.0]]
    assert NumericHead(number, 2).probabilities(torch.tensor([1.0, -1.0])).tolist() == [[1.0], [-1.0]]
    classes = SoftmaxHead(LabelSet('c', ('a', 'b')), 2)
    assert classes.probabilities(torch.tensor([[0.0, 0.0]], dtype=torch.bfloat16)).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'x' * 100])
def test_files_that_are_none(tmp_path, content):
    (tmp_path / 'x.npz').write_bytes(content)
    with pytest.raises(UserError, match='cannot be read as stored predictions'):
        Predictions.load(tmp_path / 'x.npz')
    np.savez(tmp_path / 'y.npz', label_space=np.array('{}'))
    with pytest.raises(UserError):
        Predictions.load(tmp_path / 'y.npz')
