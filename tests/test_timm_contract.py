"""The task where timm's own training script is the host: the README's lines, and the calls that the script makes."""
import re
from argparse import Namespace
from pathlib import Path

import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_multilabel.cli import validate
from timm_multilabel.cli.main import run_command

README = (Path(__file__).parent.parent / 'README.md').read_text()


def test_the_lines_of_the_readme_run_under_timm(data_dir, tmp_path, capsys):
    section = README.split("## In timm's own training script")[1]
    code = re.search(r'```python\n(.*?)```', section, re.S)[1]
    lines = [line for line in code.splitlines() if line and 'import' not in line]
    assert len(lines) <= 10
    names = {'args': Namespace(model='test_resnet', drop=0.1), 'device': torch.device('cpu')}
    exec(code.replace('my-photos', str(data_dir)), names)
    task = names['task']

    options = {'input_size': (3, 32, 32), 'batch_size': 4, 'num_workers': 0, 'device': names['device']}
    train = create_loader(names['dataset_train'], is_training=True, re_prob=0.5, auto_augment='rand-m5', **options)
    eval_ = create_loader(names['dataset_eval'], is_training=False, **options)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    task.train()
    before = [p.clone() for p in task.get_trainable_module().parameters()]
    for images, target in train:
        assert images.shape == (8, 3, 32, 32)
        result = task(images, target)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        task.update_ema()
    assert any(not torch.equal(a, b) for a, b in zip(before, task.get_trainable_module().parameters(), strict=True))

    task.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(eval_))
    for images, target in eval_:
        evaluator.update(task.get_eval_model()(images), target)
    metrics = evaluator.compute(distributed=False)
    assert evaluator.default_metric in metrics and set(evaluator.metric_names) <= set(metrics)

    flags = Namespace(model='test_resnet', img_size=32, mean=None, std=None)
    saver = CheckpointSaver(task.get_eval_model(), optimizer, flags, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metrics['top1'])
    weights = [p.clone() for p in task.get_trainable_module().parameters()]
    with torch.no_grad():
        for p in task.get_trainable_module().parameters():
            p.zero_()
    assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar'), optimizer) == 1
    run_command(validate, 'validate.py', [
        str(data_dir), '--checkpoint', str(tmp_path / 'last.pth.tar'), '-j', '0', '--device', 'cpu'])
    assert 'weighted mean' in capsys.readouterr().out
    load_task_ema_checkpoint(task, str(tmp_path / 'last.pth.tar'))
    assert all(torch.equal(a, b) for a, b in zip(weights, task.get_trainable_module().parameters(), strict=True))
