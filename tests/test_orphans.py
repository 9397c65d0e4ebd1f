"""Processes whose launcher or whose peer is killed, at every stage of a run; evaluations that are told to stop."""
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from common import TINY, assert_same_summary, assert_same_weights, run_ranks, train_ranks, train_run, write_data
from processes import ROOT, Forked
from test_grid import FLAGS, write_grid

from timm_multilabel.cli.launch import meet_by_files
from timm_multilabel.files import atomic_write
from timm_multilabel.metrics import MultiLabelEvaluator
from timm_multilabel.temporary import remove_leftovers, temporary_folder
from timm_multilabel.training.parent import LAUNCHER
from timm_multilabel.training.update_decisions import ToldToStop, until_told

FLAGS_OF_ALL = [*TINY, '--epochs', '2', '--experiment', 'run', '-b', '2', '--model-ema', '--model-ema-decay', '0.9',
                '--cache', 'disk', '--resume', 'auto']
END = 120
"""Seconds within which all processes must have gone on a loaded machine, whatever they wait for."""

STAGES = '''
import os, sys, time
from pathlib import Path
from timm_multilabel.cli.main import run_command
from timm_multilabel.loading.cache import CachedPhotos
from timm_multilabel.metrics import MultiLabelEvaluator
from timm_multilabel.training import saver
from timm_multilabel.training.optimizer_step import OptimizerStep

def slow(owner, name, after, seconds):
    """Have a function take its time from its nth call on, and tell of that."""
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            Path(f"{os.environ['MARK']}-{os.environ.get('RANK', 0)}").touch()
            time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)

slow(*{
    'cache': (CachedPhotos, 'pixels', 3, 0.2),
    'training': (OptimizerStep, 'begin', 4, 0.3),
    'evaluation': (MultiLabelEvaluator, 'update', 2, 0.5),
    'checkpoint': (saver.torch, 'save', 0, 3),
}[os.environ['STAGE']])
run_command('train', 'train.py', sys.argv[1:])
'''


def start(words, tmp_path, **environment):
    """Start a command in the background; temporary files and its output are in `tmp_path`."""
    (tmp_path / 'tmp').mkdir(exist_ok=True)
    (tmp_path / 'log').write_bytes(b'')
    return Forked(words, tmp_path / 'log', TMPDIR=str(tmp_path / 'tmp'), **environment)


def launched(data, tmp_path, script=ROOT / 'train.py', torchrun='timm_multilabel.cli.launch'):
    """The words of a run of two ranks."""
    return ['-m', torchrun, '--standalone', '--nproc-per-node', '2', str(script), *words(data, tmp_path)]


def words(data, tmp_path):
    """What follows the name of the training command."""
    return [str(data), *FLAGS_OF_ALL, '--output', str(tmp_path), '--cache-dir', str(tmp_path / 'cache')]


def wait_for(paths, process, tmp_path):
    """Wait until there are files."""
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / 'log').read_text()
        time.sleep(0.02)


def killed_at(stage, data, tmp_path, whom, **kwargs):
    """Start a run, and kill some of its processes when all ranks, or the one that saves, are at a stage.

    Args:
        whom: The processes to kill, of [launcher, rank 0, rank 1].

    Returns:
        The launcher's exit status, the addresses that the processes listened on, and what was printed.
    """
    script, mark = tmp_path / 'stages.py', tmp_path / 'mark'
    script.write_text(STAGES)
    for path in tmp_path.glob('mark-*'):
        path.unlink()
    process = start(launched(data, tmp_path, script, **kwargs), tmp_path, STAGE=stage, MARK=str(mark))
    everyone = []
    try:
        ranks = range(1 if stage == 'checkpoint' else 2)
        wait_for([mark.with_name(f'mark-{rank}') for rank in ranks], process, tmp_path)
        launcher = psutil.Process(process.pid)
        # torchrun starts rank 0 first.
        main = [launcher, *sorted(launcher.children(), key=lambda each: (each.create_time(), each.pid))]
        everyone = [launcher, *launcher.children(recursive=True)]
        addresses = {c.laddr.ip for each in everyone for c in each.net_connections('tcp') if c.status == 'LISTEN'}
        for number in whom:
            main[number].kill()
        status = process.wait(END)
        _, left = psutil.wait_procs(everyone, timeout=END)
        assert not left, (left, (tmp_path / 'log').read_text())
    finally:
        for each in everyone:
            if each.is_running():
                each.kill()
    return status, addresses, (tmp_path / 'log').read_text()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('many') / 'data', train=40, val=24)


