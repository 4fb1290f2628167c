"""Files that are whole or absent."""

import os
import signal
import subprocess
import sys

import pytest

from bcnn.errors import UserError
from bcnn.files import remove_parts, whole


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with whole(path) as part:
        assert part.suffix == ".txt"
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_text("half of the sec")
        1 / 0  # noqa: B018
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_process_that_is_killed_leaves_the_old_content(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("first")
    code = (
        "import os, signal, sys; from pathlib import Path; from bcnn.files import whole\n"
        "with whole(Path(sys.argv[1])) as part:\n"
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
        whole(tmp_path / "file.txt"),
        open("/dev/full", "w") as file,
    ):
        file.write("content")
        file.flush()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), whole(tmp_path / "file" / "x"):
        pass
