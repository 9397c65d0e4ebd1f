"""Heads fitted on features that stay as they are, for every learning rate and weight decay of a grid at once."""
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from timm_multilabel.errors import UserError
from timm_multilabel.heads import Head
from timm_multilabel.inference.loaded import Progress
from timm_multilabel.labels import LabelSpace

_BETAS, _EPS = (0.9, 0.99), 1e-8  # of Adam
_WIDEST = 4096  # features that are turned onto their principal axes; the time for that grows with the cube
_WARMUP = 0.05  # of the steps
_STEPS, _EPOCHS = 300, 3  # of a fit, at least, where nothing is said

Member = tuple[float, float]
"""Learning rate and weight decay."""


@dataclass(frozen=True)
class Grid:
    """What heads are fitted with.

    Args:
        lrs: Learning rates of Adam, at their highest.
        weight_decays: Factors of half the squared weights in the loss; of matrices, not of biases.
        epochs: Passes over the rows.
        batch_size: Rows of a step.
        seed: Of first weights, the order of the rows and dropout.
    """
    lrs: Sequence[float]
    weight_decays: Sequence[float]
    epochs: int
    batch_size: int
    seed: int

    def steps_per_epoch(self, rows: int) -> int:
        """Batches of a pass over so many rows; their sizes differ by one row at most."""
        return max(1, -(-rows // self.batch_size))

    @property
    def members(self) -> list[Member]:
        """Every learning rate with every weight decay."""
        return list(product(self.lrs, self.weight_decays))


@dataclass(frozen=True)
class Axes:
    """Coordinates `(x - mean) @ turn` of features x: standardised, and turned onto their principal axes.

    The loss of a linear head and the squares of its weights are the same on turned axes; the curvature of the loss is
    near to diagonal there, which is what Adam expects.

    Args:
        mean: Of the features (F,).
        turn: (F, F).
    """
    mean: torch.Tensor
    turn: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> 'Axes':
        """The axes of features (N, F), in float32 at least."""
        mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
        std = torch.where(std > 1e-6 * std.max(), std, 1)
        if features.shape[1] > _WIDEST:
            return cls(mean, (1 / std).diag())
        standard = (features - mean) / std
        _, axes = torch.linalg.eigh(standard.T @ standard)
        return cls(mean, axes / std[:, None])

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The coordinates (N, F) of features (N, F)."""
        return (features - self.mean) @ self.turn

    def fold(self, head: Head) -> Head | None:
        """A head that makes of features what a head makes of their coordinates; None of one that cannot be changed so.

        That is one which features enter through one linear layer, as is found out by trying.
        """
        head = copy.deepcopy(head).eval().double()
        made = copy.deepcopy(head)
        layers = [module for module in made.modules()
                  if type(module) is nn.Linear and module.in_features == len(self.mean)]
        if len(layers) != 1 or layers[0].bias is None:
            return None
        layer, = layers
        with torch.no_grad():
            mean, turn = self.mean.double(), self.turn.double()
            layer.weight.copy_(layer.weight @ turn.T)
            layer.bias.sub_(layer.weight @ mean)
            draws = torch.randn(4, len(mean), generator=torch.Generator().manual_seed(0)).to(mean)
            some = mean + draws / turn.norm(dim=1)  # whose deviations are those of the features
            try:
                wanted, given = head((some - mean) @ turn), made(some)
            except RuntimeError:  # a kind that does not compute in float64
                return None
        return made.float() if torch.allclose(wanted, given, rtol=1e-2, atol=1e-3) else None


class _Loss(nn.Module):
    """The mean loss of a head over the labels of a batch."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total, labels = self.head.loss(self.head(inputs), target)
        return total / labels.clamp(min=1e-6)


def default_epochs(rows: int, batch_size: int) -> int:
    """Passes over so many rows that make `_STEPS` steps, and `_EPOCHS` at least."""
    return max(_EPOCHS, -(-_STEPS * batch_size // max(rows, batch_size)))


class HeadGrid:
    """One head with a set of weights for each of G members of a grid, all of them fitted at once.

    Args:
        head: With its first weights, which all members have, on the device.
        members: The grid.
    """

    def __init__(self, head: Head, members: Sequence[Member]):
        self.loss = _Loss(head)
        weights, self.buffers = stack_module_state([self.loss] * len(members))
        trained = {name for name, value in self.loss.named_parameters() if value.requires_grad}
        self.buffers |= {name: value.detach() for name, value in weights.items() if name not in trained}
        self.weights = {name: value.detach() for name, value in weights.items() if name in trained}
        like = next(iter(self.weights.values()))
        self.lrs, self.decays = (like.new_tensor(values) for values in zip(*members, strict=True))
        self.momentum = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.steps, self.together = 0, True

    def step(self, inputs: torch.Tensor, target: torch.Tensor, factor: float) -> torch.Tensor:
        """A step of Adam of every member on the same batch; their losses (G,) before it.

        Kingma & Ba 2015, "Adam", with the decay in the gradient: what is fitted is the loss with half of the decay
        times the squares of the weights, whatever the learning rate.

        Args:
            inputs: (B, F).
            target: As `LabelSpace.split` gives it.
            factor: Of the learning rates.
        """
        gradients, losses = self._gradients(inputs, target)
        self.steps += 1
        first, second = (1 - beta ** self.steps for beta in _BETAS)
        for name, gradient in gradients.items():  # in place, since memory is what takes the time here
            weights, per_member = self.weights[name], (-1, *[1] * (gradient.ndim - 1))
            if gradient.ndim > 2:
                gradient.addcmul_(weights, self.decays.view(per_member))
            self.momentum[name].lerp_(gradient, 1 - _BETAS[0])
            self.squares[name].mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            size = torch.sqrt(self.squares[name], out=gradient).add_(_EPS * second ** 0.5)
            rates = (-factor * second ** 0.5 / first * self.lrs).view(per_member)
            weights.addcmul_(torch.div(self.momentum[name], size, out=size), rates)
        return losses

    def _gradients(self, inputs: torch.Tensor, target: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradients of all members, (G, ...) by name, and their losses (G,)."""
        def loss(weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
            made: torch.Tensor = functional_call(self.loss, (weights, buffers), (inputs, target))
            return made

        self.loss.train()
        if self.together:
            try:
                gradients, losses = vmap(grad_and_value(loss), randomness='same')(self.weights, self.buffers)
                return {name: value.detach() for name, value in gradients.items()}, losses.detach()
            except Exception:  # whatever the user's kind of head does that has no batched form
                self.together = False
        found = []
        for weights, buffers in self._members():
            leaves = {name: value.requires_grad_() for name, value in weights.items()}
            value = loss(leaves, buffers)
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            found.append((gradients, value.detach()))
        stacked = map(torch.stack, zip(*(gradients for gradients, _ in found), strict=True))
        return dict(zip(self.weights, stacked, strict=True)), torch.stack([value for _, value in found])

    def _members(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Weights and buffers of each member, which share memory with ours."""
        for number in range(len(self.lrs)):
            yield ({name: value[number].detach() for name, value in self.weights.items()},
                   {name: value[number].detach() for name, value in self.buffers.items()})

    def head(self, member: int) -> Head:
        """The head with the weights of one member, in evaluation mode."""
        made = copy.deepcopy(self.loss)
        state = {name: value[member] for name, value in {**self.weights, **self.buffers}.items()}
        with torch.no_grad():
            for name, value in [*made.named_parameters(), *made.named_buffers()]:
                value.copy_(state[name])
        return made.head.eval()


@dataclass(frozen=True)
class Fitted:
    """A head that was fitted.

    Args:
        head: The best of the grid, in evaluation mode; its inputs are features.
        lr: Its learning rate.
        weight_decay: Its weight decay.
        train_loss: The mean loss of its last pass over the rows.
        table: A row for each member of the grid: 'lr', 'weight_decay', the head's metrics and 'loss' on val.
        together: Whether all members were computed at once; otherwise one after the other.
    """
    head: Head
    lr: float
    weight_decay: float
    train_loss: float
    table: list[dict[str, float]]
    together: bool


@dataclass(frozen=True)
class Labelled:
    """Features with labels, on the device.

    Args:
        features: (N, F), float16 or float32.
        targets: (N, W), as `LabelSpace.split` takes them.
    """
    features: torch.Tensor
    targets: torch.Tensor


def fit_heads(
        heads: Mapping[str, Head],
        train: Labelled,
        val: Labelled,
        grid: Grid,
        progress: Progress,
) -> dict[str, Fitted]:
    """Fit each head for all of a grid, and take the member that is best on val by the head's main metric.

    Heads whose features enter through one linear layer are fitted on `Axes`, which are folded into that layer; others
    on the features as they are.

    Args:
        heads: By name, with their first weights, on the device.
        train: What they are fitted on.
        val: What decides.
        grid: Learning rates, weight decays, length.
        progress: Told of each step.

    Raises:
        UserError: No member of the grid gives a finite loss.
    """
    space = LabelSpace(tuple(head.labels for head in heads.values()))
    features = train.features.float()
    axes = Axes.of(features)
    on_axes = {name: axes.fold(head) is not None for name, head in heads.items()}
    turned = axes(features) if any(on_axes.values()) else features
    if all(on_axes.values()):
        del features
    grids = {name: HeadGrid(head, grid.members) for name, head in heads.items()}
    targets = dict(zip(heads, space.split(train.targets), strict=True))
    generator = torch.Generator().manual_seed(grid.seed)
    per_epoch, count = grid.steps_per_epoch(len(turned)), 0
    losses = {name: turned.new_zeros(len(grid.members)) for name in heads}
    for _ in range(grid.epochs):
        for name in heads:
            losses[name].zero_()
        order = torch.randperm(len(turned), generator=generator).to(turned.device)
        for rows in order.tensor_split(per_epoch):
            factor = schedule(count / (grid.epochs * per_epoch))
            inputs = {True: turned[rows], False: turned[:0] if all(on_axes.values()) else features[rows]}
            for name, each in grids.items():
                losses[name] += each.step(inputs[on_axes[name]], targets[name][rows], factor) / per_epoch
            count += 1
            progress.advance()
    found = {}
    scored = val.features.float()
    for name, target in zip(heads, space.split(val.targets), strict=True):
        inputs_of_val = axes(scored) if on_axes[name] else scored
        member, table = choose(name, grids[name], inputs_of_val, target, grid)
        head = grids[name].head(member)
        if on_axes[name]:
            folded = axes.fold(head)
            if folded is None:
                raise UserError(f"head '{name}': its weights have become too large to use; lower --lrs, or leave out "
                                'the least of --weight-decays')
            head = folded
        found[name] = Fitted(head, *grid.members[member], float(losses[name][member]), table, grids[name].together)
    return found


def schedule(done: float) -> float:
    """The factor of the learning rate where a share of the steps is done: a short warm-up, then half a cosine."""
    return min(1.0, done / _WARMUP + 0.1) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def choose(
        name: str,
        fitted: HeadGrid,
        inputs: torch.Tensor,
        target: torch.Tensor,
        grid: Grid,
) -> tuple[int, list[dict[str, float]]]:
    """The best member of a grid by the head's main metric on val, among equals by the loss; and the table of all.

    Raises:
        UserError: No member gives a finite loss.
    """
    kind = fitted.loss.head
    known = kind.labels.known(target)
    table: list[dict[str, float]] = []
    for number, (lr, weight_decay) in enumerate(grid.members):
        head = fitted.head(number)
        output = head(inputs[known])
        total, count = head.eval_loss(output, target[known])
        loss = float(total / count.clamp(min=1e-6))
        metrics: dict[str, float] = dict.fromkeys(head.metric_names, math.nan)
        if len(output) and math.isfinite(loss):
            true = target[known].reshape(len(output), -1).cpu().numpy()
            made = head.metrics(true, head.measure(output).cpu().numpy())
            metrics = {metric: float(made[metric]) for metric in head.metric_names}
        table.append({'lr': lr, 'weight_decay': weight_decay, **metrics, 'loss': loss})
    if not any(math.isfinite(row['loss']) for row in table):
        raise UserError(f"head '{name}': no learning rate gives a finite loss on val; lower --lrs")
    main = kind.metric_names[0]

    def rank(number: int) -> tuple[float, float]:
        row = table[number]
        metric, loss = row[main], row['loss']
        return (-math.inf if math.isnan(metric) else metric, -math.inf if not math.isfinite(loss) else -loss)

    return max(range(len(table)), key=rank), table
