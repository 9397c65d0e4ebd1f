"""k-NN accuracy of a checkpoint's features, which needs no trained head: a metric of validate."""
from dataclasses import replace
from pathlib import Path

import torch

from timm_multilabel.assembly.evaluation import splits_of_checkpoint
from timm_multilabel.assembly.splits import read_stored
from timm_multilabel.cells import BadCell
from timm_multilabel.config.commands import ValidateSettings
from timm_multilabel.data.columns import LEFT_OUT, NUMBER, look_at
from timm_multilabel.errors import UserError, listed, shortened
from timm_multilabel.inference.loaded import check_finite
from timm_multilabel.inference.neighbours import knn_predictions
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.loading.batches import EvalBatches
from timm_multilabel.log import Say
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.places import path_of
from timm_multilabel.training.checkpoint import Checkpoint
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Precision

KNN_FIGURE = 'knn_top1'


def with_heads_of_data(
        settings: ValidateSettings,
        checkpoint: Checkpoint,
        train_split: str,
        say: Say,
) -> Checkpoint:
    """A checkpoint without heads as one whose heads are the label columns of the training table that look like classes.

    Raises:
        UserError: The table cannot be read, or no column has a label.
    """
    stored = replace(read_stored(path_of(settings.data_dir)), label_space=None)
    splits = splits_of_checkpoint(stored, None, checkpoint, say, settings)
    table = splits.read(train_split)
    heads, left_out = [], []
    for name in table.label_columns:
        look = look_at(table.frame[name].tolist())
        if look.kind in (*LEFT_OUT, NUMBER):
            left_out.append(f'{shortened(name)} ({look.kind})')
        elif look.labels:
            try:
                heads.append(LabelSet.from_cells(name, table.cells([name])))
            except BadCell as error:
                say(f"{table.path} row {error.row}, column '{shortened(name)}': {error}: left out")
    if left_out:
        say(f'{table.path}: no classes, so left out of --knn: {listed(left_out)}')
    if not heads:
        raise UserError(f'{table.path}: no column has a class, so neighbours have nothing to vote for')
    return replace(checkpoint, label_space=LabelSpace(tuple(heads)))


@torch.no_grad()
def knn_figures(
        model: MultiLabelModel,
        label_space: LabelSpace,
        bank: EvalBatches,
        queries: EvalBatches,
        k: int,
        precision: Precision,
        path: Path,
) -> dict[str, tuple[float, int]]:
    """Of each head of classes the accuracy, in percent, of what the K nearest training images vote for; and its labels.

    NaN where no row or no training image has a label. Heads of tags and numbers have none.

    Args:
        model: In evaluation mode, on the device of the batches.
        label_space: The heads that the targets are of.
        bank: Batches of the training images, resized as in evaluation: images (B, 3, H, W) and targets (B, W).
        queries: Batches of the images to classify.
        k: Neighbours that vote.
        precision: How the model computes.
        path: The checkpoint, for messages.

    Raises:
        UserError: Features are not finite.
    """
    points, bank_targets = _features(model, bank, precision, 'k-NN: train')
    rows, query_targets = _features(model, queries, precision, 'k-NN: rows')
    check_finite([points, rows], path)
    heads = [number for number, head in enumerate(label_space.heads) if isinstance(head, LabelSet)]
    targets, labels = label_space.split(bank_targets), label_space.split(query_targets)
    predictions = knn_predictions(rows, points, [targets[number] for number in heads], k)
    metrics = {}
    for number, predicted in zip(heads, predictions):
        label = labels[number]
        known = label >= 0
        right = float('nan') if predicted is None else 100 * (predicted == label)[known].double().mean().item()
        metrics[label_space.names[number]] = right, int(known.sum())
    return metrics


def _features(
        model: MultiLabelModel,
        loader: EvalBatches,
        precision: Precision,
        title: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, F) and targets (N, W) of a loader's rows."""
    features, targets = [], []
    with ProgressBar(title, len(loader), visible=True) as progress:
        for images, target in loader:
            with precision.autocast():
                features.append(model.backbone(precision.layout(images)).float())
            targets.append(target)
            progress.advance()
    return torch.cat(features), torch.cat(targets)
