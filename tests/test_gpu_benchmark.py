"""The proof of the GPU side as a dry run, and how stages end that do not go well.

PyTorch is imported where it is used: each process of a stage imports this file.
"""
import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from importlib import metadata

import psutil
import pytest

from benchmarks.gpu.runner import run_stage

main = importlib.import_module('benchmarks.gpu.__main__')  # a module that is also a command


def good(count):
    for number in range(count):
        yield f'case {number % 2}', {'number': number}


def fails():
    yield 'first', {'ms': 1.5}
    raise ValueError('of two\nlines')


def fails_in_part():
    yield 'first', {'ms': 1.5}
    yield 'second', {'error': 'RuntimeError: no'}


def lacks():
    import no_such_library  # noqa: F401
    yield 'never', {}


def ends_at_once():
    yield 'first', {}
    os._exit(9)


def takes_too_long(pids):
    child = subprocess.Popen(['sleep', '60'])
    pids.write_text(f'{os.getpid()} {child.pid}')
    yield 'first', {'ms': 1.5}
    print('compiles', flush=True)
    time.sleep(60)


def stage(tmp_path, function, *args, limit=30.0, method='forkserver'):
    told = []
    result = run_stage(__name__, function.__name__, *args, limit=limit, log=tmp_path / 'log', method=method,
                       told=lambda result: told.append(json.loads(json.dumps(result))))
    return result, told


@pytest.mark.slow
def test_how_stages_end(tmp_path):
    result, told = stage(tmp_path, good, 3)
    assert result['status'] == 'done' and result['cases'] == {'case 0': {'number': 2}, 'case 1': {'number': 1}}
    assert told[0]['status'] == 'running' and told[-1]['cases'] == result['cases'] and 'error' not in result

    result, _ = stage(tmp_path, fails, method='spawn')
    assert (result['status'], result['error'], result['cases']) == (
        'failed', 'exit status 1: lines', {'first': {'ms': 1.5}})
    assert 'ValueError: of two' in (tmp_path / 'log').read_text()
    result, _ = stage(tmp_path, fails_in_part)
    assert (result['status'], result['error']) == ('failed', '1 of 2 cases: second')
    result, _ = stage(tmp_path, lacks)
    assert (result['status'], result['error']) == (
        'lacks a library', "ModuleNotFoundError: No module named 'no_such_library'")
    result, _ = stage(tmp_path, ends_at_once)
    assert (result['status'], result['error'], len(result['cases'])) == ('failed', 'exit status 9: nothing', 1)


