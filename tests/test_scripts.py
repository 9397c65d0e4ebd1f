"""The two commands that users of the fork have in their shell history, through the real scripts."""
import csv
import json
import os
import shutil
import subprocess

import pandas as pd
import pytest
from processes import ROOT, Forked

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.sample import write_sample

TRAIN = (
    './distributed_train.sh 1 ./fashion-product-images/ --model efficientnet_b0 -b 32 --sched cosine --epochs 100 '
    '--decay-epochs 2.4 --decay-rate .97 --opt adamp --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 '
    '--drop 0.3 --drop-connect 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel '
    '--reprob 0.2 --amp --lr .016 --pretrained -wls 0.1 -wlc 0.9'
)
VALIDATE = (
    'python validate.py ./fashion-product-images/ --model efficientnet_b0 --checkpoint '
    './output/train/YOUR_SPECIFIC_FOLDER/model_best.pth.tar -b 32'
)


@pytest.fixture
def root(tmp_path):
    """A copy of what the root holds, with sample data as the photos, named as the fork's CSVs name them."""
    for name in ('train.py', 'validate.py', 'distributed_run.sh', 'distributed_train.sh'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'timm_multilabel').symlink_to(ROOT / 'timm_multilabel')
    data = tmp_path / 'fashion-product-images'
    write_sample(data, train=64, val=16, test=8, unlabelled=0, size=32)
    for split in ('train', 'val', 'test'):
        table = pd.read_csv(data / f'{split}.csv', dtype=str, keep_default_na=False)
        table['image_path'] = './fashion-product-images/' + table['image_path']
        table.to_csv(data / f'{split}.csv', index=False, quoting=csv.QUOTE_MINIMAL)
    return tmp_path


def shell(command, cwd, **environment):
    return subprocess.run(
        command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**os.environ, **environment})


def launch(words, cwd):
    """What the launcher does with a script and its flags in two processes, as distributed_train.sh starts it."""
    out, errors = cwd / 'output.txt', cwd / 'errors.txt'
    for path in (out, errors):
        path.write_bytes(b'')
    status = Forked(['-m', 'timm_multilabel.cli.launch', '--standalone', '--nproc-per-node', '2', *words.split()],
                    out, errors, cwd).wait(600)
    return subprocess.CompletedProcess(words, status, out.read_text(), errors.read_text())


def shortened(command):
    """The command with a tiny model and fewer epochs, and without the weights that cannot be downloaded here."""
    shorter = command.replace('efficientnet_b0', 'test_efficientnet').replace('--pretrained ', '')
    return shorter + ' --epochs 2 --cooldown-epochs 0 --img-size 32'


@pytest.mark.slow
def test_the_two_commands(root):
    done = shell(shortened(TRAIN), root)
    assert done.returncode == 0, done.stderr
    assert 'Epoch 2/2' in done.stdout and 'eval_ema' in done.stdout
    assert 'Traceback' not in done.stderr
    folder, = (root / 'output' / 'train').iterdir()
    assert folder.name.endswith('-test_efficientnet-32')
    assert len(pd.read_csv(folder / 'summary.csv')) == 2

    command = VALIDATE.replace('efficientnet_b0', 'test_efficientnet').replace('YOUR_SPECIFIC_FOLDER', folder.name)
    done = shell(command + ' --results-file results.json', root)
    assert done.returncode == 0, done.stderr
    assert 'weighted mean' in done.stdout and 'weights, the better ones of this checkpoint' in done.stdout
    results = json.loads((root / 'results.json').read_text())
    assert results['heads'].keys() == {'color', 'shape', 'texture'} and results['heads']['color']['labels'] == 16


