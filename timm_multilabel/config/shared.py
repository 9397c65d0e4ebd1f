"""Settings that several commands have: one place for their flags, defaults and helps."""
from typing import Any

from timm_multilabel.config.settings import setting, switch
from timm_multilabel.config.values import (
    count,
    head_options,
    head_options_of_mapping,
    none_value,
    positive,
    separator,
    tag_separator,
)

HEAD_METAVAR = 'HEAD:NAME=VALUE,...'
WEIGHTS = ('best', 'plain', 'ema')
"""Which weights of a checkpoint: those that made it what it is, or by name."""
IMAGES_HELP = (
    "files, folders, globs in quotes ('photos/**/*.jpg'), CSVs with an image column; - for paths on standard input")


def image_column(help: str, default: str | None = None) -> Any:
    return setting(default, help, metavar='NAME')


def cell_separator(help: str) -> Any:
    return setting(None, help, separator, metavar='CHAR')


def missing_value(help: str) -> Any:
    return setting(None, help, metavar='TEXT')


def tags_between(default: str) -> Any:
    """What is between tags in one column; `default` says what holds without it."""
    return setting(None, f"what is between the tags of a cell, such as ';', or 'whitespace' (default: {default})",
                   tag_separator, metavar='TEXT')


def no_tags() -> Any:
    return setting(None, 'a cell of tags that means none of them, where an empty one is a missing label', none_value,
                   metavar='TEXT')


def heads(help: str) -> Any:
    return setting(None, help, nargs='+', metavar='NAME')


def head(help: str) -> Any:
    """Options of heads: those of several flags, or of a file and a command line, add up."""
    return setting(
        {}, help, nargs='+', metavar=HEAD_METAVAR, read=head_options, read_mapping=head_options_of_mapping,
        merge=lambda before, now: {**before, **now})


def head_module() -> Any:
    return setting(None, 'Python file with kinds of heads of your own', metavar='FILE')


def allow_hub() -> Any:
    return switch("let a model that a file names, and that is not timm's own, be looked up (hf-hub:...)", both=False)


def weights(what: str) -> Any:
    return setting('best', f'weights to {what} (default: those that made the checkpoint what it is)', choices=WEIGHTS)


def batch_size() -> Any:
    return setting(128, 'images a batch', positive, flags=('-b',), metavar='N')


def workers(help: str = 'loader processes') -> Any:
    return setting(4, help, count, flags=('-j',), metavar='N')


def device(help: str = 'cpu, cuda, ... (default: cuda where there is one)') -> Any:
    return setting(None, help, metavar='NAME')


def force(help: str = 'overwrite what is there') -> Any:
    return switch(help, both=False)
