"""Ctrl-C and SIGTERM: the program ends in order at the first, at once at the second."""

import os
import signal
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

    def interrupt(number: int, frame: object) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() == owner and os.isatty(2):  # where a bar may have hidden the cursor
            os.write(2, b"\x1b[?25h\nending in order; Ctrl-C again ends at once\n")
        # In a process that was forked off, what torch and the standard library are ready for.
        raise Interruption(number) if os.getpid() == owner else KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
