"""What must not change a result, or must: gradient checkpointing, a cache, the flags of a run that goes on."""
import os

import pytest
import timm
import torch
from common import assert_same_summary, assert_same_weights, train_run, weights, write_data

from timm_multilabel.errors import UserError
from timm_multilabel.model import create_backbone


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


def refused(capsys, data_dir, output, *flags, epochs=1):
    """The line of a run that is refused."""
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, output, *flags, epochs=epochs)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


@pytest.mark.slow
@pytest.mark.parametrize('flags, updates', [
    (['--model-ema', '--model-ema-decay', '0.5'], 3),
    (['--micro-batch', '3', '--model-ema', '--model-ema-decay', '0.5'], 6),  # two pieces a step
    (['-wls', '0', '--grad-accum-steps', '2', '-b', '2', '--clip-grad', '1'], 6),
    (['-wls', '0', '--freeze-backbone'], 0),
    (['--amp', '--micro-batch', '2', '--drop-path', '0.2'], 6),
    (['--torchcompile', 'aot_eager', '--micro-batch', '2'], 6),
])
def test_gradient_checkpointing_changes_nothing(data_dir, tmp_path, flags, updates):
    plain, checkpointed = (
        train_run(data_dir, tmp_path / name, *flags, *more, epochs=1)
        for name, more in (('plain', []), ('checkpointed', ['--grad-checkpointing'])))
    assert_same_weights(plain / 'last.pth.tar', checkpointed / 'last.pth.tar')
    assert_same_summary(plain, checkpointed)
    counts = {int(value) for name, value in weights(checkpointed / 'last.pth.tar').items()
              if name.startswith('backbone.') and name.endswith('num_batches_tracked')}
    assert counts == {updates}


def test_gradient_checkpointing_needs_a_compiler(data_dir, tmp_path, capsys):
    error = refused(capsys, data_dir, tmp_path, '--grad-checkpointing', '--torchcompile', 'eager')
    assert '--torchcompile eager compiles nothing' in error


@pytest.mark.slow
def test_a_run_on_the_device_goes_on_to_the_same_summary(data_dir, tmp_path):
    """After a resume, the first evaluation takes images from the files and later ones from the device."""
    flags = ['--cache', 'device', '--mean', '0.485', '0.456', '0.406', '--std', '0.229', '0.224', '0.225']
    whole = train_run(data_dir, tmp_path / 'whole', *flags, epochs=3)
    checkpoint = tmp_path / 'part' / 'run' / 'checkpoint-0.pth.tar'
    checkpoint.parent.mkdir(parents=True)
    os.link(whole / 'checkpoint-0.pth.tar', checkpoint)
    first = (whole / 'summary.csv').read_text().splitlines()[:2]
    (checkpoint.parent / 'summary.csv').write_text('\n'.join(first) + '\n')
    part = train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto', epochs=3)
    assert_same_summary(whole, part)
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')


def file_of(folder, state):
    torch.save(state, folder / 'w.pth')
    return str(folder / 'w.pth')


WRAPPED = timm.create_model('test_resnet', num_classes=0).state_dict()
NORMS = [name for name in WRAPPED if f"{name.rpartition('.')[0]}.running_var" in WRAPPED]


@pytest.mark.parametrize('lacking, words', [
    ([name for name in NORMS if 'tracked' not in name], '--pretrained-path .* lacks 60 of the 90 weights and buffers'),
    ([name for name in NORMS if 'running_var' in name], r'lacks 15 of .*\(conv1.1.running_var, conv1.4.running_var,'),
    (['bn1.bias'], r'lacks 1 of the 90 weights and buffers of test_resnet \(bn1.bias\)'),
])
def test_each_weight_that_a_file_lacks_is_named(tmp_path, lacking, words):
    state = {name: value for name, value in WRAPPED.items() if name not in lacking}
    with pytest.raises(UserError, match=words):
        create_backbone('test_resnet', pretrained_path=file_of(tmp_path, state))


@pytest.mark.slow
@pytest.mark.parametrize('wrap, said', [
    (lambda state: {**state, 'fc.weight': torch.zeros(2, 4)}, 'left out 1 that test_resnet has not (fc.weight)'),
    (lambda state: {'state_dict': {f'module.{name}': value for name, value in state.items()}}, None),  # by timm
    *((lambda state, prefix=prefix: {f'{prefix}{name}': value for name, value in state.items()},
       f"took the weights under '{prefix}'")
      for prefix in ('backbone.', 'model.', 'model.backbone.', 'student.wrapped_model._model.')),
    (lambda state: {'teacher': {f'backbone.{name}': value for name, value in state.items()}, 'epoch': 3},
     "took the weights under 'teacher.backbone.'"),
    (lambda state: {'state_dict': {**{f'model.{name}': value for name, value in state.items()}, 'loss.w': NORMS}},
     "took the weights under 'model.'"),
    (lambda state: {name: value for name, value in state.items() if 'tracked' not in name},
     'num_batches_tracked of 15 layers is not in it'),
])
def test_a_wrapper_around_the_weights_is_taken_off(tmp_path, capsys, wrap, said):
    state = {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in WRAPPED.items()}
    made = create_backbone('test_resnet', pretrained_path=file_of(tmp_path, wrap(state)))
    for name, value in made.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert 'state_dict' not in made.pretrained_cfg
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_two_models_in_a_file_are_refused(tmp_path):
    state = {f'{part}.{name}': value for part in ('student', 'teacher') for name, value in WRAPPED.items()}
    with pytest.raises(UserError, match='weights of 2 such models, under student., teacher.;'):
        create_backbone('test_resnet', pretrained_path=file_of(tmp_path, state))


@pytest.mark.parametrize('flags, line', [
    (['-wls', '0', '-b', '1'], '-b 1: test_resnet has batch norm that sees one number a channel of one image of 3x32'),
    (['-t', '1e300'], '-t/--temperature: 1e300 is out of range, expected more than 1e-30, 1e+30 at most'),
    (['-t', '1e-300'], '-t/--temperature: 1e-300 is out of range'),
    (['--epoch-steps', '9999999999999999999'], '9999999999999999999 is out of range, expected 1 or more, 2.14748e+09'),
])
def test_what_is_at_its_edge_is_refused(data_dir, tmp_path, capsys, flags, line):
    assert line in refused(capsys, data_dir, tmp_path, *flags)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_batch_norm_takes_one_image_that_is_large_enough(data_dir, tmp_path):
    train_run(data_dir, tmp_path, '-wls', '0', '-b', '1', '--img-size', '64', '--epoch-steps', '2', epochs=1)
