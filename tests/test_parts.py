"""`predict` and `embed` in Parquet parts: one process and several, a kill and a resume, what is refused, search."""
import json
import os
import shutil
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
import torch
from common import run_ranks, train_run, write_data
from PIL import Image
from processes import Forked
from test_cli import fails

import timm_multilabel as tm
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.arguments import rows_of_arguments
from timm_multilabel.errors import UserError
from timm_multilabel.inference.approximate import nearest_approximately
from timm_multilabel.inference.embedding_parts import open_embeddings
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.inference.neighbours import nearest, nearest_of
from timm_multilabel.inference.parts import PartsFolder, Plan
from timm_multilabel.loading.sampling import BatchesInOrder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Photos of noise in a table of 22 rows, of which row 9 is broken, and two checkpoints with all kinds of heads."""
    folder = tmp_path_factory.mktemp('trained')
    data = write_data(folder / 'data')
    rng = np.random.default_rng(0)
    for path in sorted((data / 'images').iterdir()):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    for split in ('train', 'val'):
        table = pd.read_csv(data / f'{split}.csv')
        table['style'], table['price'] = [('a|b', 'b')[row % 2] for row in table.index], table.index + 0.5
        table.to_csv(data / f'{split}.csv', index=False)
    flags = ['--head', 'style:loss=tags', 'price:loss=numeric']
    runs = {name: train_run(data, folder / name, *flags, '--seed', seed, epochs=1) / 'last.pth.tar'
            for name, seed in (('checkpoint', '0'), ('other', '1'))}
    (data / 'images' / 'broken.png').write_bytes(b'no image')
    paths = [f'images/{number % 18}.png' for number in range(22)]
    paths[7] = 'images/broken.png'
    pd.DataFrame({'image_path': paths}).to_csv(data / 'many.csv', index=False)
    return SimpleNamespace(data=data, many=data / 'many.csv', folder=folder, **runs)


def run(command, *argv):
    """Run a command; its exit status."""
    try:
        run_command(command, command, [*map(str, argv), '-j', '0', '--device', 'cpu'])
    except SystemExit as stop:
        return stop.code
    return 0


def contents(folder):
    """What a folder of parts holds: its bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_on_rank(rank, command, words, log):
    with open(f'{log}-{rank}', 'a') as file, redirect_stdout(file), redirect_stderr(file):
        return run(command, *words)


@pytest.mark.parametrize('command, ranks', [('embed', (2, 4)), ('predict', (2,))])
def test_several_processes_make_the_same_parts(trained, tmp_path, command, ranks, capsys):
    flags = ['--part-rows', 4, '-b', 3, *(['--top-k', 2] if command == 'predict' else [])]
    one = tmp_path / 'one'
    assert run(command, trained.checkpoint, trained.many, '--out', f'{one}/', *flags) == 1
    out, errors = capsys.readouterr()
    assert '21 images' in out and '1 of 22 images could not be read' in errors
    assert ('broken.png' in errors) == (command == 'embed')
    expected = contents(one)
    assert sorted(expected) == ['_manifest.json', '_plan.json', *(f'part-0000{n}-of-00006.parquet' for n in range(6))]
    for number in ranks:
        folder = tmp_path / f'of-{number}'
        words = [trained.checkpoint, trained.many, '--out', f'{folder}/', *flags]
        assert run_ranks(run_on_rank, number, command, words, tmp_path / 'log', join=False) == [1, *[0] * (number - 1)]
        assert contents(folder) == expected
        assert '21 images' in (tmp_path / 'log-0').read_text() and not (tmp_path / 'log-1').read_text()


def test_embeddings_in_parts_are_those_of_a_file(trained, tmp_path):
    words = [trained.checkpoint, trained.many, '-b', 4]
    assert run('embed', *words, '--out', f'{tmp_path}/parts/', '--part-rows', 8) == 1
    assert run('embed', *words, '--out', tmp_path / 'one.npz') == 1
    bank, one = open_embeddings(tmp_path / 'parts'), Embeddings.load(tmp_path / 'one.npz')
    assert len(bank) == 21 and bank.width == one.width and bank.made_by == one.made_by
    whole = bank.whole()
    assert whole.images.tolist() == one.images.tolist() and np.array_equal(whole.vectors, one.vectors)
    assert bank.names(np.array([[20, 0], [7, 7]])).tolist() == one.images[[[20, 0], [7, 7]]].tolist()
    part = Embeddings.load(tmp_path / 'parts' / 'part-00002-of-00003.parquet')  # a file of embeddings itself
    assert part.images.tolist() == one.images[15:].tolist()
    frame = pd.read_parquet(tmp_path / 'parts')  # other programs pass over the files that begin with _
    assert frame['image'].tolist() == one.images.tolist()
    assert np.array_equal(np.stack(frame['embedding']), one.vectors)
    manifest = json.loads((tmp_path / 'parts' / '_manifest.json').read_text())
    assert (manifest['images'], manifest['rows'], manifest['bad'], manifest['part_rows']) == (22, 21, 1, 8)
    assert [part['rows'] for part in manifest['parts']] == [7, 8, 6] and manifest['made_by'] == one.made_by
    assert manifest['columns'] == {'image': 'string', 'embedding': f'fixed_size_list<element: float>[{one.width}]'}


