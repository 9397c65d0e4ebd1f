"""The one kind of error that commands report without a traceback."""


class UserError(Exception):
    """Something the user can mend: one line that names the file, the row and the way out.

    Commands print the line on standard error and end with exit status 2.
    """

    @property
    def line(self) -> str:
        """The message alone.

        A DataLoader worker raises its error again in the main process with the worker's traceback put before the
        message; the message is then the last line.
        """
        return str(self).strip().splitlines()[-1].removeprefix(f'{__name__}.{type(self).__name__}: ')
