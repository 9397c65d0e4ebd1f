"""Embeddings: files of them, nearest images, k-NN accuracy."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import COLORS, train_run, write_data
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from test_cli import fails

from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.inference import neighbours
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.inference.neighbours import knn_predictions, nearest, vote
from timm_multilabel.reports.contact_sheet import SheetRow, draw_sheet, sheet_size
from timm_multilabel.training.checkpoint import load_model, read_checkpoint


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A data directory of pictures of noise, and runs of it with heads and of SimCLR alone."""
    folder = tmp_path_factory.mktemp('trained')
    data = write_data(folder / 'data', train=24, val=12)
    rng = np.random.default_rng(0)
    for path in sorted((data / 'images').iterdir()):
        with Image.open(path) as image:
            noise = np.asarray(image) + rng.integers(-80, 80, (32, 32, 3))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    train = (data / 'train.csv').read_text().splitlines()
    train[3] = train[3].rpartition(',')[0] + ','  # a row without a shape
    (data / 'train.csv').write_text('\n'.join(train) + '\n')
    runs = {
        name: train_run(data, folder / name, *flags, epochs=1) / 'last.pth.tar'
        for name, flags in (('both', []), ('simclr', ['-wlc', '0']), ('heads', ['-wls', '0', '--seed', '1']))}
    return SimpleNamespace(data=data, images=data / 'images', **runs)


def run(command, *argv):
    """Run a command; its exit status."""
    try:
        run_command(command, command, [*map(str, argv), '--device', 'cpu'])
    except SystemExit as stop:
        return stop.code
    return 0


