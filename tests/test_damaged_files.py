"""Files that came back damaged: each is read or refused in one line, whatever the damage."""
import io
import json
import zipfile

import numpy as np
import pytest
from common import train_run, write_data
from test_cli import fails

from benchmarks.damaged_files import make_kinds, try_kind
from timm_multilabel import arrays
from timm_multilabel.arrays import read_arrays, write_arrays
from timm_multilabel.assembly import experiment
from timm_multilabel.assembly.grid_file import read_grid
from timm_multilabel.errors import UserError
from timm_multilabel.files import reading
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.training.run_folder import RunFolder, find_launched, read_summary

NAMES = [
    'summary.csv', 'args.yaml', 'args.yaml, by export', 'label_space.json', 'wandb.json', '.launch', 'predictions',
    'embeddings, npz', 'embeddings, Parquet', 'checkpoint', 'checkpoint, mapped', 'exported weights',
    'exported description', 'grid.yaml', 'record of a run', 'results.csv', 'differences.csv', 'rows.json',
    'index of a cache', 'table', 'image', 'tar', 'Parquet shard']
SLOW = {'summary.csv', 'args.yaml', 'checkpoint', 'checkpoint, mapped', 'grid.yaml', 'results.csv', 'differences.csv',
        'index of a cache', 'table'}  # `python -m benchmarks.damaged_files` tries them oftener
NEVER_REFUSED = {'.launch', 'index of a cache'}  # damaged ones count as none


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp('kinds'))


def test_all_kinds_are_here(kinds):
    assert [*kinds] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_damage_ends_in_one_line(kinds, name):
    outcomes = try_kind(*kinds[name], tries=30 if name in SLOW else 150, seed=0)
    assert outcomes.keys() <= {'read', 'refused'}
    assert bool(outcomes['refused']) == (name not in NEVER_REFUSED)


# Arrays


SPACE = LabelSpace((LabelSet('color', ('blue', 'red')), TagSet('tags', ('a', 'b')), Quantity('size', 1.0, 2.0)))


def predictions(**changes):
    """The arrays of stored predictions of three rows."""
    return {
        'label_space': np.array(json.dumps(SPACE.to_dict())),
        'rows': np.array(['row 2', 'row 3', 'row 4']), 'images': np.array(['a.png', 'b.png', 'c.png']),
        'targets': np.array([[0, 0, 1, 0.5], [1, -1, -1, np.nan], [-1, 1, 1, 0]], np.float32),
        'output_0': np.full((3, 2), 0.5, np.float32), 'output_1': np.full((3, 2), 0.5, np.float32),
        'output_2': np.zeros((3, 1), np.float32), 'features': np.zeros((3, 4), np.float32),
        'made_from': np.array(['a', 'b']), **changes}


def test_whole_predictions_are_read(tmp_path):
    np.savez_compressed(tmp_path / 'x.npz', **predictions())
    found = Predictions.load(tmp_path / 'x.npz')
    assert found.target('color').tolist() == [0, 1, -1] and found.made_from == ('a', 'b')
    found.save(tmp_path / 'y.npz')
    assert Predictions.load(tmp_path / 'y.npz').features.shape == (3, 4)


TARGETS = predictions()['targets']
WRONG = {
    'a class that there is not': {'targets': np.where(TARGETS == 1, 7, TARGETS).astype(np.float32)},
    'a negative class': {'targets': np.array([[-2, 0, 1, 0]] * 3, np.float32)},
    'a class that is NaN': {'targets': np.array([[np.nan, 0, 1, 0]] * 3, np.float32)},
    'half a tag': {'targets': np.array([[0, 0.5, 1, 0]] * 3, np.float32)},
    'an infinite number': {'targets': np.array([[0, 0, 1, np.inf]] * 3, np.float32)},
    'another type': {'targets': TARGETS.astype(np.float64)},
    'fewer columns': {'targets': TARGETS[:, :3].copy()},
    'fewer rows': {'features': np.zeros((2, 4), np.float32)},
    'more classes': {'output_0': np.zeros((3, 3), np.float32)},
    'no probabilities': {'output_0': np.full((3, 2), 5, np.float32)},
    'numbers as rows': {'rows': np.arange(3)},
    'a zero byte in a path': {'images': np.array(['a', 'b\0c', 'd'])},
    'objects': {'rows': np.array([{}, [], None], object)},
    'no rows': {name: predictions()[name][:0] for name in predictions() if name not in ('label_space', 'made_from')},
    'one origin': {'made_from': np.array(['a'])},
    'a space of no heads': {'label_space': np.array('{"heads": 7}')},
    'text that is none': {'rows': np.array([0x7fffffff] * 3, np.uint32).view('<U1')},
}


