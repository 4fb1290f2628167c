"""Which images are held out: what decides it, and which splits a trained model has."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bcnn.data.draws import hold_out
from bcnn.data.index import ImageIndex
from bcnn.data.integrity import Finding
from bcnn.data.splits import SplitRecord, choose, follow, too_few
from bcnn.utils.console import setup_logging


def samples(count: int, seed: int = 0) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Images of one class, and a digest for each."""
    rng = random.Random(seed)
    digests = {f"{seed}/{i}.jpg": f"{rng.getrandbits(128):032x}" for i in range(count)}
    return [(path, 0) for path in digests], digests


def sides(images: list[tuple[str, int]], digests: dict[str, str], **shares: float) -> dict[str, str]:
    val, test = hold_out(images, digests, digests, 0, **shares)
    assert not val & test
    return {path: "val" if path in val else "test" if path in test else "train" for path, _ in images}


FRACTIONS = [
    {"val": v, "test": t} for v, t in ((0.1, 0.2), (0.2, 0.2), (0.34, 0.1), (0.1, 0), (0, 0.5))
]


def cases() -> Iterator[tuple[int, int, dict[str, float]]]:
    for fractions in FRACTIONS:
        for count in (15, 16, 17, 20, 24, 29, 30, 31, 40, 80):
            for seed in range(3):
                yield count, seed, fractions


def test_an_image_more_or_less_moves_no_more_than_one_other() -> None:
    for count, seed, fractions in cases():
        images, digests = samples(count, seed)
        before = sides(images, digests, **fractions)
        for gone in images:
            rest = [image for image in images if image != gone]
            after = sides(rest, digests, **fractions)
            assert sum(before[path] != side for path, side in after.items()) <= 1, (count, seed, gone)


def test_shares_are_about_those_asked_for_and_none_is_empty() -> None:
    for count, seed, fractions in cases():
        found = list(sides(*samples(count, seed), **fractions).values())
        assert found.count("train") >= 1
        for name, share in fractions.items():
            held = found.count(name)
            assert (held >= 1) == (share > 0)
            if all(fractions.values()):
                assert abs(held - share * count) <= 1 + 4 * share * count**0.5
            else:
                assert held == max(1, round(share * count)) or share == 0


def test_names_order_and_other_classes_decide_nothing() -> None:
    images, digests = samples(30)
    before = sides(images, digests, val=0.1, test=0.2)
    others, more = samples(17, seed=1)
    mixed = [*((path, 1) for path, _ in others), *reversed(images)]
    after = sides(mixed, digests | more, val=0.1, test=0.2)
    assert all(after[path] == side for path, side in before.items())
    renamed = {f"z{path}": digest for path, digest in digests.items()}
    after = sides([(path, 0) for path in renamed], renamed, val=0.1, test=0.2)
    assert all(after[f"z{path}"] == side for path, side in before.items())


def test_copies_are_on_one_side_and_those_of_two_classes_are_trained_on() -> None:
    images, digests = samples(20)
    for number in range(20):
        digests[f"copy{number}"] = digests[f"0/{number}.jpg"]
    copies = [(f"copy{number}", 0) for number in range(20)]
    found = sides([*images, *copies], digests, val=0.2, test=0.3)
    assert all(found[f"copy{n}"] == found[f"0/{n}.jpg"] for n in range(20))
    assert len(set(found.values())) == 3
    elsewhere = [(path, 1) for path, _ in copies[:10]]
    found = sides([*images, *elsewhere], digests, val=0.2, test=0.3)
    assert {found[f"0/{n}.jpg"] for n in range(10)} == {"train"}


def test_the_seed_decides() -> None:
    images, digests = samples(40)
    drawn = {frozenset(hold_out(images, digests, digests, seed, 0.1, 0.2)[1]) for seed in range(10)}
    assert len(drawn) == 10


Recorded = tuple[ImageIndex, dict[str, str], SplitRecord]


@pytest.fixture
def index() -> Recorded:
    images, digests = samples(10)
    whole = ImageIndex(["a"], images, divided=False)
    drawn = ImageIndex(["a"], images[:6], images[6:8], images[8:])
    findings = {path: Finding(digest=digest) for path, digest in digests.items()}
    return whole, digests, SplitRecord.of(drawn, findings, {"seed": 0})


def test_recorded_splits_are_followed_and_new_images_trained_on(index: Recorded) -> None:
    whole, digests, split = index
    digests = {**digests, "new": "f" * 32}
    whole.train.append(("new", 0))
    found = follow(whole, whole, digests, digests, split)
    assert [len(part) for part in found.splits.values()] == [7, 2, 2]
    assert ("new", 0) in found.train
    assert found.test == whole.train[8:10]


