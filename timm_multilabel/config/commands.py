"""The settings of the commands other than training."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from timm_multilabel.config import shared
from timm_multilabel.config.settings import REMAINDER, Settings, required, setting, switch
from timm_multilabel.config.train import DataSettings
from timm_multilabel.config.values import HeadOptions, at_least_0, count, head_and_column, number, positive, threshold
from timm_multilabel.errors import UserError

AMP_TYPES = ('float16', 'bfloat16')
SHARD_FORMATS = ('webdataset', 'parquet')
EXPORT_FORMATS = ('onnx', 'pt2', 'safetensors', 'backbone')
PREDICTION_FORMATS = ('table', 'csv', 'jsonl')
EMBEDDED = ('features', 'projections')
EXPORT_IMAGES = 16
"""Images that an export is compared on."""
_AS_IN_TRAINING = '(default: as in training)'


@dataclass(frozen=True)
class ValidateSettings(Settings):
    """Score a checkpoint on a labelled split, head by head; model and classes come from the checkpoint."""
    HELP = 'score a checkpoint on a labelled split'
    EXAMPLE = 'my-photos --checkpoint output/train/tiny/model_best.pth.tar --split test --confusion'
    PAGE = 'how-to/own-labels.md'

    data_dir: str = required('folder with val.csv and the images', positional=True, metavar='DIR')
    checkpoint: str = required('checkpoint of a run', metavar='FILE')
    model: str | None = setting(None, 'stop if the checkpoint is of another model', metavar='NAME')
    split: str | None = setting(
        None, "val, test, ... or the path of a CSV (default: the run's validation split)", metavar='NAME')
    weights: str = shared.weights('score')
    image_column: str | None = shared.image_column(f'column of the image paths {_AS_IN_TRAINING}')
    separator: str | None = shared.cell_separator(f'between cells: a character, tab or whitespace {_AS_IN_TRAINING}')
    missing_value: str | None = shared.missing_value(f'a cell that means no label {_AS_IN_TRAINING}')
    tag_separator: str | None = shared.tags_between('as in training')
    none_value: str | None = shared.no_tags()
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    skip_bad_images: bool = switch('leave out and report images that cannot be decoded', both=False)
    device: str | None = shared.device()
    amp: bool = switch('mixed precision', both=False)
    amp_dtype: str | None = setting(None, 'its lower precision', choices=AMP_TYPES)
    channels_last: bool = switch('channels-last memory layout', both=False)
    knn: int | None = setting(
        None,
        'also classify each row by its K nearest images of the training split (cosine of features, nearer ones count '
        'more); of a checkpoint without heads, each label column', positive, metavar='K')
    results_file: str | None = setting(None, 'write the metrics as .json or .csv', metavar='FILE')
    confusion: str | None = setting(
        None, "write each head's confusion matrix as CSV and picture (default: beside the checkpoint)", nargs='?',
        const='', metavar='DIR')


@dataclass(frozen=True)
class PredictSettings(Settings):
    """Say what each head of a checkpoint makes of images: labels with their probabilities."""
    HELP = 'say what each head makes of images'
    EXAMPLE = 'output/train/tiny/model_best.pth.tar photos/ --top-k 3 --out labels.csv'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required('checkpoint of a run', positional=True, metavar='CHECKPOINT')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='IMAGES...')
    top_k: int = setting(1, 'the K likeliest classes of each head', positive, metavar='K')
    threshold: list[tuple[str, float]] = setting(
        [],
        'leave out labels of a lower probability; where no class is left the label is unknown. Give it again for '
        'other heads (default: 0, and 0.5 for tags)',
        threshold, repeats=True, merge=lambda before, now: [*before, *now], metavar='[HEAD=]T')
    format: str | None = setting(None, '(default: the ending of --out, else table)', choices=PREDICTION_FORMATS)
    out: str | None = setting(None, 'where to write (default: standard output)', metavar='FILE')
    force: bool = shared.force()
    weights: str = shared.weights('use')
    image_column: str | None = shared.image_column(f'column of the image paths in CSVs {_AS_IN_TRAINING}')
    separator: str | None = shared.cell_separator(
        f'between cells of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('mixed precision', both=False)


@dataclass(frozen=True)
class EmbedSettings(Settings):
    """Write where images lie in a checkpoint's space: features or projections with the images' paths, for search."""
    HELP = "write images' features or projections to a file"
    EXAMPLE = 'output/train/tiny/model_best.pth.tar photos/ --out photos.npz'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required(
        'checkpoint of a run, with heads or without', positional=True, metavar='CHECKPOINT')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='IMAGES...')
    out: str = required('file to write: .npz or .parquet', metavar='FILE')
    what: str = setting(
        EMBEDDED[0], "pooled features of the backbone, or the projector's output, which NT-Xent compares",
        choices=EMBEDDED)
    force: bool = shared.force()
    weights: str = shared.weights('use')
    image_column: str | None = shared.image_column(f'column of the image paths in CSVs {_AS_IN_TRAINING}')
    separator: str | None = shared.cell_separator(
        f'between cells of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('mixed precision', both=False)


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Find the images of a file of `timm-multilabel embed` that are nearest to query images, as a table or a
    picture."""
    HELP = 'find the images nearest to others'
    EXAMPLE = 'photos.npz query.jpg --checkpoint output/train/tiny/model_best.pth.tar -k 8 --sheet nearest.jpg'
    PAGE = 'how-to/deploy.md'

    embeddings: str = required('embeddings that timm-multilabel embed wrote', positional=True, metavar='FILE')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='QUERY_IMAGE...')
    checkpoint: str = required('the checkpoint that made the embeddings', metavar='FILE')
    count: int = setting(10, 'images to find for each query', positive, flags=('-k',), metavar='K')
    sheet: str | None = setting(None, 'draw queries and what was found as a picture (.png or .jpg)', metavar='FILE')
    force: bool = shared.force()
    image_column: str | None = shared.image_column(f'column of the image paths in CSVs {_AS_IN_TRAINING}')
    separator: str | None = shared.cell_separator(
        f'between cells of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('mixed precision', both=False)


ReadingSettings = PredictSettings | EmbedSettings | SearchSettings
"""The settings of what reads images that the user names, and runs a checkpoint on them."""


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Write a checkpoint as ONNX, torch.export, safetensors and a timm backbone, each compared with it on real
    images."""
    HELP = (
        'write a checkpoint as ONNX, torch.export, safetensors, a timm backbone, or a folder for the Hugging Face hub')
    EXAMPLE = 'output/train/tiny/model_best.pth.tar --formats onnx'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required('checkpoint of a run', positional=True, metavar='CHECKPOINT')
    formats: list[str] | None = setting(
        None, f'of {", ".join(EXPORT_FORMATS)} (default: all that can be written; with --hub none)', nargs='+',
        choices=EXPORT_FORMATS, metavar='NAME')
    out: str | None = setting(None, 'folder to write to (default: export/ beside the checkpoint)', metavar='DIR')
    images: list[str] | None = setting(
        None,
        f'files or folders of images, {EXPORT_IMAGES} of which are compared on (default: the validation split of the '
        'run)', nargs='+', metavar='PATH')
    weights: str = shared.weights('export')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    hub: str | None = setting(
        None, 'build a folder for the Hugging Face hub: model card, weights and configuration', metavar='DIR')
    push: str | None = setting(
        None, 'upload the folder of --hub there; a repository that is new is private', metavar='USER/NAME')
    force: bool = shared.force('replace what is there')


@dataclass(frozen=True)
class ReportSettings(Settings):
    """Write one HTML page about a run: settings, curves, metrics, mistakes, calibration, a map of embeddings, views."""
    HELP = 'write one HTML page about a run'
    EXAMPLE = 'output/train/tiny'
    PAGE = 'how-to/watch-a-run.md'

    run: str = required('run folder, such as output/train/NAME', positional=True, metavar='RUN')
    out: str | None = setting(None, 'the page (default: report.html in the run folder)', metavar='FILE')
    force: bool = shared.force('write over a page that is there')
    split: str | None = setting(
        None, "val, test, ... or the path of a CSV (default: the run's validation split)", metavar='NAME')
    data: str | None = setting(None, "data directory, where it has moved (default: the run's)", metavar='DIR')
    checkpoint: str | None = setting(None, 'another than model_best.pth.tar of the run', metavar='FILE')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    workers: int = shared.workers()
    device: str | None = shared.device()


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Compare runs: their settings, their metrics, and which differences are more than chance, as one table."""
    HELP = 'compare runs: settings that differ, metrics, and which differences are more than chance'
    EXAMPLE = 'output/train/tiny output/train/other --out table'
    PAGE = 'how-to/compare-and-grid.md'

    runs: list[str] = required(
        'run folders; those of one experiment, with other seeds, form a group', positional=True, nargs='+',
        metavar='RUN')
    out: str | None = setting(
        None, 'write experiments.csv, experiments.md and experiments.html there (default: print only)', metavar='DIR')
    baseline: str | None = setting(
        None, 'a run of the group that the others are compared with (default: the first run)', metavar='RUN')
    data: str | None = setting(
        None, 'data directory to score all runs on (default: what each was trained with)', metavar='DIR')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    workers: int = shared.workers('loader processes, where predictions have to be made')
    device: str | None = shared.device()
    force: bool = shared.force()


@dataclass(frozen=True)
class GridSettings(Settings):
    """Run an experiment: every setting with every seed, side by side in tables and a picture; goes on where it
    stopped."""
    HELP = 'run an experiment of many settings and seeds, and compare them'
    EXAMPLE = 'experiments/few-labels my-photos --jobs 2'
    PAGE = 'how-to/compare-and-grid.md'

    experiment: str = required(
        'folder with a grid.yaml; results.csv, differences.csv, results.md and results.png are written there once all '
        'runs are done', positional=True, metavar='EXPERIMENT')
    data_dir: str | None = setting(None, 'data directory', positional=True, nargs='?', metavar='DIR')
    output: str | None = setting(
        None, 'where run folders go (default: output/grid/<name of EXPERIMENT>)', metavar='DIR')
    jobs: int = setting(1, 'runs at once; they share the cores', positive, metavar='N')
    split: str = setting(
        'val', 'split that is scored; files of another one are called results-NAME.csv, ...', metavar='NAME')
    tables: bool = switch(
        'run nothing: make tables and picture anew, of results.csv and differences.csv', both=False)
    flags: list[str] = setting(
        [], 'all that follow are flags of training, for all runs: --flags --cache ram -j 2', nargs=REMAINDER,
        metavar='...')

    @property
    def named_data_dir(self) -> str:
        """The data directory, which everything but `tables` needs.

        Raises:
            UserError: None is named.
        """
        if self.data_dir is None:
            raise UserError('name the data directory too')
        return self.data_dir


@dataclass(frozen=True)
class SampleSettings(Settings):
    """Draw a small data set with three label heads, without any download."""
    HELP = 'draw a small data set with three label heads, without any download'
    EXAMPLE = 'sample'
    PAGE = 'get-started/sample-data.md'

    directory: str = required('folder to write to', positional=True, metavar='DIR')
    train: int = setting(2400, 'rows of train.csv', positive, metavar='N')
    val: int = setting(400, 'rows of val.csv', positive, metavar='N')
    test: int = setting(400, 'rows of test.csv', positive, metavar='N')
    unlabelled: int = setting(1200, 'rows of unlabelled.csv, or 0', count, metavar='N')
    size: int = setting(64, 'width and height in pixels', number(int, 16), metavar='N')
    seed: int = setting(0, 'same seed, same bytes', count, metavar='N')
    format: str = setting(
        'csv', 'write images/ and CSVs, or shards with images and labels in them', choices=('csv', *SHARD_FORMATS))
    force: bool = shared.force()


@dataclass(frozen=True)
class SplitSettings(Settings):
    """Split one CSV of labels into train.csv, val.csv and test.csv, with all.csv beside them."""
    HELP = 'split one CSV of labels into train.csv, val.csv and test.csv'
    EXAMPLE = "table.csv --image 'images/{id}.jpg' --heads color size=SizeColumn"
    PAGE = 'how-to/own-labels.md'

    source: str = required('table with a row for each image', positional=True, metavar='CSV')
    out: str | None = setting(None, 'folder to write to (default: that of the CSV)', metavar='DIR')
    image: str = required(
        "path of a row's image, with columns in braces: './images/{id}.jpg'", metavar='PATTERN')
    heads: list[tuple[str, str]] = required(
        'label heads, each with its column where that has another name', head_and_column, nargs='+',
        metavar='NAME[=COLUMN]')
    image_column: str = shared.image_column('column of paths to write', DataSettings.image_column)
    separator: str | None = shared.cell_separator(
        'what is between cells: a character, tab, or whitespace for runs of blanks (default: found)')
    ratios: Sequence[float] = setting(
        (80, 10, 10), 'shares of the rows; a split with 0 gets no file (default: 80 10 10)', at_least_0, nargs=3,
        metavar=('TRAIN', 'VAL', 'TEST'))
    stratify: str | None = setting(
        None, 'give each split the same share of the rows of each label of this head', metavar='HEAD')
    group: str | None = setting(
        None, 'keep rows of one value of this column in one split, such as the photos of one product',
        metavar='COLUMN')
    seed: int = setting(42, 'same seed, same splits', count, metavar='N')
    force: bool = shared.force()


@dataclass(frozen=True)
class CheckSettings(Settings):
    """Check a data directory for what would spoil a result: bad images, the same image twice, strange labels."""
    HELP = 'check a data directory for what would spoil a result'
    EXAMPLE = 'my-photos'
    PAGE = 'how-to/own-labels.md'

    data_dir: str = required(
        'folder with train.csv, val.csv, ... and the images', positional=True, metavar='DIR')
    run: str | None = setting(
        None, 'run folder, whose flags on data count where none is given here', metavar='RUN')
    train_split: str | None = setting(None, 'train, ... or the path of a CSV', metavar='NAME')
    val_split: str | None = setting(None, 'val, ... or the path of a CSV', metavar='NAME')
    image_column: str | None = shared.image_column(
        f'column of the image paths (default: {DataSettings.image_column})')
    separator: str | None = shared.cell_separator(
        'between cells: a character, tab, or whitespace for runs of blanks (default: found)')
    missing_value: str | None = shared.missing_value('a cell that means no label, beside the empty one')
    tag_separator: str | None = shared.tags_between('|')
    none_value: str | None = shared.no_tags()
    heads: list[str] | None = shared.heads('label columns to check (default: those that training takes)')
    head: HeadOptions = shared.head(
        'options of a head as in training, such as loss=tags, loss=numeric, columns=a+b')
    head_module: str | None = shared.head_module()
    workers: int = setting(
        os.cpu_count() or 1, 'threads that decode (default: the cores)', positive, flags=('-j',), metavar='N')
    examples: int = setting(5, 'rows, images or labels that a finding names at most', count, metavar='N')
    json: str | None = setting(None, 'write the report as JSON; - prints it, and nothing else', metavar='FILE')


