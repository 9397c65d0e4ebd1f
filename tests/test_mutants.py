"""What tests once let pass: the length of a run, and lines whose loss no test noticed."""
from pathlib import Path

import pandas as pd
import pytest
import yaml
from common import train_run

from timm_multilabel.cli import build, train, train_flags
from timm_multilabel.cli.compare import _read_settings
from timm_multilabel.cli.flags import Parser, parse_with_config
from timm_multilabel.cli.main import run_command
from timm_multilabel.training.progress import RunLength

BY_DEFAULT = ['--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu']


def parsed(*words):
    parser = Parser(prog='train.py')
    train_flags.add_flags(parser)
    return parse_with_config(parser, ['data', *words])


@pytest.mark.parametrize('flags, cooldown', [
    (['--epochs', '1'], 0), (['--epochs', '3'], 0), (['--epochs', '9'], 0), (['--epochs', '10'], 1),
    (['--epochs', '99'], 9), (['--epochs', '100'], 10), (['--epochs', '300'], 10), ([], 10),
    (['--epochs', '3', '--cooldown-epochs', '10'], 10), (['--epochs', '100', '--cooldown-epochs', '0'], 0),
])
def test_the_cooldown_is_a_tenth_of_the_epochs_and_10_at_most(flags, cooldown):
    assert build.cooldown_epochs(parsed(*flags)) == cooldown


@pytest.mark.parametrize('epoch, title', [
    (0, 'Epoch 1/100 + 10 of cooldown'), (99, 'Epoch 100/100 + 10 of cooldown'),
    (100, 'Epoch 101/110, cooldown 1/10'), (109, 'Epoch 110/110, cooldown 10/10')])
def test_titles_of_epochs(epoch, title):
    assert RunLength(100, 10).title(epoch) == title
    assert RunLength(110).title(epoch) == f'Epoch {epoch + 1}/110'


def test_3_epochs_are_3_epochs(data_dir, tmp_path, capsys):
    run_command(train, 'train.py', [
        str(data_dir), *BY_DEFAULT, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'run'])
    out = capsys.readouterr().out
    assert '\ntest_resnet, 3 epochs, heads: ' in out and f'{tmp_path}/run: 3 epochs done' in out
    assert 'Epoch 3/3  loss' in out and 'cooldown' not in out
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv')
    assert summary['epoch'].tolist() == [0, 1, 2] and summary['lr'].min() == 1e-4  # warm-up's first rate


@pytest.mark.parametrize('on_updates', [[], ['--sched-on-updates']])
def test_the_cooldown_is_said_and_trained(data_dir, tmp_path, capsys, on_updates):
    """10 epochs and their tenth, at the least rate; args.yaml repeats the default, not its number."""
    run_command(train, 'train.py', [
        str(data_dir), *BY_DEFAULT, '-wls', '0', '--epoch-steps', '1', '--epochs', '10', '--warmup-epochs', '0',
        '--output', str(tmp_path), '--experiment', 'run', *on_updates])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('test_resnet, 10 epochs + 1 of cooldown, heads: ')
    assert ', 1 x cpu, 1 step an epoch, run folder ' in lines[1]
    assert sum(line.startswith('Epoch 10/10 + 1 of cooldown  loss ') for line in lines) == 1
    assert sum(line.startswith('Epoch 11/11, cooldown 1/1  loss ') for line in lines) == 1
    assert lines[-1] == f'{tmp_path}/run: 10 epochs + 1 of cooldown done'
    rates = pd.read_csv(tmp_path / 'run' / 'summary.csv')['lr']
    assert len(rates) == 11 and rates[10] == pytest.approx(1e-5) and rates[9] > 1e-3
    path = tmp_path / 'run' / 'args.yaml'
    assert build.cooldown_epochs(parsed('-c', str(path), '--epochs', '3')) == 0
    # A run of before the default was a tenth holds its number, and goes on with it.
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), 'cooldown_epochs': 4}))
    assert build.cooldown_epochs(parsed('-c', str(path))) == 4


def test_the_default_cooldown_and_the_same_number_are_one_setting(tmp_path):
    read = []
    for cooldown in (None, 10):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump({'data_dir': 'data', 'cooldown_epochs': cooldown}))
        read.append(_read_settings(Path(tmp_path), None))
    assert read[0] == read[1] and read[0]['cooldown_epochs'] == 10


def test_a_schedule_without_cooldown_says_so(data_dir, tmp_path, capsys):
    for flags, said in (([], False), (['--cooldown-epochs', '2'], True), (['--cooldown-epochs', '0'], False)):
        folder = train_run(data_dir, tmp_path / str(flags), '--sched', 'step', '--epoch-steps', '1', *flags, epochs=1)
        line = '--cooldown-epochs 2: --sched step has no cooldown; trains 1 epoch\n'
        assert (line in capsys.readouterr().out) == said and len(pd.read_csv(folder / 'summary.csv')) == 1
