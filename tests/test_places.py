"""Tables, images, shards, checkpoints and run folders at addresses: a real S3 server on this machine, with faults."""
import functools
import http.server
import re
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from common import SPACE, assert_same_summary, assert_same_weights, train_run, write_data
from object_store import BUCKET, Store, object_store
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.api.train import run_training
from timm_multilabel.assembly.pool_shards import without_images_of
from timm_multilabel.cli.main import run_command
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.class_folders import read_class_folders
from timm_multilabel.data.folders import images_of_folder
from timm_multilabel.data.images import FilePhotos, read_image
from timm_multilabel.data.packing import pack
from timm_multilabel.data.pool import rows_of_table
from timm_multilabel.data.shards import find_shards
from timm_multilabel.data.split_names import check_folder, find_split, no_split
from timm_multilabel.data.streams import Stored
from timm_multilabel.data.table import encode_rows, find_images, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.inference.embedding_parts import open_embeddings
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.loading.cache import open_cache
from timm_multilabel.loading.copies import with_copies
from timm_multilabel.places import files_there, path_of, why_missing
from timm_multilabel.stores import read_bytes, read_range
from timm_multilabel.training import remote_run
from timm_multilabel.training.remote_run import Workplace, at_workplace
from timm_multilabel.training.run_folder import RunLock
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.recipe import ViewRecipe


@pytest.fixture(scope='module')
def store() -> Iterator[Store]:
    with object_store() as made:
        yield made


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp('local') / 'data')


@pytest.fixture(scope='module')
def local(data: Path) -> Path:
    """The run folder of an epoch on data on disk."""
    return train_run(data, data.parent, epochs=1)


@pytest.fixture(scope='module')
def root(store: Store, data: Path) -> str:
    return store.put(data, 'data')


@pytest.fixture(autouse=True)
def no_faults(store: Store) -> None:
    store.faults = {}
    store.asked.clear()


# What an address is


def test_an_address_is_a_path_and_keeps_its_two_slashes(root: str) -> None:
    folder = path_of(root)
    assert str(folder / 'images' / '1.png') == 's3://photos/data/images/1.png'
    assert (folder.parent, folder.name, (folder / 'train.csv').suffix) == (path_of('s3://photos'), 'data', '.csv')
    assert folder / '/disk/a.jpg' == Path('/disk/a.jpg') and folder / 'gs://other/a' == path_of('gs://other/a')
    assert folder.is_dir() and (folder / 'val.csv').is_file() and not (folder / 'no').exists()
    assert sorted(map(str, folder.glob('*.csv'))) == [f'{root}/train.csv', f'{root}/val.csv']


