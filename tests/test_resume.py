"""A run that was stopped within an epoch goes on to the result of the run that never was; numbers that are none."""
import os
import signal
import time

import pandas as pd
import pytest
import torch
from common import TINY, assert_same_summary, assert_same_weights, train_run, write_data

from timm_multilabel.assembly import phases
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.sample import write_sample
from timm_multilabel.errors import UserError
from timm_multilabel.training import optimizer_step, saver
from timm_multilabel.training.checkpoint import newest_checkpoint, read_checkpoint
from timm_multilabel.training.run_folder import RunLock, find_launched, launcher


class Killed(BaseException):
    """Ends a run where it stands."""


def killed_run(data_dir, output, monkeypatch, saves, *flags, epochs=3):
    """A run that ends right after it has saved so many times within epochs; the run folder."""
    save = saver.WholeSaver.save_within
    done = []

    def save_within(self, epoch, step):
        save(self, epoch, step)
        done.append(step)
        if len(done) == saves:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saver.WholeSaver, 'save_within', save_within)
        train_run(data_dir, output, *flags, epochs=epochs)
    return output / 'run'


@pytest.mark.slow
@pytest.mark.parametrize('flags, saves', [
    (['--model-ema', '--model-ema-decay', '0.9', '--opt', 'adamp', '--aa', 'rand-m5', '--checkpoint-steps', '1'], 4),
    (['-wls', '0', '--grad-accum-steps', '2', '--clip-grad', '1', '--sched-on-updates', '-b', '2',
      '--checkpoint-steps', '3'], 2),
    (['-wls', '0', '--mixup', '0.4', '--cutmix', '1', '-j', '1', '--checkpoint-steps', '2'], 2),
    (['-wlc', '0', '--cache', 'device', '--opt', 'adamw', '--checkpoint-steps', '2'], 1),
    (['-wls', '0', '--unlabelled', 'images', '--labelled-rows', '8', '--pseudo-label-weight', '1',
      '--pseudo-label-threshold', '0.5', '--checkpoint-steps', '1'], 2),  # with running means
    (['--sched', 'plateau', '--patience-epochs', '1', '--micro-batch', '3', '--amp', '--checkpoint-steps', '2'], 3),
])
def test_resume_within_an_epoch(data_dir, tmp_path, monkeypatch, flags, saves):
    whole = train_run(data_dir, tmp_path / 'whole', *flags, epochs=3)
    part = killed_run(data_dir, tmp_path / 'part', monkeypatch, saves, *flags)
    assert len(list(part.glob('recovery-*'))) in (1, 2)
    train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto', epochs=3)
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)
    assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}
    state, theirs = (read_checkpoint(folder / 'last.pth.tar').state for folder in (whole, part))
    assert state['saver'] == theirs['saver'] and state['run'] == theirs['run']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['webdataset', 'parquet'])
