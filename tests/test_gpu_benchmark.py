"""The proof of the GPU side as a dry run, and how stages end that do not go well.

PyTorch is imported where it is used: each process of a stage imports this file.
"""
import importlib
import json
import os
import subprocess
import sys
import time
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
    assert result['cases'] == {'first': {'ms': 1.5}} and 8 <= result['seconds'] < 20
    for pid in map(int, pids.read_text().split()):
        try:
            assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # where nobody asks for its exit status
        except psutil.NoSuchProcess:
            pass


@pytest.mark.slow
def test_a_dry_run(tmp_path, capsys):
    """All stages, as the command runs them; it takes half a minute on two cores."""
    command = [sys.executable, '-m', 'benchmarks.gpu', '--minutes', '5', '--out', str(tmp_path), '--commit', 'abc']
    printed = subprocess.run(command, cwd=main.ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=290).stdout
    made = json.loads((tmp_path / 'gpu.json').read_text())
    assert {path.name for path in tmp_path.iterdir()} == {'gpu.json', 'gpu.log'}
    assert list(made['stages']) == list(main.STAGES)
    log = (tmp_path / 'gpu.log').read_text()
    assert [(name, of['status'], of.get('error')) for name, of in made['stages'].items()] == [
        (name, 'done', None) for name in main.STAGES], log[-3000:]
    assert made['torch'] == metadata.version('torch') and made['commit'] == 'abc' and made['dry_run']
    assert made['argv'][:2] == ['--minutes', '5'] and made['card'] and made['driver'] and made['timm'] and made['date']
    of = {name: stage['cases'] for name, stage in made['stages'].items()}
    assert of['tests']['tests']['passed'] >= 4 and not of['tests']['tests']['failed']
    for dtype, most in (('float32', 1e-5), ('bfloat16', 5e-3)):
        ours = of['nt_xent'][f'128 {dtype}: ours']
        assert ours['ms'] > 0 and ours['error_of_loss'] < 1e-5 and ours['error_of_gradient'] < most
    assert 0 < of['step']['test_resnet']['joint/bare'] < 2
    assert [case.rpartition(': ')[2] for case in of['heads']] == ['3 heads', '40 heads', '200 heads']
    assert len(of['input']) == 3 and len(of['large_batch']) == 6 and len(of['throughput']) == 5
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
