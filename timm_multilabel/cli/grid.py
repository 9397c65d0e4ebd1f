"""`timm-multilabel grid`."""
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from timm_multilabel.api.grid import run_grid
from timm_multilabel.cli.output import say
from timm_multilabel.cli.parser import Parser, make_parser
from timm_multilabel.config.commands import GridSettings
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import UserError


def run(settings: GridSettings) -> None:
    """Run the experiment, and print its tables."""
    with stopping():
        made = run_grid(settings, parse_training_flags(settings.flags))
    print(made.tables)
    say(f'Wrote {", ".join(map(str, made.files[-2:]))}', sys.stderr)


class _StrictParser(Parser):
    """Its errors are raised."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'--flags: {message}')


def parse_training_flags(words: list[str]) -> Mapping[str, Any]:
    """What flags of training say, as checked values by name.

    Raises:
        UserError: They are none.
    """
    parser = make_parser(TrainSettings, 'timm-multilabel train', _StrictParser, positionals=False)
    return vars(parser.parse_args(words))


@contextmanager
def stopping() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP are as Ctrl-C, so that runs are told whatever stops this."""
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup wants it to go on
        signals.append(signal.SIGHUP)
    before = {each: signal.signal(each, signal.default_int_handler) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
