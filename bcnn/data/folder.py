"""Image folders as a LightningDataModule."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from bcnn.data.transforms import MIN_SIZE, Resize, evaluation_transform, load_image, training_transform
from bcnn.errors import UserError


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images by path, each with its label.

    Args:
        samples: (path, label) pairs.
        transform: PIL image → uint8 tensor (3, height, width).
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path)).as_subclass(Tensor), label


class ImageFolderData(L.LightningDataModule):
    """`root/train/<class>/*`, with `val/` and `test/` beside `train/` where there are any.

    After `setup`, `classes` holds the names of the folders in `train/`, and `train`, `val` and `test`
    hold (path, label) pairs; `val` and `test` may be empty.

    Args:
        root: the folder.
        size: side of the square crops in pixels.
        resize: short side to `size` ("keep") or both sides ("squash").
        val_fraction: share of the training images, drawn by `seed` within each class, to validate
            on where there is no `val/`. 0 trains on everything.
        batch_size: images a step and device.
        num_workers: processes that decode images; None: one a core, 8 at most.
        seed: of the validation share.

    Raises:
        UserError: from `setup`: an argument is out of range, a folder or its images are missing,
            there is one class only, or `val/` or `test/` hold classes that `train/` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 448,
        resize: Resize = "keep",
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.size = size
        self.resize = resize
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.seed = seed
        self.classes: list[str] = []
        self.train: list[tuple[str, int]] = []
        self.val: list[tuple[str, int]] = []
        self.test: list[tuple[str, int]] = []

    def setup(self, stage: str | None = None) -> None:
        if self.classes:
            return
        if self.size < MIN_SIZE:
            raise UserError(f"data.size={self.size} is too small: {MIN_SIZE} px at least")
        if self.resize not in get_args(Resize):
            raise UserError(f"data.resize={self.resize}: choose from {', '.join(get_args(Resize))}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction={self.val_fraction}: a share from 0 to under 1")
        if not self.root.is_dir():
            raise UserError(f"no such folder: {self.root} (data.root)")
        if not (self.root / "train").is_dir():
            raise UserError(
                f"{self.root} has no folder train/: expected {self.root}/train/<class>/<images>"
            )
        classes, self.train = self._scan("train")
        if len(classes) < 2:
            raise UserError(
                f"{self.root}/train holds one class only ({classes[0]}): "
                "a classifier needs at least two"
            )
        self.val = self._scan_known("val", classes)
        self.test = self._scan_known("test", classes)
        if not self.val and self.val_fraction > 0:
            self.train, self.val = stratified_split(self.train, self.val_fraction, self.seed)
        self.classes = classes

    def train_dataloader(self) -> DataLoader:
        transform = training_transform(self.size, self.resize)
        return self._loader(self.train, transform, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(self.test)

    def evaluation_dataloader(
        self, samples: Sequence[tuple[str, int]], batch_size: int | None = None
    ) -> DataLoader:
        """Centre crops of these images, in order: batches of (uint8 images, labels)."""
        transform = evaluation_transform(self.size, self.resize)
        return self._loader(samples, transform, batch_size or self.batch_size, shuffle=False)

    def _loader(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        shuffle: bool,
    ) -> DataLoader:
        return DataLoader(
            ImageList(samples, transform),
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(samples) > batch_size,  # a rest of one image has no mean
            num_workers=self.num_workers,
            persistent_workers=shuffle and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _scan(self, split: str) -> tuple[list[str], list[tuple[str, int]]]:
        try:
            found = ImageFolder(self.root / split, is_valid_file=is_image)
        except FileNotFoundError as error:  # no class folders, or classes without images
            raise UserError(f"no images in {self.root / split}: {error}") from error
        return found.classes, found.samples

    def _scan_known(self, split: str, classes: list[str]) -> list[tuple[str, int]]:
        """The images of `val` or `test`, labelled as in training; none where there is no folder."""
        if not (self.root / split).is_dir():
            return []
        names, samples = self._scan(split)
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise UserError(
                f"{self.root / split} holds classes that {self.root / 'train'} lacks: "
                f"{', '.join(unknown)}; add training images of them, or remove these folders"
            )
        return [(path, classes.index(names[label])) for path, label in samples]


def stratified_split(
    samples: Sequence[tuple[str, int]], fraction: float, seed: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
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


def is_image(path: str | Path) -> bool:
    """Whether a file's name is that of an image that Pillow opens, and not hidden."""
    hidden = Path(path).name.startswith(".")
    return not hidden and Path(path).suffix.lower() in Image.registered_extensions()
