"""The errors that commands report without a traceback, and texts of any origin as people can read them."""
import re
from collections.abc import Collection

_LINE = 4000  # letters of a line at most, and of a name in it
_NAME = 80
_NAMES = 20  # of a list of names
_USER = re.compile(r'(?<!abfs)(?<!az)://[^/\s]*@')  # there, it is a container
_QUERY = re.compile(r"""(https?://[^\s?'"]*)\?[^\s'"]*[^\s'"),;:.]""")


class UserError(Exception):
    """Something the user can fix: one line that names the file, the row and the way out.

    Commands print the line on standard error and end with exit status 2.
    """

    @property
    def line(self) -> str:
        """The message alone, on one line whatever the names in it hold.

        A DataLoader worker's error is raised again in the main process with the worker's traceback put before it.
        """
        return one_line(without_secrets(str(self).rpartition(f'{__name__}.{type(self).__name__}: ')[2])).strip()


class DataError(UserError):
    """Tables, images or shards that cannot be read, or are not what training or a checkpoint needs."""


class CheckpointError(UserError):
    """A checkpoint, a run folder, weights or embeddings that cannot be read or do not fit."""


class OutputError(UserError):
    """A file that cannot be written, or is there already."""


class SettingError(UserError):
    """A setting that there is none of, a value that it may not have, or settings that do not go together.

    Args:
        line: The message.
        see_help: Whether the help of the command says more.
    """

    def __init__(self, line: str, see_help: bool = False):
        super().__init__(line)
        self.see_help = see_help


def printable(text: str, keep: str = '') -> str:
    """A text without the characters by which it could do something to a terminal or take several lines.

    Args:
        text: The text.
        keep: Characters that stay although they are not printable, such as a line end.
    """
    if text.isprintable():
        return text
    return ''.join(letter if letter.isprintable() or letter in keep else ' ' for letter in text)


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, as the name of a file of other bytes cannot."""
    return not any('\ud800' <= letter <= '\udfff' for letter in text)


def escaped(path: object) -> str:
    """A path, or any text, as UTF-8 can write it: a byte that it could not is `\\udcff`, as in JSON."""
    return str(path).encode('utf-8', 'backslashreplace').decode()


def shortened(text: str, most: int = _NAME) -> str:
    """A name for people to read: printable, and its end replaced by an ellipsis where it is longer than `most`."""
    return printable(text) if len(text) <= most else printable(text[:most - 1]) + '\u2026'


def abbreviated(text: str, most: int) -> str:
    """A name for people to read, its middle replaced by an ellipsis where it is longer: ends tell names apart, too."""
    return printable(text) if len(text) <= most else shortened(text, (most + 1) // 2) + printable(text[-(most // 2):])


def without_secrets(text: str) -> str:
    """A text with addresses in it, without the user in them, and of signed links without the query that signs them."""
    return _QUERY.sub(r'\1?...', _USER.sub('://...@', text)) if '://' in text else text


def listed(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    shown = [shortened(name) for name, _ in zip(names, range(_NAMES))]
    more = len(names) - len(shown)
    return ', '.join(shown) + (f' and {more:,} more' if more else '')


def one_line(text: str) -> str:
    """A message as a single printable line; the middle of a very long one is left out."""
    if len(text) > _LINE:
        text = f'{text[:_LINE // 2]} \u2026 {text[-_LINE // 2:]}'
    return printable(text)
