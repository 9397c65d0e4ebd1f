"""A run that was stopped within an epoch goes on to the result of the run that never was."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from common import TINY, assert_same_summary, assert_same_weights, train_run, write_data

from timm_multilabel.cli import train
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.sample import write_sample
from timm_multilabel.errors import UserError
from timm_multilabel.training import saver, updater
from timm_multilabel.training.checkpoint import newest_checkpoint, read_checkpoint
from timm_multilabel.training.run_folder import RunLock, find_launched, launcher

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize('flags, saves', [
    (['--model-ema', '--model-ema-decay', '0.9', '--opt', 'adamp', '--aa', 'rand-m5', '--checkpoint-steps', '1'], 4),
    (['-wls', '0', '--grad-accum-steps', '2', '--clip-grad', '1', '--sched-on-updates', '-b', '2',
      '--checkpoint-steps', '3'], 2),
    (['-wls', '0', '--mixup', '0.4', '--cutmix', '1', '-j', '1', '--checkpoint-steps', '2'], 2),
    (['-wlc', '0', '--cache', 'device', '--opt', 'adamw', '--checkpoint-steps', '2'], 1),
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


@pytest.mark.parametrize('moment', ['between row and checkpoint', 'before the history', 'before the best'])
def test_killed_while_it_saves_an_epoch(data_dir, tmp_path, monkeypatch, moment):
    """History and best are those of the whole run, though the second epoch's was not ranked before the end."""
    flags = ['--checkpoint-hist', '1']
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(data_dir, tmp_path, monkeypatch, capsys):
    flags = ['--checkpoint-steps', '1']
    part = killed_run(data_dir, tmp_path, monkeypatch, 4, *flags, epochs=3)
    newest, _ = newest_checkpoint(part)
    assert newest.name == 'recovery-1-2.pth.tar'
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(SystemExit) as stop:
        run_command(train, 'train.py', [str(data_dir), *TINY, '--epochs', '3', '--resume', str(newest)])
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


def test_nothing_whole_to_resume_from(data_dir, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').write_bytes(b'')
    for flags in (['--resume', 'auto'], ['--resume', str(tmp_path / 'run')]):
        with pytest.raises(SystemExit):
            train_run(data_dir, tmp_path, *flags)
        assert 'no whole checkpoint in this run folder' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command(train, 'train.py', [str(data_dir), *TINY, '--resume', 'auto'])
    assert 'add --experiment NAME' in capsys.readouterr().err
    (tmp_path / 'run' / 'last.pth.tar').unlink()
    train_run(data_dir, tmp_path, '--resume', 'auto', epochs=1)  # there is nothing yet, so it starts
    train_run(data_dir, tmp_path, '--resume', 'auto', epochs=1)  # nothing is left to do
    assert len(pd.read_csv(tmp_path / 'run' / 'summary.csv')) == 1


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

    monkeypatch.setattr(train, 'read_data', read_data)
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
    monkeypatch.setattr(updater.Updater, 'begin', begin)
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path)
    assert stop.value.code == 2 and 'train.py: error: x: the disk is full' in capsys.readouterr().err


# Real processes


def command(data, output, *flags, ranks=0):
    """A training command, under the launcher with so many ranks or by itself."""
    launcher = ['-m', 'timm_multilabel.cli.launch', '--standalone', '--nproc-per-node', str(ranks)] if ranks else []
    return [sys.executable, *launcher, str(ROOT / 'train.py'), str(data), *TINY, '--epochs', '2', '--output',
            str(output), '--experiment', 'run', '--checkpoint-steps', '5', '-b', '2', '-j', '1', *flags]


