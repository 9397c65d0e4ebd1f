"""`timm-multilabel check`."""
import sys
from pathlib import Path

from timm_multilabel.api.check import report_json, run_check
from timm_multilabel.config.commands import CheckSettings
from timm_multilabel.data.columns import Look
from timm_multilabel.errors import listed, printable, shortened
from timm_multilabel.reports.data_check import Report


def run(settings: CheckSettings) -> None:
    """Check, and print the report; exit status 1 where something would spoil a result."""
    report = run_check(settings)
    if report is None:
        return
    if settings.json == '-':
        print(report_json(report))
    else:
        for line in report_lines(report):
            print(printable(line))
    if report.errors:
        sys.exit(1)


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
    rarest, frequent = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
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
