"""Low-rank adapters: what they train, what a checkpoint holds of them, and that whoever uses it needs no peft."""
import sys

import numpy as np
import pytest
import torch
from common import SPACE, TinyBackbone, assert_same_weights, run_ranks, tiny_task, train_run, write_data
from test_cli import fails
from timm.layers import ScaledStdConv2d
from torch import nn

import timm_multilabel as tm
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import SettingError, UserError
from timm_multilabel.lora import add_adapters, merge_adapters
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

FLAGS = ['-wls', '0', '--lora', '2', '--opt', 'adamw', '--lr', '0.01', '--model-ema', '--model-ema-decay', '0.5']


def base_name(name, state):
    """What a weight is called in a model with adapters."""
    layer, _, kind = name.rpartition('.')
    return name if name in state else f'{layer}.base_layer.{kind}'


def without_peft(monkeypatch):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'peft']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'peft', None)


def test_without_peft(data_dir, capsys, monkeypatch):
    without_peft(monkeypatch)
    line = fails(capsys, 'train', [data_dir, '--model', 'test_resnet', '--img-size', '32', '-b', '4', '--lora', '4'])
    assert line == "train.py: error: --lora: peft is not installed (pip install '.[lora]')\n"
    with pytest.raises(SettingError, match=r"--lora: peft cannot be imported .*; pip install '\.\[lora\]'"):
        add_adapters(TinyBackbone(), 2, [3, 8, 8])


def test_merged_weights():
    """[[1, 2], [3, 4]] + [[1], [2]] [[10, 20]]."""
    state = {'a.base_layer.weight': torch.tensor([[1., 2.], [3., 4.]]), 'a.base_layer.bias': torch.tensor([5., 6.]),
             'a.lora_A.default.weight': torch.tensor([[10., 20.]]),
             'a.lora_B.default.weight': torch.tensor([[1.], [2.]]), 'b.weight': torch.tensor([7.])}
    merged = merge_adapters(state)
    assert {name: value.tolist() for name, value in merged.items()} == {
        'a.weight': [[11, 22], [23, 44]], 'a.bias': [5, 6], 'b.weight': [7]}
    assert len(state) == 5


@pytest.mark.parametrize('change', [
    {'a.lora_B.default.weight': torch.ones(3, 1)}, {'a.lora_A.default.weight': torch.ones(1)},
    {'a.base_layer.weight': torch.ones(2, 3)}, {'a.lora_A.default.weight': torch.ones(1, 2, dtype=torch.int32)}])
def test_an_adapter_of_another_layer(change):
    state = {'a.base_layer.weight': torch.ones(2, 2), 'a.lora_A.default.weight': torch.ones(1, 2),
             'a.lora_B.default.weight': torch.ones(2, 1)}
    with pytest.raises(ValueError, match="the adapter of 'a' does not fit it"):
        merge_adapters({**state, **change})
    with pytest.raises(ValueError, match="the adapter of 'a' does not fit it"):
        merge_adapters({name: value for name, value in state.items() if 'lora_B' not in name})


def adapted(name, size=64, seed=0):
    """A model with adapters of random weights, and the state that it had before."""
    pytest.importorskip('peft')
    torch.manual_seed(seed)
    task = JointTask(MultiLabelModel(create_backbone(name), SPACE), simclr_weight=0.0)
    model = task.joint_module.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    line = task.add_adapters(2, [3, size, size])
    for key, parameter in model.named_parameters():
        if 'lora_B' in key:
            nn.init.normal_(parameter, std=0.3)
    return task, before, line


