"""Arguments of the commands: what is understood, and how mistakes are told."""

from dataclasses import dataclass, field

import pytest

from bcnn.errors import UserError
from bcnn.options import REQUIRED, command


@dataclass
class Options:
    ckpt: str = REQUIRED
    top: int = 5
    paths: list[str] = field(default_factory=list)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[Options], str]:
    seen: list[Options] = []
    code = command(Options, lambda options: seen.append(options) or 0, "usage: …", words)
    captured = capsys.readouterr()
    return code, seen, captured.out + captured.err


def test_options_and_paths_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, seen, _ = ask(capsys, "a.jpg", "ckpt=runs/epoch=3.ckpt", "./b=c.jpg", "top=1")
    assert code == 0
    assert seen == [Options("runs/epoch=3.ckpt", 1, ["a.jpg", "./b=c.jpg"])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["top=1"], "ckpt=… is needed"),
        (["ckpt=x", "topp=1"], "no option topp"),
        (["ckpt=x", "top=many"], "many"),
        (["ckpt=x", "paths=y"], "no option paths"),
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