@pytest.mark.parametrize('what', WRONG)
def test_predictions_that_do_not_fit_together(tmp_path, what):
    np.savez(tmp_path / 'x.npz', **predictions(**WRONG[what]))
    with pytest.raises(UserError, match=r'x.npz: cannot be read as stored predictions \(.+\); remove it') as error:
        Predictions.load(tmp_path / 'x.npz')
    assert error.value.line.isprintable() and len(error.value.line) < 500


def npy(shape, kind='<f4', content=b''):
    header = repr({'descr': kind, 'fortran_order': False, 'shape': shape}) + '\n'
    return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode() + content


BOMBS = {
    'a header that speaks of terabytes': (npy((10 ** 12,)), zipfile.ZIP_DEFLATED),
    'elements of no size': (npy((10 ** 12,), '<U0'), zipfile.ZIP_DEFLATED),
    'zeros that were compressed': (npy((2 ** 20,), content=bytes(2 ** 22)), zipfile.ZIP_DEFLATED),
    'a compression of large dictionaries': (npy((1,), content=bytes(4)), zipfile.ZIP_LZMA),
    'a pickle': (npy((1,), '|O', b'cos\nsystem\n(S"touch harm"\ntR.'), zipfile.ZIP_STORED),
    'a header without end': (b'\x93NUMPY\x02\x00\xff\xff\xff\x7f{', zipfile.ZIP_STORED),
    'a size less than nothing': (npy((-1, -1), content=bytes(4)), zipfile.ZIP_STORED),
}


@pytest.mark.parametrize('what', BOMBS)
@pytest.mark.parametrize('load', [Predictions.load, Embeddings.load], ids=['predictions', 'embeddings'])
def test_arrays_that_ask_for_too_much(tmp_path, monkeypatch, what, load):
    monkeypatch.setattr(arrays, '_FREE', 2 ** 20)
    content, compression = BOMBS[what]
    whole = io.BytesIO()
    np.savez(whole, **predictions())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / 'x.npz', 'w', compression) as new:
        for name in old.namelist():
            new.writestr(name, content if name == 'features.npy' else old.read(name))
        new.writestr('embeddings.npy', content)
        new.writestr('made_by.npy', content)
    with pytest.raises(UserError, match='x.npz: cannot be read as'):
        load(tmp_path / 'x.npz')


@pytest.mark.parametrize('free, shrinks', [(2 ** 28, True), (2 ** 20, False)])
def test_what_is_written_is_never_refused_as_a_bomb(tmp_path, monkeypatch, free, shrinks):
    """Features of a model that has collapsed shrink as far as a bomb does."""
    monkeypatch.setattr(arrays, '_FREE', free)
    write_arrays(tmp_path / 'x.npz', {'x': np.zeros((1000, 1000), np.float32)}, compress=True)
    assert ((tmp_path / 'x.npz').stat().st_size < 10 ** 5) == shrinks
    assert read_arrays(tmp_path / 'x.npz')['x'].shape == (1000, 1000)


def test_embeddings_that_are_not_finite(tmp_path):
    made_by = {'arch': 'a', 'what': 'features', 'weights': 'plain', 'digest': '0'}
    for suffix in ('npz', 'parquet'):
        Embeddings(np.array(['a'], object), np.full((1, 2), np.inf, np.float32), made_by).save(tmp_path / f'x.{suffix}')
        with pytest.raises(UserError, match='not finite'):
            Embeddings.load(tmp_path / f'x.{suffix}')
    with pytest.raises(UserError, match='is not UTF-8, as Parquet needs it'):
        Embeddings(np.array(['a\udcff'], object), np.ones((1, 2), np.float32), made_by).save(tmp_path / 'y.parquet')
    assert not (tmp_path / 'y.parquet').exists()


def test_few_bytes_of_parquet_that_stand_for_many_values(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, '_FREE', 2 ** 20)
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(2 ** 19, np.float32)), 8)
    table = pyarrow.table({'image': ['x'] * 2 ** 16, 'embedding': vectors})
    parquet.write_table(table, tmp_path / 'x.parquet')
    assert (tmp_path / 'x.parquet').stat().st_size < 10 ** 4
    with pytest.raises(UserError, match='it would expand to'):
        Embeddings.load(tmp_path / 'x.parquet')


