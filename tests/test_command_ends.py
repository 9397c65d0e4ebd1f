"""What a command says at its end, and what helps where it was given the wrong thing; the splits of `split`."""
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from common import train_run

from timm_multilabel import Predictor, __version__
from timm_multilabel.cli.main import main, run_command
from timm_multilabel.data.packing import pack
from timm_multilabel.data.split import split_csv
from timm_multilabel.data.table import read_table
from timm_multilabel.errors import UserError
from timm_multilabel.training.signals import Stopped

PATTERN = 'images/{id}.jpg'


def ends(capsys, command, *argv):
    """The error of a command that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run_command(command, f'timm-multilabel {command}', [str(word) for word in argv])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_training_ends_with_the_best_epoch_and_the_next_command(data_dir, tmp_path, capsys):
    run = train_run(data_dir, tmp_path / 'a b', epochs=2)
    lines = capsys.readouterr().out.splitlines()
    scores = pd.read_csv(run / 'summary.csv')['eval_top1']
    assert lines[-3:] == [
        f'{run}: 2 epochs done',
        f'Best top1: {scores.max():.4g} in epoch {scores.argmax() + 1}, {run}/model_best.pth.tar',
        f"Next: timm-multilabel report '{run}'",
    ]


def test_pretraining_ends_with_the_training_that_starts_from_it(data_dir, tmp_path, capsys):
    run = train_run(data_dir, tmp_path, '-wlc', '0', epochs=1)
    lines = capsys.readouterr().out.splitlines()
    loss = pd.read_csv(run / 'summary.csv')['simclr_loss'][0]
    assert lines[-2] == f'Best simclr_loss: {loss:.4g} in epoch 1, {run}/model_best.pth.tar'
    command = f'train {data_dir} --model test_resnet --img-size 32 --initial-checkpoint {run}/last.pth.tar'
    assert lines[-1] == f'Next: timm-multilabel {command}'


@pytest.mark.slow
def test_predict_says_what_it_wrote(data_dir, tmp_path, capsys):
    run = train_run(data_dir, tmp_path, epochs=1)
    capsys.readouterr()
    argv = [str(run / 'last.pth.tar'), str(data_dir / 'val.csv'), '--device', 'cpu', '-j', '0']
    run_command('predict', 'predict', [*argv, '--out', str(tmp_path / 'p.jsonl')])
    assert capsys.readouterr().out == f'{tmp_path}/p.jsonl: the labels of 6 images, as jsonl\n'
    run_command('predict', 'predict', [*argv, '--format', 'jsonl'])
    assert capsys.readouterr().out == (tmp_path / 'p.jsonl').read_text()  # nothing else where data goes to a pipe


@pytest.mark.slow
def test_versions_and_the_list_of_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-multilabel', '--version'])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert re.fullmatch(rf'timm-multilabel {__version__} \(timm [\d.]+, torch \S+, Python 3\.[\d.]+\)\n',
                        capsys.readouterr().out)
    done = subprocess.run([sys.executable, '-c', 'from timm_multilabel.cli.main import main; main()'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.findall(r'^    (\w+) ', done.stderr, re.MULTILINE) == [
        'probe', 'train', 'validate', 'predict', 'embed', 'search', 'export', 'report', 'compare', 'grid', 'sample',
        'split', 'convert', 'check']


@pytest.mark.slow
@pytest.mark.parametrize('command, words', [('train', ['{}', '--model', 'test_resnet']),
                                            ('validate', ['{}', '--checkpoint', '{run}'])])
def test_a_file_where_a_data_directory_is_expected(data_dir, tmp_path, capsys, command, words):
    run = train_run(data_dir, tmp_path, epochs=1) / 'last.pth.tar' if command == 'validate' else None
    capsys.readouterr()
    (data_dir / 'my labels.csv').write_bytes((data_dir / 'train.csv').read_bytes())
    line = ends(capsys, command, *(word.format(data_dir / 'my labels.csv', run=run) for word in words))
    assert f'{data_dir}/my labels.csv: a file, where a data directory is expected; ' in line
    assert f"with: timm-multilabel split '{data_dir}/my labels.csv' --image '{{IMAGE_COLUMN}}' --heads COLUMN" in line


def test_the_command_that_is_named_makes_a_data_directory(data_dir, capsys):
    (data_dir / 'train.csv').rename(data_dir / 'labels.csv')
    (data_dir / 'val.csv').unlink()
    line = ends(capsys, 'train', data_dir, '--model', 'test_resnet')
    assert f'{data_dir}/train.csv: no such file' in line
    words = line.split('timm-multilabel split ')[1].split()
    assert words == [str(data_dir / 'labels.csv'), '--image', "'{IMAGE_COLUMN}'", '--heads', 'COLUMN', '...']
    run_command('split', 'split', [words[0], '--image', '{image_path}', '--heads', 'color', 'shape'])
    assert {path.name for path in data_dir.glob('*.csv')} == {
        'labels.csv',
        'all.csv',
        'train.csv',
        'val.csv',
        'test.csv',
    }
    (data_dir / 'empty').mkdir()
    line = ends(capsys, 'train', data_dir / 'empty', '--model', 'test_resnet')
    assert 'split it with: timm-multilabel split; or split a folder' in line


@pytest.mark.slow
def test_errors_of_the_predictor_speak_of_images(data_dir, tmp_path):
    predictor = Predictor.load(train_run(data_dir, tmp_path, epochs=1) / 'last.pth.tar', device='cpu')
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    for given in (tmp_path / 'none.jpg', [data_dir / 'images' / '0.png', tmp_path / 'bad.jpg']):
        with pytest.raises(UserError, match=r'\.jpg \(image [01]\): cannot be .*leave it out') as caught:
            predictor(given)
        assert 'row' not in str(caught.value) and 'list' not in str(caught.value)


def write_source(folder, rows):
    """A CSV of rows (id, kind, product), whose images are there."""
    (folder / 'images').mkdir(parents=True)
    for number, _, _ in rows:
        (folder / 'images' / f'{number}.jpg').touch()
    frame = pd.DataFrame(rows, columns=['id', 'kind', 'product'])
    frame.to_csv(folder / 'styles.csv', index=False)
    return folder / 'styles.csv'


def splits(folder):
    return {name: pd.read_csv(folder / f'{name}.csv') for name in ('train', 'val', 'test')
            if (folder / f'{name}.csv').is_file()}


def make(source, out, **kwargs):
    return split_csv(source, out, image=PATTERN, heads=[('type', 'kind'), ('product', 'product')], **kwargs)


def test_stratified_splits_have_the_same_share_of_each_label(tmp_path):
    sizes = {'shirt': 60, 'shoe': 30, 'belt': 10, 'scarf': 1}
    kinds = [kind for kind, size in sizes.items() for _ in range(size)]
    source = write_source(tmp_path, [(number, kind, number) for number, kind in enumerate(kinds)])
    counts = make(source, tmp_path / 'a', ratios=(6, 2, 2), stratify='type')
    assert counts == {'missing': 0, 'train': 61, 'val': 20, 'test': 20, 'all': 101}
    for name, share in (('train', 0.6), ('val', 0.2), ('test', 0.2)):
        of_split = Counter(splits(tmp_path / 'a')[name]['type'])
        for kind, size in sizes.items():
            assert abs(of_split[kind] - share * size) <= 1, (name, kind)
    make(source, tmp_path / 'b', ratios=(6, 2, 2), stratify='type')
    make(source, tmp_path / 'c', ratios=(6, 2, 2), stratify='type', seed=1)
    assert (tmp_path / 'a' / 'val.csv').read_bytes() == (tmp_path / 'b' / 'val.csv').read_bytes()
    assert (tmp_path / 'a' / 'val.csv').read_bytes() != (tmp_path / 'c' / 'val.csv').read_bytes()


@pytest.mark.parametrize('stratify', [None, 'type'])
def test_groups_stay_together(tmp_path, stratify):
    """100 products of 1 to 4 photos, and 20 rows without a product, each of which is alone."""
    rows = [(f'{product}-{photo}', f'kind{product % 2}', f'p{product}')
            for product in range(100) for photo in range(1 + product % 4)]
    rows += [(f'x{number}', 'kind0', '') for number in range(20)]
    counts = make(write_source(tmp_path, rows), tmp_path, group='product', stratify=stratify)
    assert counts['all'] == 270 and abs(counts['train'] - 216) <= 4 and abs(counts['val'] - 27) <= 4
    found = splits(tmp_path)
    products = [set(frame['product'].dropna()) for frame in found.values()]
    assert sum(map(len, products)) == len(set.union(*products)) == 100
    alone = [int(frame['product'].isna().sum()) for frame in found.values()]
    assert sum(alone) == 20 and max(alone) < 20
    if stratify:
        shares = [(frame['type'] == 'kind1').mean() for frame in found.values()]
        assert max(shares) - min(shares) < 0.1  # 150 of 270 rows


@pytest.mark.parametrize('stratify', [None, 'type'])
def test_a_ratio_of_0_writes_no_file(tmp_path, stratify):
    source = write_source(tmp_path, [(number, 'a', number) for number in range(10)])
    assert make(source, tmp_path, ratios=(8, 2, 0), stratify=stratify) == {
        'missing': 0, 'train': 8, 'val': 2, 'test': 0, 'all': 10}
    assert sorted(path.name for path in tmp_path.glob('*.csv')) == ['all.csv', 'styles.csv', 'train.csv', 'val.csv']
    make(source, tmp_path, ratios=(5, 0, 5), stratify=stratify, force=True)  # else val would hold rows of train
    assert sorted(path.name for path in tmp_path.glob('*.csv')) == ['all.csv', 'styles.csv', 'test.csv', 'train.csv']


@pytest.mark.parametrize('flags, message', [
    ({'stratify': 'kind'}, '--stratify kind: no such head (there are: type, product)'),
    ({'group': 'type'}, 'has no such column (there are: id, kind, product)'),
])
def test_what_is_not_there_to_split_by(tmp_path, flags, message):
    source = write_source(tmp_path, [(1, 'a', 'b')])
    with pytest.raises(UserError, match=re.escape(message)):
        make(source, tmp_path / 'out', **flags)
    assert not (tmp_path / 'out').exists()


def test_a_cell_of_any_length_is_read(tmp_path):
    """csv's limit is the whole process's, and whoever imports another library may have changed it."""
    source = write_source(tmp_path, [(1, 'x' * 200_000, 'b')])
    make(source, tmp_path, ratios=(1, 0, 0))
    assert len(splits(tmp_path)['train']['type'][0]) == 200_000


def test_a_label_in_few_groups_is_in_training(tmp_path):
    """900 rows of one group fill the training split; the 20 rows of the rare label still go where they belong."""
    rows = [(f'a{n}', 'a', 'big' if n < 900 else f'g{n}') for n in range(1000)]
    rows += [(f'b{n}', 'b', f'h{n // 2}') for n in range(20)]
    make(write_source(tmp_path, rows), tmp_path, group='product', stratify='type')
    assert [int((frame['type'] == 'b').sum()) for frame in splits(tmp_path).values()] == [16, 2, 2]


def test_split_says_what_it_removes(tmp_path, capsys):
    source = write_source(tmp_path, [(number, 'a', number) for number in range(10)])
    words = [str(source), '--image', PATTERN, '--heads', 'kind', '--force']
    run_command('split', 'split', words)
    assert 'Removed' not in capsys.readouterr().out
    run_command('split', 'split', [*words, '--ratios', '0', '0', '1'])
    assert f'Removed {tmp_path}/train.csv, {tmp_path}/val.csv, whose ratio is 0\n' in capsys.readouterr().out


def test_hints_at_what_there_is(data_dir, tmp_path, capsys):
    (data_dir / 'train.csv').unlink()
    assert 'split it with: timm-multilabel split; or split a folder' in ends(
        capsys, 'train', data_dir, '--model', 'test_resnet')
    (data_dir / 'recipe.yaml').write_text('epochs: 1\n')
    line = ends(capsys, 'train', data_dir / 'recipe.yaml', '--model', 'test_resnet')
    assert 'a data directory is expected; pass a recipe or the args.yaml of a run with -c' in line


def test_the_hint_to_resume_can_be_pasted():
    assert str(Stopped('stopped', Path('a b/last.pth.tar'))).endswith("--resume 'a b/last.pth.tar'")
    assert str(Stopped('stopped before it began')) == 'stopped before it began'


@pytest.mark.slow
def test_training_on_shards_ends_with_validate(data_dir, tmp_path, capsys):
    for name in ('train', 'val'):
        pack(read_table(data_dir / f'{name}.csv'), tmp_path, name, 'webdataset', size=3)
    run = train_run(tmp_path, tmp_path / 'out', epochs=1)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'Next: timm-multilabel validate {tmp_path} --split val --checkpoint {run}/model_best.pth.tar')
