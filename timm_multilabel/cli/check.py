"""Check a data directory for what would spoil a result: bad images, the same image twice, strange labels."""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timm_multilabel.cli import head_options
from timm_multilabel.cli.data import check_dialect
from timm_multilabel.cli.flags import HeadOptions, add_dialect_flags, count, dialect, positive, separator
from timm_multilabel.cli.run_flags import last_phase, read_run_flags
from timm_multilabel.data.columns import Look
from timm_multilabel.data.scan import Contents, read_contents, scan_images
from timm_multilabel.data.table import Table, check_single_class, find_label_space
from timm_multilabel.errors import UserError, listed, printable, shortened
from timm_multilabel.files import write_atomic
from timm_multilabel.heads import load_registry
from timm_multilabel.labels import LabelSpace
from timm_multilabel.reports.data_check import Report, report_on

NAME = 'check'
HELP = 'check a data directory for what would spoil a result'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('data_dir', metavar='DIR', help='folder with train.csv, val.csv, ... and the images')
    parser.add_argument('--run', metavar='RUN', help='run folder, whose flags on data count where none is given here')
    parser.add_argument('--train-split', metavar='NAME', help='train, ... or the path of a CSV')
    parser.add_argument('--val-split', metavar='NAME', help='val, ... or the path of a CSV')
    parser.add_argument('--image-column', metavar='NAME', help='column of the image paths (default: image_path)')
    parser.add_argument('--separator', type=separator, metavar='CHAR',
                        help='between cells: a character, tab, or whitespace for runs of blanks (default: found)')
    parser.add_argument('--missing-value', metavar='TEXT', help='a cell that means no label, beside the empty one')
    add_dialect_flags(parser, '|')
    parser.add_argument('--heads', nargs='+', metavar='NAME',
                        help='label columns to check (default: those that training takes)')
    parser.add_argument('--head', action=HeadOptions, nargs='+', default={}, metavar='HEAD:NAME=VALUE,...',
                        help='options of a head as in training, such as loss=tags, loss=numeric, columns=a+b')
    parser.add_argument('--head-module', metavar='FILE', help='Python file with kinds of heads of your own')
    parser.add_argument('-j', '--workers', type=positive, default=os.cpu_count() or 1, metavar='N',
                        help='threads that decode (default: the cores)')
    parser.add_argument('--examples', type=count, default=5, metavar='N',
                        help='rows, images or labels that a finding names at most')
    parser.add_argument('--json', metavar='FILE', help='write the report as JSON; - prints it, and nothing else')


def run(args: argparse.Namespace) -> None:
    """Check, and end with exit status 1 where something would spoil a result."""
    path = _prepare_output(args.json)
    contents = _read_contents(args)
    with tqdm(total=len(contents.files), desc=printable(f'{contents.folder}: images'), unit=' images', leave=False,
              disable=None) as bar:
        scans = scan_images(contents.files, args.workers, bar.update)
    report = report_on(contents, scans, args.examples)
    if args.json is not None:
        # ASCII, so that no text of a cell does anything to a terminal.
        text = json.dumps(report.to_dict(), indent=1)
        if path is None:
            print(text)
        else:
            write_atomic(path, text + '\n')
    if args.json != '-':
        for line in report_lines(report):
            print(printable(line))
    if report.errors:
        sys.exit(1)


def _read_contents(args: argparse.Namespace) -> Contents:
    """The tables as training reads them, its flags from the command line, else from the run.

    Raises:
        UserError: What training refuses, as far as it is no matter of one column.
    """
    of_run = vars(last_phase(read_run_flags(Path(args.run), args.head_module))) if args.run else {}

    def flag(name: str, default: Any = None) -> Any:
        value = getattr(args, name)
        return of_run.get(name, default) if value in (None, {}) else value

    registry, given = load_registry(args.head_module), flag('head', {})
    tags = argparse.Namespace(**{name: flag(name) for name in ('tag_separator', 'none_value', 'missing_value')})

    def groups_of(columns: list[str]) -> dict[str, tuple[str, ...]]:
        return head_options.groups(head_options.match_columns(given, columns))

    def read_head(tables: list[Table], heads: list[str], name: str) -> LabelSpace:
        columns = tables[-1].label_columns
        options = head_options.expand(head_options.match_columns(given, columns), columns, heads)
        if options.get(name, {}).get('loss') == 'arcface':
            check_single_class(tables[-1], name)
        readers = head_options.readers(options, registry)
        return find_label_space(tables, [name], readers, groups_of(columns), dialect(tags))

    head_options.readers(given, registry)
    contents = read_contents(
        Path(args.data_dir), flag('image_column', 'image_path'), flag('separator'), tags.missing_value,
        flag('heads'), given, groups_of, read_head,
        {usual: flag(f'{usual}_split', usual) for usual in ('train', 'val')}, tags.tag_separator)
    if 'train' in contents.splits:
        columns = contents.splits['train'].table.label_columns
        head_options.check_groups(head_options.match_columns(given, columns), columns)
    for name in given:
        if name != '*' and name not in contents.columns.heads:
            raise UserError(f'--head {name}: there is no such head (there are: {", ".join(contents.columns.heads)})')
    if not contents.bad_heads:  # one of which may be of tags
        check_dialect(tags, contents.label_space, contents.folder)
    return contents