def test_predictions_in_parts_are_those_of_a_file(trained, tmp_path):
    words = [trained.checkpoint, trained.many, '-b', 4, '--top-k', 2]
    assert run('predict', *words, '--out', f'{tmp_path}/parts/', '--part-rows', 8) == 1
    assert run('predict', *words, '--out', tmp_path / 'one.jsonl') == 1
    assert run('predict', *words, '--out', tmp_path / 'one.csv') == 1
    frame = pd.read_parquet(tmp_path / 'parts')
    assert frame.columns.tolist() == pd.read_csv(tmp_path / 'one.csv').columns.tolist()
    lines = [json.loads(line) for line in (tmp_path / 'one.jsonl').read_text().splitlines()]
    assert frame['image'].tolist() == [line['image'] for line in lines] and len(lines) == 22
    assert frame['error'][7] == lines[7]['error'] and frame.drop(columns=['image', 'error']).iloc[7].isna().all()
    for row, line in enumerate(lines):
        for head, guesses in line.get('heads', {}).items():
            cells = frame.iloc[row]
            if head == 'price':
                assert cells[head] == pytest.approx(guesses[0]['value'], rel=1e-5)
            elif head == 'style':
                assert cells[head].tolist() == [guess['label'] for guess in guesses]
                assert cells[f'{head}_probability'] == pytest.approx([guess['probability'] for guess in guesses])
            else:
                for guess, end in zip(guesses, ('', '_2'), strict=True):
                    assert cells[f'{head}{end}'] == guess['label']
                    assert cells[f'{head}{end}_probability'] == pytest.approx(guess['probability'], rel=1e-5)


def test_parts_with_images_that_could_not_be_read_are_made_again(trained, tmp_path):
    words = [trained.checkpoint, trained.many, '-b', 4, '--part-rows', 8, '--out', f'{tmp_path}/parts/']
    assert run('embed', *words) == 1
    paths = sorted((tmp_path / 'parts').glob('part-*'))
    before = {path.name: path.stat().st_mtime_ns for path in paths}
    bad = [part['bad'] for part in json.loads((tmp_path / 'parts' / '_manifest.json').read_text())['parts']]
    assert run('embed', *words) == 1
    again = [path.stat().st_mtime_ns != before[path.name] for path in paths]
    assert again == [number > 0 for number in bad] and sum(again) == 1


def test_sizes_of_parts_without_parts_are_refused(trained, tmp_path, capsys):
    for command, name in (('embed', 'one.npz'), ('predict', 'one.csv')):
        line = fails(capsys, command, [trained.checkpoint, trained.many, '--out', tmp_path / name, '--part-rows', '8'])
        assert '--part-rows would change nothing: --out names no folder' in line


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_processes(trained, tmp_path, capsys):
    """No row is lost or doubled, and parts that were finished are not made again."""
    table, words = tmp_path / 'long.csv', [trained.checkpoint, tmp_path / 'long.csv', '--part-rows', 4, '-b', 2]
    paths = [trained.data / 'images' / f'{number % 18}.png' for number in range(202)]
    pd.DataFrame({'image_path': paths}).to_csv(table, index=False)
    folder, whole = tmp_path / 'killed', tmp_path / 'whole'
    process = Forked(['-m', 'timm_multilabel', 'embed', *words, '--out', f'{folder}/', '-j', '0', '--device', 'cpu'],
                     tmp_path / 'log')
    deadline = time.monotonic() + 300
    while len(list(folder.glob('part-*'))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, (tmp_path / 'log').read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.glob('part-*')}
    assert 3 <= len(before) < 51 and not (folder / '_manifest.json').exists()
    image = trained.data / 'images' / '0.png'
    line = fails(capsys, 'search', [folder, image, '--checkpoint', trained.checkpoint, '--device', 'cpu'])
    assert 'its parts are not finished; run the same command once more' in line

    first = min(before)
    first.write_bytes(first.read_bytes()[:-9])  # a damaged part is made again
    del before[first]
    words += ['--out', f'{folder}/']
    assert run_ranks(run_on_rank, 2, 'embed', words, tmp_path / 'log', join=False) == [0, 0]
    assert f'{len(before)} of 51 parts are there already' in (tmp_path / 'log-0').read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run('embed', *words[:-1], f'{whole}/') == 0
    assert contents(folder) == contents(whole)
    assert parquet.read_table(whole)['image'].to_pylist() == list(map(str, paths))