def test_whatever_is_raised_becomes_one_line(tmp_path):
    for error in (ZeroDivisionError(), RecursionError('deep'), MemoryError(), AssertionError('two\nlines\x1b[31m')):
        with pytest.raises(UserError, match=f'^{tmp_path}: cannot be read as x .+; y$') as found:
            with reading(tmp_path, 'x', 'y'):
                raise error
        assert found.value.line.isprintable()
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, 'x', 'y'):
        raise KeyboardInterrupt


# Label spaces


@pytest.mark.parametrize('head', [
    {'name': 'a', 'kind': 'number', 'mean': 1e999, 'std': 1}, {'name': 'a', 'kind': 'number', 'mean': 0, 'std': 0},
    {'name': 'a', 'kind': 'number', 'mean': 0, 'std': -1}, {'name': 'a', 'kind': 'number', 'mean': 10 ** 400, 'std': 1},
    {'name': 'a', 'classes': 'abc'}, {'name': 'a', 'classes': {'x': 1}}, {'name': 'a', 'classes': [['x']]},
    {'name': 'a', 'classes': ['\ud800']}, {'name': 'a\x1b', 'classes': ['b']}, {'name': 'a', 'classes': ['']},
    {'name': 'a', 'kind': 'tags', 'classes': ['x', 'y'], 'group': ['x']}, {'name': 7, 'classes': ['b']},
    {'name': 'a', 'kind': 'other', 'classes': ['b']}, {'name': 'a', 'kind': [], 'classes': ['b']}, None, 'x'],
    ids=str)
def test_heads_that_are_none(tmp_path, head):
    (tmp_path / 'space.json').write_text(json.dumps({'heads': [head]}))
    with pytest.raises(UserError, match='space.json: cannot be read as a label space') as error:
        LabelSpace.load(tmp_path / 'space.json')
    assert error.value.line.isprintable()


def test_a_label_space_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(UserError, match='rename it in the data'):
        LabelSpace((LabelSet('a', ('\ud800',)),)).save(tmp_path / 'space.json')
    assert not (tmp_path / 'space.json').exists()


# summary.csv and what else people edit


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    return write_data(folder / 'data'), train_run(folder / 'data', folder)


SUMMARIES = {
    'nothing': ('', 'it is empty'),
    'no epochs': ('train_loss\n1\n', "there is no column 'epoch'"),
    'a word': ('epoch,train_loss\n0,1\n1,good\n', "row 3: 'good' in column 'train_loss' is no number of an epoch"),
    'half an epoch': ('epoch\n0.5\n', "row 2: '0.5' in column 'epoch'"),
    'an epoch below 0': ('epoch\n-1\n', "row 2: '-1' in column 'epoch'"),
    'an endless epoch': ('epoch\n' + '9' * 100 + '\n', 'in column'),
    'an empty epoch': ('epoch,train_loss\n,1\n', "row 2: '' in column 'epoch'"),
    'not in order': ('epoch\n1\n0\n', 'its epochs are not in order'),
    'an epoch twice': ('epoch\n0\n0\n', 'its epochs are not in order'),
    'a phase that comes again': ('phase,epoch\na,0\nb,0\na,1\n', 'its epochs are not in order'),
    'a row too long': ('epoch,train_loss\n0,1,2\n', 'row 2: 3 cells for 2 columns'),
    'a row too short': ('epoch,train_loss\n0\n', 'row 2: 1 cells for 2 columns'),
    'a column twice': ('epoch,epoch\n0,1\n', 'two columns have one name'),
    'Latin-1': ('epoch,caf\xe9\n0,1\n'.encode('latin-1'), 'codec'),
}


@pytest.mark.slow
@pytest.mark.parametrize('what', SUMMARIES)
def test_summaries_that_are_none(trained, tmp_path, capsys, what):
    content, reason = SUMMARIES[what]
    data, run = trained
    path, before = run / 'summary.csv', (run / 'summary.csv').read_bytes()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        for command, words in (('report', [run, '--force', '-j', 0, '--device', 'cpu']),
                               ('compare', [run, '-j', 0, '--device', 'cpu']),
                               ('train', [data, '-c', run / 'args.yaml', '--epochs', '3', '--resume', run])):
            line = fails(capsys, command, words)
            assert 'summary.csv: cannot be read as the summary of ' in line and reason in line
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    finally:
        path.write_bytes(before)


