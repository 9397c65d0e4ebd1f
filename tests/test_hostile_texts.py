"""Texts that would do something to a terminal, a page, a spreadsheet or a picture: all show them as they are."""
import csv
import io
import json
import os
import pty
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from common import train_run, write_data
from PIL import Image
from test_cli import fails

from timm_multilabel.cli.main import guarded, run_command
from timm_multilabel.cli.output import PrintedStream, print_traceback
from timm_multilabel.errors import UserError, shortened
from timm_multilabel.escaping import markdown_code, markdown_text, spreadsheet_text, spreadsheet_text_back
from timm_multilabel.exports.card import model_card
from timm_multilabel.exports.exportable import Exportable, describe
from timm_multilabel.heads import SoftmaxHead
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.inference.neighbours import nearest
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.reports.confusion import write_confusion
from timm_multilabel.reports.experiment_pages import (
    Experiments,
    experiments_csv,
    experiments_html,
    experiments_markdown,
)
from timm_multilabel.reports.experiments import Run
from timm_multilabel.reports.grid import GridResults, draw_grid, grid_markdown
from timm_multilabel.reports.pictures import png
from timm_multilabel.training.checkpoint import load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

HEADS = ('<img src=x onerror=alert(1)>', '"><script>alert(2)</script>', r'=HYPERLINK("http://a")', r'$\frac{}{}$|`b`')
CLASSES = ('\x1b]0;title\x07\x1b[31mred', 'a\nfake: 100.0 % right', '\u202egnp.exe',
           '</title><script>alert(3)</script>', '=1+1', r'$\frac{}{}$', 'a\rb\x9b2J')
CONTROLS = [letter for letter in map(chr, [*range(32), *range(127, 160), 0x202e, 0x2066, 0x2028, 0x200f])
            if letter not in '\n\t']


def write_hostile(folder):
    """A data directory whose columns and labels are hostile."""
    write_data(folder, train=14, val=7)
    for split, first, rows in (('train', 0, 14), ('val', 14, 7)):
        with open(folder / f'{split}.csv', 'w', encoding='utf-8', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['image_path', *HEADS])
            for row in range(rows):
                color = (17 * row, 255 - 17 * row, 97 * row % 256)  # enough that differ for a map
                Image.new('RGB', (32, 32), color).save(folder / f'images/{first + row}.png')
                writer.writerow([f'images/{first + row}.png', *[CLASSES[row % len(CLASSES)]] * len(HEADS)])
    return folder


NAME = '=<b onclick=x>|`run` $\\frac{}{}$'


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    """A run of such data, in a folder of a hostile name."""
    folder = tmp_path_factory.mktemp('hostile')
    data = write_hostile(folder / 'data')
    train_run(data, folder, '--experiment', NAME, epochs=1)
    return folder / NAME, data


def printed(capsys, command, *words):
    """What a command prints in this process."""
    capsys.readouterr()
    run_command(command, 'x', list(map(str, words)))
    out, err = capsys.readouterr()
    assert not set(CONTROLS) & set(out + err)
    return out


