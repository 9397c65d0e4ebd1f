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
from timm_multilabel.api.arguments import make_settings
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.cli.grid import parse_training_flags
from timm_multilabel.cli.parser import parse
from timm_multilabel.config import commands
from timm_multilabel.config.files import as_words
from timm_multilabel.config.settings import read_values
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import SettingError, UserError
from timm_multilabel.exports.examples import COUNT
from timm_multilabel.exports.formats import FORMATS
from timm_multilabel.inference.loaded import WHAT
from timm_multilabel.reports.prediction_formats import FORMATS as PREDICTION_FORMATS

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_dataframes_as_people_have_them(folder, tmp_path):
    """Whole numbers beside missing ones, lists and sets and arrays of tags, an index of its own."""
    images = [str(folder / path) for path in pd.read_csv(folder / 'train.csv')['image_path'][:8]]
    cells = [1, None, 2, 1, 2, 1, 2, 1]
    tags = [['x', 'y'], {'y', 'x'}, np.array(['x']), ('y',), ['x'], ['y'], ['x'], ['y']]
    train = pd.DataFrame({'image_path': images, 'lab': cells, 'tags': tags}, index=range(100, 108))
    val = pd.DataFrame({'image_path': images, 'lab': [1, 2] * 4, 'tags': tags})
    run = tm.train(train=train, val=val, head={'tags': {'loss': 'tags'}}, tag_separator=';', output=tmp_path, epochs=1,
                   **SETTINGS)
    assert {'eval/lab/top1', 'eval/tags/map'} <= set(run.summary.columns)
    written, = tmp_path.glob('data-*')
    assert pd.read_csv(written / 'train.csv', dtype=str)['lab'].tolist()[:3] == ['1', np.nan, '2']
    assert pd.read_csv(written / 'train.csv')['tags'].tolist()[:3] == ['x;y', 'x;y', 'x']
    with pytest.raises(SettingError, match='val: missing'):
        tm.train(train=train, output=tmp_path)
    with pytest.raises(SettingError, match='separator: of files'):
        tm.train(train=train, val=val, separator=';', output=tmp_path)


def test_recipes(folder, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('phases:\n- {name: simclr, epochs: 1, wlc: 0}\n- {name: labels, epochs: 1, wls: 0}\n')
    run = tm.train(folder, config=recipe, output=tmp_path, experiment='run', **SETTINGS)
    assert run.summary['phase'].tolist() == ['simclr', 'labels']


def test_arguments_of_an_experiment(tmp_path):
    (tmp_path / 'grid.yaml').write_text('settings: {a: {lr: 0.1}}\n')
    with pytest.raises(SettingError, match="there is no argument 'flags'"):
        tm.grid(tmp_path, 'd', flags=['-j', '2'])
    with pytest.raises(UserError, match="unrecognized arguments: foo"):
        parse_training_flags(['foo'])


@pytest.mark.parametrize('values, words', [
    ({'mean': [-1.0, 0.0, 1.0]}, ['--mean', '-1.0', '0.0', '1.0']),
    ({'head': {'x': {'columns': ['a', 'b'], 'class_weights': {'r': 2.0}}}},
     ['--head', 'x:columns=a+b,class_weights=r:2.0']),
    ({'allow_hub': False}, []), ({'pretrained': False}, ['--no-pretrained']),
    ({'torchcompile': True}, ['--torchcompile', 'inductor']),
])
def test_settings_become_words_that_mean_them(values, words):
    checked = read_values(TrainSettings, values)
    known = TrainSettings.settings()
    assert [word for name, value in checked.items() for word in as_words(known[name], value)] == words
    assert parse(TrainSettings, 'train', words).keys() == (checked.keys() if words else set())


def test_truth_values_where_there_are_none(folder):
    with pytest.raises(SettingError, match="'aa' is False, expected a text or a number"):
        tm.train(folder, aa=False)
    assert read_values(TrainSettings, {'torchcompile': False}) == {'torchcompile': None}


def test_choices_are_those_of_what_has_them():
    assert tuple(FORMATS) == commands.EXPORT_FORMATS and tuple(PREDICTION_FORMATS) == commands.PREDICTION_FORMATS
    assert WHAT == commands.EMBEDDED and COUNT == commands.EXPORT_IMAGES


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert list(parameters)[:5] == ['data', 'train', 'val', 'test', 'devices'] and parameters['lr'].default == 0.05
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


@pytest.mark.parametrize('head', [
    'price:loss=numeric', ['price:loss=numeric'], {'price': {'loss': 'numeric'}}], ids=str)
def test_options_of_heads_are_words_or_mappings(head):
    assert make_settings(TrainSettings, {'data_dir': 'd', 'head': head}).data.head == {'price': {'loss': 'numeric'}}
