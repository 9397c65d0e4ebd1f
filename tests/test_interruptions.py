"""Training commands that signals, deaths of processes and full disks interrupt, as real processes."""
import os
import random
import re
import shutil
import signal
import time

import pandas as pd
import psutil
import pytest
from common import TINY, assert_same_summary, assert_same_weights, train_ranks, train_run, write_data
from processes import ROOT, Forked

from timm_multilabel.cli.main import run_command
from timm_multilabel.training.checkpoint import newest_checkpoint, read_checkpoint
from timm_multilabel.training.training_progress import TrainingProgress


def words(data, output, *flags):
    """What follows the name of the training command."""
    return [str(data), *TINY, '--epochs', '2', '--output', str(output), '--experiment', 'run',
            '--checkpoint-steps', '5', '-b', '2', '-j', '1', *flags]


def command(data, output, *flags, ranks=0):
    """A training command, under the launcher with so many ranks or by itself, as the words that follow Python's name.
    """
    launcher = ['-m', 'timm_multilabel.cli.launch', '--standalone', '--nproc-per-node', str(ranks)] if ranks else []
    return [*launcher, str(ROOT / 'train.py'), *words(data, output, *flags)]


class Process:
    """A command that runs beside the test; its output goes to files in a folder."""

    def __init__(self, words, folder, **environment):
        self.files = folder / 'output.txt', folder / 'errors.txt'
        self.process = Forked(words, *self.files, **environment)

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
            assert time.monotonic() < deadline and self.process.poll() is None, self.files[1].read_text()
            time.sleep(0.01)

    def trainers(self):
        """The training processes under the launcher."""
        return psutil.Process(self.process.pid).children()

    def end(self):
        """(status, what it printed, its errors)."""
        return self.process.wait(240), *(path.read_text() for path in self.files)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('many') / 'data', train=160, val=8)


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """The run folder of two ranks that nothing happened to."""
    output = tmp_path_factory.mktemp('undisturbed')
    train_ranks(words(data, output))
    return output / 'run'


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_status_75_tells_so(data, tmp_path, undisturbed, number, capsys):
    with Process(command(data, tmp_path, ranks=2), tmp_path, MAX_RESTARTS='2') as process:
        process.wait_for('run/recovery-*', tmp_path)
        process.process.send_signal(number)
        status, _, errors = process.end()
    assert status == 75, errors
    assert f'{number.name}: ends the step and saves' in errors
    assert 'train.py: stopped at step' in errors
    assert f'repeat the command with --resume {tmp_path}/run/recovery-' in errors
    assert 'Traceback' not in errors and errors.count('stopped at step') == 1
    newest, damaged = newest_checkpoint(tmp_path / 'run')
    assert newest.name.startswith('recovery-') and not damaged and newest.name in errors
    if number == signal.SIGINT:
        check_other_number_of_ranks(data, tmp_path / 'run', capsys)
        return
    assert f'{newest}: goes on from here' in train_ranks(words(data, tmp_path, '--resume', 'auto'))
    assert_same_weights(undisturbed / 'last.pth.tar', tmp_path / 'run' / 'last.pth.tar')
    assert_same_summary(undisturbed, tmp_path / 'run')


def check_other_number_of_ranks(data, folder, capsys):
    """On one rank the run of two goes on to another result, and says what differs."""
    newest = newest_checkpoint(folder)[0]
    state = read_checkpoint(newest).state
    epoch, within = state['epoch'], state['within']
    assert newest.name == f'recovery-{epoch}-{within["step"]}.pth.tar'
    assert 5 <= within['step'] <= within['steps'] == 40 and len(within['ranks']) == 2
    place = TrainingProgress.of(state, 80)  # as many images are done in an epoch of 80 steps
    assert (place.epoch, place.step) == (epoch, 2 * within['step'])
    capsys.readouterr()
    run_command('train', 'train.py', words(data, folder.parent, '--resume', 'auto'))
    out = capsys.readouterr().out
    assert 'goes on with other batches, so not to the same result (processes: 2 before, 1 now; images a step: 4 ' in out
    summary = pd.read_csv(folder / 'summary.csv')
    assert summary['epoch'].tolist() == [0, 1] and summary['train_loss'].notna().all()
    assert (f'Epoch {epoch + 1}/2  step 50/80' in out) == (2 * within['step'] < 50)