class Elements(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert name not in ('src', 'href') or value.startswith(('data:image/', '#'))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
def test_the_report_holds_no_element_but_its_own(hostile, tmp_path, capsys):
    run, _ = hostile
    out = printed(capsys, 'report', run, '--out', tmp_path / 'r.html', '-j', 0, '--device', 'cpu')
    assert out.count('\n') <= 3
    page = (tmp_path / 'r.html').read_text(encoding='utf-8')
    found = Elements(page)
    assert found.tags == {
        'html', 'head', 'meta', 'title', 'style', 'body', 'header', 'h1', 'dl', 'div', 'dt', 'dd', 'nav', 'a', 'main',
        'section', 'h2', 'h3', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'span', 'p', 'img', 'svg',
        'circle', 'input', 'label', 'ul', 'li', 'details', 'summary', 'pre'}
    assert found.attributes == {
        'lang', 'charset', 'name', 'content', 'http-equiv', 'class', 'href', 'id', 'tabindex', 'scope',
        'colspan', 'src', 'alt', 'title', 'type', 'checked', 'for', 'viewbox', 'role', 'aria-label', 'cx', 'cy', 'r',
        'style'}
    text = ''.join(found.text)
    assert all(name in text for name in HEADS) and '<script>alert(3)' in text and NAME in text
    assert not set(CONTROLS) & set(page)


def test_the_comparison_shows_names_as_they_are(hostile, tmp_path, capsys):
    run, _ = hostile
    printed(capsys, 'compare', run, '--out', tmp_path, '-j', 0, '--device', 'cpu')
    found = Elements((tmp_path / 'experiments.html').read_text(encoding='utf-8'))
    assert found.tags == {'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'div', 'table', 'thead', 'tbody',
                          'tr', 'th', 'td', 'span', 'ul', 'li'}
    assert found.attributes == {'lang', 'charset', 'name', 'content', 'class', 'scope'}
    header, line, row = (tmp_path / 'experiments.md').read_text(encoding='utf-8').split('\n')[:3]
    assert len(header) == len(line) == len(row)
    assert r'\<script\>alert(2)\</script\>' in header and r'\$\\frac\{\}\{\}\$\|\`b\`' in header
    with open(tmp_path / 'experiments.csv', encoding='utf-8', newline='') as file:
        cells = [cell for cells in csv.reader(file) for cell in cells]
    assert f"'{NAME}" in cells and not any(cell.lstrip().startswith(tuple('=+-@')) for cell in cells)


def test_settings_and_remarks_of_runs(tmp_path):
    texts = ['<script>x</script>', 'a|b\nc', '`', '\x1b[31m', '=1', ' @x', '\u202ex', 'www.a.com', 'http://a', '_b_']
    runs = [Run(f'r{number}', {f'--{text}': text}, '0', 1, 1) for number, text in enumerate(texts)]
    made = Experiments(runs, [[number] for number in range(len(runs))], 0, [], texts)
    page = experiments_html(made)
    assert 'script' not in Elements(page).tags and not set(CONTROLS) & set(page)
    text = experiments_markdown(made)
    assert not set(CONTROLS) & set(text) and '<' not in text.replace(r'\<', '')
    assert len({line.count('|') - line.count(r'\|') for line in text.split('\n') if line.startswith('| ')}) == 1
    for cells in csv.reader(io.StringIO(experiments_csv(made))):
        assert not any(cell.strip().startswith(tuple('=+-@')) for cell in cells)


@pytest.mark.slow
def test_validation_prints_and_writes_names_as_they_are(hostile, tmp_path, capsys):
    run, data = hostile
    out = printed(capsys, 'validate', data, '--checkpoint', run / 'last.pth.tar', '-j', 0, '--device', 'cpu',
                  '--confusion', tmp_path / 'c', '--results-file', tmp_path / 'r.csv')
    assert all(name in out for name in HEADS) and 'fake' not in out
    assert sorted(os.listdir(tmp_path / 'c'))[0] == 'confusion-_HYPERLINK_http_a_.csv' and len(
        os.listdir(tmp_path / 'c')) == 8
    rows = list(csv.reader(io.StringIO((tmp_path / 'r.csv').read_text())))
    assert rows[3][0] == f"'{HEADS[2]}"
    with open(tmp_path / 'c/confusion-_HYPERLINK_http_a_.csv', encoding='utf-8', newline='') as file:
        names = [row[0] for row in csv.reader(file)][1:]
    assert sorted(map(spreadsheet_text_back, names)) == sorted(CLASSES)  # whole, as in the data


@pytest.mark.slow
def test_predictions_are_data_in_a_pipe_and_printable_for_people(hostile, tmp_path, capsys):
    run, data = hostile
    words = [run / 'last.pth.tar', data / 'images/0.png', '--top-k', 9, '-j', 0, '--device', 'cpu']
    out = printed(capsys, 'predict', *words)
    assert out.count('\n') == 2
    for form in ('csv', 'jsonl'):
        run_command('predict', 'x', [*map(str, words), '--out', str(tmp_path / f'p.{form}')])
        capsys.readouterr()
        run_command('predict', 'x', [*map(str, words), '--format', form])
        assert capsys.readouterr().out.encode() == (tmp_path / f'p.{form}').read_bytes()
    _, row = csv.reader(io.StringIO((tmp_path / 'p.csv').read_bytes().decode(), newline=''))
    assert {spreadsheet_text_back(cell) for cell in row[2:16:2]} == set(CLASSES)


COMMANDS = """import json, sys
from timm_multilabel.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    print('status', status)
"""


def on_a_terminal(*commands):
    """What commands write to a terminal, each with its exit status."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', COMMANDS, json.dumps([[*map(str, words)] for words in commands])],
        stdin=subprocess.DEVNULL, stdout=side, stderr=side, env={**os.environ, 'COLUMNS': '100', 'TERM': 'xterm'})
    os.close(side)
    parts = []
    try:
        while part := os.read(main, 65536):
            parts.append(part)
    except OSError:  # what Linux says at the end of a terminal
        pass
    os.close(main)
    assert process.wait() == 0
    return b''.join(parts).decode()


@pytest.mark.slow
def test_on_a_terminal_nothing_is_obeyed(hostile):
    run, data = hostile
    checkpoint, common = run / 'last.pth.tar', ['--device', 'cpu', '-j', 0]
    text = on_a_terminal(
        ['validate', data, '--checkpoint', checkpoint, *common],
        ['predict', checkpoint, data / 'images/0.png', '--format', 'csv', *common],
        ['validate', data, '--checkpoint', 'no\x1b[31m\nsuch\u202e'],
        ['validate', data, '--checkpoint', checkpoint, '--x\x1b[31m'])
    assert not (set(CONTROLS) - {'\r'}) & set(text)
    assert [line for line in text.split('\r\n') if line.startswith('status')] == [
        'status 0', 'status 0', 'status 2', 'status 2']
    assert '\ntimm-multilabel validate: error: no [31m such : no such checkpoint\r\n' in text
    assert 'unrecognized arguments: --x [31m' in text


def test_streams_are_printable_and_never_fail(monkeypatch):
    raw = io.TextIOWrapper(io.BytesIO(), encoding='ascii', newline='')
    stream = PrintedStream(raw)
    print('\x1b[31mred\x9bm\u202e', 'tab\t', 'é', 'a\rb', file=stream)
    stream.write('\r 50 %\r')
    stream.flush()
    assert raw.buffer.getvalue() == b' [31mred m  tab\t \\xe9 a b\n\r 50 %\r'
    written = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', written)
    try:
        raise RuntimeError('of \x1b[31mtorch')
    except RuntimeError as error:
        print_traceback(type(error), error, error.__traceback__)
    assert written.getvalue().endswith('RuntimeError: of  [31mtorch\n')


def test_progress_says_one_line(capsys):
    with guarded('x'), ProgressBar('Validate a\nb', 2, visible=True) as progress:
        progress.show(1, 'head\nfake')
        progress.say('x\ny\x1b')
    assert [line.split('  ')[0] for line in capsys.readouterr().out.split('\n')] == ['Validate a b', 'x y ', '']


@pytest.mark.parametrize('text', ['=1', '+1', '-1', '@x', ' =1', '\t=1', '\ufeff=1', '\n@', '\uff1d1', "'=1", "''-1",
                                  '\x00=1'])
def test_formulas_are_texts_in_spreadsheets(text):
    assert spreadsheet_text(text) == f"'{text}" and spreadsheet_text_back(f"'{text}") == text


@pytest.mark.parametrize('text', ['a=1', "'tis", '', ' a', "'", '1-1'])
def test_other_texts_stay(text):
    assert spreadsheet_text(text) == text == spreadsheet_text_back(text)


def test_markdown_shows_texts_as_they_are():
    assert markdown_text('a_b _x_ *y* [l](u) <b> `c` | ~s~ $m$ &lt; @who #1 www.a.com http://a :smile:\n') == (
        r'a_b \_x\_ \*y\* \[l\](u) \<b\> \`c\` \| \~s\~ \$m\$ &lt; @who #1 www.a.com http://a :smile: '
        .replace('&lt', r'\&lt').replace('@who', r'\@who').replace('#1', r'\#1').replace('www.', r'www\.')
        .replace('http:', r'http\:').replace(':smile', r'\:smile'))
    assert [markdown_code(text) for text in ('a', 'a`b', '`', 'a\nb')] == ['`a`', '``a`b``', '`` ` ``', '`a b`']


def test_a_grid_of_hostile_names(tmp_path):
    names = ['base `x`', '<img src=x>', r'_$\frac{}{}$', '=1|2']
    rows = [{'setting': name, 'seed': 0, HEADS[0]: 50.0, 'mean': 50.0, 'minutes': 1.0, 'cpu_minutes': 1.0,
             'commit': '<b>', 'machine': '`m`', 'torch': '2', 'command': 'grid `<b>`'} for name in names]
    results = GridResults(names[1], 'See <script>x</script> of [this](https://a) where a < b.', 'v*l', None, names,
                          pd.DataFrame(rows), pd.DataFrame(), {HEADS[0]: SoftmaxHead.metric('top1')})
    text = grid_markdown(results)
    assert 'See &lt;script>x&lt;/script> of [this](https://a) where a &lt; b.' in text and 'v\\*l' in text
    assert '``grid `<b>` ``' in text.replace('`` grid', '``grid') and r'commit \<b\>; machine \`m\`' in text
    assert png(draw_grid(results)).startswith(b'\x89PNG')


@pytest.mark.parametrize('name', ['a\nb', '\x1b[31m', '\u202ea'])
def test_names_of_heads_in_files_are_printable(name):
    space = LabelSpace((LabelSet('a', ('x\ny',)),)).to_dict()
    assert LabelSpace.from_dict(space).heads[0].classes == ('x\ny',)  # classes may hold anything
    space['heads'][0]['name'] = name
    with pytest.raises(ValueError, match='control characters'):
        LabelSpace.from_dict(space)


def test_the_card_shows_names_as_they_are(hostile):
    run, _ = hostile
    checkpoint = read_checkpoint(run / 'last.pth.tar')
    checkpoint.data_config['crop_mode'] = '<script>x</script>\n# fake'
    model = load_model(checkpoint, 'plain')
    card = model_card(Exportable(checkpoint, model, describe(checkpoint, 'plain', model), None), None)
    assert '<' not in card.replace(r'\<', '') and '\n# fake' not in card and not set(CONTROLS) & set(card)


# A label of 10 MB


LONG = 'long ' * 2_000_000


@pytest.mark.slow
def test_long_texts_are_shortened_for_people_and_whole_in_data(tmp_path):
    assert shortened('a' * 81) == 'a' * 79 + '\u2026' and shortened('a' * 80) == 'a' * 80
    assert len(UserError(f'{LONG}: wrong; take another').line) < 4100
    assert UserError(f'{LONG}: wrong; take another').line.endswith('wrong; take another')
    labels = LabelSet(LONG, (LONG, LONG + 'b', 'c'))
    target = np.array([[0], [1], [2.]])
    write_confusion(tmp_path, 'c', labels, target, target[::-1])
    assert (tmp_path / 'c.png').stat().st_size < 200_000
    assert LONG in (tmp_path / 'c.csv').read_text()


# What is not finite


@pytest.fixture(scope='module')
def diverged(tmp_path_factory):
    """A run, and its checkpoint with weights of NaN and with finite ones whose outputs overflow."""
    folder = tmp_path_factory.mktemp('diverged')
    data = write_data(folder / 'data')
    run = train_run(data, folder, epochs=1)
    for name, value in (('nan', float('nan')), ('overflow', 1e38)):
        state = torch.load(run / 'last.pth.tar', weights_only=True)
        for weights in (state['state_dict'], state.get('state_dict_ema', {})):
            for key, tensor in weights.items():
                if tensor.is_floating_point() and 'running' not in key:
                    tensor.fill_(value)
        torch.save(state, folder / f'{name}.pth.tar')
    return folder, data


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nan', 'overflow'])
def test_outputs_that_are_not_finite_are_one_line(diverged, tmp_path, capsys, name):
    folder, data = diverged
    path, image = folder / f'{name}.pth.tar', data / 'images/0.png'
    line = f'{path}: its outputs are not finite (did training diverge?); take another checkpoint'
    common = ['--device', 'cpu', '-j', 0]
    for command, words in [
            ('predict', [path, image, '--out', tmp_path / 'p.csv']), ('predict', [path, image, '--format', 'jsonl']),
            ('embed', [path, image, '--out', tmp_path / 'e.npz']),
            ('validate', [data, '--checkpoint', path, '--results-file', tmp_path / 'r.json']),
            ('validate', [data, '--checkpoint', path, '--knn', 2]),
            ('report', [folder / 'run', '--checkpoint', path, '--out', tmp_path / 'r.html']),
            ('export', [path, '--images', image, '--out', tmp_path / 'x'])]:
        assert line in fails(capsys, command, [*words, *(common if command != 'export' else [])])
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_vectors_that_are_none(tmp_path):
    maker = {'arch': 'a', 'what': 'features', 'weights': 'plain', 'digest': 'd'}
    vectors = np.array([[1, 2], [np.nan, 0]], np.float32)
    Embeddings(np.array(['a', 'b'], object), vectors, maker).save(tmp_path / 'e.npz')
    with pytest.raises(UserError, match='not finite'):
        Embeddings.load(tmp_path / 'e.npz')
    bank = torch.tensor([[0.0, 0], [1e30, 1e30], [1e-30, 0]])
    cosines, indices = nearest(torch.tensor([[2e30, 2e30], [0, 0]]), bank, 3)
    assert indices[0].tolist() == [1, 2, 0]
    torch.testing.assert_close(cosines, torch.tensor([[1, 0.5 ** 0.5, 0], [0, 0, 0]]))


def test_stored_predictions_that_are_not_whole(tmp_path):
    space = LabelSpace((LabelSet('a', ('x', 'y')),))
    good = dict(label_space=space, rows=np.array(['r']), images=np.array(['i']), targets=np.zeros((1, 1), np.float32),
                outputs={'a': np.ones((1, 2), np.float32)}, features=np.zeros((1, 3), np.float32))
    Predictions(**good).save(tmp_path / 'p.npz')
    assert len(Predictions.load(tmp_path / 'p.npz')) == 1
    for name, value in [('outputs', {'a': np.full((1, 2), np.nan, np.float32)}),
                        ('outputs', {'a': np.ones((1, 3), np.float32)}), ('targets', np.full((1, 1), 2, np.float32)),
                        ('features', np.zeros((), np.float32)), ('images', np.zeros(1)),
                        ('rows', np.array(['r', 's']))]:
        with pytest.raises(UserError, match='cannot be written, since predictions of this model cannot be kept'):
            Predictions(**{**good, name: value}).save(tmp_path / 'p.npz')
