"""Optimizers: AdamP against its authors' package, centralization, groups."""
import pytest
import torch
from adamp import AdamP as AuthorsAdamP
from common import SPACE, tiny_task

from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.optim import CentralizedAdamP, centralize_, create_optimizer
from timm_multilabel.task import JointTask

SHAPES = [(8, 3, 3, 3), (16, 8), (5,), (4, 1, 3, 3)]


def train(optimizer_of, steps=20):
    """Parameters after steps; half of the gradients are orthogonal to the weight, as scale invariance makes them."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optimizer_of(parameters)
    for step in range(steps):
        for p in parameters:
            gradient = torch.randn_like(p)
            if step % 2:
                gradient -= p.data * (gradient * p.data).sum() / p.data.square().sum()
            p.grad = gradient
        optimizer.step()
    return parameters


def own(parameters, centralize, **options):
    groups = [{'params': parameters, 'caution': False, 'betas': (0.9, 0.999), 'delta': 0.1, **options}]
    return CentralizedAdamP(groups, centralize)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_adamp_without_centralization_is_that_of_the_adamp_package(nesterov, weight_decay):
    options = dict(lr=0.01, eps=1e-3, weight_decay=weight_decay, wd_ratio=0.01, nesterov=nesterov)
    theirs = train(lambda parameters: AuthorsAdamP(parameters, **options))
    mine = train(lambda parameters: own(parameters, False, **options))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adamp_centralizes_the_projected_update_of_convolutions_only():
    options = dict(lr=0.01, eps=1e-3, weight_decay=0.1, wd_ratio=0.01, nesterov=True)
    plain = train(lambda parameters: own(parameters, False, **options), steps=1)
    centered = train(lambda parameters: own(parameters, True, **options), steps=1)
    torch.manual_seed(0)
    for shape, a, b in zip(SHAPES, plain, centered, strict=True):
        start = torch.randn(shape)
        if len(shape) > 3:
            # What is subtracted is the mean of the update, not of the weight decay.
            decay = 1 - 0.01 * 0.1 * torch.tensor([1.0, 0.01])
            candidates = [start * d + centralize_(a.detach() - start * d) for d in decay]
            assert any(torch.allclose(b, candidate, atol=1e-7) for candidate in candidates)
            assert not torch.allclose(a, b)
        else:
            assert torch.equal(a, b)


def test_centralize():
    update = torch.arange(24.0).reshape(2, 3, 2, 2)
    centralize_(update)
    torch.testing.assert_close(update.mean(dim=(1, 2, 3)), torch.zeros(2))
    matrix = torch.ones(2, 3)
    assert torch.equal(centralize_(matrix), torch.ones(2, 3))


def step(task, **options):
    before = task.trainable_module.model.backbone.conv.weight.detach().clone()
    optimizer = create_optimizer(task, weight_decay=0.0, **options)
    torch.manual_seed(0)
    task(torch.randn(4, 3, 8, 8), torch.tensor([[0, 1], [1, 0]]).repeat(2, 1))['loss'].backward()
    optimizer.step()
    return (task.trainable_module.model.backbone.conv.weight.detach() - before).mean(dim=(1, 2, 3))


@pytest.mark.parametrize('opt', ['adamp', 'adamw', 'sgd'])
def test_centralization_is_on_for_adamp_alone_and_can_be_switched(opt):
    zero = torch.zeros(4)
    assert torch.allclose(step(tiny_task(), opt=opt, lr=0.1), zero, atol=1e-7) == (opt == 'adamp')
    for switched in (True, False):
        mean = step(tiny_task(), opt=opt, lr=0.1, gradient_centralization=switched)
        assert torch.allclose(mean, zero, atol=1e-7) == switched


def test_each_of_several_backbones_has_layers_of_its_own():
    task = JointTask(MultiLabelModel(create_backbone('test_resnet+test_vit'), SPACE))
    optimizer = create_optimizer(task, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group.get('lr_scale', 1) for group in optimizer.param_groups for p in group['params']}
    for backbone in task.trainable_module.model.backbone.backbones:
        assert max(scale[id(p)] for p in backbone.parameters()) == 1


def test_groups_cover_everything_once_and_spare_what_the_backbone_spares():
    task = JointTask(MultiLabelModel(create_backbone('test_vit'), SPACE))
    named = dict(task.trainable_module.named_parameters())
    for layer_decay in (None, 0.5):
        optimizer = create_optimizer(task, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
        ids = [id(p) for group in optimizer.param_groups for p in group['params']]
        assert sorted(ids) == sorted(id(p) for p in named.values())
        decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
        assert decay[id(named['model.backbone.pos_embed'])] == 0
        assert decay[id(named['model.heads.0.fc.bias'])] == 0
        assert decay[id(named['projector.0.weight'])] == 0.05
        scale = {id(p): group.get('lr_scale', 1) for group in optimizer.param_groups for p in group['params']}
        assert scale[id(named['model.heads.1.fc.weight'])] == scale[id(named['projector.2.weight'])] == 1
        lowest = scale[id(named['model.backbone.patch_embed.proj.weight'])]
        assert lowest == (1 if layer_decay is None else pytest.approx(min(scale.values())))
        assert (lowest < 0.5) == (layer_decay is not None)


def test_caution_is_left_to_timm():
    optimizer = create_optimizer(tiny_task(), 'adamp', lr=0.1, caution=True)
    assert type(optimizer) is not CentralizedAdamP and optimizer.param_groups[0]['caution']
    zero = torch.zeros(4)
    assert torch.allclose(step(tiny_task(), opt='adamp', lr=0.1, caution=True), zero, atol=1e-7)


def test_unknown_optimizer():
    with pytest.raises(ValueError):
        create_optimizer(tiny_task(), 'adamm', lr=0.1)
