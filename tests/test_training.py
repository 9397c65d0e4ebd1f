"""Runs in one process: run folder, resume, EMA, checkpoints, what stops a run."""
import json
import math
import os
import shutil

import pandas as pd
import pytest
import torch
import yaml
from common import TINY, assert_same_summary, assert_same_weights, weights, write_data
from common import train_run as run

from timm_multilabel.assembly import loaders
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.training.checkpoint import load_model, read_checkpoint


def test_run_folder(data_dir, tmp_path, capsys):
    folder = run(data_dir, tmp_path, '--model-ema', '--model-ema-decay', '0.5', '-wls', '0.2', '-wlc', '0.8')
    assert {path.name for path in folder.iterdir()} == {
        'args.yaml', 'label_space.json', 'summary.csv', 'curves.png', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar',
        'last.pth.tar', 'model_best.pth.tar'}
    assert LabelSpace.load(folder / 'label_space.json').names == ('color', 'shape')
    assert yaml.safe_load((folder / 'args.yaml').read_text())['simclr_loss_weight'] == 0.2

    summary = pd.read_csv(folder / 'summary.csv')
    assert summary['epoch'].tolist() == [0, 1]
    total = summary['simclr_loss'] + summary['classification_loss']
    assert summary['train_loss'].to_numpy() == pytest.approx(total.to_numpy(), rel=1e-6)
    heads = 0.8 * (summary['train/color/loss'] + summary['train/shape/loss']) / 2
    assert summary['classification_loss'].to_numpy() == pytest.approx(heads.to_numpy(), rel=1e-5)
    for prefix in ('eval_', 'eval_ema_'):
        for name in ('loss', 'top1', 'top5'):
            mean = (summary[f'{prefix[:-1]}/color/{name}'] + summary[f'{prefix[:-1]}/shape/{name}']) / 2
            assert summary[prefix + name].to_numpy() == pytest.approx(mean.to_numpy())
    assert (summary['images_per_second'] > 0).all() and summary['lr'].tolist()[0] == 0.05

    best = read_checkpoint(folder / 'model_best.pth.tar')
    row = summary.iloc[best.state['epoch']]
    scores = {'plain': row['eval_top1'], 'ema': row['eval_ema_top1']}
    assert best.state['metric'] == pytest.approx(max(scores.values()))
    assert scores[best.best_weights] == max(scores.values())
    assert 'Epoch 2/2  loss' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--micro-batch', '3', '--model-ema'],
    ['--model-ema', '--model-ema-decay', '0.9', '--opt', 'adamp', '--aa', 'rand-m5'],
    ['-wls', '0', '--grad-accum-steps', '2', '--clip-grad', '1', '--clip-mode', 'agc', '--sched-on-updates'],
    ['-wlc', '0', '--views', 'simclr', '--opt', 'adamw', '--layer-decay', '0.7', '-j', '1'],
    ['--amp', '--channels-last', '--grad-checkpointing', '--classify-views', 'first'],
    ['--torchcompile', 'eager', '--model-ema', '--model-ema-warmup'],
])
def test_resumed_run_is_the_run_that_never_stopped(data_dir, tmp_path, flags):
    whole = run(data_dir, tmp_path / 'whole', *flags, epochs=3)
    part = shutil.copytree(whole, tmp_path / 'part' / 'run')
    # As if killed after the first epoch: its checkpoint is the last, later rows are not there.
    for name in ('checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'model_best.pth.tar', 'last.pth.tar'):
        (part / name).unlink(missing_ok=True)
    os.link(part / 'checkpoint-0.pth.tar', part / 'last.pth.tar')
    run_command('train', 'train.py', ['-c', str(part / 'args.yaml'), '--resume', str(part / 'last.pth.tar')])
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)


@pytest.mark.slow
def test_same_seed_same_run_and_workers_do_not_matter(data_dir, tmp_path):
    flags = ['--aa', 'rand-m9-mstd0.5']
    first = run(data_dir, tmp_path / 'a', *flags, epochs=1)
    again = run(data_dir, tmp_path / 'b', *flags, '-j', '2', epochs=1)
    other = run(data_dir, tmp_path / 'c', *flags, '--seed', '1', epochs=1)
    assert_same_weights(first / 'last.pth.tar', again / 'last.pth.tar')
    with pytest.raises(AssertionError):
        assert_same_weights(first / 'last.pth.tar', other / 'last.pth.tar')


