"""Predictions of images: what words of a command line name, what heads say, and how it is written."""
import csv
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import COLORS, SPACE, train_run, write_data
from PIL import Image
from test_cli import fails

from timm_multilabel import Predictor
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.arguments import rows_of_arguments
from timm_multilabel.errors import UserError
from timm_multilabel.inference.image_predictions import Guess, ImagePrediction, check_thresholds, guess
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.reports.prediction_formats import csv_columns, csv_lines, json_lines, table_lines
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

CLASSES, TAGS, NUMBER = LabelSet('c', ('x', 'y', 'z')), TagSet('t', ('p', 'q')), Quantity('n', 10.0, 4.0)
MIXED = LabelSpace((CLASSES, TAGS, NUMBER))
REGISTRY = ['--head', 'style:loss=tags', 'price:loss=numeric', '--model-ema', '--model-ema-decay', '0.5']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A data directory with a class, tags and a number, and a checkpoint trained on it."""
    folder = tmp_path_factory.mktemp('trained')
    data = write_data(folder / 'data')
    for split in ('train', 'val'):
        path = data / f'{split}.csv'
        header, *rows = path.read_text().splitlines()
        rows = [f'{row.rpartition(",")[0]},{("a|b", "b", "")[n % 3]},{n + 0.5}' for n, row in enumerate(rows)]
        path.write_text('\n'.join(['image_path,color,style,price', *rows]) + '\n')
    run = train_run(data, folder / 'out', *REGISTRY, epochs=1)
    return SimpleNamespace(data=data, checkpoint=run / 'last.pth.tar', images=data / 'images')


def command(*argv):
    """Run the command; its exit status."""
    try:
        run_command('predict', 'predict', [*map(str, argv), '--device', 'cpu'])
    except SystemExit as stop:
        return stop.code
    return 0


def reference(checkpoint, color, weights='plain'):
    """Probabilities {head: (C,)} of a plain picture, which no resizing changes."""
    read = read_checkpoint(checkpoint)
    mean, std = (torch.tensor(read.data_config[name]) for name in ('mean', 'std'))
    image = ((torch.tensor(COLORS[color]) / 255 - mean) / std)[None, :, None, None].expand(1, 3, 32, 32)
    model = load_model(read, weights)
    with torch.no_grad():
        output = model(image)
    return {name: head.probabilities(output[name])[0].numpy() for name, head in model.named_heads.items()}


def assert_alike(a, b):
    """Two answers have the same labels, and the same numbers but for rounding, which depends on the batch."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == [(pytest.approx(label, rel=1e-5) if probability is None else label,
                            None if probability is None else pytest.approx(probability, rel=1e-5))
                           for label, probability in b[name]]


def test_guesses_by_hand():
    values = np.array([0.2, 0.5, 0.3], np.float32)
    assert [g.label for g in guess(CLASSES, values, 1, {})] == ['y']
    assert guess(CLASSES, values, 2, {}) == [('y', 0.5), ('z', pytest.approx(0.3))]
    assert [g.label for g in guess(CLASSES, values, 9, {})] == ['y', 'z', 'x']
    assert [g.label for g in guess(CLASSES, values, 9, {'': 0.25})] == ['y', 'z']
    assert guess(CLASSES, values, 9, {'': 0.6}) == [('unknown', 0.5)]
    assert guess(CLASSES, values, 1, {'': 0.6, 'c': 0.5}) == [('y', 0.5)]
    assert guess(TAGS, np.array([0.5, 0.75]), 1, {}) == [('q', 0.75), ('p', 0.5)]
    assert guess(TAGS, np.array([0.25, 0.75]), 1, {}) == [('q', 0.75)]
    assert guess(TAGS, np.array([0.25, 0.4]), 1, {}) == []
    assert guess(TAGS, np.array([0.25, 0.4]), 1, {'t': 0.25}) == [('q', 0.4), ('p', 0.25)]
    assert guess(NUMBER, np.array([-0.5]), 1, {'': 0.9}) == [(8.0, None)]
    with pytest.raises(UserError, match="head 'c': its outputs are not finite"):
        guess(CLASSES, np.array([0.5, np.nan, 0.5]), 1, {})