@pytest.mark.parametrize('name, layers', [
    ('test_vit', 25),  # patches, and of each of 6 blocks qkv, proj, fc1, fc2
    ('test_efficientnet', 15),  # 2 are depthwise
    ('tf_efficientnet_lite0', 33),  # which pads as TensorFlow does
])
def test_merged_is_what_was_trained(name, layers):
    task, before, line = adapted(name)
    model = task.joint_module.model.eval()
    assert sum('lora_A' in key for key in model.state_dict()) == layers and f'on {layers} layers' in line
    plain = MultiLabelModel(create_backbone(name), SPACE).eval()
    plain.load_state_dict(merge_adapters(model.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, expected, first = (each.backbone(images) for each in (plain, model, _loaded(name, before)))
    size = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * size and (found - first).abs().max() > 0.1 * size


def _loaded(name, state):
    model = MultiLabelModel(create_backbone(name), SPACE).eval()
    model.load_state_dict(state)
    return model


def test_only_adapters_and_heads_learn():
    """The backbone's weights and the statistics of its batch norm stay as they are."""
    task, before, _ = adapted('test_efficientnet')
    optimizer = create_optimizer(task, 'adamw', lr=0.01, weight_decay=0.1, layer_decay=0.5)
    assert len({group['lr_scale'] for group in optimizer.param_groups if 'lr_scale' in group}) > 3
    task.train()
    for _ in range(2):
        optimizer.zero_grad()
        task(torch.randn(4, 3, 64, 64), torch.randint(2, (4, 2)))['loss'].backward()
        optimizer.step()
    state = task.joint_module.model.state_dict()
    for name, value in before.items():
        assert torch.equal(value, state[base_name(name, state)]) != name.startswith('heads.'), name
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)


def gradients(task, images, targets, size=None):
    task.micro_batch = size
    task.zero_grad()
    task(images, targets)['loss'].backward()
    return {name: p.grad for name, p in task.joint_module.named_parameters() if p.grad is not None}


def test_pieces_of_a_batch_give_the_same_gradient():
    task, _, _ = adapted('test_resnet')  # its batch norm is frozen
    images, targets = torch.randn(5, 3, 64, 64), torch.randint(2, (5, 2))
    task.train()
    whole, pieces = gradients(task, images, targets), gradients(task, images, targets, 2)
    assert whole.keys() == pieces.keys() and any('lora_A' in name for name in whole)
    for name, value in whole.items():
        assert torch.allclose(value, pieces[name], atol=1e-5), name


def tiny_adapted(dtype=torch.float64):
    task = tiny_task(simclr_weight=0.3)
    task.add_adapters(2, [3, 8, 8])
    for name, parameter in task.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter)
    return task.to(dtype)


def batch(count=8):
    torch.manual_seed(1)
    return torch.randn(2 * count, 3, 8, 8, dtype=torch.float64), torch.randint(2, (count, 2)).repeat(2, 1)


