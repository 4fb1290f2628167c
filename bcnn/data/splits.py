"""Which images validate and test: drawn within each class, or taken from a model's record."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bcnn.data.index import ImageIndex, Samples, listed
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError

TEST_FRACTION = 0.2  # of images that come without any split

Digests = Mapping[str, str]  # of each image's file, by path


@dataclass(frozen=True)
class SplitRecord:
    """Digests of the images that a model was trained, validated and tested on."""

    recipe: dict[str, Any]  # seed and fractions that the images were drawn with
    train: frozenset[str]  # by any stage; none of these is in val or test
    val: frozenset[str]
    test: frozenset[str]

    @classmethod
    def of(cls, index: ImageIndex, digests: Digests, recipe: Mapping[str, Any]) -> "SplitRecord":
        """Return the record of an index with splits drawn."""
        parts = index.splits.values()
        train, val, test = (frozenset(digests[path] for path, _ in samples) for samples in parts)
        return cls(dict(recipe), train, val - train, test - train)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SplitRecord":
        """Return the record that `plain` was called on."""
        return cls(dict(plain["recipe"]), *(frozenset(plain[s]) for s in ("train", "val", "test")))

    def plain(self) -> dict[str, Any]:
        """Return lists, strings and numbers, for a file."""
        train, val, test = map(sorted, (self.train, self.val, self.test))
        return {"recipe": self.recipe, "train": train, "val": val, "test": test}

    def after(self, earlier: "SplitRecord") -> "SplitRecord":
        """Return the record of a model that was trained by `earlier` and then by this."""
        train = self.train | earlier.train
        return replace(self, train=train, val=self.val - train, test=self.test - train)

    def select(self, split: str, samples: Samples, digests: Digests) -> Samples:
        """Return those of the images that the record has in a split."""
        recorded = getattr(self, split)
        return [(path, label) for path, label in samples if digests[path] in recorded]

    def without_trained(self, samples: Samples, digests: Digests) -> Samples:
        """Return the images that the model was not trained on."""
        return [(path, label) for path, label in samples if digests[path] not in self.train]

    @property
    def digests(self) -> frozenset[str]:
        return self.train | self.val | self.test


def draw_splits(
    index: ImageIndex, digests: Digests, val_fraction: float, test_fraction: float | None, seed: int
) -> ImageIndex:
    """Return the index with the splits that it lacks drawn from its training images: see `hold_out`."""
    fractions = fractions_to_draw(index, val_fraction, test_fraction)
    val, test = hold_out(index.train, digests, seed, *fractions)
    return replace(
        index.without(val | test),
        val=index.val or [sample for sample in index.train if sample[0] in val],
        test=index.test or [sample for sample in index.train if sample[0] in test],
    )


def follow(index: ImageIndex, digests: Digests, record: SplitRecord) -> ImageIndex:
    """Return the index split by a model's record, to train the model further; log what that does.

    Splits that folders or a list give stay, without images that the model was trained on; the record
    gives the others. Images that it lacks are trained on. Raise UserError if a class has none left.
    """
    present = {digests[path] for path in index.paths}
    recipe = ", ".join(f"{name}={value}" for name, value in record.recipe.items())
    logger.info(
        f"splits of the checkpoint ({recipe}): {len(present & record.digests)} of its "
        f"{len(record.digests)} images are here and {len(present - record.digests)} new ones"
    )
    held_out = []
    for split in ("val", "test"):
        given = index.splits[split] or record.select(split, index.train, digests)
        held_out.append(kept := record.without_trained(given, digests))
        if trained := len(given) - len(kept):
            logger.warning(f"{trained} of {len(given)} images in {split} were trained on: left out")
    val, test = held_out
    index = replace(index.without({path for path, _ in (*val, *test)}), val=val, test=test)
    counts = zip(index.classes, index.counts("train"), strict=True)
    if without := [name for name, count in counts if not count]:
        raise UserError(f"the checkpoint held out all images of {listed(without)}: add others")
    return index


def choose(
    index: ImageIndex, digests: Digests, record: SplitRecord | None, split: str
) -> tuple[Samples, list[str]]:
    """Return the images of train, val, test or all that a model can be evaluated on, and warnings.

    Where folders or a list give the split, it is theirs; else the record's. Where neither does, "test"
    is all images. Except in "train" and "all", images that were trained on are left out.
    """
    warnings = []
    recorded = {digests[path] for path in index.paths} & (record.digests if record else set())
    chosen = index.samples if split == "all" else index.splits[split] if index.divided else []
    if split == "train" and recorded:
        chosen = []  # some images of train/ may have been drawn to validate
    if not chosen and record and recorded:
        chosen = record.select(split, index.samples, digests)
        if unknown := sum(digests[path] not in record.digests for path in index.paths):
            warnings.append(f"{unknown} images that the checkpoint does not record are left out")
    elif not chosen and split == "test" and not index.divided:
        chosen = index.samples
    if record is None:
        warnings.append("the checkpoint does not record what it was trained on: maybe these images")
    elif split != "train" and (trained := record.select("train", chosen, digests)):
        action = "counted all the same" if split == "all" else "left out"
        warnings.append(f"{len(trained)} of {len(chosen)} images were trained on: {action}")
        if split != "all":
            chosen = record.without_trained(chosen, digests)
    return chosen, warnings


def validate_fractions(val_fraction: float, test_fraction: float | None) -> None:
    """Raise UserError if a fraction is negative, or nothing is left to train on."""
    test = test_fraction or 0
    if val_fraction < 0 or test < 0 or val_fraction + test >= 1:
        given = f"data.val_fraction={val_fraction} and data.test_fraction={test}"
        raise UserError(f"{given}: choose from 0, together under 1")


def fractions_to_draw(
    index: ImageIndex, val_fraction: float, test_fraction: float | None
) -> tuple[float, float]:
    """Return the shares of each class's training images to draw for val and test."""
    if test_fraction is None:
        test_fraction = 0.0 if index.divided else TEST_FRACTION
    return (0.0 if index.val else val_fraction), (0.0 if index.test else test_fraction)


