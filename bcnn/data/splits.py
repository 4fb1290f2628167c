"""Images held out to validate and test on: drawn within each class, or as a model's record has them."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bcnn.data.index import ImageIndex, Samples, listed
from bcnn.utils.errors import UserError

TEST_FRACTION = 0.2  # where the images come without any split
SHORT = 16  # hexadecimal digits of a content in a record: 64 bits

Content = Mapping[str, str]  # digest of the pixels of each path


@dataclass(frozen=True)
class SplitRecord:
    """Which images a model was trained, validated and tested on, wherever they lie now.

    Args:
        recipe: seed and shares that the images were drawn with.
        train: short digests of the contents that any stage was trained on.
        val: of those that chose the epoch.
        test: of those that neither was done with.
    """

    recipe: dict[str, Any]
    train: frozenset[str]
    val: frozenset[str]
    test: frozenset[str]

    @classmethod
    def of(cls, layout: ImageIndex, content: Content, recipe: dict[str, Any]) -> "SplitRecord":
        """The record of a layout whose splits are drawn."""
        train, val, test = (
            frozenset(content[path][:SHORT] for path, _ in samples)
            for samples in layout.splits.values()
        )
        return cls(recipe, train, val - train, test - train)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SplitRecord":
        """Undo `plain`."""
        train, val, test = (frozenset(plain[name]) for name in ("train", "val", "test"))
        return cls(dict(plain["recipe"]), train, val, test)

    def plain(self) -> dict[str, Any]:
        """As lists, strings and numbers, for a file."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {"recipe": self.recipe, **{name: sorted(part) for name, part in parts.items()}}

    def after(self, before: "SplitRecord | None") -> "SplitRecord":
        """The record of a model that was trained on `before` and then on this."""
        if before is None:
            return self
        train = self.train | before.train
        return replace(self, train=train, val=self.val - train, test=self.test - train)

    def pick(self, name: str, samples: Samples, content: Content) -> Samples:
        """Those of the images that the record has under `name`."""
        part = getattr(self, name)
        return [(path, label) for path, label in samples if content[path][:SHORT] in part]

    def without_trained(self, samples: Samples, content: Content) -> Samples:
        """The images less those that the model was trained on."""
        return [(path, label) for path, label in samples if content[path][:SHORT] not in self.train]

    @property
    def known(self) -> frozenset[str]:
        """Short digests of all that is recorded."""
        return self.train | self.val | self.test


def draw_splits(
    layout: ImageIndex, content: Content, val_fraction: float, test_fraction: float | None, seed: int
) -> ImageIndex:
    """The layout with the splits that it lacks drawn from its training images: see `hold_out`.

    Args:
        layout: `val` and `test` that hold images stay as they are.
        content: of the training images.
        val_fraction: share of each class to validate on; 0: none.
        test_fraction: share of each class to test on; None: `TEST_FRACTION` where nothing says which
            images are in which split, else 0.
        seed: decides which are drawn.
    """
    val_share, test_share = shares(layout, val_fraction, test_fraction)
    val, test = hold_out(layout.train, content, seed, val_share, test_share)
    held = val | test
    train = [sample for sample in layout.train if sample[0] not in held]
    drawn = {
        "val": [sample for sample in layout.train if sample[0] in val],
        "test": [sample for sample in layout.train if sample[0] in test],
    }
    return replace(
        layout, train=train, val=layout.val or drawn["val"], test=layout.test or drawn["test"]
    )


def follow(layout: ImageIndex, content: Content, split: SplitRecord) -> tuple[ImageIndex, list[str]]:
    """The layout as a model's record has it, to train the model further, and what to say of that.

    Splits that folders or a list give stay, less what the model was trained on; of the others the
    record says which images they hold. Images that it does not know are trained on.
    """
    said = []
    given = {name: samples for name, samples in layout.splits.items() if samples and name != "train"}
    for name, samples in given.items():
        given[name] = split.without_trained(samples, content)
        if len(given[name]) < len(samples):
            said.append(
                f"{len(samples) - len(given[name])} of {len(samples)} images in {name} were trained on "
                "before and are left out"
            )
    drawn = {
        name: split.pick(name, layout.train, content) for name in ("val", "test") if name not in given
    }
    held = {path for samples in drawn.values() for path, _ in samples}
    train = [sample for sample in layout.train if sample[0] not in held]
    held_out = {**drawn, **given}
    return replace(layout, train=train, val=held_out["val"], test=held_out["test"]), said


