"""Arguments of the `python -m bcnn.*` commands: `key=value`, as `train.py` takes them, and paths."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bcnn.errors import UserError

T = TypeVar("T")

REQUIRED: Any = MISSING  # default of an option that has to be given


def command(
    kind: type[T], act: Callable[[T], int], usage: str, arguments: Sequence[str] | None = None
) -> int:
    """Do `act` with the options given on the command line.

    Args:
        kind: a dataclass; its fields are the options. Words that are no `key=value` go to its field
            `paths`, if it has one (a path with a "=" in it: `./a=b.jpg`).
        act: returns the exit code. A `UserError` is printed as one sentence, with exit code 1.
        usage: printed by `--help`.
        arguments: default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(usage.strip())
        return 0
    try:
        return act(_parse(kind, words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(kind: type[T], words: Sequence[str]) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    pairs = [word for word in words if word.partition("=")[0].isidentifier() and "=" in word]
    paths = [word for word in words if word not in pairs]
    if paths and "paths" not in names:
        raise UserError(f"{paths[0]} is not an option: write NAME=VALUE, see --help")
    for pair in pairs:
        if (name := pair.partition("=")[0]) not in names - {"paths"}:
            raise UserError(f"there is no option {name} ({pair}): see --help")
    options = OmegaConf.structured(kind)
    try:
        options = OmegaConf.merge(options, OmegaConf.from_dotlist(pairs))
        if "paths" in names:
            options.paths = paths
    except OmegaConfBaseException as error:
        raise UserError(f"{str(error).splitlines()[0]}; see --help") from error
    missing = sorted(OmegaConf.missing_keys(options))
    if missing:
        raise UserError(f"{missing[0]}=… is needed: see --help")
    return OmegaConf.to_object(options)  # type: ignore[return-value]