@pytest.mark.parametrize('workers', ['0', '2'])
def test_resume_within_an_epoch_of_shards(tmp_path, monkeypatch, kind, workers):
    data = tmp_path / 'data'
    write_sample(data, train=24, val=4, test=1, unlabelled=0, size=32, kind=kind)
    flags = ['-j', workers, '--checkpoint-steps', '2']
    whole = train_run(data, tmp_path / 'whole', *flags)
    part = killed_run(data, tmp_path / 'part', monkeypatch, 3, *flags, epochs=2)
    train_run(data, tmp_path / 'part', *flags, '--resume', str(part))
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['between row and checkpoint', 'before the history', 'before the best'])
def test_killed_while_it_saves_an_epoch(data_dir, tmp_path, monkeypatch, moment):
    """History and best are those of the whole run, though the second epoch's was not ranked before the end."""
    # With the default's milder views all epochs reach the same, and there is nothing to rank.
    views = ['--scale', '0.08', '1', '--color-jitter', '0.8', '0.8', '0.8', '0.2', '--grayscale-prob', '0.2']
    flags = ['--checkpoint-hist', '1', *views]
    whole = train_run(data_dir, tmp_path / 'whole', *flags, epochs=3)
    cls, name = {
        'between row and checkpoint': (saver.WholeSaver, 'save_checkpoint'),
        'before the history': (saver.WholeSaver, '_duplicate'),
        'before the best': (saver.WholeSaver, '_track_checkpoint'),
    }[moment]
    original, calls = getattr(cls, name), []

    def dies(self, *args, **kwargs):
        calls.append(name)
        if len(self.checkpoint_files) == (0 if 'row' not in moment else 1) and (self.folder / 'checkpoint-0.pth.tar'
                                                                               ).is_file() is ('row' in moment):
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cls, name, dies)
        train_run(data_dir, tmp_path / 'part', *flags, epochs=3)
    part = train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto', epochs=3)
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_weights(whole / 'model_best.pth.tar', part / 'model_best.pth.tar')
    assert_same_summary(whole, part)
    assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(data_dir, tmp_path, monkeypatch, capsys):
    flags = ['--checkpoint-steps', '1']
    part = killed_run(data_dir, tmp_path, monkeypatch, 4, *flags, epochs=3)
    newest, _ = newest_checkpoint(part)
    assert newest.name == 'recovery-1-2.pth.tar'
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(SystemExit) as stop:
        run_command('train', 'train.py', [str(data_dir), *TINY, '--epochs', '3', '--resume', str(newest)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert f'{newest}: cannot be loaded as a checkpoint' in error
    assert f'the newest whole one beside it: --resume {part}/recovery-1-1.pth.tar' in error

    train_run(data_dir, tmp_path, *flags, '--resume', 'auto', epochs=3)
    out = capsys.readouterr().out
    assert f'{newest}: cannot be loaded as a checkpoint (damaged?): passed over' in out
    assert f'{part}/recovery-1-1.pth.tar: goes on from here' in out
    whole = train_run(data_dir, tmp_path / 'whole', *flags, epochs=3)
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')


@pytest.mark.slow
def test_nothing_whole_to_resume_from(data_dir, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').write_bytes(b'')
    for flags in (['--resume', 'auto'], ['--resume', str(tmp_path / 'run')]):
        with pytest.raises(SystemExit):
            train_run(data_dir, tmp_path, *flags)
        assert 'no whole checkpoint in this run folder' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command('train', 'train.py', [str(data_dir), *TINY, '--resume', 'auto'])
    assert 'add --experiment NAME' in capsys.readouterr().err
    (tmp_path / 'run' / 'last.pth.tar').unlink()
    train_run(data_dir, tmp_path, '--resume', 'auto', epochs=1)  # there is nothing yet, so it starts
    train_run(data_dir, tmp_path, '--resume', 'auto', epochs=1)  # nothing is left to do
    assert len(pd.read_csv(tmp_path / 'run' / 'summary.csv')) == 1


@pytest.mark.slow
def test_one_run_in_a_folder_at_a_time(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm_multilabel.training.run_folder._PATIENCE', 1)
    train_run(data_dir, tmp_path, epochs=1)
    first = RunLock()
    first.take(tmp_path / 'run')
    with pytest.raises(SystemExit):
        train_run(data_dir, tmp_path, '--resume', 'auto')
    assert 'another process trains in this folder' in capsys.readouterr().err
    first.close()
    train_run(data_dir, tmp_path, '--resume', 'auto')


@pytest.mark.slow
def test_going_back_sets_aside_what_came_later(data_dir, tmp_path, monkeypatch, capsys):
    """The whole run of another learning rate, from the first epoch on, whatever happens to it on its way."""
    whole = train_run(data_dir, tmp_path, epochs=4)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    start = whole / 'checkpoint-0.pth.tar'
    train_run(data_dir, tmp_path / 'other', '--lr', '0.02', '--checkpoint-hist', '9', epochs=1)
    flags = ['--lr', '0.02', '--checkpoint-steps', '1']
    killed_run(data_dir, tmp_path, monkeypatch, 3, *flags, '--resume', str(start), epochs=4)
    aside = whole / 'set-aside-1'
    assert f'{start}: goes back to here; ' in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == {
        name: content for name, content in before.items()
        if name in ('last.pth.tar', 'summary.csv') or name.startswith('checkpoint-') and name != 'checkpoint-0.pth.tar'
        or name == 'model_best.pth.tar' and content != before['checkpoint-0.pth.tar']}
    train_run(data_dir, tmp_path, *flags, '--resume', 'auto', epochs=4)
    out = capsys.readouterr().out
    assert f'{whole}/recovery-2-1.pth.tar: goes on from here' in out and 'goes back' not in out
    summary, aside_summary = (pd.read_csv(folder / 'summary.csv', dtype=str) for folder in (whole, aside))
    assert summary['epoch'].tolist() == aside_summary['epoch'].tolist() == ['0', '1', '2', '3']
    assert summary['train_loss'][0] == aside_summary['train_loss'][0]
    assert summary['train_loss'][2] != aside_summary['train_loss'][2]


@pytest.mark.slow
def test_another_batch_size_goes_on_at_the_same_share_of_the_epoch(data_dir, tmp_path, monkeypatch, capsys):
    flags = ['-wls', '0', '--checkpoint-steps', '4']
    killed_run(data_dir, tmp_path, monkeypatch, 1, *flags, '-b', '2', epochs=2)  # after 4 of 6 steps
    capsys.readouterr()
    train_run(data_dir, tmp_path, *flags, '-b', '4', '--log-interval', '1', '--resume', 'auto')
    out = capsys.readouterr().out
    assert 'images a step: 2 before, 4 now' in out
    assert 'Epoch 1/2  step 2/3' not in out and 'Epoch 1/2  step 3/3' in out  # it had 2 of 3


def test_within_an_epoch_the_terms_stay(data_dir, tmp_path, monkeypatch, capsys):
    write_data(tmp_path / 'more', train=8)
    killed_run(data_dir, tmp_path, monkeypatch, 1, '--checkpoint-steps', '1')
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path, '--resume', 'auto', '--unlabelled', str(tmp_path / 'more' / 'images'),
                  '--epoch-by', 'labelled', '--entropy-weight', '0.1')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and 'saved within an epoch of other loss terms' in error and error.count('\n') == 1


def test_restarts_take_over_their_own_run_alone(tmp_path, monkeypatch):
    """Of two launches into one output folder, and of an older one, each with the same name."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    for name, text in (('mine', f'other 1\n{launcher()}'), ('theirs', 'other 1'), ('none', '')):
        (tmp_path / name).mkdir()
        (tmp_path / name / '.launch').write_text(text)
    assert find_launched(tmp_path.glob('*'), [launcher(), 'third 3']) == tmp_path / 'mine'
    assert find_launched([tmp_path / 'theirs', tmp_path / 'none', tmp_path / 'nowhere'], [launcher(), '']) is None
    os.utime(tmp_path / 'mine' / '.launch', (0, 0))  # of a process that had the number before
    assert find_launched(tmp_path.glob('*'), [launcher()]) is None


def test_a_signal_while_it_prepares_is_status_75_too(data_dir, tmp_path, monkeypatch, capsys):
    def read_data(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(phases, 'read_data', read_data)
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path)
    assert stop.value.code == 75 and 'train.py: stopped before it began' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_what_goes_wrong_after_a_signal_is_said(data_dir, tmp_path, monkeypatch, capsys):
    def save_within(self, epoch, step):
        raise UserError('x: the disk is full')

    def begin(self):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(saver.WholeSaver, 'save_within', save_within)
    monkeypatch.setattr(optimizer_step.OptimizerStep, 'begin', begin)
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path)
    assert stop.value.code == 2 and 'train.py: error: x: the disk is full' in capsys.readouterr().err


def poisoned(monkeypatch, poison):
    """Let `poison(loss, call)` change the loss of each backward pass."""
    backward, calls = optimizer_step.OptimizerStep.backward, []

    def changed(self, loss, *args, **kwargs):
        calls.append(0)
        return backward(self, poison(loss, len(calls)), *args, **kwargs)

    monkeypatch.setattr(optimizer_step.OptimizerStep, 'backward', changed)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize('poison', [
    lambda loss, call: loss * float('nan') if call == 2 else loss,  # loss and gradient
    lambda loss, call: loss + (0 * loss).sqrt() if call == 2 else loss,  # its gradient alone
])
def test_an_update_that_is_no_number_is_skipped(data_dir, tmp_path, monkeypatch, capsys, poison):
    calls = poisoned(monkeypatch, poison)
    folder = train_run(data_dir, tmp_path, '-wls', '0', '--drop', '0', '--opt', 'momentum', epochs=2)
    assert len(calls) == 6
    assert 'skipped 1 update whose loss or gradient is not finite' in capsys.readouterr().out
    assert pd.read_csv(folder / 'summary.csv')['train_loss'].notna().all()
    for value in torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict'].values():
        assert value.isfinite().all()


@pytest.mark.slow
def test_too_many_stop_the_run_and_name_the_rows(data_dir, tmp_path, monkeypatch, capsys):
    train_run(data_dir, tmp_path / 'good', epochs=1)
    poisoned(monkeypatch, lambda loss, call: loss * float('inf') if call > 3 else loss)
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path / 'bad', epochs=30)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert 'the loss is not finite, update after update, last at step 3 of epoch 2' in error
    assert '--lr' in error and error.count('train.csv row ') == 4
    folder = tmp_path / 'bad' / 'run'
    assert_same_weights(tmp_path / 'good' / 'run' / 'last.pth.tar', folder / 'last.pth.tar')
    assert len(pd.read_csv(folder / 'summary.csv')) == 1
