"""From settings to the task: the model with its objective, EMA and compilation."""
from dataclasses import asdict
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm

from timm_multilabel.assembly.data import Data
from timm_multilabel.assembly.model import has_one_view
from timm_multilabel.assembly.pseudo_labels import ema_warms_up
from timm_multilabel.compat import BatchNorm
from timm_multilabel.config.train import ModelSettings, TeacherSettings, TrainSettings
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import SettingError
from timm_multilabel.inference.teachers import Teachers
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import Say
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.model_names import plain_model
from timm_multilabel.task import FeatureTeaching, JointTask, Pool, Teaching


def create_task(
        settings: TrainSettings,
        model: MultiLabelModel,
        data: Data,
        data_config: dict[str, Any],
        head_weights: dict[str, float],
        device: torch.device,
        teaching: Teaching | None = None,
        feature_teaching: FeatureTeaching | None = None,
) -> JointTask:
    """The task on its device."""
    backbone, objective, pool, of_data = settings.backbone, settings.objective, settings.pool, settings.data
    if backbone.sync_bn:
        if device.type != 'cuda':
            raise SettingError(f'--sync-bn needs CUDA, and the device is {device}; leave it out')
        model = convert_sync_batchnorm(model)
    _check_micro_batch(settings, model, data)
    conditioned = bool(objective.condition_projector and objective.simclr_loss_weight)
    if conditioned and model.projector is not None:
        name = next(name for name, options in model.head_options.items() if options['input'] == 'projection')
        raise SettingError(
            f"--condition-projector: head '{name}' reads projections (input=projection), which then depend on what is "
            'drawn of a view, and of a photo to predict nothing is drawn; leave one of them out')
    arch, model_kwargs = plain_model(backbone.model, backbone.model_kwargs)
    model.to(device)
    if backbone.channels_last:
        model.to(memory_format=torch.channels_last)
    return JointTask(
        model,
        simclr_weight=objective.simclr_loss_weight,
        classification_weight=objective.classification_loss_weight,
        temperature=objective.temperature,
        projection_dim=objective.projection_dim,
        projector_layers=objective.projector_layers,
        projector_width=objective.projector_width,
        condition_projector=conditioned,
        head_weights=head_weights,
        first_view_only=objective.classify_views == 'first',
        pool=Pool(
            data.pool_batch_size,
            pool.entropy_weight,
            pool.entropy_ramp_up,
            pool.marginal_entropy_weight,
            pool.pseudo_label_weight,
            pool.pseudo_label_ramp_up or 0.0,
            pool.pseudo_label_threshold,
            pool.pseudo_label_reference,
            pool.pseudo_label_alignment,
        ) if data.pool_rows is not None else Pool(),
        teaching=teaching,
        feature_teaching=feature_teaching,
        freeze_backbone=backbone.freeze_backbone,
        micro_batch=settings.run.micro_batch,
        metadata={
            'arch': arch,
            'model_kwargs': model_kwargs,
            'head_module': of_data.head_module,
            'opt': settings.optimizer.opt,
            'data_config': data_config,
            'best_weights': 'plain',
            'head_weights': head_weights,
            'head_options': model.head_options,
            'projection_dim': objective.projection_dim,
            'projector_layers': objective.projector_layers,
            'projector_width': objective.projector_width,
            'condition_projector': conditioned,
            'train_split': of_data.train_split,
            'val_split': of_data.val_split,
            **asdict(TableFormat.of(of_data)),
        },
        device=device,
    )


def create_teaching(settings: TeacherSettings, taught: LabelSpace, teachers: Teachers | None) -> Teaching:
    """What the heads learn; `teachers` are None in a rehearsal."""
    of_views = teachers.of_views if teachers is not None and settings.teacher_views else None
    return Teaching(taught.names, settings.teacher_weight, settings.teacher_temperature, of_views)


def _check_micro_batch(settings: TrainSettings, model: MultiLabelModel, data: Data) -> None:
    """Raise UserError where batch norm would have to take its statistics from one input."""
    images, micro_batch = data.batch_size + data.pool_batch_size, settings.run.micro_batch
    frozen = settings.backbone.freeze_backbone or settings.backbone.lora
    if micro_batch is None or micro_batch >= images or frozen or not has_one_view(settings):
        return
    least = images // -(-images // micro_batch)
    if least == 1 and any(isinstance(module, BatchNorm) for module in model.modules()):
        raise SettingError(
            f'--micro-batch {micro_batch}: {settings.backbone.model} has batch norm, whose statistics are over 2 '
            f'images or more, and of {images} images a step some would go through it alone; choose another')


def setup_ema_and_compile(backbone: ModelSettings, made: JointTask, updates: int, say: Say) -> None:
    """EMA and compilation of a task that has its first weights; `updates` are those of the run, or of the phase."""
    if backbone.model_ema:
        warms_up = ema_warms_up(backbone, updates)
        if warms_up and backbone.model_ema_warmup is None:
            say(f'--model-ema-warmup: the EMA would average more updates than the {updates:,} that there are, so its '
                'decay warms up')
        made.setup_ema(decay=backbone.model_ema_decay, use_warmup=warms_up)
    if backbone.torchcompile:
        try:
            made.compile(backend=backbone.torchcompile)
            if backbone.model_ema:
                made.compile_ema(backend=backbone.torchcompile)
        except RuntimeError as error:
            raise SettingError(
                f'--torchcompile {backbone.torchcompile}: {" ".join(str(error).split())[:200]}') from error
