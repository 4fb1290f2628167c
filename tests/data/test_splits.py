"""Who is held out: what decides it, and that a trained model's splits outlive its folder."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import configure, folder_data, set_up, toy, write_images
from PIL import Image

from bcnn.cli import evaluate
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import ImageIndex
from bcnn.data.splits import SplitRecord, choose, draw_splits, follow, hold_out
from bcnn.models.checkpoint import load_model, save_model
from bcnn.training.run import run
from bcnn.utils.errors import UserError
from bcnn.utils.options import command


def samples(count: int, seed: int = 0) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Images of one class, and a content for each."""
    rng = random.Random(seed)
    content = {f"{seed}/{i}.jpg": f"{rng.getrandbits(128):032x}" for i in range(count)}
    return [(path, 0) for path in content], content


def sides(images: list[tuple[str, int]], content: dict[str, str], **shares: float) -> dict[str, str]:
    val, test = hold_out(images, content, 0, **shares)
    assert not val & test
    return {path: "val" if path in val else "test" if path in test else "train" for path, _ in images}


FRACTIONS = [
    {"val": 0.1, "test": 0.2},
    {"val": 0.2, "test": 0.2},
    {"val": 0.34, "test": 0.1},
    {"val": 0.1},
    {"val": 0, "test": 0.5},
]


def cases() -> Iterator[tuple[int, int, dict[str, float]]]:
    for fractions in FRACTIONS:
        for count in (15, 16, 17, 20, 24, 29, 30, 31, 40, 80):
            for seed in range(3):
                yield count, seed, fractions


def test_an_image_more_or_less_moves_no_more_than_one_other() -> None:
    for count, seed, fractions in cases():
        images, content = samples(count, seed)
        before = sides(images, content, **fractions)
        for gone in images:
            rest = [image for image in images if image != gone]
            after = sides(rest, content, **fractions)
            assert sum(before[path] != side for path, side in after.items()) <= 1, (count, seed, gone)


def test_shares_are_about_those_asked_for_and_none_is_empty() -> None:
    for count, seed, fractions in cases():
        found = list(sides(*samples(count, seed), **fractions).values())
        assert found.count("train") >= 1
        for name, share in fractions.items():
            held = found.count(name)
            assert (held >= 1) == (share > 0)
            if fractions.get("test") and fractions["val"]:
                assert abs(held - share * count) <= 1 + 4 * share * count**0.5
            else:
                assert held == max(1, round(share * count)) or share == 0


def test_names_order_and_other_classes_decide_nothing() -> None:
    images, content = samples(30)
    before = sides(images, content, val=0.1, test=0.2)
    others, more = samples(17, seed=1)
    mixed = [*((path, 1) for path, _ in others), *reversed(images)]
    after = sides(mixed, content | more, val=0.1, test=0.2)
    assert all(after[path] == side for path, side in before.items())
    renamed = {f"z{path}": digest for path, digest in content.items()}
    after = sides([(path, 0) for path in renamed], renamed, val=0.1, test=0.2)
    assert all(after[f"z{path}"] == side for path, side in before.items())


def test_images_of_one_content_are_on_one_side_and_those_of_two_classes_are_trained_on() -> None:
    images, content = samples(20)
    for number in range(20):
        content[f"copy{number}"] = content[f"0/{number}.jpg"]
    copies = [(f"copy{number}", 0) for number in range(20)]
    found = sides([*images, *copies], content, val=0.2, test=0.3)
    assert all(found[f"copy{n}"] == found[f"0/{n}.jpg"] for n in range(20))
    assert len(set(found.values())) == 3
    elsewhere = [(path, 1) for path, _ in copies[:10]]
    found = sides([*images, *elsewhere], content, val=0.2, test=0.3)
    assert {found[f"0/{n}.jpg"] for n in range(10)} == {"train"}


def test_the_seed_decides() -> None:
    images, content = samples(40)
    drawn = {frozenset(hold_out(images, content, seed, 0.1, 0.2)[1]) for seed in range(10)}
    assert len(drawn) == 10


