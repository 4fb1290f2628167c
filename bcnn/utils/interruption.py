"""Ctrl-C and SIGTERM: the program ends in order at the first, at once at the second."""

import os
import signal
import sys
from threading import Timer
from types import FrameType
from typing import Any, NoReturn

AGAIN = 0.1  # seconds after which a signal comes again that fell on deaf ears


class Interruption(BaseException):
    """Raised wherever the program is when a signal asks it to end.

    Not a `KeyboardInterrupt`, which Lightning ends the process at with exit code 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number  # 130 after Ctrl-C, 143 after SIGTERM, as shells have it


def raise_interruptions() -> None:
    """From now on SIGINT and SIGTERM raise `Interruption` in this process."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # In a process that was forked off, what torch and the standard library are ready for.
        if os.getpid() != owner:
            raise KeyboardInterrupt
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # a bar hides the cursor
        if _importing(frame):  # which numpy and others do not survive
            os.write(2, f"interrupted ({signal.Signals(number).name})\n".encode())
            os._exit(128 + number)
        if os.isatty(2):
            os.write(2, b"ending in order; Ctrl-C again ends at once\n")
        raise Interruption(number)

    def again(unraisable: Any) -> None:
        """What is raised while Python frees an object is dropped: the signal comes once more, later."""
        if not isinstance(unraisable.exc_value, Interruption):
            sys.__unraisablehook__(unraisable)
            return
        listen()
        Timer(AGAIN, os.kill, (owner, unraisable.exc_value.number)).start()

    def listen() -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, interrupt)

    sys.unraisablehook = again
    listen()


def _importing(frame: FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
