"""The settings of the commands other than training."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from timm_multilabel.config import shared
from timm_multilabel.config.settings import REMAINDER, Settings, required, setting, switch
from timm_multilabel.config.train import DataSettings
from timm_multilabel.config.values import (
    HeadOptions,
    above_0,
    at_least_0,
    count,
    head_and_column,
    number,
    positive,
    threshold,
)
from timm_multilabel.errors import UserError
from timm_multilabel.model_names import LARGEST_SIDE

AMP_TYPES = ('float16', 'bfloat16')
SHARD_FORMATS = ('webdataset', 'parquet')
EXPORT_FORMATS = ('onnx', 'pt2', 'safetensors', 'backbone')
PREDICTION_FORMATS = ('table', 'csv', 'jsonl')
EMBEDDED = ('features', 'projections')
EXPORT_IMAGES = 16
"""Images that an export is compared on."""
_AS_IN_TRAINING = '(default: as in training)'
_side = number(int, least=1, most=LARGEST_SIDE)


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """Fit heads on the features of pretrained backbones that stay as they are: minutes, and a checkpoint like any
    other."""
    HELP = 'fit heads on the features of pretrained backbones, in minutes'
    EXAMPLE = 'my-photos --model vit_small_patch16_dinov3.lvd1689m --model convnext_tiny'
    PAGE = 'how-to/probe.md'

    data_dir: str = required(
        'data directory with train.csv, val.csv and the images', positional=True, metavar='DIR')
    model: list[str] = required(
        'name of any timm model; repeat the flag to concatenate the features of several', repeats=True,
        merge=lambda before, now: [*before, *now], metavar='NAME')
    pretrained: bool = switch("use timm's pretrained weights", default=True)
    pretrained_path: list[str] = setting(
        [], 'use the weights of a local timm checkpoint or safetensors file instead; one flag for each --model',
        repeats=True, merge=lambda before, now: [*before, *now], metavar='FILE')
    img_size: int | None = setting(
        None, "image height and width in pixels (default: the first model's own)", _side, metavar='N')
    input_size: list[int] | None = setting(None, 'input size as 3 HEIGHT WIDTH, in pixels', _side, nargs=3, metavar='N')
    interpolation: str | None = setting(
        None, "interpolation of the resize (default: the first model's own)",
        choices=('nearest', 'bilinear', 'bicubic', 'lanczos'))
    crop_pct: float | None = setting(
        None, "share of height and width that is kept of the resized image (default: the first model's own)",
        number(least=0.1, most=10), metavar='X')
    crop_mode: str | None = setting(
        None,
        'what is seen of an image of another shape than the input: its middle (center), all of it in another aspect '
        "ratio (squash), or all of it with borders (border) (default: the first model's own)",
        choices=('center', 'squash', 'border'))
    tta: str | None = setting(
        None, 'flip: the features are the mean of those of an image and of its mirror image, also wherever the '
        'checkpoint is used', choices=('flip',))
    image_column: str = shared.image_column('column with the image paths', DataSettings.image_column)
    image_root: str | None = shared.image_root()
    class_head: str = shared.class_head()
    train_split: str = setting(
        'train', 'split to fit on: a name such as train, or the path of a table', metavar='NAME')
    val_split: str = setting(
        'val', 'split to choose and score on: a name such as val, or the path of a table', metavar='NAME')
    separator: str | None = shared.cell_separator(
        'cell separator: a character, tab, or whitespace for runs of blanks (default: detected)')
    missing_value: str | None = shared.missing_value(
        'cell text that means a missing label, in addition to an empty cell')
    tag_separator: str | None = shared.tags_between('|')
    none_value: str | None = shared.no_tags()
    heads: list[str] | None = shared.heads('label columns to learn (default: all)')
    head: HeadOptions = shared.head(
        'options of a head as in training, such as loss=tags, loss=numeric, loss=arcface, weight, smoothing, '
        'class_weights=balanced')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    unknown_labels: str = setting(
        'error', 'validation labels that are unknown in training: stop with an error, or treat them as missing',
        choices=('error', 'ignore'))
    labelled_rows: int | None = setting(
        None, 'use the labels of only N rows, drawn with --seed as in training', positive, metavar='N')
    skip_bad_images: bool = switch('skip and report images that cannot be decoded', both=False)
    lrs: list[float] = setting(
        [0.003, 0.01, 0.03], 'learning rates of the grid (default: 0.003 0.01 0.03)', above_0, nargs='+', metavar='X')
    weight_decays: list[float] = setting(
        [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001],
        'weight decays of the grid, of standardized features (default: 1 0.3 0.1 0.03 0.01 0.003 0.001 0.0001)',
        at_least_0, nargs='+', metavar='X')
    epochs: int | None = setting(
        None, 'passes of the fit over the features (default: 3, or more until there are 300 steps)', positive,
        metavar='N')
    fit_batch_size: int = setting(512, 'rows per step of the fit', positive, metavar='N')
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('compute features with mixed precision', both=False)
    seed: int = setting(42, 'random seed, for repeatable fits', number(int, least=0, most=2 ** 31), metavar='N')
    output: str = setting('output/probe', 'parent folder of run folders', metavar='DIR')
    experiment: str | None = setting(None, 'name of the run folder (default: time-model-size)', metavar='NAME')
    cache_dir: str = setting(
        DataSettings.cache_dir, 'folder whose folder features/ keeps the features', metavar='DIR')


@dataclass(frozen=True)
class ValidateSettings(Settings):
    """Score a checkpoint on a labelled split, head by head; model and classes come from the checkpoint."""
    HELP = 'score a checkpoint on a labelled split'
    EXAMPLE = 'my-photos --checkpoint output/train/tiny/model_best.pth.tar --split test --confusion'
    PAGE = 'how-to/own-labels.md'

    data_dir: str = required('data directory with val.csv and the images', positional=True, metavar='DIR')
    checkpoint: str = required('checkpoint of a training run', metavar='FILE')
    model: str | None = setting(None, 'stop if the checkpoint has a different model', metavar='NAME')
    split: str | None = setting(
        None, "split: val, test, ... or the path of a table (default: the run's validation split)", metavar='NAME')
    weights: str = shared.weights('score')
    image_column: str | None = shared.image_column(f'column with the image paths {_AS_IN_TRAINING}')
    image_root: str | None = shared.image_root('as in training')
    separator: str | None = shared.cell_separator(f'cell separator: a character, tab or whitespace {_AS_IN_TRAINING}')
    missing_value: str | None = shared.missing_value(f'cell text that means a missing label {_AS_IN_TRAINING}')
    tag_separator: str | None = shared.tags_between('as in training')
    none_value: str | None = shared.no_tags()
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    skip_bad_images: bool = switch('skip and report images that cannot be decoded', both=False)
    device: str | None = shared.device()
    amp: bool = switch('use mixed precision', both=False)
    amp_dtype: str | None = setting(
        None, 'data type for --amp (default: float16 on CUDA, bfloat16 elsewhere)', choices=AMP_TYPES)
    channels_last: bool = switch('use the channels-last memory layout', both=False)
    knn: int | None = setting(
        None,
        'also classify each image by its K nearest neighbors in the training split (cosine similarity of features, '
        'nearer ones count more); for a checkpoint without heads, on each label column', positive, metavar='K')
    results_file: str | None = setting(None, 'write the metrics to a .json or .csv file', metavar='FILE')
    confusion: str | None = setting(
        None, "write each head's confusion matrix as a CSV and an image to DIR (default: next to the checkpoint)",
        nargs='?',
        const='', metavar='DIR')


@dataclass(frozen=True)
class PredictSettings(Settings):
    """Predict the labels of images with each head of a checkpoint, with their probabilities."""
    HELP = 'predict the labels of images with each head'
    EXAMPLE = 'output/train/tiny/model_best.pth.tar photos/ --top-k 3 --out predictions.csv'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required('checkpoint of a training run', positional=True, metavar='CHECKPOINT')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='IMAGES...')
    top_k: int = setting(1, 'show the K most likely classes of each head', positive, metavar='K')
    threshold: list[tuple[str, float]] = setting(
        [],
        'minimum probability of a label; if no class reaches it, the label is unknown; repeat the flag for other heads '
        '(default: 0, and 0.5 for tags)',
        threshold, repeats=True, merge=lambda before, now: [*before, *now], metavar='[HEAD=]T')
    format: str | None = setting(
        None, 'output format (default: by the extension of --out, else table)', choices=PREDICTION_FORMATS)
    out: str | None = setting(
        None, 'output file, or a folder for Parquet parts, which ends in / (default: standard output)',
        metavar='FILE|DIR/')
    part_rows: int = shared.part_rows()
    force: bool = shared.force()
    weights: str = shared.weights('use')
    image_column: str | None = shared.image_column(f'column with the image paths in tables {_AS_IN_TRAINING}')
    image_root: str | None = shared.image_root()
    separator: str | None = shared.cell_separator(
        f'cell separator of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('use mixed precision', both=False)


@dataclass(frozen=True)
class EmbedSettings(Settings):
    """Write image embeddings to a file for search: features or projections of a checkpoint, with the image paths."""
    HELP = 'write features or projections of images to a file'
    EXAMPLE = 'output/train/tiny/model_best.pth.tar photos/ --out photos.npz'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required(
        'checkpoint of a training run, with or without heads', positional=True, metavar='CHECKPOINT')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='IMAGES...')
    out: str = required(
        'output file, .npz or .parquet; or a folder for Parquet parts, which ends in /', metavar='FILE|DIR/')
    part_rows: int = shared.part_rows()
    what: str = setting(
        EMBEDDED[0], "pooled features of the backbone, or the projector's output that NT-Xent compares",
        choices=EMBEDDED)
    force: bool = shared.force()
    weights: str = shared.weights('use')
    image_column: str | None = shared.image_column(f'column with the image paths in tables {_AS_IN_TRAINING}')
    image_root: str | None = shared.image_root()
    separator: str | None = shared.cell_separator(
        f'cell separator of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('use mixed precision', both=False)


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Find the images nearest to query images among those that `timm-multilabel embed` embedded, as a table or a
    picture."""
    HELP = 'find the images nearest to query images'
    EXAMPLE = 'photos.npz query.jpg --checkpoint output/train/tiny/model_best.pth.tar -k 8 --sheet nearest.jpg'
    PAGE = 'how-to/deploy.md'

    embeddings: str = required(
        'embeddings file or folder of parts, written by timm-multilabel embed', positional=True, metavar='EMBEDDINGS')
    images: list[str] = required(shared.IMAGES_HELP, positional=True, nargs='+', metavar='QUERY_IMAGE...')
    checkpoint: str = required('the checkpoint that made the embeddings', metavar='FILE')
    count: int = setting(10, 'number of images to find for each query image', positive, flags=('-k',), metavar='K')
    approximate: float | None = setting(
        None, 'search with faiss only the share X of the clusters nearest to a query, and tell which share of the '
        'nearest images that finds; faster for thousands of query images (default: exact search; X: 0.05)',
        number(above=1e-6, most=1), nargs='?', const='0.05', metavar='X')
    sheet: str | None = setting(
        None, 'also write a picture of the query images and their matches (.png or .jpg)', metavar='FILE')
    force: bool = shared.force()
    image_column: str | None = shared.image_column(f'column with the image paths in tables {_AS_IN_TRAINING}')
    image_root: str | None = shared.image_root()
    separator: str | None = shared.cell_separator(
        f'cell separator of CSVs: a character, tab or whitespace {_AS_IN_TRAINING}')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    batch_size: int = shared.batch_size()
    workers: int = shared.workers()
    device: str | None = shared.device()
    amp: bool = switch('use mixed precision', both=False)


