"""CelebA, COCO and Label Studio, in files made as their documentation has them, become tables that train."""
import json

import pytest
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.errors import DataError
from timm_multilabel.labels import TagSet

ATTRIBUTES = ('Bald', 'Smiling', 'Young')


def photo(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 40), (shade, 90, 200)).save(path)


def celeba(folder, kind, each=3):
    """Images of train, val and test; attribute i is 1 where the number of the image has bit i."""
    rows = [(f'{number:06d}.jpg', [1 if number >> bit & 1 else -1 for bit in range(3)], number // each)
            for number in range(3 * each)]
    for image, _, _ in rows:
        photo(folder / 'img_align_celeba' / image)
    if kind == 'txt':
        lines = [f'{len(rows)}', ' '.join(ATTRIBUTES)]
        lines += [f'{image} {" ".join(map(str, its))}' for image, its, _ in rows]
        splits = [f'{image} {split}' for image, _, split in rows]
    else:
        lines = [','.join(('image_id', *ATTRIBUTES)), *(','.join((image, *map(str, its))) for image, its, _ in rows)]
        splits = ['image_id,partition', *(f'{image},{split}' for image, _, split in rows)]
    (folder / f'list_attr_celeba.{kind}').write_text('\n'.join(lines) + '\n')
    (folder / f'list_eval_partition.{kind}').write_text('\n'.join(splits) + '\n')


@pytest.mark.parametrize('kind', ['txt', 'csv'])
def test_celeba(tmp_path, kind):
    celeba(tmp_path / 'celeba', kind)
    made = tm.convert(tmp_path / 'celeba', tmp_path / 'data')
    assert (made.form, dict(made.rows), made.missing) == ('CelebA', {'train': 3, 'val': 3, 'test': 3}, 0)
    assert list(made.tags) == ['attributes']
    table = read_table(tmp_path / 'data' / 'val.jsonl')
    space = find_label_space([table], None, {'attributes': TagSet})
    assert list(space.heads[0].classes) == ['Bald', 'Smiling', 'Young']
    assert encode_rows(table, space).targets.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 1]]  # 3, 4, 5
    train = encode_rows(read_table(tmp_path / 'data' / 'train.jsonl'), space)
    assert train.targets[0].tolist() == [0, 0, 0] and space.labelled(train.targets).all()  # none is an answer


def coco(folder, train=(7, 8), val=(9,)):
    """The first image of train has two cats and a dog, the first one of val a dog, the others nothing."""
    categories = [{'id': 1, 'name': 'cat'}, {'id': 18, 'name': 'dog'}]
    for split, images, pairs in (
            ('train', train, [(train[0], 1), (train[0], 18), (train[0], 1)]), ('val', val, [(val[0], 18)])):
        for image in images:
            photo(folder / f'{split}2017' / f'{image:012d}.jpg', image)
        (folder / 'annotations').mkdir(exist_ok=True, parents=True)
        (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps({
            'images': [{'id': image, 'file_name': f'{image:012d}.jpg'} for image in images], 'categories': categories,
            'annotations': [{'image_id': image, 'category_id': category} for image, category in pairs]}))


def test_coco(tmp_path):
    coco(tmp_path / 'coco')
    made = tm.convert(tmp_path / 'coco', tmp_path / 'data')
    assert (made.form, dict(made.rows)) == ('COCO', {'train': 2, 'val': 1})
    lines = [json.loads(line) for line in (tmp_path / 'data' / 'train.jsonl').read_text().splitlines()]
    assert lines == [{'image_path': '../coco/train2017/000000000007.jpg', 'objects': ['cat', 'dog']},
                     {'image_path': '../coco/train2017/000000000008.jpg', 'objects': []}]
    photo(tmp_path / 'coco' / 'train2017' / '000000000009.jpg')  # of the same name as that of val
    again = tm.convert(tmp_path / 'coco', tmp_path / 'data', force=True)
    assert 'coco/val2017/000000000009.jpg' in (again.folder / 'val.jsonl').read_text()
    (tmp_path / 'coco' / 'val2017' / '000000000009.jpg').unlink()
    (tmp_path / 'coco' / 'train2017' / '000000000009.jpg').unlink()
    part = tm.convert(tmp_path / 'coco', tmp_path / 'part')
    assert dict(part.rows) == {'train': 2} and 'none of its 1 images is on disk' in part.skipped[0]
    photo(tmp_path / 'coco' / 'val2017' / '000000000009.jpg')
    one = tm.convert(tmp_path / 'coco' / 'annotations' / 'instances_val2017.json', tmp_path / 'one')
    assert dict(one.rows) == {'val': 1}


