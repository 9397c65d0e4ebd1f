"""Files are whole or not there, whoever else writes beside; and what the system forbids is one line."""
import errno
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from common import SPACE, run_ranks
from test_cache import VIEWS, _open_in_a_rank, batch, files, opened, photos_dir  # noqa: F401

from timm_multilabel.arrays import write_arrays
from timm_multilabel.assembly.jobs import Job, Jobs
from timm_multilabel.errors import UserError
from timm_multilabel.files import atomic_write, link_whole, write_atomic
from timm_multilabel.loading import shared
from timm_multilabel.loading.cache import CachedPhotos
from timm_multilabel.temporary import remove_leftovers, temporary_file
from timm_multilabel.training.run_folder import RunFolder

# Temporary names


def write_many(path, letter, start):
    """What two machines do that share a folder and a process id."""
    with patch('os.getpid', lambda: 7):
        start.wait()
        for _ in range(40):
            with atomic_write(path) as file:
                for _ in range(20):
                    file.write(letter * 5000)


def test_two_machines_with_one_process_id_never_mix_their_bytes(tmp_path):
    context = multiprocessing.get_context('fork')
    start = context.Barrier(2)
    writers = [context.Process(target=write_many, args=(tmp_path / 'x', letter, start)) for letter in (b'a', b'b')]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / 'x').exists():
            assert (tmp_path / 'x').read_bytes() in (b'a' * 100_000, b'b' * 100_000)
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == ['x']


def test_a_planted_link_is_not_followed(tmp_path):
    secret = tmp_path / 'secret'
    secret.write_text('kept')
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / f'.x.{os.getpid()}.tmp').symlink_to(secret)  # the name that it once had
    (folder / 'x').symlink_to(secret)
    write_atomic(folder / 'x', 'new')
    assert secret.read_text() == 'kept' and (folder / 'x').read_text() == 'new' and not (folder / 'x').is_symlink()
    (folder / 'y').symlink_to(secret)
    link_whole(folder / 'x', folder / 'y')
    assert secret.read_text() == 'kept' and os.path.samefile(folder / 'x', folder / 'y')


@pytest.mark.parametrize('name', ['x' * 255, '\u00e9' * 127, 'a\udcff' * 100, '[*]?'])
def test_names_as_long_as_names_can_be(tmp_path, name):
    for _ in range(2):
        write_atomic(tmp_path / name, 'new')
    link_whole(tmp_path / name, tmp_path / 'other')
    assert sorted(os.listdir(tmp_path)) == sorted([name, 'other'])


def test_permissions_are_those_of_any_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / 'x', 'new')
        write_arrays(tmp_path / 'y', {'x': np.zeros(1)}, read_only=True)
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in 'xy'] == [0o640, 0o440]
        os.chmod(tmp_path / 'x', 0o604)
        write_atomic(tmp_path / 'x', 'newer')
        assert stat.S_IMODE((tmp_path / 'x').stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'null').symlink_to('/dev/null')
    for path in (tmp_path / 'pipe', tmp_path / 'null', tmp_path):
        with pytest.raises(UserError, match='cannot be written: it is a folder, a device or a pipe'):
            write_atomic(path, 'x')
    assert (tmp_path / 'null').is_symlink()


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    write_atomic(tmp_path / 'x', 'old')
    (tmp_path / 'x').chmod(0o600)  # which is not what a new file gets
    for name in ('fchmod', 'fsync', 'replace', 'link'):
        with patch(f'os.{name}', side_effect=OSError(errno.EDQUOT, 'Quota')):
            if name == 'link':
                link_whole(tmp_path / 'x', tmp_path / 'z')  # a copy
            else:
                with pytest.raises(UserError, match=r'x: cannot be written \(Quota\)'):
                    write_atomic(tmp_path / 'x', 'new')
    assert sorted(os.listdir(tmp_path)) == ['x', 'z'] and (tmp_path / 'z').read_text() == 'old'
    with pytest.raises(UserError, match='cannot be written'):
        write_atomic(tmp_path / 'none' / 'x', 'new')
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / 'x'):
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path)) == ['x', 'z']