@pytest.mark.parametrize('text, reason', [
    ('file:///etc/passwd', 'not an address that is read'),
    ('local:///etc/passwd', 'not an address that is read'),
    ('zip://a.jpg::s3://photos/all.zip', 'not an address that is read'),
    ('s3://photos/a::b', 'not an address that is read'),
    ('https://me:secret@host/a.jpg', 'an address with a user in it'),
])
def test_what_is_no_address_is_refused_also_in_a_cell(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        path_of(text)
    table = tmp_path / 'train.csv'
    table.write_text(f'image_path,color\ns3://photos/a.jpg,red\n{text},red\n')
    with pytest.raises(DataError, match=rf"^{re.escape(str(table))} row 3: '.*' is {reason}"):
        read_table(table)


# Faults


@pytest.mark.parametrize('faults', [[500, 500], ['cut'], ['slow']])
def test_a_fault_that_passes_is_not_seen(faults: list[int | str], store: Store, root: str, data: Path) -> None:
    store.faults['images/1.png'] = list(faults)
    assert read_image(f'{root}/images/1.png') == (data / 'images' / '1.png').read_bytes()
    assert len(store.asked) == len(faults) + 1


@pytest.mark.parametrize('fault, reason, tries', [
    (404, 'there is no such object', 1),
    (403, 'forbidden: AccessDenied, says the test; check the credentials that s3:// has from the environment', 1),
    (500, 'InternalError, says the test; tried 5 times', 5),
])
def test_what_stays_wrong_is_named_with_its_row(
        fault: int, reason: str, tries: int, store: Store, root: str) -> None:
    photos = FilePhotos(encode_rows(read_table(f'{root}/train.csv'), SPACE))
    store.faults['images/1.png'] = [fault] * 9
    store.asked.clear()
    with pytest.raises(DataError) as caught:
        photos[1]
    assert str(caught.value).startswith(f'{root}/images/1.png ({root}/train.csv row 3): cannot be read (')
    assert reason in str(caught.value)
    assert len(store.asked) == tries


def test_missing_images_are_found_by_listing_before_training(store: Store, root: str, tmp_path: Path) -> None:
    table = tmp_path / 'train.csv'
    table.write_text('image_path,color\n' + ''.join(f'{root}/images/{number}.png,red\n' for number in range(10, 20)))
    with pytest.raises(DataError, match=(
            f'2 of 10 images are missing: {root}/images/18.png \\(row 10\\), {root}/images/19.png \\(row 11\\)')):
        encode_rows(read_table(table), SPACE)
    assert len(store.asked) == 1  # a folder is listed


def test_what_is_not_there_or_forbidden_says_so(store: Store, root: str) -> None:
    with pytest.raises(DataError, match=f'^{root}-not: there is no such object; name the folder that holds train.csv'):
        check_folder(path_of(f'{root}-not'))
    store.faults['train.csv'] = [403] * 9
    assert 'forbidden' in why_missing(path_of(f'{root}/train.csv'))
    with pytest.raises(DataError, match='train.csv: forbidden: Forbidden; check the credentials'):
        read_table(f'{root}/train.csv')


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match=r'^az:// addresses need a library \(.*\): pip install adlfs$'):
        path_of('az://photos/a.csv').is_file()


# Forms of data


def test_shards_are_those_of_local_files(store: Store, data: Path, tmp_path: Path) -> None:
    table = read_table(data / 'train.csv')
    for kind in ('webdataset', 'parquet'):
        (tmp_path / kind).mkdir()
        pack(table, tmp_path / kind, 'train', kind, size=6)
        address = store.put(tmp_path / kind, f'shards-{kind}')
        store.faults[f'shards-{kind}/train-00000'] = ['cut']
        ours, theirs = (find_shards(path_of(folder), 'train', 'image_path') for folder in (tmp_path / kind, address))
        assert ours is not None and theirs is not None
        assert len(theirs.files) == 2 and str(theirs.source).startswith(f'{address}/train-')
        assert list(theirs.samples()) == list(ours.samples())
        assert not any(store.faults.values())


def test_remote_images_that_are_scored_in_shards_leave_the_pool(store: Store, tmp_path: Path) -> None:
    for side in (5, 6, 7):
        Image.new('RGB', (side, side)).save(tmp_path / f'{side}.png')
    (tmp_path / 'val.csv').write_text('image_path,color\n6.png,red\n')
    pack(read_table(tmp_path / 'val.csv'), tmp_path, 'val', 'webdataset')
    scored = find_shards(tmp_path, 'val', 'image_path')
    assert scored is not None
    address = store.put(tmp_path, 'pool')
    (tmp_path / 'pool.csv').write_text('image_path\n' + ''.join(f'{address}/{side}.png\n' for side in (5, 6, 7)))
    rows = rows_of_table(read_table(tmp_path / 'pool.csv'), SPACE)
    left = without_images_of(rows, [scored], 2, lambda line: None)
    assert list(left.images) == [f'{address}/5.png', f'{address}/7.png']


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_embeddings_in_the_store_are_read(suffix: str, store: Store, tmp_path: Path) -> None:
    made_by = {'arch': 'test_vit', 'what': 'features', 'weights': 'ema', 'digest': 'abc'}
    address = f's3://{BUCKET}/embeddings.{suffix}'
    made = Embeddings(np.array(['a.png'], object), np.ones((1, 3), np.float32), made_by)
    made.save(address)
    assert open_embeddings(address).whole().vectors.tolist() == [[1, 1, 1]]
    with pytest.raises(UserError, match=f'none.{suffix}: there is no such object; write one with'):
        open_embeddings(f's3://{BUCKET}/none.{suffix}')


