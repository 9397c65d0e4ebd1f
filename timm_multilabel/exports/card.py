"""The model card of a hub's folder: what the model is, its labels, its metrics, how it is used."""
from huggingface_hub import ModelCardData

from timm_multilabel.errors import shortened
from timm_multilabel.escaping import markdown_text
from timm_multilabel.exports.exportable import Exportable
from timm_multilabel.labels import Quantity
from timm_multilabel.metric_names import Metric, in_summary, of_head
from timm_multilabel.training.run_folder import read_summary
from timm_multilabel.training.trackers import numbers

_LISTED = 500
"""Labels of a head that the card names."""

_USAGE = '''```python
import torch
from huggingface_hub import hf_hub_download

from timm_multilabel.exports.weights import load_exported

path = hf_hub_download('{repo}', 'multilabel.safetensors')
hf_hub_download('{repo}', 'multilabel.json')
model = load_exported(path)
with torch.no_grad():
    outputs = model(images)  # (B, 3, {height}, {width}) -> {{head: logits (B, C)}}
probabilities = {{name: head.probabilities(outputs[name]) for name, head in model.named_heads.items()}}
```
'''
_BACKBONE = '''```python
import timm

backbone = timm.create_model('hf-hub:{repo}', pretrained=True)  # (B, 3, {height}, {width}) -> (B, {features})
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=backbone))
```
'''


def model_card(exportable: Exportable, repo: str | None) -> str:
    """The card as Markdown with the hub's header.

    Args:
        exportable: The model.
        repo: The name of its repository, where it is known.

    Raises:
        UserError: The run's summary.csv is damaged.
    """
    described = exportable.description
    _, height, width = described['preprocessing']['input_size']
    names = {'repo': repo or 'USER/NAME', 'height': height, 'width': width, 'features': exportable.model.num_features}
    header = ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        tags=['timm', 'timm-multilabel', 'image-classification'])
    heads = exportable.model.named_heads
    what = f'with {len(heads)} head{"s" * (len(heads) != 1)}' if heads else 'trained without labels'
    epochs = f' after {described["epochs"]} epochs' if described['epochs'] else ''
    lines = [
        f'---\n{header.to_yaml()}\n---\n',
        f'# {markdown_text((repo or described["arch"]).split("/")[-1])}\n',
        f'{markdown_text(shortened(described["arch"]))} {what}, trained with timm-multilabel{epochs} '
        f'({described["weights"]} weights), for images of {width}x{height} pixels.\n',
    ]
    if heads:
        lines += ['## Labels\n', *_labels(exportable), *_metrics(exportable)]
    lines.append('## Usage\n')
    if heads:
        lines += [_USAGE.format(**names), 'The backbone alone, by timm:\n']
    lines.append(_BACKBONE.format(**names))
    preprocessing = described['preprocessing']
    lines.append('Images are resized and cropped to {} ({}, crop {} of {:g}), their pixels divided by 255, less {}, '
                 'divided by {}.'.format(
                     f'{width}x{height}',
                     *(markdown_text(str(preprocessing[name])) for name in ('interpolation', 'crop_mode')),
                     preprocessing['crop_pct'], *(
                         ', '.join(f'{value:g}' for value in preprocessing[name]) for name in ('mean', 'std'))))
    return '\n'.join(lines) + '\n'


def _labels(exportable: Exportable) -> list[str]:
    lines = []
    for labels in exportable.model.label_space.heads:
        name = markdown_text(shortened(labels.name))
        if isinstance(labels, Quantity):
            lines.append(f'- **{name}**: a number ({labels.mean:g} on average, standard deviation {labels.std:g})')
        else:
            texts = ', '.join(markdown_text(shortened(text)) for text in labels.classes[:_LISTED])
            more = len(labels.classes) - _LISTED
            texts += f', and {more:,} more, see multilabel.json' if more > 0 else ''
            lines.append(f'- **{name}**: {len(labels.classes):,} {labels.kind}: {texts}')
    return [*lines, '']


def _metrics(exportable: Exportable) -> list[str]:
    """The metrics of the checkpoint's epoch, a line a head."""
    row = summary_row(exportable)
    part = 'eval_ema' if exportable.description['weights'] == 'ema' else 'eval'
    rows, lower = {}, ['loss']
    for name, head in exportable.model.named_heads.items():
        metrics = [*map(head.metric, head.metric_names), Metric('loss')]
        lower += head.lower_is_better
        rows[name] = {
            # With a digit more than elsewhere, unless the head says how it is written.
            metric.name: format(row[column], '.3f') if metric.form.startswith('.2f') else metric.text(row[column])
            for metric in metrics if (column := in_summary(part, of_head(name, metric.name))) in row}
    rows = {name: values for name, values in rows.items() if values}
    if not rows:
        return []
    titles = list(dict.fromkeys(title for values in rows.values() for title in values))
    titles.sort(key=('loss',).count)
    lines = ['## Metrics\n', f'On the validation split, of epoch {int(row["epoch"]) + 1}:\n']
    lines.append(f'| head | {" | ".join(map(markdown_text, titles))} |')
    lines.append('| --- |' + ' --- |' * len(titles))
    for name, values in rows.items():
        cells = [values.get(title, '') for title in titles]
        lines.append(f'| {markdown_text(shortened(name))} | {" | ".join(cells)} |')
    better = ', '.join(markdown_text(title) for title in titles if title in lower)
    return [*lines, '', f'Lower is better: {better}.\n']


def summary_row(exportable: Exportable) -> dict[str, float]:
    """The metrics of the run's summary.csv of the checkpoint's epoch; empty where there is no such row.

    Raises:
        UserError: The file cannot be read as such.
    """
    checkpoint = exportable.checkpoint
    state, folder = checkpoint.state, checkpoint.path.absolute().parent
    path = next((path for path in (folder / 'summary.csv', folder.parent / 'summary.csv') if path.is_file()), None)
    if path is None or state.get('within') is not None or 'epoch' not in state:
        return {}
    phases = state.get('phases') or []
    phase = phases[state['phase']] if phases and state.get('phase', 0) < len(phases) else None
    summary = read_summary(path)
    is_it = summary['epoch'] == state['epoch']
    if 'phase' in summary:
        is_it &= summary['phase'] == phase
    return numbers(summary[is_it]) if is_it.any() else {}
