"""Libraries that only some data need."""
from importlib import import_module
from types import ModuleType

from timm_multilabel.errors import DataError


def find_library(name: str) -> ModuleType:
    """Import a library that only some data need.

    Raises:
        DataError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        extra = {'webdataset': 'webdataset', 'openpyxl': 'excel'}.get(name, 'parquet')
        raise DataError(
            f"{name} cannot be imported ({error}), and these data need it: pip install '.[{extra}]'"
        ) from error
