"""Arguments of the commands: what is understood, how mistakes are told, what can be printed."""

import io
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hydra.core.override_parser.overrides_parser import OverridesParser

from bcnn.utils.errors import UserError
from bcnn.utils.options import command, literal


@dataclass
class Options:
    ckpt: Path
    top: int = 5
    target: str = ""
    share: float | None = 0.1
    folder: Path | None = None
    softmax: bool = False
    rows: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[Options], str]:
    seen: list[Options] = []
    code = command(Options, lambda options: seen.append(options) or 0, "usage: …", words)
    captured = capsys.readouterr()
    return code, seen, captured.out + captured.err


def test_options_and_paths_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "a.jpg",
        "ckpt=runs/epoch=3.ckpt",
        "-",
        "./b=c.jpg",
        "set 1=a.jpg",
        "top=1",
        "--",
        "-x.jpg",
    ]
    code, seen, _ = ask(capsys, *words)
    assert code == 0
    paths = ["a.jpg", "-", "./b=c.jpg", "set 1=a.jpg", "--", "-x.jpg"]
    assert seen == [Options(Path("runs/epoch=3.ckpt"), 1, paths=paths)]


@pytest.mark.parametrize(
    "text",
    [
        "photos #2",
        "010",
        "no",
        "1.10",
        "1e3",
        "null",
        "[red] tulip",
        "a: b",
        "a=b",
        " x ",
        "--",
        "",
        "~",
    ],
)
def test_text_is_what_was_typed(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert ask(capsys, "ckpt=x", f"target={text}")[1] == [Options(Path("x"), target=text)]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("ckpt=photos #2", Path("photos #2")),
        ("ckpt=2024_01", Path("2024_01")),
        ("ckpt=~/photos", Path.home() / "photos"),
        ("ckpt=~nobody-of-this-name", Path("~nobody-of-this-name")),
        ("folder=null", None),
        ("folder=1.10", Path("1.10")),
        ("top=-1", -1),
        ("share=1e-3", 0.001),
        ("share=null", None),
        ("softmax=True", True),
        ("softmax=false", False),
        ("rows=[500, 1000]", [500, 1000]),
        ("rows=500,1000", [500, 1000]),
    ],
)
def test_values_have_the_type_of_their_option(
    capsys: pytest.CaptureFixture[str], word: str, value: Any
) -> None:
    name = word.partition("=")[0]
    _, seen, printed = ask(capsys, *{"ckpt": "ckpt=x", name: word}.values())
    assert [getattr(options, name) for options in seen] == [value], printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["top=1"], "ckpt=… is needed"),
        (["ckpt=x", "topp=1"], "no option topp (topp=1)"),
        (["ckpt=x", "to=1"], "no option to (to=1)"),
        (["ckpt=x", "paths=y"], "no option paths"),
        (["ckpt=x", "top=many"], "top=many: expected a whole number"),
        (["ckpt=x", "top=null"], "top=null: expected a whole number;"),
        (["ckpt=x", "share=nan"], "share=nan: expected a number or null"),
        (["ckpt=x", "softmax=yes"], "softmax=yes: expected true or false"),
        (["ckpt=x", "rows=[1,b]"], "rows=[1,b]: expected whole numbers, as 500,1000"),
        (["ckpt="], "ckpt=: expected a file or folder"),
        (["ckpt=x", "top=1", "top=2"], "top=… is given twice"),
    ],
)
def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    code, seen, printed = ask(capsys, *words)
    assert (code, seen) == (1, [])
    assert printed.startswith("error: ") and sentence in printed and printed.count("\n") == 1


def test_help_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(capsys, "--help") == (0, [], "usage: …\n")


def test_a_mistake_found_later_is_told_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    def act(options: Options) -> int:
        raise UserError("no such file: x")

    assert command(Options, act, "", ["ckpt=x"]) == 1
    assert capsys.readouterr().err == "error: no such file: x\n"


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", rb"\u03bb \u2013 \xe9" + b" \xff"),
        ("cp1252", rb"\u03bb " + b"\x96 \xe9 \xff"),
        ("utf-8", "λ – é ".encode() + b"\xff"),
    ],
)
def test_any_text_and_file_name_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: bytes
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))

    def act(options: Options) -> int:
        print("λ – é \udcff", end="", flush=True)
        raise UserError("λ – é \udcff")

    assert command(Options, act, "", ["ckpt=x"]) == 1
    sys.stderr.flush()
    assert sys.stdout.buffer.getvalue() == written  # type: ignore[attr-defined]
    assert sys.stderr.buffer.getvalue() == b"error: " + written.replace(b"\xff", rb"\xff") + b"\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        *("2024", "2024_01", "1.10", "010", "no", "true", "1e3", "nan", "~/photos", "set (1)", "k,l"),
        *(
            "/x/a=b/best.ckpt",
            "photos #2",
            "it's",
            " a ",
            "[red]",
            "{a: b}",
            "a:b",
            "ü λ",
            "a\nb",
            "$x",
        ),
        *("choice(a,b)", "?", "C:\\photos\\"),
        pytest.param([*map("".join, product("a\\'\" ", repeat=3))], id="quotes and backslashes"),
    ],
)
def test_hydra_reads_text_as_it_was_typed(text: str | list[str]) -> None:
    parser = OverridesParser.create()
    for typed in [text] if isinstance(text, str) else text:
        if typed[0] not in "'\"":  # that is Hydra's own way to write a text
            word = literal(f"++data.root={typed}", sweep=False)
            assert parser.parse_override(word).value() == typed
            assert literal(word, sweep=False) == word


@pytest.mark.parametrize(
    "word",
    [
        *("data.root=photos", "ckpt=/a/b-1.ckpt", "ckpt=null", "ckpt=", "data.root='2024'", "ckpt"),
        *('ckpt="a b"', "output=${seed}_a", "seed=010", "stage.optimizer.lr=1,2", "--help", "~ckpt"),
    ],
)
def test_what_hydra_reads_rightly_is_left_alone(word: str) -> None:
    assert literal(word, sweep=False) == word


def test_commas_are_of_the_text_or_of_a_sweep() -> None:
    for text in ("k,l", "choice(k,l)", "glob(*)"):
        assert literal(f"data.root={text}", sweep=True) == f"data.root={text}"
        assert literal(f"data.root={text}", sweep=False) == f'data.root="{text}"'
    assert literal("data.root=2024", sweep=True) == 'data.root="2024"'


def test_train_takes_text_and_prints_on_any_terminal(train: Run) -> None:
    options = ["data=folder", "data.root=2024_01", "data.list=set (1)", "ckpt=λ/a=b.ckpt"]
    run = train("--cfg", "job", *options, PYTHONIOENCODING="cp1252")
    assert run.returncode == 0, run.stderr
    assert "\n  root: '2024_01'\n  list: set (1)\n" in run.stdout
    assert "ckpt: \\u03bb/a=b.ckpt\n" in run.stdout