def test_leftovers_go_and_files_that_are_being_written_stay(tmp_path):
    secret = tmp_path / 'secret'
    secret.write_text('kept')
    run = tmp_path / 'run'
    (run / '1-first').mkdir(parents=True)
    for left in (run / f'.x-{"1" * 16}.tmp', run / '1-first' / f'.last.pth.tar-{"0" * 16}.tmp'):
        left.write_text('of a process that was killed')
    (run / '.link.tmp').symlink_to(secret)
    os.mkfifo(run / '.pipe.tmp')
    descriptor, live = temporary_file(run, 'summary.csv')
    RunFolder(run, {}, SPACE)
    assert sorted(os.listdir(run)) == sorted(
        ['.link.tmp', '.pipe.tmp', live.name, '1-first', 'args.yaml', 'label_space.json'])
    assert secret.read_text() == 'kept' and not os.listdir(run / '1-first')
    os.close(descriptor)
    remove_leftovers(run.glob('.*.tmp'))
    assert not live.exists()


def test_where_there_are_no_locks_leftovers_are_old_ones(tmp_path):
    for name, age in (('.old.tmp', 100_000), ('.new.tmp', 0)):
        (tmp_path / name).write_text('x')
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with patch('fcntl.flock', side_effect=OSError(errno.ENOLCK, 'No locks')):
        write_atomic(tmp_path / 'x', 'x')
        remove_leftovers(tmp_path.glob('.*.tmp'))
    assert sorted(os.listdir(tmp_path)) == ['.new.tmp', 'x']


def test_logs_do_not_follow_links(tmp_path):
    (tmp_path / 'job.log').symlink_to(tmp_path / 'secret')
    jobs = Jobs([Job('job', [])], set(), 1, lambda name: tmp_path / f'{name}.log', print, print)
    with pytest.raises(UserError, match='job.log: cannot be opened to add to it'):
        list(jobs.run())
    assert not (tmp_path / 'secret').exists()
    (tmp_path / 'job.log').unlink()
    os.mkfifo(tmp_path / 'job.log')
    with pytest.raises(UserError, match='job.log'):
        list(jobs.run())


# Caches


def test_a_finished_cache_can_be_read_by_others_and_changed_by_nobody(photos_dir):  # noqa: F811
    before = os.umask(0o022)
    try:
        opened(photos_dir, 'disk')
    finally:
        os.umask(before)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (photos_dir / 'cache').iterdir()}
    assert modes == {'.bin': 0o444, '.npz': 0o444}


FAULTS = {
    'no room when it begins': ('os.posix_fallocate', errno.ENOSPC),
    'a quota when it begins': ('os.posix_fallocate', errno.EDQUOT),
    'a limit of file sizes': ('os.posix_fallocate', errno.EFBIG),
    'a folder that cannot be written to': ('timm_multilabel.loading.shared.temporary_file', errno.EACCES),
    'a folder that cannot be made': ('pathlib.Path.mkdir', errno.EROFS),
    'no room when it is written': ('os.fsync', errno.ENOSPC),
    'a name that cannot be given': ('pathlib.Path.replace', errno.EPERM),
    'an index that cannot be written': ('timm_multilabel.files.temporary_file', errno.EDQUOT),
    'a file that cannot be mapped': ('timm_multilabel.loading.shared.SharedBytes.open', errno.ENOMEM),
}


