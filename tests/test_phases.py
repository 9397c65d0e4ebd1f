"""Recipes of phases: one run folder, what each starts from, killed and resumed, and the recipes that are there."""
import importlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from common import TINY, assert_same_summary, train_run, train_settings, write_data

from timm_multilabel.assembly.checks import check_phases, without_effect
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.sample import write_sample
from timm_multilabel.errors import UserError

RECIPES = Path(__file__).parent.parent / 'recipes'
RECIPE = {
    'model': 'test_resnet', 'img_size': 32, 'batch_size': 4, 'workers': 0, 'device': 'cpu', 'lr': 0.05, 'drop': 0.2,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'reprob': 0.3,
    'phases': [
        {'name': 'pretrain', 'wlc': 0, 'epochs': 2, 'unlabelled': 'pool'},
        {'name': 'joint', 'epochs': 3, 'lr': 0.02, 'unlabelled': 'pool', 'unlabelled_batch_size': 3,
         'entropy_weight': 0.2, 'entropy_ramp_up': 2, 'model_ema': True,
         'head': {'shape': {'loss': 'arcface', 'input': 'projection'}}},
        {'name': 'heads', 'epochs': 1, 'wls': 0, 'wlc': 1, 'freeze_backbone': True, 'heads': ['color']},
    ],
}


def write_recipe(folder):
    """A data directory with a pool, and a recipe for it; its path."""
    data = write_data(folder / 'data', train=8, val=6)
    rows = (data / 'train.csv').read_text().splitlines()
    pool = write_data(folder / 'more', train=7, val=1)
    (pool / 'images').rename(data / 'pool-images')
    (data / 'pool.csv').write_text('image_path\n' + ''.join(f'pool-images/{n}.png\n' for n in range(7)))
    rows[3] = rows[3].split(',')[0] + ',,'
    (data / 'train.csv').write_text('\n'.join(rows) + '\n')
    path = folder / 'recipe.yaml'
    path.write_text(yaml.safe_dump({'data_dir': str(data), 'output': str(folder), 'experiment': 'run', **RECIPE}))
    return path


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def go(*argv):
    run_command('train', 'train.py', [str(word) for word in argv])


def state(path):
    return torch.load(path, weights_only=True)


def flat(path):
    loaded = state(path)
    return {f'{part}.{name}': value for part in ('state_dict', 'state_dict_ema') for name, value in
            loaded.get(part, {}).items()} | {
        f'projector.{name}': value for name, value in loaded.get('task_state', {}).get('projector', {}).items()}


