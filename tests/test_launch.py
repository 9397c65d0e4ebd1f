"""Commands in several processes as the launcher has them, and the jobs of examples/launch with what a cluster sets."""
import json
import os
import socket
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml
from common import run_ranks, train_run, write_data
from PIL import Image
from processes import ROOT

from timm_multilabel.cli.main import run_command

LAUNCH = ROOT / 'examples' / 'launch'


def run_on_rank(rank, command, words, folder):
    with open(folder / f'log-{rank}', 'w') as file, redirect_stdout(file), redirect_stderr(file):
        try:
            run_command(command, command, list(map(str, words)))
        except SystemExit as stop:
            return stop.code
    return 0


def test_check_in_two_processes_is_that_of_one(tmp_path):
    data = write_data(tmp_path / 'data')
    (data / 'images' / '4.png').write_bytes(b'no image')
    (data / 'images' / '9.png').write_bytes(b'nor this')
    Image.new('RGB', (9, 7)).save(data / 'images' / '13.png')
    one, two = tmp_path / 'one.json', tmp_path / 'two.json'
    assert run_on_rank(0, 'check', [data, '--json', one], tmp_path) == 1
    expected = (tmp_path / 'log-0').read_text()
    assert '18 image files' in expected and '4.png' in expected
    assert run_ranks(run_on_rank, 2, 'check', [data, '--json', two], tmp_path, join=False) == [1, 0]
    assert json.loads(two.read_text()) == json.loads(one.read_text())
    assert (tmp_path / 'log-0').read_text() == expected and not (tmp_path / 'log-1').read_text()


def programs(folder, **texts):
    """Programs of a cluster, as bash; the environment that finds them first."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(f'#!/bin/bash\n{text}\n')
        (folder / name).chmod(0o755)
    return {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}'}


def bash(text, cwd, environment):
    return subprocess.run(['bash', '-euc', text], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


SAYS = 'echo "$NNODES $NODE_RANK $MASTER_ADDR:$MASTER_PORT $*"'


def test_skypilot(tmp_path):
    job = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    assert job['num_nodes'] == 2 and job['resources'] == {'accelerators': 'A100:8'}
    environment = programs(tmp_path / 'bin', **{'distributed_run.sh': SAYS}) | {
        'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1', 'SKYPILOT_NODE_IPS': '10.0.0.4\n10.0.0.5',
        'SKYPILOT_NUM_GPUS_PER_NODE': '8'}
    done = bash(job['run'], tmp_path / 'bin', environment)
    assert done.stdout == ('2 1 10.0.0.4:29500 8 embed /shared/model_best.pth.tar /shared/photos --out '
                           '/shared/embeddings/ -j 7\n'), done.stderr


def test_kubernetes(tmp_path):
    job = yaml.safe_load((LAUNCH / 'pytorchjob.yaml').read_text())
    assert (job['apiVersion'], job['kind']) == ('kubeflow.org/v1', 'PyTorchJob')
    replicas = job['spec']['pytorchReplicaSpecs']
    assert sorted(replicas) == ['Master', 'Worker'] and sum(each['replicas'] for each in replicas.values()) == 2
    for rank, name in enumerate(('Master', 'Worker')):
        container, = replicas[name]['template']['spec']['containers']
        assert container['name'] == 'pytorch' and container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
        program, flag, text = container['command']
        assert (program, flag) == ('bash', '-c')
        environment = programs(tmp_path / name, **{'distributed_run.sh': SAYS}) | {
            'WORLD_SIZE': '2', 'RANK': str(rank), 'MASTER_ADDR': 'embed-master-0', 'MASTER_PORT': '23456'}
        done = bash(text, tmp_path / name, environment)
        assert done.stdout == (f'2 {rank} embed-master-0:23456 8 embed /shared/model_best.pth.tar /shared/photos --out '
                               '/shared/embeddings/ -j 7\n'), done.stderr


@pytest.mark.slow
def test_slurm_on_two_machines_that_are_one(tmp_path):
    """The real script and launchers: srun starts one on each machine, with a process each."""
    assert subprocess.run(['bash', '-n', LAUNCH / 'slurm.sh']).returncode == 0
    data = write_data(tmp_path / 'data', train=6, val=3)
    checkpoint = train_run(data, tmp_path / 'out', epochs=1) / 'last.pth.tar'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = programs(
        tmp_path / 'bin', scontrol='test "$*" = "show hostnames nodes[0-1]" && printf "localhost\\nlocalhost\\n"',
        srun='test "$1" = --kill-on-bad-exit=1 && shift; for id in 0 1; do SLURM_PROCID=$id SLURM_NODEID=$id '
             'SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" & done; wait -n && wait -n') | {
        'SLURM_JOB_NODELIST': 'nodes[0-1]', 'SLURM_NNODES': '2', 'SLURM_JOB_ID': '7', 'SLURM_GPUS_ON_NODE': '1',
        'PORT': str(port), 'CHECKPOINT': str(checkpoint), 'PHOTOS': str(data / 'images'),
        'OUT': f'{tmp_path}/embeddings/', 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    done = bash(f'bash {LAUNCH}/slurm.sh', ROOT, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('features of 9 images') == 1
    one = ['embed', checkpoint, data / 'images', '--out', f'{tmp_path}/one/', '-j', '0', '--device', 'cpu']
    assert run_on_rank(0, one[0], one[1:], tmp_path) == 0
    for path in (tmp_path / 'one').iterdir():
        assert path.read_bytes() == (tmp_path / 'embeddings' / path.name).read_bytes(), path.name


def test_a_command_must_be_named():
    for words in ([], ['2'], ['predict'], ['2', '--out']):
        done = subprocess.run([ROOT / 'distributed_run.sh', *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith('usage:')