def newest(tmp_path):
    return sorted(path.name for path in (tmp_path / 'run').glob('recovery-*'))


@pytest.mark.slow
def test_whoever_is_killed_the_others_end_and_the_run_goes_on_to_the_same_result(data, tmp_path):
    """At each stage the launcher (once torchrun itself), a rank, or both; the next start finds the folder free."""
    part = tmp_path / 'part'
    part.mkdir()
    status, _, log = killed_at('cache', data, part, [1])
    assert status == 128 + signal.SIGKILL and 'launch: process 0 was ended by signal 9' in log
    assert 'Traceback' not in log and len(list((part / 'cache').glob('.train-*.tmp'))) == 1
    _, _, log = killed_at('cache', data, part, [0])
    assert 'train.py: stopped before it began' in log and 'Traceback' not in log
    assert not list((part / 'cache').iterdir()) and not (part / 'run').exists()

    _, addresses, log = killed_at('training', data, part, [0])
    assert 'since its launcher is gone: ends the step and saves' in log and 'Traceback' not in log
    assert 'stopped at step' in log and len(newest(part)) == 1
    assert addresses <= {'127.0.0.1', '::1'}
    _, _, log = killed_at('evaluation', data, part, [0, 2])
    assert 'Traceback' not in log
    _, _, log = killed_at('evaluation', data, part, [0])
    assert 'goes on from here' in log and 'stopped at step 10 of Epoch 1/2' in log and 'Traceback' not in log
    assert newest(part)[0] == 'recovery-0-10.pth.tar' and not (part / 'run' / 'summary.csv').exists()
    _, _, log = killed_at('checkpoint', data, part, [0], torchrun='torch.distributed.run')
    assert 'stopped after Epoch 1/2, saved' in log and 'Traceback' not in log
    assert (part / 'run' / 'last.pth.tar').is_file() and newest(part) == []

    folder, process = part / 'run', start(launched(data, part), part)  # which tidies up too
    assert process.wait(240) == 0, (part / 'log').read_text()
    assert f'{folder / "last.pth.tar"}: goes on from here' in (part / 'log').read_text()
    assert not list((part / 'tmp').glob('timm-multilabel-*')) and not list(folder.glob('.*.tmp'))
    train_ranks(words(data, tmp_path / 'whole'))
    whole = tmp_path / 'whole' / 'run'
    assert_same_weights(whole / 'last.pth.tar', folder / 'last.pth.tar')
    assert_same_summary(whole, folder)


@pytest.mark.slow
def test_the_runs_of_a_grid_end_with_it(data, tmp_path):
    folder = write_grid(tmp_path / 'grid', flags={**FLAGS, 'epochs': 500})
    process = start(['-c', 'from timm_multilabel.cli.main import main; main()', 'grid', str(folder), str(data),
                     '--output', str(tmp_path)], tmp_path)
    wait_for([tmp_path / 'simclr-s3' / 'summary.csv'], process, tmp_path)
    runs = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(runs, timeout=END)[1]
    log = (tmp_path / 'simclr-s3.log').read_text()
    assert 'SIGTERM, since its launcher is gone' in log and ', saved' in log


