"""The one kind of error that commands report without a traceback, and names and labels as messages show them."""
from collections.abc import Collection

_LETTERS = 40  # of a name or a label
_NAMES = 20  # of a list of names


class UserError(Exception):
    """Something the user can mend: one line that names the file, the row and the way out.

    Commands print the line on standard error and end with exit status 2.
    """

    @property
    def line(self) -> str:
        """The message alone, on one line whatever the names in it hold.

        A DataLoader worker's error is raised again in the main process with the worker's traceback put before it.
        """
        text = str(self).rpartition(f'{__name__}.{type(self).__name__}: ')[2]
        return printable(text).strip()


def printable(text: str) -> str:
    """A text without the characters by which it could do something to a terminal or take several lines."""
    return ''.join(letter if letter.isprintable() else ' ' for letter in text)


def shortened(text: str, letters: int = _LETTERS) -> str:
    """A text of a length that fits into a line, its end left out."""
    return text if len(text) <= letters else f'{text[:letters - 3]}...'


def listed(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    shown = [shortened(name) for name, _ in zip(names, range(_NAMES))]
    more = len(names) - len(shown)
    return ', '.join(shown) + (f' and {more:,} more' if more else '')
