"""A kind of classes that has no probabilities: none is made up for it by any command."""
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from common import TINY, write_data

from timm_multilabel import Predictor
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.exports.exportable import describe
from timm_multilabel.heads import load_registry
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

PAGE = (Path(__file__).parent.parent / 'docs' / 'how-to' / 'custom-heads.md').read_text()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run with the ordinal head for colors and a usual one for shapes: its folder and the kind's file."""
    folder = tmp_path_factory.mktemp('ordinal')
    module = folder / 'my_heads.py'
    module.write_text(re.search(r'<!-- custom head -->\n```python\n(.*?)```', PAGE, re.S)[1])
    data = write_data(folder / 'data')
    run_command('train', 'train.py', [
        str(data), *TINY, '--epochs', '1', '--output', str(folder), '--experiment', 'run', '--head-module', str(module),
        '--head', 'color:loss=ordinal,order=blue+green+red'])
    return folder / 'run', module


def printed(capsys, trained, *flags):
    run, module = trained
    capsys.readouterr()
    run_command('predict', 'predict', [
        str(run / 'last.pth.tar'), str(run.parent / 'data' / 'val.csv'), '--head-module', str(module), '--device',
        'cpu', '-j', '0', *flags])
    return capsys.readouterr().out


@pytest.mark.slow
def test_predict_gives_the_label_alone(trained, capsys):
    rows = list(csv.DictReader(printed(capsys, trained, '--format', 'csv', '--top-k', '2').splitlines()))
    assert list(rows[0]) == ['image', 'error', 'color', 'shape', 'shape_probability', 'shape_2', 'shape_2_probability']
    answers = [json.loads(line) for line in printed(capsys, trained, '--format', 'jsonl').splitlines()]
    assert [answer['heads']['color'] for answer in answers] == [[{'label': row['color']}] for row in rows]
    assert set(answers[0]['heads']['shape'][0]) == {'label', 'probability'}
    lines = [line.split() for line in printed(capsys, trained).splitlines()]
    assert lines[0] == ['image', 'color', 'shape']
    assert [line[1] for line in lines[1:]] == [row['color'] for row in rows] and len(lines[1]) == 4


def test_a_threshold_is_refused_and_one_of_all_heads_leaves_the_label(trained, capsys):
    run, module = trained
    predictor = Predictor.load(run / 'last.pth.tar', 'cpu', head_module=str(module))
    image = run.parent / 'data' / 'images' / '0.png'
    (color,) = predictor(image, threshold=1.0)['color']
    assert color.label in ('blue', 'green', 'red') and color.probability is None
    with pytest.raises(UserError, match="threshold of 'color': this kind of head has no probabilities; leave it out"):
        predictor(image, threshold={'color': 0.5})
    with pytest.raises(SystemExit):
        printed(capsys, trained, '--threshold', 'color=0.5')
    assert 'this kind of head has no probabilities' in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_has_its_own_metrics_and_no_calibration(trained, capsys):
    run, module = trained
    words = [str(run), '--head-module', str(module), '--device', 'cpu', '-j', '0', '--force']
    run_command('report', 'report', words)
    of_color, of_shape = re.findall(r'<section id="head\d">.*?</section>', (run / 'report.html').read_text(), re.S)
    assert 'sure' not in of_color and 'Calibration' not in of_color and 'Worst' not in of_color
    assert 'Calibration' in of_shape
    figures = re.search(r'<section id="metrics">.*?</section>', (run / 'report.html').read_text(), re.S)[0]
    said = [json.loads(line)['heads']['color'][0]['label'] for line in printed(
        capsys, trained, '--format', 'jsonl').splitlines()]
    rows = list(csv.DictReader((run.parent / 'data' / 'val.csv').open()))
    off = [abs('bgr'.index(row['color'][0]) - 'bgr'.index(label[0])) for row, label in zip(rows, said, strict=True)]
    exact, near = (100 * sum(each <= most for each in off) / len(off) for most in (0, 1))
    assert re.findall(r'<td>(exact|within_one)</td><td class="number">([\d.]+)</td>', figures) == [
        ('exact', f'{exact:.2f}'), ('within_one', f'{near:.2f}')]

    # What an earlier version stored holds no metrics of its own, and is made again.
    stored = run / 'predictions-val.npz'
    found = Predictions.load(stored)
    assert found.own_metrics['color'].values == pytest.approx({'exact': exact, 'within_one': near})
    replace(found, own_metrics=None).save(stored)
    run_command('report', 'report', words)
    assert Predictions.load(stored).own_metrics['color'].values == found.own_metrics['color'].values


@pytest.mark.slow
def test_an_export_says_what_its_output_is(trained, tmp_path):
    run, module = trained
    checkpoint = read_checkpoint(run / 'last.pth.tar')
    model = load_model(checkpoint, 'plain', load_registry(str(module)))
    assert [output['values'] for output in describe(checkpoint, 'plain', model)['outputs']] == [
        '1 of the predicted class, 0 of others', 'probabilities']
    run_command('export', 'export', [
        str(run / 'last.pth.tar'), '--head-module', str(module), '--formats', 'safetensors', '--out', str(tmp_path)])
