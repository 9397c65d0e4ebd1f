"""Several timm backbones as one, whose features stand side by side; and features of an image and its mirror image."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class JoinedBackbones(nn.Module):
    """Backbones that see the same images, each normalised as it expects; their features are concatenated.

    Args:
        backbones: timm models made with `num_classes=0`, for images of one size. Images come normalised as the first
            one expects.
        mirrored: Features are the mean of those of the image and of its mirror image.
    """
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbones: Sequence[nn.Module], mirrored: bool):
        super().__init__()
        self.backbones, self.mirrored = nn.ModuleList(backbones), mirrored
        self.widths = [_width(each) for each in backbones]
        self.head_hidden_size = sum(self.widths)
        configs = [_config(each) for each in backbones]
        mean, std = (torch.tensor([config[name] for config in configs], device='cpu') for name in ('mean', 'std'))
        # (x * std[0] + mean[0] - mean[i]) / std[i]
        self.register_buffer('scale', (std[0] / std)[:, :, None, None])
        self.register_buffer('shift', ((mean[0] - mean) / std)[:, :, None, None])

    @property
    def pretrained_cfg(self) -> Mapping[str, Any]:
        """The first one's, from which image size and normalisation come."""
        return _config(self.backbones[0])

    def no_weight_decay(self) -> set[str]:
        """The names of the weights that the backbones exempt from weight decay."""
        return {f'backbones.{number}.{name}' for number, each in enumerate(self.backbones)
                for name in getattr(each, 'no_weight_decay', set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each in the backward pass, or not."""
        for each in self.backbones:
            switch = each.set_grad_checkpointing
            assert callable(switch)  # as timm's models have it
            switch(enable=enable)

    def features(self, number: int, images: torch.Tensor) -> torch.Tensor:
        """The features (B, F) that one backbone makes of images (B, 3, H, W)."""
        backbone = self.backbones[number]
        if number:
            images = images * self.scale[number] + self.shift[number]
        made: torch.Tensor = backbone(images)
        return (made + backbone(images.flip(3))) / 2 if self.mirrored else made

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> features of all (B, F)."""
        return torch.cat([self.features(number, images) for number in range(len(self.widths))], dim=1)


def _width(backbone: nn.Module) -> int:
    width = backbone.head_hidden_size
    assert isinstance(width, int)  # as timm's models have it
    return width


def _config(backbone: nn.Module) -> Mapping[str, Any]:
    config = backbone.pretrained_cfg
    assert isinstance(config, Mapping)  # as timm's models have it
    return config