def task(image, **choices):
    result = [{'type': 'choices', 'from_name': head, 'value': {'choices': its}} for head, its in choices.items()]
    return {'id': 1, 'data': {'image': image}, 'annotations': [
        {'was_cancelled': False, 'result': result}, {'was_cancelled': True, 'result': []}]}


def test_label_studio_and_its_split(tmp_path):
    for number in range(8):
        photo(tmp_path / 'photos' / f'{number} a.jpg', 20 * number)
    tasks = [task(f'/data/local-files/?d=photos/{number}%20a.jpg', color=[('red', 'blue')[number % 2]],
                  style=[['new', 'sale'], ['new']][number % 2]) for number in range(8)]
    tasks.append(task('/data/upload/gone.jpg', color=['red']))
    (tmp_path / 'export.json').write_text(json.dumps(tasks))
    made = tm.convert(tmp_path / 'export.json', tmp_path / 'data')
    assert (dict(made.rows), made.missing, list(made.tags), list(made.heads)) == (
        {'table': 8}, 1, ['style'], ['color', 'style'])
    tm.split(tmp_path / 'data' / 'table.jsonl', image='{image_path}', heads=['color', 'style'], ratios=(50, 50, 0))
    table = read_table(tmp_path / 'data' / 'train.jsonl')
    space = find_label_space([table], None, {'style': TagSet})
    assert [(head.name, list(head.classes)) for head in space.heads] == [
        ('color', ['blue', 'red']), ('style', ['new', 'sale'])]
    assert len(encode_rows(table, space)) == 4
    run = tm.train(tmp_path / 'data', model='test_resnet', img_size=32, simclr_loss_weight=0, batch_size=2, workers=0,
                   epochs=1, warmup_epochs=0, cooldown_epochs=0, head={'style': {'loss': 'tags'}}, output=tmp_path)
    assert run.metric == 'score' and '"sale"' in (run.folder / 'label_space.json').read_text()


def test_label_studio_minimal(tmp_path):
    photo(tmp_path / 'a.jpg')
    (tmp_path / 'export.json').write_text(json.dumps([
        {'id': 1, 'image': 'https://host/data/upload/a.jpg', 'color': 'red', 'style': {'choices': ['x', 'y']},
         'annotator': 2, 'created_at': '2026'}]))
    tm.convert(tmp_path / 'export.json', tmp_path / 'data')
    assert json.loads((tmp_path / 'data' / 'table.jsonl').read_text()) == {
        'image_path': '../a.jpg', 'color': 'red', 'style': ['x', 'y']}


def test_what_cannot_be_converted(tmp_path):
    (tmp_path / 'x.json').write_text('{}')
    for source in (tmp_path, tmp_path / 'x.json'):
        with pytest.raises(DataError, match=r'of no form that is known: CelebA \(list_attr_celeba.txt and'):
            tm.convert(source, tmp_path / 'data')
    coco(tmp_path / 'coco')
    path = tmp_path / 'coco' / 'annotations' / 'instances_train2017.json'
    good = path.read_text()
    path.write_text(good.replace('"category_id": 18', '"category_id": 99'))
    with pytest.raises(DataError, match=r'annotations\[1\]: there is no category 99'):
        tm.convert(tmp_path / 'coco', tmp_path / 'data')
    path.write_text(good)
    with pytest.raises(DataError, match=r'none of its 2 images is on disk: .*; name the folder that they are under'):
        tm.convert(tmp_path / 'coco', tmp_path / 'data', image_root=tmp_path)
    assert not (tmp_path / 'data').exists()
    tm.convert(tmp_path / 'coco', tmp_path / 'data')
    with pytest.raises(DataError, match='already there; overwrite with force'):
        tm.convert(tmp_path / 'coco', tmp_path / 'data')
    (tmp_path / 'data' / 'train.csv').write_text('image_path,a\n')
    with pytest.raises(DataError, match='train.csv: already there, and would be read too'):
        tm.convert(tmp_path / 'coco', tmp_path / 'data', force=True)
    celeba(tmp_path / 'celeba', 'txt')
    with (tmp_path / 'celeba' / 'list_attr_celeba.txt').open('a') as file:
        file.write('000010.jpg 1 1\n')
    with pytest.raises(DataError, match='line 12: 3 words, expected 4'):
        tm.convert(tmp_path / 'celeba', tmp_path / 'data2')