def test_shards_that_cannot_be_written_beside_are_trained_on_all_the_same(store: Store, root: str) -> None:
    store.faults['rows.json'] = [403] * 9
    line = Stored(path_of(root), None, {}).save(None, {'train': 12})
    assert line.startswith(f'{root}/rows.json: cannot be written (forbidden') and line.endswith(
        '; the next run passes over the labels too')


def test_folders_and_class_folders_are_those_of_local_files(store: Store, tmp_path: Path) -> None:
    for name in ('red/1.png', 'blue/a/2.png', 'blue/.hidden.png', 'red/notes.txt'):
        path = tmp_path / 'tree/train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path, 'PNG')
    address = store.put(tmp_path / 'tree', 'tree')
    said: list[str] = []
    assert images_of_folder(f'{address}/train', said.append) == [f'{address}/train/{name}' for name in (
        'blue/a/2.png', 'red/1.png')]
    assert said == [f'{address}/train: 2 images; passed over: .txt (1), hidden files and folders (1)']
    split = find_split(path_of(address), 'train')
    assert split == path_of(f'{address}/train')
    local = read_class_folders(tmp_path / 'tree/train', 'image_path', 'class')
    assert read_table(split).frame.equals(local)
    rows = encode_rows(read_table(split), tm.find_label_space([read_table(split)], None))
    assert list(rows.images) == images_of_folder(f'{address}/train', said.append)


def test_an_image_root_may_be_an_address_and_rows_may_mix_both(store: Store, root: str, data: Path) -> None:
    table = data.parent / 'mixed.csv'
    table.write_text(f'image_path,color\n1.png,red\n../images/2.png,red\n{data}/images/3.png,red\n'
                     f'{root}/images/4.png,red\n')
    rows = encode_rows(read_table(table, TableFormat(image_root=f'{root}/images')), SPACE)
    assert list(rows.images) == [
        f'{root}/images/1.png', f'{root}/images/2.png', f'{data}/images/3.png', f'{root}/images/4.png']
    assert [FilePhotos(rows)[row].width for row in range(4)] == [32] * 4


def test_tables_and_images_of_a_web_server(data: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(data))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f'http://127.0.0.1:{server.server_port}'
        photos = FilePhotos(encode_rows(read_table(f'{address}/train.csv'), SPACE))
        assert len(photos) == 12 and photos[3].decode().shape == (32, 32, 3)
        photos.rows.images[1] += 'x'  # a web server lists nothing: what is missing shows when it is read
        with pytest.raises(DataError, match='png.*train.csv row 3.*there is no such object'):
            photos[1]
    finally:
        server.shutdown()


