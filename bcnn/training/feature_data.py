"""Stage `last` without the backbone: descriptors computed once, then read from a store."""

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import Timeout
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import MARGIN, VERSION
from bcnn.data.sampler import Draw, SeededSampler, rank_and_world_size, shard
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_store import SHARD, VIEWS, FeatureStore
from bcnn.utils.console import logger, progress
from bcnn.utils.device import autocast
from bcnn.utils.distributed import on_rank_zero
from bcnn.utils.errors import UserError

WRITERS = 4  # threads that write shards; the disk releases the interpreter's lock
WAIT = 60  # seconds at a time for another run: ranks that wait for rank 0 give up after 30 minutes


class CachedFeatureDataModule(L.LightningDataModule):
    """The images of another data module as descriptors from a store.

    An image has a descriptor of its evaluation crop and, if it is trained on, one of that crop's mirror
    image. Training draws one of the two, or takes their mean; evaluation reads the first.

    Args:
        data: set up; its splits, labels and batch size are used.
        model: its backbone and pooling compute the descriptors.
        precision: Lightning's name of the precision that they are computed in.
        dtype: of the descriptors on disk.
    """

    def __init__(
        self, data: FineGrainedDataModule, model: BCNN, precision: str, dtype: str = "float16"
    ) -> None:
        super().__init__()
        self.data = data
        self.model = model
        self.precision = precision
        self.paths = sorted(path for path, _ in (*data.train, *data.val, *data.test))
        self._position = {path: i for i, path in enumerate(self.paths)}
        self._ready = False
        self._batch = np.empty((0, 0))
        identity = {
            "backbone": hash_tensors(model.backbone.state_dict()),
            "network": model.chosen,
            "images": image_digests(data, self.paths),
            "preprocessing": vars(data.preprocessing),
            "decoding": f"{VERSION}; JPEGs reduced to no less than {MARGIN} times the side",
            "views": "evaluation crop, mirror image",
            "precision": precision,
        }
        self.store = FeatureStore(
            identity,
            len(self.paths),
            model.pooling.width,
            dtype,
            about=f"{data.root.resolve()} at {data.preprocessing}, {precision}",
            mirrored=[self._position[path] for path, _ in data.train],
        )

    def setup(self, stage: str | None = None) -> None:
        assert self.trainer is not None
        self.build(self.trainer)

    def build(self, trainer: L.Trainer) -> None:
        """Compute the descriptors that are missing, shared among the ranks of the trainer.

        Raises:
            UserError: descriptors are not finite, the disk is full or not shared by all machines.
        """
        if self._ready:
            return
        self.data.trainer = trainer  # whose ranks share the cores
        strategy = trainer.strategy
        rank, ranks = rank_and_world_size(trainer)
        with ExitStack() as until_built:
            self._lock(until_built, rank, strategy)
            missing = on_rank_zero(rank, strategy.broadcast, self.store.open)
            if missing:
                self._compute(missing[rank::ranks], strategy.root_device)
                strategy.barrier()
            complete = strategy.reduce_boolean_decision(not self.store.scan())
        if not complete:
            raise UserError(
                f"not every machine of this run sees the same {self.store.folder}: set BCNN_STORES to "
                "a folder on a disk that they share, or choose last=sgd last.store=false"
            )
        self._ready = True

    def train_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(self.data.train, self.data.train_sampler(self.trainer))

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.data.val, self.trainer))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.data.test, self.trainer))

    def predict_dataloader(self) -> list[DataLoader]:
        """Return nothing: `Trainer.predict` starts the ranks and has the store built, no more."""
        return []

    def evaluation_dataloader(
        self, samples: Sequence[tuple[str, int]], sampler: SeededSampler | None = None
    ) -> DataLoader:
        """Return a loader of the first view of these images, in order, or of what a sampler draws."""
        return DataLoader(
            _Numbers(self.numbers(samples), samples),
            batch_size=self.data.rank_batch(self.trainer),
            sampler=sampler,
            collate_fn=lambda batch: batch,  # `__getitems__` returns a whole one
        )

    def numbers(self, samples: Sequence[tuple[str, int]]) -> list[int]:
        """Return the numbers of these images' descriptors; those of mirror images come next."""
        return [self._position[path] * VIEWS for path, _ in samples]

    def descriptors(
        self, samples: Sequence[tuple[str, int]], views: int = 1
    ) -> tuple["StoredDescriptors", Tensor]:
        """Return descriptors (images, width), read when they are sliced, and the labels.

        Args:
            samples: (path, label) of the images.
            views: 1: of the evaluation crop; 2: their mean with those of the mirror images, of which a
                linear classifier's logits are the mean of its logits.
        """
        labels = torch.tensor([label for _, label in samples])
        return StoredDescriptors(self.store, self.numbers(samples), views), labels

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Return the descriptors of a batch of numbers, in memory that the next batch reuses.

        Allocating 17 MB (64 descriptors) anew in every step takes as long as filling them.
        """
        numbers, labels = batch
        if len(self._batch) < len(numbers):
            self._batch = np.empty((len(numbers), self.store.width), self.store.dtype)
        out = self._batch[: len(numbers)]
        self.store.read(numbers.tolist(), out)
        return torch.from_numpy(out), labels

    def _lock(self, until: ExitStack, rank: int, strategy: Strategy) -> None:
        """Have rank 0 hold the store's lock until the block ends."""

        def acquire(seconds: float) -> bool:
            try:
                until.enter_context(self.store.lock().acquire(seconds))
            except Timeout:
                return False
            return True

        if not on_rank_zero(rank, strategy.broadcast, lambda: acquire(0)):
            logger.info("another run is building the same descriptors: waiting for it")
            while not on_rank_zero(rank, strategy.broadcast, lambda: acquire(WAIT)):
                pass

    def _compute(self, shards: list[int], device: torch.device) -> None:
        positions = [i for number in shards for i in self.store.shard_images(number)]
        # Only the very last shard has fewer images, so a batch of SHARD images is one shard.
        samples = [(self.paths[i], i) for i in positions]
        loader = self.data.evaluation_dataloader(samples, batch_size=SHARD)
        model = self.model.to(device)
        model.backbone.eval()
        dtype = torch.from_numpy(np.empty(0, self.store.dtype)).dtype
        written: deque[Future[None]] = deque()
        with (
            progress("computing descriptors", len(samples)) as task,
            ThreadPoolExecutor(WRITERS) as writers,
            torch.no_grad(),
        ):
            for number, (images, _) in zip(shards, loader, strict=True):
                images = images.to(device, non_blocking=True)
                flipped = [images.flip(-1)] if self.store.views(number) > 1 else []
                with autocast(device, self.precision):
                    views = [model.descriptor(view) for view in (images, *flipped)]
                descriptors = torch.stack(views, dim=1).to(dtype)
                self._validate_finite(number, descriptors)
                written.append(writers.submit(self.store.write, number, descriptors.cpu().numpy()))
                if len(written) > 2 * WRITERS:
                    written.popleft().result()
                task.advance(len(images))
            for each in written:
                each.result()

    def _validate_finite(self, number: int, descriptors: Tensor) -> None:
        """Raise UserError for an overflow: no later run would notice it on disk."""
        finite = descriptors.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            path = self.paths[number * SHARD + int(finite.int().argmin())]
            raise UserError(
                f"the descriptor of {path} is not finite in {self.precision}: try "
                "trainer.precision=32-true, or other weights"
            )


