"""Every command and every Python block of the README and the documentation runs, page by page, on tiny data.

A page's blocks run from top to bottom in one folder that holds what docs/ calls `my-photos`, `my-shop`, `my-classes`,
`more-photos`, `output/train/tiny` and so on. Training has tiny sizes behind the page's flags, which are parsed as they
stand. A block
below `<!-- not run: why -->` is only counted: `python -m tests.test_docs` prints how many there are.
"""
import contextlib
import functools
import http.server
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import timm_multilabel as tm
from tests.browser import CHROMIUM, browser
from tests.test_convert import celeba, coco, task
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.cli.main import run_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
TINY = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '1', '--epoch-steps', '2', '-j', '0',
        '--device', 'cpu', '--no-pretrained', '--warmup-epochs', '0', '--cooldown-epochs', '0']
BLOCK = re.compile(r'((?:^[ ]*<!--.*?-->\n)?)^([ ]*)```(bash|python)\n(.*?)^[ ]*```$', re.M | re.S)
SCRIPTS = {'train.py': 'train', 'validate.py': 'validate'}


@dataclass
class Block:
    language: str
    text: str
    note: str  # of the comment above it

    @property
    def left_out(self) -> str | None:
        """Why it does not run, or None."""
        found = re.search(r'not run: (.*?) -->', self.note)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that are commands or Python."""
    return [Block(language, re.sub(f'^{indent}', '', text, flags=re.M), note)
            for note, indent, language, text in BLOCK.findall(page.read_text(encoding='utf-8'))]


def commands_of(text: str) -> Iterator[str]:
    """The commands of a block of bash, a line each, without comments."""
    for line in text.replace('\\\n', ' ').splitlines():
        line = re.sub(r'(^|\s)#.*', '', line)
        yield from (part.strip() for part in line.split('&&') if part.strip())


def run_line(line: str) -> None:
    """Run one command of a page in this process, or check it where it would change the environment."""
    if '|' in line and 'timm-multilabel' in line:
        line, source = line.split('|', 1)[1], line.split('|', 1)[0]
        given = subprocess.run(['bash', '-c', source], capture_output=True, check=True).stdout
    else:
        given = b''
    words = shlex.split(line.replace('\n', ' '))
    while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
        del words[0]
    output = None
    if '>' in words:
        output = Path(words[words.index('>') + 1])
        del words[words.index('>'):]
    if words[0] == 'timm-multilabel' or words[:3] == ['python', '-m', 'timm_multilabel']:
        name, *arguments = words[1 if words[0] == 'timm-multilabel' else 3:]
    elif words[0] == './distributed_train.sh':
        name, arguments = 'train', words[2:]
    elif words[0] == './distributed_run.sh':
        name, arguments = words[2], words[3:]
    elif words[0] == 'python' and words[1] in SCRIPTS:
        name, arguments = SCRIPTS[words[1]], words[2:]
    elif words[:2] == ['pip', 'install']:
        return check_extras(line)
    elif words[:3] == ['python3', '-m', 'venv'] or words[0] == '.':  # .ci/run makes and enters such an environment
        return None
    elif words[0] in ('cd', 'mkdir', 'cp', 'ls', 'cat', 'mv', 'rm'):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return None
    elif words[0] == 'python' and words[1].startswith('examples/'):
        cut = ['--model', 'test_resnet', '--img-size', '32', '--batch-size', '8', '--epochs', '1', '--device', 'cpu']
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sys, 'argv', [*words[1:], *cut])
            runpy.run_path(words[1], run_name='__main__')
        return None
    else:
        raise AssertionError(f'{line}: no command that a page may have')
    if name not in COMMANDS:
        assert name in ('--help', '--version'), line
        return None
    run_words(name, arguments, given, output)
    return None


def run_words(name: str, arguments: list[str], given: bytes, output: Path | None) -> None:
    """Run one of our commands in this process, with tiny sizes; exit status 0, or 1 of a check that finds something."""
    flags = {flag for made in COMMANDS[name].settings().values() for flag in made.options}
    cut = TINY if name == 'train' else ['-j', '0', '--device', 'cpu']
    if name == 'grid':
        arguments = [*arguments, *([] if '--flags' in arguments else ['--flags']), *TINY]
    elif name == 'sample':
        arguments = [*arguments, '--train', '96', '--val', '48', '--test', '48', '--unlabelled', '16', '--size', '32']
    elif name == 'probe':
        text = re.sub(r'--model \S+|--pretrained-path \S+', '', shlex.join(arguments))
        models = ['--model', 'test_resnet'] * max(1, arguments.count('--model'))
        arguments = [*shlex.split(text), *models, '--no-pretrained', '--img-size', '32', '--epochs', '1', '-j', '0',
                     '--device', 'cpu', '--cache-dir', 'cache']
    else:
        known = {'-j', '--device'} <= flags
        arguments = [*arguments, *(cut if known else [])]
    out, old = io.TextIOWrapper(io.BytesIO()), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(given))
    errors, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                run_command(name, f'timm-multilabel {name}', arguments)
            except SystemExit as stop:
                status = stop.code
    finally:
        sys.stdin = old
    assert status == 0 or (name == 'check' and status == 1), f'{name} {shlex.join(arguments)}\n{errors.getvalue()}'
    if output is not None:
        out.flush()
        output.write_bytes(out.buffer.getvalue())


def check_extras(line: str) -> None:
    """An extra that a page installs is one of the package."""
    extras = metadata('timm-multilabel').get_all('Provides-Extra')
    for found in re.findall(r'\.\[([\w,]+)\]', line):
        assert set(found.split(',')) <= set(extras), line
    assert '.[' in line or ' .' in line or 'timm-multilabel' not in line, f'{line}: not from an index yet'


def write_table(folder: Path, name: str, rows: int, columns: dict[str, list[str]], first: int) -> None:
    """A table of photos that are drawn."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    table = {'image_path': []}
    for number in range(first, first + rows):
        path = f'images/{number}.jpg'
        shade = {'Blue': (40, 60, 210), 'Red': (200, 30, 30), 'NA': (120, 120, 120)}[('Blue', 'Red', 'NA')[number % 3]]
        Image.new('RGB', (48, 40), tuple((part + number) % 256 for part in shade)).save(folder / path)
        table['image_path'].append(path)
    for column, cells in columns.items():
        table[column] = [cells[number % len(cells)] for number in range(first, first + rows)]
    pd.DataFrame(table).to_csv(folder / f'{name}.csv', index=False)