def test_what_is_refused(trained, tmp_path, capsys):
    folder = tmp_path / 'parts'
    words = [trained.checkpoint, trained.data / 'val.csv', '--out', f'{folder}/', '--part-rows', 4]
    tail = ['-j', 0, '--device', 'cpu']
    assert run('predict', *words) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.glob('part-*')}
    capsys.readouterr()
    assert run('predict', *words) == 0  # all is there
    assert '2 of 2 parts are there already' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for changed, message in [
            ([trained.other, *words[1:]], 'another checkpoint (test_resnet, '),
            ([words[0], trained.data / 'train.csv', *words[2:]], 'begun with other images (6 of them)'),
            ([*words[:-1], 5], 'begun with --part-rows 4'),
            ([*words, '--top-k', 2, '--threshold', 'color=0.5'], "--top-k 1, --threshold {}"),
            ([*words, '--format', 'csv'], 'is a folder, which gets Parquet parts; leave the format out')]:
        line = fails(capsys, 'predict', [*changed, *tail])
        assert message in line and ('start anew with --force' in line or 'format' in line)
    line = fails(capsys, 'embed', [*words, *tail])
    assert 'begun with predict' in line
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run('predict', *words, '--top-k', 2, '--force') == 0
    assert 'color_2' in pd.read_parquet(folder).columns

    (folder / 'notes.txt').write_text('kept')
    line = fails(capsys, 'predict', [*words, '--force', *tail])
    assert 'a folder with other files in it; name a new folder' in line and (folder / 'notes.txt').exists()
    (tmp_path / 'file').write_text('kept')
    assert 'is a file, not a folder' in fails(capsys, 'predict', [*words[:3], f'{tmp_path}/file/', *tail])
    line = fails(capsys, 'embed', [*words[:3], tmp_path / 'x', *tail])
    assert f'ends in .npz or .parquet, or a folder for parts: {tmp_path}/x/' in line
    pd.DataFrame({'image_path': [trained.data / 'images' / 'broken.png']}).to_csv(tmp_path / 'bad.csv', index=False)
    line = fails(capsys, 'embed', [trained.checkpoint, tmp_path / 'bad.csv', '--out', f'{tmp_path}/none/', *tail])
    assert 'none of 1 images can be read; the first: ' in line and not (tmp_path / 'none' / '_manifest.json').exists()


def _refused_on_rank(rank, command, words, folder):
    with open(folder / f'{command}-{rank}', 'w') as file, redirect_stderr(file):
        try:
            time.sleep = lambda seconds: None  # the second one waits for the launcher to end it
            run_command(command, command, [*map(str, words), '--device', 'cpu'])
        except SystemExit as stop:
            return stop.code


@pytest.mark.slow
@pytest.mark.parametrize('command, words, message', [
    ('embed', ['photos', '--out', 'e.npz'], 'pass --out e/, with the slash'),
    ('predict', ['photos'], 'pass --out FOLDER/, with the slash'),
    ('predict', ['-', '--out', 'p/'], 'cannot share standard input'),
])
def test_several_processes_write_no_single_file(trained, tmp_path, command, words, message):
    words = [trained.checkpoint, *words]
    assert run_ranks(_refused_on_rank, 2, command, words, tmp_path, join=False) == [2, 2]
    assert message in (tmp_path / f'{command}-0').read_text()


