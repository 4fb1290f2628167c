"""How far things have come: lines on a pipe, a bar on a terminal."""

import os
import re
import sys
import threading
import time

import pytest
from rich.console import Console

from bcnn.utils import progress as room
from bcnn.utils.progress import progress, span, track


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a twentieth of one."""
    for name in ("FLICKER", "SILENT", "EVERY"):
        monkeypatch.setattr(room, name, getattr(room, name) / 20)
    monkeypatch.setattr(room, "_last_line", -room.EVERY)


@pytest.mark.usefixtures("quick")
def test_a_pipe_gets_a_line_every_so_often_and_none_of_what_is_soon_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in track(range(3), "this is soon done"):
        pass
    for _ in track(range(20), "this takes long"):
        time.sleep(0.1)
    with progress("so does this"):
        time.sleep(room.EVERY + 0.1)
    said = capsys.readouterr()
    *lines, last = said.err.splitlines()
    assert said.out == "" and last == "so does this" and 2 <= len(lines) <= 3
    counts = [int(re.match(r"this takes long: (\d+) of 20 images", line)[1]) for line in lines]  # type: ignore[index]
    assert counts == sorted(counts) and counts[0] <= 2 and 6 <= counts[1] <= 10
    assert re.search(r", about 1\.\d s left$", lines[-1]) or re.search(r" [\d.]+ images/s", lines[-1])


@pytest.mark.usefixtures("quick")
def test_a_terminal_gets_a_bar_that_goes_and_leaves_what_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = os.openpty()
    shown = bytearray()
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: os.read(ours, 1)[0], 0)))
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(room, "_screen", Console(stderr=True, width=100))
        with pytest.raises(KeyboardInterrupt):
            for part in track(range(9), "computing", unit="parts"):
                time.sleep(0.2)
                print(f"row {part}")
                if part == 4:
                    raise KeyboardInterrupt
        screen.write("\0")
    reader.join(5)
    text = shown.decode()
    assert "row 3" in text and re.search("computing .*━.* 3 of 9 parts", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is there again
    assert text.rindex("\x1b[2K") > text.rindex("computing")  # and the bar is not


def test_time_left_is_said_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("it", 10, show=False) as task:
        assert str(task) == "0 of 10 images"
        now = 30  # processes have to start
        task.advance()
        assert str(task) == "1 of 10 images"
        now = 32
        task.advance()
        assert str(task) == "2 of 10 images, 0.5 images/s, about 16 s left"
        now = 35
        assert str(task).endswith("about 13 s left")
        task.advance(8)
        assert str(task) == "10 of 10 images, 1.8 images/s"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (11000, "3 h 03 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert span(seconds) == said
