"""Signals that ask a process to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from bcnn.training.feature_store import Options
from bcnn.utils.interruption import Interruption
from bcnn.utils.options import command

SLOW_TO_END = """
import signal, sys, time
from bcnn.utils.interruption import Interruption, raise_interruptions
raise_interruptions()
try:
    print("ready", flush=True)
    time.sleep(60)
except Interruption as error:
    print("ending", error, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_it_end_and_the_second_does_not_wait(first: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_TO_END], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == f"ending {first.name}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT


IMPORTING = """
from bcnn.utils.interruption import raise_interruptions
raise_interruptions()
try:
    import slow
except BaseException:
    print("survived")
"""


def test_in_the_midst_of_an_import_it_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "interrupted (SIGINT)\n")
    assert process.returncode == 130


def test_a_verb_that_is_interrupted_says_so_with_the_shells_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(options: Options) -> int:
        raise Interruption(signal.SIGTERM)

    assert command(Options, act, "", []) == 143
    assert "interrupted (SIGTERM)" in capsys.readouterr().err


DEAF = """
import time
from bcnn.utils.interruption import Interruption, raise_interruptions
raise_interruptions()
class Deaf:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
try:
    Deaf()
    time.sleep(60)
except Interruption as error:
    print("ending", error)
"""


def test_a_signal_that_comes_while_an_object_is_freed_is_heard() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "ending SIGINT\n" and "Traceback" not in err
