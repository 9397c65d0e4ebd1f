"""Command lines: bad input is one line and exit status 2, nothing half-written; flags; YAML files."""
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from common import train_settings
from PIL import Image

from timm_multilabel.assembly.optimization import cooldown_epochs
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.cli.main import run_command
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import UserError

ROOT = Path(__file__).parent.parent


QUICK = ['--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu', '--epochs', '1',
         '--cooldown-epochs', '0']


def fails(capsys, command, argv) -> str:
    """Run a command that must end with one line on standard error and exit status 2; the line."""
    with pytest.raises(SystemExit) as stop:
        run_command(command, f'{command}.py', [str(word) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f'{command}.py: error: ') and error.count('\n') == 1
    return error


def train_line(capsys, data_dir, tmp_path, *flags) -> str:
    """The line of a training that must fail before it writes anything."""
    line = fails(capsys, 'train', [data_dir, *QUICK, '--output', tmp_path / 'out', *flags])
    assert not (tmp_path / 'out').exists()
    return line


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


BAD_FLAGS = [
    (['-wls', '-0.1'], 'argument -wls/--simclr-loss-weight: -0.1 is out of range, expected 0 or more'),
    (['-wlc', 'nan'], "'nan' is not a number"),
    (['-wls', 'inf'], "'inf' is not a number"),
    (['-t', '0'], 'argument -t/--temperature: 0 is out of range, expected more than 1e-30'),
    (['-t', 'warm'], "'warm' is not a number"),
    (['-b', '1'], '-b 1: SimCLR contrasts'),
    (['-b', '2.5'], "'2.5' is not a whole number"),
    (['-wls', '0', '-wlc', '0'], 'nothing to train'),
    (['--mixup', '0.2'], 'pass -wls 0'),
    (['--cutmix', '1', '-wls', '0', '-b', '3'], 'even batch'),
    (['--views', 'simclr', '--aa', 'rand-m9'], "--aa is a policy of timm's views"),
    (['--color-jitter', '0.1', '0.2'], '1, 3 or 4 numbers'),
    (['--aa', 'no-such-policy'], '--aa no-such-policy'),
    (['--heads', 'colour'], r"train.csv: no label column 'colour' (there are: color, shape)"),
    (['--head-weights', 'color=1'], "head 'shape' has no weight"),
    (['--head-weights', 'color=1', 'shape=-1'], "'shape=-1': -1 is out of range"),
    (['--head-weights', 'color=1', 'color=2'], 'a name once'),
    (['--head-weights', 'color'], 'not of the form NAME=NUMBER'),
    (['--image-column', 'file'], "no column 'file' (there are: image_path, color, shape)"),
    (['--model', 'resnet51'], 'has no such model; did you mean'),
    (['--opt', 'adamm'], '--opt adamm'),
    (['--sched', 'cosin'], '--sched cosin'),
    (['--eval-metric', 'top2'], 'no such metric'),
    (['--pretrained-path', 'nowhere.safetensors'], '--pretrained-path nowhere.safetensors: no such file'),
    (['--initial-checkpoint', 'nowhere.pth.tar'], 'nowhere.pth.tar: no such checkpoint'),
    (['--resume', 'nowhere.pth.tar'], 'nowhere.pth.tar: no such checkpoint'),
    (['--device', 'toaster'], '--device toaster'),
    (['--amp', '--amp-dtype', 'float16'], 'needs CUDA'),
    (['--sync-bn'], '--sync-bn needs CUDA'),
    (['--seed', '5000000000'], 'out of range'),
    (['--opt', 'adamw', '--opt-betas', '0.9'], '--opt adamw'),
    (['--opt-kwargs', 'foo'], 'not of the form NAME=VALUE'),
    (['--mean', '0.5', '0.5'], '--mean takes 1 or 3 numbers'),
    (['--std', '0'], 'out of range'),
    (['--interpolation', 'foo'], 'invalid choice'),
    (['--crop-pct', '1e-9'], 'out of range'),
    (['--crop-pct', '10', '--img-size', '8'], 'out of the range'),  # 8 pixels of less than one
    (['--crop-mode', 'pad'], 'invalid choice'),
    (['--torchcompile', 'foo'], '--torchcompile foo'),
    (['--device', 'meta'], '--device meta'),
    (['--model', 'test_vit', '--img-size', '33'], '--model test_vit'),
    (['--model-kwargs', 'in_chans=1'], 'does not take images of 3x32x32'),
    (['--model-kwargs', 'global_pool='], 'no pooled features'),
    (['--color-jitter', '.4', '.4', '.4', '.9'], 'hue'),
    (['--aa', 'rand-m9', '--color-jitter', '.4'], 'pass one of them'),
    (['--aa', 'rand-m9', '--color-jitter-prob', '.4'], 'pass one of them'),
    (['--scale', '1', '0.08'], '--scale 1 0.08: the least comes first'),
    (['--ratio', '2', '1'], '--ratio 2 1: the least comes first'),
    (['--aa', 'rand-m9', '--cache', 'device'], 'the views here are timm'),
    (['-wls', '0', '--cache', 'device'], 'the views here are timm'),
    (['--cache', 'ram', '--cache-dir', 'x'], 'there is no --cache disk'),
    (['--layer-decay', '0.7', '--sched', 'none'], '--sched constant'),
    (['--lora', '0'], 'out of range'),
    (['-wls', '0', '--lora', '4', '--freeze-backbone'], '--lora trains adapters in the backbone'),
    (['--layer-decay', '1e30'], 'out of range'),  # of several layers its power would be infinite
    (['-wlc', '0', '--heads', 'color'], '--heads would change nothing: -wlc 0 trains no heads'),
    (['-b', '13'], '12 rows do not fill a batch of 13'),
    (['-wls', '0', '-b', '3', '--micro-batch', '2'], '--micro-batch 2: test_resnet has batch norm'),
    (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
    (['--batchsize', '4'], '--batchsize 4; did you mean --batch-size?'),
    (['-c', 'nowhere.yaml'], 'nowhere.yaml: cannot be read'),
]


@pytest.mark.parametrize('flags, message', BAD_FLAGS, ids=[' '.join(flags) for flags, _ in BAD_FLAGS])
def test_bad_flags(capsys, data_dir, tmp_path, flags, message):
    assert message in train_line(capsys, data_dir, tmp_path, *flags)


def test_missing_data(capsys, data_dir, tmp_path):
    assert 'nothing-here: no such data directory' in train_line(capsys, tmp_path / 'nothing-here', tmp_path)
    (data_dir / 'val.csv').rename(data_dir / 'v.csv')
    assert 'val.csv: no such file' in train_line(capsys, data_dir, tmp_path)
    (data_dir / 'train.csv').unlink()
    assert 'train.csv: no such file' in train_line(capsys, data_dir, tmp_path)


def test_bad_tables(capsys, data_dir, tmp_path):
    original = (data_dir / 'train.csv').read_text()
    for text, message in [
        (re.sub(',.*', '', original), "no label column beside 'image_path'"),
        (re.sub(',[a-z]*$', ',', original, flags=re.M), 'row 1: column 3 has no name'),
        (re.sub(',(disc|ring)', ',', original), "column 'shape' has no label in any row; leave it out with --heads"),
        ('image_path,color,shape\n', 'the table has no rows'),
        (original + 'images/77.png,red,disc\n', '1 of 13 images are missing on disk: images/77.png (row 14)'),
    ]:
        (data_dir / 'train.csv').write_text(text)
        assert message in train_line(capsys, data_dir, tmp_path)


def test_unknown_labels_in_val(capsys, data_dir, tmp_path):
    replace(data_dir / 'val.csv', 'images/12.png,red', 'images/12.png,pink')
    line = train_line(capsys, data_dir, tmp_path)
    assert "val.csv: labels that training does not know: color 'pink' in 1 row (2)" in line
    assert '--unknown-labels ignore' in line
    run_command('train', 'train.py', [
        str(data_dir), *QUICK, '--output', str(tmp_path / 'out'), '--unknown-labels', 'ignore'])


def test_val_without_labels(capsys, data_dir, tmp_path):
    original = (data_dir / 'val.csv').read_text()
    (data_dir / 'val.csv').write_text(re.sub(',(disc|ring)', ',', original))
    line = train_line(capsys, data_dir, tmp_path, '--eval-metric', 'shape/top1')
    assert "'shape' has no weight, or no labels in" in line
    (data_dir / 'val.csv').write_text(re.sub(r'(\.png),.*', r'\1,,', original))
    assert 'val.csv: no row has a label of a head' in train_line(capsys, data_dir, tmp_path)


def test_head_missing_in_val(capsys, data_dir, tmp_path):
    replace(data_dir / 'val.csv', 'shape', 'form')
    assert "val.csv: no column 'shape', which is a head" in train_line(capsys, data_dir, tmp_path)


@pytest.fixture
def trained(data_dir, tmp_path):
    run_command('train', 'train.py', [str(data_dir), *QUICK, '--output', str(tmp_path), '--experiment', 'run'])
    return tmp_path / 'run' / 'last.pth.tar'


def test_bad_image_met_in_training(capsys, data_dir, tmp_path):
    Path(data_dir / 'images' / '3.png').write_bytes(b'x')
    line = fails(capsys, 'train', [data_dir, *QUICK, '-j', '1', '--output', tmp_path / 'out'])
    assert 'images/3.png (' in line and 'train.csv row 5): cannot be decoded' in line


def test_a_run_is_not_overwritten(capsys, data_dir, trained):
    line = fails(capsys, 'train', [data_dir, *QUICK, '--output', trained.parent.parent, '--experiment', 'run'])
    assert f'{trained.parent}: holds a run already' in line and '--resume' in line


def test_outputs_that_cannot_be_written(capsys, data_dir, tmp_path, trained):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'r.json').mkdir()
    assert 'file' in fails(capsys, 'train', [data_dir, *QUICK, '--output', tmp_path / 'file'])
    for flags in (['--results-file', tmp_path / 'r.json'], ['--results-file', tmp_path / 'file' / 'r.json'],
                  ['--confusion', tmp_path / 'file']):
        fails(capsys, 'validate', [data_dir, '--checkpoint', trained, '-j', '0', '--device', 'cpu', *flags])


BAD_POOLS_AND_HEADS = [
    (['--unlabelled', 'nowhere'], '--unlabelled nowhere: no such CSV, folder, shards or split; looked for'),
    (['--unlabelled', 'empty'], 'empty: no images in this folder'),
    (['--unlabelled', 'train'], 'all of its images are labelled or scored elsewhere'),
    (['--unlabelled-batch-size', '2'], 'every row has a label, so there is no unlabelled image'),
    (['--entropy-weight', '1'], 'every row has a label, so there is no unlabelled image'),
    (['--unlabelled', 'few', '--unlabelled-batch-size', '3'],
     'few.csv: 2 unlabelled images do not fill a batch of 3 on each of 1 processes; lower --unlabelled-batch-size'),
    (['-wlc', '0', '--entropy-weight', '1'], '--entropy-weight would change nothing: -wlc 0 trains no heads'),
    (['--entropy-ramp-up', '3'], '--entropy-ramp-up would change nothing: there is no entropy weight'),
    (['--pseudo-label-threshold', '1.5'], 'out of range'),
    (['--freeze-backbone'], 'pass -wls 0 with it'),
    (['--separator', 'xx'], "'xx' is not one character"),
    (['--head', 'color'], "'color' is not of the form HEAD:NAME=VALUE"),
    (['--head', 'colour:weight=2'], '--head colour: there is no such head (there are: color, shape)'),
    (['--head', 'color:loss=hinge'], 'there is no such loss (there are: softmax, arcface, tags, numeric)'),
    (['--head', 'color:scale=3'], "head 'color': 'softmax' has no option 'scale' (it has: loss, weight, input, "
                                  'columns, views, drop, smoothing, class_weights)'),
    (['--head', 'color:loss=arcface,margin=big'], "--head color:margin=big: could not convert string to float: 'big'"),
    (['--head', 'color:loss=arcface,margin=9'], "head 'color': margin is 9, expected an angle from 0 to pi"),
    (['--head', 'color:weight=-1'], '--head color:weight=-1: -1 is out of range'),
    (['--head', 'color:class_weights=pink:3'], "there is no class 'pink'; expected balanced or CLASS:WEIGHT"),
    (['--head', 'color:input=pixels'], "head 'color': input is 'pixels', expected features or projection"),
    (['--head', 'size:columns=a+b'], "--head size:columns: no label column 'a' (there are: color, shape)"),
    (['--head', 'size:columns=color+color'], "'color' is named twice"),
    (['--head', 'color:columns=shape'], "there is a column 'color' too"),
    (['--head', '*:columns=color'], 'columns are of one head'),
    (['--heads', 'color', 'color'], "'color' is named twice"),
    (['--head', '{color'], "'{color' is not of the form"),
    (['--start-from', 'initial'], '--start-from would change nothing: the run has no phases; leave it out'),
    (['-wls', '0', '--weak-first-view'], '--weak-first-view would change nothing: there is one view an image'),
    (['--unlabelled', 'images', '--epoch-by', 'labelled', '--epoch-steps', '2'],
     '--epoch-by would change nothing: --epoch-steps says how long an epoch is'),
    (['-wlc', '0', '--labelled-rows', '3'], '--labelled-rows would change nothing: -wlc 0 trains no heads'),
    (['--epoch-by', 'labelled'], '--epoch-by would change nothing: there are no unlabelled batches'),
    (['--pseudo-label-threshold', '0.5'], '--pseudo-label-threshold would change nothing: there is no'),
    (['--head', 'both:loss=arcface,columns=color+shape'], "columns are of tags, and 'arcface' reads classes"),
    (['--head', 'color:loss=tags', '--mixup', '0.2', '-wls', '0'], '--mixup and --cutmix mix'),
    (['--head', 'color:loss=numeric'], "train.csv row 2, column 'color': 'red' is no number; fix it"),
    (['--head', 'style:loss=tags,columns=color+shape'], "train.csv row 2, column 'color': 'red' is neither 0 nor 1"),
    (['--head-module', 'nowhere.py'], '--head-module nowhere.py: no such file'),
    (['--eval-metric', 'color/mae'], 'no such metric (there are: loss, top1, top5, color/loss, color/top1'),
    (['--train-split', 'train2'], 'train2.csv: no such file'),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, message', BAD_POOLS_AND_HEADS, ids=[' '.join(flags) for flags, _ in BAD_POOLS_AND_HEADS])
def test_bad_pools_and_heads(capsys, data_dir, tmp_path, flags, message):
    (data_dir / 'empty').mkdir()
    for number in (50, 51):
        Image.new('RGB', (8, 8)).save(data_dir / 'images' / f'{number}.png')
    (data_dir / 'few.csv').write_text('image_path\nimages/50.png\nimages/51.png\n')
    assert message in train_line(capsys, data_dir, tmp_path, *flags)


def test_cells_that_a_kind_of_head_cannot_take(capsys, data_dir, tmp_path):
    replace(data_dir / 'train.csv', 'images/3.png,red', 'images/3.png,red|blue')
    line = train_line(capsys, data_dir, tmp_path, '--head', 'color:loss=arcface')
    assert "train.csv row 5: column 'color' holds several tags ('red|blue'), and ArcFace takes one class" in line
    assert '--head color:loss=tags' in line
    for split, rows in (('train', 12), ('val', 6)):
        first = 0 if split == 'train' else 12
        (data_dir / f'{split}.csv').write_text('image_path,price\n' + ''.join(
            f'images/{first + n}.png,{n}\n' for n in range(rows)))
    replace(data_dir / 'val.csv', 'images/14.png,2', 'images/14.png,cheap')
    line = train_line(capsys, data_dir, tmp_path, '--head', 'price:loss=numeric')
    assert "val.csv row 4, column 'price': 'cheap' is no number" in line


def test_initial_checkpoint_of_another_backbone(capsys, data_dir, tmp_path, trained):
    line = train_line(capsys, data_dir, tmp_path, '--model', 'test_vit', '--initial-checkpoint', trained)
    assert 'a checkpoint of test_resnet, whose backbone does not fit the model' in line


@pytest.mark.slow
def test_resume_with_another_optimizer(capsys, data_dir, trained):
    line = fails(capsys, 'train', [data_dir, *QUICK, '--opt', 'adamp', '--resume', trained])
    assert 'trained with --opt sgd, not adamp' in line


def test_label_of_train_that_all_csv_lacks(capsys, data_dir, tmp_path):
    (data_dir / 'all.csv').write_text((data_dir / 'train.csv').read_text().replace('red', 'blue'))
    line = train_line(capsys, data_dir, tmp_path, '--unknown-labels', 'ignore')
    assert "train.csv: labels that training does not know: color 'red'" in line and 'all.csv, or fix them' in line


def test_bad_checkpoints(capsys, data_dir, tmp_path, trained):
    common = [data_dir, '-j', '0', '--device', 'cpu', '--checkpoint']
    assert '--model resnet18: ' in fails(capsys, 'validate', [*common, trained, '--model', 'resnet18'])
    assert 'val2.csv: no such file' in fails(capsys, 'validate', [*common, trained, '--split', 'val2'])
    assert 'name a .json or a .csv file' in fails(capsys, 'validate', [*common, trained, '--results-file', 'x.txt'])
    assert 'holds no ema weights' in fails(capsys, 'validate', [*common, trained, '--weights', 'ema'])
    (tmp_path / 'half.pth.tar').write_bytes(trained.read_bytes()[:5000])
    assert 'half.pth.tar: cannot be loaded' in fails(capsys, 'validate', [*common, tmp_path / 'half.pth.tar'])
    for content in ({'state_dict': {}}, torch.zeros(3), {'state_dict': {}, 'arch': 'x', 'label_space': 3}):
        torch.save(content, tmp_path / 'foreign.pth.tar')
        line = fails(capsys, 'validate', [*common, tmp_path / 'foreign.pth.tar'])
        assert 'not a checkpoint of timm-multilabel' in line
    (tmp_path / 'dot.pth.tar').write_bytes(b'.')
    assert 'cannot be loaded' in fails(capsys, 'validate', [*common, tmp_path / 'dot.pth.tar'])
    state = torch.load(trained, weights_only=True)
    torch.save({**state, 'arch': 'test_vit'}, tmp_path / 'mixed.pth.tar')
    assert 'do not fit its model' in fails(capsys, 'validate', [*common, tmp_path / 'mixed.pth.tar'])
    (data_dir / 'other.csv').write_text('image_path,size\nimages/0.png,big\n')
    assert "none of the checkpoint's heads (color, shape)" in fails(capsys, 'validate', [
        *common, trained, '--split', data_dir / 'other.csv'])
    (data_dir / 'strange.csv').write_text('image_path,color\nimages/0.png,pink\n')
    assert 'nothing to score' in fails(capsys, 'validate', [*common, trained, '--split', data_dir / 'strange.csv'])


def test_resume_with_other_classes(capsys, data_dir, trained):
    Image.new('RGB', (8, 8)).save(data_dir / 'images' / 'new.png')
    (data_dir / 'train.csv').write_text((data_dir / 'train.csv').read_text() + 'images/new.png,purple,disc\n')
    line = fails(capsys, 'train', [data_dir, *QUICK, '--resume', trained])
    assert 'a checkpoint of other classes: color (3), shape (2); the data has color (4), shape (2)' in line


def test_resume_with_another_model(capsys, data_dir, trained):
    line = fails(capsys, 'train', [data_dir, *QUICK, '--model', 'test_vit', '--resume', trained])
    assert 'does not fit this run' in line and 'args.yaml' in line


@pytest.mark.slow
def test_names_that_yaml_reads_as_numbers(data_dir, tmp_path):
    for split in ('train', 'val'):
        replace(data_dir / f'{split}.csv', 'red', '3')
    settings = {'head': {'color': {'class_weights': {3: 2.0}}, 'shape': {'weight': 2}}}
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(settings))
    run_command('train', 'train.py', [
        str(data_dir), *QUICK, '-c', str(tmp_path / 'c.yaml'), '--output', str(tmp_path), '--experiment', 'run'])
    state = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)
    assert state['head_options']['color']['class_weights'] == [2.0, 1.0, 1.0]
    assert state['head_weights'] == {'color': 0.5, 'shape': 2.0}