def test_a_web_server_that_is_slow_endless_or_lacks_the_first_images(
        store: Store, data: Path, tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Odd, directory=str(data)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        assert len(read_bytes(f'{address}/endless', 1000)) == 1001
        assert path_of(f'{address}/cut/images/1.png').is_file()  # HEAD and GET are cut once each
        assert read_range(f'{address}/val.csv', 6, 10) == (data / 'val.csv').read_bytes()[6:10]
        names = [f'{address}/none/{number}.png' for number in range(5)]
        names += [f'{address}/images/{number}.png' for number in range(5)]
        assert all(files_there(names))
    finally:
        server.shutdown()


def test_local_rows_beside_addresses_are_looked_for_everywhere(root: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / '1.png').write_bytes((data / 'images' / '1.png').read_bytes())
    (tmp_path / 'train.csv').write_text(f'image_path,color\n{root}/images/0.png,red\nelsewhere/1.png,red\n')
    assert find_images(read_table(tmp_path / 'train.csv')) == [f'{root}/images/0.png', f'{tmp_path}/images/1.png']


def test_secrets_in_addresses_are_neither_shown_nor_kept() -> None:
    with pytest.raises(UserError, match='^https://...@host/a.jpg: an address with a user') as caught:
        path_of('https://me:secret@host/a.jpg')
    assert 'secret' not in caught.value.line
    assert DataError('https://host/a.jpg?X-Sig=1;b=(2&c), https://host/b?c: bad?').line == (
        'https://host/a.jpg?...), https://host/b?...: bad?')
    assert DataError('az://photos@account/a.csv: bad').line == 'az://photos@account/a.csv: bad'
    with pytest.raises(UserError, match='^unlabelled: https://...@host/photos: an address with a user in it'):
        run_training(TrainSettings().replace(data_dir='none', unlabelled='https://me:secret@host/photos'))


def test_a_split_at_an_address_stands_alone(data: Path) -> None:
    with pytest.raises(DataError, match='^s3://photos/none.csv: there is no such object; looked for s3://photos'):
        raise no_split(data, 's3://photos/none.csv')


class _Odd(http.server.SimpleHTTPRequestHandler):
    cut = 2

    def log_message(self, *args: object) -> None:
        pass

    def send_head(self) -> BytesIO | BinaryIO | None:  # type: ignore[override]
        if self.path == '/endless':
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2 ** 16))
            except OSError:  # the client has gone
                return None
        if self.path.startswith('/cut/'):
            if _Odd.cut:
                _Odd.cut -= 1
                self.connection.close()
                return None
            self.path = self.path.removeprefix('/cut')
        return super().send_head()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


# Copies


def test_copies_are_fetched_once_and_again_when_the_image_changes(store: Store, data: Path, tmp_path: Path) -> None:
    address = store.put(data, 'changing')
    photos = FilePhotos(encode_rows(read_table(f'{address}/val.csv'), SPACE))
    said: list[str] = []
    copied = with_copies(photos, tmp_path, False, said.append)
    assert len(said) == 1 and 'copies 6 of 6 remote images' in said[0]
    assert all(Path(path).is_relative_to(tmp_path) for path in copied.paths)
    assert [photo.data for photo in copied] == [photo.data for photo in photos]
    Image.new('RGB', (5, 5)).save(tmp_path / 'new.png')
    store.client.upload_file(str(tmp_path / 'new.png'), BUCKET, 'changing/images/12.png')
    copied = with_copies(photos, tmp_path, False, said.append)
    assert 'copies 1 of 6 remote images' in said[1] and copied[0].width == 5
    store.asked.clear()
    with_copies(photos, tmp_path, False, said.append)
    assert len(said) == 2 and not any('GET /photos/changing/images' in line for line in store.asked)


def test_a_copy_that_cannot_be_fetched_is_named_with_its_row_or_left_out(
        store: Store, root: str, tmp_path: Path) -> None:
    photos = FilePhotos(encode_rows(read_table(f'{root}/val.csv'), SPACE))
    store.faults['images/13.png'] = [403] * 9
    with pytest.raises(DataError, match=f'^{root}/images/13.png \\({root}/val.csv row 3\\): cannot be read'):
        with_copies(photos, tmp_path, False, lambda line: None)
    copied = with_copies(photos, tmp_path, True, lambda line: None)
    assert copied.paths[1] == f'{root}/images/13.png'


