"""TensorBoard and Weights & Biases: what they are told, once; and that they end no run."""
import json
import os
import struct
import sys
import time

import pandas as pd
import pytest
import wandb
import yaml
from common import TINY, train_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_cli import fails
from test_phases import recipe  # noqa: F401 (a fixture)
from wandb.proto import wandb_internal_pb2

from timm_multilabel.cli.main import run_command
from timm_multilabel.training import trackers
from timm_multilabel.training.trackers import Tracker, Trackers


@pytest.fixture
def offline(monkeypatch):
    """W&B without a network."""
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB__SERVICE_WAIT', '300')  # for its own process, on a busy machine


def resumed_after_first_epoch(data_dir, tmp_path, *flags):
    """A run of three epochs that was killed after the third, goes on from its first, and is as if it never stopped."""
    folder = train_run(data_dir, tmp_path, *flags, '--log-interval', '2', epochs=3)
    for name in ('checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'model_best.pth.tar', 'last.pth.tar'):
        (folder / name).unlink(missing_ok=True)
    os.link(folder / 'checkpoint-0.pth.tar', folder / 'last.pth.tar')
    run_command('train', 'train.py', ['-c', str(folder / 'args.yaml'), '--resume', str(folder / 'last.pth.tar')])
    return folder


def scalars(folder):
    """{name: [(step, value)]} of a folder of TensorBoard files."""
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()['scalars']}


def expected(folder):
    """The same of summary.csv, which has float64 where TensorBoard has float32."""
    table = pd.read_csv(folder / 'summary.csv')
    return {name: pytest.approx(table[name].tolist(), rel=1e-6) for name in table}


