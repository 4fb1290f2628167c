"""Backbones and poolings by name: the name is that of the file, which holds one class of the kind."""

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from bcnn.utils.errors import UserError

T = TypeVar("T", bound=nn.Module)


def names(package: ModuleType) -> list[str]:
    """What a package has to choose from."""
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def find(package: ModuleType, kind: type[T], name: str) -> type[T]:
    """The class of that kind in the file `name` of a package.

    Raises:
        UserError: there is no such file. No other code is imported, whatever a checkpoint says.
    """
    if name not in names(package):
        noun = kind.__name__.lower()
        raise UserError(f"there is no {noun} {name}: choose from {', '.join(names(package))}")
    module = import_module(f"{package.__name__}.{name}")
    return next(
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, kind) and each.__module__ == module.__name__
    )


def make(package: ModuleType, kind: type[T], name: str, *arguments: Any, **options: Any) -> T:
    """One of that class.

    Raises:
        UserError: there is no such class, or it takes no such option.
    """
    made = find(package, kind, name)
    try:
        inspect.signature(made).bind(*arguments, **options)
    except TypeError as error:
        raise UserError(f"the {kind.__name__.lower()} {name}: {error}") from error
    return made(*arguments, **options)
