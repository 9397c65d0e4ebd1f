"""What the program tells while it works: lines through `logging`, under `timm_multilabel`, of the first rank alone."""
import logging
from collections.abc import Callable

from timm_multilabel.distributed import world
from timm_multilabel.errors import one_line

logger = logging.getLogger('timm_multilabel')

Say = Callable[[str], None]
"""What tells a line."""


def say(line: str) -> None:
    """Tell a line, which stays one whatever the names in it hold."""
    if world()[0] == 0:
        logger.info('%s', one_line(line))


def silent(line: str) -> None:
    """Tell nothing."""