def too_few(
    index: ImageIndex, digests: Digests, source: Path, val_fraction: float, test_fraction: float | None
) -> list[str]:
    """Return a sentence if classes have fewer images than there are splits to draw."""
    val, test = fractions_to_draw(index, val_fraction, test_fraction)
    needed = 1 + (val > 0) + (test > 0)
    different = Counter(label for _, label in {(digests[path], label) for path, label in index.train})
    small = [f"{index.classes[k]} ({n})" for k, n in sorted(different.items()) if n < needed]
    sentence = (
        f"{source}: too few images of {listed(small)}: data.val_fraction={val:g} and "
        f"data.test_fraction={test:g} need {needed} different ones of each class; add images, or set "
        "them to 0"
    )
    return [sentence] if small else []


def hold_out(
    samples: Sequence[tuple[str, int]], digests: Digests, seed: int, val: float, test: float = 0.0
) -> tuple[set[str], set[str]]:
    """Return paths of about these shares of each class, at least one image for each and never all.

    Digest and seed give every image a position from 0 to 1. Within a class, test takes the first and
    validation the last. So names, order and other classes do not matter, copies of a file stay
    together, and a file in two classes is not drawn. If both are drawn, each counts the images on its
    own side of a line between them. Shares are then approximate, but an added or removed image moves at
    most one other, hardly ever two; exact numbers cannot have this property.
    """
    classes: dict[str, set[int]] = defaultdict(set)
    for path, label in samples:
        classes[digests[path]].add(label)
    ranked: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for digest, labels in classes.items():
        if len(labels) == 1:
            ranked[labels.pop()].append((draw_position(digest, seed), digest))
    validated: set[str] = set()
    tested: set[str] = set()
    for members in ranked.values():
        positions, ordered = zip(*sorted(members), strict=True)
        first, last = _counts(positions, val, test)
        tested.update(ordered[:first])
        validated.update(ordered[len(ordered) - last :])
    paths = [path for path, _ in samples]
    return {p for p in paths if digests[p] in validated}, {p for p in paths if digests[p] in tested}


def _counts(positions: Sequence[float], val: float, test: float) -> tuple[int, int]:
    """Return how many of a class's images are drawn to test and to validate on."""
    line = (1 + test - val) / 2 if val and test else float(val == 0)
    below = sum(position < line for position in positions)
    tested = max(1, round(below * test / line)) if test else 0
    validated = max(1, round((len(positions) - below) * val / (1 - line))) if val else 0
    tested = max(0, min(tested, len(positions) - 1 - (val > 0)))
    return tested, max(0, min(validated, len(positions) - 1 - tested))


def draw_sample(samples: Samples, digests: Digests, count: int, seed: int) -> Samples:
    """Return at most `count` of the images, drawn by `seed`, in proportion of each class."""
    ordered = sorted(samples, key=lambda s: (s[1], draw_position(digests[s[0]], seed)))
    count = min(count, len(ordered))
    return [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]


def draw_fraction(samples: Samples, digests: Digests, fraction: float, seed: int) -> Samples:
    """Return this share of each class's images, at least one, those first in the order of `seed`.

    A smaller share is part of a larger one, and copies of a file stay together.
    """
    classes: dict[int, set[str]] = defaultdict(set)
    for path, label in samples:
        classes[label].add(digests[path])
    drawn: set[tuple[int, str]] = set()
    for label, members in classes.items():
        ordered = sorted(members, key=lambda digest: draw_position(digest, seed))
        drawn.update((label, digest) for digest in ordered[: max(1, round(fraction * len(ordered)))])
    return [(path, label) for path, label in samples if (label, digests[path]) in drawn]


def draw_position(digest: str, seed: int) -> float:
    """Return a number from 0 to 1 that the digest and the seed alone decide."""
    mixed = hashlib.blake2b(f"{seed} {digest}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "big") / 2**64