def test_commands_of_one_process_say_so(capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    assert 'this command runs in one; start it without torchrun' in fails(capsys, 'compare', ['a', 'b'])
    with pytest.raises(UserError, match='several processes were started'):
        tm.check('nowhere')


def test_a_folder_that_a_machine_does_not_see(tmp_path):
    parts = PartsFolder(tmp_path / 'elsewhere', Plan('embed', {}, {}, 9, '', 4))
    with pytest.raises(UserError, match='does not see this folder of the first process; name one that all machines'):
        parts.wait_for_plan(0)


def test_batches_stay_within_parts():
    batches = BatchesInOrder(22, 3, block=8)
    rows = [[draw.row for draw in batch] for batch in batches]
    assert [len(batch) for batch in rows] == [3, 3, 2, 3, 3, 2, 3, 3] and len(batches) == 8
    assert sum(rows, []) == list(range(22))
    assert [len(batch) for batch in BatchesInOrder(16, 3, block=8)] == [3, 3, 2, 3, 3, 2]
    assert len(BatchesInOrder(16, 3, block=8)) == 6 and len(BatchesInOrder(0, 3, block=8)) == 0


def test_rows_of_a_long_list_keep_their_numbers(trained):
    rows = rows_of_arguments([str(trained.many), str(trained.data / 'images' / '0.png')], tm_space(trained))
    assert rows.numbers.tolist() == [*range(2, 24), 0] and rows.which.tolist() == [0] * 22 + [1]
    assert rows.where(7) == f'{trained.many} row 9'


def tm_space(trained):
    return tm.Predictor.load(trained.checkpoint, 'cpu').label_space


def test_search_reads_parts(trained, tmp_path, capsys):
    for out, flags in ((tmp_path / 'e.npz', []), (f'{tmp_path}/parts/', ['--part-rows', 5])):
        run('embed', trained.checkpoint, trained.many, '--out', out, '-b', 5, *flags)
    capsys.readouterr()
    query, found = trained.data / 'val.csv', []
    for bank in (tmp_path / 'e.npz', tmp_path / 'parts'):
        assert run('search', bank, query, '--checkpoint', trained.checkpoint, '-k', 3) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] and len(found[0].splitlines()) == 1 + 6 * 3
    words = [tmp_path / 'parts', query, '--checkpoint', trained.checkpoint, '-k', 3]
    assert run('search', *words, '--approximate', 1) == 0
    out, line = capsys.readouterr()
    assert 'finds 100.0 % of the 3 nearest images, as the exact search for 6 of the queries says' in line
    ranks = [[row.split()[index] for row in text.splitlines()] for text in (out, found[0]) for index in (0, 2)]
    assert ranks[:2] == ranks[2:]

    for change, message in [
            (lambda folder: (folder / 'part-00001-of-00005.parquet').write_bytes(b'PAR1'), 'cannot be read as embedd'),
            (lambda folder: shutil.copy(folder / 'part-00000-of-00005.parquet', folder / 'part-00001-of-00005.parquet'),
             'not the part that the manifest names'),
            (lambda folder: (folder / '_manifest.json').write_text(
                (folder / '_manifest.json').read_text().replace('part-00001', '../art-0001')), 'a part that is none'),
            (lambda folder: (folder / '_manifest.json').write_text('{}'), 'cannot be read as the manifest of parts'),
            (lambda folder: [os.remove(folder / name) for name in ('_manifest.json', '_plan.json')],
             'no folder of parts')]:
        shutil.rmtree(tmp_path / 'changed', ignore_errors=True)
        change(shutil.copytree(tmp_path / 'parts', tmp_path / 'changed'))
        words = [tmp_path / 'changed', query, '--checkpoint', trained.checkpoint, '--device', 'cpu', '-j', 0]
        assert message in fails(capsys, 'search', words)


def test_without_faiss(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'faiss', None)
    line = fails(capsys, 'search', ['e.npz', 'q.jpg', '--checkpoint', 'c', '--approximate'])
    assert "--approximate needs faiss; pip install '.[search]', or leave it out for the exact search" in line


def test_exact_and_approximate_search_are_faiss():
    """Points in 50 groups, of which each query is near one."""
    import faiss

    rng = np.random.default_rng(0)
    centers = rng.normal(size=(50, 16))
    points, queries = (
        (centers[np.arange(count) % 50] + 0.4 * rng.normal(size=(count, 16))).astype(np.float32)
        for count in (6000, 40))
    index = faiss.IndexFlatIP(16)
    index.add(points / np.linalg.norm(points, axis=1, keepdims=True))
    cosines, indices = index.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), 10)
    exact, places = nearest_of(torch.from_numpy(queries), map(torch.from_numpy, np.split(points, [7, 2000, 2001])), 10)
    assert places.tolist() == indices.tolist()
    np.testing.assert_allclose(exact.numpy(), cosines, atol=1e-6)
    whole = nearest(torch.from_numpy(queries), torch.from_numpy(points), 10)
    assert torch.equal(whole[0], exact) and torch.equal(whole[1], places)

    def search(share):
        return nearest_approximately(
            torch.from_numpy(queries), lambda: iter(np.array_split(points, 7)), 6000, 10, share, torch.device('cpu'))

    for share in (1e-6, 0.1, 1):
        found = search(share)
        hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices.tolist(), indices.tolist())])
        assert found.sample == 40 and found.recall == pytest.approx(hits, abs=0.01)  # some are equally near
        assert found.recall > {1e-6: 0.1, 0.1: 0.9, 1: 0.999}[share]
        assert (found.cosines.diff(dim=1) <= 0).all() and (found.indices >= 0).all()
