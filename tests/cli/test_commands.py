"""What all commands share: help, errors in a sentence, signals."""

import io
import json
import pickle
import signal
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, Bcnn, Run
from hydra.errors import HydraException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors import SafetensorError

from bcnn.cli.app import main
from bcnn.cli.errors import LOST_RANK, NO_SHARED_MEMORY, exit_code_of
from bcnn.utils.errors import UserError

COMMANDS = ["check", "evaluate", "compare", "predict", "explain", "export", "push", "demo", "cache"]

HELP = """
import sys
from bcnn.cli.app import main
for command in sys.argv[1:]:
    assert main([command, "--help"]) == 0
print("imported:", *sys.modules)
"""


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(bcnn: Bcnn, words: list[str]) -> None:
    outcome = bcnn(*words)
    assert outcome.code == 0 and outcome.err == ""
    assert all(f"│ {command} " in outcome.out for command in [*COMMANDS, "train"])


def test_the_version_is_that_of_the_package(bcnn: Bcnn) -> None:
    assert bcnn("--version") == (0, f"{version('bcnn')}\n", "")


def test_help_breaks_lines_where_the_terminal_ends(bcnn: Bcnn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = bcnn("explain", "--help").out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(" Left: "))
    paragraph = lines[first : lines.index(" " * 80, first)]
    assert len(paragraph) > 2 and all(len(line.rstrip()) > 65 for line in paragraph[:-1])


def test_help_imports_nothing_heavy(python: Run) -> None:
    run = python("-c", HELP, *COMMANDS, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    imported = run.stdout.partition("imported:")[2].split()
    assert "bcnn.cli.predict" in imported
    heavy = {"torch", "torchvision", "lightning", "hydra", "matplotlib", "scipy", "numpy", "PIL"}
    assert not heavy & {*imported}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predcit"], "Did you mean 'predict'?"),
        (["check", ".", "--val-fractoin", "0.1"], "--val-fraction"),
        (["check", "nowhere"], "'nowhere' does not exist"),
        (["predict", "nowhere", "x"], "nowhere: No such file or directory"),
        (["predict", __file__, "x", "--format", "xml"], "'jsonl', 'csv', 'parquet', 'labelstudio'"),
    ],
)
def test_a_wrong_word_is_one_sentence(bcnn: Bcnn, words: list[str], sentence: str) -> None:
    outcome = bcnn(*words)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and sentence in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "predict", "explain", "export", "demo"])
def test_a_folder_is_taken_for_that_of_a_run(
    bcnn: Bcnn, command: str, images: Path, tmp_path: Path
) -> None:
    words = [command, tmp_path] if command in ("export", "demo") else [command, tmp_path, images]
    outcome = bcnn(*words)
    assert outcome.code == 1 and f"{tmp_path} is no run with a checkpoint" in outcome.err
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "result.json").write_text('{"checkpoint": "last/gone.ckpt"}')
    outcome = bcnn(*words)
    assert outcome.code == 1 and "last/gone.ckpt" in outcome.err


ERRORS = [
    (UserError("two\nlines \x1b[2J"), r"two\nlines \x1b[2J"),
    (FileNotFoundError(2, "No such file or directory", "x.csv"), "x.csv: No such file or directory"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (Image.DecompressionBombError("too many pixels"), "too many pixels"),
    (SafetensorError("header too large"), "header too large"),
    (pickle.UnpicklingError("Weights only load failed.\n(1) Do this"), "Weights only load failed."),
    (ModuleNotFoundError("No module named 'onnx'"), "No module named 'onnx'"),
    (zipfile.BadZipFile("File is not a zip file"), "File is not a zip file"),
    (json.JSONDecodeError("No value", "{", 1), "No value: line 1 column 2 (char 1)"),
    (OmegaConfBaseException("Key 'x' is not in struct\n  full_key: x"), "Key 'x' is not in struct"),
    (HydraException("Could not override 'x'.\nUse +x"), "Could not override 'x'."),
    (
        HydraException("Error in call to 'A':\nError('no GPU')\nfull_key: x"),
        "Error in call to 'A': Error('no GPU')",
    ),
    (RuntimeError("in a worker:\nunable to allocate shared memory(shm)"), NO_SHARED_MEMORY),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), LOST_RANK),
    (torch.distributed.DistBackendError("NCCL error"), LOST_RANK),
    (UserError("shared memory/gloo.csv is empty"), "shared memory/gloo.csv is empty"),
    (MisconfigurationException("No devices found"), "No devices found"),
]


@pytest.mark.parametrize(("error", "sentence"), ERRORS)
def test_an_expected_error_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(Mock(side_effect=error)) == 1
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


@pytest.mark.parametrize("place", [1, 4])
def test_debug_is_understood_anywhere(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    words = ["bcnn", "predict", __file__, "nowhere"]
    words.insert(place, "--debug")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="no images: nowhere"):
        main()


WAITING = """
import sys, time
from bcnn.cli.errors import exit_code_of
def act():
    print("ready")
    time.sleep(60)
sys.exit(exit_code_of(act))
"""


def start(code: str) -> Any:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_the_code_of_shells(number: signal.Signals, code: int) -> None:
    process = start(WAITING)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"interrupted ({number.name})\n"
    assert process.returncode == code


def test_a_reader_may_leave() -> None:
    counting = "exit_code_of(lambda: [print(n) for n in range(10**5)])"
    process = start(f"from bcnn.cli.errors import *; {counting}")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""


WRITTEN = {"cp1252": rb"\u03bb " + b"\x96 \xe9" + rb" \udcff", "utf-8": "λ – é ".encode() + b"\xff"}


@pytest.mark.parametrize("encoding", WRITTEN)
def test_any_text_and_file_name_can_be_printed(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert exit_code_of(lambda: print("λ – é \udcff", end="", flush=True)) == 0
    assert sys.stdout.buffer.getvalue() == WRITTEN[encoding]  # type: ignore[attr-defined]


def test_train_hands_its_words_to_hydra(bcnn: Bcnn, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("bcnn.cli.train.main", lambda words: given.extend(words) or 3)
    words = ["-m", "last.lr=1,2", "--config-dir", "conf", "-cn", "x", "--help", "--cfg=job", "~ckpt"]
    assert bcnn("train", *words).code == 3
    assert given == words
