"""Mistakes in one sentence, and signals that ask a process to end."""

import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from bcnn.utils.errors import UserError, raise_interruptions


def test_a_worker_s_mistake_is_shown_without_its_traceback() -> None:
    sentence = UserError("cannot read a\nb.jpg")
    assert str(pickle.loads(pickle.dumps(sentence))) == r"cannot read a\nb.jpg"
    raised = f"Caught it.\nTraceback:\n  File x\nbcnn.utils.errors.UserError: {sentence}\n"
    assert str(UserError(raised)) == r"cannot read a\nb.jpg"


def test_another_thread_than_the_main_one_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(raise_interruptions).result()
    assert signal.getsignal(signal.SIGTERM) is before


START = """
import time
from bcnn.utils.errors import Interruption, raise_interruptions
raise_interruptions()
class Deaf:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
try:
    {}
    time.sleep(60)
except Interruption as error:
    print("ending", error, flush=True)
    time.sleep({})
"""


def start(body: str, ending: float = 0, path: Path = ROOT) -> Any:
    """A process that listens to signals; it is about to do, or doing, what `body` says."""
    command = [sys.executable, "-c", START.format(body, ending)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    process: Any = subprocess.Popen(command, text=True, env=environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_raises_and_the_second_ends_at_once(first: signal.Signals) -> None:
    process = start("print('ready', flush=True)", ending=60)
    process.send_signal(first)
    assert process.stdout.readline() == f"ending {first.name}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT


def test_a_signal_during_an_import_ends_at_once(tmp_path: Path) -> None:
    """numpy crashes when its import is broken off."""
    (tmp_path / "slow.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    process = start("import slow", path=tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 130


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    process = start("Deaf()")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("ending SIGINT\n", "")