def wandb_records(folder):
    """The records of all runs in `<folder>/wandb`, which lie there as LevelDB's log does."""
    for path in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
        content, place, record = path.read_bytes(), 7, b''
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # padding at a block's end
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack('<IHB', content[place:place + 7])
            record += content[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(record)
                record = b''


def wandb_rows(folder):
    """What was logged, as dicts, without W&B's own."""
    for record in wandb_records(folder):
        if record.HasField('history'):
            row = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield {name: value for name, value in row.items() if not name.startswith('_')}


@pytest.mark.slow
def test_tensorboard_has_what_summary_csv_has(data_dir, tmp_path, capsys):
    folder = resumed_after_first_epoch(data_dir, tmp_path, '--log-tensorboard', '--model-ema')
    found, rows = scalars(folder / 'tensorboard'), expected(folder)
    assert found.keys() == rows.keys() and 'eval_ema/color/top1' in rows
    for name, points in found.items():
        assert [step for step, _ in points] == [1, 2, 3], name  # each epoch once, though two were trained twice
        assert [value for _, value in points] == rows[name], name
    progress = scalars(folder / 'tensorboard' / 'progress')
    steps = [step for step, _ in progress['train_loss']]
    assert steps == [2, 3, 5, 6, 8, 9]  # of 3 an epoch, every second and the last
    assert [value for step, value in progress['train/color/loss'] if step % 3 == 0] == rows['train/color/loss']
    assert f'TensorBoard: tensorboard --logdir {folder}/tensorboard' in capsys.readouterr().out


def test_tensorboard_has_the_flags_as_hyperparameters_of_the_same_run(data_dir, tmp_path):
    folder = train_run(data_dir, tmp_path, '--log-tensorboard', epochs=1) / 'tensorboard'
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ['progress']
    events = EventAccumulator(str(folder)).Reload()

    def content(name):
        metadata = events.SummaryMetadata(f'_hparams_/{name}')
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    flags = content('session_start_info').session_start_info.hparams
    assert flags['lr'].number_value == 0.05 and flags['model'].string_value == 'test_resnet'
    assert flags['decay_milestones'].string_value == '[30, 60]' and 'aa' not in flags
    metrics = {info.name.tag for info in content('experiment').experiment.metric_infos}
    assert metrics == {'train_loss', 'eval_loss', 'eval_top1'} and metrics <= scalars(folder).keys()


@pytest.mark.slow
def test_wandb_has_what_summary_csv_has(data_dir, tmp_path, offline, capsys):
    folder = resumed_after_first_epoch(data_dir, tmp_path, '--log-wandb', '--model-ema')
    told, rows = list(wandb_rows(folder)), expected(folder)
    epochs = [row for row in told if 'epochs' in row]
    assert [row['epochs'] for row in epochs] == [1, 2, 3]
    for name, values in rows.items():
        if name != 'images_per_second':  # of the epoch as it was trained first
            assert [row[name] for row in epochs] == values, name
    assert epochs[0].keys() == {'epochs', *rows}
    progress = [row for row in told if 'epochs' not in row]
    assert [row['progress/step'] for row in progress] == [2, 3, 5, 6, 8, 9]
    assert [row['progress/train_loss'] for row in progress[1::2]] == rows['train_loss']

    records = list(wandb_records(folder))
    runs = [record.run for record in records if record.HasField('run')]
    kept = json.loads((folder / 'wandb.json').read_text())
    assert {run.run_id for run in runs} == {kept['id']} and len(list(folder.glob('wandb/offline-run-*'))) == 2
    assert kept['epochs'] == 3 and kept['steps'] == {'progress': 9}
    assert {(run.project, run.display_name) for run in runs} == {('timm-multilabel', 'run')}
    flags = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert flags['lr'] == 0.05 and flags['decay_milestones'] == [30, 60] and flags['log_wandb'] is True
    axes = {record.metric.name: record.metric.step_metric for record in records if record.HasField('metric')}
    assert {name: axes[name] for name in rows} == dict.fromkeys(rows, 'epochs')
    assert axes['progress/train_loss'] == 'progress/step'
    # No source code, no git remote, no console.
    assert not any(run.git.remote_url for run in runs)
    assert not any(record.HasField('output') or record.HasField('output_raw') for record in records)
    assert 'off line, wandb sync' in capsys.readouterr().out


def test_wandb_row_that_is_told_again_is_left_out(tmp_path, offline):
    table = pd.DataFrame({'epoch': [0, 1], 'train_loss': [2.0, float('nan')]})
    for goes_on in (False, True):
        tracker = trackers.WandbTracker(tmp_path, {}, goes_on)
        tracker.start()
        tracker.add_epoch(table[:1])
        tracker.add_epoch(table)
        tracker.close()
        time.sleep(1.1)  # W&B names an offline run's folder by the second
    assert list(wandb_rows(tmp_path)) == [{'epochs': 1, 'epoch': 0, 'train_loss': 2.0}, {'epochs': 2, 'epoch': 1}]
    anew = trackers.WandbTracker(tmp_path, {}, False)
    anew.start()
    anew.close()
    assert anew.known['epochs'] == 0 and anew.known['id'] != tracker.known['id']


@pytest.mark.slow
def test_wandb_json_that_is_damaged_does_not_end_a_run(data_dir, tmp_path, offline, capsys):
    folder = train_run(data_dir, tmp_path, '--log-wandb', epochs=1)
    (folder / 'wandb.json').write_text('{"id": ')
    run_command('train', 'train.py', [
        '-c', str(folder / 'args.yaml'), '--epochs', '2', '--resume', str(folder / 'last.pth.tar')])
    assert len(pd.read_csv(folder / 'summary.csv')) == 2
    assert 'Weights & Biases: left out from here on, and the run goes on (' + str(
        folder / 'wandb.json') + ': cannot be read as the state of its tracker (' in capsys.readouterr().out


@pytest.mark.slow
def test_phases(recipe, offline, capsys):  # noqa: F811
    run_command('train', 'train.py', [
        '-c', str(recipe), '--log-tensorboard', '--log-wandb', '--log-interval', '100'])
    assert 'left out from here on' not in capsys.readouterr().out
    folder = recipe.parent / 'run'
    table = pd.read_csv(folder / 'summary.csv')
    found = scalars(folder / 'tensorboard')
    assert found['train_loss'] == [(n + 1, pytest.approx(value)) for n, value in enumerate(table['train_loss'])]
    assert [step for step, _ in found['eval_top1']] == [3, 4, 5, 6] and 'phase' not in found
    assert [step for step, _ in found['eval/shape/top1']] == [3, 4, 5]
    assert {path.name for path in (folder / 'tensorboard').iterdir() if path.is_dir()} == {
        'progress-pretrain', 'progress-joint', 'progress-heads'}
    told = list(wandb_rows(folder))
    assert [row['epoch'] for row in told if 'epochs' in row] == [0, 1, 0, 1, 2, 0]
    assert [row['epochs'] for row in told if 'epochs' in row] == [1, 2, 3, 4, 5, 6]
    assert sum('progress-joint/step' in row for row in told) == 3


def test_flags_of_trackers_are_of_the_whole_run(recipe, capsys):  # noqa: F811
    settings = yaml.safe_load(recipe.read_text())
    settings['phases'][1]['log_wandb'] = True
    recipe.write_text(yaml.safe_dump(settings))
    assert "'log_wandb' applies to the whole run" in fails(capsys, 'train', ['-c', recipe])


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_extra_that_is_missing(data_dir, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = fails(capsys, 'train', [data_dir, *TINY, '--output', tmp_path, '--experiment', 'run', f'--log-{package}'])
    assert f"--log-{package}: {package} is not installed (pip install '.[{package}]')" in error
    assert not (tmp_path / 'run').exists()


class Failing(Tracker):
    """One that fails at a method."""
    name = 'Failing'

    def __init__(self, where):
        self.calls = []
        for name in ('start', 'add_progress', 'add_epoch', 'close'):
            setattr(self, name, lambda *args, name=name: self.call(name, where))

    def call(self, name, where):
        self.calls.append(name)
        if name == where:
            raise OSError('no\nroute')


@pytest.mark.parametrize('where, calls', [
    ('start', ['start']), ('add_progress', ['start', 'add_progress']),
    ('add_epoch', ['start', 'add_progress', 'add_epoch']),
    ('close', ['start', 'add_progress', 'add_epoch', 'add_progress', 'add_epoch', 'close'])])
def test_tracker_that_fails_is_left_out_and_the_others_go_on(where, calls):
    said, failing, well = [], Failing(where), Failing('nowhere')
    both = Trackers([failing, well], said.append)
    for _ in range(2):
        both.add_progress(None, 1, {})
        both.add_epoch(pd.DataFrame())
    both.close()
    assert failing.calls == calls
    assert well.calls == ['start', 'add_progress', 'add_epoch', 'add_progress', 'add_epoch', 'close']
    assert said == ['Failing: left out from here on, and the run goes on (OSError: no route)']


@pytest.mark.slow
def test_trackers_that_cannot_begin_do_not_end_a_run(data_dir, tmp_path, monkeypatch, capsys):
    """W&B without a login, and a file where TensorBoard wants its folder."""
    def init(**settings):
        raise wandb.errors.UsageError('No API key configured. Use `wandb login` to log in.')

    monkeypatch.setattr(wandb, 'init', init)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'tensorboard').touch()
    folder = train_run(data_dir, tmp_path, '--log-wandb', '--log-tensorboard', epochs=2)
    assert len(pd.read_csv(folder / 'summary.csv')) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if 'left out from here on' in line]
    assert [line.split(':')[0] for line in lines] == ['Weights & Biases', 'TensorBoard']