@pytest.mark.slow
def test_a_launcher_that_was_gone_before_and_a_parent_that_is_none(data, tmp_path):
    command = [str(ROOT / 'train.py'), str(data), *FLAGS_OF_ALL, '--output', str(tmp_path)]
    gone = subprocess.Popen(['true'])
    gone.wait()
    process = start(command, tmp_path, **{LAUNCHER: str(gone.pid)})
    assert process.wait(240) == 75 and 'stopped before it began' in (tmp_path / 'log').read_text()
    assert not (tmp_path / 'run').exists()
    # As `nohup ... &` in a shell that ends.
    leave = f'import subprocess, sys; subprocess.Popen([sys.executable, *{command!r}])'
    assert start(['-c', leave], tmp_path).wait(240) == 0
    deadline = time.monotonic() + 240
    while 'epochs done' not in (tmp_path / 'log').read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize('call, flags', [
    (1, ['-wls', '0', '--sched', 'plateau', '--patience-epochs', '1']),
    (3, ['--model-ema', '--model-ema-decay', '0.9', '--opt', 'adamp']),  # two batches each: the first of the EMA
    (6, ['--model-ema', '--grad-accum-steps', '2']),
])
def test_a_signal_stops_an_evaluation_between_two_batches(data_dir, tmp_path, monkeypatch, capsys, call, flags):
    whole = train_run(data_dir, tmp_path / 'whole', *flags)
    calls, update = [], MultiLabelEvaluator.update

    def told(self, *batch):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(MultiLabelEvaluator, 'update', told)
        train_run(data_dir, tmp_path / 'part', *flags)
    epoch = (call - 1) // 4
    assert stop.value.code == 75 and f'stopped at step 3 of Epoch {epoch + 1}/2' in capsys.readouterr().err
    assert len(calls) == call
    part = tmp_path / 'part' / 'run'
    assert [path.name for path in part.glob('recovery-*')] == [f'recovery-{epoch}-3.pth.tar']
    train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto')
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)
    assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}


def batches_until_told(rank, numbers, told):
    """How many batches a rank gets, and whether it stopped; `told`: the batch at which each is told."""
    seen = []
    try:
        for batch in until_told(range(numbers[rank]), lambda: len(seen) > told[rank]):
            seen.append(batch)
        return len(seen), False
    except ToldToStop:
        return len(seen), True


@pytest.mark.slow
@pytest.mark.parametrize('numbers, told, expected', [
    ((100, 99), (500, 500), [(100, False), (99, False)]),
    ((100, 99), (7, 7), [(8, True), (8, True)]),  # at once
    ((100, 99), (500, 7), [(10, True), (8, True)]),  # with the next of 20 votes
    ((100, 3), (50, 500), [(51, True), (3, True)]),  # one that has none left still votes
    ((3, 0), (2, 500), [(3, True), (0, True)]),
    ((0, 0), (-1, -1), [(0, False), (0, False)]),
])
def test_ranks_agree_on_the_end_of_an_evaluation(numbers, told, expected):
    assert run_ranks(batches_until_told, 2, numbers, told) == expected


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    with temporary_folder('x-', tmp_path) as used:
        (used / 'file').touch()
        (tmp_path / 'x-left').mkdir()
        (tmp_path / 'x-left' / 'file').touch()
        with temporary_folder('x-', tmp_path) as second:
            assert set(tmp_path.iterdir()) == {used, second}
        (tmp_path / 'x-link').symlink_to(used)
        remove_leftovers(tmp_path.glob('*'))
        assert {path.name for path in tmp_path.iterdir()} == {used.name, 'x-link'} and (used / 'file').exists()
    (tmp_path / 'x-link').unlink()
    (tmp_path / f'.report [1].html-{"0" * 16}.tmp').touch()
    with atomic_write(tmp_path / 'report [1].html') as first:
        with atomic_write(tmp_path / 'other.html'):
            remove_leftovers(tmp_path.glob('.*.tmp'))
        first.write(b'whole')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        'report [1].html': b'whole', 'other.html': b''}


@pytest.mark.slow
def test_a_folder_for_temporary_files_that_no_url_can_name(tmp_path, capsys):
    for folder in ('a?b', 'a#b'):
        with pytest.raises(SystemExit) as stop:
            meet_by_files(None, tmp_path / folder / 'x')
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f'launch: error: TMPDIR: {tmp_path / folder} has a ? or ')
    folder = 'a?b#c'
    (tmp_path / folder).mkdir()
    done = subprocess.run(
        [sys.executable, '-m', 'timm_multilabel.cli.launch', '--nproc-per-node', '1', 'x.py'], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, 'TMPDIR': str(tmp_path / folder)})
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('launch: error: TMPDIR: ') and 'name another folder' in done.stderr
