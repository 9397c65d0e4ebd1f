"""Which weights a phase of a recipe starts from."""
from collections.abc import Sequence
from pathlib import Path

from timm_multilabel.config.train import Phase
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import Checkpoint, of_task, read_checkpoint
from timm_multilabel.training.run_folder import phase_folder


class Starts:
    """The weights that phases start from; those that no later phase needs are not held.

    Args:
        phases: All phases.
        initial: The checkpoint that the run starts from, if any.
        folder: The run folder, where phases that are done have left their final weights; None in a new run.
    """

    def __init__(self, phases: Sequence[Phase], initial: Checkpoint | None, folder: Path | None = None):
        self._names = [each.name for each in phases]
        self._named = [each.settings.backbone.start_from for each in phases]
        self._held: dict[str, Checkpoint | None] = {'initial': initial}
        self._folder = folder

    def of(self, index: int) -> Checkpoint | None:
        """What a phase starts from; None for the model's own first weights.

        Raises:
            CheckpointError: The run folder lacks the final weights of the phase that it names.
        """
        name = self._source(index)
        if name not in self._held and self._folder is not None:
            place = phase_folder(self._folder, self._names, self._names.index(name)) / 'last.pth.tar'
            self._held[name] = read_checkpoint(place)
        start = self._held[name]
        self._forget(index + 1)
        return start

    def done(self, index: int, task: JointTask) -> None:
        """Hold the weights of a phase that is done, if a later one starts from it."""
        name = self._names[index]
        if name in map(self._source, range(index + 1, len(self._names))):
            self._held[name] = of_task(task, f"phase '{name}'")

    def _source(self, index: int) -> str:
        return self._named[index] or (self._names[index - 1] if index else 'initial')

    def _forget(self, after: int) -> None:
        needed = set(map(self._source, range(after, len(self._names))))
        self._held = {name: held for name, held in self._held.items() if name in needed}