def plain_picture(path, color='red'):
    Image.new('RGB', (32, 32), COLORS[color]).save(path)
    return path


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_features_are_the_models(trained, tmp_path, suffix, capsys):
    pictures = [plain_picture(tmp_path / f'{color}.png', color) for color in COLORS]
    out = tmp_path / f'e.{suffix}'
    assert run('embed', trained.both, *pictures, '--out', out) == 0
    assert 'features of 3 images, ' in capsys.readouterr().out
    found, checkpoint = Embeddings.load(out), read_checkpoint(trained.both)
    assert found.images.tolist() == [str(path) for path in pictures]
    mean, std = (torch.tensor(checkpoint.data_config[name]) for name in ('mean', 'std'))
    images = ((torch.tensor(list(COLORS.values())) / 255 - mean) / std)[:, :, None, None].expand(3, 3, 32, 32)
    with torch.no_grad():
        features = load_model(checkpoint, 'plain').backbone(images)
    np.testing.assert_allclose(found.vectors, features.numpy(), rtol=1e-4, atol=1e-5)
    assert found.made_by['arch'] == 'test_resnet' and found.made_by['what'] == 'features'

    out = tmp_path / f'p.{suffix}'
    assert run('embed', trained.simclr, *pictures, '--out', out, '--what', 'projections') == 0
    state = torch.load(trained.simclr, weights_only=True)['task_state']['projector']
    with torch.no_grad():
        features = load_model(read_checkpoint(trained.simclr), 'plain').backbone(images)
    projections = (features @ state['0.weight'].T).relu() @ state['2.weight'].T
    np.testing.assert_allclose(Embeddings.load(out).vectors, projections.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_projector_of_a_head(trained, tmp_path):
    flags = ['-wls', '0', '-wlc', '1', '--head', 'color:input=projection']
    checkpoint = train_run(trained.data, tmp_path, *flags, epochs=1) / 'last.pth.tar'
    assert run('embed', checkpoint, trained.images, '--out', tmp_path / 'p.npz', '--what', 'projections') == 0
    assert run('embed', checkpoint, trained.images, '--out', tmp_path / 'f.npz') == 0
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    features = torch.from_numpy(Embeddings.load(tmp_path / 'f.npz').vectors)
    projections = (features @ state['projector.0.weight'].T).relu() @ state['projector.2.weight'].T
    np.testing.assert_allclose(
        Embeddings.load(tmp_path / 'p.npz').vectors, projections.numpy(), rtol=1e-4, atol=1e-5)


def test_bad_images_are_left_out_and_named(trained, tmp_path, capsys):
    (tmp_path / 'broken.png').write_bytes((trained.images / '1.png').read_bytes()[:200])
    words = [trained.images / '0.png', tmp_path / 'broken.png', trained.images / '2.png', tmp_path / 'gone.png']
    assert run('embed', trained.both, *words, '--out', tmp_path / 'e.npz', '-b', 3, '-j', 1) == 1
    error = capsys.readouterr().err
    assert 'broken.png' in error and 'gone.png' in error and '2 of 4 images could not be read' in error
    assert run('embed', trained.both, words[0], words[2], '--out', tmp_path / 'f.npz') == 0
    found, alone = (Embeddings.load(tmp_path / name) for name in ('e.npz', 'f.npz'))
    assert found.images.tolist() == [str(words[0]), str(words[2])] == alone.images.tolist()
    np.testing.assert_allclose(found.vectors, alone.vectors, rtol=1e-5)
    line = fails(capsys, 'embed', [trained.both, words[1], '--out', tmp_path / 'g.npz'])
    assert 'none of 1 images can be read; the first: ' in line and not (tmp_path / 'g.npz').exists()


def test_nearest_is_numpys(monkeypatch):
    monkeypatch.setattr(neighbours, '_BANK', 7)
    monkeypatch.setattr(neighbours, '_QUERIES', 4)
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
    cosines = (queries @ bank.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
    for k in (1, 6, 10, 30):
        found, indices = nearest(torch.from_numpy(queries), torch.from_numpy(bank), k)
        order = np.argsort(-cosines, axis=1)[:, :k]
        assert indices.tolist() == order.tolist()
        np.testing.assert_allclose(found.numpy(), np.take_along_axis(cosines, order, 1), atol=1e-6)
    assert nearest(torch.from_numpy(queries), torch.from_numpy(bank), 99)[1].shape == (9, 30)


def test_vote_by_hand():
    labels = torch.tensor([[0, 1, 1]])
    # exp(0.9 / T) against exp(0.5 / T) + exp(0.4 / T): two beat the nearest only where T is large.
    cosines = torch.tensor([[0.9, 0.5, 0.4]])
    assert vote(cosines, labels, temperature=0.07).tolist() == [0]
    assert vote(cosines, labels, temperature=1.0).tolist() == [1]
    assert vote(torch.tensor([[0.9, 0.88, 0.86]]), labels).tolist() == [1]  # 1 < 0.751 + 0.565
    assert vote(torch.tensor([[0.9, 0.8, 0.8]]), labels).tolist() == [0]  # 1 > 2 * 0.240


def test_knn_is_sklearns():
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(200, 8)).astype(np.float32), rng.normal(size=(60, 8)).astype(np.float32)
    a, b = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    b[::3] = -1
    found = knn_predictions(
        *map(torch.from_numpy, (queries, bank)), [torch.from_numpy(a), torch.from_numpy(b), torch.full((200,), -1)],
        k=15)
    for target, predicted in zip((a, b), found):
        known = target >= 0
        peer = KNeighborsClassifier(
            15, metric='cosine', algorithm='brute', weights=lambda distance: np.exp((1 - distance) / 0.07))
        peer.fit(bank[known], target[known])
        assert predicted.tolist() == peer.predict(queries).tolist()
    assert found[2] is None


@pytest.mark.parametrize('name', ['both', 'simclr'])
def test_validate_prints_knn(trained, tmp_path, name, capsys):
    results = tmp_path / 'r.json'
    assert run('validate', trained.data, '--checkpoint', getattr(trained, name), '--knn', 5, '-j', 0, '--results-file',
               results) == 0
    out = capsys.readouterr().out
    assert 'knn_top1' in out and f'the 5 nearest of 24 images of {trained.data}/train.csv' in out
    assert ('top5' in out) == (name == 'both')
    points = {}
    for split in ('train', 'val'):
        path = tmp_path / f'{split}.npz'
        run('embed', getattr(trained, name), trained.data / f'{split}.csv', '--out', path)
        cells = [line.split(',')[1:] for line in (trained.data / f'{split}.csv').read_text().splitlines()[1:]]
        points[split] = Embeddings.load(path).vectors, np.array(cells)
    heads = json.loads(results.read_text())['heads']
    accuracies = []
    for column, head in enumerate(('color', 'shape')):
        (bank, target), (rows, label) = ((vectors, cells[:, column]) for vectors, cells in points.values())
        known = target != ''
        assert known.sum() == 24 - column
        peer = KNeighborsClassifier(
            5, metric='cosine', algorithm='brute', weights=lambda distance: np.exp((1 - distance) / 0.07))
        accuracies.append(100 * (peer.fit(bank[known], target[known]).predict(rows) == label).mean())
        assert heads[head]['knn_top1'] == pytest.approx(accuracies[-1]) and heads[head]['labels'] == 12
        assert ('top1' in heads[head]) == (name == 'both')
    assert json.loads(results.read_text())['mean']['knn_top1'] == pytest.approx(np.mean(accuracies))


def test_knn_and_bad_images(trained, tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    (data / 'images' / '0.png').write_bytes(b'')
    line = fails(capsys, 'validate', [data, '--checkpoint', trained.simclr, '--knn', 3, '-j', 0, '--device', 'cpu'])
    assert '0.png' in line and 'cannot be decoded' in line
    assert run('validate', data, '--checkpoint', trained.simclr, '--knn', 3, '-j', 0, '--skip-bad-images',
               '--results-file', tmp_path / 'r.csv') == 0
    assert '1 image that cannot be decoded, left out' in capsys.readouterr().out
    head, *rows = (tmp_path / 'r.csv').read_text().splitlines()
    assert head == 'head,knn_top1,labels' and rows[0].startswith('color,') and rows[0].endswith(',6')


def test_knn_bad_input(trained, tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    words = [data, '--checkpoint', trained.simclr, '-j', 0]
    assert 'score its features with --knn 20' in fails(capsys, 'validate', words)
    assert 'has no heads; leave it out' in fails(capsys, 'validate', [*words, '--knn', 3, '--confusion'])
    for split in ('train', data / 'train.csv', data / '..' / 'data' / 'train.csv'):
        assert 'would find itself' in fails(capsys, 'validate', [*words, '--knn', 3, '--split', split])
    assert '0 is out of range' in fails(capsys, 'validate', [*words, '--knn', 0])
    (data / 'train.csv').write_text('image_path,color\nimages/0.png,\n')
    assert 'no column has a class' in fails(capsys, 'validate', [*words, '--knn', 3])
    (data / 'train.csv').unlink()
    assert 'train.csv: no such file' in fails(capsys, 'validate', [*words, '--knn', 3])


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_search_finds_numpys_nearest(trained, tmp_path, suffix, capsys):
    out = tmp_path / f'e.{suffix}'
    run('embed', trained.both, trained.data / 'train.csv', '--out', out)
    run('embed', trained.both, trained.data / 'val.csv', '--out', tmp_path / 'q.npz')
    bank, queries = Embeddings.load(out), Embeddings.load(tmp_path / 'q.npz')
    capsys.readouterr()
    assert run('search', out, trained.data / 'val.csv', '--checkpoint', trained.both, '-k', 4) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ['query', 'rank', 'similarity', 'image'] and len(lines) == 1 + 12 * 4
    units = [points.vectors / np.linalg.norm(points.vectors, axis=1, keepdims=True) for points in (queries, bank)]
    cosines = units[0] @ units[1].T
    for number in range(12):
        for rank, index in enumerate(np.argsort(-cosines[number])[:4], 1):
            query, its_rank, similarity, image = lines[1 + 4 * number + rank - 1]
            assert (query, its_rank, image) == (queries.images[number], str(rank), bank.images[index])
            assert float(similarity) == pytest.approx(cosines[number, index], abs=1e-4)


def test_search_of_an_image_finds_itself(trained, tmp_path, capsys):
    run('embed', trained.both, trained.images, '--out', tmp_path / 'e.npz', '--what', 'projections')
    capsys.readouterr()
    image = trained.images / '5.png'
    assert run('search', tmp_path / 'e.npz', image, '--checkpoint', trained.both, '-k', 1) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [str(image), '1', '1.0000', str(image)]
    assert run('search', tmp_path / 'e.npz', 'no.png', image, '--checkpoint', trained.both, '-k', 1) == 1
    out, errors = capsys.readouterr()
    assert out.splitlines()[1].split()[0] == str(image) and 'no.png' in errors and '1 of 2 images' in errors


def test_contact_sheet(trained, tmp_path, capsys):
    pictures = [plain_picture(tmp_path / f'{color}.png', color) for color in COLORS]
    run('embed', trained.both, *pictures, '--out', tmp_path / 'e.npz')
    pictures[2].unlink()
    for name, tolerance in (('s.png', 0), ('s.jpg', 6)):
        assert run('search', tmp_path / 'e.npz', *pictures[:2], '--checkpoint', trained.both, '--sheet',
                   tmp_path / name) == 0
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (12 + 4 * 140, 12 + 2 * (128 + 18 + 12))
            for line, color in enumerate(('red', 'green')):
                top = 12 + line * 158 + 64
                for left in (12 + 64, 12 + 140 + 64):  # the query, and itself found first
                    assert np.abs(np.subtract(sheet.convert('RGB').getpixel((left, top)), COLORS[color])).max(
                        ) <= tolerance
    assert 'sheet: ' in capsys.readouterr().out
    assert sheet_size(1, 25) == (12 + 11 * 140, 12 + 3 * 146 + 12)
    gone = draw_sheet([SheetRow(str(tmp_path / 'gone.png'), [(str(pictures[0]), 0.5)])])
    assert gone.getpixel((20, 20)) == (0xdd,) * 3 and gone.getpixel((12 + 140 + 64, 76)) == COLORS['red']
    with pytest.raises(UserError, match='pixels high, and 65000 is the most'):
        sheet_size(1000, 10)


@pytest.mark.slow
def test_bad_input_is_one_line(trained, tmp_path, capsys):
    image, out = trained.images / '0.png', tmp_path / 'e.npz'
    assert run('embed', trained.both, trained.images, '--out', out) == 0
    before = out.read_bytes()
    for words, message in [
        ([trained.both, image, '--out', out], 'e.npz: is there already'),
        ([trained.both, image, '--out', tmp_path / 'e.txt'], 'name a file that ends in .npz or .parquet'),
        ([trained.heads, image, '--out', tmp_path / 'f.npz', '--what', 'projections'], 'holds no projector'),
        ([trained.both, image], 'required: --out'),
    ]:
        assert message in fails(capsys, 'embed', words)
    (tmp_path / 'x.npz').write_bytes(b'PK\x03\x04')
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    (tmp_path / 's.png').write_bytes(b'kept')
    for words, message in [
        ([out, image, '--checkpoint', trained.simclr], 'features of another checkpoint (test_resnet, '),
        ([tmp_path / 'none.npz', image, '--checkpoint', trained.both], 'no such file of embeddings'),
        ([tmp_path / 'x.npz', image, '--checkpoint', trained.both], 'cannot be read as embeddings'),
        ([tmp_path / 'x.parquet', image, '--checkpoint', trained.both], 'cannot be read as embeddings'),
        ([trained.data / 'val.csv', image, '--checkpoint', trained.both], 'cannot be read as embeddings'),
        ([out, tmp_path / 'none.png', '--checkpoint', trained.both], 'none.png (in the command line): cannot be read'),
        ([out, image, '--checkpoint', trained.both, '--sheet', tmp_path / 's.gif'], 'ends in .png or .jpg'),
        ([out, image, '--checkpoint', trained.both, '--sheet', tmp_path / 's.png'], 's.png: is there already'),
        ([out, *[image] * 500, '--checkpoint', trained.both, '--sheet', tmp_path / 't.png'], 'is the most'),
    ]:
        assert message in fails(capsys, 'search', words)
    assert out.read_bytes() == before and (tmp_path / 's.png').read_bytes() == b'kept'
    assert not list(tmp_path.glob('t.png')) and not list(tmp_path.glob('f.npz'))


def test_files_of_others(tmp_path):
    good = {'images': np.array(['a']), 'embeddings': np.zeros((1, 2), np.float32),
            'made_by': np.array(json.dumps({'arch': 'a', 'what': 'features', 'weights': 'plain', 'digest': '0'}))}
    for change in [{'embeddings': np.zeros((2, 2), np.float32)}, {'embeddings': np.zeros((1, 2))},
                   {'made_by': np.array('{}')}, {'made_by': np.array(str(good['made_by']).replace('plain', 'x'))},
                   {'images': np.array([1])}, {'made_by': np.array('[')}, {'images': np.array([{}], dtype=object)},
                   {'embeddings': np.zeros(1, np.float32)}]:
        np.savez(tmp_path / 'e.npz', **{**good, **change})
        with pytest.raises(UserError, match='cannot be read as embeddings'):
            Embeddings.load(tmp_path / 'e.npz')
    np.savez(tmp_path / 'e.npz', **good)
    assert Embeddings.load(tmp_path / 'e.npz').images.tolist() == ['a']


def test_another_width_than_the_models(trained, tmp_path, capsys):
    run('embed', trained.both, trained.images, '--out', tmp_path / 'e.npz')
    found = Embeddings.load(tmp_path / 'e.npz')
    Embeddings(found.images, found.vectors[:, :5], found.made_by).save(tmp_path / 'f.npz')
    words = [tmp_path / 'f.npz', trained.images / '0.png', '--checkpoint', trained.both]
    assert 'its 5 numbers an image are not what the checkpoint makes' in fails(capsys, 'search', words)


def test_without_pyarrow(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    line = fails(capsys, 'embed', [trained.both, trained.images, '--out', tmp_path / 'e.parquet'])
    assert "pip install '.[parquet]', or name a .npz file" in line


def test_the_digest_tells_weights_and_input_apart(trained, tmp_path):
    state = torch.load(trained.both, weights_only=True)
    digests = set()
    for number, change in enumerate(({}, {'mean': (0.25, 0.5, 0.5)}, {'crop_pct': 0.5})):
        path = tmp_path / f'{number}.pth.tar'
        torch.save({**state, 'data_config': {**state['data_config'], **change}, 'epoch': number}, path)
        run('embed', path, trained.images / '0.png', '--out', tmp_path / f'{number}.npz')
        digests.add(Embeddings.load(tmp_path / f'{number}.npz').made_by['digest'])
    name = next(iter(state['state_dict']))
    state['state_dict'][name] = state['state_dict'][name] * 1.001
    torch.save(state, tmp_path / '3.pth.tar')
    run('embed', tmp_path / '3.pth.tar', trained.images / '0.png', '--out', tmp_path / '3.npz')
    digests.add(Embeddings.load(tmp_path / '3.npz').made_by['digest'])
    assert len(digests) == 4
    run('embed', trained.both, trained.images / '0.png', '--out', tmp_path / '4.npz')
    assert Embeddings.load(tmp_path / '4.npz').made_by['digest'] in digests  # the epoch does not matter


def test_knn_is_of_heads_of_classes(tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    checkpoint = train_run(data, tmp_path, '--head', 'shape:loss=tags', epochs=1) / 'last.pth.tar'
    results = tmp_path / 'r.json'
    assert run('validate', data, '--checkpoint', checkpoint, '--knn', 3, '-j', 0, '--results-file', results) == 0
    results = json.loads(results.read_text())
    assert results['heads']['color']['knn_top1'] == results['mean']['knn_top1'] == 100  # plain pictures: each has twins
    assert 'knn_top1' not in results['heads']['shape'] and 'map' in results['heads']['shape']
    checkpoint = train_run(data, tmp_path / 'tags', '--heads', 'shape', '--head', 'shape:loss=tags', epochs=1)
    words = [data, '--checkpoint', checkpoint / 'last.pth.tar', '--knn', 3]
    assert 'has classes to vote for; leave it out' in fails(capsys, 'validate', words)
