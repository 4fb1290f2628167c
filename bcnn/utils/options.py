"""Words of the command line: `key=value` and paths of the verbs, and text for `train`."""

import codecs
import io
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from bcnn.utils.errors import UserError
from bcnn.utils.interruption import Interruption, raise_interruptions
from bcnn.utils.terminal import say

T = TypeVar("T")

# Options of training that are text, which Hydra's grammar reads as a number or a list where it can.
TEXTS = ("data.root", "data.list", "ckpt", "output", "model.weights")


def command(
    kind: type[T], act: Callable[[T], int], usage: str, arguments: Sequence[str] | None = None
) -> int:
    """Do `act` with the options given on the command line.

    Args:
        kind: a dataclass; its fields are the options, those without a default have to be given. A value
            is read as the field's type (a key of `READERS`), where that is optional `null` as None.
            Words that are no `key=value` go as they are to its field `paths`, if it has one (a path
            with a "=" in it: `./a=b.jpg`).
        act: returns the exit code. A `UserError` is printed as one sentence, with exit code 1; Ctrl-C
            ends it with 130, SIGTERM with 143.
        usage: printed by `--help`.
        arguments: default: those of the process.
    """
    print_any_text()
    raise_interruptions()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(as_called(usage.strip()))
        return 0
    try:
        return act(_parse(kind, words))
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # what was under way there ends: its bar
        say(f"error: {as_called(str(error))}", file=sys.stderr)
        return 1
    except Interruption as error:
        traceback.clear_frames(error.__traceback__)
        print(f"interrupted ({error}): files are whole or absent", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # who read what it printed has read enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def program(verb: str) -> list[str]:
    """The words that begin a command with this verb, for the user to type as they typed this one."""
    called = Path(sys.argv[0])
    if called.stem == "bcnn":
        there = shutil.which("bcnn")
        return ["bcnn" if there and Path(there).samefile(called) else str(called), verb]
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if called.parts[-2:] == ("bcnn", "__main__.py"):
        return [python, "-m", "bcnn", verb]
    return [python, sys.argv[0]] if verb == "train" else [python, "-m", f"bcnn.{verb}"]


def as_called(text: str) -> str:
    """The text with commands as the user types them: `bcnn VERB` or `python -m bcnn.VERB`."""
    tool = Path(sys.argv[0]).stem == "bcnn"
    return text.replace("python -m bcnn.", "bcnn ") if tool else text


def print_any_text() -> None:
    """Let standard output and error take any text, whatever their encoding, and show lines at once.

    A character that they have no code for is written as `\\uXXXX`, a byte of a file name that is no
    valid Unicode as that byte.
    """
    codecs.register_error("bcnn", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bcnn", line_buffering=True)


def literal(word: str, sweep: bool) -> str:
    """An argument of training in which Hydra reads the text options (`TEXTS`) as they were typed.

    Args:
        word: left alone if it is another option, or its value is null, quoted or has a `${`.
        sweep: the command is a sweep: `a,b`, `choice(a,b)` and the like are left alone, too.
    """
    name, _, text = word.partition("=")
    if name.lstrip("+") not in TEXTS or not text or text[0] in "'\"" or "${" in text:
        return word

    from hydra.core.override_parser.overrides_parser import OverridesParser  # takes a while
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        if override.value() in (text, None) or (sweep and override.is_sweep_override()):
            return word
    except HydraException:  # not in its grammar
        pass
    return f"{name}={QuotedString(text, Quote.double).with_quotes()}"


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1  # one by one: what cannot be encoded may be of both kinds
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _parse(kind: type[T], words: Sequence[str]) -> T:
    types = get_type_hints(kind)
    takes_paths = types.pop("paths", None) is not None
    pairs = [word for word in words if word.partition("=")[0].isidentifier() and "=" in word]
    paths = [word for word in words if word not in pairs]
    if paths and not takes_paths:
        raise UserError(f"{paths[0]} is not an option: write NAME=VALUE, see --help")

    given: dict[str, Any] = {"paths": paths} if takes_paths else {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in types:
            raise UserError(f"there is no option {name} ({pair}): see --help")
        if name in given:
            raise UserError(f"{name}=… is given twice: give it once")
        given[name] = _read(name, types[name], text)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise UserError(f"{field.name}=… is needed: see --help")
    return kind(**given)


def _read(name: str, hint: Any, text: str) -> Any:
    """The value of an option.

    Raises:
        UserError: `text` is none of the type `hint`.
    """
    optional = type(None) in get_args(hint)
    if optional and text == "null":
        return None
    read, expected = READERS[get_args(hint)[0] if optional else hint]
    try:
        return read(text)
    except ValueError as error:
        expected += " or null" if optional else ""
        raise UserError(f"{name}={text}: expected {expected}; see --help") from error


def _path(text: str) -> Path:
    if not text:
        raise ValueError
    return Path(os.path.expanduser(text))  # Path's own raises for a user that there is not


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _bool(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.removeprefix("[").removesuffix("]").split(",")]


READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "text"),
    Path: (_path, "a file or folder"),
    int: (int, "a whole number"),
    float: (_finite, "a number"),
    bool: (_bool, "true or false"),
    list[int]: (_integers, "whole numbers, as 500,1000"),
}
