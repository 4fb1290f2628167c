"""An epoch's training images in seeded random order, and each rank's part of them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bcnn.data.image_io import load_image
from bcnn.utils.errors import UserError

Draw = tuple[int, int]  # index of an image, and the seed of its crop and flip
NO_LABEL = -1  # of an image that metrics ignore


@dataclass(eq=False)
class ImageList(Dataset[tuple[Tensor, int]]):
    """Images and labels: (path, label) pairs, loaded and transformed to (3, height, width) uint8."""

    samples: Sequence[tuple[str, int]]
    transform: Callable[[Image.Image], Tensor]
    load: Callable[[str], Image.Image] = load_image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: int | Draw) -> tuple[Tensor, int]:
        """Return an image by index, or by (index, seed of its random crop and flip)."""
        if isinstance(draw, tuple):
            index, seed = draw
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a millisecond
                return self[index]
        path, label = self.samples[draw]
        return self.transform(self.load(path)).as_subclass(Tensor), label


@dataclass(eq=False)
class SeededSampler(Sampler[Draw]):
    """Draws of an epoch's images, a function of seed and epoch alone.

    Ranks take the draws in turn, so that a batch of all ranks together is the same for any number of
    ranks; the last few draws, fewer than there are ranks, are left out.
    """

    count: int  # of images, and of draws an epoch over all ranks
    seed: int
    weights: Tensor | None = None  # (count,), of draws with replacement; None: every image once
    # Gives the epoch that begins; by default, passes are counted.
    epoch: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(
        cls, count: int, seed: int, weights: Tensor | None, trainer: L.Trainer | None
    ) -> "SeededSampler":
        """Return the sampler of a rank of a trainer, by its epochs, or that of one process."""
        rank, ranks = rank_and_world_size(trainer)
        if count < ranks:
            raise UserError(f"{count} training images are too few for {ranks} devices")
        sampler = cls(count, seed, weights, rank=rank, ranks=ranks)
        if trainer:
            sampler.epoch = partial(current_epoch, trainer)
        return sampler

    def __len__(self) -> int:
        return self.count // self.ranks

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch()))
        if self.weights is None:
            order = torch.randperm(self.count, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        seeds = torch.randint(2**32, (self.count,), generator=generator)
        own = slice(self.rank, len(self) * self.ranks, self.ranks)
        yield from zip(order[own].tolist(), seeds[own].tolist(), strict=True)


def rank_and_world_size(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def shard(samples: Sequence[tuple[str, int]], trainer: L.Trainer | None) -> list[tuple[str, int]]:
    """Return a rank's part of (path, label) pairs, padded so that every rank has as many."""
    rank, ranks = rank_and_world_size(trainer)
    padding = [(path, NO_LABEL) for path, _ in samples[:1]] * (-len(samples) % ranks)
    return [*samples, *padding][rank::ranks]


def current_epoch(trainer: L.Trainer) -> int:
    """Return the epoch that a trainer is in or begins; its `current_epoch` is behind on resuming."""
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def derive_seed(seed: int, epoch: int) -> int:
    """Return a seed of 32 bits, all that torch's generator uses; those of neighbours are unrelated."""
    return int(np.random.SeedSequence([seed % 2**32, epoch]).generate_state(1)[0])
