"""Every flag of training on a run that goes on: it takes effect and a line says so, or it is refused or told apart."""
import importlib.util
import shutil

import pytest
import torch
import yaml
from common import SPACE, TINY, assert_same_weights, tiny_task, train_run, train_settings, write_data
from timm.scheduler import PlateauLRScheduler

from timm_multilabel.cli.main import run_command
from timm_multilabel.cli.parser import make_parser
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.metrics import TrainingMeter
from timm_multilabel.training.optimizer_state import load_plateau
from timm_multilabel.training.training_progress import TrainingProgress

BASES = {'simclr': [], 'plain': ['-wls', '0', '--model-ema'], 'adamw': ['--opt', 'adamw']}
POOL = '--labelled-rows 8 --unlabelled-batch-size 2'
TEACHER = '--teacher run/model_best.pth.tar'
MISFIT = 'does not fit this run'
PACKAGES = {f'--log-{name}': None if importlib.util.find_spec(name) else f"needs the extra '{name}'"
            for name in ('tensorboard', 'wandb')}
FLAGS = [  # the run that goes on, its new flags, and what the refusal or the line says; None where they take effect
    *(('simclr', words, None) for words in (
        '--train-split val', '--val-split train', '--separator ,', '--missing-value x',
        '--head color:smoothing=0.2,views=plain',
        '--class-head kind',
        '--unknown-labels ignore', '--skip-bad-images', '--cache ram', '--cache disk --cache-dir cache', '--workers 1',
        '--img-size 48', '--mean 0.4', '--std 0.3', '--drop 0.1', '--drop-path 0.1',
        '--model-kwargs global_pool=max', '--grad-checkpointing', '--channels-last', '--torchcompile aot_eager',
        '--model-ema', '--simclr-loss-weight 0.3', '--classification-loss-weight 0.7', '--temperature 0.2',
        '--smoothing 0', '--head-weights color=1 shape=2', '--classify-views first', '--labelled-rows 8', POOL,
        f'{POOL} --epoch-by labelled', f'{POOL} --entropy-weight 0.1',
        f'{POOL} --entropy-weight 0.1 --entropy-ramp-up 2', f'{POOL} --marginal-entropy-weight 0.1',
        f'{POOL} --pseudo-label-weight 0.1', f'{POOL} --pseudo-label-weight 0.1 --pseudo-label-ramp-up 1 '
        '--pseudo-label-threshold 0.5 --pseudo-label-reference none --no-pseudo-label-alignment',
        f'{TEACHER} --cache-dir cache', f'{TEACHER} --teacher-views --teacher-weight 2 --teacher-temperature 3',
        '--views simclr-exact', '--weak-first-view', '--scale 0.5 1', '--ratio 0.8 1.2', '--hflip 0', '--vflip 0.5',
        '--rotation 10', '--train-interpolation bicubic', '--aa rand-m5', '--color-jitter 0.1 0.1 0.1',
        '--color-jitter-prob 0.5', '--grayscale-prob 0.2', '--gaussian-blur-prob 0.1', '--reprob 0.1',
        '--remode const', '--recount 2', '--interpolation nearest', '--crop-pct 0.5', '--crop-mode border',
        '--momentum 0.5',
        '--opt-kwargs nesterov=False', '--weight-decay 0.1', '--gradient-centralization', '--clip-grad 1',
        '--clip-grad 1 --clip-mode value', '--grad-accum-steps 2', '--sched step', '--sched-on-updates', '--lr 0.01',
        '--epochs 2', '--warmup-epochs 1', '--warmup-lr 0.001', '--cooldown-epochs 1', '--min-lr 0.001',
        '--decay-epochs 2', '--decay-milestones 2', '--decay-rate 0.2', '--patience-epochs 1', '--batch-size 2',
        '--micro-batch 2', '--validation-batch-size 3', '--amp', '--amp --amp-dtype bfloat16', '--seed 7',
        '--checkpoint-steps 1', '--checkpoint-hist 2', '--log-interval 1', '--epoch-steps 2')),
    *(('plain', words, None) for words in (
        '--model-ema-decay 0.5', '--model-ema-warmup', '--mixup 0.2', '--cutmix 1', '--mixup 0.2 --mixup-prob 0.5',
        '--mixup 0.2 --cutmix 1 --mixup-switch-prob 0.1', '--mixup 0.2 --mixup-mode pair')),
    ('adamw', '--opt-eps 0.001', None), ('adamw', '--opt-betas 0.8 0.9', None),
    *(('simclr', flag, refusal) for flag, refusal in PACKAGES.items()),
    ('simclr', '--image-column picture', "no column 'picture'"), ('simclr', '--image-root away', 'images is on disk'),
    ('simclr', '--heads color', 'a checkpoint of other classes'),
    ('simclr', '--tag-separator ;', 'reads tags in one column'), ('simclr', '--none-value nil', 'tags in one column'),
    ('simclr', '--head-module heads.py', 'heads.py: no such file'),
    ('simclr', '--input-size 3 48 48', 'Conflicting input image sizes'),
    ('simclr', '--model test_byobnet', MISFIT), ('simclr', '--projection-dim 8', MISFIT),
    ('simclr', '--projector-layers 3', MISFIT), ('simclr', '--projector-width 8', MISFIT),
    ('simclr', '--condition-projector', MISFIT),
    ('simclr', '--layer-decay 0.7', MISFIT), ('plain', '--freeze-backbone', MISFIT),
    ('simclr', '--lora 2', MISFIT if importlib.util.find_spec('peft') else 'peft is not installed'),
    ('adamw', '--opt-kwargs amsgrad=True', 'its settings keep max_exp_avg_sq, which the file has not'),
    ('simclr', '--teacher-features test_vit --teacher-features-path file --teacher-features-weight 2',
     '--teacher-features-path file: no such file'),
    ('simclr', '--sync-bn', '--sync-bn needs CUDA'), ('simclr', '--device meta', '--device meta: cannot be used'),
    ('simclr', '--unlabelled images', 'all of its images are labelled or scored elsewhere'),
    ('simclr', '--opt adamw', 'trained with --opt sgd, not adamw'),
    ('simclr', '--eval-metric loss', 'trained with --eval-metric top1, not loss'),
    ('simclr', '--pretrained', '--pretrained has no effect'),
    ('simclr', '--pretrained-path file', '--pretrained-path has no effect'),
    ('simclr', '--initial-checkpoint file', '--initial-checkpoint has no effect'),
    ('simclr', '--output elsewhere', '--output, --experiment have no effect'),
    ('simclr', '--experiment other', '--output, --experiment have no effect'),
]
NOT_OF_A_RUN = {'help', 'config', 'resume', 'old_amp', 'allow_hub', 'data_dir', 'start_from'}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A data directory, and a finished run of one epoch of each kind."""
    folder = tmp_path_factory.mktemp('resumed')
    data = write_data(folder / 'data')
    for name, flags in BASES.items():
        train_run(data, folder / name, *flags, epochs=1)
    return folder


def parser():
    return make_parser(TrainSettings, 'train.py')


def goes_on(made, output, base, *flags, epochs=1):
    """Resume a copy of a finished run; its folder."""
    shutil.copytree(made / base / 'run', output / 'run')
    run_command('train', 'train.py', [str(made / 'data'), *TINY, '--epochs', str(epochs), *BASES[base], *flags,
                                    '--resume', str(output / 'run')])
    return output / 'run'


def groups(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=True)['optimizer']['param_groups']


def test_each_flag_is_in_the_table():
    named = {action.dest for _, words, _ in FLAGS for action in parser()._actions
             if set(action.option_strings) & set(words.split())}
    assert named == {action.dest for action in parser()._actions} - NOT_OF_A_RUN


@pytest.mark.slow
@pytest.mark.parametrize('base, words, line', FLAGS)
def test_each_flag_of_a_run_that_goes_on(made, tmp_path, monkeypatch, capsys, base, words, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WANDB_MODE', 'offline')  # it remembers the mode for the tests that come later
    before = yaml.safe_load((made / base / 'run' / 'args.yaml').read_text())
    capsys.readouterr()
    try:
        folder, status = goes_on(made, tmp_path, base, *words.split()), 0
    except SystemExit as stop:
        folder, status = tmp_path / 'run', stop.code
    said, now = capsys.readouterr(), yaml.safe_load((folder / 'args.yaml').read_text())
    if status:
        assert status == 2 and line in said.err and said.err.count('\n') == 1 and now == before
        return
    if line is not None:
        assert line in said.out and now == before and 'other flags' not in said.out
        return
    words = ['data', *TINY, '--epochs', '1', *BASES[base], *words.split()]
    asked = {name: value for name, value in train_settings(*words).flat().items() if name in before}
    asked = yaml.safe_load(yaml.safe_dump({**asked, **{
        name: before[name] for name in ('data_dir', 'output', 'experiment')}}))
    assert now == asked
    changed = [f'--{name.replace("_", "-")} ' for name in asked if asked[name] != before[name]]
    assert all(name in said.out.partition('goes on with other flags: ')[2] for name in changed)
    assert bool(changed) == ('other flags' in said.out) and (changed or '--separator' in words)


@pytest.mark.slow
def test_the_same_flags_say_nothing(made, tmp_path, capsys):
    capsys.readouterr()
    goes_on(made, tmp_path, 'simclr')
    said = capsys.readouterr().out
    assert 'other flags' not in said and 'no effect' not in said


@pytest.mark.slow
@pytest.mark.parametrize('base, words, settings', [
    ('simclr', '--weight-decay 0.1', {'weight_decay': [0.0, 0.1, 0.0, 0.1]}),
    ('simclr', '--momentum 0.5 --sched none --lr 0.01', {'momentum': [0.5] * 4, 'lr': [0.01] * 4}),
    ('simclr', '--opt-kwargs nesterov=False', {'nesterov': [False] * 4}),
    ('adamw', '--opt-betas 0.8 0.9 --opt-eps 0.001 --sched constant --lr 0.02',
     {'betas': [(0.8, 0.9)] * 4, 'eps': [0.001] * 4, 'lr': [0.02] * 4}),
])
def test_the_optimizer_has_the_settings_of_the_flags(made, tmp_path, base, words, settings):
    folder = goes_on(made, tmp_path, base, *words.split(), epochs=2)
    for name, values in settings.items():
        found = [tuple(group[name]) if name == 'betas' else group[name] for group in groups(folder)]
        assert found == values


@pytest.mark.slow
def test_a_file_brings_no_settings_into_the_optimizer(made, tmp_path):
    """Of 'param_groups' nothing counts but the numbers of the parameters."""
    clean = goes_on(made, tmp_path / 'clean', 'simclr', epochs=2)
    shutil.copytree(made / 'simclr' / 'run', tmp_path / 'simclr' / 'run')
    for path in (tmp_path / 'simclr' / 'run').glob('*.pth.tar'):
        state = torch.load(path, weights_only=True)
        for group in state['optimizer']['param_groups']:
            group.update(lr=float('nan'), weight_decay='much', momentum=float('inf'), further=[1], initial_lr=None)
        path.unlink()
        torch.save(state, path)
    (tmp_path / 'data').symlink_to(made / 'data')
    poisoned = goes_on(tmp_path, tmp_path / 'poisoned', 'simclr', epochs=2)
    assert_same_weights(clean / 'last.pth.tar', poisoned / 'last.pth.tar')
    assert groups(clean) == groups(poisoned)


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated')
@pytest.mark.parametrize('lr, resumed', [(0.3, 0.3 * 0.7), (0.6, 0.42)])
def test_a_plateau_goes_on_with_the_settings_of_the_flags(lr, resumed):
    """It has lowered its rate once, and goes on from the same share of the rate that the flags give now."""
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate) for rate in (0.3, lr)]
    earlier = PlateauLRScheduler(optimizers[0], decay_rate=0.7, patience_t=0, mode='min')
    now = PlateauLRScheduler(optimizers[1], decay_rate=0.2, patience_t=3, mode='min')
    for epoch, loss in ((1, 5.0), (2, 6.0)):
        earlier.step(epoch, loss)
    load_plateau(now, earlier.lr_scheduler.state_dict(), optimizers[0].param_groups)
    assert optimizers[1].param_groups[0]['lr'] == pytest.approx(resumed, rel=1e-12 if lr == 0.6 else 0)
    assert (now.lr_scheduler.best, now.lr_scheduler.patience, now.lr_scheduler.factor) == (5.0, 3, 0.2)


def test_class_weights_are_those_of_the_flags_within_an_epoch_too():
    tasks = [tiny_task(head_options={'color': {'loss': 'softmax', 'class_weights': weights}})
             for weights in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])]
    meters = [TrainingMeter(task.terms, task.heads, torch.device('cpu')) for task in tasks]
    TrainingProgress.here(0, 1, 0.1, meters[0], tasks[0]).restore(meters[1], tasks[1])
    assert tasks[1].heads[SPACE.names[0]].class_weights.tolist() == [4.0, 5.0, 6.0]
