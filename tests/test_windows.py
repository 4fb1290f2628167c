"""Windows' rules for files, faked: nothing open is removed or renamed, and names are restricted."""

import builtins
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FINETUNE, SMALL, Bcnn, configure, toy

from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.run import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the open files from /proc")

RESERVED = re.compile(r'[<>:"|?*\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def in_use(path: str | Path) -> bool:
    """Return whether this process has a file open or mapped."""
    real = os.path.realpath(path)
    handles = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    return real in handles or f" {real}\n" in Path("/proc/self/maps").read_text()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Have the calls fail that Windows refuses."""

    def strict(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **options: Any) -> Any:
            paths = [each for each in args if isinstance(each, str | Path)]
            if open_file := next(
                (each for each in paths if os.path.isfile(each) and in_use(each)), None
            ):
                raise PermissionError(13, "used by another process", str(open_file))
            if call.__name__ == "rename" and os.path.exists(args[1]):
                raise FileExistsError(17, "exists", str(args[1]))
            return call(*args, **options)

        return checked

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, strict(getattr(os, name)))
    yield
    for path in tmp_path.rglob("*"):
        assert not RESERVED.search(path.name), path


def test_the_rules_are_those_of_windows(windows: None, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    with builtins.open(file), pytest.raises(PermissionError):
        file.unlink()
    (tmp_path / "b").touch()
    with pytest.raises(FileExistsError):
        file.rename(tmp_path / "b")
    file.replace(tmp_path / "b")
    (tmp_path / "b").unlink()


@pytest.mark.parametrize("last", ["last=convex", "last=sgd"])
def test_training_and_what_follows(
    windows: None, images: Path, tmp_path: Path, bcnn: Bcnn, tiny: BCNN, last: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pooling = "model/pooling=auto" if last == "last=convex" else "model/pooling=sqrt"
    words = [*toy(images, SMALL, *FINETUNE), last, pooling, "output=run"]
    train(configure(*words), words)
    train(configure(*words), words, resume=True)
    for command in (
        *[["predict", "run", images, "--format", "csv", "--output", "parts"]] * 2,
        ["predict", "run", images, "--format", "csv", "--output", "p.csv"],
        ["evaluate", "run", images, "--output", "evaluation"],
        ["explain", "run", images / "test" / "red" / "0.png", "--output", "explained.png"],
        ["export", "run", "--format", "safetensors", "--output", "m.safetensors"],
        ["check", images, "--output", "checked"],
        ["cache", "--remove", "all"],
    ):
        outcome = bcnn(*command)
        assert outcome.code == 0, (command, outcome)