def parse(argv):
    """The values of the settings of training, by name."""
    return SimpleNamespace(**train_settings(*argv).flat())


def test_the_command_of_the_fork_means_the_same():
    settings = train_settings(*(
        './fashion-product-images/ --model efficientnet_b0 -b 32 --sched cosine --epochs 100 --decay-epochs 2.4 '
        '--decay-rate .97 --opt adamp --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 --drop 0.3 '
        '--drop-connect 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel --reprob 0.2 '
        '--amp --lr .016 --pretrained -wls 0.1 -wlc 0.9').split())
    args = SimpleNamespace(**settings.flat())
    args = SimpleNamespace(**settings.flat())
    assert (args.simclr_loss_weight, args.classification_loss_weight, args.temperature) == (0.1, 0.9, 0.5)
    assert (args.drop, args.drop_path, args.smoothing, args.projection_dim) == (0.3, 0.2, 0.1, 64)
    assert (args.epochs, cooldown_epochs(settings.schedule), args.min_lr, args.warmup_epochs) == (100, 10, 1e-5, 3)
    assert args.amp and args.pretrained and args.model_ema and args.gradient_centralization is None


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--apex-amp', '--native-amp'])
def test_old_names_of_amp(capsys, data_dir, tmp_path, flag):
    run_command('train', 'train.py', [
        str(data_dir), *QUICK, '--output', str(tmp_path / 'out'), '--experiment', 'run', flag])
    assert 'read as --amp' in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / 'out/run/args.yaml').read_text())['amp'] is True