def test_thresholds_that_are_none():
    check_thresholds({'': 0.5, 'c': 1, 't': 0}, MIXED)
    for thresholds, message in [({'d': 0.5}, r"no such head \(it has: c, t, n\)"), ({'n': 0.5}, 'gives a number'),
                                ({'': 1.5}, 'from 0 to 1')]:
        with pytest.raises(UserError, match=message):
            check_thresholds(thresholds, MIXED)


def test_predictor_says_what_the_model_says(trained):
    predictor = Predictor.load(trained.checkpoint, device='cpu', weights='plain')
    for number, color in enumerate(COLORS):
        path, expected = trained.images / f'{number}.png', reference(trained.checkpoint, color)
        found = predictor(path, top_k=3)
        order = np.argsort(-expected['color'])
        assert [g.label for g in found['color']] == [('blue', 'green', 'red')[place] for place in order]
        np.testing.assert_allclose([g.probability for g in found['color']], expected['color'][order], rtol=1e-4)
        by_tag = {g.label: g.probability for g in predictor(path, threshold={'style': 0})['style']}
        np.testing.assert_allclose([by_tag['a'], by_tag['b']], expected['style'], rtol=1e-4)
        labels = predictor.label_space.heads[2]
        assert labels.mean == 6 and labels.std == pytest.approx(np.arange(12).std())
        assert found['price'] == [(pytest.approx(6 + labels.std * expected['price'][0], rel=1e-4), None)]


def test_predictor_takes_paths_pictures_and_pixels(trained):
    predictor = Predictor.load(trained.checkpoint, device='cpu')
    path = trained.images / '1.png'
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert('RGB'))
        many = predictor([path, str(path), picture, pixels, picture.convert('RGBA')])
    for one in many:
        assert_alike(one, predictor(str(path)))
    grey = np.full((40, 20), 128, np.uint8)
    assert_alike(predictor(grey), predictor(np.stack([grey] * 3, 2)))
    assert predictor([]) == []
    assert len(predictor([pixels] * 70)) == 70
    turned = Image.fromarray(np.concatenate([pixels[:16], 255 - pixels[:16]]))
    turned.getexif()[0x0112] = 3
    assert_alike(predictor(turned), predictor(np.asarray(turned)[::-1, ::-1]))


