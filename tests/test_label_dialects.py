"""Labels as people write them: none of the tags, words for yes and no, other separators, labels that teach nothing."""
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from common import TINY, train_run, write_data
from PIL import Image
from pyarrow import parquet

from timm_multilabel.cells import LIST, list_cell, missing_texts, tags_of
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.remarks import can_be_scored, how_read, useless_labels
from timm_multilabel.data.shards import find_shards
from timm_multilabel.data.streams import Stored, encode, read_labels, table_of_labels
from timm_multilabel.data.table import encode_targets, find_label_space, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError
from timm_multilabel.heads import SoftmaxHead, TagsHead
from timm_multilabel.labels import MISSING, BadCell, LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.reports.embedding_map import color_points
from timm_multilabel.reports.intervals import head_intervals, weighted_tag_metrics

TAGS = [[], ['a'], ['a', 'b'], None]
OF_TAGS = [[0, 0], [1, 0], [1, 1], [-1, -1]]


def png(value=0):
    data = io.BytesIO()
    Image.new('RGB', (32, 32), (value, 0, 0)).save(data, 'PNG')
    return data.getvalue()


def write_shards(folder, kind, tags, split='train'):
    if kind == 'parquet':
        table = pyarrow.table({'image': [png(n) for n in range(len(tags))],
                               'tags': pyarrow.array(tags, pyarrow.list_(pyarrow.string()))})
        parquet.write_table(table, folder / f'{split}.parquet')
        return
    with tarfile.open(folder / f'{split}.tar', 'w') as file:
        for number, of_image in enumerate(tags):
            for name, data in ((f'{number:02}.png', png(number)),
                               (f'{number:02}.json', json.dumps({'tags': of_image}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def read_shards(folder, **kwargs):
    shards = find_shards(folder, 'train', 'image', **kwargs)
    return table_of_labels(shards, [read_labels(shards.samples(images=False))])


def read_csv(folder, text, **kwargs):
    path = Path(folder) / 'train.csv'
    path.write_text(text)
    return read_table(path, TableFormat(**kwargs))


def column(*texts):
    return pd.DataFrame({'t': texts}, index=range(2, 2 + len(texts)), dtype=object)


@pytest.mark.parametrize('kind', ['parquet', 'tar'])
def test_an_empty_list_says_no_to_every_tag(tmp_path, kind):
    write_shards(tmp_path, kind, TAGS)
    table = read_shards(tmp_path)
    space = find_label_space([table], ['tags'], {'tags': TagSet})
    assert space.heads[0].classes == ('a', 'b')
    rows = encode(table, space)
    assert rows.targets.tolist() == OF_TAGS
    assert rows.encode(sorted(rows.shards.samples())).tolist() == OF_TAGS
    assert space.labelled(rows.targets).sum() == 3


@pytest.mark.parametrize('kind', ['parquet', 'tar'])
def test_values_of_a_list_are_not_split_again(tmp_path, kind):
    write_shards(tmp_path, kind, [['a|b', 'c;d'], ['none'], ['none', 'x'], ['?'], [None]])
    table = read_shards(tmp_path, missing_value='?')
    assert table.frame['tags'].tolist() == [list_cell(['a|b', 'c;d']), list_cell(['none']), list_cell(['none', 'x']),
                                            '', '']
    space = find_label_space([table], ['tags'], {'tags': TagSet}, dialect={'separator': ';'})
    assert space.heads[0].classes == ('a|b', 'c;d', 'none', 'x')
    with pytest.raises(UserError, match="column 'tags': 'none', which means none of the tags, stands beside tags"):
        find_label_space([table], ['tags'], {'tags': TagSet}, dialect={'none': 'none'})


def test_a_list_is_no_class(tmp_path):
    write_shards(tmp_path, 'tar', [['a'], ['b'], None])
    assert find_label_space([read_shards(tmp_path)], ['tags']).heads == (LabelSet('tags', ('a', 'b')),)
    for tags, count in (([], 0), (['a', 'b'], 2)):
        write_shards(tmp_path, 'tar', [['a'], tags])
        with pytest.raises(UserError, match=f"train.tar sample 01, column 'tags': a list of {count} values, where one"):
            find_label_space([read_shards(tmp_path)], ['tags'])


def test_a_text_of_a_csv_means_none(tmp_path):
    table = read_csv(tmp_path, 'image_path,t,c\n1.png,nothing,nothing\n2.png,a,x\n3.png,a|b,x\n4.png,,\n5.png,|,x\n')
    space = find_label_space([table], None, {'t': TagSet}, dialect={'none': 'nothing'})
    assert space.heads[0].classes == ('a', 'b') and space.heads[1].classes == ('nothing', 'x')  # a class like others
    targets = encode_targets(table, space, False, '')
    assert targets[:, :2].tolist() == [*OF_TAGS, [-1, -1]]
    assert find_label_space([table], None, {'t': TagSet}).heads[0].classes == ('a', 'b', 'nothing')
    bad = read_csv(tmp_path, 'image_path,t\n1.png,nothing|a\n')
    with pytest.raises(UserError, match="train.csv row 2, column 't': 'nothing', which means none of the tags, stands"):
        find_label_space([bad], None, {'t': TagSet}, dialect={'none': 'nothing'})
    with pytest.raises(UserError, match='row 2'):
        encode_targets(bad, space, True, '')


def test_an_unknown_tag_that_is_ignored_leaves_the_known_ones_at_no():
    assert TagSet('t', ('a', 'b')).encode(column('c', 'a|c', '')).tolist() == [[0, 0], [1, 0], [-1, -1]]


def test_the_dialect_is_kept_and_makes_no_other_labels(tmp_path):
    tags = TagSet('t', ('a', 'b'), separator=';', none='-')
    group = TagSet('g', ('p', 'q'), ('p', 'q'), ('q',))
    LabelSpace((tags, group)).save(tmp_path / 'space.json')
    again = LabelSpace.load(tmp_path / 'space.json')
    assert [vars(head) for head in again.heads] == [vars(tags), vars(group)]
    assert tags == TagSet('t', ('a', 'b'))  # a run may go on with another way to write them
    old = {'heads': [{'kind': 'tags', 'name': 't', 'classes': ['a'], 'group': []}]}
    assert vars(LabelSpace.from_dict(old).heads[0]) == vars(TagSet('t', ('a',)))
    for wrong in ({'separator': ''}, {'separator': 3}, {'none': ''}, {'none': 'a'}, {'minus': ['x']}):
        with pytest.raises(ValueError, match="head 't'"):
            LabelSpace.from_dict({'heads': [{**old['heads'][0], **wrong}]})


def test_stored_labels_serve_for_tags_that_are_written_alike(tmp_path):
    space = LabelSpace((TagSet('t', ('a', 'b'), separator=';'),))
    stored = Stored(tmp_path, space, {})
    assert stored.choose(['t'], {'t': TagSet}, {}, {'separator': ';'}) == space
    for other in ({}, {'separator': ';', 'none': 'x'}):
        assert stored.choose(['t'], {'t': TagSet}, {}, other) is None


@pytest.mark.parametrize('texts, expected', [
    (('True', 'FALSE', '', 'true'), [1, 0, MISSING, 1]),
    (('1.0', '0.0', '', '1'), [1, 0, MISSING, 1]),
    (('Yes', 'no', '', 'NO'), [1, 0, MISSING, 0]),
    (('y', 'N', 't', 'F'), [1, 0, 1, 0]),
    (('1', '-1', '', '-1'), [1, 0, MISSING, 0]),
    (('1.0', '-1.0', '', '1'), [1, 0, MISSING, 1]),
])
def test_words_for_yes_and_no(texts, expected):
    cells = pd.DataFrame({'p': texts}, dtype=object)
    found = TagSet.from_group('g', cells)
    assert found.encode(cells)[:, 0].tolist() == expected


def test_minus_one_is_no_where_there_is_no_zero():
    cells = pd.DataFrame({'p': ['1', '-1'], 'q': ['1', '1'], 'r': ['-1', '-1']}, dtype=object)
    found = TagSet.from_group('g', cells)
    assert found.minus == ('p', 'q', 'r') and found.encode(cells).tolist() == [[1, 1, 0], [0, 1, 0]]
    with pytest.raises(BadCell, match="'0' is neither -1 nor 1"):
        found.encode(cells.replace('-1', '0'))
    mixed = TagSet.from_group('g', cells.assign(q=['1', '0']))
    assert mixed.minus == ('p', 'r')
    for bad in (['1', '0', '-1'], ['-1', '-1', '']):  # -1 is a missing label there, or nobody knows what
        with pytest.raises(BadCell, match="'-1' is neither 0 nor 1; where it is a missing label, --missing-value -1"):
            TagSet.from_group('g', pd.DataFrame({'p': bad}, dtype=object))


def test_a_missing_value_is_missing_as_a_column_of_floats_writes_it(tmp_path):
    assert missing_texts('-1') == missing_texts('-1.0') == {'-1', '-1.0'} and missing_texts('NA') == {'NA'}
    table = read_csv(tmp_path, 'image_path,p\n1.png,1.0\n2.png,-1.0\n3.png,-1\n', missing_value='-1')
    assert table.frame['p'].tolist() == ['1.0', '', '']


@pytest.mark.parametrize('separator, text', [(',', 'a, b,'), (';', 'a;b'), (' ', ' a   b '), ('::', 'a::b')])
def test_separators_of_tags(separator, text):
    found = TagSet.from_cells('t', column(text, '', 'b'), separator=separator)
    assert found.classes == ('a', 'b') and found.encode(column(text, '', 'b')).tolist() == [[1, 1], [-1, -1], [0, 1]]
    assert tags_of(LIST, separator, None) == []


@pytest.mark.parametrize('texts, separator, line', [
    (['scab', 'rust', 'scab rust', 'healthy'], '|', 'looks like tags with blanks between them, such as .scab rust'),
    (['a,b', 'b,c', 'a'], '|', 'commas between them, such as .a,b., which was read as one tag; if so, pass '
                               '--tag-separator ,'),
    (['x;y', 'z;w'], '|', "--tag-separator ';'"),
    (['a|b', 'b'], ',', r"--tag-separator '\|'"),
    (["['a', 'b']", '[]'], '|', 'looks like lists written by a program'),
    (['red wine', 'white wine|rose wine'], '|', None),
    (['healthy', 'frog eye', 'scab'] * 3, '|', None),
    (['a', 'b', 'a|b'], '|', None),
    (['scab', 'rust', 'scab rust'], ' ', None),
])
def test_tags_that_seem_to_be_separated_otherwise(tmp_path, texts, separator, line):
    rows = ''.join(f'{number}.png,"{text}"\n' for number, text in enumerate(texts))
    table = read_csv(tmp_path, 'image_path,t\n' + rows)
    space = find_label_space([table], None, {'t': TagSet}, dialect={'separator': separator})
    lines = how_read(table, space)
    assert len(lines) == (line is not None)
    if line:
        with pytest.raises(UserError, match=line):
            raise UserError(lines[0])


MIXED = LabelSpace((LabelSet('c', ('x', 'y')), TagSet('t', ('a', 'b', 'd')), Quantity('n', 0.0, 1.0),
                    LabelSet('one', ('z',))))


def test_labels_that_teach_nothing_are_named():
    targets = torch.tensor([[0.0, 1, 0, -1, 2, 0], [0, 1, 0, -1, 2, 0], [-1, -1, 0, -1, math.nan, -1]])
    assert useless_labels(MIXED, targets, 'train.csv', scored=False) == [
        "train.csv: 'c' has labels of one class, 'x': nothing to learn",
        "train.csv: 't' has 1 of 3 tags without a 0 (a): nothing to learn; has 1 of 3 tags without a 1 (b): nothing to "
        'learn; has 1 of 3 tags without any label (d): nothing to learn',
        "train.csv: 'n' has the same number in every row: nothing to learn",
        "train.csv: 'one' has one class: nothing to learn"]
    assert useless_labels(MIXED, targets[2:], 'val.csv', scored=True) == [
        "val.csv: 'c' has no label: not scored",
        "val.csv: 't' has 1 of 3 tags without a 1 (b): not scored; has 2 of 3 tags without any label (a, d): not "
        'scored',
        "val.csv: 'n' has no label: not scored", "val.csv: 'one' has no label: not scored"]
    allowed = [can_be_scored(*pair) for pair in zip(MIXED.heads, MIXED.split(targets))]
    assert allowed == [True, False, False, False]
    good = torch.tensor([[0.0, 1, 0, 0, 2, 0], [1, 0, 1, 1, 3, 0]])
    assert [can_be_scored(*pair) for pair in zip(MIXED.heads, MIXED.split(good))] == [True, True, True, False]
    assert len(useless_labels(MIXED, good, 'val.csv', scored=True)) == 1
    assert useless_labels(MIXED, targets[:0], 'val.csv', scored=True) == []


def test_tags_without_both_answers_are_in_no_mean():
    """Tag a: average precision (1 + 2/3) / 2, F1 0.8; b has ones alone, d zeros alone."""
    target = np.array([[1, 1, 0], [0, 1, 0], [1, -1, 0]])
    said = np.array([[0.9, 0.9, 0.1], [0.8, 0.9, 0.1], [0.7, 0.9, 0.1]], dtype=np.float32)
    labels = TagSet('t', ('a', 'b', 'd'))
    head = TagsHead(labels, 4)
    expected = {'map': 100 * (1 + 2 / 3) / 2, 'f1': 80.0, 'micro_f1': 100 * 8 / 9, 'accuracy': 200 / 3}
    metrics = head.metrics(target, said)
    assert {name: metrics[name] for name in head.metric_names} == pytest.approx(expected)
    of_report = weighted_tag_metrics(target, said, np.ones((1, 3), np.int32))
    assert {name: value[0] for name, value in of_report.items()} == pytest.approx(expected)
    metrics = TagsHead(TagSet('t', ('b', 'd')), 4).metrics(target[:, 1:], said[:, 1:])
    assert np.isnan([metrics[name] for name in head.metric_names]).all()
    weighted = weighted_tag_metrics(target[:, 1:], said[:, 1:], np.ones((2, 3)))
    assert all(np.isnan(value).all() for value in weighted.values())


def test_a_single_class_has_no_accuracy():
    labels = LabelSet('c', ('x',))
    head = SoftmaxHead(labels, 4)
    assert np.isnan(list(head.metrics(np.zeros((3, 1)), np.zeros((3, 1))).values())).all()
    figure, = head_intervals(labels, np.zeros(3, int), np.ones((3, 1)))
    assert figure.name == 'top1' and math.isnan(figure.value)


def test_none_of_the_tags_is_no_missing_label_in_reports():
    labels = TagSet('t', ('a', 'b'))
    target = np.array(OF_TAGS)
    assert [labels.describe(row) for row in target] == ['none', 'a', 'a, b', '-']
    assert color_points(labels, target).rest == 'no tag, no label'
    assert color_points(labels, target[:3]).rest == 'no tag' and color_points(labels, target[1:3]).rest == ''


def write_tags(folder, *splits):
    """train.csv and val.csv with a column of tags, its cells repeated to 12 rows."""
    write_data(folder, 12, 12)
    for name, cells in zip(('train', 'val'), splits):
        table = pd.read_csv(folder / f'{name}.csv')
        table['tags'] = [cells[row % len(cells)] for row in range(12)]
        table.to_csv(folder / f'{name}.csv', index=False)
    return folder


@pytest.mark.slow
def test_training_and_validation_read_one_dialect(tmp_path, capsys):
    data = write_tags(tmp_path / 'data', ['nil', 'a', 'a;b', ''], ['nil', 'a', 'a;b', ''])
    flags = ['--heads', 'tags', '--head', 'tags:loss=tags', '-wls', '0']
    run = train_run(data, tmp_path, *flags, '--tag-separator', ';', '--none-value', 'nil', epochs=1)
    summary = pd.read_csv(run / 'summary.csv')
    model = ['--checkpoint', str(run / 'model_best.pth.tar'), '-j', '0', '--device', 'cpu']

    def scores(*more):
        run_command('validate', 'validate.py', [
            str(data), *model, '--results-file', str(tmp_path / 'r.json'), *more])
        return json.loads((tmp_path / 'r.json').read_text())['heads']['tags']

    found = scores()
    assert found['labels'] == 9 and found['map'] == pytest.approx(summary['eval/tags/map'][0])
    text = (data / 'val.csv').read_text().replace('nil', '[]').replace(';', '+')
    (data / 'val.csv').write_text(text)
    assert scores('--none-value', '[]', '--tag-separator', '+') == found
    for flag, line in ((['--none-value', 'a'], "this is a tag of 'tags'"), (['--none-value', ' '], 'an empty cell is')):
        with pytest.raises(SystemExit):
            scores(*flag)
        assert line in capsys.readouterr().err


@pytest.mark.parametrize('flags, line', [
    (['--none-value', 'x'], "--none-value 'x': no head of .* reads tags in one column; leave it out"),
    (['--tag-separator', ';'], "--tag-separator ';': no head of .* reads tags in one column"),
    (['--head', 'shape:loss=tags', '--none-value', '-1', '--missing-value', '-1.0'], 'is the same text'),
])
def test_flags_of_a_dialect_that_nobody_reads_are_refused(tmp_path, capsys, flags, line):
    with pytest.raises(SystemExit) as error:
        train_run(write_data(tmp_path / 'data'), tmp_path, *flags)
    assert error.value.code == 2 and not (tmp_path / 'run').exists()
    with pytest.raises(UserError, match=line):
        raise UserError(capsys.readouterr().err)


@pytest.mark.slow
def test_heads_that_cannot_be_scored_are_named_and_do_not_rank(tmp_path, capsys):
    """val.csv: brands that are all ignored, tags without a 0, one class of shape; color alone makes the metric."""
    data = write_tags(tmp_path / 'data', ['a', 'b'], ['a|b'])
    for name, brands in (('train', 'AB'), ('val', 'CD')):
        table = pd.read_csv(data / f'{name}.csv').assign(brand=[brands[row % 2] for row in range(12)])
        table.to_csv(data / f'{name}.csv', index=False)
    flags = ['--head', 'tags:loss=tags', '-wls', '0', '--unknown-labels', 'ignore']
    run = train_run(data, tmp_path, *flags, '--heads', 'color', 'brand', 'tags', epochs=1)
    out = capsys.readouterr().out
    val = data / 'val.csv'
    assert (f"{val}: labels that training does not know, not scored: brand 'C' in 6 rows (2, 4, 6, ...); "
            "brand 'D' in 6 rows (3, 5, 7, ...)\n") in out
    assert f"{val}: 'brand' has no label: not scored\n" in out
    assert f"{val}: 'tags' has 2 of 2 tags without a 0 (a, b): not scored\n" in out
    row = pd.read_csv(run / 'summary.csv').iloc[0]
    assert row['eval_score'] == row['eval/color/top1'] and math.isnan(row['eval/tags/map'])
    assert f'(color {row["eval/color/top1"]:.1f}%  brand -  tags - map)' in out and 'nan' not in out

    run_command('train', 'train.py', [str(data), *TINY, *flags, '--heads', 'tags', '--epochs', '1', '--output',
                                    str(tmp_path), '--experiment', 'alone'])
    line = f'{val}: its labels allow no score of any head, so checkpoints are ranked by loss\n'
    assert line in capsys.readouterr().out
    best = torch.load(tmp_path / 'alone' / 'model_best.pth.tar', weights_only=True)
    assert best['metric'] == pd.read_csv(tmp_path / 'alone' / 'summary.csv')['eval_loss'][0]
    for metric in ('score', 'tags/map'):
        with pytest.raises(SystemExit):
            run_command('train', 'train.py', [str(data), *TINY, *flags, '--heads', 'tags', '--eval-metric', metric])
        assert f'--eval-metric {metric}: ' in capsys.readouterr().err


@pytest.mark.slow
def test_ignored_labels_of_shards_are_named_although_the_label_space_is_stored(tmp_path, capsys):
    for split, tags in (('train', [['a'], ['b'], [], None] * 2), ('val', [['a'], ['c'], [], None] * 2)):
        write_shards(tmp_path, 'tar', tags, split)
    flags = ['--head', 'tags:loss=tags', '-wls', '0', '--unknown-labels', 'ignore', '--image-column', 'image']
    for number in '12':
        train_run(tmp_path, tmp_path / number, *flags, epochs=1)
        assert "labels that training does not know, not scored: tags 'c' in 2 rows" in capsys.readouterr().out
