"""Signals that ask a process to end."""

import signal
import subprocess
import sys

import pytest

from bcnn.interruption import Interruption
from bcnn.options import command
from bcnn.store import Options

SLOW_TO_END = """
import signal, sys, time
from bcnn.interruption import Interruption, raise_interruptions
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


def test_a_verb_that_is_interrupted_says_so_with_the_shells_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(options: Options) -> int:
        raise Interruption(signal.SIGTERM)

    assert command(Options, act, "", []) == 143
    assert "interrupted (SIGTERM)" in capsys.readouterr().err
