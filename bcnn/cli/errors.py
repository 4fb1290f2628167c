"""The boundary of every command: an error becomes one sentence and an exit code."""

import codecs
import io
import json
import os
import pickle
import sys
import traceback
import zipfile
from collections.abc import Callable

from bcnn.utils.console import error_console, logger, setup_logging
from bcnn.utils.errors import Interruption, UserError, raise_interruptions

FILES = (OSError, pickle.UnpicklingError, zipfile.BadZipFile, json.JSONDecodeError)
EXPECTED = (UserError, ImportError, *FILES)  # ImportError: of a package that is optional
# Known by name, as their libraries take time to import.
NAMES = {
    "DecompressionBombError",
    "SafetensorError",
    "OmegaConfBaseException",
    "HydraException",
    "MisconfigurationException",
}


def exit_code_of(act: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; print an expected error as one sentence.

    Args:
        act: returns an exit code, or None for success. An expected error ends it with 1, Ctrl-C with
            130, SIGTERM with 143. With `--debug` among the words of this process, and for an error that
            is not expected, the traceback is shown.
    """
    debug = "--debug" in sys.argv
    _print_any_text()
    setup_logging()
    raise_interruptions()
    try:
        return act() or 0
    except Interruption as error:
        traceback.clear_frames(error.__traceback__)  # closes the progress bars of what was under way
        error_console.print(f"interrupted ({error})")
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has read enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not _expected(error):
            raise
        traceback.clear_frames(error.__traceback__)
        logger.error(_sentence(error))
        return 1


def _expected(error: Exception) -> bool:
    """Return whether a user's word, a damaged file or a full disk raises such an error."""
    named = any(kind.__name__ in NAMES for kind in type(error).__mro__)
    return named or isinstance(error, EXPECTED) or hasattr(error, "format_message")  # typer's


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return text.strip().partition("\n")[0]


def _print_any_text() -> None:
    """Print any text in any encoding, and each line at once.

    In UTF-8, a file name that is no valid Unicode is written as its bytes. Another encoding shows what
    it lacks as `\\u03bb`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            errors = "surrogateescape" if utf8 else "backslashreplace"
            stream.reconfigure(errors=errors, line_buffering=True)
