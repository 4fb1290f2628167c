"""The boundary of every command: an error becomes one sentence and an exit code."""

import codecs
import io
import os
import sys
import traceback
from collections.abc import Callable

from bcnn.utils.console import error_console, logger, setup_logging
from bcnn.utils.errors import Interruption, raise_interruptions

# By name, as the libraries take time to import.
EXPECTED = {
    *("UserError", "OSError", "ImportError", "UnpicklingError", "BadZipFile", "JSONDecodeError"),
    *("DecompressionBombError", "SafetensorError", "OmegaConfBaseException", "HydraException"),
    *("MisconfigurationException", "ClickException"),
}

NO_SHARED_MEMORY = (
    "/dev/shm is too small for data-loading processes: add data.num_workers=0 (predict: --workers 0), "
    "or start the container with a larger --shm-size"
)
LOST_RANK = "another process of this run has ended, and this one with it"


def exit_code_of(act: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: its own, 1 for an error, 130 for Ctrl-C, 143 for SIGTERM.

    An expected error is printed as one sentence; others, and all with `--debug`, are raised.
    """
    for stream in (sys.stdout, sys.stderr):  # any text, as UTF-8 or escapes, and each line at once
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            errors = "surrogateescape" if utf8 else "backslashreplace"
            stream.reconfigure(errors=errors, line_buffering=True)
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
        if "--debug" in sys.argv or not (sentence := _sentence(error)):
            raise
        traceback.clear_frames(error.__traceback__)
        logger.error(sentence)
        return 1


def _sentence(error: Exception) -> str:
    """Return a sentence on an expected error; "" on others."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    of_torch = str(error) if type(error) is RuntimeError else ""
    if "shared memory" in of_torch:
        return NO_SHARED_MEMORY
    if "gloo" in of_torch or "DistError" in kinds:
        return LOST_RANK
    if EXPECTED.isdisjoint(kinds):
        return ""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = error.format_message() if hasattr(error, "format_message") else str(error)  # typer's
    first, _, rest = text.strip().partition("\n")
    if first.endswith(":"):  # Hydra names the class that failed, and then says why
        first = " ".join(f"{first} {rest}".split()).partition(" full_key:")[0]
    return first
