"""What all ranks know of a step at the same time, and no host waits for its device to know it."""
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from timm_multilabel.distributed import all_objects, world
from timm_multilabel.loading.batches import Batch, EvalBatches

_LAG = 2  # updates after which a verdict is read on a device that runs behind its host
_VOTES = 20  # of an evaluation, at most


class ToldToStop(Exception):
    """Some rank was told to stop; all ranks raise it after the same vote."""


def until_told(loader: EvalBatches, told: Callable[[], bool]) -> Iterator[Batch]:
    """The batches of a loader, of which ranks may have different numbers, until one of them is told to stop.

    Every so many batches the ranks vote. One that is told goes to its next vote at once, so that they stop between two
    batches where all are told, and else with the next vote.

    Args:
        loader: Brings the batches.
        told: Whether this rank was told to stop.

    Raises:
        ToldToStop: One of them was told.
    """
    def vote() -> None:
        if any(all_objects(told())):
            raise ToldToStop

    steps = max(all_objects(len(loader)))
    votes = min(_VOTES, steps)
    due = deque(steps * number // votes for number in range(1, votes + 1))
    for done, batch in enumerate(loader):
        if due and (done >= due[0] or told()):
            due.popleft()
            vote()
        yield batch
    for _ in due:
        vote()


class UpdateDecision(NamedTuple):
    """What became of an update.

    `step` is its last one. `bad`: the loss or the gradient was not finite on some rank; `bad_here`: the loss was not on
    this one. `stop`: some rank was told to stop.
    """
    step: int
    bad: bool
    bad_here: bool
    stop: bool


class UpdateDecisions:
    """Verdicts on updates, the same on every rank after the same step.

    On a CPU a verdict is read at once. On other devices it is copied to the host in the background and read two updates
    later: until then the device has work, so nobody waits for anybody.

    Args:
        device: The device of the task.
    """

    def __init__(self, device: torch.device):
        self.device, self.lag = device, 0 if device.type == 'cpu' else _LAG
        self.pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def reach(self, step: int, finite: torch.Tensor, finite_here: torch.Tensor, stop: bool) -> torch.Tensor:
        """Tell the others how an update went.

        Args:
            step: The number of the update's last step in its epoch, from 0.
            finite: Whether this rank's loss and gradient are finite, a scalar on the device.
            finite_here: Whether this rank's loss alone is finite, likewise.
            stop: Whether this rank was told to stop.

        Returns:
            Whether all is finite on all ranks, a scalar on the device.
        """
        votes = torch.stack([~finite, torch.full_like(finite, stop)]).float()
        if world()[1] > 1:
            dist.all_reduce(votes)
        told = torch.cat([votes, (~finite_here).float().view(1)])
        event = None
        if self.device.type == 'cuda':
            told, event = told.to('cpu', non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending.append((step, told, event))
        return votes[0] == 0

    def verdicts(self, all_of_them: bool = False) -> list[UpdateDecision]:
        """The verdicts that may be read by now, in order; at the end of an epoch all of them."""
        found = []
        while len(self.pending) > (0 if all_of_them else self.lag):
            step, told, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            bad, stop, bad_here = told.tolist()
            found.append(UpdateDecision(step, bad > 0, bad_here > 0, stop > 0))
        return found
