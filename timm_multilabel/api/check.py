"""Check a data directory for what would spoil a result: bad images, the same image twice, strange labels."""
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched
from timm_multilabel.assembly import head_options
from timm_multilabel.assembly.data import check_dialect
from timm_multilabel.assembly.device import start_device
from timm_multilabel.assembly.run_settings import last_phase, read_run_settings
from timm_multilabel.config.commands import CheckSettings
from timm_multilabel.config.train import DataSettings, TrainSettings
from timm_multilabel.data.scan import Contents, merge_scans, read_contents, scan_images
from timm_multilabel.data.table import Table, check_single_class, find_label_space
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError, printable
from timm_multilabel.files import write_atomic
from timm_multilabel.heads import load_registry
from timm_multilabel.labels import LabelSpace
from timm_multilabel.places import path_of
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.reports.data_check import Report, report_on


@api_function(CheckSettings, 'json')
def check(data: str | Path, **settings: Any) -> Report:
    """Check a data directory for what would spoil a result.

    Args:
        data: The data directory.
        **settings: The settings, named as the flags.

    Returns:
        What was found: `errors` and `notes` are numbers, `findings` all of it, `to_dict()` the same as JSON has it.

    Raises:
        UserError: The directory cannot be checked.
    """
    refuse_launched()
    report = run_check(make_settings(CheckSettings, {**settings, 'data_dir': data}))
    assert report is not None  # only ranks other than the first have none
    return report


def run_check(settings: CheckSettings) -> Report | None:
    """Check, and write the JSON file that is asked for; perhaps in several processes, each of which reads its share.

    Returns:
        The report; None on ranks other than the first.

    Raises:
        UserError: The directory cannot be checked.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        start_device('cpu')
    rank, ranks = world()
    path = _prepare_output(settings.json)
    contents = _read_contents(settings)
    share = dict(list(contents.files.items())[rank::ranks])
    with tqdm(total=len(share), desc=printable(f'{contents.folder}: images'), unit=' images', leave=False,
              unit_scale=ranks, disable=True if rank else OFF_TERMINAL) as bar:  # the shares are alike
        scans = merge_scans(contents.files, all_objects(scan_images(share, settings.workers, bar.update)))
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return None
    report = report_on(contents, scans, settings.examples)
    if path is not None:
        write_atomic(path, report_json(report) + '\n')
    return report


def report_json(report: Report) -> str:
    """A report as JSON; ASCII, so that no text of a cell does anything to a terminal."""
    return json.dumps(report.to_dict(), indent=1)


def _read_contents(settings: CheckSettings) -> Contents:
    """The tables as training reads them, by these settings, else by those of the run.

    Raises:
        UserError: What training refuses, as far as it is no matter of one column.
    """
    of_run: dict[str, Any] = {}
    if settings.run:
        of_run = last_phase(read_run_settings(Path(settings.run), settings.head_module)).flat()
    usual = TrainSettings.settings()
    values = {name: of_run.get(name, usual[name].default) if value in (None, {}) else value
              for name, value in settings.flat().items() if name in usual}
    registry, given = load_registry(settings.head_module), values['head']
    chosen = DataSettings.of(values)
    written = head_options.dialect(chosen)

    def groups_of(columns: list[str]) -> dict[str, tuple[str, ...]]:
        return head_options.groups(head_options.match_columns(given, columns))

    def read_head(tables: list[Table], heads: list[str], name: str) -> LabelSpace:
        columns = tables[-1].label_columns
        options = head_options.expand(head_options.match_columns(given, columns), columns, heads)
        if options.get(name, {}).get('loss') == 'arcface':
            check_single_class(tables[-1], name)
        readers = head_options.readers(options, registry)
        return find_label_space(tables, [name], readers, groups_of(columns), written)

    head_options.readers(given, registry)
    contents = read_contents(
        path_of(settings.data_dir), TableFormat.of(chosen), chosen.heads, given, groups_of, read_head,
        {'train': chosen.train_split, 'val': chosen.val_split}, chosen.tag_separator)
    if 'train' in contents.splits:
        columns = contents.splits['train'].table.label_columns
        head_options.check_groups(head_options.match_columns(given, columns), columns)
    for name in given:
        if name != '*' and name not in contents.columns.heads:
            raise UserError(f'--head {name}: there is no such head (there are: {", ".join(contents.columns.heads)})')
    if not contents.bad_heads:  # one of which may be of tags
        check_dialect(written, chosen.missing_value, contents.label_space, contents.folder)
    return contents


def _prepare_output(name: str | None) -> Path | None:
    """Find out that the file could not be written before the work, not after it."""
    if name in (None, '-'):
        return None
    path = path_of(name)
    if path.is_dir():
        raise UserError(f'--json {path}: is a folder; name a file')
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
