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
    "image files, folders, quoted globs ('photos/**/*.jpg') or tables with an image column; - reads paths from stdin")


def image_column(help: str, default: str | None = None) -> Any:
    return setting(default, help, metavar='NAME')


def image_root(instead: str = 'looked up from the folder of the table, its parent, and the working directory') -> Any:
    return setting(None, f'folder that the image paths of tables are relative to (default: {instead})', metavar='DIR')


def class_head(default: str | None = 'class') -> Any:
    return setting(default, 'name of the head where there is no table but class folders, such as train/shoes/1.jpg '
                   '(default: class)', metavar='NAME')


def cell_separator(help: str) -> Any:
    return setting(None, help, separator, metavar='CHAR')


def missing_value(help: str) -> Any:
    return setting(None, help, metavar='TEXT')


def tags_between(default: str) -> Any:
    """What is between tags in one column; `default` says what holds without it."""
    return setting(None, f"separator of the tags in a cell, such as ';', or 'whitespace' (default: {default})",
                   tag_separator, metavar='TEXT')


def no_tags() -> Any:
    return setting(None, 'cell text that means no tag applies (an empty cell is a missing label)', none_value,
                   metavar='TEXT')


def heads(help: str) -> Any:
    return setting(None, help, nargs='+', metavar='NAME')


def head(help: str) -> Any:
    """Options of heads: those of several flags, or of a file and a command line, add up."""
    return setting(
        {}, help, nargs='+', metavar=HEAD_METAVAR, read=head_options, read_mapping=head_options_of_mapping,
        merge=lambda before, now: {**before, **now})


def head_module() -> Any:
    return setting(None, 'Python file that defines your own kinds of heads', metavar='FILE')


def allow_hub() -> Any:
    return switch("allow a model named in a config or checkpoint to come from outside timm (hf-hub:...)", both=False)


def weights(what: str) -> Any:
    return setting(
        'best', f'weights to {what}; best is plain or ema, whichever scored better in training (default: best)',
        choices=WEIGHTS)


def batch_size() -> Any:
    return setting(128, 'images per batch', positive, flags=('-b',), metavar='N')


def workers(help: str = 'data loader workers') -> Any:
    return setting(4, help, count, flags=('-j',), metavar='N')


def device(help: str = 'cpu, cuda, ... (default: cuda if available)') -> Any:
    return setting(None, help, metavar='NAME')


def part_rows() -> Any:
    return setting(
        4096, 'images of each part, where --out is a folder; a run that is killed makes its unfinished parts again',
        positive, metavar='N')


def force(help: str = 'overwrite existing files') -> Any:
    return switch(help, both=False)