@pytest.mark.slow
def test_predictor_weights(trained):
    for weights in ('plain', 'ema'):
        found = Predictor.load(trained.checkpoint, 'cpu', weights)(trained.images / '0.png')['color'][0].probability
        assert found == pytest.approx(reference(trained.checkpoint, 'red', weights)['color'].max(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('image, message', [
    (np.zeros((4, 4, 3)), 'float64 pixels of shape'), (np.zeros((4, 4, 4), np.uint8), r'expected uint8 \(H, W, 3\)'),
    (np.zeros((0, 4), np.uint8), 'pixels of shape'), (3, 'a int, expected a path'), ('nope.jpg', 'cannot be read'),
    (Image.new('F', (4, 4)), 'image 0: cannot be decoded'),
])
def test_predictor_names_what_is_no_image(trained, image, message):
    with pytest.raises(UserError, match=message):
        Predictor.load(trained.checkpoint, 'cpu')([image])


def test_words_become_rows(tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (data_dir / 'list.csv').write_text('image_path,x\nimages/3.png,1\n\nimages/gone.png,2\n')
    (data_dir / 'a[b].png').write_bytes(b'')
    rows = rows_of_arguments(
        ['data/list.csv', 'data/images/1?.png', '-', 'gone.jpg', 'data/a[b].png'], SPACE,
        stdin=io.BytesIO(b'x.jpg\r\n\nsp ace.jpg'))
    assert [os.path.normpath(image) for image in rows.images] == [
        'data/images/3.png', 'data/images/gone.png', *(f'data/images/{n}.png' for n in range(10, 18)), 'x.jpg',
        'sp ace.jpg', 'gone.jpg', 'data/a[b].png']
    assert rows.where(1) == 'data/list.csv row 4' and rows.where(2) == 'in data/images/1?.png'
    assert rows.where(11) == 'standard input row 3' and rows.where(12) == 'in the command line'
    assert rows.targets.shape == (14, 2) and rows.targets.unique().tolist() == [-1]
    assert len(rows_of_arguments(['data/images'], SPACE)) == 18
    assert len(rows_of_arguments(['data/**/*.png'], SPACE)) == 19
    assert len(rows_of_arguments(['data/im*'], SPACE)) == 18
    assert list(rows_of_arguments(['-'], SPACE, stdin=io.BytesIO(b'a\nb\0c\xff\0')).images) == ['a\nb', 'c\udcff']
    assert len(rows_of_arguments([f'{n}.png' for n in range(300)], SPACE)) == 300
    assert len({rows_of_arguments([f'{n}.png', f'data/images/{n % 9}*'], SPACE).where(1) for n in range(9)}) == 9


@pytest.mark.parametrize('word, message', [
    ('empty', 'no images in this folder'),
    ('fotos/', 'fotos/: no such file or folder'), ('*.gif', 'no file matches'), ('none.csv', 'none.csv: no such file'),
    ('-', 'standard input names no image'), ('bad.csv', "no column 'image_path'"), ('gone.csv', 'none of its 1 images'),
])
def test_words_that_name_no_image(tmp_path, monkeypatch, word, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.csv').write_text('file\na.png\n')
    (tmp_path / 'gone.csv').write_text('image_path\na.png\n')
    with pytest.raises(UserError, match=message):
        rows_of_arguments([word], SPACE, stdin=io.BytesIO(b'\n\n'))


@pytest.mark.slow
def test_csv_of_good_and_bad_images(trained, tmp_path, capsys):
    (tmp_path / 'broken.png').write_bytes((trained.images / '1.png').read_bytes()[:60])
    words = [trained.images / '0.png', tmp_path / 'broken.png', trained.images / '1.png', tmp_path / 'gone.png',
             trained.images / '2.png']
    assert command(trained.checkpoint, *words, '--out', tmp_path / 'new' / 'p.csv', '-b', 2, '-j', 1, '--weights',
                   'plain', '--threshold', 'style=0') == 1
    assert '2 of 5 images could not be read' in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / 'new' / 'p.csv').open()))
    assert list(rows[0]) == ['image', 'error', 'color', 'color_probability', 'style', 'style_probability', 'price']
    assert [row['image'] for row in rows] == [str(word) for word in words]
    assert 'cannot be decoded as an image' in rows[1]['error'] and 'cannot be read (No such file' in rows[3]['error']
    assert set(list(rows[1].values())[2:]) == {''} and [row['error'] for row in rows[::2]] == [''] * 3
    for row, color in zip(rows[::2], COLORS):
        expected = reference(trained.checkpoint, color)
        assert row['color'] == ('blue', 'green', 'red')[expected['color'].argmax()]
        assert float(row['color_probability']) == pytest.approx(expected['color'].max(), rel=1e-4)
        order = np.argsort(-expected['style'])
        assert row['style'] == '|'.join('ab'[place] for place in order)
        np.testing.assert_allclose(
            [float(text) for text in row['style_probability'].split('|')], expected['style'][order], rtol=1e-4)


@pytest.mark.slow
def test_formats_agree_and_statuses(trained, capsys, monkeypatch):
    csv_path = trained.data / 'val.csv'
    found = {}
    for form in ('csv', 'jsonl', 'table'):
        assert command(trained.checkpoint, csv_path, '--format', form, '--top-k', 2) == 0
        found[form] = capsys.readouterr().out
    rows, objects = list(csv.DictReader(io.StringIO(found['csv']))), found['jsonl'].splitlines()
    table = found['table'].splitlines()
    assert len(rows) == len(objects) == len(table) - 1 == 6
    assert table[0].split() == ['image', 'color', 'style', 'price']
    for row, line, words in zip(rows, map(json.loads, objects), table[1:]):
        first, second = line['heads']['color']
        assert [first['label'], second['label']] == [row['color'], row['color_2']]
        assert float(row['color_2_probability']) == second['probability'] <= first['probability']
        assert float(row['price']) == line['heads']['price'][0]['value']
        assert line['image'] == row['image'] == words.split()[0]
        assert f'{row["color"]} {first["probability"]:.3f}, {row["color_2"]}' in words
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'nope.png\n')))
    assert command(trained.checkpoint, '-', '--format', 'jsonl') == 1
    line = json.loads(capsys.readouterr().out)
    assert line['image'] == 'nope.png' and 'standard input row 1' in line['error'] and 'heads' not in line