class StoredDescriptors:
    """Descriptors (images, width) of a store, read when a slice of them is asked for.

    Args:
        store: complete.
        numbers: of the first view of each image.
        views: to take the mean of, in float32; a single one keeps the dtype on disk.
    """

    def __init__(self, store: FeatureStore, numbers: Sequence[int], views: int = 1) -> None:
        self.store = store
        self.numbers = numbers
        self.views = views

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice, /) -> Tensor:
        numbers = [first + view for first in self.numbers[part] for view in range(self.views)]
        out = np.empty((len(numbers), self.store.width), self.store.dtype)
        self.store.read(numbers, out)
        descriptors = torch.from_numpy(out)
        if self.views == 1:
            return descriptors
        return descriptors.unflatten(0, (-1, self.views)).mean(dim=1, dtype=torch.float32)


class _Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Numbers of a split's descriptors, and their labels, a batch at a time."""

    def __init__(self, numbers: Sequence[int], samples: Sequence[tuple[str, int]]) -> None:
        self.first = torch.tensor(numbers)
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: Sequence[int] | Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Return a batch; the seed of a draw chooses the view, an index alone means the first."""
        indices, views = torch.tensor(
            [(draw[0], draw[1] % VIEWS) if isinstance(draw, tuple) else (draw, 0) for draw in draws]
        ).unbind(1)
        return self.first[indices] + views, self.labels[indices]


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_digests(data: FineGrainedDataModule, paths: Iterable[str]) -> str:
    """Return a digest of images, from the digests that the check of the data module has cached."""
    return hashlib.sha256("".join(data.digests[path] for path in paths).encode()).hexdigest()