def choose(
    layout: ImageIndex, content: Content, record: SplitRecord | None, split: str
) -> tuple[Samples, list[str]]:
    """The images of a split that a trained model can be judged by, and what to say of them.

    Nothing is drawn: a split is what folders or a list give, or else what the model's record says, or,
    for "test", all images where neither knows. Of "test" and "val" those that the model was trained on
    are left out.

    Args:
        layout: with nothing drawn.
        content: of its images.
        record: of the model, where its file has one.
        split: "test", "val", "train" or "all".
    """
    said = []
    recorded = {content[path][:SHORT] for path in layout.paths} & (record.known if record else set())
    chosen = layout.samples if split == "all" else layout.splits[split] if layout.divided else []
    if split == "train" and recorded:
        chosen = []  # of a train/ folder, some images may have been held out to validate on
    if not chosen and record and recorded:
        chosen = record.pick(split, layout.samples, content)
        unknown = sum(content[path][:SHORT] not in record.known for path in layout.paths)
        if unknown:
            said.append(f"{unknown} images that the checkpoint does not record are left out")
    elif not chosen and split == "test" and not layout.divided:
        chosen = layout.samples
    if record is None:
        said.append("the checkpoint does not record what it was trained on: maybe some of these images")
    elif split != "train" and (trained := record.pick("train", chosen, content)):
        taken = "counted all the same" if split == "all" else "left out"
        said.append(f"{len(trained)} of {len(chosen)} images were trained on: {taken}")
        if split != "all":
            chosen = record.without_trained(chosen, content)
    return chosen, said


def refuse_fractions(val_fraction: float, test_fraction: float | None) -> None:
    """Raises UserError where a share is not one, or both leave nothing to train on."""
    for name, share in (("val", val_fraction), ("test", test_fraction or 0)):
        if not 0 <= share < 1:
            raise UserError(f"data.{name}_fraction={share}: a share from 0 to under 1")
    if val_fraction + (test_fraction or 0) >= 1:
        raise UserError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave nothing "
            "to train on"
        )


def shares(layout: ImageIndex, val_fraction: float, test_fraction: float | None) -> tuple[float, float]:
    """What is to be drawn from each class's training images, to validate and to test on."""
    if test_fraction is None:
        test_fraction = 0.0 if layout.divided else TEST_FRACTION
    return (0.0 if layout.val else val_fraction), (0.0 if layout.test else test_fraction)


def too_few(
    layout: ImageIndex, content: Content, source: Path, val_fraction: float, test_fraction: float | None
) -> list[str]:
    """Says which classes have not one image for each split that is asked for."""
    drawn = [
        f"{name}={share:g}"
        for name, share in zip(
            ("data.val_fraction", "data.test_fraction"),
            shares(layout, val_fraction, test_fraction),
            strict=True,
        )
        if share
    ]
    needed = 1 + len(drawn)
    different: dict[int, set[str]] = defaultdict(set)
    for path, label in layout.train:
        different[label].add(content[path])
    poor = [f"{layout.classes[k]} ({len(each)})" for k, each in different.items() if len(each) < needed]
    if not poor:
        return []
    return [
        f"{source}: too few images of {listed(poor)}: {' and '.join(drawn)} take at least one of each "
        f"class and leave one to train on, so {needed} different ones are needed; add images, or set "
        "them to 0"
    ]


def hold_out(
    samples: Sequence[tuple[str, int]], content: Content, seed: int, val: float, test: float = 0.0
) -> tuple[set[str], set[str]]:
    """Draw about these shares of each class, at least one image for each share and never all.

    Every content has a place from 0 to 1 that it and the seed alone decide. The places of a class are
    ranked; test takes the first, validation the last. So names, order and other classes do not matter,
    and images of one content stay together; one that is filed under two classes is not drawn.

    Where both are drawn, each counts the images on its own side of a line between them, which makes
    the shares about right only, but lets an added or removed image move no more than one other, or
    hardly ever two in a class of under a dozen, which may lie on one side as a whole. (Both cannot be
    had: with exact numbers, an image that comes among the first pushes one of them out, and may
    make room among the last in the same moment.)

    Returns:
        Paths to validate on, and to test on.
    """
    classes: dict[str, int | None] = {}  # None: of two
    for path, label in samples:
        if classes.setdefault(content[path], label) != label:
            classes[content[path]] = None
    ranked: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for digest, one in classes.items():
        if one is not None:
            ranked[one].append((draw_place(digest, seed), digest))
    first: set[str] = set()
    last: set[str] = set()
    for members in ranked.values():
        members.sort()
        tested, validated = _counts([place for place, _ in members], val, test)
        first.update(digest for _, digest in members[:tested])
        last.update(digest for _, digest in members[len(members) - validated :])
    return (
        {path for path, _ in samples if content[path] in last},
        {path for path, _ in samples if content[path] in first},
    )


def _counts(places: Sequence[float], val: float, test: float) -> tuple[int, int]:
    """How many of a class's contents to test and to validate on."""
    line = (1 + test - val) / 2 if val and test else float(val == 0)
    below = sum(place < line for place in places)
    tested = max(1, round(below * test / line)) if test else 0
    validated = max(1, round((len(places) - below) * val / (1 - line))) if val else 0
    tested = max(0, min(tested, len(places) - 1 - (val > 0)))
    return tested, max(0, min(validated, len(places) - 1 - tested))


def draw_place(digest: str, seed: int) -> float:
    """From 0 to 1: where a content stands in the order that it and a seed alone decide."""
    mixed = hashlib.blake2b(f"{seed} {digest}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "big") / 2**64
