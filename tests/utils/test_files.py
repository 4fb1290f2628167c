"""Files are complete or absent."""

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bcnn.utils.errors import UserError
from bcnn.utils.files import (
    atomic_folder,
    atomic_write,
    cache_folder,
    checkpoint_of,
    remove_parts,
    validate_writable,
)


def test_the_old_content_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"{'x' * 251}.txt"  # the longest name
    with atomic_write(path) as part:
        assert part.suffix == ".txt"
        part.write_text("first")
        assert not path.exists()
    message = r"x\.txt cannot be written: No space left"
    with pytest.raises(UserError, match=message), atomic_write(path) as part:
        part.write_text("half of the sec")
        raise OSError(errno.ENOSPC, "No space left")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == [path.name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("write", ["atomic_write", "atomic_folder"])
def test_a_killed_process_leaves_nothing_new(tmp_path: Path, write: str) -> None:
    path = tmp_path / "output"
    if write == "atomic_write":
        path.write_text("first")
    before = os.listdir(tmp_path)
    code = f"""if True:
        import os, pathlib, sys; from bcnn.utils.files import {write}
        with {write}(pathlib.Path(sys.argv[1])) as part:
            (part / "figures.json" if part.is_dir() else part).write_text("half")
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert len(os.listdir(tmp_path)) == len(before) + 1
    assert write == "atomic_folder" or path.read_text() == "first"
    remove_parts(tmp_path)
    assert os.listdir(tmp_path) == before


def test_a_folder_gets_its_name_once_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "output") as part:
        (part / "figures.json").touch()
        assert not (tmp_path / "output").exists()
    assert os.listdir(tmp_path / "output") == ["figures.json"]


def test_nobody_can_guess_where_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared folder a link of that name would send the content elsewhere."""
    with atomic_write(tmp_path / "file") as first, atomic_write(tmp_path / "file") as second:
        assert first != second
    (tmp_path / "private").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".part-guessed-file").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="exists"), atomic_write(tmp_path / "file") as part:
        part.write_text("theirs")
    assert (tmp_path / "private").read_text() == "mine"


def test_an_unwritable_folder_is_found_beforehand_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "file", tmp_path / "file" / "x" / "y", tmp_path / "link" / "x"):
        with pytest.raises(UserError, match=f"{folder} cannot be written: N"):
            validate_writable(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no space left"):
        validate_writable(tmp_path)


def test_the_folder_of_a_run_stands_for_the_checkpoint_that_it_ends_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "last").mkdir()
    with pytest.raises(UserError, match="is no run with a checkpoint"):
        checkpoint_of(tmp_path)
    (tmp_path / "last" / "result.json").write_text(json.dumps({"checkpoint": "last/best.ckpt"}))
    assert checkpoint_of(tmp_path) == tmp_path / "last" / "best.ckpt"
    assert checkpoint_of(tmp_path / "last") == tmp_path / "last" / "best.ckpt"
    (tmp_path / "finetune").mkdir()
    assert checkpoint_of(tmp_path) == tmp_path / "last" / "best.ckpt"
    assert "stage finetune has not ended" in caplog.text
    (tmp_path / "finetune" / "result.json").write_text(json.dumps({"checkpoint": "/start.ckpt"}))
    assert checkpoint_of(tmp_path) == Path("/start.ckpt")
    assert checkpoint_of(tmp_path / "x.ckpt") == tmp_path / "x.ckpt"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "result.json").write_text('{"checkpoint": ')
    with pytest.raises(UserError, match=r"last/result\.json is damaged .*: restore it, or remove it"):
        checkpoint_of(tmp_path)


def test_a_cache_without_a_place_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/bcnn/checks: Not a directory: set XDG_CACHE_HOME"):
        cache_folder("checks")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container's user without a name
    with pytest.raises(UserError, match="no home folder: set XDG_CACHE_HOME"):
        cache_folder("checks")