@pytest.mark.parametrize('what', FAULTS)
def test_where_no_cache_can_be_made_a_run_goes_on_without(photos_dir, what):  # noqa: F811
    said, (name, number) = [], FAULTS[what]
    with patch(name, side_effect=OSError(number, os.strerror(number))):
        photos = opened(photos_dir, 'disk', said=said)
    assert photos[3].decode().any() and not isinstance(photos, CachedPhotos)
    assert os.strerror(number) in said[-1] and said[-1].endswith('; goes on without it') and '\n' not in said[-1]
    assert sum('goes on' in line for line in said) == 1
    assert not (photos_dir / 'cache').exists() or not os.listdir(photos_dir / 'cache')
    assert isinstance(opened(photos_dir, 'disk'), CachedPhotos)


@pytest.mark.slow
def test_memory_that_cannot_be_had(photos_dir):  # noqa: F811
    for name in ('os.memfd_create', 'os.ftruncate'):
        said = []
        with patch(name, side_effect=OSError(errno.EFBIG, 'File too large')):
            assert not isinstance(opened(photos_dir, said=said), CachedPhotos)
        assert 'File too large); goes on without it' in said[-1]
        gc.collect()  # the mock has held the frames
        held = [os.path.realpath(path) for path in Path('/proc/self/fd').iterdir()]
        assert not [path for path in held if 'memfd:timm-multilabel' in path]


def _limited(rank, folder, kind, limited):
    """Open a cache where the system limits some ranks."""
    if rank in limited:
        if kind != 'map':
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        else:
            def fails(*args, **kwargs):
                raise OSError(errno.ENOMEM, 'Cannot allocate memory')
            shared.SharedBytes.open = fails
    said = []
    photos = opened(folder, 'ram' if kind == 'map' else kind, said=said)
    result = batch(photos)[0].long().sum().item(), type(photos).__name__, sum('goes on without' in x for x in said)
    torch.distributed.barrier()
    return result


@pytest.mark.slow
@pytest.mark.parametrize('kind, limited', [('disk', [0]), ('ram', [0]), ('map', [1]), ('map', [0])])
def test_no_rank_waits_where_the_system_limits_one(photos_dir, kind, limited):  # noqa: F811
    expected = batch(files(photos_dir))[0].long().sum().item()
    results = run_ranks(_limited, 2, str(photos_dir), kind, limited)
    assert [result[:2] for result in results] == [(expected, 'FilePhotos')] * 2 and results[0][2] == 1


@pytest.mark.slow
def test_machines_of_different_numbers_of_ranks(photos_dir):  # noqa: F811
    folder = photos_dir.parent / 'machines'
    for name in ('one', 'two'):
        shutil.copytree(photos_dir, folder / name)
    expected = batch(files(photos_dir))[0].long().sum().item()
    results = run_ranks(_open_in_a_rank, 3, str(folder), 'disk', ['one', 'one', 'two'], [1e9] * 3)
    assert [result[:2] for result in results] == [(expected, 'CachedPhotos')] * 3


AS_ANOTHER = '''
import encodings.cp437, json, os, sys
sys.path[:0] = {path!r}
from test_cache import opened
opened({folder!r}, 'ram')  # imports what this user might not be allowed to read
os.setgid(12345)
os.setuid(12345)
os.umask(0o022)
for line in sys.stdin:
    said = []
    photos = opened({folder!r}, 'disk', said=said)
    print(json.dumps([type(photos).__name__, int(photos[3].decode().sum()), said]), flush=True)
    del photos
'''


