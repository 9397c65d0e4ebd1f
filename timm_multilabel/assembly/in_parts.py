"""Work on many images in parts: each process makes its share of the parts that are missing."""
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from tqdm.auto import tqdm

from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import OutputError, UserError
from timm_multilabel.inference.embeddings import bad_of
from timm_multilabel.inference.loaded import LoadedModel, reason_of
from timm_multilabel.inference.parts import Manifest, PartsFolder, Plan, digest_of_images
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.log import logger, say
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.training.run_folder import RunLock

_LOOK = 2.0  # seconds between looks at what other processes have done
_PATIENCE = 3600.0  # seconds without a new part of another process
_TELL = 60.0  # seconds between lines where there is no terminal


class Work(Protocol):
    """What is made of images, a batch at a time."""

    def batches(self, part: ImageDataset, block: int) -> Iterator[Any]:
        """What is made of each batch, something that has a length; no batch has images of two blocks of so many."""

    def table(self, part: ImageDataset, made: Sequence[Any], rows: slice) -> Any:
        """A table of pyarrow of what was made of some rows of a part."""


def write_in_parts(
        folder: Path,
        read: Callable[[], Rows],
        plan: Callable[[int, str], Plan],
        loaded: LoadedModel,
        work: Work,
        force: bool,
) -> Manifest | None:
    """Make the parts that are missing, each process its share of them, and the manifest when all are there.

    Args:
        folder: Where they are written.
        read: Reads all images.
        plan: What the parts are of, by the number of images and `digest_of_images`.
        loaded: The model.
        work: What is made of images.
        force: Start anew.

    Returns:
        The manifest; None on ranks other than the first.

    Raises:
        UserError: The processes see different images, the folder is of something else or not on all machines, an
            output is not finite, or no image can be read.
    """
    (rank, ranks), rows = world(), read()
    parts = PartsFolder(folder, plan(len(rows), digest_of_images(rows.images)))
    if len(set(all_objects(parts.plan.key))) > 1:
        raise UserError(
            'the processes do not see the same images or checkpoint; put them where all machines see them')
    restarted = any(all_objects(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))))
    with closing(RunLock()) as lock:
        done: set[int] = set()
        wrong: str | None = None
        if rank == 0:
            try:
                if not folder.is_file():
                    lock.take(folder, 'another process writes parts to this folder; wait for it, or name another')
                done = parts.start(force and not restarted)
            except UserError as error:
                wrong = error.line
            if done:
                say(f'{folder}: {len(done):,} of {parts.plan.parts:,} parts are there already')
        done, wrong = all_objects((done, wrong))[0]
        if wrong is not None:
            raise OutputError(wrong)
        parts.wait_for_plan()
        # From here on no process waits for another: one that is slow, or on a slow machine, is no error of the network.
        if dist.is_initialized():
            dist.destroy_process_group()
        todo = [part for part in range(parts.plan.parts) if part not in done][rank::ranks]
        mine = [np.array(parts.plan.rows(part)) for part in todo]
        rows = rows.take(np.concatenate(mine) if mine else np.arange(0))  # those of others need no memory
        with closing(PartsProgress(parts, visible=rank == 0)) as progress:
            if todo:
                _make(parts, todo, loaded.part(rows, keep_bad=True), work, progress)
            # All stay until all are done: the launcher of a machine whose processes end early ends the others.
            progress.wait(_LOOK if rank else _LOOK / 4)
        return None if rank else parts.finish()


def _make(parts: PartsFolder, todo: Sequence[int], part: ImageDataset, work: Work, progress: 'PartsProgress') -> None:
    """Make some parts in one pass over their images, which `part` has one after the other."""
    batches, first = work.batches(part, parts.plan.part_rows), 0
    for number in todo:
        here = slice(first, first + len(parts.plan.rows(number)))
        made: list[Any] = []
        while first < here.stop:
            made.append(next(batches))
            first += len(made[-1])
            progress.advance(first - here.start)
        reasons = [reason_of(part, here.start + int(place)) for place in np.flatnonzero(bad_of(part)[here])]
        parts.write(number, work.table(part, made, here), reasons)


class PartsProgress:
    """A bar over all images, or a line a minute where there is no terminal.

    Args:
        parts: The folder in which the parts of all processes appear.
        visible: Whether to show anything; only one process should.
    """

    def __init__(self, parts: PartsFolder, visible: bool):
        self.parts, self.title, self.visible = parts, parts.plan.command.capitalize(), visible
        self.first = self._rows(parts.present()) if visible else 0
        self.bar = tqdm(
            total=parts.plan.images, initial=self.first, desc=self.title, unit=' images', dynamic_ncols=True,
            leave=False, disable=OFF_TERMINAL if visible else True)
        self.started = self.looked = self.told = time.monotonic()

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()

    def _rows(self, present: Iterable[int]) -> int:
        return sum(len(self.parts.plan.rows(part)) for part in present)

    def advance(self, images: int) -> None:
        """So many images of a part that is not finished are done."""
        if self.visible and time.monotonic() - self.looked >= _LOOK:
            self.look(images)

    def wait(self, seconds: float) -> None:
        """Look every so many seconds until all parts are there.

        Raises:
            OutputError: None has come for an hour.
        """
        parts, since = -1, time.monotonic()
        while not self.look():
            if len(self.parts.present()) != parts:
                parts, since = len(self.parts.present()), time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                raise OutputError(f'--out {self.parts.path}: no new part for an hour, so another machine has failed; '
                                  'run the same command once more')
            time.sleep(seconds)

    def look(self, images: int = 0) -> bool:
        """Show how many images are done; whether all parts are there."""
        now, plan = time.monotonic(), self.parts.plan
        present = self.parts.present()
        done, self.looked = min(plan.images, self._rows(present) + images), now
        self.bar.n = done
        self.bar.refresh()
        if self.visible and self.bar.disable and now - self.told >= _TELL:
            self.told, speed = now, max(1e-9, (done - self.first) / (now - self.started))
            logger.info('%s', f'{self.title}  {done:,}/{plan.images:,} images  {speed:.0f} images/s  left '
                        f'{tqdm.format_interval((plan.images - done) / speed)}')
        return len(present) == plan.parts