def test_a_summary_of_other_phases_is_refused_before_an_epoch_is_trained(tmp_path):
    space = LabelSpace((LabelSet('a', ('b',)),))
    (tmp_path / 'summary.csv').write_text('phase,epoch\nfirst,0\n')
    for phases, reason in ((['one', 'two'], "its phase 'first' is none of one, two"), ([], 'and not both')):
        with pytest.raises(UserError, match=reason):
            RunFolder(tmp_path, {}, space, phases)
    (tmp_path / 'summary.csv').write_text('\ufeffphase,epoch\nfirst,0\n\nnext,0\n', encoding='utf-8')
    RunFolder(tmp_path, {}, space, ['first', 'next']).add_summary({'phase': 'next', 'epoch': 1})
    assert read_summary(tmp_path / 'summary.csv')['epoch'].tolist() == [0, 0, 1]


def test_a_launch_that_cannot_be_read_is_no_launch(tmp_path):
    (tmp_path / '.launch').write_bytes(b'\xff\xfe host 1\n\x00')
    assert find_launched([tmp_path], ['host 1']) is None
    (tmp_path / '.launch').write_bytes(b'\xff\xfe\nhost 1')
    assert find_launched([tmp_path], ['host 1']) == tmp_path


RECORDS = ['[', '[]', '{}', '{"run": 1}', '{"run": {}, "where": {"commit": "", "machine": "", "torch": 7}}',
           '{"run": {}, "where": {"commit": "", "machine": "", "torch": ""}, "seconds": "1"}',
           '{"run": {}, "where": {"commit": "", "machine": "", "torch": ""}, "seconds": 1}', '[' * 100_000]


@pytest.mark.parametrize('content', RECORDS, ids=range(len(RECORDS)))
def test_records_of_runs_that_are_none(tmp_path, content):
    (tmp_path / 'grid.yaml').write_text('settings: {a: {lr: 0.1}}\n')
    run = read_grid(tmp_path / 'grid.yaml').runs[0]
    (tmp_path / f'{run.name}.json').write_text(content)
    with pytest.raises(UserError, match=f'{run.name}.json: cannot be read as the record of a run .+; remove it'):
        experiment.read_record(run, tmp_path)


RESULTS = 'setting,seed,color,mean,minutes,cpu_minutes,commit,machine,torch,command\n'
ROW = 'a,0,50,50,1,1,c,m,t,x\n'


@pytest.mark.parametrize('runs, differences', [
    ('', ''), (RESULTS, ''), ('setting,seed\na,0\n', ''), (RESULTS + ROW.replace('50', 'good'), ''),
    (RESULTS + ROW.replace('a,0', 'z,0'), ''), (RESULTS + 2 * ROW, ''), (RESULTS + ROW.replace('a,0', 'a,'), ''),
    (RESULTS + ROW.replace('50', 'inf'), ''), (RESULTS.replace('seed,color', 'color,seed') + ROW, ''),
    (RESULTS + ROW, 'setting,head,difference,low,high,p,holm\nb,other,1,1,1,1,1\n'),
    (RESULTS + ROW, 'setting,head,difference,low,high,p,holm\nb,color,1,1,1,1,x\n'),
    (RESULTS + ROW, 'setting\nb\n'), (RESULTS + ROW.replace('c,m', '"c,m'), '')])
def test_results_that_are_none(tmp_path, capsys, runs, differences):
    (tmp_path / 'grid.yaml').write_text('settings: {a: {lr: 0.1}, b: {lr: 0.2}}\n')
    (tmp_path / 'results.csv').write_text(RESULTS + ROW + ROW.replace('a,0', 'b,0'))
    (tmp_path / 'differences.csv').write_text('')
    if not runs and not differences:
        experiment.read_results(tmp_path, 'val', read_grid(tmp_path / 'grid.yaml'))
    (tmp_path / 'results.csv').write_text(runs)
    (tmp_path / 'differences.csv').write_text(differences)
    line = fails(capsys, 'grid', [tmp_path, '--tables'])
    assert '.csv: cannot be read as results of an experiment (' in line and 'run the experiment again' in line
    assert not (tmp_path / 'results.md').exists()
