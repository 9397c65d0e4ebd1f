"""The joint objective as a `timm.task.TrainingTask`."""
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_multilabel.distributed import sum_over_ranks, world
from timm_multilabel.losses import nt_xent_loss
from timm_multilabel.metrics import MultiLabelEvaluator
from timm_multilabel.model import MultiLabelModel, Projector


class JointModule(nn.Module):
    """Everything that is trained: the model, and the projector where NT-Xent is on.

    One forward takes all views through the backbone together.
    """

    def __init__(self, model: MultiLabelModel, projector: Projector | None, classify: bool, first_view_only: bool):
        super().__init__()
        self.model = model
        self.projector = projector
        self.classify = classify
        self.first_view_only = first_view_only

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """View-major images (V * B, 3, H, W) -> ({head: logits}, projections (V * B, D) or None)."""
        features = self.model.backbone(images)
        classified = features.chunk(2)[0] if self.first_view_only else features
        logits = self.model.forward_heads(classified) if self.classify else {}
        return logits, self.projector(features) if self.projector is not None else None


class JointTask(TrainingTask):
    """`simclr_weight * NT-Xent(two views) + classification_weight * sum over heads of w_h * cross-entropy_h`.

    Without SimCLR (weight 0) there is no projector and batches have one view; without classification (weight 0) the
    heads stay as they are. With several ranks every term is that of the global batch: NT-Xent sees all pairs, and a
    head's loss divides by the number of labels of all ranks, so that DDP's averaged gradient is that of one process.

    Args:
        model: Backbone and heads.
        simclr_weight: Weight of NT-Xent.
        classification_weight: Weight of the heads' losses.
        temperature: Temperature of NT-Xent.
        projection_dim: Width of the projections.
        smoothing: Label smoothing of the heads.
        head_weights: Weights w_h by head; 1 / H each when None.
        first_view_only: Classify the first view only (not both).
        metadata: Plain values for the checkpoint, beside the weights.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: As in timm; unused.

    Raises:
        ValueError: Both weights are 0, or a head weight is missing, unknown or negative.
    """

    def __init__(
            self,
            model: MultiLabelModel,
            simclr_weight: float = 0.5,
            classification_weight: float = 0.5,
            temperature: float = 0.5,
            projection_dim: int = 64,
            smoothing: float = 0.1,
            head_weights: dict[str, float] | None = None,
            first_view_only: bool = False,
            metadata: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not simclr_weight and not classification_weight:
            raise ValueError('the weights of SimCLR and of classification are both 0: there is nothing to train')
        self.label_space = model.label_space
        self.simclr_weight = simclr_weight
        self.classification_weight = classification_weight
        self.temperature = temperature
        self.smoothing = smoothing
        self.views = 2 if simclr_weight else 1
        self.first_view_only = first_view_only and self.views == 2
        self.metadata = metadata if metadata is not None else {}
        self.metadata['label_space'] = self.label_space.to_dict()
        self.head_weights = resolve_head_weights(self.label_space.names, head_weights)
        weights = torch.tensor(list(self.head_weights.values()), device=self.device)
        self.register_buffer('_weights', weights, persistent=False)

        projector = None
        if simclr_weight:
            projector = Projector(model.num_features, projection_dim).to(self.device, self.dtype)
        if not classification_weight:
            model.heads.requires_grad_(False)  # no loss reaches them, which DDP and weight decay must know
        self.trainable_module = JointModule(model, projector, bool(classification_weight), self.first_view_only)

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> 'JointTask':
        """Wrap what is trained in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the training and the evaluation forward; call it before `prepare_distributed`."""
        self.eval_model = torch.compile(self.trainable_module.model, backend=backend, mode=mode, **kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Backbone and heads, without the projector: plain, or of the EMA weights."""
        if module is None and hasattr(self, 'eval_model_ema' if ema else 'eval_model'):
            return super().get_eval_model(ema=ema)
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that is trained; for adaptive clipping (`exclude_head`) not the heads, of which there are several."""
        trainable = unwrap_model(self.trainable_module)
        modules = [trainable.model.backbone, trainable.projector] if exclude_head else [trainable]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The projector, which lives beside the model in a checkpoint."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        projector = None if module is None else unwrap_model(module).projector
        return {} if projector is None else {'projector': projector.state_dict()}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Bring the projector back; a checkpoint without one leaves it as it is."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        projector = unwrap_model(module).projector
        if projector is not None and state and 'projector' in state:
            projector.load_state_dict(state['projector'], strict=strict)

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The weights and, once, the label space and further metadata that make the file usable by itself."""
        state = super().get_checkpoint_state(ema=ema, **kwargs)
        return state if ema else {**self.metadata, **state}

    def create_evaluator(self, **kwargs: Any) -> MultiLabelEvaluator:
        return MultiLabelEvaluator(self.label_space, self.head_weights, device=self.device, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Compute the objective.

        Args:
            input: View-major images (V * B, 3, H, W), V = 2 with SimCLR and 1 without.
            target: Class indices (V * B, H), MISSING for no label; or mixed labels (V * B, C) of all heads in a row.

        Returns:
            'loss', its two weighted parts 'simclr_loss' and 'classification_loss' (zero where off), 'head_losses'
            (H,) unweighted, 'output' {head: logits} and the 'target' of the classified rows.
        """
        logits, projections = self.trainable_module(input)
        zero = torch.zeros((), device=input.device)
        simclr_loss, classification_loss, head_losses = zero, zero, zero.expand(len(self.label_space.heads))
        if projections is not None:
            simclr_loss = self.simclr_weight * nt_xent_loss(*projections.chunk(2), self.temperature)
        if self.classification_weight:
            target = target.chunk(2)[0] if self.first_view_only else target
            head_losses = self._head_losses(logits, target)
            classification_loss = self.classification_weight * (head_losses * self._weights).sum()
        return {
            'loss': simclr_loss + classification_loss,
            'simclr_loss': simclr_loss.detach(),
            'classification_loss': classification_loss.detach(),
            'head_losses': head_losses.detach(),
            'output': logits,
            'target': target,
        }

    def _head_losses(self, logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """The mean loss of each head over the labels of all ranks (H,), scaled so that DDP's average is exact."""
        heads = unwrap_model(self.trainable_module).model.heads
        mixed = target.is_floating_point()
        columns = target.split(self.label_space.sizes, dim=1) if mixed else target.unbind(1)
        losses = [
            head.loss(output, column, self.smoothing)
            for head, output, column in zip(heads, logits.values(), columns, strict=True)
        ]
        sums, counts = (torch.stack(values) for values in zip(*losses, strict=True))
        # A head without a label anywhere gives 0 / 1e-6 = 0, with a gradient of zero for every parameter.
        labels = sum_over_ranks(counts).clamp(min=1e-6)
        return sums * (world()[1] / labels)


def resolve_head_weights(names: tuple[str, ...], weights: dict[str, float] | None) -> dict[str, float]:
    """The weight of each head, 1 / H where none are given.

    Raises:
        ValueError: A weight is missing, negative or of an unknown head, or all are 0.
    """
    if weights is None:
        return {name: 1 / len(names) for name in names}
    for name in weights:
        if name not in names:
            raise ValueError(f"there is no head '{name}' to weigh (there are: {', '.join(names)})")
    for name in names:
        if name not in weights:
            raise ValueError(f"head '{name}' has no weight; name one for each of: {', '.join(names)}")
        if not 0 <= weights[name] < float('inf'):
            raise ValueError(f"the weight of head '{name}' is {weights[name]}, expected 0 or more")
    if not sum(weights.values()):
        raise ValueError('the weights of all heads are 0')
    return {name: float(weights[name]) for name in names}
