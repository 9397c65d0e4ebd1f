"""What a command line and a recipe mean: pinned before the command line was generated from the settings."""
import contextlib
import difflib
import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from timm_multilabel.assembly.grid_file import read_grid
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.cli.main import parse_settings
from timm_multilabel.cli.parser import make_parser
from timm_multilabel.config.files import args_yaml

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / 'tests' / 'golden' / 'command_lines.json').read_text())


def plain(value):
    """A value as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def changed(values):
    """The values that are not those of `train d`, as the golden file has them."""
    return {name: value for name, value in plain(values).items() if GOLDEN['defaults'].get(name, ()) != value}


def resolve(words):
    """What a command line comes to, as the golden file has it."""
    name, prog, errors = words[0], f'timm-multilabel {words[0]}', io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            settings = parse_settings(name, prog, words[1:])
    except SystemExit as stop:
        assert stop.code == 2
        return {'error': errors.getvalue().rstrip('\n')}
    if name != 'train':
        return {'flags': plain(settings.flat())}
    return {
        'args.yaml': changed(args_yaml(settings)), 'resume': settings.run.resume, 'allow_hub': settings.data.allow_hub,
        'phases': [
            changed({'phase': phase.name, **{name: value for name, value in phase.settings.flat().items()
                                             if name not in ('config', 'resume')}})
            for phase in settings.phases]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current directory: the YAML files of the golden file, and the recipes."""
    for name, text in GOLDEN['files'].items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'recipes').symlink_to(ROOT / 'recipes')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('case', GOLDEN['commands'], ids=lambda case: ' '.join(case['command'])[:60])
def test_command_lines(files, case):
    case = dict(case)
    found, command = resolve(case['command']), case.pop('command')
    if 'error' in case:  # Python's versions quote choices differently
        prog = f'timm-multilabel {command[0]}: error: '
        expected = case['error'].removeprefix(prog).replace("'", '')
        assert found['error'].removeprefix(prog).replace("'", '') == expected
    else:
        assert found == case


@pytest.mark.parametrize('experiment', GOLDEN['grids'])
def test_runs_of_experiments(tmp_path, experiment):
    grid, runs = read_grid(ROOT / experiment), GOLDEN['grids'][experiment]
    assert [run.name for run in grid.runs] == [run['name'] for run in runs]
    for run, case in zip(grid.runs, runs, strict=True):
        path = tmp_path / 'run.yaml'
        path.write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False))
        found = resolve(['train', 'd', '-c', str(path), '--seed', str(run.seed)])
        assert {'name': run.name, 'start': run.start and run.start.name, **found} == case


@pytest.mark.skipif(sys.version_info >= (3, 13), reason='argparse writes flags with values otherwise')
@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_what_it_was(monkeypatch, name):
    monkeypatch.delenv('COLUMNS', raising=False)
    expected = (ROOT / 'tests' / 'golden' / 'help' / f'{name}.txt').read_text()
    found = make_parser(COMMANDS[name], f'timm-multilabel {name}').format_help()
    assert not [*difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm='')]


def test_the_defaults_of_training():
    assert plain(args_yaml(parse_settings('train', 'train', ['d']))) == GOLDEN['defaults']
