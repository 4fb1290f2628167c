"""Groups of images: what names them, and that no draw cuts one."""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bcnn, set_up, write, write_classes
from PIL import Image

from bcnn.data.draws import draw_fraction, hold_out
from bcnn.data.groups import join_groups
from bcnn.data.integrity import Finding
from bcnn.data.splits import SplitRecord
from bcnn.training.convex_stage import comparable, fold_numbers
from bcnn.utils.console import setup_logging
from bcnn.utils.errors import UserError

Samples = list[tuple[str, int]]


def cameras(seed: int, classes: int = 12, count: int = 30) -> tuple[Samples, dict[str, str]]:
    """Images by path and class, and the camera of each: some classes are rare, cameras see several."""
    rng = random.Random(seed)
    samples = [(f"{i}", min(int(rng.expovariate(0.4)), classes - 1)) for i in range(600)]
    return samples, {path: f"group {rng.randrange(count)}" for path, _ in samples}


def by_group(groups: dict[str, str], value: dict[str, Any]) -> dict[str, set[Any]]:
    found = defaultdict(set)
    for path, group in groups.items():
        found[group].add(value[path])
    return found


def test_without_groups_the_draws_of_a_seed_stay_the_same() -> None:
    rng = random.Random(1)
    digests = {f"{i}": f"{rng.getrandbits(64):016x}" for i in range(20)}
    samples = [(path, int(path) % 2) for path in digests]
    val, test = hold_out(samples, digests, digests, 3, 0.2, 0.2)
    assert (val, test) == ({"5", "10", "16", "17"}, {"3", "6", "9", "14"})
    drawn = draw_fraction(samples, digests, 0.3, 0)
    assert [path for path, _ in drawn] == ["6", "7", "13", "16", "17", "18"]
    labels = torch.tensor([0] * 7 + [1] * 3 + [2] * 2 + [3])
    folds = fold_numbers(labels, 5, range(len(labels)))
    assert folds.tolist() == [0, 0, 1, 2, 2, 3, 4, 1, 2, 3, 2, 3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_no_draw_cuts_a_group_of_several_classes(seed: int) -> None:
    samples, groups = cameras(seed)
    digests = {path: path for path, _ in samples}
    val, test = hold_out(samples, digests, groups, seed, 0.2, 0.2)
    split = {path: "val" if path in val else "test" if path in test else "train" for path, _ in samples}
    assert all(len(splits) == 1 for splits in by_group(groups, split).values())
    train = [sample for sample in samples if split[sample[0]] == "train"]
    assert {label for _, label in train} == {label for _, label in samples}
    assert all(0.08 < len(part) / len(samples) < 0.4 for part in (val, test))

    half, most = (draw_fraction(train, groups, share, seed) for share in (0.5, 0.7))
    assert {*half} < {*most} < {*train}
    assert {label for _, label in half} == {label for _, label in train}
    kept = {path: (path, label) in half for path, label in train}
    assert all(len(sides) == 1 for sides in by_group({p: groups[p] for p in kept}, kept).values())

    labels = torch.tensor([label for _, label in samples])
    numbers = fold_numbers(labels, 5, [*groups.values()])
    fold = dict(zip(groups, numbers.tolist(), strict=True))
    assert all(len(folds) == 1 for folds in by_group(groups, fold).values())
    assert all(0.05 < share < 0.4 for share in numbers.bincount(minlength=5) / len(samples))
    known = comparable(labels, numbers).tolist()
    for i in known:  # a solution that has not seen its fold has seen its class
        assert ((labels == labels[i]) & (numbers != numbers[i])).any()


def test_classes_of_one_group_are_not_cross_validated() -> None:
    labels = torch.tensor([0] * 4 + [1] * 4)
    folds = fold_numbers(labels, 5, ["a"] * 4 + ["b", "b", "c", "c"])
    assert comparable(labels, folds).tolist() == [4, 5, 6, 7]


def test_images_that_join_a_group_do_not_move_it() -> None:
    findings = {f"{i}": Finding(digest=f"{i:016x}") for i in range(6)}
    names = {"0": "fern", "1": "fern", "2": "moss"}
    groups = join_groups(findings, names, near=False)
    assert [*groups.values()][:3] == ["group fern", "group fern", "group moss"]
    assert groups["3"] == findings["3"].digest
    copy = {**findings, "copy": findings["0"]}  # of an image of another group: the two are one
    groups = join_groups(copy, {**names, "copy": "moss"}, near=False)
    assert {groups[name] for name in ("0", "1", "2", "copy")} == {"group moss"}


def plants(root: Path, plants: Sequence[str] = "abcdef") -> None:
    """Two classes of three photographs of each plant, `<class>/<plant>_<number>.png`."""
    for label, name in enumerate(("fern", "moss")):
        for i, plant in enumerate(plants):
            for number in range(3):
                write(root / name / f"{plant}_{number}.png", 1000 * label + 10 * i + number)


@pytest.mark.parametrize(
    ("expression", "groups"), [(r"([a-f])_\d", 6), (r"\w+/[a-f](?=_)", 12), ("(fern|moss)/([a-f])", 2)]
)
def test_an_expression_on_the_paths_names_the_groups(
    expression: str, groups: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first group, or all that it matches; the path of the folder itself does not count."""
    plants(tmp_path / "a_1" / "images")
    setup_logging()
    data = set_up(tmp_path / "a_1" / "images", group=expression)
    assert len({*data.groups.values()}) == groups
    parts = [{data.groups[path] for path, _ in part} for part in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == groups
    if groups > 2:
        assert all(parts)
    else:
        assert "val has no images of fern, moss: too few groups" in capsys.readouterr().err
        assert data.count("train") == "36 images of 2 groups"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group": "plant"}, r"data.group=plant finds no group in 36 of 36 paths, for example .*png"),
        ({"group": "([a-e])_"}, "finds no group in 6 of 36 paths, for example .*f_0.png"),
        ({"group": "(z)?"}, "finds no group in 36 of 36 paths"),
        ({"group": "(a"}, r"data.group=\(a is no regular expression"),
        ({"near_duplicates": "apart"}, "near_duplicates=apart: choose from null, together"),
    ],
)
def test_an_expression_that_finds_no_group_is_an_error(
    options: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    plants(tmp_path)
    with pytest.raises(UserError, match=sentence):
        set_up(tmp_path, **options)


def test_a_list_names_the_groups_in_a_column(tmp_path: Path, bcnn: Bcnn) -> None:
    plants(tmp_path)
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*.png"))
    rows = [f"{path},{path.parent},{path.parent}-{path.name[0]}" for path in paths]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *rows]))
    data = set_up(list=tmp_path / "list.csv")
    assert {*data.groups.values()} == {f"group {c}-{p}" for c in ("fern", "moss") for p in "abcdef"}
    assert "8 images" not in data.count("train") and "groups" in data.count("train")
    part = set_up(list=tmp_path / "list.csv", classes=["fern", "moss"])
    assert part.groups == data.groups
    other = set_up(list=tmp_path / "list.csv", group="([a-f])_")  # in place of the column
    assert len({*other.groups.values()}) == 6

    out = bcnn("check", tmp_path / "list.csv", "--output", tmp_path / "check").out
    counts = [len({data.groups[p] for p, _ in part}) for part in (data.train, data.val, data.test)]
    assert f"groups: {counts[0]} train, {counts[1]} val, {counts[2]} test" in out

    (tmp_path / "list.csv").write_text(
        "\n".join(["path,label,group", *rows[:-1], f"{paths[-1]},moss,"])
    )
    with pytest.raises(UserError, match="line 37: no group"):
        set_up(list=tmp_path / "list.csv")


def test_near_duplicates_are_together_where_that_is_asked_for(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=12, dog=12)
    for path in [*tmp_path.glob("*/*.png")]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
    data = set_up(tmp_path, near_duplicates="together")
    for path in map(str, tmp_path.glob("*/*.png")):
        assert data.groups[path] == data.groups[path[:-3] + "jpg"]
    for part in (data.train, data.val, data.test):
        assert {p[:-4] for p, _ in part if p[-3:] == "png"} == {
            p[:-4] for p, _ in part if p[-3:] == "jpg"
        }
    apart = set_up(tmp_path)
    assert len({*apart.groups.values()}) == 48


def test_groups_that_given_splits_cut_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bcnn: Bcnn
) -> None:
    plants(tmp_path / "train")
    write(tmp_path / "test" / "fern" / "a_9.png", 99)
    write(tmp_path / "test" / "fern" / "z_9.png", 98)
    setup_logging()
    set_up(tmp_path, group="([a-z])_")
    text = "1 of 2 images in test are of groups in train, which makes the metrics too good"
    assert text in capsys.readouterr().err
    out = bcnn("check", tmp_path, "--group", "([a-z])_", "--output", tmp_path.parent / "check").out
    assert text in out


def test_new_images_go_where_a_checkpoint_has_their_group(tmp_path: Path) -> None:
    plants(tmp_path)
    data = set_up(tmp_path, group=r"\w+/[a-f]")
    record = SplitRecord.of(data._drawn, data.findings, {"seed": 0})
    tested = {Path(path).parent / Path(path).name[0] for path, _ in data.test}
    for i, path in enumerate(tmp_path.glob("*/*_0.png")):
        write(path.with_name(f"{path.name[0]}_7.png"), 5000 + i)
    later = set_up(tmp_path, group=r"\w+/[a-f]", seed=5)
    later.follow(record)
    assert len(later.findings) == 48 and len(later.test) == 4 * len(tested)
    assert {Path(path).parent / Path(path).name[0] for path, _ in later.test} == tested