@pytest.mark.slow
def test_unknown_below_a_threshold(trained, capsys):
    image = trained.images / '0.png'
    best = reference(trained.checkpoint, 'red')['color'].max()
    for flags, unknown in [(['1'], True), (['color=1'], True), (['0'], False), (['1', 'color=0'], False)]:
        words = [word for flag in flags for word in ('--threshold', flag)]
        command(trained.checkpoint, image, '--format', 'jsonl', '--weights', 'plain', *words)
        head = json.loads(capsys.readouterr().out)['heads']['color']
        assert (head[0]['label'] == 'unknown') == unknown and len(head) == 1
        assert head[0]['probability'] == pytest.approx(best, rel=1e-4)


def test_text_that_programs_would_obey():
    space = LabelSpace((LabelSet('=head', ('=1+1', 'b')),))
    answers = [ImagePrediction('-x\x1b[31m.png', {'=head': [Guess('=1+1', 0.5)]}),
               ImagePrediction('y', {}, 'bad, indeed')]
    assert list(csv_lines(answers, space, 2)) == [
        "image,error,'=head,'=head_probability,'=head_2,'=head_2_probability",
        "'-x\x1b[31m.png,,'=1+1,0.5,,", 'y,"bad, indeed",,,,']
    assert list(table_lines(answers, space, 1)) == [
        'image        =head', '-x [31m.png  =1+1 0.500', 'y            error: bad, indeed']
    assert json.loads(list(json_lines(answers, space, 1))[0]) == {
        'image': '-x\x1b[31m.png', 'heads': {'=head': [{'label': '=1+1', 'probability': 0.5}]}}
    nan = ImagePrediction('z', {'=head': [Guess('unknown', float('nan'))]})
    assert json.loads(next(json_lines([nan], space, 1)))['heads']['=head'][0]['probability'] is None
    with pytest.raises(UserError, match="called 'a_probability'"):
        csv_columns(LabelSpace((LabelSet('a', ('x',)), LabelSet('a_probability', ('x',)))), 1)


@pytest.mark.slow
def test_bad_input_is_one_line(trained, tmp_path, capsys):
    image, out = trained.images / '0.png', tmp_path / 'p.csv'
    out.write_text('kept')
    for words, message in [
        ([trained.checkpoint, image, '--out', out], 'p.csv: is there already; name another, or overwrite it with'),
        ([trained.checkpoint, image, '--out', tmp_path / 'p.txt'], 'name the format with --format'),
        ([trained.checkpoint, image, '--out', tmp_path, '--format', 'csv'], 'is a folder'),
        ([trained.checkpoint, image, '--threshold', 'size=0.5'], "threshold of 'size': the checkpoint has no such"),
        ([trained.checkpoint, image, '--threshold', '2'], 'out of range'),
        ([trained.checkpoint, image, '--threshold', '=0.5'], 'not of the form T or HEAD=T'),
        ([trained.checkpoint, image, '--top-k', '0'], 'out of range'),
        ([trained.checkpoint, tmp_path / '*.gif'], 'no file matches'),
        ([image, image], 'cannot be loaded as a checkpoint'),
        ([tmp_path / 'none', image], 'no such checkpoint'),
        ([trained.checkpoint, image, '--device', 'toaster'], '--device toaster'),
        ([trained.checkpoint], 'required: IMAGES...'),
    ]:
        assert message in fails(capsys, 'predict', words)
    assert out.read_text() == 'kept' and sorted(os.listdir(tmp_path)) == ['p.csv']
    assert command(trained.checkpoint, image, '--out', out, '--force') == 0
    assert out.read_text().startswith('image,error,color')


@pytest.mark.slow
def test_a_checkpoint_without_heads(trained, tmp_path, capsys):
    run = train_run(trained.data, tmp_path, '-wlc', '0', epochs=1)
    assert 'no heads to predict with' in fails(capsys, 'predict', [run / 'last.pth.tar', trained.images / '0.png'])


@pytest.mark.slow
def test_a_reader_that_leaves(trained):
    words = [sys.executable, '-c', 'from timm_multilabel.cli.main import main; main()', 'predict', trained.checkpoint,
             *[trained.images / '0.png'] * 500, '--format', 'csv', '--device', 'cpu', '-b', '8', '-j', '0']
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b'image,error')
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 1
