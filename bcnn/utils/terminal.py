"""alias: removed at the merge"""

import logging
from typing import Any, TextIO

from bcnn.utils.console import UNSAFE as ACTING
from bcnn.utils.console import Console, logger, printable, setup_logging
from bcnn.utils.console import log_file as logged


def say(*lines: object, file: TextIO | None = None) -> None:
    setup_logging()
    for line in lines:
        if file is None:
            logger.info("%s", line)
        else:
            print(printable(str(line)), file=file)
            log(line)


def log(*lines: object) -> None:
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            for line in lines:
                handler.emit(logging.makeLogRecord({"msg": "%s", "args": (line,), "levelno": 20}))


__all__: list[Any] = ["ACTING", "Console", "log", "logged", "printable", "say"]
