"""What a user should know of an image set before training on it, a sentence each."""

from collections.abc import Mapping

from bcnn.data.check import Finding
from bcnn.data.layout import Layout

IMBALANCE = 20  # images of the largest class to one of the smallest, above which it is said


def duplicates(layout: Layout, findings: Mapping[str, Finding]) -> list[str]:
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


def flat(layout: Layout, findings: Mapping[str, Finding]) -> list[str]:
    """Says so where images show nothing: every pixel is of the same colour."""
    paths = [path for path in layout.paths if findings[path].flat]
    if not paths:
        return []
    subject = "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
    return [f"{subject} of one colour throughout: {'; '.join(paths[:3])}"]


def imbalance(layout: Layout) -> list[str]:
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
