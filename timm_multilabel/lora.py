"""Low-rank adapters (LoRA) on a frozen backbone, and weights with the adapters merged into them."""
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from timm.layers import Conv2dSame
from torch import nn

from timm_multilabel.errors import SettingError

_ADAPTED = (nn.Linear, nn.Conv2d, Conv2dSame)  # and no subclasses: what those do with their weight does not merge
_NAME = re.compile(r'(.*)\.lora_A\.default\.weight')  # as peft calls them


def check_peft() -> None:
    """Raise SettingError where peft is not installed."""
    if find_spec('peft') is None:
        raise SettingError("--lora: peft is not installed (pip install '.[lora]')")


def add_adapters(backbone: nn.Module, rank: int, input_size: list[int]) -> str:
    """Freeze a backbone, and let it learn a low-rank update of each linear layer and each convolution.

    A layer of weight W computes with W + B A, where A and B have `rank` rows and columns, and B begins with zeros (Hu
    et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", with alpha equal to the rank). Some layers get no
    adapter: grouped convolutions have few weights, dilated ones are not known to peft, and the update could not be
    merged where a layer transforms its weight or is not called as a module.

    Args:
        backbone: A timm model; it is changed in place.
        rank: Of the updates.
        input_size: 3, H, W of an image, of which one is passed through the backbone to see which layers it uses.

    Returns:
        A line on the adapters.

    Raises:
        SettingError: peft cannot be imported, or no layer of the backbone can have an adapter.
    """
    try:
        peft = import_module('peft')
    except ImportError as error:
        raise SettingError(
            f"--lora: peft cannot be imported ({' '.join(str(error).split())[:200]}); pip install '.[lora]'") from error
    layers = _layers_used(backbone, input_size)
    names = [name for name, layer in layers.items() if type(layer) in _ADAPTED and not (
        isinstance(layer, nn.Conv2d) and (layer.groups > 1 or max(layer.dilation) > 1))]
    if not names:
        raise SettingError('--lora: no layer of this backbone can have an adapter; leave it out')
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    # A pattern, since peft takes each name of a list for the end of longer names too.
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules='|'.join(map(re.escape, names))), backbone)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    others = len(layers) - len(names)
    return (f'--lora {rank}: {trained:,} weights of adapters on {len(names)} layers, {100 * trained / weights:.1f}% of '
            f'the backbone\'s {weights:,}' + (f'; {others} grouped or other layers stay as they are' if others else ''))


def _layers_used(backbone: nn.Module, input_size: list[int]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that an image goes through, by name."""
    used: dict[str, nn.Module] = {}
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    hooks = [module.register_forward_hook(lambda module, *_, name=name: used.update({name: module}))
             for name, module in layers.items()]
    training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, *input_size, device=next(backbone.parameters()).device))
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    return used


def merge_adapters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose adapters are part of the weights: W + B A under the name that W has without adapters.

    Raises:
        ValueError: An adapter does not fit its layer.
    """
    merged = dict(state)
    for found in filter(None, map(_NAME.fullmatch, state)):
        layer = found[1]
        try:
            weight, down, up = (merged.pop(f'{layer}.{part}.weight') for part in (
                'base_layer', 'lora_A.default', 'lora_B.default'))
            merged[f'{layer}.weight'] = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
        except (LookupError, RuntimeError) as error:
            raise ValueError(f"the adapter of '{layer}' does not fit it") from error
        if f'{layer}.base_layer.bias' in merged:
            merged[f'{layer}.bias'] = merged.pop(f'{layer}.base_layer.bias')
    return merged