def test_decoded_images_are_made_again_when_a_remote_image_without_a_copy_changes(
        store: Store, data: Path, tmp_path: Path) -> None:
    address = store.put(data, 'stamps')
    photos = FilePhotos(encode_rows(read_table(f'{address}/val.csv'), SPACE))
    views, said = OpenCVViews([ViewRecipe((16, 16))]), list[str]()
    for _ in range(2):
        open_cache('disk', photos, views, folder=tmp_path, workers=1, skip_bad=False, say=said.append)
    assert 'whole and up to date' in said[-1]
    Image.new('RGB', (5, 5)).save(tmp_path / 'new.png')
    store.client.upload_file(str(tmp_path / 'new.png'), BUCKET, 'stamps/images/12.png')
    cached = open_cache('disk', photos, views, folder=tmp_path, workers=1, skip_bad=False, say=said.append)
    assert any('1 of 6 images have changed' in line for line in said) and cached[0].width == 5


# Run folders


@pytest.fixture
def place(store: Store, tmp_path: Path) -> Workplace:
    (tmp_path / 'run').mkdir()
    return Workplace(path_of(store.put(tmp_path / 'run', f'places/{tmp_path.name}')), tmp_path / 'run')


def test_what_was_saved_since_it_was_sent_is_kept_and_sent(store: Store, place: Workplace) -> None:
    summary = place.path / 'summary.csv'
    summary.write_text('one epoch')
    assert place.send() is None
    summary.write_text('two epochs')
    store.faults['summary.csv'] = [403] * 9
    assert 'cannot be written (forbidden' in str(place.send())
    store.faults = {}
    assert place.fetch() == 0 and summary.read_text() == 'two epochs'
    assert place.send() is None
    elsewhere = Workplace(place.address, place.path.parent / 'elsewhere')
    assert elsewhere.fetch() == 1 and (elsewhere.path / 'summary.csv').read_text() == 'two epochs'
    (elsewhere.path / 'summary.csv').write_text('three epochs')
    assert elsewhere.send() is None
    assert place.fetch() == 1 and summary.read_text() == 'three epochs'


def test_an_object_that_has_gone_is_sent_again(store: Store, place: Workplace) -> None:
    (place.path / 'model_best.pth.tar').write_text('best')
    assert place.send() is None
    key = str(place.address).removeprefix(f's3://{BUCKET}/')
    store.client.delete_object(Bucket=BUCKET, Key=f'{key}/model_best.pth.tar')
    assert place.fetch() == 0 and place.send() is None
    assert store.keys(key) == ['model_best.pth.tar']


def test_no_name_of_an_object_leads_out_of_the_run_folder(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.path / 'args.yaml').write_text('seed: 1')
    assert place.send() is None
    names = ['args.yaml', '../outside', 'a/../../outside', '.sent.json', '.launch', '1-a/.hidden/b']
    monkeypatch.setattr(remote_run, 'files_below', lambda address: [f'{address}/{name}' for name in names])
    elsewhere = Workplace(place.address, place.path.parent / 'elsewhere')
    assert elsewhere.fetch() == 1
    assert sorted(path.name for path in elsewhere.path.iterdir()) == ['.sent.json', 'args.yaml']


