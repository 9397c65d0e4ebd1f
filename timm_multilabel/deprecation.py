"""Earlier names of what users' code defines or reads: they work for two minor releases, with a `FutureWarning`.

A class that had an attribute renamed keeps `old = RenamedAttribute('new')`, for code that reads it, and calls
`take_earlier_names` in `__init_subclass__`, for subclasses that define it.
"""
import warnings
from typing import Any


class RenamedAttribute:
    """The earlier name of a class attribute: reading it gives the value of the new one, with a warning.

    Args:
        new: The new name.
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        _warn(owner, self.name, self.new, stacklevel=3)
        return getattr(owner if instance is None else instance, self.new)


def take_earlier_names(subclass: type) -> None:
    """Give a subclass the new names of what it defines under earlier ones, with a warning for each."""
    for base in subclass.__mro__[1:]:
        for name, renamed in vars(base).items():
            if isinstance(renamed, RenamedAttribute) and name in vars(subclass) and renamed.new not in vars(subclass):
                _warn(subclass, name, renamed.new, stacklevel=4)
                setattr(subclass, renamed.new, vars(subclass)[name])


def _warn(owner: type, old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{owner.__name__}: '{old}' is now called '{new}'; the earlier name works for two minor releases",
                  FutureWarning, stacklevel=stacklevel)
