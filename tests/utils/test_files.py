"""Files that are whole or absent."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from bcnn.cli import evaluate, explain, export, predict
from bcnn.models.checkpoint import save_model
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART, atomic_write, refuse_unwritable, remove_parts
from bcnn.utils.options import command


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with atomic_write(path) as part:
        assert part.suffix == ".txt"
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(path) as part:
        part.write_text("half of the sec")
        1 / 0  # noqa: B018
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_process_that_is_killed_leaves_the_old_content(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("first")
    code = (
        "import os, signal, sys; from pathlib import Path; from bcnn.utils.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "first"
    assert len(os.listdir(tmp_path)) == 2
    remove_parts(tmp_path)
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's always full device")
def test_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(UserError, match=r"file\.txt cannot be written: No space left"),
        atomic_write(tmp_path / "file.txt"),
        open("/dev/full", "w") as file,
    ):
        file.write("content")
        file.flush()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "file" / "x"):
        pass


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / f"{'x' * 251}.csv"
    with atomic_write(path) as part:
        assert part.suffix == ".csv"
        part.write_text("content")
    assert path.read_text() == "content"


def test_a_place_that_cannot_be_written_is_known_before_and_none_is_made(tmp_path, monkeypatch):
    refuse_unwritable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "file", tmp_path / "file" / "x" / "y", tmp_path / "link" / "x"):
        with pytest.raises(UserError, match=f"{folder} cannot be written: N"):
            refuse_unwritable(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no space left"):
        refuse_unwritable(tmp_path)


@pytest.mark.parametrize(
    ("verb", "words", "output"),
    [
        (predict, ["{image}"], "rows.csv"),
        (explain, ["{image}"], "figures"),
        (evaluate, ["data={folder}"], "results"),
        (export, [], "model.onnx"),
    ],
)
def test_verbs_say_so_before_they_work(tmp_path, capsys, verb, words, output):
    (tmp_path / "file").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given = [word.format(image=tmp_path / "a.png", folder=tmp_path) for word in words]
    output = tmp_path / "file" / output
    usage = getattr(verb, "USAGE", "")
    # The model, which comes after, is not there.
    assert command(verb.Options, verb.main, usage, ["ckpt=gone.ckpt", f"output={output}", *given]) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: {tmp_path / 'file'}") and "cannot be written: Not a directory" in said
    )


def test_a_full_disk_in_the_words_of_a_library_is_a_sentence(tmp_path):
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(UserError, match=r"m\.x cannot be written: no space left"),
        atomic_write(tmp_path / "m.x"),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "m.x"):
        raise RuntimeError("something else")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's always full device")
def test_a_model_on_a_full_disk_is_a_sentence(tiny, tmp_path, monkeypatch):
    """torch's own writer would end the process."""
    monkeypatch.setattr("bcnn.models.checkpoint.to_original", lambda model: model.state_dict())
    (tmp_path / f"{PART}{os.getpid()}-m.pth").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"m\.pth cannot be written: No space left"):
        save_model(tiny, tmp_path / "m.pth")
    assert os.listdir(tmp_path) == []


def test_others_may_read_a_model(tiny, tmp_path):
    (tmp_path / "plain").touch()
    save_model(tiny, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
