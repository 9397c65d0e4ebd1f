"""What a person sees of an epoch: a bar on a terminal, a line now and then elsewhere."""
import time
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm

from timm_multilabel.errors import one_line


@dataclass(frozen=True)
class RunLength:
    """The epochs of a run or of one of its phases, written as '100 epochs + 10 of cooldown'.

    Args:
        schedule: Epochs of the learning rate's schedule.
        cooldown: Epochs at the least rate after them.
    """
    schedule: int
    cooldown: int = 0

    def __str__(self) -> str:
        return f'{self.schedule} epoch{"s" * (self.schedule > 1)}{self._cooldown}'

    @property
    def _cooldown(self) -> str:
        return f' + {self.cooldown} of cooldown' if self.cooldown else ''

    def title(self, epoch: int) -> str:
        """What an epoch, counted from 0, is called: 'Epoch 3/100 + 10 of cooldown', 'Epoch 104/110, cooldown 4/10'."""
        past = epoch + 1 - self.schedule
        if past <= 0:
            return f'Epoch {epoch + 1}/{self.schedule}{self._cooldown}'
        return f'Epoch {epoch + 1}/{self.schedule + self.cooldown}, cooldown {past}/{self.cooldown}'


class Progress:
    """Progress over the steps of an epoch, silent where `visible` is false (all ranks but the first).

    Args:
        title: What is going on, e.g. 'Epoch 3/100 + 10 of cooldown'.
        steps: Number of steps.
        visible: Show anything.
        images_per_step: Images of a step, over all ranks.
        first: Steps that are done already.
    """

    def __init__(self, title: str, steps: int, visible: bool, images_per_step: int = 0, first: int = 0):
        title = one_line(title)
        self.title, self.steps, self.visible, self.images_per_step = title, steps, visible, images_per_step
        self.first = first
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=title,
            bar_format='{desc} {bar:12} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}',
            dynamic_ncols=True,
            leave=False,
            disable=None if visible else True,  # None: only on a terminal
        )
        self.started = time.perf_counter()

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def show(self, step: int, figures: str) -> None:
        """Show figures and speed after a step: beside the bar, or as a line of their own."""
        elapsed = time.perf_counter() - self.started
        figures = one_line(figures) + f'  {(step - self.first) * self.images_per_step / elapsed:.0f} images/s'
        if not self.bar.disable:
            self.bar.set_postfix_str(figures)
        elif self.visible:
            left = tqdm.format_interval(elapsed / (step - self.first) * (self.steps - step))
            print(f'{self.title}  step {step}/{self.steps}  {figures}  left {left}', flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.visible:
            tqdm.write(one_line(line))