def _prepare_output(name: str | None) -> Path | None:
    """Find out that the file could not be written before the work, not after it."""
    if name in (None, '-'):
        return None
    path = Path(name)
    if path.is_dir():
        raise UserError(f'--json {path}: is a folder; name a file')
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def report_lines(report: Report) -> list[str]:
    """A report as lines of text, the last one with the numbers of errors and notes."""
    looks = listed([f'{shortened(name)} {Look(*look.values())}' for name, look in report.columns.items()])
    lines = _split_lines(report) + ([f'columns look like: {looks}'] if looks else [])
    lines += _head_lines(report) + _image_lines(report) + ['']
    for finding in report.findings:
        lines.append(f'{finding.severity}: {finding.text}')
        if finding.examples:
            more = '; ...' if finding.count > len(finding.examples) else ''
            lines.append('    ' + '; '.join(finding.examples) + more)
    errors, notes = (
        f'{number} {name}{"" if number == 1 else "s"}'
        for number, name in ((report.errors, 'error'), (report.notes, 'note')))
    return [*lines, f'{errors}, {notes}']


def _split_lines(report: Report) -> list[str]:
    names = {name: Path(split['csv']).name for name, split in report.splits.items()}
    width = max(map(len, names.values()))
    lines = []
    for name, split in report.splits.items():
        labels = sum(split['labels'].values())
        of_labels = f', {labels} labels' if split['labels'] else ''
        lines.append(f'{names[name]:<{width}}  {split["rows"]} rows, {split["images"]} images{of_labels}')
    return lines


def _head_lines(report: Report) -> list[str]:
    """The table of heads."""
    if not report.heads:
        return []
    labelled = [name for name, split in report.splits.items() if split['labels']]
    rows = [['head', 'classes', *(f'labels in {name}' for name in labelled)]]
    if 'train' in labelled:
        rows[0] += ['rarest in train', 'most frequent in train']
    for name, head in report.heads.items():
        rows.append([shortened(name), str(head['classes']) if head['classes'] else head['kind'], *(
            str(report.splits[split]['labels'][name]) for split in labelled)])
        if 'train' in labelled:
            rows[-1] += _extremes(head['counts']['train'])
    widths = [max(map(len, column)) for column in zip(*rows)]
    numbers = range(1, 2 + len(labelled))
    return ['', *('  '.join(
        f'{cell:>{width}}' if place in numbers else f'{cell:<{width}}'
        for place, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows), '']


def _extremes(counts: dict[str, int]) -> list[str]:
    """The rarest and the most frequent label, the latter with its share."""
    if not counts:
        return ['', '']
    rarest, frequent = min(counts, key=counts.get), max(counts, key=counts.get)
    share = 100 * counts[frequent] / max(1, sum(counts.values()))
    return [f'{shortened(rarest)} {counts[rarest]}', f'{shortened(frequent)} {counts[frequent]} ({share:.1f} %)']


def _image_lines(report: Report) -> list[str]:
    images, sizes = report.images, report.images['sizes']
    lines = [f'{images["files"]} image files']
    if not sizes['different']:
        return lines
    shown = ', '.join(f'{width}x{height} ({number})' for width, height, number in sizes['most_common'])
    more = ', ...' if sizes['different'] > len(sizes['most_common']) else ''
    ends = ', '.join(
        f'{name} {width}x{height}' for name in ('smallest', 'largest') for width, height, _ in sizes[name])
    lines.append(f'sizes: {sizes["different"]} different, {ends}; {shown}{more}')
    for name in ('modes', 'formats'):
        lines.append(f'{name}: ' + ', '.join(f'{kind} ({number})' for kind, number in images[name].items()))
    return lines
