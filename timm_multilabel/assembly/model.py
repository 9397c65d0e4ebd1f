"""From settings to the model: backbone, heads, and timm's data config."""
from typing import Any

import torch
from timm.data import resolve_data_config

from timm_multilabel.assembly.data import Data
from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.compat import BatchNorm
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.config.values import HeadOptions
from timm_multilabel.errors import SettingError
from timm_multilabel.log import Say
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.model_names import check_arguments
from timm_multilabel.training.checkpoint_checks import is_data_config


def create_model(
        settings: TrainSettings,
        data: Data,
        options: HeadOptions,
        fresh: bool,
        say: Say,
) -> tuple[MultiLabelModel, dict[str, Any]]:
    """The model, on the CPU, and timm's data config: input size, normalisation, resizing in evaluation.

    Args:
        settings: Of the run, or of a phase.
        data: The heads, and how many images a batch has.
        options: Options of the heads.
        fresh: Load pretrained weights as asked for; not where a checkpoint or an earlier phase brings its own.
        say: Tells a line.
    """
    wanted, objective = settings.backbone, settings.objective
    try:
        check_arguments(wanted.model_kwargs)  # now: some would have timm read other files, or ask other hosts
    except ValueError as error:
        raise SettingError(f'--model-kwargs: {error}') from error
    size = {'img_size': wanted.img_size, 'input_size': wanted.input_size}
    backbone = create_backbone(
        wanted.model,
        pretrained=wanted.pretrained and fresh,
        pretrained_path=wanted.pretrained_path if fresh else None,
        input_size=size,
        drop_path=wanted.drop_path,
        model_kwargs=wanted.model_kwargs,
        say=say,
    )
    if wanted.grad_checkpointing:
        try:
            switch = backbone.set_grad_checkpointing
            assert callable(switch)  # as timm's models have it
            switch(enable=True)
        except (AttributeError, AssertionError) as error:
            raise SettingError(f'--grad-checkpointing: {wanted.model} has none') from error
    for name, numbers in (('mean', wanted.mean), ('std', wanted.std)):
        if numbers and len(numbers) not in (1, 3):
            raise SettingError(f'--{name} takes 1 or 3 numbers, not {len(numbers)}')
    if isinstance(backbone, JoinedBackbones) and len(backbone.backbones) > 1 and (wanted.mean or wanted.std):
        raise SettingError('--mean, --std: each of several models has a normalization of its own; leave them out')
    wishes = {'mean': wanted.mean, 'std': wanted.std, 'interpolation': settings.augmentation.interpolation,
              'crop_pct': settings.augmentation.crop_pct, 'crop_mode': settings.augmentation.crop_mode}
    data_config = resolve_data_config({**size, **wishes}, model=backbone)
    for name in ('input_size', 'mean', 'std'):
        data_config[name] = list(data_config[name])  # as YAML and checkpoints hold it
    if not is_data_config(data_config):
        raise SettingError(
            f'--img-size, --crop-pct, --mean, --std: {data_config} is out of the range that a checkpoint may hold')
    alone = try_out(wanted.model, backbone, data_config['input_size'])
    if alone and data.batch_size + data.pool_batch_size == 1 and has_one_view(settings) and not (
            wanted.freeze_backbone or wanted.lora or wanted.sync_bn):
        raise SettingError(
            f'-b 1: {wanted.model} has batch norm that sees one number a channel of one image of '
            f'{"x".join(map(str, data_config["input_size"]))}, and no statistics come of that; raise -b or --img-size')
    try:
        made = MultiLabelModel(
            backbone, data.label_space, wanted.drop, objective.smoothing, options, data.registry,
            objective.projection_dim, objective.projector_layers, objective.projector_width)
    except ValueError as error:
        raise SettingError(f'--head: {error}') from error
    return made, data_config


def has_one_view(settings: TrainSettings) -> bool:
    """Whether training makes one view of an image, and not two."""
    return not settings.objective.simclr_loss_weight and not settings.pool.pseudo_label_weight


def try_out(name: str, backbone: torch.nn.Module, input_size: list[int]) -> bool:
    """Run a backbone on one image.

    Returns:
        Whether a batch norm gets one number a channel of it, from which it could not train.

    Raises:
        SettingError: It takes no images of the size, or gives no pooled features.
    """
    size = 'x'.join(map(str, input_size))
    norms = [module for module in backbone.modules() if isinstance(module, BatchNorm)]
    alone: list[bool] = []
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: alone.append(inputs[0].numel() == norm.num_features))
             for norm in norms]
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, *input_size))
        backbone.train()
    except Exception as error:  # each model has its own ways to refuse a size
        reason = ' '.join(str(error).split())[:200]
        raise SettingError(f'--model {name}: it does not take images of {size} ({reason}); see --img-size') from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(features, torch.Tensor) or features.shape != (1, backbone.head_hidden_size):
        raise SettingError(
            f'--model {name}: no pooled features come out of it; choose another, or other --model-kwargs')
    return any(alone)