def test_many_images_take_no_more_time_each_than_a_few() -> None:
    images, content = samples(50_000)
    start = time.process_time()
    drawn = draw_splits(ImageIndex(["a"], images, divided=False), content, 0.1, 0.2, seed=0)
    assert time.process_time() - start < 5  # about 0.5; a minute where each makes a set
    assert sum(map(len, drawn.splits.values())) == 50_000


@pytest.fixture
def layout() -> tuple[ImageIndex, dict[str, str], SplitRecord]:
    images, content = samples(10)
    whole = ImageIndex(["a"], images, divided=False)
    drawn = ImageIndex(["a"], images[:6], images[6:8], images[8:])
    return whole, content, SplitRecord.of(drawn, content, {"seed": 0})


def test_recorded_splits_are_followed_and_new_images_trained_on(
    layout: tuple[ImageIndex, dict[str, str], SplitRecord],
) -> None:
    whole, content, split = layout
    content = {**content, "new": "f" * 32}
    whole.train.append(("new", 0))
    found, said = follow(whole, content, split)
    assert [len(part) for part in found.splits.values()] == [7, 2, 2] and not said
    assert ("new", 0) in found.train
    assert found.test == whole.train[8:10]


def test_given_test_images_that_were_trained_on_are_left_out(
    layout: tuple[ImageIndex, dict[str, str], SplitRecord],
) -> None:
    whole, content, split = layout
    given = ImageIndex(["a"], whole.train[:4], test=whole.train[4:])
    found, said = follow(given, content, split)
    assert found.test == whole.train[6:] and "2 of 6 images in test were trained on" in said[0]
    chosen, said = choose(given, content, split, "test")
    assert chosen == whole.train[6:] and "2 of 6 images were trained on: left out" in said[0]


def test_what_can_be_judged_of_a_folder_without_splits(
    layout: tuple[ImageIndex, dict[str, str], SplitRecord],
) -> None:
    whole, content, split = layout
    for name, expected in split_of(whole).items():
        assert choose(whole, content, split, name) == (expected, [])
    assert len(choose(whole, content, split, "all")[0]) == 10
    assert "6 of 10" in choose(whole, content, split, "all")[1][0]
    strange = {path: digest[::-1] for path, digest in content.items()}
    assert choose(whole, strange, split, "test") == (whole.train, [])  # none of them was trained on
    chosen, said = choose(whole, content, None, "test")
    assert chosen == whole.train and "does not record" in said[0]


def split_of(whole: ImageIndex) -> dict[str, list[tuple[str, int]]]:
    return {"train": whole.train[:6], "val": whole.train[6:8], "test": whole.train[8:]}


def test_a_record_lists_what_any_stage_was_trained_on() -> None:
    first = SplitRecord({}, frozenset("abc"), frozenset("d"), frozenset("ef"))
    second = SplitRecord({}, frozenset("ae"), frozenset("b"), frozenset("f"))
    assert second.after(first) == SplitRecord({}, frozenset("abce"), frozenset(), frozenset("f"))
    assert SplitRecord.from_plain(second.plain()) == second


def unsplit(folder: Path) -> Path:
    write_images(folder, 12)
    return folder


@pytest.mark.usefixtures("tiny")
def test_a_finetune_has_the_splits_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = unsplit(tmp_path / "images")
    small = "model.backbone.name=tiny"
    run(configure(*toy(images, small, "stage=last", "seed=1", f"output={tmp_path / 'a'}")))
    start = load_model(tmp_path / "a" / "last" / "best.ckpt")
    assert start.split and start.split.recipe["seed"] == 1
    write_images(images, 1, seed=7)  # over 0.png of each class: one image gone, one new
    short = ["stage=finetune", "finetune.epochs=1", "finetune.batch_size=6", f"output={tmp_path / 'b'}"]
    capsys.readouterr()
    run(configure(*toy(images, *short, f"ckpt={tmp_path / 'a' / 'last' / 'best.ckpt'}")))
    printed = capsys.readouterr().out
    assert "splits as the checkpoint records them (seed=1" in printed
    assert "33 of its 36 images are here, and 3 that it does not know" in printed
    split = load_model(tmp_path / "b" / "finetune" / "best.ckpt").split
    assert split and start.split.train < split.train
    assert split.recipe == start.split.recipe
    assert len(split.train - start.split.train) == 3
    assert split.val <= start.split.val and split.test <= start.split.test