def test_a_class_that_is_not_recorded_is_split_as_drawn(index: Recorded) -> None:
    whole, digests, split = index
    images, others = samples(10, seed=1)
    both = ImageIndex(["a", "b"], whole.train + [(path, 1) for path, _ in images], divided=False)
    drawn = ImageIndex(["a", "b"], both.train[2:17], val=both.train[17:18], test=both.train[:2])
    drawn.test += both.train[18:]
    found = follow(both, drawn, digests | others, digests | others, split)
    assert found.val == both.train[6:8] + both.train[17:18]
    assert found.test == both.train[8:10] + both.train[18:]


def test_given_test_images_that_the_model_has_used_are_left_out(index: Recorded) -> None:
    whole, digests, split = index
    given = ImageIndex(["a"], whole.train[:4], test=whole.train[4:])
    assert follow(given, given, digests, digests, split).test == whole.train[8:]
    chosen, said = choose(given, digests, split, "test")
    assert chosen == whole.train[8:]
    used = ("2 of 6 images in test were trained on", "2 of 6 images in test were validated on")
    assert said == [f"{each}: left out" for each in used]
    given = ImageIndex(["a"], whole.train[:4], val=whole.train[4:])
    assert choose(given, digests, split, "val")[0] == whole.train[6:]  # validated on, as before


def test_what_can_be_judged_of_a_folder_without_splits(index: Recorded) -> None:
    whole, digests, split = index
    parts = {"train": whole.train[:6], "val": whole.train[6:8], "test": whole.train[8:]}
    for name, expected in parts.items():
        assert choose(whole, digests, split, name) == (expected, [])
    assert len(choose(whole, digests, split, "all")[0]) == 10
    assert "6 of 10" in choose(whole, digests, split, "all")[1][0]
    strange = {path: digest[::-1] for path, digest in digests.items()}
    assert choose(whole, strange, split, "test") == (whole.train, [])  # none of them was trained on
    assert choose(whole, digests, SplitRecord(), "test") == (whole.train, [])
    other = strange | {path: digests[path] for path, _ in (whole.train[0], whole.train[9])}
    split = replace(split, test=split.test | frozenset(map(str, range(9))))  # of which one is here
    assert choose(whole, other, split, "test")[0] == whole.train[1:]


def test_a_record_lists_what_any_stage_was_trained_on() -> None:
    first = SplitRecord({}, frozenset("abc"), frozenset("d"), frozenset("ef"))
    second = SplitRecord({"seed": 1}, frozenset("ae"), frozenset("b"), frozenset("df"), {"f": 5})
    both = SplitRecord({"seed": 1}, frozenset("abce"), frozenset("d"), frozenset("f"), {"f": 5})
    assert second.after(first) == both
    assert SplitRecord.from_plain(json.loads(json.dumps(both.plain()))) == both


LOOKS = {"a": 0xFFFF0000, "b": 0xFFFF00FF, "c": 0xFF00}


def test_an_image_saved_again_is_the_recorded_one_that_looks_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A digest that is recorded decides; else an image that was trained on comes first."""
    record = SplitRecord({}, frozenset("a"), frozenset("b"), frozenset("c"), LOOKS)
    looks = {
        "c": 0xFFFF0001,  # recorded
        "again": 0xFFFF003F,  # differs from a in 6 bits, from b in 2
        "validated": 0xFFFF01FF,  # differs from b in 1 bit, from a in 9
        "another": 0x7F00000000,
        "flat": None,
    }
    setup_logging()
    findings = {f"{d}.jpg": Finding(digest=d, perceptual_hash=h) for d, h in looks.items()}
    found = [*record.recognise(findings).values()]
    assert found == ["c", "a", "b", "another", "flat"]
    assert "2 of 5 images look the same as some that the checkpoint records" in capsys.readouterr().out
    record.recognise({"new": findings["another.jpg"]})
    assert "the checkpoint records none of these images" in capsys.readouterr().err


def test_copies_do_not_make_a_class_large_enough() -> None:
    copies = ImageIndex(["a", "b"], [("0", 0), ("1", 0), ("2", 1), ("3", 1), ("4", 1)], divided=False)
    digests = {"0": "a0", "1": "a0", "2": "b2", "3": "b3", "4": "b4"}
    (sentence,) = too_few(copies, digests, Path("set"), 0.1, None)
    assert sentence.startswith("set: too few images of a (1): data.val_fraction=0.1 and data.test_fra")
    assert too_few(copies, digests, Path("set"), 0, 0) == []