@pytest.fixture(scope='session')
def folder_of_pages(tmp_path_factory):
    """What the pages find: data, photos, runs and the repository's own folders."""
    folder = tmp_path_factory.mktemp('docs')
    plain = {'gender': ['Men', 'Women'], 'article': ['Tshirts', 'Shoes', 'Bags', 'Shoes'],
             'color': ['Blue', 'Red', 'NA']}
    more = {'style': ['plain', 'plain|striped', 'dotted'], 'price': ['9.5', '20', '31.25', '15'],
            'size': ['S', 'M', 'L'], 'summer': ['1', '0'], 'winter': ['0', '1']}
    for name, columns in (('my-photos', plain), ('my-shop', plain | more)):
        for split, rows, first in (('train', 24, 0), ('val', 12, 100), ('test', 12, 200)):
            write_table(folder / name, split, rows, columns, first)
        write_table(folder / name, 'unlabelled', 64, {}, 300)  # a batch of the recipes for few labels
    for split in ('train', 'val'):
        for number, path in enumerate(sorted((folder / 'my-photos' / 'images').iterdir())[:16]):
            place = folder / 'my-classes' / split / ('boots', 'shoes')[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    celeba(folder / 'celeba', 'txt', each=16)
    coco(folder / 'coco', train=range(20, 40), val=range(40, 56))
    (folder / 'export.json').write_text(json.dumps([
        task(f'/data/local-files/?d=photos/{number}.jpg', color=[('red', 'blue')[number % 2]], style=['new', 'old'])
        for number in range(400, 412)]))
    for name in ('photos', 'more-photos', 'more'):
        write_table(folder / name, 'x', 12, {}, 400)
        for path in (folder / name / 'images').iterdir():
            path.rename(folder / name / path.name)
        (folder / name / 'images').rmdir()
        (folder / name / 'x.csv').unlink()
    for name in ('photo.jpg', 'query.jpg', 'a.jpg', 'b.jpg'):
        shutil.copy(folder / 'photos' / '400.jpg', folder / name)
    for name in ('recipes', 'experiments', 'examples', 'fashion-product-images', 'notebooks'):
        (folder / name).symlink_to(ROOT / name)
    with working_in(folder):
        for name, seed in (('tiny', '0'), ('tiny-seed1', '1'), ('other', '0')):
            flags = ['--lr', '0.01'] if name == 'other' else []
            run_words('train', ['my-photos', '--experiment', name, '--seed', seed, *flags], b'', None)
    return folder


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def tiny_training(monkeypatch):
    """`tm.train`, `tm.probe` and `tm.sample` with tiny sizes, for the Python of the pages."""
    def train(*args, **settings):
        return real(*args, **{**settings, **dict(
            model='test_resnet', img_size=32, batch_size=8, epochs=1, epoch_steps=2, workers=0, device='cpu',
            pretrained=False, warmup_epochs=0, cooldown_epochs=0, devices=1)})

    def sample(directory, **settings):
        return draw(directory, **{**settings, 'train': 96, 'val': 48, 'test': 48, 'unlabelled': 16, 'size': 32})

    def probe(data, model, **settings):
        models = ['test_resnet'] * (1 if isinstance(model, str) else len(model))
        return fit(data, models, **{**settings, **dict(
            pretrained=False, img_size=32, epochs=1, workers=0, device='cpu', cache_dir='cache')})

    real, draw, fit = tm.train, tm.sample, tm.probe
    monkeypatch.setattr(tm, 'probe', probe)
    monkeypatch.setattr(tm, 'train', train)
    monkeypatch.setattr(tm, 'sample', sample)


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if any(b.left_out is None for b in blocks_of(page))],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, folder_of_pages, tmp_path, monkeypatch, tiny_training):
    work = tmp_path / 'work'
    shutil.copytree(folder_of_pages, work, symlinks=True)
    monkeypatch.syspath_prepend(str(work))
    names: dict[str, object] = {'__name__': '__main__'}
    with working_in(work):
        for block in blocks_of(page):
            if block.left_out is not None or 'test command' in block.note:
                continue
            if 'custom head' in block.note:
                Path('my_heads.py').write_text(block.text)
            elif block.language == 'python':
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block.text, str(page), 'exec'), names)
            else:
                for line in commands_of(block.text):
                    run_line(line)


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md'])
def test_links_lead_somewhere(page):
    links = re.findall(r'(?:\]\(|src=")([^)"#:]+)[)"#]', (ROOT / page).read_text(encoding='utf-8'))
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The address of the documentation's site, built strictly: a page or a link that is not there is an error."""
    folder = tmp_path_factory.mktemp('site')
    built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', str(folder)], cwd=ROOT,
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here; apt-get install chromium')
def test_the_site_in_a_browser(site):
    pages = ('', 'get-started/sample-data/', 'how-to/own-labels/', 'reference/commands/train/', 'reference/python-api/',
             'explanation/loss/', 'experiments/few-labels/')
    with browser() as tab:
        for page in pages:
            for width in (390, 1280):
                tab.open(f'{site}/{page}', width)
                assert tab.evaluate('document.documentElement.scrollWidth') <= width, (page, width)
                assert tab.evaluate('document.images.length == 0 || [...document.images].every(i => i.alt)'), page
        foreign = ('performance.getEntriesByType("resource").map(entry => entry.name)'
                   '.filter(name => !name.startsWith(location.origin))')
        assert tab.evaluate(foreign) == []  # it works without a network
        tab.evaluate('document.querySelector("input[data-md-component=search-query]").focus()')
        tab.evaluate("""document.querySelector("input[data-md-component=search-query]").value = "labelled rows";
            document.querySelector("input[data-md-component=search-query]").dispatchEvent(new Event("keyup"))""")
        results = 'document.querySelectorAll(".md-search-result__item").length'
        for _ in range(100):
            if tab.evaluate(results):
                break
            time.sleep(0.1)
        assert tab.evaluate(results)
        assert not tab.complaints


if __name__ == '__main__':
    reasons = [block.left_out for page in PAGES for block in blocks_of(page)]
    print(f'{reasons.count(None)} blocks run, {len(reasons) - reasons.count(None)} do not:')
    for page in PAGES:
        for block in blocks_of(page):
            if block.left_out is not None:
                print(f'  {page.relative_to(ROOT)}: {block.left_out}')