class Process:
    """A command that runs beside the test."""

    def __init__(self, words, **environment):
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})

    def __enter__(self):
        return self

    def __exit__(self, *args):
        for each in [*psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []:
            each.kill()
        self.process.kill()

    def wait_for(self, pattern, folder):
        """Wait until there is a file."""
        deadline = time.monotonic() + 240
        while not list(folder.glob(pattern)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def trainers(self):
        """The training processes under the launcher."""
        return psutil.Process(self.process.pid).children()

    def end(self):
        """(status, what it printed, its errors)."""
        out, errors = self.process.communicate(timeout=240)
        return self.process.returncode, out, errors


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('many') / 'data', train=160, val=8)


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """The run folder of two ranks that nothing happened to."""
    output = tmp_path_factory.mktemp('undisturbed')
    done = subprocess.run(command(data, output, ranks=2), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / 'run'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_status_75_tells_so(data, tmp_path, undisturbed, number):
    with Process(command(data, tmp_path, ranks=2), MAX_RESTARTS='2') as process:
        process.wait_for('run/recovery-*', tmp_path)
        process.process.send_signal(number)
        status, _, errors = process.end()
    assert status == 75, errors
    assert f'{number.name}: ends the step and saves' in errors
    assert 'train.py: stopped at step' in errors and 'go on with --resume' in errors
    assert 'Traceback' not in errors and errors.count('stopped at step') == 1
    newest, damaged = newest_checkpoint(tmp_path / 'run')
    assert newest.name.startswith('recovery-') and not damaged and newest.name in errors
    with Process(command(data, tmp_path, '--resume', 'auto', ranks=2)) as process:
        status, out, errors = process.end()
    assert status == 0, errors
    assert f'{newest}: goes on from here' in out
    assert_same_weights(undisturbed / 'last.pth.tar', tmp_path / 'run' / 'last.pth.tar')
    assert_same_summary(undisturbed, tmp_path / 'run')


def test_a_signal_to_one_process_without_launcher_and_a_second_one(data, tmp_path):
    with Process(command(data, tmp_path)) as process:
        process.wait_for('run/recovery-*', tmp_path)
        process.process.send_signal(signal.SIGTERM)
        status, _, errors = process.end()
    assert status == 75 and 'stopped at step' in errors
    with Process(command(data, tmp_path / 'b', '--checkpoint-steps', '1')) as process:
        process.wait_for('run/recovery-*', tmp_path / 'b')
        # A step may be over between the two; a process that does nothing else sends them at once.
        os.kill(process.process.pid, signal.SIGSTOP)
        process.process.send_signal(signal.SIGTERM)
        process.process.send_signal(signal.SIGINT)
        os.kill(process.process.pid, signal.SIGCONT)
        status, _, errors = process.end()
    assert status in (-signal.SIGTERM, -signal.SIGINT), (status, errors)
    assert newest_checkpoint(tmp_path / 'b' / 'run')[0] is not None


def test_a_signal_to_all_processes_at_once_and_a_reader_that_has_gone(data, tmp_path):
    """As systemd tells a unit to stop; and `train ... 2>&1 | tee`, whose tee gets Ctrl-C too."""
    with Process(command(data, tmp_path, ranks=2)) as process:
        process.wait_for('run/recovery-*', tmp_path)
        for stream in (process.process.stdout, process.process.stderr):
            os.close(os.dup(stream.fileno()))
            stream.close()
        for each in (*process.trainers(), process.process):
            each.send_signal(signal.SIGTERM)
        assert process.process.wait(240) == 75
    assert newest_checkpoint(tmp_path / 'run')[0].name.startswith('recovery-')


def test_torchrun_restarts_a_run_from_where_it_was(data, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / 'old')  # of a launch before: no run of this one's
    words = command(data, tmp_path, ranks=2)
    words[words.index('--experiment'):words.index('--experiment') + 2] = []
    words[3:3] = ['--max-restarts', '1']
    with Process(words) as process:
        process.wait_for('*-test_resnet-32/recovery-*', tmp_path)
        random.choice(process.trainers()).kill()
        status, out, errors = process.end()
    assert status == 0, errors
    assert 'goes on from here' in out
    folder, = tmp_path.glob('*-test_resnet-32')
    assert_same_weights(undisturbed / 'last.pth.tar', folder / 'last.pth.tar')
    assert_same_summary(undisturbed, folder)


def test_on_another_number_of_ranks_it_says_what_differs(data, tmp_path, undisturbed):
    with Process(command(data, tmp_path, ranks=2)) as process:
        process.wait_for('run/recovery-*', tmp_path)
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == 75
    state = read_checkpoint(newest_checkpoint(tmp_path / 'run')[0]).state
    with Process(command(data, tmp_path, '--resume', 'auto')) as process:
        status, out, errors = process.end()
    assert status == 0, errors
    assert 'goes on with other batches, so not to the same result (processes: 2 before, 1 now; images a step: 4 ' in out
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv')
    assert summary['epoch'].tolist() == [0, 1] and summary['train_loss'].notna().all()
    assert state['within']['step'] % 1 == 0 and len(state['within']['ranks']) == 2


def test_a_process_that_dies_takes_the_others_down_and_is_named(data, tmp_path):
    with Process(command(data, tmp_path, ranks=2)) as process:
        process.wait_for('run/recovery-*', tmp_path)
        others = [each for trainer in process.trainers() for each in (trainer, *trainer.children(recursive=True))]
        process.trainers()[1].kill()
        started = time.monotonic()
        status, _, errors = process.end()
        assert time.monotonic() - started < 60
    assert status == 128 + signal.SIGKILL
    assert errors == 'launch: process 1 was ended by signal 9, perhaps for want of memory\n'
    psutil.wait_procs(others, timeout=20)
    assert not [each for each in others if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize('ranks', [0, 2])
def test_a_loader_process_that_dies_is_named(data, tmp_path, ranks):
    with Process(command(data, tmp_path, ranks=ranks)) as process:
        process.wait_for('run/recovery-*', tmp_path)
        trainer = process.trainers()[1] if ranks else psutil.Process(process.process.pid)
        worker, = (each for each in trainer.children() if 'resource_tracker' not in ' '.join(each.cmdline()))
        worker.kill()
        status, _, errors = process.end()
    assert status == 1
    assert f'error: DataLoader worker (pid {worker.pid}) is killed by signal: Killed' in errors
    assert 'lower -j or -b' in errors and 'Traceback' not in errors and errors.count('\n') == 1


def test_a_full_disk_leaves_the_old_file(data_dir, tmp_path):
    """A limit on the size of files stands for the disk: checkpoints are too large for it, summary.csv is not."""
    folder = train_run(data_dir, tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limited = ('import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
               'resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); '
               'from timm_multilabel.cli import train; from timm_multilabel.cli.main import run_command; '
               'run_command(train, "train.py", sys.argv[1:])')
    done = subprocess.run([
        sys.executable, '-c', limited, str(data_dir), *TINY, '--epochs', '2', '--output', str(tmp_path),
        '--experiment', 'run', '--resume', 'auto'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f'train.py: error: {folder}/') and done.stderr.count('\n') == 1
    assert 'cannot be written (File too large), and what was there before is left as it is' in done.stderr
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after['last.pth.tar'] == before['last.pth.tar'] and not [name for name in after if name.endswith('.tmp')]
    train_run(data_dir, tmp_path, '--resume', 'auto')
    whole = train_run(data_dir, tmp_path / 'whole')
    assert_same_weights(whole / 'last.pth.tar', folder / 'last.pth.tar')
    assert_same_summary(whole, folder)


# Numbers that are none


def poisoned(monkeypatch, poison):
    """Let `poison(loss, call)` change the loss of each backward pass."""
    backward, calls = updater.Updater.backward, []

    def changed(self, loss, *args, **kwargs):
        calls.append(0)
        return backward(self, poison(loss, len(calls)), *args, **kwargs)

    monkeypatch.setattr(updater.Updater, 'backward', changed)
    return calls


@pytest.mark.parametrize('poison', [
    lambda loss, call: loss * float('nan') if call == 2 else loss,  # loss and gradient
    lambda loss, call: loss + (0 * loss).sqrt() if call == 2 else loss,  # its gradient alone
])
def test_an_update_that_is_no_number_is_skipped(data_dir, tmp_path, monkeypatch, capsys, poison):
    calls = poisoned(monkeypatch, poison)
    folder = train_run(data_dir, tmp_path, '-wls', '0', '--drop', '0', '--opt', 'momentum', epochs=2)
    assert len(calls) == 6
    assert 'skipped 1 update whose loss or gradient is no finite number' in capsys.readouterr().out
    assert pd.read_csv(folder / 'summary.csv')['train_loss'].notna().all()
    for value in torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict'].values():
        assert value.isfinite().all()


def test_too_many_stop_the_run_and_name_the_rows(data_dir, tmp_path, monkeypatch, capsys):
    train_run(data_dir, tmp_path / 'good', epochs=1)
    poisoned(monkeypatch, lambda loss, call: loss * float('inf') if call > 3 else loss)
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path / 'bad', epochs=30)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert 'the loss is no finite number, update after update, last at step 3 of epoch 2' in error
    assert '--lr' in error and error.count('train.csv row ') == 4
    folder = tmp_path / 'bad' / 'run'
    assert_same_weights(tmp_path / 'good' / 'run' / 'last.pth.tar', folder / 'last.pth.tar')
    assert len(pd.read_csv(folder / 'summary.csv')) == 1
