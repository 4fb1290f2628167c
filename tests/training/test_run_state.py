"""What a run writes down: it can be moved, names no code, and belongs to its images and options."""

import re
from pathlib import Path

import pytest
from conftest import SMALL, configure, folder_data, run, set_up, toy
from hydra.errors import HydraException

from bcnn.cli.train import resume
from bcnn.training.run import train
from bcnn.training.run_state import RUN, RunState, StageResult, data_digest, resumable_overrides
from bcnn.training.schema import absolute_paths
from bcnn.utils.errors import UserError

CALLBACK = "+callbacks.mine._target_=lightning.pytorch.callbacks.Timer"


def state(folder: Path, *words: str) -> RunState:
    """The state of a new run, written down."""
    cfg = absolute_paths(configure(*words, f"output={folder}"), folder.parent)
    made = RunState.create(cfg, list(words))
    made.write()
    return made


def test_a_state_is_read_as_it_was_written_where_the_folder_is_now(tmp_path: Path) -> None:
    made = state(tmp_path / "run", "data=folder", "data.root='a b: [c]'")
    (tmp_path / "run").rename(tmp_path / "moved")
    read = RunState.read(tmp_path / "moved")
    made.folder = tmp_path / "moved"
    assert read == made


@pytest.mark.parametrize("content", ["", "- 1", "overrides: [", "stuff: 1"])
def test_a_damaged_state(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(UserError, match="no run to resume"):
        RunState.read(tmp_path)


def test_other_options_do_not_resume_a_run(tmp_path: Path) -> None:
    state(tmp_path / "run", "seed=1")
    cfg = absolute_paths(configure("seed=2", f"output={tmp_path / 'run'}"), tmp_path)
    with pytest.raises(UserError, match="seed was 1 when the run began, and is 2 now"):
        RunState.resume(cfg)


def test_an_override_that_names_a_class_counts_where_the_command_repeats_it(tmp_path: Path) -> None:
    made = state(tmp_path / "run", "seed=1", CALLBACK)
    with pytest.raises(UserError, match=r"names classes to load: .* repeat \+callbacks"):
        resumable_overrides(made, [])
    assert resumable_overrides(made, [CALLBACK]) == ["seed=1", CALLBACK]
    with pytest.raises(UserError, match="leave out seed=2"):
        resumable_overrides(made, [CALLBACK, "seed=2"])


@pytest.mark.parametrize(
    "word",
    [
        "+callbacks.x={_target_: os.mkdir, path: PWNED}",
        "+callbacks.x=[{_target_: os.mkdir, path: PWNED}]",
        "data._target_=os.mkdir",
        "hydra.searchpath=[file:///tmp]",
        "+hydra.callbacks.x._target_=os.mkdir",
    ],
)
def test_a_strangers_state_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made = state(tmp_path / "run", "seed=1")
    made.overrides = ["seed=1", word]
    made.config["callbacks"] = {"x": {"_target_": "os.mkdir", "path": "PWNED"}}
    made.write()
    with pytest.raises((UserError, HydraException)):
        resume([f"resume={tmp_path / 'run'}"])
    assert not (tmp_path / "PWNED").exists()


def test_a_digest_is_of_images_classes_and_splits(images: Path) -> None:
    before = data_digest(set_up(images, val_fraction=0.34))
    assert data_digest(set_up(images, val_fraction=0.34)) == before
    assert data_digest(set_up(images, val_fraction=0.34, seed=1)) != before
    for split in ("train", "test"):  # the same images, two classes exchanged
        folder = images / split
        for old, new in (("red", "x"), ("blue", "red"), ("x", "blue")):
            (folder / old).rename(folder / new)
    assert data_digest(set_up(images, val_fraction=0.34)) != before


def test_a_result_can_be_moved_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning names checkpoints absolutely, without links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    Path("link").symlink_to("disk")
    for output in (Path("a"), Path("link/b")):
        (output / "last").mkdir(parents=True)
        StageResult("last", (output / "last" / "best.ckpt").resolve(), {"val_top1": 1.0}).write(output)
        output.rename("moved")
        found = StageResult.read(Path("moved"), "last")
        assert found is not None and found.checkpoint == Path("moved/last/best.ckpt")
        Path("moved").rename(f"{output.name}-done")
    assert StageResult.read(Path("a-done"), "finetune") is None


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_neither_trained_again_nor_replaced(images: Path, tmp_path: Path) -> None:
    words = toy(images, SMALL, "stage=last", "last.l2=[1e-2]", f"output={tmp_path / 'out'}")
    figure = train(configure(*words), words)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert train(configure(*words), words, resume=True) == figure
    with pytest.raises(UserError, match=r"output=.*out holds a run already .*choose another folder"):
        train(configure(*words, "seed=3"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.usefixtures("tiny")
def test_figures_of_a_part_of_the_images_say_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["+trainer.limit_test_batches=0.5", "+trainer.limit_val_batches=1"]
    run(images, tmp_path / "out", SMALL, "stage=last", "last=sgd", "last.epochs=1", *limits)
    shown = capsys.readouterr().out
    assert re.search(r"test top-1 .*%  of 3 of the 6 images", shown)
    assert re.search(r"validation top-1 .*%  of some of the 6 images", shown)
    run(images, tmp_path / "solved", SMALL, "stage=last", "+trainer.fast_dev_run=true")
    assert re.search(r"validation top-1 .*%  of 6 images", capsys.readouterr().out)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("val_fraction", "validated"), [(0.34, 6), (0, 12)])
def test_a_result_tells_which_images_its_figures_are_of(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    val_fraction: float,
    validated: int,
) -> None:
    """Without validation images, its validation figures are of the training images, in folds."""
    for path in (images / "train" / "red").glob("[1-5].png") if validated == 12 else ():
        path.unlink()  # the one that is left is alone in its class
    options = [SMALL, "stage=last", "last.folds=3", f"data.val_fraction={val_fraction}"]
    run(images, tmp_path / "out", *options)
    assert re.search(rf"validation top-1 .*%  of {validated} ", capsys.readouterr().out)
    result = StageResult.of(tmp_path / "out" / "last" / "best.ckpt")
    assert StageResult.of(tmp_path / "out" / "last" / "last.ckpt") is None
    assert result and result.predictions
    assert (result.metrics["images_val"], result.metrics["images_test"]) == (validated, 6)
    assert {*result.predictions.digests} == folder_data(images, val_fraction=val_fraction).split.test
    assert result.predictions.split == "test"
