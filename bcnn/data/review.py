"""Warnings about an image set, from what its check found."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from bcnn.data.index import ImageIndex
from bcnn.data.integrity import Finding, Findings
from bcnn.data.lookalikes import near_duplicates
from bcnn.data.transforms import Preprocessing, Resize

IMBALANCE = 20  # images of the largest class for one of the smallest that cause a warning
CUT_OFF = 0.1  # share of the median image that evaluation may leave out without one
# The same from which new networks squash images by default. Cars, of which 46 % would be left out, are
# classified better so; flowers (25 %) are not (docs/options.md, "Whole images").
SQUASHED = 0.4
LOOK = "look the same as one in train"

Pairs = dict[str, list[tuple[str, str]]]  # by split: images held out, each with one to train on


def review(index: ImageIndex, drawn: ImageIndex, findings: Findings, near: Pairs) -> list[str]:
    """Return all warnings about intact images, without and with splits drawn; `near`: `lookalikes`."""
    copies = shared(drawn, {path: finding.digest for path, finding in findings.items()})
    crop = cut_off([findings[path] for path in index.paths], Preprocessing())
    similar = _leaks(drawn, near, LOOK)
    return copies + similar + oddities(index, findings) + imbalance(drawn) + crop


def shared(index: ImageIndex, groups: Mapping[str, str], what: str = "are in train too") -> list[str]:
    """Return a warning for each of val and test that holds files, or groups, of train."""
    trained = {groups[path]: path for path, _ in index.train}
    pairs = {
        split: [(p, trained[g]) for p, _ in index.splits[split] if (g := groups[p]) in trained]
        for split in ("val", "test")
    }
    return _leaks(index, pairs, what)


def leaks(index: ImageIndex, findings: Findings, groups: Mapping[str, str]) -> list[str]:
    """Return a warning for each of val and test that holds look-alikes of train, or groups of it."""
    grouped = shared(index, groups, "are of groups in train") if groups else []
    return grouped + _leaks(index, lookalikes(index, findings), LOOK)


def _leaks(index: ImageIndex, pairs: Pairs, what: str) -> list[str]:
    return [
        f"{len(same)} of {len(index.splits[split])} images in {split} {what}, which makes the metrics "
        f"too good: {'; '.join(map(' = '.join, same[:3]))}"
        for split, same in pairs.items()
        if same
    ]


def oddities(index: ImageIndex, findings: Findings) -> list[str]:
    """Return warnings about files in two classes or several times in one, and images of one colour."""
    copies: dict[str, dict[int, str]] = defaultdict(dict)  # the first of each class, by digest
    again = []
    for path, label in index.samples:
        first = copies[findings[path].digest].setdefault(label, path)
        if first != path:
            again.append(f"{path} = {first}")
    found = {
        "files in more than one class, of which one is wrong": [
            " = ".join(by_class.values()) for by_class in copies.values() if len(by_class) > 1
        ],
        "files that repeat another of their class": again,
        "images of one colour": [path for path in index.paths if findings[path].flat],
    }
    return [
        f"{what}: {len(examples)}, for example {'; '.join(examples[:3])}"
        for what, examples in found.items()
        if examples
    ]


def imbalance(index: ImageIndex) -> list[str]:
    """Return a warning if the largest class has over `IMBALANCE` times the images of the smallest."""
    counts = [(n, k) for n, k in zip(index.counts("train"), index.classes, strict=True) if n]
    if not counts or max(counts)[0] <= IMBALANCE * min(counts)[0]:
        return []
    (few, rare), (many, common) = min(counts), max(counts)
    return [
        f"{many} training images of {common} and {few} of {rare}, {many / few:.0f} to 1: "
        "data.sampler=balanced draws every class equally often"
    ]


def cut_off(images: Iterable[Finding], preprocessing: Preprocessing) -> list[str]:
    """Return a warning if evaluation's crop leaves out over `CUT_OFF` of the median image."""
    if (share := share_cut_off(images, preprocessing)) <= CUT_OFF:
        return []
    text = f"a centre crop cuts off {share:.0%} of the median image"
    if share > SQUASHED:
        return [f"{text}: the default here is data.resize=squash; compare data.resize=whole"]
    return [f"{text}: compare data.resize=squash and data.resize=whole, which cut nothing off"]


def default_resize(images: Iterable[Finding], preprocessing: Preprocessing) -> Resize:
    """Return how new networks resize images of one's own, if no option says how."""
    return "squash" if share_cut_off(images, preprocessing) > SQUASHED else "keep"


def share_cut_off(images: Iterable[Finding], preprocessing: Preprocessing) -> float:
    """Return the share of the median image that evaluation's crop leaves out."""
    shares = []
    for width, height in ((image.width, image.height) for image in images):
        left, top, right, bottom = preprocessing.crop(width, height)
        shares.append(1 - (right - left) * (bottom - top) / (width * height))
    return median(shares) if shares else 0.0


def lookalikes(index: ImageIndex, findings: Findings) -> Pairs:
    """Return the images of val and test that look the same as one of train, each with that one.

    The same files (see `shared`) and images that are nearly flat are left out.
    """
    digests = {findings[path].digest for path, _ in index.train}
    trained = {path: findings[path].perceptual_hash for path, _ in index.train}
    found = {}
    for split in ("val", "test"):
        paths = [path for path, _ in index.splits[split] if findings[path].digest not in digests]
        held_out = {path: findings[path].perceptual_hash for path in paths}
        found[split] = [*near_duplicates(held_out, trained).items()]
    return found