@pytest.mark.slow
def test_checkpoint_is_usable_by_itself(data_dir, tmp_path):
    folder = run(data_dir, tmp_path, '--model-ema', epochs=1)
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert state['arch'] == 'test_resnet' and state['opt'] == 'sgd' and state['version'] == 2 and state['epoch'] == 0
    assert not any('projector' in name for name in state['state_dict']) and 'projector' in state['task_state']
    checkpoint = read_checkpoint(folder / 'last.pth.tar')
    plain, ema = load_model(checkpoint, 'plain'), load_model(checkpoint, 'ema')
    images = torch.randn(2, 3, 32, 32)
    assert plain(images)['color'].shape == (2, 3)
    assert not torch.equal(plain(images)['color'], ema(images)['color'])


@pytest.mark.slow
def test_initial_checkpoint_takes_what_fits(data_dir, tmp_path, capsys):
    start = run(data_dir, tmp_path / 'a', epochs=1) / 'last.pth.tar'
    text = (data_dir / 'train.csv').read_text() + 'images/0.png,purple,disc\n'
    (data_dir / 'train.csv').write_text(text)
    run(data_dir, tmp_path / 'b', '--initial-checkpoint', str(start), epochs=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(start)))
    assert "took backbone, head 'shape', projector (plain weights); starts anew: head 'color'" in line


@pytest.mark.slow
def test_args_yaml_repeats_the_run(data_dir, tmp_path):
    first = run(data_dir, tmp_path / 'a', '--aa', 'rand-m5', '--head-weights', 'color=0.7', 'shape=0.1', epochs=1)
    run_command('train', 'train.py', ['-c', str(first / 'args.yaml'), '--output', str(tmp_path / 'b')])
    assert_same_weights(first / 'last.pth.tar', tmp_path / 'b' / 'run' / 'last.pth.tar')


@pytest.mark.slow
def test_learning_rates_of_the_forks_schedule(data_dir, tmp_path, capsys):
    """Warm-up of 3 epochs from 1e-6, cosine to 1e-5 over 5 epochs, cooldown; never longer a warm-up than the run."""
    common = ['--lr', '0.016', '--warmup-lr', '1e-6', '--sched', 'cosine']
    lrs = pd.read_csv(run(data_dir, tmp_path / 'a', *common, '--warmup-epochs', '3', '--cooldown-epochs', '2',
                          epochs=5) / 'summary.csv')['lr'].tolist()
    warm = [1e-6 + (0.016 - 1e-6) * epoch / 3 for epoch in range(3)]
    cosine = [1e-5 + (0.016 - 1e-5) * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in (3, 4)]
    assert lrs == pytest.approx([*warm, *cosine, 1e-5, 1e-5], rel=1e-6)
    lrs = pd.read_csv(run(data_dir, tmp_path / 'b', *common, '--warmup-epochs', '3', epochs=1) / 'summary.csv')['lr']
    assert lrs.tolist() == [0.016]
    assert '--warmup-epochs 3 does not fit into --epochs 1: warms up for 0' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--mixup', '0.5'], ['--cutmix', '1', '--mixup-mode', 'elem']])
def test_mixing_trains(data_dir, tmp_path, flags):
    summary = pd.read_csv(run(data_dir, tmp_path, '-wls', '0', *flags, epochs=1) / 'summary.csv')
    assert summary['train_loss'].notna().all()


