"""The one kind of error that commands report without a traceback."""


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
