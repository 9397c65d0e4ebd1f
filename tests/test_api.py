"""The Python API: what the commands do, from Python, with objects for results and exceptions for errors."""
import inspect
import logging
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from common import TINY, assert_same_summary, assert_same_weights, train_run
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.errors import SettingError, UserError

SETTINGS = {
    'model': 'test_resnet', 'img_size': 32, 'batch_size': 4, 'workers': 0, 'device': 'cpu', 'lr': 0.05,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'drop': 0.2, 'reprob': 0.3}
"""`common.TINY` as keyword arguments."""
HERE = {'workers': 0, 'device': 'cpu'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Sample data: 40 training rows, 16 validation rows."""
    return tm.sample(tmp_path_factory.mktemp('api') / 'data', train=40, val=16, test=8, unlabelled=8, size=32)


@pytest.fixture(scope='module')
def run(folder):
    """A run of two epochs."""
    torch.set_num_threads(1)  # as `conftest.one_thread`, which comes too late here: sums would be rounded otherwise
    return tm.train(folder, output=folder.parent / 'out', experiment='run', epochs=2, **SETTINGS)


def test_a_run_is_that_of_the_command_line(data_dir, tmp_path):
    run = tm.train(data_dir, output=tmp_path / 'api', experiment='run', epochs=2, **SETTINGS)
    by_command = train_run(data_dir, tmp_path / 'command')
    assert_same_weights(run.last_checkpoint, by_command / 'last.pth.tar')
    assert_same_summary(run.folder, by_command)


def test_what_a_run_knows(run):
    assert run.summary['epoch'].tolist() == [0, 1] and run.best_checkpoint == run.folder / 'model_best.pth.tar'
    assert run.metric == 'top1' and run.metrics['eval_top1'] == run.best == run.summary['eval_top1'].max()


def test_validation(folder, run):
    found = tm.validate(folder, run.best_checkpoint, **HERE)
    assert found.images == 16 and found.mean['top1'] == pytest.approx(run.best)
    assert found.heads['head'].tolist() == ['color', 'shape', 'texture', '']
    frame = pd.read_csv(folder / 'val.csv', keep_default_na=False)  # NA is a color
    frame['image_path'] = [str(folder / path) for path in frame['image_path']]
    assert tm.validate(frame, run.best_checkpoint, **HERE).mean == found.mean


def test_dataframes_are_data(folder, run, tmp_path, monkeypatch):
    """The same rows, the same run; a report finds the rows again."""
    monkeypatch.chdir(folder)
    frames = {name: pd.read_csv(folder / f'{name}.csv', keep_default_na=False) for name in ('train', 'val')}
    made = tm.train(**frames, output=tmp_path, experiment='run', epochs=2, **SETTINGS)
    assert_same_weights(made.last_checkpoint, run.last_checkpoint)
    assert tm.report(made.folder, **HERE).images == 16


def test_prediction_of_files_and_of_pictures(folder, run):
    path = str(folder / pd.read_csv(folder / 'val.csv')['image_path'][0])
    by_path = tm.predict(run.best_checkpoint, path, top_k=2, **HERE)
    picture = Image.open(path)
    by_picture = tm.predict(run.best_checkpoint, [picture, np.asarray(picture.convert('RGB'))], top_k=2, **HERE)
    for head, guesses in by_path.images[0].guesses.items():
        for picture in by_picture.images:  # in one batch, which rounds otherwise
            labels, probabilities = zip(*picture.guesses[head])
            assert labels == tuple(guess.label for guess in guesses)
            assert probabilities == pytest.approx([guess.probability for guess in guesses])
    assert by_path.table.columns.tolist() == ['image', 'head', 'rank', 'label', 'probability', 'error']
    assert len(by_path.table) == 6 and by_path.table['rank'].tolist() == [1, 2] * 3


def test_embeddings_are_searched(folder, run, tmp_path):
    made = tm.embed(run.best_checkpoint, folder / 'images', tmp_path / 'e.npz', **HERE)
    query = made.embeddings.images[3]
    found = tm.search(tmp_path / 'e.npz', query, run.best_checkpoint, count=3, **HERE)
    assert found.table['image'][0] == query and found.table['similarity'][0] == pytest.approx(1)
    assert len(found.table) == 3 and not found.bad


def test_reports_exports_and_checks(folder, run, tmp_path):
    assert tm.report(run.folder, out=tmp_path / 'r.html', **HERE).path.read_text().startswith('<!DOCTYPE html>')
    exported = tm.export(run.best_checkpoint, formats=['backbone'], out=tmp_path / 'x')
    assert all(path.is_file() and difference < 1e-4 for path, difference in exported.files.items())
    assert tm.check(folder).errors == 0


def test_comparison(folder, run, tmp_path):
    other = tm.train(folder, output=tmp_path, experiment='other', epochs=2, **{**SETTINGS, 'lr': 0.01})
    made = tm.compare([run.folder, other.folder], **HERE)
    assert set(made.metrics) == {'val', 'test'} and len(made.metrics['val']) == 2
    assert 'lr' in made.markdown and not made.files


@pytest.mark.parametrize('wrong, line', [
    ({'lr': 'fast'}, "argument lr: 'fast' is not a number"),
    ({'learning_rate': 1}, "there is no argument 'learning_rate'"),
    ({'warmup_epoch': 1}, "did you mean 'warmup_epochs'?"),
    ({'amp': 3}, "'amp' is 3, expected true or false"),
    ({'views': 'nice'}, "argument views: invalid choice: 'nice'"),
    ({'simclr_loss_weight': 0, 'classification_loss_weight': 0},
     'simclr_loss_weight=0 with classification_loss_weight=0 leaves nothing to train'),
    ({'batch_size': 1}, 'batch_size=1: SimCLR contrasts the images of a batch'),
    ({'freeze_backbone': True}, 'freeze_backbone trains the heads alone'),
    ({'labelled_rows': 9999}, 'labelled_rows=9999: '),
])
def test_errors_speak_of_arguments(folder, tmp_path, wrong, line):
    with pytest.raises(UserError) as error:
        tm.train(folder, output=tmp_path / 'out', **{**SETTINGS, **wrong})
    assert line in str(error.value) and '--' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_errors_of_data(folder, tmp_path):
    frame = pd.DataFrame({'color': ['red']})
    with pytest.raises(SettingError, match="train: the DataFrame has no column 'image_path'"):
        tm.train(train=frame, val=frame, output=tmp_path)
    with pytest.raises(SettingError, match='DataFrames, and a data directory too'):
        tm.train(folder, train=frame, output=tmp_path)
    with pytest.raises(SettingError, match='train: a str, expected a pandas DataFrame'):
        tm.train(train='train.csv', output=tmp_path)
    with pytest.raises(SettingError, match='required: DIR'):
        tm.train(output=tmp_path)
    with pytest.raises(UserError, match='no such checkpoint'):
        tm.predict(tmp_path / 'no.pth.tar', 'x.jpg')


def test_nothing_of_the_process_is_changed(folder, run, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    offline, hook, level = huggingface_hub.constants.HF_HUB_OFFLINE, sys.excepthook, logging.getLogger().level
    tm.train(folder, output=tmp_path, epochs=1, **SETTINGS)
    with pytest.raises(UserError):
        tm.train(folder, output=tmp_path, pretrained=True, **{**SETTINGS, 'model': 'resnet18'})
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is offline and sys.excepthook is hook
    assert logging.getLogger().level == level and not logging.getLogger('timm_multilabel').handlers


def test_lines_are_logged(folder, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, logger='timm_multilabel'):
        tm.train(folder, output=tmp_path, epochs=1, **SETTINGS)
    assert any('40 images to train on, 16 to evaluate on' in line for line in caplog.messages)
    assert capsys.readouterr().out == ''


class _Interrupts(logging.Handler):
    """Interrupts when a line of an epoch comes, as Ctrl-C may."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def emit(self, record):
        if self.text in record.getMessage():
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(folder, tmp_path):
    whole = tm.train(folder, output=tmp_path / 'whole', experiment='run', epochs=3, **SETTINGS)
    settings = {**SETTINGS, 'output': tmp_path, 'experiment': 'run', 'epochs': 3}
    logger, handler = logging.getLogger('timm_multilabel'), _Interrupts('Epoch 2/3')
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tm.train(folder, **settings)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    run = tm.train(folder, resume='auto', **settings)
    assert run.summary['epoch'].tolist() == [0, 1, 2]
    assert_same_weights(run.last_checkpoint, whole.last_checkpoint)


def test_two_processes(folder, tmp_path, caplog):
    """The same objective as of one process with the batch of both: SimCLR's pairs are those of all processes."""
    with caplog.at_level(logging.INFO, logger='timm_multilabel'):
        run = tm.train(folder, devices=2, output=tmp_path, experiment='run', epochs=1, **SETTINGS)
    assert any(', 2 x cpu, 5 steps an epoch' in line for line in caplog.messages)
    assert len(run.summary) == 1 and torch.load(run.best_checkpoint, weights_only=True)['epoch'] == 0
    with pytest.raises(UserError, match='labelled_rows=9999: '):
        tm.train(folder, devices=2, output=tmp_path, labelled_rows=9999, **SETTINGS)


def test_signatures_show_the_settings():
    parameters = inspect.signature(tm.train).parameters
    assert list(parameters)[:2] == ['data', 'devices'] and parameters['lr'].default == 0.05
    assert 'settings' not in parameters and '\n        lr: learning rate\n' in tm.train.__doc__
    assert set(COMMANDS) <= set(tm.__all__)


@pytest.mark.parametrize('words, status', [
    (['--help'], 0), *(([name, '--help'], 0) for name in COMMANDS), (['trian'], 2),
    (['train', '--lerning-rate', '1'], 2)])
def test_help_and_typing_errors_import_no_torch(words, status):
    code = ('import sys; sys.argv[0] = "timm-multilabel"; from timm_multilabel.cli.main import main\n'
            'try: main()\nfinally: print("imported:", *{"torch", "pandas", "timm", "PIL"} & set(sys.modules))')
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
    assert done.returncode == status and done.stdout.endswith('imported:\n'), done.stderr


def test_the_package_imports_little():
    code = 'import sys, timm_multilabel; print(*{"torch", "pandas", "yaml", "argparse"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '\n'
    assert {'train', 'Predictor'} <= set(dir(tm)) and Path(tm.__file__).name == '__init__.py'
    assert TINY[1] == SETTINGS['model']
    with pytest.raises(AttributeError, match='nothing'):
        _ = tm.nothing
