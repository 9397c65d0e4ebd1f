"""What a person sees of an epoch: a bar on a terminal, a line now and then elsewhere."""
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from tqdm.auto import tqdm
from tqdm.utils import disp_len

from timm_multilabel.errors import one_line
from timm_multilabel.log import logger
from timm_multilabel.progress import OFF_TERMINAL

_COLUMNS = 100  # of a line where the output is no terminal
_BAR = 37  # columns of a progress bar and its times, beside the title, the numbers of steps and the metrics


def line_width() -> int:
    """Columns that a line may take: those of the terminal, or 100 where the output goes elsewhere."""
    return shutil.get_terminal_size((_COLUMNS, 24)).columns


def fitted(items: Sequence[str], width: int, between: str = '  ') -> str:
    """Items on one line of `width` columns at most; the last ones as '+9 more' where not all fit, never the first."""
    line = between.join(items)
    if disp_len(line) <= width:
        return line
    kept, used = 0, len(f'+{len(items)} more')
    for item in items:
        used += disp_len(item) + len(between)
        if used > width:
            break
        kept += 1
    kept = max(1, kept)
    return between.join([*items[:kept], f'+{len(items) - kept} more'] if kept < len(items) else items)


def wrapped(items: Sequence[str], width: int) -> list[str]:
    """Items on as many lines of `width` columns as they need; an item is broken only where it is wider than a line."""
    text = '  '.join(item.replace(' ', '\xa0') for item in items)  # of which textwrap makes one word
    lines = textwrap.wrap(text, width, subsequent_indent='  ', break_on_hyphens=False)
    return [line.replace('\xa0', ' ') for line in lines]


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


class ProgressBar:
    """A bar over the steps of an epoch, silent where `visible` is false (all ranks but the first).

    Args:
        title: What is going on, e.g. 'Epoch 3/100 + 10 of cooldown'.
        steps: Steps of the whole epoch.
        visible: Whether to show anything; only one rank should.
        images_per_step: Images of a step, over all ranks.
        first: Steps that an earlier run has done.
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
            disable=OFF_TERMINAL if visible else True,
        )
        self.started = time.perf_counter()

    def __enter__(self) -> 'ProgressBar':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def show(self, step: int, metrics: Sequence[str]) -> None:
        """Show metrics and speed after a step: beside the bar, or as a line of their own.

        Args:
            step: Steps that are done, those of an earlier run included.
            metrics: Texts such as 'color 33.3%', the most important ones first; those that do not fit are counted.
        """
        elapsed = time.perf_counter() - self.started
        speed = f'{(step - self.first) * self.images_per_step / elapsed:.0f} images/s'
        metrics = [one_line(metric) for metric in metrics]
        if not self.bar.disable:
            taken = disp_len(self.title) + 2 * len(str(self.steps)) + _BAR + len(speed)
            self.bar.set_postfix_str(f'{fitted(metrics, line_width() - taken)}  {speed}')
        elif self.visible:
            first = f'{self.title}  step {step}/{self.steps}'
            left = f'left {tqdm.format_interval(elapsed / (step - self.first) * (self.steps - step))}'
            taken = sum(disp_len(part) + 2 for part in (first, speed, left))
            logger.info('%s', f'{first}  {fitted(metrics, line_width() - taken)}  {speed}  {left}')

    def say(self, line: str) -> None:
        """Tell a line that stays."""
        if self.visible:
            with tqdm.external_write_mode():
                logger.info('%s', one_line(line))