def test_a_restart_and_a_folder_named_by_its_time_go_on(
        store: Store, place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('20261130-173210-model/args.yaml', '20261130-173210-model/1-warm/last.pth.tar', 'other/args.yaml'):
        (place.path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.path / name).write_text('text')
    store.put(place.path, str(place.address).removeprefix(f's3://{BUCKET}/'))
    output, name = str(place.address), '20261130-173210-model'
    settings = TrainSettings().replace(output=output, cache_dir=str(tmp_path / 'cache'))
    said: list[str] = []
    for resume in (f'{output}/{name}', f'{output}/{name}/1-warm', f'{output}/{name}/1-warm/last.pth.tar'):
        at_workplace(settings.replace(resume=resume, cache_dir=str(tmp_path / str(len(said)))), RunLock().take,
                     said.append)
        assert f'{output}/{name}: fetched 2 files' in said[-1]
    with pytest.raises(UserError, match='holds a run already'):
        at_workplace(settings.replace(experiment=name), RunLock().take, said.append)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    at_workplace(settings.replace(experiment=name), RunLock().take, said.append)
    assert len(said) == 4


# Commands


@pytest.mark.slow
def test_training_from_the_store_with_faults_is_that_from_disk(
        store: Store, root: str, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.faults = {'train.csv': [500], 'images/3.png': [500, 500], 'images/4.png': ['cut'], 'images/13.png': ['cut']}
    # With a loader process, which is forked from this one and its connections.
    remote = train_run(root, tmp_path / 'remote', '-j', '1', epochs=1)
    assert_same_weights(remote / 'last.pth.tar', local / 'last.pth.tar')
    assert not any(store.faults.values())
    store.asked.clear()
    copied = train_run(root, tmp_path / 'copied', '--cache', 'disk', '--cache-dir', str(tmp_path / 'cache'), epochs=1)
    assert_same_weights(copied / 'last.pth.tar', local / 'last.pth.tar')
    assert f'{root}/val.csv: --cache disk: copies 6 of 6 remote images' in capsys.readouterr().out
    assert sum('GET /photos/data/images' in line for line in store.asked) == 18  # each image once
    assert 'testing' not in (copied / 'args.yaml').read_text()  # the credentials


@pytest.mark.slow
def test_a_run_folder_in_the_store_goes_on_on_another_machine(
        store: Store, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train_run(data, tmp_path / 'local')
    capsys.readouterr()
    output = path_of(f's3://{BUCKET}/runs')
    here, there = (('--cache-dir', str(tmp_path / name), '--resume', 'auto') for name in ('here', 'there'))
    store.faults['runs/run/last.pth.tar'] = [500, 'cut']
    train_run(data, output, *here, '--checkpoint-hist', '1', epochs=1)
    names = {'args.yaml', 'label_space.json', 'summary.csv', 'curves.png', 'last.pth.tar', 'model_best.pth.tar'}
    assert set(store.keys('runs/run')) == {*names, 'checkpoint-0.pth.tar'}
    with pytest.raises(SystemExit):
        train_run(data, output, '--cache-dir', str(tmp_path / 'other'), epochs=1)
    assert f'{output}/run: holds a run already' in capsys.readouterr().err
    train_run(data, output, *there, '--checkpoint-hist', '1', epochs=2)
    said = capsys.readouterr().out
    assert f'{output}/run: fetched 7 files' in said and 'last.pth.tar: goes on from here' in said
    folder = tmp_path / 'there/runs/s3' / BUCKET / 'runs/run'
    assert_same_summary(folder, whole)
    assert_same_weights(folder / 'last.pth.tar', whole / 'last.pth.tar')
    assert f'output: {output}' in (folder / 'args.yaml').read_text()
    stored = tmp_path / 'stored.pth.tar'
    store.client.download_file(BUCKET, 'runs/run/last.pth.tar', str(stored))
    assert stored.read_bytes() == (folder / 'last.pth.tar').read_bytes()
    best = len([name for name in store.keys('runs/run') if name.startswith('checkpoint-')])
    assert best == 1  # what the run has removed has gone there too


@pytest.mark.slow
def test_predict_with_checkpoint_images_and_output_in_the_store(
        store: Store, root: str, data: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = f'{store.put(local, "trained")}/model_best.pth.tar'
    store.faults['trained/model_best'] = [500, 'cut']
    run_command('predict', 'predict', [
        checkpoint, f'{root}/images/1.png', f'{root}/val.csv', '-j', '0', '--out', f's3://{BUCKET}/out/said.csv'])
    monkeypatch.chdir(data)
    run_command('predict', 'predict', [
        str(local / 'model_best.pth.tar'), 'images/1.png', 'val.csv', '-j', '0', '--out', str(tmp_path / 'said.csv')])
    theirs = store.client.get_object(Bucket=BUCKET, Key='out/said.csv')['Body'].read().decode()
    assert theirs.replace(f'{root}/', '') == (tmp_path / 'said.csv').read_text()
    with pytest.raises(UserError, match='trained/none.pth.tar: there is no such object'):
        tm.Predictor.load(f's3://{BUCKET}/trained/none.pth.tar')