ReadingSettings = PredictSettings | EmbedSettings | SearchSettings
"""The settings of what reads images that the user names, and runs a checkpoint on them."""


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Export a checkpoint to ONNX, torch.export, safetensors and a timm backbone, and compare each file with the
    checkpoint on real images."""
    HELP = (
        'export a checkpoint to ONNX, torch.export, safetensors, a timm backbone, or a folder for the Hugging Face Hub')
    EXAMPLE = 'output/train/tiny/model_best.pth.tar --formats onnx'
    PAGE = 'how-to/deploy.md'

    checkpoint: str = required('checkpoint of a training run', positional=True, metavar='CHECKPOINT')
    formats: list[str] | None = setting(
        None, f'any of {", ".join(EXPORT_FORMATS)} (default: all that can be written; with --hub none)', nargs='+',
        choices=EXPORT_FORMATS, metavar='NAME')
    out: str | None = setting(None, 'output folder (default: export/ next to the checkpoint)', metavar='DIR')
    images: list[str] | None = setting(
        None,
        f'image files or folders to compare on, {EXPORT_IMAGES} images at most (default: the validation split of the '
        'run)', nargs='+', metavar='PATH')
    weights: str = shared.weights('export')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    hub: str | None = setting(
        None, 'build a folder for the Hugging Face Hub: model card, weights and configuration', metavar='DIR')
    push: str | None = setting(
        None, 'upload the --hub folder to this repository; a new repository is created private', metavar='USER/NAME')
    force: bool = shared.force('overwrite existing files')


@dataclass(frozen=True)
class ReportSettings(Settings):
    """Write one HTML page about a run: settings, curves, metrics, mistakes, calibration, embedding map and views."""
    HELP = 'write one HTML page about a run'
    EXAMPLE = 'output/train/tiny'
    PAGE = 'how-to/watch-a-run.md'

    run: str = required('run folder, such as output/train/NAME', positional=True, metavar='RUN')
    out: str | None = setting(None, 'HTML file to write (default: report.html in the run folder)', metavar='FILE')
    force: bool = shared.force('overwrite an existing page')
    split: str | None = setting(
        None, "split: val, test, ... or the path of a table (default: the run's validation split)", metavar='NAME')
    data: str | None = setting(None, "data directory, if it has moved (default: the run's)", metavar='DIR')
    checkpoint: str | None = setting(None, 'checkpoint to use (default: model_best.pth.tar of the run)', metavar='FILE')
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
        'run folders; runs that differ only in the seed form a group', positional=True, nargs='+',
        metavar='RUN')
    out: str | None = setting(
        None, 'folder for experiments.csv, experiments.md and experiments.html (default: print only)', metavar='DIR')
    baseline: str | None = setting(
        None, 'any run of the group that the others are compared with (default: the first run)', metavar='RUN')
    data: str | None = setting(
        None, 'data directory to score all runs on (default: the one each was trained on)', metavar='DIR')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    workers: int = shared.workers('data loader workers, used if predictions have to be made')
    device: str | None = shared.device()
    force: bool = shared.force()


@dataclass(frozen=True)
class GridSettings(Settings):
    """Run an experiment: every configuration with every seed, compared in tables and a plot; a rerun continues
    where it stopped."""
    HELP = 'run an experiment with several configurations and seeds, and compare them'
    EXAMPLE = 'experiments/few-labels my-photos --jobs 2'
    PAGE = 'how-to/compare-and-grid.md'

    experiment: str = required(
        'folder with a grid.yaml; results.csv, differences.csv, results.md and results.png are written to it once all '
        'runs are done', positional=True, metavar='EXPERIMENT')
    data_dir: str | None = setting(None, 'data directory', positional=True, nargs='?', metavar='DIR')
    output: str | None = setting(
        None, 'parent folder of run folders (default: output/grid/<name of EXPERIMENT>)', metavar='DIR')
    jobs: int = setting(1, 'runs to train at the same time; they share the CPU cores', positive, metavar='N')
    split: str = setting(
        'val', 'split to score; for any split but val, the files are named results-NAME.csv, ...', metavar='NAME')
    tables: bool = switch(
        'run nothing; only rebuild the tables and the plot from results.csv and differences.csv', both=False)
    flags: list[str] = setting(
        [], 'everything after it is passed to training as flags for all runs: --flags --cache ram -j 2',
        nargs=REMAINDER,
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
    """Generate a small data set of drawn images with three label heads, without any download."""
    HELP = 'generate a small data set with three label heads, without any download'
    EXAMPLE = 'sample'
    PAGE = 'get-started/sample-data.md'

    directory: str = required('output folder', positional=True, metavar='DIR')
    train: int = setting(2400, 'rows of train.csv', positive, metavar='N')
    val: int = setting(400, 'rows of val.csv', positive, metavar='N')
    test: int = setting(400, 'rows of test.csv', positive, metavar='N')
    unlabelled: int = setting(1200, 'rows of unlabelled.csv (0 for none)', count, metavar='N')
    size: int = setting(64, 'image width and height in pixels', number(int, 16), metavar='N')
    seed: int = setting(0, 'random seed; the same seed gives the same bytes', count, metavar='N')
    format: str = setting(
        'csv', 'write images/ and CSVs, or shards that contain images and labels', choices=('csv', *SHARD_FORMATS))
    force: bool = shared.force()


@dataclass(frozen=True)
class SplitSettings(Settings):
    """Split one table of labels, or class folders, into train.csv, val.csv and test.csv; all rows go to all.csv."""
    HELP = 'split one table of labels, or class folders, into train.csv, val.csv and test.csv'
    EXAMPLE = "table.csv --image 'images/{id}.jpg' --heads color size=SizeColumn"
    PAGE = 'how-to/own-labels.md'

    source: str = required(
        'table with one row per image (.csv, .tsv, .xlsx, .jsonl, .parquet), or a folder with a folder of images for '
        'each class', positional=True, metavar='SOURCE')
    out: str | None = setting(None, 'output folder (default: the folder of the table)', metavar='DIR')
    image: str | None = setting(
        None, "pattern of a table's image paths, with column names in braces: './images/{id}.jpg'", metavar='PATTERN')
    heads: list[tuple[str, str]] | None = setting(
        None, 'label heads of a table; add =COLUMN if the column has a different name', head_and_column, nargs='+',
        metavar='NAME[=COLUMN]')
    class_head: str = shared.class_head()
    image_column: str = shared.image_column('name of the image path column to write', DataSettings.image_column)
    separator: str | None = shared.cell_separator(
        'cell separator: a character, tab, or whitespace for runs of blanks (default: detected)')
    ratios: Sequence[float] = setting(
        (80, 10, 10), 'relative sizes of the splits; a split with 0 gets no file (default: 80 10 10)', at_least_0,
        nargs=3,
        metavar=('TRAIN', 'VAL', 'TEST'))
    stratify: str | None = setting(
        None, 'give every split the same distribution of the labels of this head', metavar='HEAD')
    group: str | None = setting(
        None, 'keep rows with the same value in this column in one split, such as photos of one product',
        metavar='COLUMN')
    seed: int = setting(42, 'random seed; the same seed gives the same splits', count, metavar='N')
    force: bool = shared.force()


@dataclass(frozen=True)
class ConvertSettings(Settings):
    """Write the tables of a data directory for a data set of CelebA, COCO, Label Studio or Hugging Face.

    Images stay where they are; those of Hugging Face, which lie in tables, are written as files.
    """
    HELP = 'turn CelebA, COCO, Label Studio or Hugging Face data into tables'
    EXAMPLE = 'coco my-photos'
    PAGE = 'how-to/convert.md'

    source: str = required(
        'folder of CelebA, COCO or Hugging Face, a JSON file of COCO or Label Studio, or hf://USER/SET',
        positional=True, metavar='SOURCE')
    directory: str = required('data directory to write', positional=True, metavar='DIR')
    image_root: str | None = setting(
        None, 'folder that the images are under (default: looked up from SOURCE)', metavar='DIR')
    force: bool = shared.force()


@dataclass(frozen=True)
class CheckSettings(Settings):
    """Check a data directory for problems that would spoil results: bad images, duplicate images, suspicious labels."""
    HELP = 'check a data directory for problems that would spoil results'
    EXAMPLE = 'my-photos'
    PAGE = 'how-to/own-labels.md'

    data_dir: str = required(
        'data directory with train.csv, val.csv, ... and the images', positional=True, metavar='DIR')
    run: str | None = setting(
        None, 'run folder to take data flags from, unless they are given here', metavar='RUN')
    train_split: str | None = setting(
        None, 'training split: a name such as train, or the path of a table', metavar='NAME')
    val_split: str | None = setting(
        None, 'validation split: a name such as val, or the path of a table', metavar='NAME')
    image_column: str | None = shared.image_column(
        f'column with the image paths (default: {DataSettings.image_column})')
    image_root: str | None = shared.image_root()
    class_head: str | None = shared.class_head(None)
    separator: str | None = shared.cell_separator(
        'cell separator: a character, tab, or whitespace for runs of blanks (default: detected)')
    missing_value: str | None = shared.missing_value(
        'cell text that means a missing label, in addition to an empty cell')
    tag_separator: str | None = shared.tags_between('|')
    none_value: str | None = shared.no_tags()
    heads: list[str] | None = shared.heads('label columns to check (default: those that training would use)')
    head: HeadOptions = shared.head(
        'options of a head as in training, such as loss=tags, loss=numeric, columns=a+b')
    head_module: str | None = shared.head_module()
    workers: int = setting(
        os.cpu_count() or 1, 'decoding threads (default: number of CPU cores)', positive, flags=('-j',), metavar='N')
    examples: int = setting(5, 'maximum number of rows, images or labels to list per finding', count, metavar='N')
    json: str | None = setting(
        None, 'write the report as JSON; - prints only the JSON to standard output', metavar='FILE')


