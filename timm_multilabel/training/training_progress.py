"""A place in a run: an epoch, a step in it, and what has added up until then."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from timm_multilabel.distributed import all_objects, world
from timm_multilabel.metrics import TrainingMeter
from timm_multilabel.task import JointTask


@dataclass
class TrainingProgress:
    """Where a run is, or goes on.

    Args:
        epoch: The epoch, from 0.
        step: The batches of it that are done.
        lr: The learning rate that the epoch began with.
        skipped_updates: What `Trainer` counts of updates that were skipped.
        mine: Of this rank, the sums of the epoch's metrics and the buffers of the weights and of their EMA, which DDP
            makes alike only at the next step.
    """
    epoch: int
    step: int = 0
    lr: float = 0.0
    skipped_updates: float = 0.0
    mine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls, epoch: int, step: int, lr: float, meter: TrainingMeter, task: JointTask) -> 'TrainingProgress':
        """The place after a step."""
        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to('cpu', copy=True)

        sums = {name: copy(tensor) for name, tensor in meter.state().items()}
        mine = {'meter': sums, 'buffers': [[copy(each) for each in module.buffers()] for module in _modules(task)]}
        return cls(epoch, step, lr, mine=mine)

    def to_dict(self, steps: int) -> dict[str, Any]:
        """What a checkpoint holds of it, of all ranks; all of them call it. `steps` are the batches of an epoch."""
        return {'step': self.step, 'steps': steps, 'lr': self.lr, 'ranks': all_objects(self.mine)}

    @classmethod
    def of(cls, state: dict[str, Any], steps: int) -> 'TrainingProgress':
        """The place that a checkpoint goes on at: the end of its epoch, or the step where it was saved.

        Where an epoch has another number of steps now, it is the one at which the same share of it is done.
        """
        skipped_updates = state.get('run', {}).get('strikes', 0.0)
        within = state.get('within')
        if within is None:
            return cls(state['epoch'] + 1, skipped_updates=skipped_updates)
        rank, ranks = world()
        theirs = within['ranks']
        step = within['step'] * steps // within['steps']
        if len(theirs) == ranks:
            return cls(state['epoch'], step, within['lr'], skipped_updates, theirs[rank])
        mine = {'meter': TrainingMeter.join([each['meter'] for each in theirs])} if rank == 0 else {}
        return cls(state['epoch'], step, within['lr'], skipped_updates, mine)

    def fits(self, task: JointTask) -> bool:
        """Whether what has added up is of such a task."""
        sums = TrainingMeter(task.terms, task.heads, torch.device('cpu')).state()
        ours = [sums] * ('meter' in self.mine) + [
            dict(enumerate(module.buffers())) for module in _modules(task)] * ('buffers' in self.mine)
        theirs = [self.mine[name] for name in ('meter',) if name in self.mine] + [
            dict(enumerate(buffers)) for buffers in self.mine.get('buffers', [])]
        return [_shapes(each) for each in ours] == [_shapes(each) for each in theirs]

    def restore(self, meter: TrainingMeter, task: JointTask) -> None:
        """Bring back what has added up."""
        if 'meter' in self.mine:
            meter.load(self.mine['meter'])
        with torch.no_grad():
            for module, values in zip(_modules(task), self.mine.get('buffers', [])):
                weights = {id(value) for value in module.state_dict(keep_vars=True).values()}
                for buffer, value in zip(module.buffers(), values, strict=True):
                    if id(buffer) in weights:  # others, such as class weights, are of the flags
                        buffer.copy_(value)


def _shapes(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _modules(task: JointTask) -> list[torch.nn.Module]:
    modules = [task.get_trainable_module(), task.get_trainable_module(ema=True)]
    return [module for module in modules if module is not None]
