"""What reaches the terminal: escaped names, the log of rank zero, bars and lines of progress."""

import io
import logging
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcnn.utils import console as module
from bcnn.utils.console import Console, Task, log_file, logger, setup_logging, span, track

HARMLESS = "é 蝶\u3000 🦋 👩\u200d🌾 می\u200cخواهم [red] :smile: $5^$ C:\\x1b"
ESCAPED = {
    "\x1b[2J\x1b]0;title\a": r"\x1b[2J\x1b]0;title\x07",
    "two\rparts and \u2028 more": r"two\rparts and \u2028 more",
    "right\u202eto left\u200f": r"right\u202eto left\u200f",
    "\x9b31m, and a byte \udcff that is no text": r"\x9b31m, and a byte \xff that is no text",
    "\ud800": r"\ud800",
    HARMLESS: HARMLESS,
}


@pytest.fixture
def logging_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    setup_logging()
    yield


@pytest.mark.parametrize("name", ESCAPED, ids=ascii)
@pytest.mark.usefixtures("logging_on")
def test_control_characters_alone_are_escaped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Not by `logger.info`: pytest would send the name, as it is, from one of its processes to another.
    record = logging.makeLogRecord({"msg": f"class {name}", "levelno": logging.INFO})
    logger.handlers[0].handle(record)
    assert capsys.readouterr().out == f"class {ESCAPED[name]}\n"
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=20).print(name)
    assert file.getvalue() == f"{ESCAPED[name]}\n"


@pytest.mark.usefixtures("logging_on")
def test_warnings_go_to_standard_error_and_everything_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with log_file(tmp_path / "run" / "train.log") as begin:
        logger.info("stage %s", "last")
        assert not (tmp_path / "run").exists()
        begin()
        logger.warning("one image is left out")
    logger.info("after the run")
    shown = capsys.readouterr()
    assert shown.out == "stage last\nafter the run\n"
    assert shown.err == "warning: one image is left out\n"
    command, *log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert command.endswith(shlex.join(sys.orig_argv))  # what the user typed, not what Hydra reads
    assert log == ["stage last", "warning: one image is left out"]


@pytest.mark.usefixtures("logging_on")
def test_ranks_other_than_zero_show_only_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.fabric.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.info("told twice")
    logger.error("told once")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    logger.info("told")
    monkeypatch.delattr(rank_zero_only, "rank")  # before Lightning is imported
    monkeypatch.setenv("LOCAL_RANK", "1")
    logger.info("told twice")
    shown = capsys.readouterr()
    assert shown.out == "told\n" and shown.err == "error: told once\n"


def test_lines_on_a_pipe_tell_counts_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(Task, "last_line", -math.inf)
    task = Task("waiting", 10, "images", lines=True)
    monkeypatch.setattr(task.bar, "get_time", lambda: now)
    for now in (1.0, 3.0, 17.0, 18.0, 40.0):  # noqa: B007
        task.advance()
    assert capsys.readouterr().err.splitlines() == [
        "waiting: 2 of 10 images, 0.5 images/s, about 16 s left",
        "waiting: 4 of 10 images, 0.18 images/s, about 34 s left",
        "waiting: 5 of 10 images, 0.1 images/s, about 49 s left",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_removed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(module, "console", Console(width=100))
    with pytest.raises(KeyboardInterrupt):
        for part in track(range(9), "computing", unit="parts"):
            print(f"row {part}")
            module.console.print(f"result {part}")
            if part == 4:
                raise KeyboardInterrupt
    text = screen.getvalue()
    assert "row 3" in text and "result 3" in text and re.search("computing .*━.* 4 of 9 parts", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert text.rindex("\x1b[2K") > text.rindex("computing")  # the bar's line is erased


def test_durations() -> None:
    seconds = (0.04, 9.94, 9.96, 99.4, 100, 11000)
    assert [*map(span, seconds)] == ["0.0 s", "9.9 s", "10 s", "99 s", "2 min", "3 h 03 min"]