@contextmanager
def another_user(folder):
    """A function that opens the cache as a user without rights: (what it is, the sum of an image, what is said)."""
    program = AS_ANOTHER.format(path=[str(Path(__file__).parent), *sys.path], folder=str(folder))
    with subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd='/') as process:

        def ask():
            print(file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


@pytest.fixture
def shared_dir(photos_dir):  # noqa: F811
    """A data directory that every user may enter, with a cache folder like /tmp."""
    if os.getuid():
        pytest.skip('needs root, to be two users')
    with tempfile.TemporaryDirectory() as name:  # since pytest's own are closed to others
        os.chmod(name, 0o755)
        folder = Path(name) / 'data'
        shutil.copytree(photos_dir, folder)
        (folder / 'cache').mkdir()
        (folder / 'cache').chmod(0o1777)
        yield folder


@pytest.mark.slow
def test_a_cache_of_another_owner(shared_dir):
    expected = int(files(shared_dir)[3].decode().sum())
    opened(shared_dir, 'disk')
    (ours,) = (shared_dir / 'cache').glob('*.bin')
    with another_user(shared_dir) as ask:
        kind, total, said = ask()
        assert (kind, total) == ('CachedPhotos', expected) and said[0].endswith('whole and up to date')
        for path in (shared_dir / 'cache').iterdir():
            path.chmod(0o600)
        kind, total, said = ask()  # it cannot be read or replaced, so this user makes one
        assert (kind, total) == ('CachedPhotos', expected) and 'decodes 12 images' in said[0]
        kind, total, said = ask()
        assert (kind, total) == ('CachedPhotos', expected) and said[0].endswith('whole and up to date')
        assert ours.exists() and len(list((shared_dir / 'cache').iterdir())) == 4
        (shared_dir / 'cache').chmod(0o755)
        for path in (shared_dir / 'cache').glob('*.12345*'):
            path.unlink()
        kind, total, said = ask()
        assert (kind, total) == ('FilePhotos', expected)
        assert 'Permission denied' in said[-1] and said[-1].endswith('; goes on without it')


@pytest.mark.parametrize('name', ['../x.bin', 'train.csv', '/etc/passwd', 'x\0.bin', ''])
def test_an_index_names_no_other_file(photos_dir, name):  # noqa: F811
    cached = opened(photos_dir, 'disk')
    (index,) = (photos_dir / 'cache').glob('*.npz')
    (photos_dir / 'cache' / 'train.csv').write_bytes(bytes(cached.shared.length))
    write_arrays(index, {**vars(cached.contents), 'data': np.array(name)})
    said = []
    assert torch.equal(batch(opened(photos_dir, 'disk', said=said))[0], batch(files(photos_dir))[0])
    assert 'decodes 12 images' in said[0] and (photos_dir / 'cache' / 'train.csv').exists()


def test_a_data_file_that_is_a_link_is_none(photos_dir):  # noqa: F811
    opened(photos_dir, 'disk')
    (path,) = (photos_dir / 'cache').glob('*.bin')
    path.rename(photos_dir / 'elsewhere')
    path.symlink_to(photos_dir / 'elsewhere')
    said = []
    opened(photos_dir, 'disk', said=said)
    assert 'decodes 12 images' in said[0] and (photos_dir / 'elsewhere').exists()


def _fill_for_ever(folder):
    def wait(*args):
        Path(folder, 'filling').touch()
        time.sleep(60)

    with patch.object(CachedPhotos, 'fill', wait):
        opened(folder, 'disk')


def test_a_run_that_is_killed_while_it_fills_a_cache(photos_dir):  # noqa: F811
    process = multiprocessing.get_context('fork').Process(target=_fill_for_ever, args=(str(photos_dir),))
    process.start()
    while not (photos_dir / 'filling').exists():
        time.sleep(0.01)
    (left,) = (photos_dir / 'cache').iterdir()
    assert left.suffix == '.tmp'
    remove_leftovers([left])
    assert left.exists()  # it is being written
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    expected = batch(files(photos_dir))[0]
    assert torch.equal(batch(opened(photos_dir, 'disk'))[0], expected)
    assert sorted(path.suffix for path in (photos_dir / 'cache').iterdir()) == ['.bin', '.npz']


def test_a_cache_of_a_table_of_any_name(photos_dir):  # noqa: F811
    name = 'a[1]*' + 'x' * 240
    (photos_dir / f'{name}.csv').write_bytes((photos_dir / 'train.csv').read_bytes())
    for _ in range(2):
        assert isinstance(opened(photos_dir, 'disk', split=name), CachedPhotos)
    assert len(os.listdir(photos_dir / 'cache')) == 2
