"""What a user should know of an image set before training on it, a sentence each."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bcnn.data.index import ImageIndex
from bcnn.data.integrity import Finding
from bcnn.utils.progress import track

IMBALANCE = 20  # images of the largest class to one of the smallest, above which it is said
# Bits of 63 in which images that look the same differ at most. Of flowers17's 272 test images 22 have
# one such in training, the same photograph each; of 2,485 groceries and 200 butterflies none has.
NEAR = 6
BLOCK = 1024  # images at a time


def duplicates(layout: ImageIndex, findings: Mapping[str, Finding]) -> list[str]:
    """The same pixels in training and in validation or test, a sentence for each of these two."""
    trained = {findings[path].digest: path for path, _ in layout.train}
    sentences = []
    for split, samples in (("val", layout.val), ("test", layout.test)):
        twins = [path for path, _ in samples if findings[path].digest in trained]
        if twins:
            examples = "; ".join(f"{path} = {trained[findings[path].digest]}" for path in twins[:3])
            sentences.append(
                f"{len(twins)} of {len(samples)} images in {split} are in train too, which flatters "
                f"the figures: {examples}"
            )
    return sentences


def repeats(layout: ImageIndex, findings: Mapping[str, Finding]) -> list[str]:
    """The same pixels under two classes, of which one is wrong, and several times under one."""
    first: dict[tuple[str, int], str] = {}
    again, classes = [], defaultdict[str, set[int]](set)
    for path, label in layout.samples:
        digest = findings[path].digest
        if (earlier := first.setdefault((digest, label), path)) != path:
            again.append(f"{path} = {earlier}")
        classes[digest].add(label)
    torn = [
        " = ".join(first[digest, label] for label in sorted(labels))
        for digest, labels in classes.items()
        if len(labels) > 1
    ]
    sentences = []
    if torn:
        sentences.append(
            f"{_so_many(torn, 'photograph is', 'photographs are')} in more than one class, so that a "
            f"label of each is wrong, and none is drawn to validate or test: {'; '.join(torn[:3])}"
        )
    if again:
        said = _so_many(again, "image repeats", "images repeat")
        sentences.append(f"{said} another of their class: {'; '.join(again[:3])}")
    return sentences


def _so_many(found: list[str], one: str, several: str) -> str:
    return f"{len(found)} {one if len(found) == 1 else several}"


def lookalikes(layout: ImageIndex, findings: Mapping[str, Finding]) -> dict[str, list[tuple[str, str]]]:
    """Images to validate and test on that look the same as one to train on, each with that one.

    They are copies that were saved again, at another size or quality. Those of the same pixels
    (`duplicates`), and what is of one colour, are left out.
    """
    trained = [path for path, _ in layout.train if not findings[path].flat]
    if not trained:
        return {}
    known, digests = _bits(trained, findings), {findings[path].digest for path in trained}
    found = {}
    for split, samples in (("val", layout.val), ("test", layout.test)):
        held = [path for path, _ in samples if not findings[path].flat]
        held = [path for path in held if findings[path].digest not in digests]
        pairs: list[tuple[str, str]] = []
        parts = [held[start : start + BLOCK] for start in range(0, len(held), BLOCK)]
        for part in track(parts, f"comparing {split} with train", unit="blocks"):
            differ = (known.shape[1] - _bits(part, findings) @ known.T) / 2
            nearest = differ.argmin(axis=1)
            near = differ[range(len(part)), nearest] <= NEAR
            pairs += [(part[i], trained[nearest[i]]) for i in near.nonzero()[0]]
        found[split] = pairs
    return found


def _bits(paths: list[str], findings: Mapping[str, Finding]) -> NDArray[np.float32]:
    """(images, 64), each 1 or -1: the product of two rows tells how many differ."""
    looks = np.array([findings[path].look for path in paths], ">u8")
    return 2 * np.unpackbits(looks.view(np.uint8)).reshape(-1, 64).astype(np.float32) - 1


def flat(layout: ImageIndex, findings: Mapping[str, Finding]) -> list[str]:
    """Says so where images show nothing: every pixel is of the same colour."""
    paths = [path for path in layout.paths if findings[path].flat]
    if not paths:
        return []
    return [
        f"{_so_many(paths, 'image is', 'images are')} of one colour throughout: {'; '.join(paths[:3])}"
    ]


def imbalance(layout: ImageIndex) -> list[str]:
    """Says so where the largest class has over `IMBALANCE` times the images of the smallest."""
    counts = sorted(
        (n, name) for n, name in zip(layout.counts("train"), layout.classes, strict=True) if n
    )
    if not counts or counts[-1][0] <= IMBALANCE * counts[0][0]:
        return []
    (few, rare), (many, common) = counts[0], counts[-1]
    return [
        f"{many} training images of {common} and {few} of {rare}, {many / few:.0f} to 1: "
        "data.sampler=balanced draws every class equally often"
    ]
