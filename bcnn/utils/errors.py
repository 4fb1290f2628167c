"""What ends a command early: a mistake of the user's, Ctrl-C, SIGTERM."""

import os
import signal
import sys
import threading
from collections.abc import Collection
from types import FrameType
from typing import Any, NoReturn

from bcnn.utils.console import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """A mistake in what was asked for: one sentence that names the file or option and the way out."""

    def __str__(self) -> str:
        # A data-loading worker prepends its traceback.
        return printable(super().__str__().rpartition("bcnn.utils.errors.UserError: ")[2].strip())


def validate_choice(option: str, value: object, choices: Collection[str | None]) -> None:
    """Raise UserError if the value of an option is not among its choices."""
    if value not in choices:
        names = ", ".join(each or "null" for each in choices)
        raise UserError(f"{option}={value}: choose from {names}")


def validate_share(option: str, share: float | None) -> None:
    """Raise UserError if the value of an option is a number that is no share, or 0."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"{option}={share}: choose from over 0 to 1")


class Interruption(BaseException):
    """Raised in the main thread when a signal asks the process to end.

    Not a `KeyboardInterrupt`, on which Lightning ends the process with exit code 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number  # the shells' convention: 130 after Ctrl-C, 143 after SIGTERM


def raise_interruptions() -> None:
    """Raise `Interruption` at the first SIGINT or SIGTERM; the second ends the process at once.

    Python lets the main thread alone listen to signals: in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker, whose parent ends it
            raise KeyboardInterrupt
        if os.isatty(2):
            # Progress bars hide the cursor.
            os.write(2, b"\x1b[?25h\nstopping; Ctrl-C again stops at once\n")
        while frame:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os._exit(128 + number)  # numpy and others crash when their import is broken off
            frame = frame.f_back
        raise Interruption(number)

    def resend(unraisable: Any) -> None:
        """Send the signal again if it was raised in a destructor, where Python drops exceptions."""
        if isinstance(unraisable.exc_value, Interruption):
            listen()
            threading.Timer(0.1, os.kill, (owner, unraisable.exc_value.number)).start()
        else:
            sys.__unraisablehook__(unraisable)

    def listen() -> None:
        for each in SIGNALS:
            signal.signal(each, interrupt)

    sys.unraisablehook = resend
    listen()