@pytest.mark.slow
def test_micro_batches_train_as_whole_batches(data_dir, tmp_path):
    """With layer norm in place of batch norm, and without dropout, whose draws come in another order."""
    write_data(tmp_path / 'more', train=8)
    flags = ['--model', 'test_vit', '--drop', '0', '--reprob', '0', '--unlabelled', str(tmp_path / 'more' / 'images'),
             '--entropy-weight', '0.1', '--pseudo-label-weight', '0.2', '--pseudo-label-threshold', '0.4',
             '--model-ema', '--model-ema-decay', '0.5', '--clip-grad', '1', '--grad-accum-steps', '2']
    whole = weights(run(data_dir, tmp_path / 'whole', *flags) / 'last.pth.tar')
    pieces = weights(run(data_dir, tmp_path / 'pieces', *flags, '--micro-batch', '3') / 'last.pth.tar')
    assert whole.keys() == pieces.keys()
    assert any(name.startswith('task_state_ema.projector') for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.slow
@pytest.mark.parametrize('flags, size', [([], 4), (['--micro-batch', '3'], 3), (['--micro-batch', '3', '-vb', '2'], 2)])
def test_evaluation_takes_micro_batches_too(data_dir, tmp_path, monkeypatch, flags, size):
    sizes, create = [], loaders.create_eval_loader
    monkeypatch.setattr(loaders, 'create_eval_loader', lambda rows, batch_size, **kwargs: (
        sizes.append(batch_size), create(rows, batch_size, **kwargs))[1])
    run(data_dir, tmp_path, *flags, epochs=1)
    assert sizes == [size]


@pytest.mark.slow
def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(data_dir, tmp_path, capsys):
    folder = run(data_dir, tmp_path, epochs=1)
    before = (folder / 'last.pth.tar').read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_command('train', 'train.py', [
            str(data_dir), *TINY, '--epochs', '3', '--lr', '1e30', '--opt', 'sgd', '--sched', 'constant',
            '--resume', str(folder / 'last.pth.tar')])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'loss is' in error and '--lr' in error
    assert (folder / 'last.pth.tar').read_bytes() == before
    assert len(pd.read_csv(folder / 'summary.csv')) == 1


def validated(data_dir, folder, *flags):
    results = folder / 'results.json'
    run_command('validate', 'validate.py', [
        str(data_dir), '--checkpoint', str(folder / 'model_best.pth.tar'), '-b', '4', '-j', '0', '--device', 'cpu',
        '--results-file', str(results), *flags])
    return json.loads(results.read_text())


@pytest.mark.slow
def test_validation_repeats_the_evaluation_of_training(data_dir, tmp_path, capsys):
    folder = run(data_dir, tmp_path, '--model-ema', '--model-ema-decay', '0.5')
    best = read_checkpoint(folder / 'model_best.pth.tar')
    row = pd.read_csv(folder / 'summary.csv').iloc[best.state['epoch']]
    for kind, prefix in (('best', {'plain': 'eval_', 'ema': 'eval_ema_'}[best.best_weights]),
                         ('plain', 'eval_'), ('ema', 'eval_ema_')):
        results = validated(data_dir, folder, '--weights', kind)
        for metric in ('top1', 'top5', 'loss'):
            assert results['mean'][metric] == pytest.approx(row[prefix + metric], rel=1e-5)
            assert results['heads']['color'][metric] == pytest.approx(row[f'{prefix[:-1]}/color/{metric}'], rel=1e-5)
        assert results['heads']['shape']['labels'] == 6
    assert f'{best.best_weights} weights, the better ones of this checkpoint' in capsys.readouterr().out


@pytest.mark.slow
def test_validation_of_another_table_names_what_it_cannot_score(data_dir, tmp_path, capsys):
    folder = run(data_dir, tmp_path, epochs=1)
    (data_dir / 'odd.csv').write_text('image_path,color\nimages/0.png,pink\nimages/1.png,\nimages/2.png,blue\n')
    results = validated(data_dir, folder, '--split', str(data_dir / 'odd.csv'), '--confusion', str(tmp_path / 'c'))
    out = capsys.readouterr().out
    assert "not scored: color 'pink' in 1 row (2)" in out and 'no column for shape: not scored' in out
    assert results['heads']['color']['labels'] == 1
    assert results['heads']['shape']['top1'] is None and math.isfinite(results['mean']['top1'])
    table = pd.read_csv(tmp_path / 'c' / 'confusion-color.csv', index_col=0)
    assert table.to_numpy().sum() == 1 and list(table.columns) == ['blue', 'green', 'red']
    assert (tmp_path / 'c' / 'confusion-color.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_validation_needs_no_csv_of_training(data_dir, tmp_path):
    folder = run(data_dir, tmp_path, epochs=1)
    (data_dir / 'train.csv').unlink()
    assert validated(data_dir, folder)['heads']['color']['labels'] == 6


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.system, (f'touch {tmp_path}/harm',))
    torch.save({'state_dict': {}, 'x': Hostile()}, tmp_path / 'x.pth.tar')
    with pytest.raises(UserError, match='more than weights'):
        read_checkpoint(tmp_path / 'x.pth.tar')
    assert not (tmp_path / 'harm').exists()


def test_simclr_alone_needs_no_labels_and_is_not_validated(tmp_path, capsys):
    data_dir = write_data(tmp_path / 'data')
    (data_dir / 'train.csv').write_text('image_path\n' + ''.join(f'images/{n}.png\n' for n in range(12)))
    (data_dir / 'val.csv').unlink()
    folder = run(data_dir, tmp_path, '-wlc', '0', epochs=1)
    assert (folder / 'model_best.pth.tar').is_file()
    assert pd.read_csv(folder / 'summary.csv')['classification_loss'].tolist() == [0]
    with pytest.raises(SystemExit):
        validated(data_dir, folder)
    assert 'trained with -wlc 0' in capsys.readouterr().err