@pytest.mark.slow
def test_a_stage_that_runs_out_of_time_tells_what_it_has_and_leaves_no_process(tmp_path):
    pids = tmp_path / 'pids'
    result, _ = stage(tmp_path, takes_too_long, pids, limit=8.0)
    assert (result['status'], result['error']) == ('out of time', 'it printed last: compiles')
    assert result['cases'] == {'first': {'ms': 1.5}} and 8 <= result['seconds'] < 55
    deadline = time.monotonic() + 60  # a process that was killed may take a moment to be gone
    for pid in map(int, pids.read_text().split()):
        while _runs(pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # one where nobody asks for its exit status
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_dry_run(tmp_path, capsys):
    """All stages, as the command runs them; it takes half a minute on two cores."""
    command = [sys.executable, '-m', 'benchmarks.gpu', '--minutes', '10', '--out', str(tmp_path), '--commit', 'abc']
    printed = subprocess.run(command, cwd=main.ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    made = json.loads((tmp_path / 'gpu.json').read_text())
    assert {path.name for path in tmp_path.iterdir()} == {'gpu.json', 'gpu.log'}
    assert list(made['stages']) == list(main.STAGES)
    log = (tmp_path / 'gpu.log').read_text()
    assert [(name, of['status'], of.get('error')) for name, of in made['stages'].items()] == [
        (name, 'done', None) for name in main.STAGES], log[-3000:]
    assert made['torch'] == metadata.version('torch') and made['commit'] == 'abc' and made['dry_run']
    assert made['argv'][:2] == ['--minutes', '10'] and made['card'] and made['driver'] and made['timm'] and made['date']
    of = {name: stage['cases'] for name, stage in made['stages'].items()}
    assert of['tests']['tests']['passed'] >= 4 and not of['tests']['tests']['failed']
    for dtype, most in (('float32', 1e-5), ('bfloat16', 5e-3)):
        ours = of['nt_xent'][f'128 {dtype}: ours']
        assert ours['ms'] > 0 and ours['error_of_loss'] < 1e-5 and ours['error_of_gradient'] < most
    assert of['step']['test_resnet']['joint/bare'] > 0  # how much depends on what else the machine does
    assert [case.rpartition(': ')[2] for case in of['heads']] == ['3 heads', '40 heads', '200 heads']
    assert len(of['input']) == 3 and len(of['large_batch']) == 6 and len(of['throughput']) == 5
    assert of['epoch']['ours']['seconds'] and ('not installed' in of['epoch']['lightly-train'].get('skipped', '')
                                               or of['epoch']['lightly-train']['seconds'])
    assert list(of['fork_table']) == ['labels alone, sample data', 'wls 0.1, projection 64, sample data']
    assert all(set(run) == {'seconds', 'top1', 'color/top1', 'shape/top1', 'texture/top1'} and 0 <= run['top1'] <= 100
               for run in of['fork_table'].values())
    assert printed.endswith(main.table(made) + '\n')

    main.main(['--table', str(tmp_path / 'gpu.json')])
    assert capsys.readouterr().out == main.table(made) + '\n'


def test_a_table():
    stages = {
        'step': {'status': 'done', 'seconds': 80.04, 'limit': 110.0, 'cases': {
            'a': {'joint_ms': 1234.56, 'at': 'x|y'}, 'b': {'skipped': 'out of memory'}}},
        'input': {'status': 'no time left', 'seconds': 0.0, 'limit': 1.0, 'cases': {}}}
    facts = {'card': 'H200', 'driver': '570', 'torch': '2.11', 'timm': '1.0', 'cores': 16, 'commit': 40 * 'c',
             'date': '2026-11-30T07:00:00+00:00', 'dry_run': False}
    assert main.table({**facts, 'stages': stages}).splitlines() == [
        'H200, driver 570, torch 2.11, timm 1.0, 16 cores; 2026-11-30, commit ccccccccc', '',
        '| stage | | seconds | limit |', '| --- | --- | --- | --- |',
        '| step | done | 80 | 110.0 |', '| input | no time left | 0 | 1 |', '',
        '| step | joint ms | at | skipped |', '| --- | --- | --- | --- |',
        '| a | 1,234.6 | x\\|y |  |', '| b |  |  | out of memory |']


def test_the_name_of_a_result():
    assert main.name_of({'card': 'NVIDIA H100 80GB HBM3', 'date': '2026-11-30T07:00:00+00:00'}) == (
        'nvidia-h100-80gb-hbm3-2026-11-30.json')


def test_no_time_is_left(tmp_path, capsys):
    main.main(['--minutes', '0.01', '--out', str(tmp_path), '--only', 'heads', 'nt_xent'])
    made = json.loads((tmp_path / 'gpu.json').read_text())
    assert {name: of['status'] for name, of in made['stages'].items()} == {
        'nt_xent': 'no time left', 'heads': 'no time left'}
    assert 'heads: no time left, 0 s' in capsys.readouterr().out


def test_its_reference_is_the_formula():
    """Against the loss that other tests compare with the paper's, in tiles that do not divide the rows."""
    import torch

    from benchmarks.gpu.stages import TEMPERATURE, reference
    from timm_multilabel.losses import nt_xent_loss
    first, second = (view.requires_grad_() for view in torch.randn(
        2, 11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    loss, gradient = reference(first, second, tile=4)
    expected = nt_xent_loss(first, second, TEMPERATURE)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.cat([first.grad, second.grad]))


def test_it_needs_no_other_library_to_start():
    """So that it can say which is missing."""
    code = 'import sys, benchmarks.gpu.__main__; print({"torch", "numpy", "timm_multilabel"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'


def make_wheel(folder, name, version, *needs):
    """A wheel with a module and a test."""
    package = name.replace('-', '_')
    info = f'{package}-{version}.dist-info'
    with zipfile.ZipFile(folder / f'{package}-{version}-py3-none-any.whl', 'w') as made:
        made.writestr(f'{package}/__init__.py', '')
        made.writestr(f'{package}/tests/test_it.py', '')
        made.writestr(f'{info}/METADATA', '\n'.join(
            ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}',
             *(f'Requires-Dist: {need}' for need in needs)]) + '\n')
        made.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        made.writestr(f'{info}/RECORD', ''.join(
            f'{name},,\n' for name in [*made.namelist(), f'{info}/RECORD']))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for all that it can download."""
    from benchmarks.gpu.wheels import PACKAGES
    folder = tmp_path / 'index'
    folder.mkdir()
    pins = dict(line.strip().split('==') for line in open(main.ROOT / 'constraints.txt') if '==' in line)
    for package in PACKAGES:
        name, _, version = package.partition('==')
        make_wheel(folder, name, version or pins.get(name, '1.0'), *(['numpy', 'six'] if name == 'pandas' else []))
    make_wheel(folder, 'timm', pins['timm'], 'torch')
    make_wheel(folder, 'numpy', '2.0')
    make_wheel(folder, 'six', '1.0')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
    return folder


@pytest.fixture
def photos(tmp_path):
    """A data directory of 8 rows for training and 4 for validation."""
    folder = tmp_path / 'photos'
    (folder / 'images').mkdir(parents=True)
    for number in range(12):
        (folder / f'images/{number}.jpg').write_bytes(bytes([number]) * 1000)
    for split, numbers in (('train', range(8)), ('val', range(8, 12))):
        rows = ''.join(f'images/{number}.jpg,c{number}\n' for number in numbers)
        (folder / f'{split}.csv').write_text('image_path,color\n' + rows)
    return folder


def test_what_a_machine_lacks_is_packed(index, photos, tmp_path, capsys):
    out = tmp_path / 'packed'
    main.main(['--wheels', str(out), '--images', str(photos), '--rows', '4', '--has', 'Huggingface_Hub', 'psutil',
               '--commit', 'abc'])
    printed = capsys.readouterr().out
    made = {path.name.split('-')[0] for path in out.glob('*.whl')}
    assert {'timm', 'pandas', 'six', 'simplejpeg'} <= made
    assert not made & {'numpy', 'torch', 'psutil', 'huggingface_hub'}
    for split, rows in (('train', 4), ('val', 1)):
        header, *lines = (out / f'data/{split}.csv').read_text().splitlines()
        assert header == 'image_path,color' and len(lines) == rows
        for path, color in (line.split(',') for line in lines):
            assert (out / 'data' / path).read_bytes() == bytes([int(color[1:])]) * 1000
    size = sum(path.stat().st_size for path in out.rglob('*') if path.is_file())
    assert f'{size / 1e6:.1f} MB  together' in printed
    assert f'--out gpu-results --commit abc --data {out}/data' in printed

    site = tmp_path / 'site'  # pip reads them
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', str(site),
                    *map(str, out.glob('timm-*.whl'))], check=True)
    assert [path.name for path in (site / 'timm').iterdir() if path.suffix == '.py'] == ['__init__.py']
    assert not (site / 'timm/tests').exists()

    with pytest.raises(SystemExit, match='2'):
        main.main(['--wheels', str(out)])
    assert 'is there already' in capsys.readouterr().err


def test_a_table_of_photos_is_split(photos, tmp_path):
    from benchmarks.gpu.wheels import copy_photos
    copy_photos(photos / 'train.csv', 4, tmp_path / 'made')
    assert [len((tmp_path / f'made/{split}.csv').read_text().splitlines()) for split in ('train', 'val')] == [5, 2]


def test_what_is_too_large_or_cannot_be_had_leaves_nothing(index, photos, tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import wheels
    monkeypatch.setattr(wheels, 'LIMIT', 5_000)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match='2'):
        main.main(['--wheels', str(tmp_path / 'packed'), '--images', str(photos)])
    assert 'more than the 0.0 MB that are allowed' in capsys.readouterr().err
    next(index.glob('pandas-*')).unlink()
    with pytest.raises(SystemExit, match='2'):
        main.main(['--wheels', str(tmp_path / 'packed')])
    assert 'pip download failed: ERROR: ' in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