def test_files_keep_the_record(tmp_path: Path) -> None:
    images = unsplit(tmp_path / "images")
    run(configure(*toy(images, "stage=last", f"output={tmp_path / 'a'}")))
    model = load_model(tmp_path / "a" / "last" / "best.ckpt")
    save_model(model, tmp_path / "a.safetensors")
    assert model.split and load_model(tmp_path / "a.safetensors").split == model.split
    save_model(model, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth", model.classes).split is None


def test_images_copied_elsewhere_are_known_again(tmp_path: Path) -> None:
    data = FineGrainedDataModule(unsplit(tmp_path / "images"), 32, num_workers=0)
    data.setup()
    for number, path in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        (tmp_path / "copy" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "copy" / path.parent.name / f"{99 - number}.png")
    copied = FineGrainedDataModule(tmp_path / "copy", 32, num_workers=0)
    copied.setup()
    assert copied.split == data.split


def test_too_few_different_images(tmp_path: Path) -> None:
    images = unsplit(tmp_path / "images")
    for path in (images / "red").iterdir():
        shutil.copy(images / "red" / "0.png", path) if path.name != "0.png" else None
    with pytest.raises(UserError, match=r"too few images of red \(1\)"):
        FineGrainedDataModule(images, 32).setup()


@pytest.mark.slow
def test_labels_that_mean_nothing_score_the_same_in_training_and_in_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "noise" / name).mkdir(parents=True)
        for number in range(15):
            pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "noise" / name / f"{number}.png")
    run(configure(*toy(tmp_path / "noise", "stage=last", "seed=1", f"output={tmp_path / 'a'}")))
    trained = json.loads((tmp_path / "a" / "figures.json").read_text())
    (tmp_path / "noise" / "a" / "0.png").rename(tmp_path / "noise" / "a" / "renamed.png")
    for name in ("a", "b"):  # one more
        pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / name / "more.png")
    ckpt = f"ckpt={tmp_path / 'a' / 'last' / 'best.ckpt'}"
    words = [ckpt, f"data={tmp_path / 'noise'}", f"output={tmp_path / 'b'}"]
    assert command(evaluate.Options, evaluate.main, evaluate.USAGE, words) == 0
    printed = capsys.readouterr().out
    assert "2 images that the checkpoint does not record are left out" in printed
    evaluated = json.loads((tmp_path / "b" / "figures.json").read_text())
    assert evaluated["images"] == trained["images"] and evaluated["top1"] == trained["top1"]
    short = [
        "stage=finetune",
        "finetune.epochs=1",
        "finetune.batch_size=6",
        "finetune.optimizer.lr=1e-9",
        f"output={tmp_path / 'c'}",
    ]
    run(configure(*toy(tmp_path / "noise", *short, ckpt)))  # at another seed
    assert json.loads((tmp_path / "c" / "figures.json").read_text())["top1"] == trained["top1"]


def test_a_class_of_which_nothing_is_left_to_train_on_is_told(images: Path) -> None:
    data = set_up(images / "train", val_fraction=0, test_fraction=0)
    red = [sample for sample in data.train if data.classes[sample[1]] == "red"]
    rest = [sample for sample in data.train if sample not in red]
    record = SplitRecord.of(ImageIndex(data.classes, rest, red, []), data.content, {"seed": 0})
    with pytest.raises(UserError, match=r"no images to train on are left of red: .*; add others"):
        data.follow(record)
    weights = folder_data(images).class_weights()
    assert torch.isfinite(weights).all()
