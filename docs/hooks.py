"""Pages that mkdocs makes from the code: every command with its flags, and the Python API."""
import html
import re
import textwrap
from importlib.metadata import PackageNotFoundError, metadata, requires
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import timm_multilabel
from timm_multilabel.cli.commands import COMMANDS
from timm_multilabel.cli.parser import help_of
from timm_multilabel.config.settings import Setting, Settings

RESULTS = (
    'probe.Probe',
    'training_run.TrainingRun', 'validate.Validation', 'predict.Prediction', 'embed.Embedded', 'search.SearchResult',
    'export.Exported', 'report.Report', 'compare.Comparison', 'grid.Experiment', 'split.SplitTable',
    'convert.Converted',
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the commands' pages into the navigation."""
    pages: list[Any] = [{name: f'reference/commands/{name}.md'} for name in COMMANDS]
    for section in config.nav or []:
        for item in section.get('Reference', []):
            if 'Each command' in item:
                item['Each command'] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {f'reference/commands/{name}.md': command_page(name, cls) for name, cls in COMMANDS.items()}
    pages['reference/commands.md'] = commands_page()
    pages['reference/python-api.md'] = api_page()
    pages['reference/dependencies.md'] = dependencies_page()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def commands_page() -> str:
    """All commands, a row each."""
    rows = ''.join(f'| [`{name}`](commands/{name}.md) | {cls.HELP} |\n' for name, cls in COMMANDS.items())
    return (
        '# Commands\n\n`timm-multilabel COMMAND ...` from an installation, `python -m timm_multilabel COMMAND ...` '
        'from a clone. `COMMAND --help` prints what these pages show: they are generated from the same settings.\n\n'
        f'| command | what it does |\n| --- | --- |\n{rows}\n'
        'Several processes: `./distributed_run.sh N COMMAND ...` starts `train`, `validate`, `probe`, `predict`, '
        '`embed` or `check` in N processes on this machine '
        '([Many GPUs and machines](../how-to/many-gpus.md)). Exit statuses: [Exit codes](exit-codes.md).\n')


def command_page(name: str, cls: type[Settings]) -> str:
    """A command: its use, an example, and a table for each group of flags."""
    page = cls.PAGE
    what = ' '.join((cls.__doc__ or '').split())
    example = ' \\\n    '.join(textwrap.wrap(f'timm-multilabel {name} {cls.EXAMPLE}', 74, break_on_hyphens=False))
    parts = [f'# {name}\n\n{what}\n\n```text\n{example}\n```\n\n'
             f'Used in [{page.removesuffix(".md")}](../../{page}). In Python: '
             f'[`tm.{name}`](../python-api.md#timm_multilabel.api.{name}.{name}).\n']
    groups = {title.capitalize() if title else 'General': list(settings.values()) for title, settings in cls.groups()}
    arguments = [made for of_group in groups.values() for made in of_group if made.positional]
    for heading, of_group in {'Arguments': arguments, **groups}.items():
        rows = [made for made in of_group if made.positional == (heading == 'Arguments')]
        if rows:
            first = 'argument' if heading == 'Arguments' else 'flag'
            parts.append(f'\n## {heading}\n\n| {first} | meaning |\n| --- | --- |\n' + ''.join(map(row, rows)))
    return ''.join(parts)


def row(made: Setting) -> str:
    """A setting as a row of a table."""
    value = made.metavar if isinstance(made.metavar, str) else ' '.join(made.metavar or ())
    if made.choices is not None and not value:
        value = '{' + ','.join(made.choices) + '}'
    options = [*made.options, *([f'--no-{made.options[-1][2:]}'] if made.switch == 'both' else [])]
    value = value if made.switch is None else ''
    names = [f'`{f"{option} {value}".strip()}`' for option in options] or [f'`{value}`']
    text = html.escape(help_of(made), quote=False).replace('|', '\\|').replace('*', '\\*').replace('_', '\\_')
    return f'| {"<br>".join(name.replace("|", chr(92) + "|") for name in names)} | {text} |\n'


def api_page() -> str:
    """The functions, results, errors and parts of the package, from their docstrings."""
    modules = timm_multilabel._MODULES
    parts = {name: f'{module}.{name}' for name, module in modules.items() if name not in COMMANDS}
    sections = {
        'Functions': ('Each takes the settings of the command of its name as keyword arguments: `--img-size` is '
                      '`img_size`. The pages of the [commands](commands.md) list them.',
                      [f'api.{name}.{name}' for name in COMMANDS]),
        'Results': ('What the functions return.', [f'api.{name}' for name in RESULTS]),
        'Errors': ('What you can fix is a `UserError`.',
                   [path for path in parts.values() if path.startswith('errors.')]),
        'Parts': ('For [a training loop of your own](../how-to/own-loop.md).',
                  [path for path in parts.values() if not path.startswith('errors.')]),
    }
    page = '# Python API\n\n`import timm_multilabel as tm`. [Use Python](../how-to/python.md) shows it at work.\n'
    for title, (text, paths) in sections.items():
        page += f'\n## {title}\n\n{text}\n\n' + ''.join(f'::: timm_multilabel.{path}\n\n' for path in paths)
    return page


def dependencies_page() -> str:
    """What the package needs, with the lowest versions and the licenses."""
    rows: dict[str, tuple[str, str]] = {}
    for line in requires('timm-multilabel') or []:
        found = re.fullmatch(r'([\w.-]+)([^;]*)(?:;.*extra==.(\w+).)?', line.replace(' ', ''))
        assert found is not None, line
        rows.setdefault(found[1], (found[2], found[3] or 'always'))
    return (
        '# Dependencies\n\nThe lowest versions are tested by `.ci/lowest`, those of `constraints.txt` by CI. A package '
        'that only an extra needs is installed by `pip install \'.[EXTRA]\'` in a clone.\n\n'
        '| package | version | needed | license |\n| --- | --- | --- | --- |\n'
        + ''.join(f'| {name} | {bound} | {extra} | {license_of(name)} |\n'
                  for name, (bound, extra) in sorted(rows.items())))


def license_of(package: str) -> str:
    """The license that an installed package declares, or where to look for it."""
    try:
        known = metadata(package)
    except PackageNotFoundError:
        return 'see its page on PyPI'
    classifiers = [line.rsplit(' :: ', 1)[-1] for line in known.get_all('Classifier') or []
                   if line.startswith('License :: OSI')]
    text = known.get('License-Expression') or ', '.join(classifiers) or (known.get('License') or '').split('\n')[0]
    return text or 'see its page on PyPI'
