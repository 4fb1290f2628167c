"""Some of the classes of an image set, for quick work."""

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import torch

from bcnn.data.index import ImageIndex
from bcnn.utils.errors import UserError


def choose_classes(layout: ImageIndex, chosen: Sequence[str] | int, seed: int) -> ImageIndex:
    """The images of the `chosen` classes, or of that many drawn by `seed`; classes stay in order.

    Raises:
        UserError: fewer than two, or some that there are not.
    """
    if isinstance(chosen, int):
        order = torch.randperm(len(layout.classes), generator=torch.Generator().manual_seed(seed))
        names = {layout.classes[i] for i in order[: max(0, chosen)].tolist()}
    else:
        names = {unicodedata.normalize("NFC", str(name)) for name in chosen}
    for name in sorted(names - set(layout.classes)):
        near = difflib.get_close_matches(name, layout.classes) or layout.classes[:3]
        raise UserError(f"data.classes: there is no class {name}; there are {', '.join(near)}, …")
    count = chosen if isinstance(chosen, int) else len(names)
    if not 2 <= count <= len(layout.classes):
        raise UserError(f"data.classes: choose from 2 to {len(layout.classes)} classes, not {count}")
    kept = [name for name in layout.classes if name in names]
    labels = {layout.classes.index(name): label for label, name in enumerate(kept)}
    train, val, test = (
        [(path, labels[label]) for path, label in samples if label in labels]
        for samples in layout.splits.values()
    )
    return replace(layout, classes=kept, train=train, val=val, test=test)
