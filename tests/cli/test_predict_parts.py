"""`bcnn predict --output FOLDER`: parts are whole or absent, and hold every image once."""

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Bcnn, Outcome, fork, read_csv, register_tiny, write, write_classes

from bcnn.cli.app import main
from bcnn.evaluation import parts
from bcnn.evaluation.inference import predict_paths
from bcnn.evaluation.writers import FORMATS, Prediction
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.utils import device
from bcnn.utils.errors import UserError

SIZE = 16  # images of a part, in these tests
WORDS = ["predict", "best.safetensors", "photos", "--workers", "0", "--format", "csv"]


@pytest.fixture
def photos(calibrated: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and photos/{a,b}/*.png: 47 images, or three parts."""
    monkeypatch.setattr(parts, "IMAGES", SIZE)
    monkeypatch.chdir(tmp_path)
    save_model(calibrated, "best.safetensors")
    write_classes(tmp_path / "photos", a=30, b=17)
    return tmp_path / "photos"


@pytest.fixture
def predict(bcnn: Bcnn, photos: Path) -> partial[Outcome]:
    return partial(bcnn, *WORDS)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other processes import what is in this file and in conftest.py."""
    folders = (ROOT, ROOT / "tests", Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))


def content(folder: str) -> dict[str, bytes]:
    """The bytes of each part by name, and of the summary."""
    return {file.name: file.read_bytes() for file in (*parts_of(folder), Path(folder, "summary.json"))}


def parts_of(folder: str) -> list[Path]:
    return sorted(Path(folder, "parts").glob("part-*"))


def rows_of(folder: str) -> list[dict[str, str]]:
    return [row for file in parts_of(folder) for row in read_csv(file)]


def run_tiny(words: list[str]) -> None:
    """The program, in a process of its own, with what `photos` and `bcnn` set in this one."""
    parts.IMAGES = SIZE
    device.fastest_precision = lambda _: "32-true"
    register_tiny()
    sys.exit(main(words))


@pytest.mark.slow
def test_killed_at_random_moments_the_parts_are_those_of_one_run(photos: Path) -> None:
    write_classes(photos, c=550)
    draws = random.Random(0)

    def run(output: str, more: int = 99) -> int | None:
        """Kill the program a moment after it has written so many more parts, if it has not ended."""
        process = fork.Process(target=run_tiny, args=([*WORDS, "--output", output],))
        goal = len(parts_of(output)) + more
        process.start()
        while len(parts_of(output)) < goal and process.exitcode is None:
            process.join(0.005)
        process.join(draws.uniform(0, 0.02))
        process.kill()
        process.join()
        return process.exitcode

    assert run("whole") == 0
    for more in (1, 0, 3, 1, 0, 2, 4, 1):
        run("killed", more)
        sizes = {len(read_csv(file)) for file in parts_of("killed")}
        assert sizes and sizes <= {SIZE, 597 % SIZE}  # whole or absent
    assert run("killed") == 0 and content("killed") == content("whole")
    names = [{file.name for file in Path(output).rglob("*")} for output in ("killed", "whole")]
    assert names[0] == names[1]  # nothing is left of files that were not finished
    images = Counter(row["image"] for row in rows_of("killed"))
    assert images == Counter(map(str, Path("photos").rglob("*.png")))


def predict_and_die(*arguments: Any, **options: Any) -> Iterator[Prediction]:
    """`predict_paths`, where the first process that is within its second part is killed."""
    for number, prediction in enumerate(predict_paths(*arguments, **options)):
        if number == SIZE + SIZE // 2:
            with suppress(FileExistsError):
                Path("killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        with Path(f"actor-{os.getpid()}").open("a") as file:
            print(prediction.path, file=file)
        yield prediction


def refuse(*arguments: Any, **options: Any) -> Iterator[Prediction]:
    raise UserError("this machine lacks the images")


@pytest.mark.slow
def test_an_actor_of_a_ray_cluster_is_killed_and_the_parts_are_those_of_one_run(
    predict: partial[Outcome], photos: Path, importable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines, both of which are this one, with a core each."""
    pytest.importorskip("ray.data")  # not in the development environment
    from ray.cluster_utils import Cluster

    write_classes(photos, c=400)
    predict("--output", "whole")
    predict("--output", "out", "--shard", "2/3")  # what is there is kept
    before = {file: file.stat().st_mtime_ns for file in parts_of("out")}
    monkeypatch.setattr("bcnn.evaluation.inference.predict_paths", predict_and_die)
    cluster = Cluster()
    try:
        with chdir("/"):  # where the actors start, too
            cluster.add_node(num_cpus=1)
            cluster.add_node(num_cpus=1)
        assert predict("--output", "out", "--ray", cluster.address).code == 0
        monkeypatch.setattr("bcnn.evaluation.inference.predict_paths", refuse)
        refused = predict("--output", "refused", "--ray", cluster.address)
    finally:
        cluster.shutdown()
    assert refused.code == 1 and refused.err.endswith("error: this machine lacks the images\n")
    actors = list(Path().glob("actor-*"))
    images = Counter(path for file in actors for path in file.read_text().splitlines())
    assert len(actors) > 1 and images.total() - len(images) == SIZE // 2  # of one part, twice
    assert content("out") == content("whole")
    assert before.items() <= {file: file.stat().st_mtime_ns for file in parts_of("out")}.items()


def test_shards_share_the_parts_and_the_last_one_sums_up(predict: partial[Outcome]) -> None:
    assert predict("--output", "whole").code == 0
    for number, shard in enumerate((3, 1, 2), 1):
        assert not Path("out/summary.json").exists()
        outcome = predict("--output", "out", "--shard", f"{shard}/3")
        assert outcome.code == 0 and len(parts_of("out")) == number
        assert len(list(Path("out/parts").glob(f"part-{shard - 1:06}-*"))) == 1
    assert content("out") == content("whole")


def test_the_summary_counts_every_image_once_and_gives_reasons(
    predict: partial[Outcome], photos: Path
) -> None:
    (photos / "a" / "3.png").write_bytes(b"none")
    outcome, rows = predict("--output", "out"), rows_of("out")
    summary = json.loads(Path("out/summary.json").read_text())
    marks = Counter(row["unlike_training"] for row in rows)
    expected = {"answered": marks["no"], "broken": 1, "unlike the training images": marks["yes"]}
    assert {**Counter(expected)} == {"unlike the training images": 0} | summary["images"]
    assert summary["classes"] == Counter(row["top1"] for row in rows if row["unlike_training"] == "no")
    assert "cannot read the image" in summary["broken"].pop("photos/a/3.png") and not summary["broken"]
    for each in (outcome, predict("--output", "out")):  # the second has nothing left to predict
        assert each.code == 1 and "photos/a/3.png: cannot read the image" in each.err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--coverage 0.5", "predictions by coverage 0.95, not 0.5"),
        ("--format jsonl", "predictions by format csv, not jsonl"),
        ("checkpoint", "predictions by checkpoint "),
        ("photos/a/0a.png", "part-000000-"),  # in the first part
        ("photos/b/999.png", "part-000002-"),  # in the last one
        ("fewer", "part-000002-"),
        ("--format table", "add --format csv, jsonl or parquet"),
        ("--by group --group a|b", "leave out --by group"),
        ("--shard 0/2", "expected I/N with I from 1 to N"),
    ],
)
def test_what_does_not_fit_a_folder_is_one_sentence(
    predict: partial[Outcome], calibrated: BCNN, photos: Path, change: str, sentence: str
) -> None:
    predict("--output", "out")
    before = content("out")
    if change == "checkpoint":
        calibrated.head.bias.data.add_(1)
        save_model(calibrated, "best.safetensors")
    elif change == "fewer":
        for file in sorted(photos.glob("b/*"))[1 - SIZE :]:  # the last part, to its last image
            file.unlink()
    elif change.startswith("photos"):
        write(Path(change))
    outcome = predict("--output", "out", *(change.split() if change.startswith("--") else []))
    assert outcome.code == 1 and sentence in outcome.err and outcome.err.count("\n") == 1
    assert content("out") == before


def test_every_format_has_the_same_rows(predict: partial[Outcome], photos: Path) -> None:
    (photos / "a" / "3.png").write_bytes(b"none")
    for form in ("csv", "jsonl", "parquet"):
        predict("--output", form, "--format", form)
    expected, table = rows_of("csv"), pq.read_table("parquet/parts")
    assert table.column_names == [*expected[0]]
    lines = [line for file in parts_of("jsonl") for line in file.open()]
    for row, cells, line in zip(expected, table.to_pylist(), map(json.loads, lines), strict=True):
        assert row["image"] == cells["image"] == line["image"]
        assert row["error"] == (cells["error"] or "") == line.get("error", "")
        if not row["error"]:
            assert cells["probability"] == pytest.approx(float(row["probability"]), abs=1e-6)
            names = row["prediction_set"].split("; ")
            assert names == cells["prediction_set"] == line["prediction_set"]
            assert cells["unlike_training"] == (row["unlike_training"] == "yes")


def test_ray_needs_a_folder_of_parts_and_its_extra(
    predict: partial[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bcnn.cli.predict.find_spec", lambda name: None)
    assert "--ray needs a folder of parts: add --output FOLDER" in predict("--ray", "auto").err
    assert "pip install 'bcnn[ray]'" in predict("--output", "out", "--ray", "auto").err


def test_a_part_is_written_before_the_images_are_listed(tiny: BCNN, photos: Path) -> None:
    paths = iter(["photos/a/0.png"] * 100 * SIZE)
    predictor = partial(predict_paths, tiny, workers=0, batch=4)
    writer = partial(FORMATS["csv"], model=tiny, top=3)
    folder = parts.PartFolder(Path("out"), {"format": "csv"})
    found = parts.write_parts(folder.absent(paths), predictor, writer)
    for _ in range(SIZE + 1):
        next(found)
    assert len(rows_of("out")) == SIZE and len(list(paths)) == 98 * SIZE


@pytest.mark.slow
def test_each_gpu_writes_a_shard(
    predict: partial[Outcome], importable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two GPUs that are not there: their processes use the CPU."""
    predict("--output", "whole")
    script = "import sys, test_predict_parts\ntest_predict_parts.run_tiny(sys.argv[1:])"
    command = [sys.executable, "-c", script, *WORDS, "--output", "out"]
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setattr("bcnn.utils.device.cuda_devices", lambda: ["0", "1"])
    assert predict("--output", "out").code == 0
    assert content("out") == content("whole")
