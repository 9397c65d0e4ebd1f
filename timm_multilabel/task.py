"""The joint objective as a `timm.task.TrainingTask`."""
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_multilabel.compat import BatchNorm
from timm_multilabel.config.train import ObjectiveSettings, TeacherSettings, UnlabelledSettings
from timm_multilabel.distributed import sum_over_ranks, world
from timm_multilabel.gradient_cache import run_with_gradient_cache
from timm_multilabel.heads import (
    Head,
    JoinedWeights,
    PlainViews,
    group_heads,
    heads_of_plain_views,
    losses_of_heads,
    teacher_losses_of_heads,
)
from timm_multilabel.lora import add_adapters
from timm_multilabel.losses import feature_loss, nt_xent_loss
from timm_multilabel.metrics import MultiLabelEvaluator
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.projector import ConditionedProjector, Projector
from timm_multilabel.pseudo_labels import PseudoLabels
from timm_multilabel.views.told import Told


@dataclass(frozen=True)
class Pool:
    """What a batch holds of unlabelled images, and what the heads learn from them.

    Args:
        batch_size: Unlabelled images of a batch; they come last in each view.
        entropy_weight: Weight of the mean entropy of the heads' predictions, on all views.
        entropy_ramp_up: Epochs over which that weight grows from 0.
        marginal_entropy_weight: Weight of the reward for the entropy of the mean prediction; it ramps up alike.
        pseudo_label_weight: Weight of the pseudo-labels' cross-entropy; the first view is then the weak one.
        pseudo_label_ramp_up: Epochs over which that weight grows from 0; `start_step` says where in the run a step is.
        pseudo_label_threshold: Least probability of a pseudo-label, as a share of the reference.
        pseudo_label_reference: 'labelled', the mean highest probability on labelled images, or 'none': 1.
        pseudo_label_alignment: Align the distribution of the predictions first; see `PseudoLabels`.
    """
    batch_size: int = 0
    entropy_weight: float = 0.0
    entropy_ramp_up: int = 0
    marginal_entropy_weight: float = 0.0
    pseudo_label_weight: float = 0.0
    pseudo_label_ramp_up: float = 0.0
    pseudo_label_threshold: float = UnlabelledSettings.pseudo_label_threshold
    pseudo_label_reference: str = 'none'  # with a reference, early guesses are labels unless the weight ramps up
    pseudo_label_alignment: bool = False

    def __post_init__(self) -> None:
        weights = (self.entropy_weight, self.marginal_entropy_weight, self.pseudo_label_weight)
        if any(weights) and not self.batch_size:
            raise ValueError('entropy and pseudo-labels are of unlabelled images, and there are none')


@dataclass(frozen=True)
class Teaching:
    """What heads learn from teachers.

    Args:
        heads: The heads that are taught, in the order of the answers.
        weight: Weight of the loss against them.
        temperature: Divides the logits of both.
        of_views: View-major images (V * B, 3, H, W), as the model gets them, -> answers (V * B, S); None where each row
            of the targets ends with those of its image.
    """
    heads: tuple[str, ...]
    weight: float = TeacherSettings.teacher_weight
    temperature: float = TeacherSettings.teacher_temperature
    of_views: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class FeatureTeaching:
    """What the backbone learns from the features of another one.

    Args:
        width: F, their number.
        of_views: View-major images (V * B, 3, H, W), as the model gets them, -> features (V * B, F).
        weight: Weight of the loss against them.
    """
    width: int
    of_views: Callable[[torch.Tensor], torch.Tensor]
    weight: float = TeacherSettings.teacher_features_weight


_FEATURES = ''  # among the outputs of heads, whose names are not empty