def test_yaml_sets_any_flag_and_the_command_line_goes_first(tmp_path):
    settings = {
        'data_dir': 'data', 'lr': 0.3, 'model-ema': True, 'amp': False, 'heads': ['color', 'type'], 'aa': None,
        'head_weights': {'color': 1, 'type': 2}, 'input_size': [3, 64, 32], 'model_kwargs': {'depth': 3},
        'simclr_loss_weight': 1}
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(settings))
    args = parse(['-c', str(tmp_path / 'c.yaml'), '-wls', '0.25', '--no-model-ema'])
    assert (args.data_dir, args.lr, args.heads, args.input_size) == ('data', 0.3, ['color', 'type'], [3, 64, 32])
    assert args.head_weights == {'color': 1.0, 'type': 2.0} and args.model_kwargs == {'depth': 3}
    assert args.simclr_loss_weight == 0.25 and args.model_ema is False and args.amp is False


def test_yaml_and_the_data_directory(tmp_path):
    (tmp_path / 'c.yaml').write_text('heads: [color]\n')
    args = parse(['data', '-c', str(tmp_path / 'c.yaml')])
    assert (args.data_dir, args.heads) == ('data', ['color'])
    with pytest.raises(UserError, match='required: DIR'):
        parse(['-c', str(tmp_path / 'c.yaml')])
    (tmp_path / 'c.yaml').write_text('heads: [a, b]\ndata_dir: one\ndrop-connect: 0.2\nnative_amp: true\n')
    args = parse(['-c', str(tmp_path / 'c.yaml')])
    assert (args.data_dir, args.heads, args.drop_path, args.amp) == ('one', ['a', 'b'], 0.2, True)
    (tmp_path / 'c.yaml').write_text('data_dir: one\n')
    assert parse(['-c', str(tmp_path / 'c.yaml')]).data_dir == 'one'
    assert parse(['-c', str(tmp_path / 'c.yaml'), 'two']).data_dir == 'two'


