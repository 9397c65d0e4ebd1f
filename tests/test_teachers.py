"""Teachers: their losses against the formulas, what they are asked and when, and what a run does with the answers."""
import shutil
import stat

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from common import (
    SPACE,
    assert_same_summary,
    assert_same_weights,
    tiny_task,
    train_ranks,
    train_run,
    train_settings,
    write_data,
)
from PIL import Image

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.packing import pack
from timm_multilabel.data.table import read_table
from timm_multilabel.errors import UserError
from timm_multilabel.heads import load_registry
from timm_multilabel.inference.loaded import LoadedModel
from timm_multilabel.inference.predictor import Predictor
from timm_multilabel.inference.teachers import Adapter, FeatureTeacher, Teachers
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.losses import (
    binary_distillation_loss,
    distillation_loss,
    feature_loss,
    mean_of_classes,
    mean_of_tags,
)
from timm_multilabel.task import Teaching
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.trainer import Precision

LOGITS, OTHERS = 3 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INF, NAN = float('inf'), float('nan')


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_losses_are_the_divergence_at_a_temperature_times_its_square(temperature):
    p, q = (each.div(temperature).softmax(1) for each in (OTHERS, LOGITS))
    torch.testing.assert_close(
        distillation_loss(LOGITS, OTHERS.log_softmax(1), temperature),
        temperature ** 2 * (p * (p / q).log()).sum(1), rtol=1e-12, atol=0)
    p, q = (each.div(temperature).sigmoid() for each in (OTHERS, LOGITS))
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(
        binary_distillation_loss(LOGITS, OTHERS, temperature), temperature ** 2 * divergence.mean(1),
        rtol=1e-10, atol=0)
    for loss in (distillation_loss, binary_distillation_loss):
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss(x, OTHERS, temperature), LOGITS.clone().requires_grad_())
        assert loss(LOGITS, LOGITS, temperature).abs().max() < 1e-12


def test_classes_and_tags_that_a_teacher_does_not_know():
    """A class gets no probability; a tag is left out."""
    logits = LOGITS.clone().requires_grad_()
    answer = OTHERS.clone()
    answer[:, 1] = -INF
    p = OTHERS[:, [0, 2, 3]].softmax(1)
    expected = (p * (p.log() - LOGITS.log_softmax(1)[:, [0, 2, 3]])).sum(1)
    loss = distillation_loss(logits, answer, 1.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert logits.grad.isfinite().all() and (logits.grad[:, 1] > 0).all()
    answer[:, 1] = NAN
    torch.testing.assert_close(
        binary_distillation_loss(LOGITS, answer, 2.0),
        binary_distillation_loss(LOGITS[:, [0, 2, 3]], OTHERS[:, [0, 2, 3]], 2.0))


def test_the_mean_is_that_of_probabilities():
    mean = (LOGITS.softmax(1) + OTHERS.softmax(1)) / 2
    torch.testing.assert_close(mean_of_classes([each.log_softmax(1) for each in (LOGITS, OTHERS)]).exp(), mean)
    mean = (LOGITS.sigmoid() + OTHERS.sigmoid()) / 2
    torch.testing.assert_close(mean_of_tags([LOGITS, OTHERS]).sigmoid(), mean)
    some = OTHERS.clone()
    some[:, 0] = NAN
    found = mean_of_tags([LOGITS, some])
    torch.testing.assert_close(found[:, 0], LOGITS[:, 0])
    assert mean_of_tags([some, some])[:, 0].isnan().all()
    assert mean_of_tags([torch.tensor([[80.0]]), torch.tensor([[82.0]])]).item() == pytest.approx(80.57, abs=0.1)


def test_the_term_by_hand_for_heads_that_a_teacher_has():
    """Over all rows and views, with the weight of the head; a head that it lacks learns from labels alone."""
    task = tiny_task(teaching=Teaching(('shape',), 0.5, 3.0), head_weights={'color': 1.0, 'shape': 4.0})
    images, target = torch.randn(8, 3, 8, 8), torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 0]]).repeat(2, 1)
    answers = torch.randn(8, 2)
    result = task(images, torch.cat([target, answers], dim=1))
    logits = task.joint_module.model(images)['shape']
    expected = 0.5 * 4 * distillation_loss(logits, answers, 3.0).mean()
    assert task.terms == ('simclr', 'classification', 'teacher')
    torch.testing.assert_close(result['teacher_loss'], expected.detach())
    plain = tiny_task(head_weights={'color': 1.0, 'shape': 4.0})(images, target)
    torch.testing.assert_close(result['loss'], plain['loss'] + expected)


