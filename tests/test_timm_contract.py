"""What timm asks of a model and a task: the script with a loop of one's own, and the calls of timm's script."""
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from common import SPACE, tiny_task
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_multilabel import JointTask, MultiLabelModel, create_backbone
from timm_multilabel.cli.main import run_command

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_script_with_a_loop_of_ones_own(data_dir, tmp_path, capsys):
    """Forty lines, which a page shows how to call; what they save is a checkpoint for our commands."""
    lines = (ROOT / 'examples/own_loop.py').read_text().splitlines()
    assert len([line for line in lines[1:] if line]) <= 40  # without the docstring
    done = subprocess.run(
        [sys.executable, ROOT / 'examples/own_loop.py', data_dir, '--model', 'test_resnet', '--img-size', '32',
         '--epochs', '2', '--batch-size', '5', '--workers', '0', '--output', tmp_path / 'own', '--device', 'cpu'],
        capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith('epoch 1/2, train loss ') and second.startswith('epoch 2/2, train loss ')
    for checkpoint in ('last.pth.tar', 'model_best.pth.tar'):
        run_command('validate', 'validate.py', [
            str(data_dir), '--checkpoint', str(tmp_path / 'own' / checkpoint), '-j', '0', '--device', 'cpu'])
        assert 'weighted mean' in capsys.readouterr().out
    state = torch.load(tmp_path / 'own' / 'last.pth.tar', weights_only=False)
    assert state['arch'] == 'test_resnet' and state['data_config']['input_size'] == (3, 32, 32)
    # 6 images to evaluate in batches of 5: each counts once.
    assert f"'top1': {round(state['metric'], 2)}" in second


def test_the_page_names_the_version_of_timm_that_was_tried():
    section = (ROOT / 'docs' / 'how-to' / 'own-loop.md').read_text()
    pinned = next(line for line in (ROOT / 'constraints.txt').read_text().splitlines() if line.startswith('timm=='))
    assert f'timm {pinned.removeprefix("timm==")}' in section and 'examples/own_loop.py' in section


def test_what_timm_asks_of_a_model():
    model = MultiLabelModel(create_backbone('test_vit', input_size={'img_size': 32}), SPACE)
    assert model.num_classes == 5  # 3 colors and 2 shapes
    expected = resolve_data_config({'img_size': 32}, model=timm.create_model('test_vit'))
    assert resolve_data_config({'img_size': 32}, model=model) == expected and expected['mean'] != (0.485, 0.456, 0.406)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.backbone.grad_checkpointing


def test_timms_optimizers_exempt_what_the_backbone_exempts():
    """Biases, norms and a ViT's position embedding have no weight decay, for the model and for all that is trained."""
    task = JointTask(MultiLabelModel(create_backbone('test_vit', input_size={'img_size': 32}), SPACE))
    for module in (task.get_trainable_module(), task.get_eval_model()):
        optimizer = create_optimizer_v2(module, 'adamw', lr=1e-3, weight_decay=0.05)
        decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
        of = {name.split('backbone.')[-1]: decay[id(p)] for name, p in module.named_parameters()}
        assert of['pos_embed'] == of['blocks.0.attn.qkv.bias'] == 0 and of['blocks.0.attn.qkv.weight'] == 0.05


def test_a_backbone_without_timms_attributes():
    model = tiny_task().get_eval_model()
    assert model.no_weight_decay() == set() and dict(model.pretrained_cfg) == {}


def test_the_calls_of_timms_script_on_a_task(data_dir, tmp_path):
    """Clip parameters, EMA, saver, and both ways to bring a checkpoint back."""
    task = JointTask(MultiLabelModel(create_backbone('test_resnet'), SPACE))
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    flags = Namespace(model='test_resnet', img_size=32, mean=None, std=None)
    saver = CheckpointSaver(task.get_eval_model(), optimizer, flags, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 50.0)
    weights = [p.clone() for p in task.get_trainable_module().parameters()]
    with torch.no_grad():
        for ema in (False, True):
            for p in task.get_trainable_module(ema=ema).parameters():
                p.zero_()
    assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar'), optimizer) == 1
    load_task_ema_checkpoint(task, str(tmp_path / 'last.pth.tar'))
    for ema in (False, True):
        restored = task.get_trainable_module(ema=ema).parameters()
        assert all(torch.equal(a, b) for a, b in zip(weights, restored, strict=True))
