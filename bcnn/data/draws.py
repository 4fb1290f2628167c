"""Draws of images by a seed: for validation and test, of a share, of a sample."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from bcnn.data.index import Samples

Digests = Mapping[str, str]  # of each image's file, by path
Groups = Mapping[str, str]  # by path: see `join_groups`


def hold_out(
    samples: Sequence[tuple[str, int]],
    digests: Digests,
    groups: Groups,
    seed: int,
    val: float,
    test: float = 0.0,
) -> tuple[set[str], set[str]]:
    """Return paths of about these shares of each class's groups, at least one for each and never all.

    Group and seed give every group a position from 0 to 1. Within a class, test takes the first and
    validation the last. So names, order and other classes do not matter, copies of a file stay
    together, and a file in two classes is drawn only with others of its group. If both are drawn, each
    counts the groups on its own side of a line between them. Shares are then approximate, but an added
    or removed group moves at most one other, hardly ever two; exact numbers cannot have this property.

    A group of several classes goes where most of its images would go.
    """
    classes: dict[str, set[int]] = defaultdict(set)
    for path, label in samples:
        classes[digests[path]].add(label)
    images: dict[int, Counter[str]] = defaultdict(Counter)  # numbers, by class and group
    for path, label in samples:
        if len(classes[digests[path]]) == 1:
            images[label][groups[path]] += 1
    votes: dict[str, Counter[str]] = defaultdict(Counter)  # numbers of images, by group and split
    spare = {}  # a group of each class that is trained on
    for label, counts in images.items():
        positions, ordered = zip(*sorted((draw_position(g, seed), g) for g in counts), strict=True)
        first, last = _counts(positions, val, test)
        spare[label] = ordered[first]
        for rank, group in enumerate(ordered):
            split = "test" if rank < first else "train" if rank < len(ordered) - last else "val"
            votes[group][split] += counts[group]
    splits = {g: max(sorted(each), key=lambda s: (each[s], s == "train")) for g, each in votes.items()}
    for label, counts in images.items():
        if all(splits[group] != "train" for group in counts):
            splits[spare[label]] = "train"
    val_paths, test_paths = (
        {path for path, _ in samples if splits.get(groups[path]) == split} for split in ("val", "test")
    )
    return val_paths, test_paths


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


def draw_fraction(samples: Samples, groups: Groups, fraction: float, seed: int) -> Samples:
    """Return this share of each class's groups, at least one, those first in the order of `seed`.

    A smaller share is part of a larger one.
    """
    classes: dict[int, set[str]] = defaultdict(set)
    for path, label in samples:
        classes[label].add(groups[path])
    drawn: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=lambda group: draw_position(group, seed))
        drawn.update(ordered[: max(1, round(fraction * len(ordered)))])
    return [sample for sample in samples if groups[sample[0]] in drawn]


def draw_position(group: str, seed: int) -> float:
    """Return a number from 0 to 1 that the group, or the digest, and the seed alone decide."""
    text = f"{seed} {group}".encode(errors="surrogateescape")  # of a name that is no valid Unicode
    mixed = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(mixed, "big") / 2**64
