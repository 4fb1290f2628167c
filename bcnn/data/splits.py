"""Images held out to validate and test on, drawn within each class."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bcnn.data.layout import Layout, Samples, listed
from bcnn.errors import UserError

TEST_FRACTION = 0.2  # where the images come without any split


def draw_splits(layout: Layout, val_fraction: float, test_fraction: float | None, seed: int) -> Layout:
    """The layout with the splits that it lacks drawn from its training images.

    Args:
        layout: `val` and `test` that hold images stay as they are.
        val_fraction: share of each class to validate on; 0: none.
        test_fraction: share of each class to test on; None: `TEST_FRACTION` where nothing says which
            images are in which split, else 0.
        seed: decides which are drawn.
    """
    val_share, test_share = shares(layout, val_fraction, test_fraction)
    train, val, test = layout.train, layout.val, layout.test
    if test_share:
        train, test = stratified_split(train, test_share, seed)
    if val_share:
        train, val = stratified_split(train, val_share / (1 - test_share), seed)
    return replace(layout, train=train, val=val, test=test)


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


def shares(layout: Layout, val_fraction: float, test_fraction: float | None) -> tuple[float, float]:
    """What is to be drawn from each class's training images, to validate and to test on."""
    if test_fraction is None:
        test_fraction = 0.0 if layout.divided else TEST_FRACTION
    return (0.0 if layout.val else val_fraction), (0.0 if layout.test else test_fraction)


def too_few(
    layout: Layout, source: Path, val_fraction: float, test_fraction: float | None
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
    poor = [
        f"{name} ({count})"
        for name, count in zip(layout.classes, layout.counts("train"), strict=True)
        if 0 < count < needed
    ]
    if not poor:
        return []
    return [
        f"{source}: too few images of {listed(poor)}: {' and '.join(drawn)} take at least one of each "
        f"class and leave one to train on, so {needed} are needed; add images, or set them to 0"
    ]


def stratified_split(
    samples: Sequence[tuple[str, int]], fraction: float, seed: int
) -> tuple[Samples, Samples]:
    """Draw `fraction` of each class, at least one image of it and never its last, into the second.

    Returns:
        (kept, drawn), each in the order of `samples`.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label for _, label in samples])
    drawn: set[int] = set()
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)
        drawn.update(members[order[:count]].tolist())
    kept = [sample for i, sample in enumerate(samples) if i not in drawn]
    return kept, [samples[i] for i in sorted(drawn)]