def rank_gradients(rank, *_):
    torch.manual_seed(0)
    task = tiny_adapted()
    task.prepare_distributed()
    images, targets = (part.view(2, 2, 4, *part.shape[1:])[:, rank].flatten(0, 1) for part in batch())
    return {name: value.numpy() for name, value in gradients(task, images, targets).items()}


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one():
    pytest.importorskip('peft')
    torch.manual_seed(0)
    one = gradients(tiny_adapted(), *batch())
    for found in run_ranks(rank_gradients, 2):
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert np.allclose(found[name], value, atol=1e-12), name


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradient():
    pytest.importorskip('peft')
    torch.manual_seed(0)
    task = tiny_adapted()
    plain = gradients(task, *batch())
    task.compile(backend='aot_eager')
    for name, value in gradients(task, *batch()).items():
        assert torch.allclose(value, plain[name], atol=1e-12), name


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of two epochs with adapters and EMA, from a checkpoint without."""
    pytest.importorskip('peft')
    folder = tmp_path_factory.mktemp('lora')
    data = write_data(folder / 'data')
    start = train_run(data, folder / 'start', '-wls', '0', epochs=1) / 'last.pth.tar'
    train_run(data, folder / 'out', *FLAGS, '--initial-checkpoint', str(start))
    return folder


def test_checkpoints_hold_the_start_and_its_adapters(run):
    start, found = (read_checkpoint(run / name / 'run' / 'last.pth.tar') for name in ('start', 'out'))
    theirs = found.state['state_dict']
    for name, value in start.state['state_dict'].items():
        if name.startswith('backbone.'):
            assert torch.equal(theirs[base_name(name, theirs)], value), name
    learned = [name for name, value in theirs.items() if 'lora_B' in name and value.abs().max() > 0]
    assert len(learned) == 15
    # Of 15 layers two, and weight and bias of two heads.
    assert len(found.state['optimizer']['state']) == 34


def test_a_run_with_adapters_resumes_exactly(run, tmp_path):
    whole = run / 'out' / 'run'
    stopped = train_run(run / 'data', tmp_path, *FLAGS, '--initial-checkpoint', str(
        run / 'start' / 'run' / 'last.pth.tar'), '--checkpoint-hist', '2')
    (stopped / 'last.pth.tar').unlink()
    (stopped / 'checkpoint-1.pth.tar').unlink()
    train_run(run / 'data', tmp_path, *FLAGS, '--resume', str(stopped / 'checkpoint-0.pth.tar'))
    assert_same_weights(stopped / 'last.pth.tar', whole / 'last.pth.tar')


def test_checkpoints_are_used_without_peft(run, tmp_path, monkeypatch):
    without_peft(monkeypatch)
    path, data = run / 'out' / 'run' / 'last.pth.tar', run / 'data'
    for weights in ('plain', 'ema'):
        model = load_model(read_checkpoint(path), weights)
        assert not any('lora' in name or 'base_layer' in name for name in model.state_dict())
    images = sorted(map(str, (data / 'images').iterdir()))[:3]
    predicted = tm.predict(path, images, device='cpu').table
    assert len(predicted) == 3 * len(SPACE.heads)
    assert tm.embed(path, images, out=tmp_path / 'e.npz', device='cpu') is not None
    exported = tm.export(path, out=tmp_path / 'export', formats=['safetensors', 'backbone'], images=images)
    assert exported is not None and (tmp_path / 'export' / 'backbone.safetensors').is_file()
    go_on = train_run(data, tmp_path, '-wls', '0', '--initial-checkpoint', str(path), epochs=1)
    assert not any('lora' in name for name in read_checkpoint(go_on / 'last.pth.tar').state['state_dict'])


def test_phases_start_from_merged_adapters(run, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('simclr_loss_weight: 0\nopt: adamw\nphases:\n- {name: heads, epochs: 1, freeze_backbone: true}\n'
                      '- {name: first, epochs: 1, lora: 2}\n- {name: second, epochs: 1, lora: 1}\n')
    command = ['-c', recipe, '--initial-checkpoint', run / 'start' / 'run' / 'last.pth.tar', '--output', tmp_path]
    run_command('train', 'train.py', [str(word) for word in (
        run / 'data', '--model', 'test_resnet', '--img-size', 32, '-b', 4, '-j', 0, '--device', 'cpu', '--experiment',
        'run', *command)])
    heads, first, second = (read_checkpoint(tmp_path / 'run' / name / 'last.pth.tar')
                            for name in ('1-heads', '2-first', ''))
    for before, after in ((heads, first), (first, second)):
        theirs, changed = after.unmerged_weights('plain'), 0
        for name, value in before.weights('plain').items():
            if name.startswith('backbone.'):
                assert torch.equal(theirs[base_name(name, theirs)], value), name
                changed += not torch.equal(after.weights('plain')[name], value)
        assert changed == 15


def test_a_checkpoint_whose_adapters_do_not_fit(run, tmp_path):
    state = torch.load(run / 'out' / 'run' / 'last.pth.tar', weights_only=True)
    name = next(name for name in state['state_dict'] if 'lora_A' in name)
    state['state_dict'][name] = torch.ones(2, 2)
    torch.save(state, tmp_path / 'x.pth.tar')
    with pytest.raises(UserError, match="x.pth.tar: the adapter of 'backbone.* does not fit it; use another"):
        load_model(read_checkpoint(tmp_path / 'x.pth.tar'), 'plain')


@pytest.mark.parametrize('flags', [['--lora', '2'], ['--freeze-backbone']])
def test_a_frozen_backbone_of_random_weights(data_dir, tmp_path, capsys, flags):
    if '--lora' in flags:
        pytest.importorskip('peft')
    train_run(data_dir, tmp_path, '-wls', '0', *flags, epochs=1)
    assert f'{flags[0]}: the backbone has random weights and keeps them; start it from --pre' in capsys.readouterr().out


@pytest.mark.parametrize('layer', [
    nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 3, dilation=2), ScaledStdConv2d(3, 3, 1), nn.ReLU()])
def test_a_backbone_without_a_layer_for_adapters(layer):
    pytest.importorskip('peft')
    with pytest.raises(SettingError, match='--lora: no layer of this backbone can have an adapter'):
        add_adapters(nn.Sequential(nn.PReLU(), layer), 2, [3, 8, 8])
