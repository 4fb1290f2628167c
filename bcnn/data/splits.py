"""Which images validate and test: drawn within each class, or taken from a model's record."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bcnn.data.draws import Digests, Groups, hold_out
from bcnn.data.index import ImageIndex, Samples, listed
from bcnn.data.integrity import Finding, Findings
from bcnn.data.lookalikes import near_duplicates
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError

TEST_FRACTION = 0.2  # of images that come without any split

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitRecord:
    """Digests and perceptual hashes of the images that a model was trained, validated and tested on.

    They are of all stages, also of those that trained the weights that it began with. An image is in
    one split: the first that has it.
    """

    recipe: dict[str, Any] = field(default_factory=dict)  # seed and fractions of the draw
    train: frozenset[str] = frozenset()
    val: frozenset[str] = frozenset()  # these chose the epoch
    test: frozenset[str] = frozenset()
    hashes: Mapping[str, int] = field(default_factory=dict)  # by digest; nearly flat images have none

    @classmethod
    def of(
        cls,
        index: ImageIndex,
        findings: Findings,
        recipe: Mapping[str, Any],
        unlabelled: Iterable[Finding] = (),
    ) -> "SplitRecord":
        """Return the record of an index with splits drawn; unlabelled images are trained on, too."""
        parts = [[findings[path] for path, _ in samples] for samples in index.splits.values()]
        parts[0] += unlabelled
        hashes = {f.digest: f.perceptual_hash for part in parts for f in part}
        known = {digest: value for digest, value in hashes.items() if value is not None}
        digests = (frozenset(finding.digest for finding in part) for part in parts)
        return cls(dict(recipe), *_disjoint(*digests), known)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SplitRecord":
        """Return the record that `plain` was called on."""
        parts = [[text.partition(" ") for text in plain[split]] for split in SPLITS]
        hashes = {digest: int(value, 16) for part in parts for digest, _, value in part if value}
        train, val, test = (frozenset(digest for digest, *_ in part) for part in parts)
        return cls(dict(plain["recipe"]), train, val, test, hashes)

    def plain(self) -> dict[str, Any]:
        """Return lists, strings and numbers, for a file: of each image `digest hash`."""
        texts = {d: f"{d} {self.hashes[d]:016x}" if d in self.hashes else d for d in self.digests}
        parts = {split: sorted(texts[d] for d in getattr(self, split)) for split in SPLITS}
        return {"recipe": self.recipe, **parts}

    def after(self, earlier: "SplitRecord") -> "SplitRecord":
        """Return the record of a model that was trained by `earlier` and then by this."""
        parts = (getattr(self, split) | getattr(earlier, split) for split in SPLITS)
        recipe = self.recipe or earlier.recipe
        return SplitRecord(recipe, *_disjoint(*parts), {**earlier.hashes, **self.hashes})

    def recognise(self, findings: Findings) -> dict[str, str]:
        """Return each image's digest, or that of a recorded image which looks the same; log how many.

        Digests decide where they are recorded. Of recorded images that look the same, one that was
        trained on comes before one that was validated on.
        """
        recorded, digests = self.digests, {path: f.digest for path, f in findings.items()}
        new = {f.digest: f.perceptual_hash for f in findings.values() if f.digest not in recorded}
        same: dict[str, str] = {}
        for split in reversed(SPLITS):  # the last one decides
            members = {digest: self.hashes.get(digest) for digest in sorted(getattr(self, split))}
            same |= near_duplicates(new, members)
        if alike := sum(digest in same for digest in digests.values()):
            logger.info(
                f"{alike} of {len(digests)} images look the same as some that the checkpoint records, "
                "and count as those"
            )
        elif recorded.isdisjoint(digests.values()):
            logger.warning(
                "the checkpoint records none of these images: if it was trained on some of them, the "
                "metrics are too good"
            )
        return {path: same.get(digest, digest) for path, digest in digests.items()}

    def select(self, split: str, samples: Samples, digests: Digests) -> Samples:
        """Return those of the images that the record has in a split."""
        recorded = getattr(self, split)
        return [(path, label) for path, label in samples if digests[path] in recorded]

    def unused(self, split: str, samples: Samples, digests: Digests) -> tuple[Samples, list[str]]:
        """Return the images that can measure the model, and a sentence on each kind that is left out.

        Left out are images that were trained on and, of test, those that chose the epoch.
        """
        kept, remarks = samples, []
        for name, use in (("train", "trained on"), ("val", "validated on")):
            if name != split and (used := {*self.select(name, kept, digests)}):
                kept = [sample for sample in kept if sample not in used]
                remarks.append(f"{len(used)} of {len(samples)} images in {split} were {use}: left out")
        return kept, remarks

    @property
    def digests(self) -> frozenset[str]:
        return self.train | self.val | self.test


def draw_splits(
    index: ImageIndex,
    digests: Digests,
    groups: Groups,
    val_fraction: float,
    test_fraction: float | None,
    seed: int,
) -> ImageIndex:
    """Return the index with the splits that it lacks drawn from its training images: see `hold_out`."""
    fractions = fractions_to_draw(index, val_fraction, test_fraction)
    val, test = hold_out(index.train, digests, groups, seed, *fractions)
    return replace(
        index.without(val | test),
        val=index.val or [sample for sample in index.train if sample[0] in val],
        test=index.test or [sample for sample in index.train if sample[0] in test],
    )


def follow(
    index: ImageIndex, drawn: ImageIndex, digests: Digests, groups: Groups, record: SplitRecord
) -> ImageIndex:
    """Return the index split by a model's record, to train the model further; log what that does.

    Splits that folders or a list give stay, without images that the model has used (see `unused`); the
    record gives the others. Images that it lacks go where it has others of their group. The rest is
    trained on, but a class of which it has no image is split as `drawn`. Digests are those of
    `recognise`. Raise UserError if a class has none left.
    """
    present = {digests[path] for path in index.paths}
    recipe = ", ".join(f"{name}={value}" for name, value in record.recipe.items())
    logger.info(
        f"splits of the checkpoint ({recipe}): {len(present & record.digests)} of its "
        f"{len(record.digests)} images are here and {len(present - record.digests)} new ones"
    )
    known = {label for path, label in index.samples if digests[path] in record.digests}
    new = [sample for sample in index.train if digests[sample[0]] not in record.digests]
    split_of = {
        path: split for split, each in drawn.splits.items() for path, k in each if k not in known
    }
    side = {groups[path]: split_of[path] for path, _ in new if path in split_of}
    for split in reversed(SPLITS):  # the last one decides
        side |= {groups[path]: split for path, _ in record.select(split, index.train, digests)}
    held_out = []
    for split in ("val", "test"):
        joined = [sample for sample in new if side.get(groups[sample[0]]) == split]
        given = index.splits[split] or record.select(split, index.train, digests) + joined
        kept, remarks = record.unused(split, given, digests)
        held_out.append(kept)
        for remark in remarks:
            logger.warning(remark)
    val, test = held_out
    index = replace(index.without({path for path, _ in (*val, *test)}), val=val, test=test)
    counts = zip(index.classes, index.counts("train"), strict=True)
    if without := [name for name, count in counts if not count]:
        raise UserError(f"the checkpoint held out all images of {listed(without)}: add others")
    return index


def choose(
    index: ImageIndex, digests: Digests, record: SplitRecord, split: str
) -> tuple[Samples, list[str]]:
    """Return the images of train, val, test or all that a model can be evaluated on, and remarks.

    Where folders or a list give the split, it is theirs; else the record's. A folder without splits
    that lacks most of the record's test images is another one: all its images are "test". Except in
    "train" and "all", images that the model has used are left out: see `SplitRecord.unused`. Digests
    are those of `SplitRecord.recognise`.
    """
    remarks = []
    recorded = {digests[path] for path in index.paths} & record.digests
    chosen = index.samples if split == "all" else index.splits[split] if index.divided else []
    if split == "train" and recorded:
        chosen = []  # some images of train/ may have been drawn to validate
    if not chosen and recorded:
        chosen = record.select(split, index.samples, digests)
        if unknown := sum(digests[path] not in record.digests for path in index.paths):
            remarks.append(f"{unknown} images that the checkpoint does not record are left out")
    if split == "test" and not index.divided and 2 * len(chosen) < max(len(record.test), 1):
        chosen, remarks = index.samples, []
    if split == "all":
        if trained := len(record.select("train", chosen, digests)):
            remarks.append(f"{trained} of {len(chosen)} images were trained on: counted all the same")
    elif split != "train":
        chosen, left_out = record.unused(split, chosen, digests)
        remarks += left_out
    return chosen, remarks


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


def without_images(drawn: ImageIndex, val: float, test: float) -> list[str]:
    """Return a warning for each split that was to be drawn and lacks classes, of too few groups."""
    asked = [split for split, fraction in (("val", val), ("test", test)) if fraction]
    found = []
    for split in asked:
        counts = zip(drawn.classes, drawn.counts(split), strict=True)
        if missing := [name for name, count in counts if not count]:
            found.append(f"{split} has no images of {listed(missing)}: too few groups to draw from")
    return found


def _disjoint(
    train: frozenset[str], val: frozenset[str], test: frozenset[str]
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    return train, val - train, test - train - val
