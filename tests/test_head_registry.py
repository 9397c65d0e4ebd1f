"""Every kind of head through the commands, the documentation's own kind included."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from timm_multilabel.cli.main import run_command
from timm_multilabel.heads import load_registry
from timm_multilabel.labels import LabelSet, LabelSpace

PAGE = (Path(__file__).parent.parent / 'docs' / 'how-to' / 'custom-heads.md').read_text()
HEADS = ['--head', 'color:class_weights=balanced,smoothing=0.2', 'style:loss=tags,class_weights=balanced',
         'price:loss=numeric,weight=0.5', 'season:columns=summer+winter']


@pytest.fixture
def module(tmp_path):
    """The page's file, word for word."""
    path = tmp_path / 'my_heads.py'
    path.write_text(re.search(r'<!-- custom head -->\n```python\n(.*?)```', PAGE, re.S)[1])
    return path


@pytest.fixture
def data(tmp_path):
    """A class, tags, a number, a group of 0/1 columns and an ordered class, each missing here and there."""
    folder, rng = tmp_path / 'data', np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    for split, start, stop in (('train', 0, 24), ('val', 24, 36)):
        lines = ['image_path,color,style,price,summer,winter,size']
        for n in range(start, stop):
            level = int(rng.integers(0, 256))
            Image.new('RGB', (32, 32), (level, 255 - level, 60)).save(folder / 'images' / f'{n}.png')
            cells = ['red' if level > 127 else 'green', 'warm|bright' if level > 127 else 'cold', str(level),
                     str(level % 2), str(1 - level % 2), 'SML'[min(2, level // 86)]]
            cells[n % 6] = ''
            lines.append(','.join([f'images/{n}.png', *cells]))
        (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.mark.slow
def test_kinds_train_resume_and_are_validated(data, module, tmp_path, capsys):
    flags = ['--model', 'test_resnet', '--img-size', '32', '-b', '6', '-j', '0', '--device', 'cpu', '--lr', '0.02',
             '--warmup-epochs', '0', '--cooldown-epochs', '0', '--head-module', str(module), *HEADS,
             'size:loss=ordinal,order=S+M+L', '--output', str(tmp_path)]
    run_command('train', 'train.py', [str(data), *flags, '--epochs', '2', '--experiment', 'run'])
    folder = tmp_path / 'run'
    out = capsys.readouterr().out
    assert 'heads: color (2), style (3 tags), price (number), season (2 tags), size (3)' in out
    summary = pd.read_csv(folder / 'summary.csv')
    for column in ('eval_score', 'eval_top1', 'eval/style/map', 'eval/price/mae', 'eval/season/micro_f1',
                   'eval/size/within_one', 'train/price/loss', 'train/size/top1'):
        assert summary[column].notna().all(), column
    row = summary.iloc[-1]
    weights = {'color/top1': 0.2, 'style/map': 0.2, 'price/r2': 0.5, 'season/map': 0.2, 'size/exact': 0.2}
    mean = sum(w * max(0, row[f'eval/{name}']) for name, w in weights.items()) / sum(weights.values())
    assert row['eval_score'] == pytest.approx(mean)
    names = LabelSpace.load(folder / 'label_space.json').names
    assert names == ('color', 'style', 'price', 'season', 'size')

    best = torch.load(folder / 'model_best.pth.tar', weights_only=True)
    assert best['metric'] == pytest.approx(summary['eval_score'].max())
    assert best['head_options']['size'] == {
        'loss': 'ordinal', 'input': 'features', 'drop': 0.0, 'order': ['S', 'M', 'L']}
    assert len(best['head_options']['color']['class_weights']) == 2
    results = tmp_path / 'r.json'
    run_command('validate', 'validate.py', [
        str(data), '--checkpoint', str(folder / 'model_best.pth.tar'), '-j', '0', '--device', 'cpu', '--results-file',
        str(results), '--confusion', str(tmp_path / 'c'), '--head-module', str(module)])
    row, results = summary.iloc[summary['eval_score'].argmax()], json.loads(results.read_text())
    for head, figure in (('color', 'top1'), ('style', 'map'), ('price', 'mae'), ('season', 'f1'), ('size', 'exact')):
        assert results['heads'][head][figure] == pytest.approx(row[f'eval/{head}/{figure}'], rel=1e-5)
        assert results['heads'][head]['labels'] == (12 if head == 'season' else 10)
    assert results['mean']['score'] == pytest.approx(row['eval_score'], rel=1e-5)
    tables = {head: pd.read_csv(tmp_path / 'c' / f'confusion-{head}.csv', index_col=0) for head in names}
    assert tables['color'].to_numpy().sum() == 10 and tables['size'].shape == (3, 3)
    assert tables['style'].index.tolist() == ['bright', 'cold', 'warm'] and tables['style'].to_numpy().sum() == 30
    assert tables['season'].to_numpy().sum() == 20  # 2 of the 24 cells are empty for each of two columns
    prices = pd.read_csv(data / 'val.csv')['price'].dropna()
    assert tables['price']['label'].tolist() == pytest.approx(prices.tolist(), abs=1e-3)
    assert all((tmp_path / 'c' / f'confusion-{head}.png').read_bytes().startswith(b'\x89PNG') for head in names)

    with pytest.raises(SystemExit):
        run_command('validate', 'validate.py', [
            str(data), '--checkpoint', str(folder / 'last.pth.tar'), '-j', '0', '--device', 'cpu'])
    assert "is of the kind 'ordinal', which training had from" in capsys.readouterr().err

    run_command('train', 'train.py', [str(data), *flags, '--epochs', '2', '--experiment', 'part', '--epoch-steps', '4'])
    part = tmp_path / 'part'
    (part / 'last.pth.tar').unlink()
    (part / 'checkpoint-0.pth.tar').rename(part / 'last.pth.tar')
    run_command('train', 'train.py', [
        '-c', str(part / 'args.yaml'), '--resume', str(part / 'last.pth.tar'), '--head-module', str(module)])
    a, b = (torch.load(path / 'last.pth.tar', weights_only=True)['state_dict'] for path in (folder, part))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
def test_a_figure_that_the_labels_do_not_allow_stays_out_of_the_score(data, tmp_path, capsys):
    """One price in val.csv: no variance to explain. Asked for by name, it is an error."""
    table = pd.read_csv(data / 'val.csv', dtype=str, keep_default_na=False)
    table.loc[table['price'] != '', 'price'] = '7'
    table.to_csv(data / 'val.csv', index=False)
    flags = ['--model', 'test_resnet', '--img-size', '32', '-b', '6', '-j', '0', '--device', 'cpu', '--epochs', '1',
             '--cooldown-epochs', '0', '--heads', 'color', 'price', '--head', 'price:loss=numeric', '--output',
             str(tmp_path)]
    run_command('train', 'train.py', [str(data), *flags, '--experiment', 'run'])
    row = pd.read_csv(tmp_path / 'run' / 'summary.csv').iloc[0]
    assert math.isnan(row['eval/price/r2']) and row['eval_score'] == row['eval/color/top1']
    with pytest.raises(SystemExit):
        run_command('train', 'train.py', [str(data), *flags, '--eval-metric', 'price/r2'])
    assert f"--eval-metric price/r2: 'price' has no weight, or no labels in {data / 'val.csv'} that allow it" in (
        capsys.readouterr().err)


@pytest.mark.slow
def test_checkpoints_are_ranked_by_the_least_error(data, tmp_path):
    run_command('train', 'train.py', [
        str(data), '--model', 'test_resnet', '--img-size', '32', '-b', '6', '-j', '0', '--device', 'cpu',
        '--epochs', '4', '--cooldown-epochs', '0', '--warmup-epochs', '0', '--heads', 'price', '--head',
        'price:loss=numeric', '--eval-metric', 'price/mae', '--output', str(tmp_path), '--experiment', 'run'])
    errors = pd.read_csv(tmp_path / 'run' / 'summary.csv')['eval/price/mae']
    best = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=True)
    assert best['epoch'] == errors.argmin() and best['metric'] == pytest.approx(errors.min())


def test_the_kind_of_the_page(module):
    """Its loss by hand, its prediction, missing labels; about 30 lines, as the page says its commands."""
    lines = [line for line in module.read_text().splitlines() if line.strip()]
    assert len(lines) <= 36
    assert '--head size:loss=ordinal,order=S+M+L' in PAGE
    labels = LabelSet('size', ('L', 'M', 'S'))
    head = load_registry(str(module))['ordinal'](labels, 4, order=['S', 'M', 'L']).double()
    output = torch.tensor([[2.0, -1.0], [0.5, 0.3], [-1.0, -2.0]], dtype=torch.float64)
    assert head.predict(output).tolist() == [1, 0, 2]
    total, count = head.loss(output, torch.tensor([1, -1, 0]))
    expected = [math.log(1 + math.exp(-x)) for x in (2.0, 1.0, -1.0, -2.0)]  # M is beyond S and not beyond M
    assert (total.item(), count.item()) == (pytest.approx(sum(expected) / 2), 2)
    figures = head.metrics(np.array([[1.0], [0.0], [2.0]]), np.array([[1.0], [2.0], [1.0]]))
    assert figures == {'exact': pytest.approx(100 / 3), 'within_one': pytest.approx(200 / 3)}
    with pytest.raises(ValueError, match='order is'):
        type(head)(labels, 4, order=['S', 'M'])


@pytest.mark.slow
def test_smoothing_asked_for_with_arcface_is_warned_about(data, tmp_path, capsys):
    run_command('train', 'train.py', [
        str(data), '--model', 'test_resnet', '--img-size', '32', '-b', '6', '-j', '0', '--device', 'cpu',
        '--epochs', '1', '--cooldown-epochs', '0', '--heads', 'color', '--head',
        'color:loss=arcface,smoothing=0.1', '--output', str(tmp_path)])
    assert capsys.readouterr().out.count("head 'color': label smoothing works against ArcFace's margin") == 1
