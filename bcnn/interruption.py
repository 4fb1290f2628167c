"""Ctrl-C and SIGTERM: the program ends in order at the first, at once at the second."""

import os
import signal
from types import FrameType
from typing import NoReturn


class Interruption(BaseException):
    """Raised wherever the program is when a signal asks it to end.

    Not a `KeyboardInterrupt`, which Lightning ends the process at with exit code 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
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

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def _importing(frame: FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