@pytest.mark.parametrize('text, message', [
    ('learning_rate: 1', "there is no flag 'learning_rate'"),
    ('warmup_epoch: 1', "there is no flag 'warmup_epoch'; did you mean 'warmup_epochs'?"),
    ('- lr', 'expected a mapping'),
    ('lr: [', 'cannot be read as YAML'),
    ('amp: 3', "'amp' is 3, expected true or false"),
    ('lr: [1, 2]', "'lr' is [1, 2], expected one value"),
])
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        parse(['data', '-c', str(tmp_path / 'c.yaml')])


def test_every_setting_is_used():
    """A setting that does nothing is a defect: each one's name stands in the code that builds a run."""
    code = ''.join(path.read_text() for folder in ('assembly', 'api', 'cli')
                   for path in (ROOT / 'timm_multilabel' / folder).glob('*.py'))
    code += (ROOT / 'timm_multilabel' / 'config' / 'files.py').read_text()
    assert not {name for name in TrainSettings.settings() if not re.search(rf"\.{name}\b|'{name}'", code)}


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: command)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        run_command(command, command, ['--help'])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f'usage: {command} ') and '[flags]' in out.split('\n')[0]


@pytest.mark.slow
def test_installed_command_lists_its_subcommands():
    out = subprocess.run([sys.executable, '-c', 'from timm_multilabel.cli.main import main; main()', '--help'],
                         capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0
    assert all(command in out.stdout for command in COMMANDS)
