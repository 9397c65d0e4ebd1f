"""Checkpoints in timm's format that carry what is needed to use them: label space, model and input settings."""
import re
import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from timm.scheduler import PlateauLRScheduler
from torch import nn

from timm_multilabel.errors import CheckpointError, UserError, is_utf8
from timm_multilabel.heads import REGISTRY, Head, default_kind
from timm_multilabel.labels import Labels, LabelSpace
from timm_multilabel.lora import merge_adapters
from timm_multilabel.metric_names import earlier_name
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.model_names import is_from_elsewhere
from timm_multilabel.places import Address, local_copy, path_of, why_missing
from timm_multilabel.projector import projector_shape
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint_checks import check_archive, wrong_setting, wrong_tensors
from timm_multilabel.training.optimizer_state import load_optimizer, load_plateau
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.training_progress import TrainingProgress

WEIGHTS = {'plain': 'state_dict', 'ema': 'state_dict_ema'}
"""The two kinds of weights that a checkpoint may hold, and their keys."""

_PIXELS = 2 ** 26  # of a batch in evaluation: 1,337 images of 224x224


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in memory, on the CPU."""
    path: Path
    state: dict[str, Any]
    label_space: LabelSpace

    @property
    def arch(self) -> str:
        """timm's name of the backbone."""
        arch: str = self.state['arch']
        return arch

    @property
    def data_config(self) -> dict[str, Any]:
        """Input size, normalisation and evaluation's resizing, as timm's `resolve_data_config` gives them."""
        config: dict[str, Any] = self.state['data_config']
        return config

    def batch_size(self, asked: int) -> int:
        """Images of a batch in evaluation: as asked, but fewer where the file says that they are very large."""
        _, height, width = self.data_config['input_size']
        most: int = _PIXELS // (height * width)
        return max(1, min(asked, most))

    @property
    def best_weights(self) -> str:
        """'plain' or 'ema': the weights whose score made the checkpoint what it is."""
        return self.state.get('best_weights') or ('ema' if WEIGHTS['ema'] in self.state else 'plain')

    def weights(self, kind: str) -> dict[str, torch.Tensor]:
        """The weights of backbone and heads, 'plain' or 'ema', with adapters merged into them.

        Raises:
            CheckpointError: The checkpoint has no such weights, or an adapter does not fit its layer.
        """
        try:
            return merge_adapters(self.unmerged_weights(kind))
        except ValueError as error:
            raise CheckpointError(f'{self.path}: {error}; use another checkpoint') from error

    def unmerged_weights(self, kind: str) -> dict[str, torch.Tensor]:
        """The weights as training has them, which goes on with its adapters.

        Raises:
            CheckpointError: The checkpoint has no such weights.
        """
        if self.state.get(WEIGHTS[kind]) is None:
            raise CheckpointError(f'{self.path}: holds no {kind} weights')
        return clean_state_dict(self.state[WEIGHTS[kind]])


