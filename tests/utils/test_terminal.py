"""Names that act on a terminal, and what is seen of them there."""

import io
import pickle

import pytest

from bcnn.utils.errors import UserError
from bcnn.utils.terminal import ACTING, Console, printable, say

ESCAPED = {
    "\x1b[2J\x1b]0;title\a": r"\x1b[2J\x1b]0;title\x07",
    "two\nlines\rand \u2028 more": r"two\nlines\rand \u2028 more",
    "right\u202eto left\u200f": r"right\u202eto left\u200f",
    "\x9b31m, and a byte \udcff that is no text": r"\x9b31m, and a byte \xff that is no text",
    "\ud800": r"\ud800",
}
SHOWN = "é 蝶\u3000 🦋 👩\u200d🌾 می\u200cخواهم [red] :smile: $5^$ C:\\x1b"


@pytest.mark.parametrize("name", ESCAPED)
def test_what_acts_on_a_terminal_is_escaped_wherever_it_is_printed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"of {name}", "the next")
    assert capsys.readouterr().out == f"of {ESCAPED[name]}\nthe next\n"
    assert str(UserError(f"no {name}")) == f"no {ESCAPED[name]}"
    console = Console(file=io.StringIO(), force_terminal=True, width=99)
    console.print(name)
    assert console.file.getvalue() == f"{ESCAPED[name]}\n"  # type: ignore[attr-defined]


def test_names_of_any_script_are_shown_as_they_are() -> None:
    assert printable(SHOWN) == SHOWN
    console = Console(file=io.StringIO(), width=99)
    console.print(SHOWN)
    assert console.file.getvalue() == f"{SHOWN}\n"  # type: ignore[attr-defined]


def test_every_control_character_is_one() -> None:
    assert all(ACTING.match(chr(code)) for code in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066))
    assert not any(ACTING.match(chr(code)) for code in (*range(32, 0x7F), 0xA0, 0x200C, 0x200D))


def test_a_sentence_from_another_process_comes_without_its_traceback() -> None:
    sentence = UserError("cannot read a\nb.jpg")
    assert str(pickle.loads(pickle.dumps(sentence))) == r"cannot read a\nb.jpg"
    told = f"Caught it.\nTraceback:\n  File x\nbcnn.errors.UserError: {sentence}\n"
    assert str(UserError(told)) == r"cannot read a\nb.jpg"