@pytest.mark.slow
def test_two_processes_train_and_only_the_first_speaks(root, monkeypatch):
    done = shell(shortened(TRAIN).replace('sh 1', 'sh 2').replace('-b 32', '-b 16') + ' --epochs 1', root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Epoch 1/1  loss') == 1 and '2 x cpu, 2 steps an epoch' in done.stdout
    folder, = (root / 'output' / 'train').iterdir()
    summary = pd.read_csv(folder / 'summary.csv')
    assert len(summary) == 1 and summary['eval_top1'].notna().all()
    flags = f'--checkpoint {folder}/last.pth.tar -j 1 --weights plain --results-file {root}/'
    monkeypatch.chdir(root)
    run_command('validate', 'validate.py', f'fashion-product-images {flags}1.json'.split())
    done = launch(f'validate.py fashion-product-images {flags}2.json', root)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((root / f'{ranks}.json').read_text()) for ranks in (1, 2))
    assert one['heads']['color']['labels'] == two['heads']['color']['labels'] == 16
    assert one['mean'] == pytest.approx(two['mean'])
    assert two['mean']['top1'] == pytest.approx(summary['eval_top1'][0])


@pytest.mark.slow
def test_two_processes_run_phases_with_a_pool_and_resume(root):
    """Three images of train.csv have no label; with pool.csv they make eleven, of which each rank has a share."""
    data = root / 'fashion-product-images'
    table = pd.read_csv(data / 'train.csv', dtype=str, keep_default_na=False)
    table.iloc[40:48][['image_path']].to_csv(data / 'pool.csv', index=False)
    table = table.drop(range(40, 48))
    table.iloc[:3, 1:] = ''
    table.to_csv(data / 'train.csv', index=False)
    (root / 'recipe.yaml').write_text("""
model: test_efficientnet
img_size: 32
workers: 1
warmup_epochs: 0
cooldown_epochs: 0
unlabelled: pool
phases:
- {name: pretrain, wlc: 0, batch_size: 8, epochs: 1}
- {name: joint, batch_size: 4, unlabelled_batch_size: 5, epochs: 2, model_ema: true, entropy_weight: 0.1,
   marginal_entropy_weight: 0.1, pseudo_label_weight: 0.5, pseudo_label_threshold: 0.2,
   head: {shape: {loss: arcface, input: projection}}}
""")
    command = 'train.py fashion-product-images -c recipe.yaml --experiment'
    done = launch(f'{command} run', root)
    assert done.returncode == 0, done.stderr
    assert '53 images to train on and 11 without labels' in done.stdout
    folder = root / 'output' / 'train' / 'run'
    summary = pd.read_csv(folder / 'summary.csv')
    assert summary['phase'].tolist() == ['pretrain', 'joint', 'joint']
    for term in ('simclr', 'classification', 'entropy', 'marginal_entropy', 'pseudo_label'):
        assert summary[f'{term}_loss'][1:].notna().all(), term
    assert summary['train/color/pseudo_labelled'][1:].between(0, 100).all()

    again = root / 'output' / 'train' / 'again'
    shutil.copytree(folder, again)
    (again / 'checkpoint-0.pth.tar').replace(again / 'last.pth.tar')
    done = launch(f'{command} again --resume {again}/last.pth.tar', root)
    assert done.returncode == 0, done.stderr
    resumed = pd.read_csv(again / 'summary.csv')
    pd.testing.assert_frame_equal(
        resumed.drop(columns='images_per_second'), summary.drop(columns='images_per_second'))


@pytest.mark.slow
def test_bad_input_through_torchrun_is_one_line_and_status_2(root):
    done = shell('./distributed_train.sh 2 nowhere --model test_efficientnet', root)
    assert done.returncode == 2
    assert done.stderr.startswith('timm-multilabel train: error: nowhere: no such data directory')
    assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_bad_image_on_one_of_two_ranks_is_one_line_and_status_2(root):
    image = pd.read_csv(root / 'fashion-product-images' / 'train.csv')['image_path'][5]
    (root / image).write_bytes(b'nothing')
    words = shortened(TRAIN).replace('-b 32', '-b 16').replace('-j 8', '-j 1')
    done = launch(words.replace('./distributed_train.sh 1', 'train.py'), root)
    assert done.returncode == 2
    assert done.stderr.startswith('train.py: error: ') and done.stderr.count('\n') == 1
    assert 'train.csv row 7): cannot be decoded' in done.stderr


def test_script_without_a_number_of_processes(root):
    done = shell('./distributed_train.sh ./fashion-product-images', root)
    assert done.returncode == 2 and done.stderr.startswith('usage:')