def test_pieces_of_a_batch_and_teachers_asked_for_each_view():
    """The same gradient; the teacher sees pieces of the batch, too."""
    asked = []

    def of_views(images):
        asked.append(len(images))
        return images.mean(dim=(2, 3))[:, :2]

    images, target = torch.randn(8, 3, 8, 8), torch.zeros(8, 2)
    gradients = []
    for teaching, micro_batch, targets in (
            (Teaching(('shape',)), None, torch.cat([target, of_views(images)], dim=1)),
            (Teaching(('shape',), of_views=of_views), None, target),
            (Teaching(('shape',), of_views=of_views), 3, target)):
        task = tiny_task(teaching=teaching, micro_batch=micro_batch)
        task(images, targets)['loss'].backward()
        gradients.append([p.grad for p in task.joint_module.parameters()])
    assert asked == [8, 8, 3, 3, 2]
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_a_number_is_learnt_in_the_unit_of_the_student():
    space = LabelSpace((Quantity('price', 10.0, 2.0),))
    task = tiny_task(space=space)
    output, answer = torch.tensor([0.5, 3.0]), torch.tensor([[0.0], [1.0]])
    head = task.heads['price']
    assert head.teacher_loss(output, answer, 7.0).tolist() == pytest.approx([0.125, 1.5])


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Data, a pool folder, and two teachers of other sizes."""
    folder = tmp_path_factory.mktemp('teachers')
    data = write_data(folder / 'data', train=12, val=6)
    (write_data(folder / 'more', train=8, val=1) / 'images').rename(folder / 'pool')
    for name, size in (('a', 24), ('b', 40)):
        train_run(data, folder / name, '-wls', '0', '--img-size', str(size), '--seed', str(size), epochs=1)
    return folder


@pytest.fixture
def teachers(place):
    return [str(place / name / 'run' / 'model_best.pth.tar') for name in ('a', 'b')]


def learn(place, output, teachers, *flags, epochs=2):
    return train_run(place / 'data', output, '-wls', '0', '--cache-dir', str(output / 'cache'), '--teacher', *teachers,
                     *flags, epochs=epochs)


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        run_command('train', 'train.py', [str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_answers_are_the_mean_of_what_the_checkpoints_say_with_their_own_sizes(place, teachers, tmp_path, capsys):
    run = learn(place, tmp_path, teachers, '--unlabelled', str(place / 'pool'), '--unlabelled-batch-size', '4')
    file, = (tmp_path / 'cache').iterdir()
    assert not file.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP) and file.stat().st_size == (12 + 9) * 5 * 2
    answers = np.fromfile(file, np.float16).reshape(-1, 5).astype(float)
    images = sorted(map(str, [*(place / 'data' / 'images').glob('*.png'), *(place / 'pool').glob('*.png')]))
    train = pd.read_csv(place / 'data' / 'train.csv')['image_path']
    images = [image for image in images if '/pool/' in image or image.endswith(tuple('/' + each for each in train))]
    said = [Predictor.load(teacher)(images, top_k=3) for teacher in teachers]
    for row, guesses in enumerate(zip(*said, strict=True)):
        for head, columns in (('color', slice(0, 3)), ('shape', slice(3, 5))):
            mean = dict.fromkeys(SPACE.heads[head == 'shape'].classes, 0.0)
            for guess in guesses:
                for label, probability in guess[head]:
                    mean[label] += probability / 2
            assert np.exp(answers[row, columns]) == pytest.approx(list(mean.values()), abs=2e-3)
    out = capsys.readouterr().out
    assert f'teachers {teachers[0]}, {teachers[1]}: for color, shape' in out
    assert f'teacher: predicts 21 images once, kept in {file}' in out
    assert '12 images to train on and 9 without labels' in out and ', teacher 0.' in out
    assert yaml.safe_load((run / 'args.yaml').read_text())['teacher'] == teachers
    assert (pd.read_csv(run / 'summary.csv')['teacher_loss'] > 0).all()
    assert set(torch.load(run / 'last.pth.tar', weights_only=True)['state_dict']) == set(
        torch.load(teachers[0], weights_only=True)['state_dict'])  # nothing of the teachers


@pytest.mark.slow
def test_a_resumed_run_reads_or_makes_them_again_to_the_same_result(place, teachers, tmp_path, capsys):
    """And unlabelled rows of the table are taught in the same batches."""
    data = tmp_path / 'data'
    shutil.copytree(place / 'data', data)
    lines = (data / 'train.csv').read_text().splitlines()
    (data / 'train.csv').write_text('\n'.join([*lines[:7], *(line.split(',')[0] + ',,' for line in lines[7:])]) + '\n')
    flags = ['-wls', '0', '--teacher', teachers[0], '--cache-dir', str(tmp_path / 'cache')]
    whole = train_run(data, tmp_path / 'whole', *flags)
    assert '12 images to train on, 6' in capsys.readouterr().out
    train_run(data, tmp_path / 'part', *flags)
    assert 'teacher: reads the predictions on 12 images' in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'cache')
    part = tmp_path / 'part' / 'run'
    run_command('train', 'train.py', ['-c', str(part / 'args.yaml'), '--resume', str(part / 'checkpoint-0.pth.tar')])
    assert 'teacher: predicts 12 images once' in capsys.readouterr().out
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)


@pytest.mark.slow
def test_two_ranks_share_the_work_and_the_file(place, teachers, tmp_path):
    learn(place, tmp_path / 'one', teachers, epochs=1)
    one, = (tmp_path / 'one' / 'cache').iterdir()
    words = [str(place / 'data'), '--model', 'test_resnet', '--img-size', '32', '-b', '2', '-j', '0', '--device', 'cpu',
             '-wls', '0', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '-vb', '4', '--output',
             str(tmp_path / 'two'), '--cache-dir', str(tmp_path / 'cache'), '--teacher', *teachers]
    out = train_ranks(words)
    two, = (tmp_path / 'cache').iterdir()
    assert out.count('teacher: predicts 12 images once') == 1 and two.name == one.name
    found = [np.fromfile(file, np.float16).astype(float) for file in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_teachers_with_images_on_the_device(place, teachers, tmp_path):
    """Targets lie beside the images; test_cache compares them."""
    run = learn(place, tmp_path, teachers[:1], '--views', 'simclr', '--unlabelled', str(place / 'pool'), '--cache',
                'device', epochs=1)
    assert pd.read_csv(run / 'summary.csv')['teacher_loss'][0] > 0


def test_teachers_are_asked_for_views_in_their_size_and_normalisation(teachers):
    loaded = [LoadedModel.of(read_checkpoint(teacher), 'best', Precision(torch.device('cpu')), load_registry(None))
              for teacher in teachers]
    loaded[0].checkpoint.state['data_config'] |= {
        'mean': [0.2] * 3, 'std': [0.4] * 3, 'interpolation': 'bicubic'}
    views = torch.rand(3, 3, 40, 40)
    asked = Teachers(loaded, SPACE, [0.5] * 3, [0.5] * 3)
    answers = asked.of_views((views - 0.5) / 0.5)
    small = F.interpolate(views, (24, 24), mode='bicubic', antialias=True)
    config = loaded[1].checkpoint.data_config
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        outputs = [loaded[0].model((small - 0.2) / 0.4), loaded[1].model((views - mean) / std)]
    for name, columns in (('color', slice(0, 3)), ('shape', slice(3, 5))):
        expected = sum(output[name].softmax(1) for output in outputs) / 2
        torch.testing.assert_close(answers[:, columns].exp(), expected, rtol=1e-4, atol=1e-5)


def test_views_need_no_file(place, teachers, tmp_path):
    run = train_run(place / 'data', tmp_path, '-wls', '0.5', '--teacher', *teachers, '--teacher-views',
                    '--teacher-weight', '2', '--teacher-temperature', '4', epochs=1)
    assert pd.read_csv(run / 'summary.csv')['teacher_loss'][0] > 0


@pytest.mark.slow
def test_a_student_of_a_good_teacher_and_a_pool_beats_labels_alone(tmp_path):
    """Plain pictures of three colors; of six labels four are wrong."""
    data = write_data(tmp_path / 'data', train=24, val=12)
    table = pd.read_csv(data / 'train.csv')
    for split in ('train', 'val'):
        pd.read_csv(data / f'{split}.csv').drop(columns='shape').to_csv(data / f'{split}.csv', index=False)
    base = ['--drop', '0', '--reprob', '0', '-wls', '0', '-wlc', '1', '--lr', '0.02', '--opt', 'adamw', '-b', '4']
    teacher = train_run(data, tmp_path / 'teacher', *base, epochs=4)
    few = table[['image_path', 'color']].head(6).copy()
    few['color'] = ['green', 'blue', 'red', 'red', 'green', 'blue']
    few.to_csv(data / 'few.csv', index=False)
    base = [*base, '--train-split', str(data / 'few.csv'), '--epoch-steps', '16']
    table[['image_path']].to_csv(data / 'pool.csv', index=False)
    alone = train_run(data, tmp_path / 'alone', *base, epochs=2)
    student = train_run(data, tmp_path / 'student', *base, '--unlabelled', 'pool', '--unlabelled-batch-size', '8',
                        '--teacher', str(teacher / 'model_best.pth.tar'), '--teacher-weight', '4',
                        '--cache-dir', str(tmp_path / 'cache'), epochs=2)
    scores = [pd.read_csv(run / 'summary.csv')['eval_top1'].iloc[-1] for run in (teacher, alone, student)]
    assert scores[0] == 100 and scores[2] == 100 and scores[1] < 70


RECIPE = {
    'model': 'test_resnet', 'img_size': 32, 'batch_size': 4, 'workers': 0, 'device': 'cpu', 'simclr_loss_weight': 0,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'phases': [
        {'name': 'labels', 'epochs': 2}, {'name': 'again', 'epochs': 1, 'start_from': 'initial'},
        {'name': 'student', 'epochs': 2, 'teacher': ['labels', 'again'], 'unlabelled': 'pool', 'start_from': 'initial',
         'model': 'test_vit'}]}


def write_recipe(place, folder, **further):
    path = folder / 'recipe.yaml'
    shutil.copytree(place / 'data', folder / 'data')
    shutil.copytree(place / 'pool', folder / 'data' / 'pool')
    path.write_text(yaml.safe_dump({
        'data_dir': str(folder / 'data'), 'output': str(folder), 'experiment': 'run',
        'cache_dir': str(folder / 'cache'), **RECIPE, **further}))
    return path


@pytest.mark.slow
def test_a_phase_learns_from_the_best_checkpoints_of_earlier_ones(place, teachers, tmp_path, capsys):
    student = {**RECIPE['phases'][2], 'model': 'test_resnet', 'start_from': 'labels'}
    phases = [*RECIPE['phases'][:2], student]
    path = write_recipe(place, tmp_path, initial_checkpoint=teachers[0], phases=phases)
    run_command('train', 'train.py', ['-c', str(path)])
    run, out = tmp_path / 'run', capsys.readouterr().out
    assert 'teachers labels, again: for color, shape' in out and 'teacher: predicts 21 images once' in out
    summary = pd.read_csv(run / 'summary.csv')
    assert summary['teacher_loss'].notna().tolist() == [False, False, False, True, True]
    # A phase that says where it starts is a run by itself, with a seed of its own.
    settings = {name: value for name, value in yaml.safe_load(path.read_text()).items()
                if name not in ('phases', 'cache_dir')}
    names = ('1-labels', '2-again')
    of_student = {name: value for name, value in student.items() if name not in ('name', 'start_from')} | {
        'cache_dir': str(tmp_path / 'cache'), 'initial_checkpoint': str(run / '1-labels' / 'last.pth.tar'),
        'teacher': [str(run / name / 'model_best.pth.tar') for name in names]}
    for index, folder, its in ((1, run / '2-again', {'epochs': 1}), (2, run, of_student)):
        alone = tmp_path / 'alone.yaml'
        alone.write_text(yaml.safe_dump({
            **settings, **its, 'experiment': f'alone-{index}',
            'seed': int(np.random.SeedSequence((42, index)).generate_state(1)[0]) % 2 ** 31}))
        run_command('train', 'train.py', ['-c', str(alone)])
        assert_same_weights(tmp_path / f'alone-{index}' / 'last.pth.tar', folder / 'last.pth.tar')
    capsys.readouterr()
    # Resumed within the first phase, without the initial checkpoint's name, and in the last one.
    settings = yaml.safe_load(path.read_text())
    del settings['initial_checkpoint']
    path.write_text(yaml.safe_dump(settings))
    for name, words in (('last', ['-c', str(run / 'args.yaml')]), ('first', ['-c', str(path)])):
        again = tmp_path / name
        shutil.copytree(run, again)
        for checkpoint in again.rglob('*.pth.tar'):
            if checkpoint.name != 'checkpoint-0.pth.tar' and (name == 'first' or checkpoint.parent == again):
                checkpoint.unlink()
        if name == 'first':
            shutil.rmtree(again / '2-again')
            (again / 'checkpoint-0.pth.tar').unlink()
        run_command('train', 'train.py', [*words, '--experiment', name, '--resume', str(again)])
        assert 'teacher: ' in capsys.readouterr().out
        assert_same_weights(run / 'last.pth.tar', again / 'last.pth.tar')


def test_a_phase_that_starts_from_none_before_it(place, tmp_path, capsys):
    path = write_recipe(place, tmp_path, phases=[{**RECIPE['phases'][0], 'start_from': 'student'}, RECIPE['phases'][2]])
    assert error_of(capsys, '-c', path) == (
        f"train.py: error: {path}, phase 'labels': start_from 'student' is none of the phases before it (there are: "
        'initial)')
    path.write_text(path.read_text().replace('labels', 'initial').replace('start_from: student', ''))
    assert error_of(capsys, '-c', path) == (
        f"train.py: error: {path}, phase 'initial': 'initial' stands for the initial weights; give the phase another "
        'name')


def test_phases_that_cannot_teach(place, tmp_path, capsys):
    simclr = {'name': 'simclr', 'epochs': 1, 'wls': 1, 'wlc': 0}
    path = write_recipe(place, tmp_path, phases=[simclr, {**RECIPE['phases'][2], 'teacher': 'labells'}])
    line = error_of(capsys, '-c', path)
    assert line == (f"train.py: error: {path}, phase 'student': --teacher labells: no such checkpoint, nor an earlier "
                    'phase (there are: simclr)')
    path.write_text(path.read_text().replace('labells', 'simclr'))
    assert error_of(capsys, '-c', path) == (
        f"train.py: error: {path}, phase 'student': --teacher simclr: no head in common: the teacher has none, and the "
        'data color, shape')
    assert not (tmp_path / 'run').exists()


def write_labels(folder, place, **columns):
    """The data with other labels."""
    shutil.copytree(place / 'data', folder)
    for split in ('train', 'val'):
        table = pd.read_csv(folder / f'{split}.csv')
        for name, change in columns.items():
            table[name] = table[name].map(change)
        table.to_csv(folder / f'{split}.csv', index=False)
    return folder


def test_other_classes_are_an_error_or_left_out(place, teachers, tmp_path, capsys):
    data = write_labels(tmp_path / 'data', place, color={'red': 'red', 'green': 'green', 'blue': 'grey'})
    words = [data, '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu', '-wls', '0',
             '--epochs', '1', '--output', tmp_path / 'out', '--cache-dir', tmp_path / 'cache', '--teacher', teachers[0]]
    assert error_of(capsys, *words) == (
        f"train.py: error: --teacher {teachers[0]}: head 'color' has other classes than the data: only the teacher has "
        'blue; it lacks grey; name another teacher, or pass --unknown-labels ignore to learn from the others')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'cache').exists()
    run_command('train', 'train.py', [*map(str, words), '--unknown-labels', 'ignore'])
    assert 'which are left out: only the teacher has blue; it lacks grey' in capsys.readouterr().out
    file, = (tmp_path / 'cache').iterdir()
    green, grey, red = np.fromfile(file, np.float16).reshape(-1, 5).astype(float)[:, :3].T
    assert np.isneginf(grey).all() and np.exp(green) + np.exp(red) == pytest.approx(np.ones(12), abs=2e-3)


@pytest.mark.parametrize(('columns', 'message'), [
    ({'color': lambda text: 'a ' + text}, "head 'color' has no class in common with the data; name another teacher"),
    ({'color': lambda text: f'{text}|x'}, "head 'color' is of classes there and of tags here; leave it out of --heads, "
                                          'or name another teacher'),
])
def test_heads_that_a_teacher_cannot_teach(place, teachers, tmp_path, capsys, columns, message):
    data = write_labels(tmp_path / 'data', place, **columns)
    tags = ['--head', 'color:loss=tags'] if '|' in str(columns['color']('')) else []
    assert error_of(capsys, data, '--teacher', teachers[0], *tags, '--unknown-labels', 'ignore', '--model',
                    'test_resnet', '-b', '4') == f'train.py: error: --teacher {teachers[0]}: {message}'


def test_a_teacher_that_was_trained_on_images_that_are_scored(place, teachers, tmp_path, capsys):
    data = tmp_path / 'data'
    data.mkdir()
    for split, name in (('train', 'val'), ('val', 'train')):  # the other way round
        table = pd.read_csv(place / 'data' / f'{name}.csv')
        table['image_path'] = [str(place / 'data' / each) for each in table['image_path']]
        table.to_csv(data / f'{split}.csv', index=False)
    train_run(data, tmp_path, '-wls', '0', '--teacher', teachers[0], '--cache-dir', str(tmp_path / 'cache'), epochs=1)
    assert (f'--teacher {teachers[0]}: was trained on 12 of 12 images of {data}/val.csv (so says '
            f'{place}/a/run/args.yaml), so scores on them say too much') in capsys.readouterr().out


@pytest.mark.parametrize(('flags', 'message'), [
    (['--teacher-weight', '2'], '--teacher-weight would change nothing: there is no --teacher; leave it out'),
    (['--teacher-views'], '--teacher-views would change nothing: there is no --teacher; leave it out'),
    (['-wlc', '0', '--teacher', 'x'], '--teacher would change nothing: -wlc 0 trains no heads; leave it out'),
    (['-wls', '0', '--mixup', '1', '--teacher', 'x'], '--mixup and --cutmix mix photos, and teachers are asked about '
                                                      'one photo: leave them out with --teacher'),
    (['--teacher-features-weight', '2'],
     '--teacher-features-weight would change nothing: there is no --teacher-features; leave it out'),
    (['-wls', '0', '--freeze-backbone', '--teacher-features', 'test_vit'],
     '--freeze-backbone trains the heads alone, and --teacher-features the backbone: leave one out'),
    (['--teacher', 'x', '--teacher-views', '--cache-dir', 'x'],
     '--cache-dir would change nothing: there is no --cache disk; leave it out'),
])
def test_settings_that_do_not_go_together(flags, message):
    with pytest.raises(UserError) as error:
        check_phases(train_settings('data', *flags))
    assert error.value.line == message


def test_files_that_cannot_be_used(place, teachers, tmp_path, capsys):
    start = [place / 'data', '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-wls', '0', '--teacher']
    picture = tmp_path / 'picture.png'
    Image.new('RGB', (4, 4)).save(picture)
    assert error_of(capsys, *start, picture) == (
        f'train.py: error: {picture}: cannot be loaded as a checkpoint (damaged?)')
    assert error_of(capsys, *start, tmp_path / 'x') == (
        f'train.py: error: --teacher {tmp_path}/x: no such checkpoint')
    assert error_of(capsys, *start, teachers[0], '--cache-dir', picture) == (
        f'train.py: error: --teacher: 0.0 MB of predictions cannot be kept in {picture} (File exists); name another '
        '--cache-dir, or pass --teacher-views')


def test_translated_heads_of_every_kind():
    """Tags in another order and of which one is new, and a number in another unit."""
    theirs = LabelSpace((TagSet('tags', ('b', 'a')), Quantity('price', 100.0, 10.0), LabelSet('color', ('x', 'y'))))
    ours = LabelSpace((TagSet('tags', ('a', 'b', 'c')), Quantity('price', 50.0, 100.0)))
    model = tiny_task(space=theirs).joint_module.model.eval()
    config = {'input_size': [3, 8, 8], 'mean': [0.5] * 3, 'std': [0.5] * 3, 'interpolation': 'bilinear'}
    checkpoint = type('Checkpoint', (), {'data_config': config, 'path': 'x'})
    loaded = LoadedModel(checkpoint, 'plain', model, Precision(torch.device('cpu')))
    images = torch.randn(4, 3, 8, 8)
    answers = Teachers([loaded], ours, [0.5] * 3, [0.5] * 3).answers([images])
    with torch.no_grad():
        said = model(images)
    torch.testing.assert_close(answers[:, :2], said['tags'][:, [1, 0]])
    assert answers[:, 2].isnan().all()
    torch.testing.assert_close(answers[:, 3], (said['price'] * 10 + 100 - 50) / 100)


def test_features_are_compared_by_their_cosine():
    expected = [1 - sum(a * b).item() / (sum(a * a) * sum(b * b)).sqrt().item() for a, b in zip(LOGITS, OTHERS)]
    assert feature_loss(LOGITS, 1e3 * OTHERS).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, OTHERS), LOGITS.clone().requires_grad_())


def test_a_teacher_of_features_gets_views_in_its_size_and_normalisation():
    backbone = timm.create_model('test_resnet', num_classes=0)
    config = {'input_size': [3, 24, 24], 'mean': [0.2] * 3, 'std': [0.4] * 3, 'interpolation': 'bilinear'}
    teacher = FeatureTeacher(backbone, Adapter(config, [0.5] * 3, [0.5] * 3, Precision(torch.device('cpu'))))
    views = torch.rand(2, 3, 32, 32)
    small = F.interpolate(views, (24, 24), mode='bilinear', antialias=True)
    with torch.no_grad():
        expected = backbone((small - 0.2) / 0.4)
    torch.testing.assert_close(teacher.of_views((views - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-5)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


@pytest.fixture
def vit(tmp_path):
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.pth')
    return ['--teacher-features', 'test_vit', '--teacher-features-path', str(tmp_path / 'vit.pth')]


def test_pretraining_by_features_alone_resumes_to_the_same_result(place, vit, tmp_path, capsys):
    """The checkpoint has the map to the features, and nothing of the teacher."""
    run = train_run(place / 'data', tmp_path, *vit, '-wls', '0', '-wlc', '0', '--unlabelled', str(place / 'pool'))
    out = capsys.readouterr().out
    assert 'teacher of features test_vit: 64 features of views of 160x160' in out and '21 images to train on' in out
    assert '--teacher-features-path' in out and 'left out 2 that test_vit has not' in out
    losses = pd.read_csv(run / 'summary.csv')['teacher_features_loss']
    assert losses[1] < losses[0] < 1.2 and 'Best teacher_features_loss' in out
    state = torch.load(run / 'last.pth.tar', weights_only=True)
    student = torch.load(place / 'a' / 'run' / 'last.pth.tar', weights_only=True)['state_dict']
    assert set(state['task_state']) == {'to_features'}
    assert set(state['state_dict']) == {name for name in student if name.startswith('backbone.')}
    again = tmp_path / 'again'
    shutil.copytree(run, again / 'run')
    for path in (again / 'run').glob('*.pth.tar'):
        if path.name != 'checkpoint-0.pth.tar':
            path.unlink()
    train_run(place / 'data', again, *vit, '-wls', '0', '-wlc', '0', '--unlabelled', str(place / 'pool'), '--resume',
              'auto')
    assert_same_weights(run / 'last.pth.tar', again / 'run' / 'last.pth.tar')
    train_run(place / 'data', tmp_path / 'labels', '-wls', '0', '--initial-checkpoint', str(run / 'last.pth.tar'),
              epochs=1)
    assert 'took backbone (plain weights)' in capsys.readouterr().out


@pytest.mark.parametrize(('flags', 'message'), [
    (['nonesuch'], '--teacher-features nonesuch: timm '),
    (['test_vit', '--teacher-features-path', 'x'], '--teacher-features-path x: no such file'),
])
def test_models_that_cannot_teach_features(place, capsys, flags, message):
    assert message in error_of(
        capsys, place / 'data', '--model', 'test_resnet', '-b', '4', '--teacher-features', *flags)


def test_no_file_decides_that_a_teacher_is_downloaded(place, tmp_path, capsys):
    path = tmp_path / 'a.yaml'
    path.write_text('teacher_features: hf-hub:x/y\n')
    assert error_of(capsys, place / 'data', '-c', path) == (
        f"train.py: error: {path}: the model hf-hub:x/y is not one of timm's own, and no model is downloaded because a "
        'file asks for it; pass --allow-hub if you trust it, or name another with --teacher-features')


@pytest.mark.parametrize('views', [False, True])
def test_shards_are_asked_about_by_view(place, teachers, tmp_path, capsys, views):
    packed = tmp_path / 'packed'
    packed.mkdir()
    for name in ('train', 'val'):
        pack(read_table(place / 'data' / f'{name}.csv'), packed, name, 'webdataset', size=6)
    words = ['-wls', '0', '--teacher', teachers[0], *(['--teacher-views'] if views else [])]
    if views:
        assert pd.read_csv(train_run(packed, tmp_path, *words, epochs=1) / 'summary.csv')['teacher_loss'][0] > 0
        return
    assert error_of(capsys, packed, '--model', 'test_resnet', '-b', '4', *words) == (
        f'train.py: error: --teacher: nothing is kept of shards, such as {packed}/train-*.tar; pass --teacher-views')
