"""Which images an epoch trains on, in what order, and the seeds of what is drawn for each; and which of
those that are evaluated a rank takes."""

from collections.abc import Callable, Iterator, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

Draw = tuple[int, int]  # index of an image, and the seed of its crop and mirroring
PADDING = -1  # label of an image that is not counted


class SeededSampler(Sampler[Draw]):
    """Draws of an epoch's images, a function of seed and epoch alone.

    Neither the number of workers, nor how many numbers were drawn before, nor an interruption changes
    them. Ranks take them in turn, as many each, so that a batch of all ranks together is the same
    whatever their number; the last few, fewer than there are ranks, are left out.

    Args:
        count: of images, and of draws an epoch of all ranks together.
        seed: of all draws.
        weights: (count,), for draws with replacement in this proportion; None: every image once.
        epoch: returns the number of the epoch that begins; None: passes over the sampler are counted.
        rank: of this process.
        ranks: number of processes that train together.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        weights: Tensor | None = None,
        epoch: Callable[[], int] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.count = count
        self.seed = seed
        self.weights = weights
        self.epoch = epoch
        self.rank = rank
        self.ranks = ranks
        self._passes = 0

    def __len__(self) -> int:
        return self.count // self.ranks

    def __iter__(self) -> Iterator[Draw]:
        epoch = self._passes if self.epoch is None else self.epoch()
        self._passes += 1
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        if self.weights is None:
            order = torch.randperm(self.count, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        seeds = torch.randint(2**32, (self.count,), generator=generator)
        mine = slice(self.rank, len(self) * self.ranks, self.ranks)
        yield from zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)


def rank_and_world_size(trainer: L.Trainer | None) -> tuple[int, int]:
    """The rank of this process, and the number of processes that train together."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def shard(samples: Sequence[tuple[str, int]], trainer: L.Trainer | None) -> list[tuple[str, int]]:
    """What a rank evaluates of (path, label) pairs: as many as any other, being padded."""
    rank, ranks = rank_and_world_size(trainer)
    padding = [(path, PADDING) for path, _ in samples[:1]] * (-len(samples) % ranks)
    return [*samples, *padding][rank::ranks]


def current_epoch(trainer: L.Trainer) -> int:
    """Number of the epoch that a trainer is in, or begins with.

    Not `current_epoch`, which in a resumed trainer is behind when the iterator is made.
    """
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def derive_seed(seed: int, epoch: int) -> int:
    """A seed of 32 bits, all that torch's generator takes notice of; neighbours are unlike."""
    return int(np.random.SeedSequence([seed % 2**32, epoch]).generate_state(1)[0])