@pytest.mark.slow
def test_a_signal_to_one_process_without_launcher_and_a_second_one(data, tmp_path):
    with Process(command(data, tmp_path), tmp_path) as process:
        process.wait_for('run/recovery-*', tmp_path)
        process.process.send_signal(signal.SIGTERM)
        status, _, errors = process.end()
    assert status == 75 and 'stopped at step' in errors
    with Process(command(data, tmp_path / 'b', '--checkpoint-steps', '1'), tmp_path) as process:
        process.wait_for('run/recovery-*', tmp_path / 'b')
        # A step may be over between the two; a process that does nothing else sends them at once.
        os.kill(process.process.pid, signal.SIGSTOP)
        process.process.send_signal(signal.SIGTERM)
        process.process.send_signal(signal.SIGINT)
        os.kill(process.process.pid, signal.SIGCONT)
        status, _, errors = process.end()
    assert status in (-signal.SIGTERM, -signal.SIGINT), (status, errors)
    assert newest_checkpoint(tmp_path / 'b' / 'run')[0] is not None


@pytest.mark.slow
def test_a_signal_to_all_processes_at_once_and_a_reader_that_has_gone(data, tmp_path):
    """As systemd tells a unit to stop; and `train ... 2>&1 | tee`, whose tee gets Ctrl-C too."""
    for name in ('output.txt', 'errors.txt'):
        os.mkfifo(tmp_path / name)
    readers = [os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK) for name in ('output.txt', 'errors.txt')]
    with Process(command(data, tmp_path, ranks=2), tmp_path) as process:
        process.wait_for('run/recovery-*', tmp_path)
        for reader in readers:
            os.close(reader)
        for each in (*process.trainers(), process.process):
            each.send_signal(signal.SIGTERM)
        assert process.process.wait(240) == 75
    assert newest_checkpoint(tmp_path / 'run')[0].name.startswith('recovery-')


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_where_it_was(data, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / 'old')  # of a launch before: no run of this one's
    restarted = command(data, tmp_path, ranks=2)
    restarted[restarted.index('--experiment'):restarted.index('--experiment') + 2] = []
    restarted[2:2] = ['--max-restarts', '1']
    with Process(restarted, tmp_path) as process:
        process.wait_for('*-test_resnet-32/recovery-*', tmp_path)
        random.choice(process.trainers()).kill()
        status, out, errors = process.end()
    assert status == 0, errors
    assert 'goes on from here' in out
    folder, = tmp_path.glob('*-test_resnet-32')
    assert_same_weights(undisturbed / 'last.pth.tar', folder / 'last.pth.tar')
    assert_same_summary(undisturbed, folder)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_is_named(data, tmp_path):
    with Process(command(data, tmp_path, ranks=2), tmp_path) as process:
        process.wait_for('run/recovery-*', tmp_path)
        others = [each for trainer in process.trainers() for each in (trainer, *trainer.children(recursive=True))]
        process.trainers()[1].kill()
        started = time.monotonic()
        status, _, errors = process.end()
        assert time.monotonic() - started < 120
    assert status == 128 + signal.SIGKILL
    assert errors == 'launch: process 1 was ended by signal 9, perhaps for want of memory\n'
    psutil.wait_procs(others, timeout=120)
    assert not [each for each in others if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [0, 2])
def test_a_loader_process_that_dies_is_named(data, tmp_path, ranks):
    with Process(command(data, tmp_path, ranks=ranks), tmp_path) as process:
        process.wait_for('run/recovery-*', tmp_path)
        trainer = process.trainers()[1] if ranks else psutil.Process(process.process.pid)
        # The last one is that of the training; that of the evaluation was started before.
        worker = max((each for each in trainer.children() if 'resource_tracker' not in ' '.join(each.cmdline())),
                     key=psutil.Process.create_time)
        worker.kill()
        status, _, errors = process.end()
    assert status == 1
    # torch notices by the signal, by a wait that lasts, or by a connection that is gone.
    assert re.search(rf'error: DataLoader worker \(pid(\(s\))? {worker.pid}\) ', errors)
    assert 'lower -j or -b' in errors and 'Traceback' not in errors and errors.count('\n') == 1


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(data_dir, tmp_path):
    """A limit on the size of files stands for the disk: checkpoints are too large for it, summary.csv is not."""
    folder = train_run(data_dir, tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limited = ('import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
               'resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); '
               'from timm_multilabel.cli.main import run_command; '
               'run_command("train", "train.py", sys.argv[1:])')
    with Process(['-c', limited, str(data_dir), *TINY, '--epochs', '2', '--output', str(tmp_path), '--experiment',
                  'run', '--resume', 'auto'], tmp_path) as process:
        status, _, errors = process.end()
    assert status == 2, errors
    assert errors.startswith(f'train.py: error: {folder}/') and errors.count('\n') == 1
    assert 'cannot be written (File too large), and what was there before is left as it is' in errors
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after['last.pth.tar'] == before['last.pth.tar'] and not [name for name in after if name.endswith('.tmp')]
    train_run(data_dir, tmp_path, '--resume', 'auto')
    whole = train_run(data_dir, tmp_path / 'whole')
    assert_same_weights(whole / 'last.pth.tar', folder / 'last.pth.tar')
    assert_same_summary(whole, folder)