def read_checkpoint(path: str | Path, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint of this program without running anything that it contains.

    Args:
        path: The checkpoint file.
        mapped: Leave the tensors in the file until they are asked for.

    Raises:
        CheckpointError: The file is missing, damaged, would run code, or comes from elsewhere.
    """
    path = path_of(path)
    if path.is_dir():
        raise CheckpointError(f'{path}: is a folder; name a checkpoint in it, such as {path / "model_best.pth.tar"}')
    if not path.is_file():
        raise CheckpointError(f'{path}: {why_missing(path, "checkpoint")}')
    try:
        with local_copy(path) as file, torch.serialization.safe_globals([Namespace]):
            # timm's script saves its flags; a Namespace runs nothing.
            check_archive(file)
            size = file.stat().st_size
            # PyTorch maps files of such names only.
            state = torch.load(file, map_location='cpu', weights_only=True, mmap=mapped and is_utf8(str(file)))
    except OSError as error:
        if not isinstance(path, Address):
            raise CheckpointError(f'{path}: cannot be loaded as a checkpoint (damaged?)') from error
        raise CheckpointError(f'{path}: cannot be read ({error.strerror})') from error
    except Exception as error:  # damaged files make it raise nearly anything
        unsafe = 'weights_only' in str(error).lower() or str(error).startswith('it calls')  # as `check_pickle` says it
        reason = 'it holds more than weights and plain values' if unsafe else 'damaged?'
        raise CheckpointError(f'{path}: cannot be loaded as a checkpoint ({reason})') from error
    return checkpoint_of(path, state, size)


def checkpoint_of(path: Path, state: Any, size: int) -> Checkpoint:
    """What a file of so many bytes held, as a checkpoint.

    A checkpoint of timm's own training script, which has its flags in place of a `data_config`, gets one.

    Raises:
        CheckpointError: It is none of this program, or it holds what this program does not write.
    """
    foreign = UserError(f'{path}: not a checkpoint of timm-multilabel (no weights with a label space and a model name)')
    if not isinstance(state, dict) or not isinstance(state.get('state_dict'), dict) or 'arch' not in state:
        raise foreign
    try:
        label_space = LabelSpace.from_dict(state.get('label_space'))
    except ValueError as error:
        raise foreign from error
    if 'data_config' not in state:
        state = {**state, 'data_config': _data_config_of_flags(state)}
    wrong = wrong_setting(state) or wrong_tensors(state, size)
    if not wrong and not set(state.get('head_weights') or ()) <= set(label_space.names):
        wrong = "its 'head_weights'"
    if wrong:
        raise CheckpointError(f'{path}: {wrong} cannot be what this program wrote; use another checkpoint')
    return Checkpoint(path, state, label_space)


def _data_config_of_flags(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `data_config` that the flags of timm's own training script make; None where they make none."""
    try:
        known = timm.get_pretrained_cfg(state['arch'])
        flags = vars(state.get('args', Namespace()))
        made: dict[str, Any] | None
        made = None if known is None else resolve_data_config(flags, pretrained_cfg=known.to_dict())
        return made
    except Exception:  # whatever timm makes of a name and of flags that anyone may have written
        return None


def load_model(
        checkpoint: Checkpoint,
        weights: str,
        registry: Mapping[str, type[Head]] = REGISTRY,
        allow_hub: bool = False,
) -> MultiLabelModel:
    """The model of a checkpoint with its 'plain' or 'ema' weights, in evaluation mode.

    Args:
        checkpoint: What `read_checkpoint` gave.
        weights: 'plain' or 'ema'.
        registry: The kinds of heads by name, see `load_registry`.
        allow_hub: Look up a model that is none of timm's own (`hf-hub:...`).

    Raises:
        CheckpointError: The checkpoint has no such weights, they do not fit its model, a head is of an unknown kind,
            or its
            model would have to be looked up.
    """
    if is_from_elsewhere(checkpoint.arch) and not allow_hub:
        raise CheckpointError(
            f"{checkpoint.path}: its model {checkpoint.arch} is not one of timm's own, and no model is "
                        'downloaded because a file asks for it; pass --allow-hub if you trust it')
    check_kinds(checkpoint, registry)
    state = checkpoint.weights(weights)
    model = None
    try:
        if _expected_shapes(checkpoint).items() <= _shapes(state).items():
            model = _make_model(checkpoint, registry)
    except (UserError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise CheckpointError(f'{checkpoint.path}: {" ".join(str(error).split())}') from error
    if model is None or _shapes(model.state_dict()) != _shapes(state):
        raise CheckpointError(f'{checkpoint.path}: its {weights} weights do not fit its model and heads')
    model.load_state_dict(state)
    return model.eval()


def _make_model(checkpoint: Checkpoint, registry: Mapping[str, type[Head]]) -> MultiLabelModel:
    backbone = create_backbone(
        checkpoint.arch,
        input_size={'input_size': checkpoint.data_config['input_size']},
        model_kwargs=checkpoint.state.get('model_kwargs'),
    )
    return MultiLabelModel(
        backbone,
        checkpoint.label_space,
        head_options=checkpoint.state.get('head_options'),
        registry=registry,
        **projector_shape(checkpoint.state),
    )


def _expected_shapes(checkpoint: Checkpoint) -> dict[str, torch.Size | None]:
    """The shapes of the weights that a checkpoint's settings ask for, found out without taking memory for them.

    Heads of a user's own kind are left out: their code may not run without real tensors.
    """
    options = checkpoint.state.get('head_options') or {}
    places = [place for place, labels in enumerate(checkpoint.label_space.heads)
              if options.get(labels.name, {}).get('loss', default_kind(labels)) in REGISTRY]
    heads = tuple(checkpoint.label_space.heads[place] for place in places)
    ours = replace(checkpoint, label_space=LabelSpace(heads), state={
        **checkpoint.state, 'head_options': {each.name: options[each.name] for each in heads if each.name in options}})
    with torch.device('meta'):
        shapes = _shapes(_make_model(ours, REGISTRY).state_dict())
    return {re.sub(r'^heads\.(\d+)', lambda found: f'heads.{places[int(found[1])]}', name): shape
            for name, shape in shapes.items()}


def check_kinds(checkpoint: Checkpoint, registry: Mapping[str, type[Head]]) -> None:
    """Raise UserError where a head is of a kind that nobody brought; the line names the file that training had."""
    for name, options in (checkpoint.state.get('head_options') or {}).items():
        kind = options.get('loss', '')
        if kind and kind not in registry:
            module = checkpoint.state.get('head_module')
            raise CheckpointError(
                f"{checkpoint.path}: head '{name}' is of the kind '{kind}'"
                + (f', which training had from {module}' if module else '')
                + '; code is not run because a file names it: pass --head-module FILE with that kind')


def start_from(task: JointTask, checkpoint: Checkpoint, weights: str) -> str:
    """Take over what fits of a checkpoint: the backbone, heads of the same labels and kind, the projector.

    Returns:
        A line on what was taken and what was not.

    Raises:
        CheckpointError: The checkpoint is of another backbone.
    """
    module = task.joint_module
    state = checkpoint.weights(weights)
    try:
        module.model.backbone.load_state_dict(_below(state, 'backbone.'))
    except RuntimeError as error:
        raise CheckpointError(
            f'{checkpoint.path}: a checkpoint of {checkpoint.arch}, whose backbone does not fit the model') from error
    parts: dict[str, tuple[nn.Module, dict[str, torch.Tensor]]] = {}
    for name, head in module.model.named_heads.items():
        theirs = {}
        options = (checkpoint.state.get('head_options') or {}).get(name, {})
        if head.labels in checkpoint.label_space.heads and _alike(
                module.model.head_options[name], options, head.labels):
            theirs = _below(state, f'heads.{checkpoint.label_space.heads.index(head.labels)}.')
        parts[f"head '{name}'"] = head, theirs
    projector = module.projector if module.projector is not None else module.model.projector
    if projector is not None:
        of_task = checkpoint.state.get('task_state' if weights == 'plain' else 'task_state_ema') or {}
        parts['projector'] = projector, of_task.get('projector') or _below(state, 'projector.')
    taken, left = ['backbone'], []
    for name, (part, theirs) in parts.items():
        if _shapes(part.state_dict()) == _shapes(theirs):
            part.load_state_dict(theirs)
            taken.append(name)
        else:
            left.append(name)
    line = f'{checkpoint.path}: took {", ".join(taken)} ({weights} weights)'
    return line + (f'; starts anew: {", ".join(left)}' if left else '')


def _alike(options: Mapping[str, Any], theirs: Mapping[str, Any], labels: Labels) -> bool:
    """Whether two heads of the same labels are of one kind and have the same input; of a user's kind, all options."""
    if options['loss'] not in REGISTRY:
        return {**options, 'views': None} == {**theirs, 'views': None}
    kind, read = theirs.get('loss', default_kind(labels)), theirs.get('input', 'features')
    return (options['loss'], options['input']) == (kind, read)


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The part of a state dict under a prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size | None]:
    return {name: getattr(value, 'shape', None) for name, value in state.items()}


def of_task(task: JointTask, name: str) -> Checkpoint:
    """A task's weights as they are now, as a checkpoint in memory that another task can start from."""
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    return Checkpoint(Path(name), state, task.label_space)


def resume(
        checkpoint: Checkpoint,
        task: JointTask,
        optimizer_step: OptimizerStep,
        steps: int,
) -> TrainingProgress:
    """Bring a run back to where a checkpoint was written.

    Args:
        checkpoint: Where the run was saved.
        task: The task, made with the same settings.
        optimizer_step: Its optimizer, schedule and loss scaler.
        steps: Batches of an epoch now.

    Returns:
        The place to go on from.

    Raises:
        CheckpointError: The checkpoint is of other classes, another model or another optimizer, or ranked by another
            metric.
    """
    state = checkpoint.state
    if checkpoint.label_space != task.label_space:
        raise CheckpointError(
            f'{checkpoint.path}: a checkpoint of other classes: {checkpoint.label_space}; the data has '
            f'{task.label_space}; resume with the data it was trained on, or start anew with --initial-checkpoint')
    if 'optimizer' not in state:
        raise CheckpointError(f'{checkpoint.path}: holds weights alone, as a checkpoint of probe does; start from it '
                              'with --initial-checkpoint')
    for name in ('opt', 'eval_metric'):  # the metric ranks the checkpoints; earlier versions did not write it down
        theirs, ours = state.get(name), task.metadata.get(name)
        if theirs not in (ours, earlier_name(str(ours))) and (name == 'opt' or theirs is not None):
            raise CheckpointError(
                f'{checkpoint.path}: trained with --{name.replace("_", "-")} {theirs}, not {ours}; resume with that, '
                'or start anew with --initial-checkpoint')
    try:
        task.load_checkpoint_state(checkpoint.unmerged_weights('plain'), state.get('task_state'))
        if task.has_ema():
            kind = 'ema' if state.get(WEIGHTS['ema']) is not None else 'plain'
            projector = state.get('task_state_ema' if kind == 'ema' else 'task_state')
            task.load_checkpoint_state(checkpoint.unmerged_weights(kind), projector, ema=True)
        load_optimizer(optimizer_step.optimizer, state['optimizer'])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise CheckpointError(
            f'{checkpoint.path}: does not fit this run ({reason}); give the flags it was trained with '
            '(-c args.yaml of its run folder)') from error
    task.metadata['best_weights'] = checkpoint.best_weights
    scaler, scheduler = optimizer_step.scaler, optimizer_step.scheduler
    try:
        if scaler is not None and scaler.state_dict_key in state:
            scaler.load_state_dict(state[scaler.state_dict_key])
        place = TrainingProgress.of(state, steps)
        plateau = state.get('run', {}).get('plateau')
        if plateau is not None and isinstance(scheduler, PlateauLRScheduler):
            load_plateau(scheduler, plateau, state['optimizer']['param_groups'])
        fits = place.fits(task)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f'{checkpoint.path}: its place in the run cannot be read; resume from another') from error
    if not fits:
        raise CheckpointError(
            f'{checkpoint.path}: saved within an epoch of other loss terms or another model; give the flags of that '
            'epoch, or go on from the end of the one before'
        )
    # On another number of processes it is between two updates as well, or at the epoch's end.
    place.step = place.step - place.step % optimizer_step.accumulate if place.step < steps else steps
    # All schedules but plateau are functions of these. A run that starts calls neither, and plateau would take the
    # learning rate of its warmup for epoch 0 even without one.
    if scheduler is not None and place.epoch:
        scheduler.step(place.epoch)
    if scheduler is not None and (place.epoch or place.step):
        scheduler.step_update(
            place.epoch * optimizer_step.updates_per_epoch(steps) + place.step // optimizer_step.accumulate)
    return place


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run folder, and what is wrong with newer ones that are not whole.

    Newest by what they say of themselves (phase, epoch, step), since a copied folder has lost the times of its files.
    """
    places, damaged = _places(run)
    for path in sorted(places, key=lambda path: (places[path], path.name.startswith('last')), reverse=True):
        try:
            read_checkpoint(path)
            return path, damaged
        except UserError as error:
            damaged.append(error.line)
    return None, damaged


def set_aside_later(run: Path, checkpoint: Checkpoint) -> str | None:
    """Move what comes after a checkpoint that a run goes back to into a folder of its own, so that it stays apart.

    Returns:
        A line about it; None where there is nothing.
    """
    here = _place_of(checkpoint)
    later = [path for path, place in _places(run)[0].items() if place > here]
    if not later:
        return None
    folder = next(path for path in (run / f'set-aside-{number}' for number in count(1)) if not path.exists())
    for path in later:
        target = folder / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for path in (run / 'summary.csv', run / 'summary.json'):
        if path.is_file():
            shutil.copy2(path, folder)
    return f'{checkpoint.path}: goes back to here; {len(later)} later checkpoints are now in {folder}'


def _places(run: Path) -> tuple[dict[Path, tuple[int, int, int]], list[str]]:
    """The place of each checkpoint of a run folder, and what is wrong with those that cannot be read."""
    places, damaged = {}, []
    for path in [*run.glob('*.pth.tar'), *run.glob('[0-9]*-*/*.pth.tar')]:
        try:
            places[path] = _place_of(read_checkpoint(path, mapped=True))
        except UserError as error:
            damaged.append(error.line)
    return places, damaged


def _place_of(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Phase, epoch and step that come next.

    Raises:
        CheckpointError: It does not say.
    """
    state = checkpoint.state
    try:
        within = state.get('within')
        done = (state['epoch'], within['step']) if within is not None else (state['epoch'] + 1, 0)
        return int(state.get('phase', 0)), int(done[0]), int(done[1])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{checkpoint.path}: its place in the run cannot be read') from error


def what_differs(checkpoint: Checkpoint, **ours: int | None) -> str | None:
    """A line on what a run has other than the one that it goes on with, where its result will be another; else None.

    Args:
        checkpoint: The checkpoint that the run goes on from.
        ours: Processes ('ranks'), 'images_per_step', batches an update ('accumulate'), 'seed', and of shards, whose
            order depends on it, 'loader_processes'.
    """
    words = {'ranks': 'processes', 'images_per_step': 'images a step', 'accumulate': 'batches an update',
             'seed': 'the seed', 'loader_processes': 'loader processes of shards'}
    theirs = checkpoint.state.get('run') or {}
    found = [f'{words[name]}: {theirs[name]} before, {value} now'
             for name, value in ours.items() if name in theirs and theirs[name] != value]
    if not found:
        return None
    return f'{checkpoint.path}: goes on with other batches, so not to the same result ({"; ".join(found)})'
