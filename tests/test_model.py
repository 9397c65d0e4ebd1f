"""Backbones of many timm families under heads."""
import pytest
import timm
import torch
from common import SPACE
from safetensors.torch import save_file

from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.model import MultiLabelModel, create_backbone

# mobilenetv3 and others have features wider than num_features: head_hidden_size is what comes out.
FAMILIES = [
    'test_byobnet', 'test_convnext', 'test_efficientnet', 'test_mambaout', 'test_nfnet', 'test_resnet', 'test_vit',
    'mobilenetv3_small_050', 'lcnet_050', 'hardcorenas_a', 'ghostnet_050', 'vgg11', 'levit_128s', 'inception_next_atto',
    'tiny_vit_5m_224', 'efficientvit_b0', 'repvit_m0_9', 'regnetx_002', 'xcit_nano_12_p16_224',
]


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_any_backbone_with_pooled_features(name):
    with torch.device('meta'):  # shapes without the work
        backbone = create_backbone(name)
        model = MultiLabelModel(backbone, SPACE, drop=0.1).eval()
        size = backbone.pretrained_cfg['input_size']
        output = model(torch.empty(2, *size))
    assert {head: tuple(logits.shape) for head, logits in output.items()} == {'color': (2, 3), 'shape': (2, 2)}


def test_column_names_that_no_module_may_have():
    space = LabelSpace(tuple(LabelSet(name, ('x', 'y')) for name in ('type', 'a.b', 'keys', 'forward')))
    output = MultiLabelModel(create_backbone('test_resnet'), space)(torch.zeros(2, 3, 32, 32))
    assert list(output) == ['type', 'a.b', 'keys', 'forward']


def test_dropout_reaches_the_heads_and_drop_path_the_backbone():
    model = MultiLabelModel(create_backbone('test_convnext', drop_path=0.25), SPACE, drop=0.3)
    assert [head.drop.p for head in model.heads] == [0.3, 0.3]
    rates = [module.drop_prob for module in model.backbone.modules() if hasattr(module, 'drop_prob')]
    assert max(rates) == pytest.approx(0.25)


@pytest.mark.parametrize('kind', ['safetensors', 'checkpoint'])
def test_pretrained_path_takes_a_local_timm_file(tmp_path, kind):
    source = timm.create_model('test_resnet', num_classes=1000)
    if kind == 'safetensors':
        save_file(source.state_dict(), path := str(tmp_path / 'w.safetensors'))
    else:
        torch.save({'state_dict': source.state_dict(), 'arch': 'test_resnet'}, path := str(tmp_path / 'w.pth.tar'))
    backbone = create_backbone('test_resnet', pretrained_path=path)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


@pytest.mark.parametrize('name', ['test_byobnet', 'test_vit'])
def test_pretrained_path_of_another_model_is_refused(tmp_path, name):
    save_file(timm.create_model(name).state_dict(), path := str(tmp_path / 'w.safetensors'))
    with pytest.raises(UserError, match='--pretrained-path .*(lacks|do not load)'):
        create_backbone('test_resnet', pretrained_path=path)


@pytest.mark.parametrize('kwargs, message', [
    ({'name': 'local-dir:/nowhere'}, 'cannot be had'),
    ({'name': 'efficientnetb0'}, 'no such model; did you mean efficientnet_b0'),
    ({'name': 'org/some_model'}, 'no such model'),
    ({'name': 'test_resnet', 'pretrained_path': 'no/file.pth'}, '--pretrained-path no/file.pth'),
    ({'name': 'test_resnet', 'model_kwargs': {'no_such_argument': 1}}, 'timm cannot make it so'),
])
def test_what_cannot_be_made_is_one_clear_line(kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        create_backbone(**kwargs)
    assert '\n' not in str(error.value)


def test_pretrained_without_network_names_the_way_out(monkeypatch):
    def no_network(*_, **__):
        raise OSError('We could not connect')
    monkeypatch.setattr(timm, 'create_model', no_network)
    with pytest.raises(UserError, match='could not be downloaded.*--pretrained-path FILE'):
        create_backbone('resnet18', pretrained=True)
