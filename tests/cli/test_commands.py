"""What all commands share: help, completion, errors in a sentence, signals."""

import io
import json
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from conftest import ROOT, Bcnn, Run
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError

from bcnn.cli.app import app
from bcnn.cli.errors import exit_code_of
from bcnn.utils.console import logger
from bcnn.utils.errors import Interruption, UserError

COMMANDS = ["check", "evaluate", "predict", "explain", "export", "demo", "cache"]

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


def test_help_imports_nothing_heavy(python: Run) -> None:
    run = python("-c", HELP, *COMMANDS, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    imported = run.stdout.partition("imported:")[2].split()
    assert "bcnn.cli.predict" in imported
    heavy = {"torch", "torchvision", "lightning", "hydra", "matplotlib", "scipy", "numpy", "PIL"}
    assert not heavy & {*imported}


def test_shells_complete_commands(python: Run) -> None:
    asked = {"_BCNN_COMPLETE": "complete_bash", "COMP_WORDS": "bcnn e", "COMP_CWORD": "1"}
    run = python("-m", "bcnn", PYTHONPATH=str(ROOT), **asked)
    assert run.stdout.split() == ["evaluate", "explain", "export"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predcit"], "Did you mean 'predict'?"),
        (["check", ".", "--val-fractoin", "0.1"], "--val-fraction"),
        (["check"], "IMAGES"),
        (["check", "nowhere"], "'nowhere' does not exist"),
        (["check", ".", "--seed", "many"], "'--seed'"),
        (["predict", __file__, "x", "--format", "xml"], "'table', 'jsonl', 'csv', 'labelstudio'"),
        (["predict", __file__, "x", "--top-k", "0"], "'--top-k'"),
        (["export", __file__, "--format", "tflite"], "'onnx', 'pt2', 'pth', 'safetensors'"),
        (["demo", __file__, "--port", "65536"], "'--port'"),
    ],
)
def test_a_wrong_word_is_one_sentence(bcnn: Bcnn, words: list[str], sentence: str) -> None:
    outcome = bcnn(*words)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and sentence in outcome.err
    assert outcome.err.count("\n") == 1


def json_error() -> Exception:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    return caught.value


ERRORS = [
    (UserError("no such file: x"), "no such file: x"),
    (UserError("two\nlines \x1b[2J"), r"two\nlines \x1b[2J"),
    (FileNotFoundError(2, "No such file or directory", "x.csv"), "x.csv: No such file or directory"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (
        UnidentifiedImageError("cannot identify image file 'x.jpg'"),
        "cannot identify image file 'x.jpg'",
    ),
    (Image.DecompressionBombError("too many pixels"), "too many pixels"),
    (SafetensorError("header too large"), "header too large"),
    (pickle.UnpicklingError("Weights only load failed.\n(1) Do this"), "Weights only load failed."),
    (ModuleNotFoundError("No module named 'onnx'"), "No module named 'onnx'"),
    (zipfile.BadZipFile("File is not a zip file"), "File is not a zip file"),
    (json_error(), "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (OmegaConfBaseException("Key 'x' is not in struct\n  full_key: x"), "Key 'x' is not in struct"),
    (HydraException("Could not override 'x'.\nUse +x"), "Could not override 'x'."),
]


@pytest.mark.parametrize(("error", "sentence"), ERRORS)
def test_an_expected_error_is_one_sentence(
    error: Exception,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def act() -> None:
        raise error

    assert exit_code_of(act) == 1
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    monkeypatch.setattr(sys, "argv", ["bcnn", "predict", "--debug"])
    with pytest.raises(type(error)):  # Python shows the traceback
        exit_code_of(act)


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


def test_debug_is_understood_anywhere(python: Run) -> None:
    for words in (
        ["--debug", "predict", __file__, "nowhere"],
        ["predict", __file__, "nowhere", "--debug"],
    ):
        run = python("-m", "bcnn", *words, PYTHONPATH=str(ROOT))
        assert run.returncode == 1
        assert run.stderr.startswith("Traceback") and "no images: nowhere" in run.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_the_code_of_shells(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    def act() -> None:
        raise Interruption(number)

    assert exit_code_of(act) == code
    assert capsys.readouterr().err == f"interrupted ({number.name})\n"


WAITING = """
import sys, time
from bcnn.cli.errors import exit_code_of
def act():
    print("ready")
    time.sleep(60)
sys.exit(exit_code_of(act))
"""


def test_a_process_ends_at_sigterm() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "interrupted (SIGTERM)\n"
    assert process.returncode == 143


def test_a_reader_may_leave() -> None:
    code = "from bcnn.cli.errors import *; exit_code_of(lambda: [print(n) for n in range(10**5)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", rb"\u03bb \u2013 \xe9 \udcff"),
        ("cp1252", rb"\u03bb " + b"\x96 \xe9" + rb" \udcff"),
        ("utf-8", "λ – é ".encode() + b"\xff"),
    ],
)
def test_any_text_and_file_name_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: bytes
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert exit_code_of(lambda: print("λ – é \udcff", end="", flush=True)) == 0
    assert sys.stdout.buffer.getvalue() == written  # type: ignore[attr-defined]


def test_warnings_begin_with_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: logger.warning("two classes look alike")) == 0
    assert capsys.readouterr().err == "warning: two classes look alike\n"


def test_train_hands_its_words_to_hydra(bcnn: Bcnn, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("bcnn.cli.train.main", lambda words: given.extend(words) or 3)
    words = ["-m", "last.lr=1,2", "--config-dir", "conf", "-cn", "x", "--help", "--cfg=job", "~ckpt"]
    assert bcnn("train", *words).code == 3
    assert given == words


def test_words_are_taken_as_they_are_typed(
    bcnn: Bcnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def predict(ckpt: Path, images: list[str], top_k: int = 5) -> None:
        given.extend([ckpt, images, top_k])

    alone = typer.Typer()
    alone.command()(predict)
    monkeypatch.setattr("bcnn.cli.app.app", alone)
    names = ["photos #2", "null", "[red] tulip", "a=b.jpg", " x ", "~", "-"]
    assert bcnn("010", *names, "--top-k", "1", "--", "-x.jpg").code == 0
    assert given == [Path("010"), [*names, "-x.jpg"], 1]
    assert app.registered_commands