@pytest.mark.slow
def test_phases_run_in_order_in_one_folder(recipe, tmp_path, capsys):
    go('-c', recipe)
    folder, out = tmp_path / 'run', capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        'args.yaml', 'label_space.json', 'summary.csv', 'curves.png', '1-pretrain', '2-joint', 'last.pth.tar',
        'model_best.pth.tar', 'checkpoint-0.pth.tar'}
    summary = pd.read_csv(folder / 'summary.csv')
    assert summary['phase'].tolist() == ['pretrain'] * 2 + ['joint'] * 3 + ['heads']
    assert summary['epoch'].tolist() == [0, 1, 0, 1, 2, 0]
    assert summary['lr'][[0, 2]].tolist() == pytest.approx([0.05, 0.02])
    assert summary['eval_top1'].notna().tolist() == [False] * 2 + [True] * 4
    assert summary['entropy_loss'].notna().tolist() == [False] * 2 + [True] * 3 + [False]
    assert summary['entropy_loss'][2] == 0 and summary['entropy_loss'][4] > summary['entropy_loss'][3] > 0
    assert "phase 'pretrain': took backbone, projector (plain weights); starts anew: head 'color', head 'shape'" in out
    assert "phase 'joint': took backbone, head 'color' (" in out
    assert '15 images to train on, 1 x cpu, 3 steps an epoch' in out
    assert '7 images to train on and 8 without labels, 6 to evaluate on, 1 x cpu, 2 steps an epoch' in out
    joint, last = state(folder / '2-joint' / 'last.pth.tar'), state(folder / 'last.pth.tar')
    kind = 'state_dict_ema' if joint['best_weights'] == 'ema' else 'state_dict'
    for name, value in joint[kind].items():  # the backbone is frozen, its statistics too
        if name.startswith('backbone'):
            assert torch.equal(last['state_dict'][name], value)
    assert not torch.equal(last['state_dict']['heads.0.fc.weight'], joint[kind]['heads.0.fc.weight'])
    run_command('validate', 'validate.py', [
        str(tmp_path / 'data'), '--checkpoint', str(folder / '2-joint' / 'model_best.pth.tar'), '-j', '0'])
    assert 'weighted mean' in capsys.readouterr().out


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A recipe and the run folder of it that was never stopped.

    The EMA's weights are the better ones of its second phase, since they stay near those of its first step, and the
    next phase starts from them.
    """
    folder = tmp_path_factory.mktemp('whole')
    path = write_recipe(folder)
    settings = yaml.safe_load(path.read_text())
    settings['phases'][1] |= {
        'lr': 2.0, 'warmup_epochs': 1, 'warmup_lr': 1e-4, 'model_ema_decay': 0.9999, 'eval_metric': 'loss'}
    path.write_text(yaml.safe_dump(settings))
    go('-c', path)
    assert state(folder / 'run' / '2-joint' / 'last.pth.tar')['best_weights'] == 'ema'
    return path


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 2, 3, 5])
def test_a_stopped_run_resumes_in_its_phase_to_the_same_result(whole, tmp_path, rows):
    """Stopped inside a phase (1, 3) and between two (2, 5): as soon as summary.csv has so many rows."""
    stopped, result = tmp_path / 'run', whole.parent / 'run'

    def interrupt():
        summary = stopped / 'summary.csv'
        while not summary.is_file() or len(pd.read_csv(summary)) < rows:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        go('-c', whole, '--output', tmp_path)
    thread.join()
    assert stop.value.code == 75
    go('-c', stopped / 'args.yaml', '--resume', stopped)
    for name in ('1-pretrain', '2-joint', '.'):
        a, b = (flat(folder / name / 'last.pth.tar') for folder in (result, stopped))
        assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items()), name
    assert_same_summary(result, stopped)


@pytest.mark.slow
def test_args_yaml_of_phases_repeats_the_run(recipe, tmp_path):
    go('-c', recipe, '--epoch-steps', '1')
    saved = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert [phase['name'] for phase in saved['phases']] == ['pretrain', 'joint', 'heads'] and saved['img_size'] == 32
    go('-c', tmp_path / 'run' / 'args.yaml', '--experiment', 'again')
    a, b = (flat(tmp_path / run / 'last.pth.tar') for run in ('run', 'again'))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def parse(path, *argv):
    return train_settings(*argv, '-c', str(path))


def values_of(phases):
    """The values of the settings of phases, by name."""
    return [SimpleNamespace(phase=phase.name, **phase.settings.flat()) for phase in phases]


def test_what_goes_first(tmp_path):
    path = tmp_path / 'r.yaml'
    path.write_text(yaml.safe_dump({
        'data_dir': 'd', 'lr': 0.1, 'aa': 'rand-m5', 'head': {'a': {'scale': 3}, 'b': {'weight': 1}},
        'phases': [{'epochs': 5}, {'name': 'x', 'epochs': 6, 'lr': 0.2, 'aa': None, 'head': {'b': {'weight': 2}}}]}))
    first, second = values_of(parse(path, '--momentum', '0.5').phases)
    assert (first.phase, second.phase) == ('1', 'x') and (first.epochs, second.epochs) == (5, 6)
    assert (first.lr, second.lr, first.momentum, second.momentum) == (0.1, 0.2, 0.5, 0.5)
    assert (first.aa, second.aa) == ('rand-m5', None)
    assert first.head == {'a': {'scale': 3}, 'b': {'weight': 1}}
    assert second.head == {'a': {'scale': 3}, 'b': {'weight': 2}}
    assert [phase.epochs for phase in values_of(parse(path, '--epochs', '1').phases)] == [1, 1]


@pytest.mark.parametrize('phases, message', [
    ([{'name': 'a', 'lr': 0.1}], "r.yaml, phase 'a': it has no epochs; add 'epochs: N'"),
    ([{'name': 'a', 'epochs': 1, 'learning_rate': 1}], "r.yaml, phase 'a': there is no flag 'learning_rate'"),
    ([{'name': 'a', 'epochs': 1, 'warmup_epoch': 1}], "did you mean 'warmup_epochs'?"),
    ([{'name': 'a', 'epochs': 1, 'output': 'x'}], "phase 'a': 'output' applies to the whole run"),
    ([{'name': 'a', 'epochs': 1, 'wls': 0, 'wlc': 0}], "phase 'a': -wls 0 with -wlc 0 leaves nothing to train"),
    ([{'name': 'a', 'epochs': 1}, {'name': 'a', 'epochs': 1}], 'no other phase has it'),
    ([{'name': '../a', 'epochs': 1}], 'a name is of letters'),
    ([{'name': 'a', 'epochs': 1, 'head': 3}], "phase 'a': 'head' is 3, expected heads with their options"),
    ([], "'phases' is no list of mappings"), ({'a': 1}, "'phases' is no list of mappings"), (['a'], 'no list of'),
])
def test_bad_phases(tmp_path, phases, message):
    (tmp_path / 'r.yaml').write_text(yaml.safe_dump({'data_dir': 'd', 'phases': phases}))
    with pytest.raises(UserError) as error:
        check_phases(parse(tmp_path / 'r.yaml'))
    assert message in error.value.line and error.value.line.startswith(str(tmp_path / 'r.yaml'))


def test_what_is_wrong_with_a_later_phase_shows_before_the_first_is_trained(recipe, tmp_path, capsys):
    settings = yaml.safe_load(recipe.read_text())
    settings['phases'][2]['opt'] = 'adamm'
    recipe.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        go('-c', recipe)
    assert '--opt adamm' in capsys.readouterr().err and not (tmp_path / 'run').exists()


def line(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        go(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


def test_another_model_in_a_later_phase_shows_before_the_first_is_trained(recipe, tmp_path, capsys):
    settings = yaml.safe_load(recipe.read_text())
    settings['phases'][1]['model'] = 'test_vit'
    recipe.write_text(yaml.safe_dump(settings))
    error = line(capsys, '-c', recipe)
    assert "phase 'joint': phase 'pretrain': a checkpoint of test_resnet, whose backbone does not fit" in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_refused_resume_changes_nothing(recipe, tmp_path, capsys):
    go('-c', recipe, '--epoch-steps', '1')
    folder = tmp_path / 'run'
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    plain = [tmp_path / 'data', '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu']
    settings = yaml.safe_load(recipe.read_text())
    settings['phases'][2]['name'] = 'other'
    (tmp_path / 'renamed.yaml').write_text(yaml.safe_dump(settings))
    settings['phases'][2].update(name='heads', heads=['shape'])
    (tmp_path / 'classes.yaml').write_text(yaml.safe_dump(settings))
    for argv, message in [
        (plain, 'a run with the phases pretrain, joint, heads, and this is a run without phases; resume with what'),
        (['-c', tmp_path / 'renamed.yaml'], 'and this is a run with the phases pretrain, joint, other'),
        (['-c', tmp_path / 'classes.yaml'], "phase 'heads': "),
    ]:
        assert message in line(capsys, *argv, '--resume', folder / 'last.pth.tar')
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
    go(*plain, '--output', tmp_path, '--experiment', 'plain', '--epochs', '1', '--cooldown-epochs', '0')
    assert 'a checkpoint of a run without phases, and this is a run with the phases' in line(
        capsys, '-c', recipe, '--resume', tmp_path / 'plain' / 'last.pth.tar')


@pytest.mark.slow
def test_a_checkpoint_of_a_phase_that_was_moved_is_refused(recipe, tmp_path, capsys):
    go('-c', recipe, '--epoch-steps', '1')
    (tmp_path / 'x').mkdir()
    (tmp_path / 'run' / '1-pretrain' / 'last.pth.tar').rename(tmp_path / 'x' / 'last.pth.tar')
    assert "phase 'pretrain' that lies elsewhere than its run put it; put it back into the folder 1-pretrain" in line(
        capsys, '-c', recipe, '--resume', tmp_path / 'x' / 'last.pth.tar')
    assert {path.name for path in tmp_path.iterdir()} == {'data', 'more', 'recipe.yaml', 'run', 'x'}


@pytest.mark.slow
def test_what_a_recipe_says_of_heads_for_all_phases_survives_args_yaml(recipe, tmp_path):
    settings = {**yaml.safe_load(recipe.read_text()), 'entropy_weight': 0.1, 'head_weights': {'color': 2, 'shape': 1},
                'head': {'shape': {'loss': 'arcface'}}, 'eval_metric': 'color/top1', 'unlabelled': 'pool'}
    settings['phases'] = [{'name': 'a', 'wlc': 0, 'epochs': 1}, {'name': 'b', 'epochs': 1, 'aa': None}]
    recipe.write_text(yaml.safe_dump(settings))
    go('-c', recipe, '--epoch-steps', '1', '--lr', '0.07')
    saved = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert saved['phases'] == [{'name': 'a', 'classification_loss_weight': 0.0, 'epochs': 1},
                               {'name': 'b', 'epochs': 1, 'aa': None}] and saved['lr'] == 0.07
    go('-c', tmp_path / 'run' / 'args.yaml', '--resume', tmp_path / 'run' / '1-a' / 'last.pth.tar')
    assert state(tmp_path / 'run' / 'last.pth.tar')['head_options']['shape']['loss'] == 'arcface'


@pytest.mark.slow
def test_resume_by_a_bare_file_name_and_phases_called_like_numbers(recipe, tmp_path, monkeypatch):
    settings = yaml.safe_load(recipe.read_text())
    settings['phases'] = [{**phase, 'name': name} for phase, name in zip(settings['phases'], ('01', '1e5', 'NA'))]
    recipe.write_text(yaml.safe_dump(settings))
    go('-c', recipe, '--epoch-steps', '1')
    monkeypatch.chdir(tmp_path / 'run' / '2-1e5')
    go('-c', '../args.yaml', '--resume', 'last.pth.tar')
    assert {path.name for path in Path('.').iterdir()} == {
        'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar', 'model_best.pth.tar'}
    phases = pd.read_csv('../summary.csv', dtype=str, keep_default_na=False)['phase'].tolist()
    assert phases == ['01'] * 2 + ['1e5'] * 3 + ['NA']


@pytest.mark.slow
def test_images_that_are_scored_stay_out_of_the_pool_and_simclr_alone_takes_both_batches(recipe, tmp_path, capsys):
    data = tmp_path / 'data'
    (data / 'val.csv').rename(data / 'test.csv')
    (data / 'val.csv').write_text('image_path,color,shape\nimages/7.png,red,disc\nimages/0.png,blue,ring\n')
    go('-c', recipe, '--unlabelled', 'images', '--epoch-steps', '1', '-b', '2', '--unlabelled-batch-size', '1')
    out = capsys.readouterr().out
    # 14 images: 8 of train.csv, one of them without label; 6 of test.csv; two of val.csv, which train.csv has too.
    assert '8 images to train on, 1 x cpu, 1 step an epoch' in out
    assert '7 images to train on and 1 without labels' in out
    assert 'Phase pretrain: 8 of 14 unlabelled images are labelled, or of the val or test split: left out' in out


def test_flags_of_heads_over_all_phases_leave_the_one_without_heads_alone(tmp_path):
    path = tmp_path / 'r.yaml'
    phases = [{'name': 'a', 'epochs': 1, 'wlc': 0}, {'name': 'b', 'epochs': 1}]
    path.write_text(yaml.safe_dump({'data_dir': 'd', 'phases': phases}))
    flags = values_of(check_phases(
        parse(path, '--heads', 'color', '--head', 'color:weight=2', '--eval-metric', 'color/top1')))
    assert [(each.heads, each.head, each.eval_metric) for each in flags] == [
        (None, {}, None), (['color'], {'color': {'weight': '2'}}, 'color/top1')]
    path.write_text(yaml.safe_dump({'data_dir': 'd', 'phases': [{**phases[0], 'heads': ['color']}]}))
    with pytest.raises(UserError, match="phase 'a': --heads would change nothing"):
        check_phases(parse(path))


def test_a_setting_whose_switch_is_off_in_all_phases_has_a_line(tmp_path):
    path = tmp_path / 'r.yaml'
    shared = {'data_dir': 'd', 'amp_dtype': 'bfloat16', 'temperature': 0.1, 'decay_rate': 0.5, 'model_ema_decay': 0.99}
    phases = [{'name': 'a', 'epochs': 1, 'sched': 'step'}, {'name': 'b', 'epochs': 1, 'wls': 0}]
    path.write_text(yaml.safe_dump({**shared, 'phases': phases}))
    assert without_effect(check_phases(parse(path))) == [
        '--model-ema-decay has no effect without --model-ema', '--amp-dtype has no effect without --amp']
    assert without_effect(check_phases(parse(path, '--amp', '--model-ema'))) == []
    path.write_text(yaml.safe_dump({**shared, 'wls': 0, 'clip_mode': 'agc'}))
    assert without_effect(check_phases(parse(path, '--amp', '--model-ema', '--mixup', '0.2', '--recount', '2'))) == [
        '--temperature has no effect without SimCLR (-wls 0)', '--clip-mode has no effect without --clip-grad',
        '--recount has no effect without --reprob', '--decay-rate has no effect with --sched cosine']


@pytest.mark.parametrize('name', sorted(path.name for path in RECIPES.glob('*.yaml')))
def test_recipes_are_read(name):
    flags = values_of(check_phases(parse(RECIPES / name, 'data')))
    assert all(each.data_dir == 'data' for each in flags)
    weights = {'fashion.yaml': [(0.1, 0.9)], 'first-run.yaml': [(0.1, 0.9)],
               'cs492.yaml': [(1, 0), (1, 100)], 'cs492-arcface.yaml': [(1, 0), (1, 100)],
               'sample.yaml': [(0.5, 0), (0.2, 0.8), (0, 1)], 'recommended.yaml': [(1, 0), *[(0, 1)] * 2],
               'few-labels-pretrained.yaml': [(1, 0), *[(0, 1)] * 2], 'few-labels.yaml': [(1, 0), *[(0, 1)] * 4],
               'fine-tune.yaml': [(0, 1)] * 2}
    assert [(each.simclr_loss_weight, each.classification_loss_weight) for each in flags] == weights[name]


def test_the_recipe_for_few_labels_is_a_setting_of_the_study_that_recommends_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES.parent / 'experiments' / 'pool'))
    study = importlib.import_module('study')
    phases = {phase.name: phase.settings.flat() for phase in check_phases(parse(RECIPES / 'recommended.yaml', 'data'))}
    arms = {'simclr': 'simclr', 'pretrained': 'lite0-96', 'student': 'after-simclr-taught'}
    others = {'input_size', 'ratio', 'epochs', 'epoch_steps'}  # the first two are of the photos; the recipe scores more
    for name, arm in arms.items():
        measured = {**study.COMMON, **study.ARMS[arm]}
        path, flat = tmp_path / f'{name}.yaml', phases[name]
        path.write_text(yaml.safe_dump({
            'data_dir': 'd',
            **{of: list(value) if isinstance(value, tuple) else value for of, value in measured.items()}}))
        read = parse(path).flat()
        for setting in measured.keys() - others:
            assert flat[setting] == read[setting], (name, setting)
        steps = measured['epochs'] * measured['epoch_steps']
        assert flat['epochs'] * flat['epoch_steps'] == steps, name
        assert flat['img_size'] == measured['input_size'][1], name


@pytest.mark.parametrize('name', ['cs492.yaml', 'cs492-arcface.yaml'])
def test_the_recipes_of_cs492_say_what_the_method_says(name):
    pretrain, joint = values_of(check_phases(parse(RECIPES / name, 'data')))
    for each in (pretrain, joint):
        assert (each.projection_dim, each.temperature, each.missing_value) == (128, 1.0, '-1')
        assert (each.img_size, each.scale, each.hflip, each.rotation) == (224, [0.8, 1.0], 0.5, 10)
        assert (each.opt, each.momentum, each.weight_decay) == ('sgd', 0.9, 1e-6)
        assert (each.sched, each.warmup_epochs, each.color_jitter, each.aa) == ('cosine', 10, [0.0], None)
    assert pretrain.epochs == 300
    assert (joint.batch_size, joint.unlabelled_batch_size) == (4, 128)
    if name == 'cs492.yaml':
        assert joint.smoothing == 0.01 and not joint.head and not joint.entropy_weight
    else:
        assert joint.entropy_weight == 1.0
        assert joint.head == {'*': {'loss': 'arcface', 'scale': 30, 'margin': 0.5, 'input': 'projection'}}


def test_the_recipe_of_the_main_job_is_its_command():
    from test_scripts import TRAIN
    by_recipe = parse(RECIPES / 'fashion.yaml', './fashion-product-images/')
    assert by_recipe.replace(config=None) == train_settings(*TRAIN.split()[2:])


@pytest.mark.slow
def test_the_recipe_for_the_sample_data(tmp_path):
    write_sample(tmp_path / 'sample', train=160, val=20, test=4, unlabelled=60, size=32)
    go(tmp_path / 'sample', '-c', RECIPES / 'sample.yaml', '--output', tmp_path, '--experiment', 'run', '-j', '0',
       '--device', 'cpu', '--epoch-steps', '2', '-b', '16', '--unlabelled-batch-size', '8')
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv')
    assert summary['phase'].tolist() == ['simclr'] * 2 + ['joint'] * 3 + ['heads']
    assert summary['eval_top1'].notna().sum() == 4 and (tmp_path / 'run' / 'model_best.pth.tar').is_file()


def test_the_recipe_for_fine_tuning_trains_the_heads_and_then_all(data_dir, tmp_path):
    """From a checkpoint. The statistics of a frozen batch norm are frozen too; layer decay applies to what is not."""
    start = state(train_run(data_dir, tmp_path / 'start', '-wls', '0', epochs=1) / 'last.pth.tar')['state_dict']
    go(data_dir, '-c', RECIPES / 'fine-tune.yaml', '--no-pretrained', *TINY, '--epochs', '1', '--output', tmp_path,
       '--initial-checkpoint', tmp_path / 'start' / 'run' / 'last.pth.tar', '--experiment', 'run')
    heads, whole = (state(tmp_path / 'run' / name / 'last.pth.tar') for name in ('1-heads', ''))
    for name, value in start.items():
        of_backbone = name.startswith('backbone.')
        assert torch.equal(heads['state_dict'][name], value) == of_backbone, name
        assert not torch.equal(whole['state_dict'][name], value), name
    assert len(heads['optimizer']['state']) == 4  # weight and bias of two heads
    scales = {group['lr_scale'] for group in whole['optimizer']['param_groups'] if 'lr_scale' in group}
    assert len(scales) > 3 and max(scales) == 1


@pytest.mark.slow
def test_the_arcface_recipe_on_a_list_like_theirs(tmp_path, capsys):
    """Image and class, tab-separated, -1 without a label; a tiny model, one epoch a phase."""
    data = write_data(tmp_path / 'data', train=16, val=6)
    classes = [3, 7, -1, -1, 3, 7, -1, -1, -1, -1, -1, 3, -1, -1, 7, -1]
    rows = [f'images/{n}.png\t{label}\n' for n, label in enumerate([*classes, 3, 7, 3, 7, 3, 7])]
    (data / 'train_list.txt').write_text('id\tlabel\n' + ''.join(rows[:16]))
    (data / 'val.csv').write_text('id\tlabel\n' + ''.join(rows[16:]))
    go(data, '-c', RECIPES / 'cs492-arcface.yaml', '--train-split', 'train_list.txt', '--image-column', 'id', '--model',
       'test_resnet', '--img-size', '32', '-j', '0', '--device', 'cpu', '--epochs', '1', '--warmup-epochs', '0',
       '-b', '4', '--unlabelled-batch-size', '5', '--output', tmp_path, '--experiment', 'run')
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv')
    assert summary['phase'].tolist() == ['simclr', 'joint'] and summary['entropy_loss'][1] > 0
    joint = state(tmp_path / 'run' / 'last.pth.tar')
    run_command('validate', 'validate.py', [
        str(data), '--split', 'train_list.txt', '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '-j', '0'])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('label '))
    assert row.split()[-1] == '6'  # of its rows have a label
    assert joint['head_options'] == {
        'label': {'loss': 'arcface', 'scale': 30.0, 'margin': 0.5, 'input': 'projection', 'drop': 0.0}}
    assert joint['state_dict']['heads.0.weight'].shape == (2, 128) and joint['missing_value'] == '-1'
    assert 'projector.0.weight' in joint['state_dict'] and 'task_state' not in joint
