"""What must not change a result, or must: gradient checkpointing, a cache, the flags of a run that goes on."""
import os

import pytest
from common import assert_same_summary, assert_same_weights, train_run, weights, write_data


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
