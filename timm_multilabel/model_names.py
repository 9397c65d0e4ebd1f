"""Which models, and which arguments of models, a file may name: timm's own, made of plain values of a sensible size."""
import math
import re
from collections.abc import Mapping
from typing import Any

from timm_multilabel.errors import UserError

LARGEST_SIDE = 4096
"""Pixels of a side of a model's input, at most."""

LARGEST_PROJECTION = 2 ** 14
"""Width of the projections, and of the projector's hidden layers, at most."""

MOST_PROJECTOR_LAYERS = 16

_LARGEST = 2 ** 16  # of a number among a model's arguments
_MOST_BLOCKS = 512  # of a stage or a model, since each is made in Python
_MOST_VALUES = 64  # in a list
_DEPTHS = ('depth', 'depths', 'layers')
_SIDES = ('img_size', 'patch_size', 'window_size')

ARGUMENTS = frozenset(
    'aa_layer act_layer attn_drop_rate attn_layer attn_type base_width block_reduce_first bn_eps bn_momentum bn_tf '
    'cardinality channels class_token conv_bias conv_mlp depth depths dim dims distilled down_kernel_size '
    'drop_block_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim embed_dims embed_norm '
    'expand_ratio fc_norm final_norm fix_init fix_stem global_pool groups growth_rate head_dim head_hidden_size '
    'head_init_scale head_norm_first img_size in_chans init_values kernel_size kernel_sizes layer_scale_init_value '
    'layers legacy ls_init_value mirrored mlp_layer mlp_ratio mlp_ratios no_embed_class norm_eps norm_layer '
    'num_features num_heads num_kv_heads output_stride pad_type patch_drop_rate patch_norm patch_size '
    'pool_include_prefix '
    'pool_type pos_drop_rate pos_embed pre_norm preact proj_bias proj_drop_rate qk_norm '
    'qkv_bias qkv_fused ref_feat_shape reg_tokens rope_temperature rope_theta rope_type scale_attn_norm '
    'scale_mlp scale_mlp_norm se_from_exp se_layer se_ratio sr_ratios stages stem_chs stem_size stem_type stem_width '
    'strict_img_size swiglu_mlp use_abs_pos use_conv use_fc_norm use_grn use_pos_embed use_post_norm use_rel_pos '
    'use_rot_pos_emb weight_init width widths window_ratio window_size zero_init_last'.split())
"""The arguments of timm's models that a checkpoint may hold, and `mirrored`, which is ours."""


JOIN = '+'
"""Between the names of several models whose features are concatenated."""


def names_of(name: str) -> list[str]:
    """The models that a name joins; the path of a folder (`local-dir:`) may hold a '+' itself."""
    return [name] if name.startswith('local-dir:') else name.split(JOIN)


def is_joined(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a model is several, or sees mirrored images too, and so none of timm's own (see `JoinedBackbones`)."""
    return len(names_of(name)) > 1 or bool(arguments.get('mirrored'))


def is_from_elsewhere(name: str) -> bool:
    """Whether a model's name sends timm to a hub or to a folder (`hf-hub:...`, `local-dir:...`)."""
    return ':' in name


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError unless arguments of a model are in `ARGUMENTS`, with plain values of a sensible size."""
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise ValueError(f"model argument '{name}' is not among those that a checkpoint may hold")
        most = _MOST_BLOCKS if name in _DEPTHS else LARGEST_SIDE if name in _SIDES else _LARGEST
        if not _is_sensible(value, most):
            raise ValueError(
                f"model argument '{name}': expected a text, a number of {most} at most, or a list of such numbers")


def _is_sensible(value: Any, most: int, nested: int = 2) -> bool:
    if isinstance(value, list | tuple):
        return bool(nested) and len(value) <= _MOST_VALUES and all(
            _is_sensible(part, most, nested - 1) for part in value)
    if isinstance(value, str):
        return re.fullmatch(r'[\w.-]{0,64}', value) is not None
    if isinstance(value, bool) or value is None:
        return True
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= most


def plain_model(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A model's name in timm and its arguments, as a checkpoint keeps them, so that none sends its reader elsewhere.

    Args:
        name: Any name that `timm.create_model` takes; one of a hub is looked up there.
        arguments: Further arguments of the model.

    Raises:
        UserError: An argument is none that a checkpoint may hold.
    """
    arguments, names = dict(arguments), names_of(name)
    if is_from_elsewhere(name):
        from timm.models import resolve_model_input_args

        resolved = [resolve_model_input_args(each, None, **arguments) for each in names]
        name = JOIN.join(each.pop('model_name') for each in resolved)
        for each in resolved:
            for key in ('pretrained_cfg', 'pretrained_model_args', 'num_classes'):
                each.pop(key, None)
            if each != resolved[0]:
                raise UserError(f'--model {name}: their configurations ask for different arguments, and a checkpoint '
                                'holds one set for all; name models of timm')
        arguments = resolved[0]
    try:
        check_arguments(arguments)
    except ValueError as error:
        raise UserError(f'--model-kwargs: {error}') from error
    return name, arguments