class JointModule(nn.Module):
    """Everything that is trained: the model, the projector where NT-Xent is on, and the map to a teacher's features.

    One forward takes all views through the backbone together.

    Args:
        model: Backbone and heads.
        projector: The projector, where the model has none of its own and NT-Xent needs one; a `ConditionedProjector`
            gets what was drawn of each view.
        classify: Call the heads.
        project: Give projections.
        freeze_backbone: Leave the backbone as it is, batch norm statistics included.
        to_features: Maps features to those of a teacher.
    """

    def __init__(
            self,
            model: MultiLabelModel,
            projector: Projector | ConditionedProjector | None,
            classify: bool,
            project: bool,
            freeze_backbone: bool,
            to_features: nn.Linear | None = None,
    ):
        super().__init__()
        self.model = model
        self.projector = projector
        self.to_features = to_features
        self.classify, self.project, self.freeze_backbone = classify, project, freeze_backbone
        self.joined = nn.ModuleList()  # see `JointTask.join_heads`
        self.adapted = False  # the backbone is frozen but for adapters in it

    def train(self, mode: bool = True) -> 'JointModule':
        super().train(mode)
        if self.freeze_backbone:
            self.model.backbone.eval()
        if self.adapted:
            for module in self.model.backbone.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self

    def beside_the_model(self) -> dict[str, nn.Module]:
        """What is trained and is no part of the model, by name."""
        parts = {'projector': self.projector, 'to_features': self.to_features}
        return {name: part for name, part in parts.items() if part is not None}

    def no_weight_decay(self) -> set[str]:
        """The names of the weights that the backbone exempts from weight decay, which timm's optimizers ask for."""
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def forward(
            self,
            images: torch.Tensor,
            drawn: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """View-major images (V * B, 3, H, W) -> ({head: output}, projections (V * B, D) or None).

        `drawn` (V * B, PARAMETERS) is what a conditioned projector is told of each view, and no other.

        What is compared with a teacher's features (V * B, F) is an output of its own.
        """
        with torch.no_grad() if self.freeze_backbone else nullcontext():
            features = self.model.backbone(images)
        projector = self.projector if self.projector is not None else self.model.projector
        further = () if drawn is None else (drawn,)
        projections = projector(features, *further) if projector is not None else None
        joined: Any = self.joined  # whose type says no more than that it holds modules
        outputs = self.model.forward_heads(features, projections, joined) if self.classify else {}
        if self.to_features is not None:
            outputs[_FEATURES] = self.to_features(features)
        return outputs, projections if self.project else None


class JointTask(TrainingTask):
    """The joint objective: a weighted sum of terms, each over the global batch.

    - simclr: NT-Xent between the two views of every image, labelled or not.
    - classification: the sum over heads of w_h times the mean of the head's loss over the labels that are there.
    - entropy: over the unlabelled images, the sum over heads of w_h times the mean entropy of its prediction.
    - marginal_entropy: minus the entropy of the mean prediction there, likewise over heads.
    - pseudo_label: likewise, the mean over them of the loss of the second view against what the first view, seen by the
      EMA weights where there are any, is taken for (see `PseudoLabels`); images below the threshold count as zero.
    - teacher: over all images, the sum over the heads that are taught of w_h times the mean of `Head.teacher_loss`.
    - teacher_features: over all images, the mean of `feature_loss` of the backbone's features, mapped to the teacher's.

    Terms of weight 0 are not computed. Without SimCLR there is no projector (but where a head reads projections) and,
    without pseudo-labels too, batches have one view; without classification the heads stay as they are. With several
    ranks NT-Xent sees all pairs, and a head's loss divides by the number of labels of all ranks, so that DDP's averaged
    gradient is that of one process. Heads with the option `views=plain` learn from plain views alone, in all terms.

    Args:
        model: Backbone and heads.
        simclr_weight: Weight of NT-Xent.
        classification_weight: Weight of the heads' losses.
        temperature: Temperature of NT-Xent.
        projection_dim: Width of the projections, where the model has no projector of its own.
        projector_layers: Likewise the projector's layers, see `Projector`.
        projector_width: Likewise the width of its hidden layers.
        condition_projector: Tell the projector what was drawn of each view, see `ConditionedProjector`.
        head_weights: Weights w_h by head; 1 / H each when None.
        first_view_only: Classify the first view only (not both).
        pool: The unlabelled images.
        teaching: What the heads learn from teachers, if anything.
        feature_teaching: What the backbone learns from another one, if anything.
        freeze_backbone: Train the heads alone, on a backbone (and projector) that stays as it is.
        micro_batch: The most images that go through the model at once, for batches larger than the memory; see
            `run_with_gradient_cache`. All when None.
        metadata: Plain values for the checkpoint, beside the weights.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: As in timm; unused.

    Raises:
        ValueError: Nothing is left to train, a head weight is missing, unknown or negative, a micro-batch is empty, or
            a head reads the projections of a conditioned projector.
    """
    trainable_module: nn.Module
    _weights: torch.Tensor

    def __init__(
            self,
            model: MultiLabelModel,
            simclr_weight: float = ObjectiveSettings.simclr_loss_weight,
            classification_weight: float = ObjectiveSettings.classification_loss_weight,
            temperature: float = ObjectiveSettings.temperature,
            projection_dim: int = ObjectiveSettings.projection_dim,
            projector_layers: int = ObjectiveSettings.projector_layers,
            projector_width: int | None = ObjectiveSettings.projector_width,
            condition_projector: bool = ObjectiveSettings.condition_projector,
            head_weights: dict[str, float] | None = None,
            first_view_only: bool = False,
            pool: Pool = Pool(),  # noqa: B008 (frozen)
            teaching: Teaching | None = None,
            feature_teaching: FeatureTeaching | None = None,
            freeze_backbone: bool = False,
            micro_batch: int | None = None,
            metadata: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not simclr_weight and not classification_weight and feature_teaching is None:
            raise ValueError('the weights of SimCLR and of classification are both 0: there is nothing to train')
        if freeze_backbone and (simclr_weight or feature_teaching is not None):
            raise ValueError('SimCLR and features of a teacher train the backbone, which is frozen')
        if teaching is not None and not classification_weight:
            raise ValueError('teachers teach heads, and no head is trained')
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f'a micro-batch has 1 image or more, not {micro_batch}')
        if condition_projector and model.projector is not None:
            raise ValueError('a head reads projections, and a conditioned projector has none of an image without draws')
        self.label_space = model.label_space
        self.simclr_weight = simclr_weight
        self.classification_weight = classification_weight
        self.temperature = temperature
        self.micro_batch = micro_batch
        self.pool, self.teaching, self.feature_teaching = pool, teaching, feature_teaching
        self.ramp = 1.0
        self.pseudo_label_ramp = 1.0
        self.views = 2 if simclr_weight or pool.pseudo_label_weight else 1
        self.first_view_only = first_view_only and self.views == 2
        self.metadata = metadata if metadata is not None else {}
        self.metadata['label_space'] = self.label_space.to_dict()
        self.head_weights = resolve_head_weights(self.label_space.names, head_weights)
        weights = torch.tensor(list(self.head_weights.values()), device=self.device)
        self.register_buffer('_weights', weights, persistent=False)

        self.plain_views = PlainViews(self.label_space, heads_of_plain_views(model.head_options)).to(self.device)
        self.told = Told(
            plain=bool(self.plain_views.names and classification_weight),
            parameters=bool(condition_projector and simclr_weight))
        self.pseudo_labels = None
        if pool.pseudo_label_weight:
            self.pseudo_labels = PseudoLabels(
                model.named_heads, pool.pseudo_label_threshold, pool.pseudo_label_reference == 'labelled',
                pool.pseudo_label_alignment, self.device)
        self._groups = group_heads(model.named_heads)
        taught = () if teaching is None else teaching.heads
        self._taught_groups = group_heads({name: model.named_heads[name] for name in taught})
        projector = None
        if simclr_weight and model.projector is None:
            kind = ConditionedProjector if condition_projector else Projector
            projector = kind(model.num_features, projection_dim, projector_layers, projector_width)
            projector.to(self.device, self.dtype)
        to_features = None
        if feature_teaching is not None:
            to_features = nn.Linear(model.num_features, feature_teaching.width).to(self.device, self.dtype)
        if not classification_weight:
            model.heads.requires_grad_(False)  # no loss reaches them, which DDP and weight decay must know
        if freeze_backbone:
            for part in (model.backbone, model.projector):
                if part is not None:
                    part.requires_grad_(False)
        self.trainable_module = JointModule(
            model, projector, bool(classification_weight), bool(simclr_weight), freeze_backbone, to_features)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms: SimCLR and classification, and of the others those that are on."""
        weights = {
            'entropy': self.pool.entropy_weight,
            'marginal_entropy': self.pool.marginal_entropy_weight,
            'pseudo_label': self.pool.pseudo_label_weight,
            'teacher': self.teaching is not None,
            'teacher_features': self.feature_teaching is not None,
        }
        return 'simclr', 'classification', *(name for name, weight in weights.items() if weight)

    @property
    def joint_module(self) -> JointModule:
        """What is trained, without what `compile` and `prepare_distributed` wrap around it."""
        return _unwrapped(self.trainable_module)

    @property
    def heads(self) -> dict[str, Head]:
        """The heads by name."""
        return self.joint_module.model.named_heads

    def add_adapters(self, rank: int, input_size: list[int]) -> str:
        """Train low-rank adapters in place of the backbone's own weights; call it before EMA, `compile` and optimizer.

        Args:
            rank: See `lora.add_adapters`.
            input_size: 3, H, W of an image.

        Returns:
            A line on them.

        Raises:
            SettingError: peft cannot be imported, or no layer can have an adapter.
        """
        line = add_adapters(self.joint_module.model.backbone, rank, input_size)
        self.joint_module.adapted = True
        return line

    def join_heads(self) -> dict[nn.Parameter, list[nn.Parameter]]:
        """Hold the weights of the heads that are computed together in one parameter each; see `JoinedWeights`.

        Only `JointTask.forward` trains them from here on. Call it before `prepare_distributed`, and for an optimizer
        that changes each number by itself; `optim.create_optimizer` does.

        Returns:
            The joined parameters, each with the heads' own, which are views of it.
        """
        model, heads = self.joint_module.model, self.heads
        joined = [JoinedWeights(group, heads) for groups in model.groups.values() for group in groups
                  if JoinedWeights.can_join(group, heads)]
        self.joint_module.joined.extend(joined)
        return {whole: parts for each in joined for whole, parts in each.parts().items()}

    def start_epoch(self, epoch: int) -> None:
        """Set what changes with the epoch (from 0): the ramp of the entropies."""
        self.ramp = min(1.0, epoch / self.pool.entropy_ramp_up) if self.pool.entropy_ramp_up else 1.0

    def start_step(self, epochs: float) -> None:
        """Set what changes with the step: the ramp of the pseudo-labels.

        The mean prediction on labelled images is no more certain at first than that on the pool, so that nearly every
        image passes a threshold relative to it; AdaMatch's weight grows as here, over half of the training.

        Args:
            epochs: How many are done, with the share of the present one.
        """
        ramp_up = self.pool.pseudo_label_ramp_up
        self.pseudo_label_ramp = 0.5 - 0.5 * math.cos(math.pi * min(1.0, epochs / ramp_up)) if ramp_up else 1.0

    def train(self, mode: bool = True) -> 'JointTask':
        super().train(mode)
        self.joint_module.train(mode)  # a compiled model is a second child with the same backbone
        teacher = self.get_trainable_module(ema=True)
        if teacher is not None:
            teacher.eval()  # it only teaches
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> 'JointTask':
        """Wrap what is trained in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm's tasks give the compiled model, PyTorch's modules nothing
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **kwargs: Any,
    ) -> nn.Module:
        """Compile the training and the evaluation forward; call it before `prepare_distributed`."""
        def compiled(module: nn.Module) -> nn.Module:
            made = torch.compile(module, backend=backend, mode=mode, **kwargs)
            assert isinstance(made, nn.Module)  # its types say no more than that it can be called
            return made

        self.eval_model = compiled(self.joint_module.model)
        self.trainable_module = compiled(self.trainable_module)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Backbone and heads, without the projector: plain, or of the EMA weights."""
        if module is None and hasattr(self, 'eval_model_ema' if ema else 'eval_model'):
            return super().get_eval_model(ema=ema)
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else _unwrapped(module).model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that is trained; for adaptive clipping (`exclude_head`) not the heads, of which there are several."""
        trainable = self.joint_module
        rest = [trainable.model.backbone, trainable.projector, trainable.model.projector, trainable.to_features]
        modules = rest if exclude_head else [trainable]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What lives beside the model in a checkpoint: the projector, the map to a teacher's features, and, once, the
        running means of pseudo-labels.
        """
        return {name: part.state_dict() for name, part in self._beside_the_model(module, ema).items()}

    def _beside_the_model(self, module: nn.Module | None, ema: bool) -> dict[str, nn.Module]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        parts = {} if module is None else _unwrapped(module).beside_the_model()
        return parts if ema or self.pseudo_labels is None else {**parts, 'pseudo_labels': self.pseudo_labels}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Bring back what `get_task_state` gives; a checkpoint without a part leaves it as it is."""
        for name, part in self._beside_the_model(module, ema).items():
            if state and name in state:
                part.load_state_dict(state[name], strict=strict)

    def get_checkpoint_state(
            self,
            ema: bool = False,
            unwrap_fn: Callable[[nn.Module], nn.Module] = unwrap_model,
    ) -> dict[str, Any]:
        """The weights and, once, the label space and further metadata that make the file usable by itself."""
        state = super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        weights = state.get('state_dict_ema' if ema else 'state_dict', {})
        for name, value in weights.items():
            if value.numel() < value.untyped_storage().nbytes() // value.itemsize:  # joined: a file would have them all
                weights[name] = value.clone()
        return state if ema else {**self.metadata, **state}

    def create_evaluator(self, **kwargs: Any) -> MultiLabelEvaluator:
        return MultiLabelEvaluator(self.heads, self.head_weights, device=self.device, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Compute the objective.

        Args:
            input: View-major images (V * B, 3, H, W); the last images of each view are the pool's.
            target: Targets (V * B, W) as `LabelSpace.split` takes them; after them those of teachers' answers
                (V * B, S), see `Teaching`, and what is told of each view (V * B, K), see `told`.

        Returns:
            'loss', its weighted terms '<term>_loss' (see `terms`; zero where off), 'head_losses' (H,) unweighted,
            'output' and 'target' of the classified rows by head, and with pseudo-labels 'pseudo_label_shares' (H,).
        """
        width = sum(labels.width for labels in self.label_space.heads)
        if self.told and target.shape[1] < width + self.told.width:
            raise ValueError(
                f'targets have {target.shape[1]} columns, and this task needs {self.told.width} more on each view: see '
                'timm_multilabel.views.told')
        target, plain, drawn = self.told.split(target)
        answers = taught = None
        if self.teaching is not None:
            if self.teaching.of_views is None:
                target, answers = target[:, :width], target[:, width:]
            else:
                answers = self._in_pieces(self.teaching.of_views, input)
        if self.feature_teaching is not None:
            taught = self._in_pieces(self.feature_teaching.of_views, input)
        outputs, projections = self._run(input, drawn)
        losses = {term: torch.zeros((), device=input.device) for term in self.terms}
        result: dict[str, Any] = {'head_losses': losses['simclr'].expand(len(self.label_space.heads))}
        if projections is not None:
            losses['simclr'] = self.simclr_weight * nt_xent_loss(*projections.chunk(2), self.temperature)
        if self.feature_teaching is not None and taught is not None:
            losses['teacher_features'] = self.feature_teaching.weight * feature_loss(
                outputs.pop(_FEATURES), taught).mean()
        result['output'] = self._classified_outputs(outputs)
        result['target'] = {}
        if self.classification_weight:
            labels = target if plain is None else self.plain_views.mask(target, plain)
            columns = self.label_space.split(self._classified(labels))
            result['target'] = dict(zip(self.label_space.names, columns, strict=True))
            head_losses = self._head_losses(result['output'], result['target'])
            losses['classification'] = self.classification_weight * (head_losses * self._weights).sum()
            result['head_losses'] = head_losses.detach()
            if self.pool.batch_size:
                losses |= self._entropies(outputs)
            if self.pseudo_labels is not None:
                losses['pseudo_label'], result['pseudo_label_shares'] = self._pseudo_labels(
                    self.pseudo_labels, input, outputs, result['target'], plain)
            if self.teaching is not None and answers is not None:
                losses['teacher'] = self._taught(self.teaching, outputs, answers, plain)
        result['loss'] = sum(losses.values())
        return result | {f'{term}_loss': loss.detach() for term, loss in losses.items()}

    def _run(
            self,
            input: torch.Tensor,
            drawn: torch.Tensor | None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The module's outputs and projections for all views.

        No term may need the student's outputs for the pool's first views: the teacher of pseudo-labels, the EMA, sees
        those itself. Then they are not computed, and are zeros here.
        """
        pool, view = self.pool.batch_size, len(input) // self.views
        if not self._learns_from_weak_pool():
            # Each row stands alone then, in pieces of as many rows as the images of all views would be.
            labelled, seen = view - pool, torch.cat((input[:view - pool], input[view:]))
            outputs, projections = run_with_gradient_cache(
                self.trainable_module, seen, 1, self.micro_batch and self.views * self.micro_batch)
            return {name: torch.cat((output[:labelled], output.new_zeros(pool, *output.shape[1:]), output[labelled:]))
                    for name, output in outputs.items()}, projections
        return run_with_gradient_cache(
            self.trainable_module, input, self.views, self.micro_batch, *(() if drawn is None else (drawn,)))

    def _learns_from_weak_pool(self) -> bool:
        terms = (self.simclr_weight, self.pool.entropy_weight, self.pool.marginal_entropy_weight, self.teaching,
                 self.feature_teaching)
        return any(terms) or self.pseudo_labels is None or self.get_trainable_module(ema=True) is None

    def _in_pieces(self, ask: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """What a teacher gives for images, of which it gets no more at once than the model does."""
        return torch.cat([ask(part) for part in images.split(self.micro_batch or len(images))])

    def _classified(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows of all views, those that the heads learn from: the labelled images, of both views or of the first."""
        views = rows.chunk(self.views)[:1 if self.first_view_only else None]
        labelled = [view[:len(view) - self.pool.batch_size] for view in views]
        return torch.cat(labelled) if self.pool.batch_size else rows[:sum(map(len, labelled))]

    def _classified_outputs(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`_classified` of each head's output; those of one width and type at once."""
        if not self.pool.batch_size and not self.first_view_only:
            return outputs
        wide = {name: output for name, output in outputs.items() if output.ndim == 2}
        if len({output.dtype for output in wide.values()}) != 1:
            return {name: self._classified(output) for name, output in outputs.items()}
        together = self._classified(torch.cat(list(wide.values()), dim=1))
        parts = dict(zip(wide, together.split([output.shape[1] for output in wide.values()], dim=1), strict=True))
        return {name: parts[name] if name in parts else self._classified(output) for name, output in outputs.items()}

    def _unlabelled(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Of rows of all views, the pool's, for each view."""
        return [view[len(view) - self.pool.batch_size:] for view in rows.chunk(self.views)]

    def _head_losses(self, outputs: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of each head over the labels of all ranks (H,), scaled so that DDP's average is exact."""
        sums, counts = losses_of_heads(self._groups, self.heads, outputs, target)
        # A head without a label anywhere gives 0 / 1e-6 = 0, with a gradient of zero for every parameter.
        labels = sum_over_ranks(counts).clamp(min=1e-6)
        return sums * (world()[1] / labels)

    def _entropies(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The terms of the entropy and of the marginal entropy, where they are on."""
        weights = {'entropy': self.pool.entropy_weight, 'marginal_entropy': -self.pool.marginal_entropy_weight}
        losses = {}
        for term in (term for term in weights if term in self.terms):
            total = self._weights.new_zeros(())
            for weight, (name, head) in zip(self._weights, self.heads.items(), strict=True):
                if head.distribution:
                    total = total + weight * getattr(head, term)(torch.cat(self._unlabelled(outputs[name]))).mean()
            losses[term] = self.ramp * weights[term] * total
        return losses

    def _taught(
            self,
            teaching: Teaching,
            outputs: dict[str, torch.Tensor],
            answers: torch.Tensor,
            plain: torch.Tensor | None,
    ) -> torch.Tensor:
        """The term of the teachers' answers (V * B, S)."""
        heads = self.heads
        weights = dict(zip(heads, self._weights, strict=True))
        parts = answers.split([heads[name].labels.outputs for name in teaching.heads], dim=1)
        losses = teacher_losses_of_heads(
            self._taught_groups, heads, outputs, dict(zip(teaching.heads, parts, strict=True)), teaching.temperature)
        means = losses.mean(dim=1)
        if plain is not None and not self.plain_views.names.isdisjoint(teaching.heads):
            of_plain = self.plain_views.mean(losses, plain)
            means = torch.stack([of_plain[place] if name in self.plain_views.names else means[place]
                                 for place, name in enumerate(teaching.heads)])
        return teaching.weight * (means * torch.stack([weights[name] for name in teaching.heads])).sum()

    def _pseudo_labels(
            self,
            rules: PseudoLabels,
            images: torch.Tensor,
            outputs: dict[str, torch.Tensor],
            target: dict[str, torch.Tensor],
            plain: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The term of the pseudo-labels, and the share of the pool's images that passes (H,).

        `target` are those of the classified rows, the first of which are the labelled images' first views.
        """
        views, heads = images.chunk(self.views)[0], self.heads
        labelled = len(views) - self.pool.batch_size
        first = 0 if rules.needs_labelled else labelled
        teacher = self.get_trainable_module(ema=True)
        if teacher is not None:
            # In evaluation mode: a label depends on no other image of the batch and on no dropout. The statistics
            # of its batch norm are an EMA of the student's, which are over labelled images and pool together.
            model, seen = _unwrapped(teacher).model, views[first:]
            with torch.no_grad():
                parts = [model(part) for part in seen.split(self.micro_batch or len(seen))]
            weak = {name: torch.cat([part[name] for part in parts]) for name in rules.names}
        else:
            # The student in the very pass in which it learns: labelled images and pool are normalised together there.
            weak = {name: outputs[name].chunk(self.views)[0][first:].detach() for name in rules.names}
        made = rules(
            heads,
            {name: output[:labelled - first] for name, output in weak.items()},
            {name: target[name][:labelled - first] for name in rules.names},
            {name: output[labelled - first:] for name, output in weak.items()},
        )
        total, shares = self._weights.new_zeros(()), []
        for weight, (name, head) in zip(self._weights, heads.items(), strict=True):
            passed = total.new_zeros(())
            if name in made:
                weak_pool, threshold = made[name]
                of: float | torch.Tensor = self.pool.batch_size
                if plain is not None and name in self.plain_views.names:
                    learnt = self._unlabelled(plain)[1]
                    weak_pool, of = self.plain_views.teach(weak_pool, learnt), self.plain_views.count(learnt)
                loss, passed = head.pseudo_label_loss(self._unlabelled(outputs[name])[1], weak_pool, threshold)
                total = total + weight * loss / of
                passed = passed.to(total.dtype) / of
            shares.append(passed)
        return self.pool.pseudo_label_weight * self.pseudo_label_ramp * total, torch.stack(shares)


def _unwrapped(module: nn.Module) -> JointModule:
    found = unwrap_model(module)
    assert isinstance(found, JointModule)  # DDP, torch.compile and the EMA wrap nothing else
    return found


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
    if names and not sum(weights.values()):
        raise ValueError('the weights of all heads are 0')
    return {name: float(weights[name]) for name in names}
