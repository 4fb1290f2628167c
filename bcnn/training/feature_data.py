"""Stage `last` without the backbone: descriptors computed once, then read from a store."""

import hashlib
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bcnn.data.batches import Images
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import MARGIN, VERSION
from bcnn.data.sampler import Draw, SeededSampler, rank_and_world_size, shard
from bcnn.models.backbones import Backbone
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.pooling import all_arguments
from bcnn.training.feature_store import SHARD, VIEWS, FeatureStore, in_shards
from bcnn.utils.console import logger, progress
from bcnn.utils.device import autocast
from bcnn.utils.distributed import on_rank_zero
from bcnn.utils.errors import UserError

WRITERS = 4  # threads that write shards; the disk releases the interpreter's lock
WAIT = 60  # seconds at a time for another run: ranks that wait for rank 0 give up after 30 minutes


class CachedFeatureDataModule(L.LightningDataModule):
    """The images of another data module, set up before, as descriptors from a store.

    An image has a descriptor of its evaluation crop and, if it is trained on, one of that crop's mirror
    image. Training draws one of the two, or takes their mean; evaluation reads the first.

    `beside` are others that `setup` computes in the same pass: of the same images, by networks that
    differ in projection and pooling.

    Args:
        precision: of the computation, by Lightning's name.
    """

    def __init__(self, data: FineGrainedDataModule, model: BCNN, precision: str) -> None:
        super().__init__()
        self.data, self.model, self.precision = data, model, precision
        self.paths = sorted(path for path, _ in (*data.train, *data.val, *data.test))
        self._position = {path: i for i, path in enumerate(self.paths)}
        self.beside: Sequence[CachedFeatureDataModule] = ()
        self._ready = False
        pooling = model.chosen["pooling"]
        pooled = f"{pooling['name']}: {all_arguments(model.backbone.channels, **pooling)}"
        self.store = FeatureStore(
            identify_maps(model.backbone, data, precision)
            | {"network": model.chosen | {"pooling": pooled}, "pooling": _digest(model.pooling)}
            | {"views": "evaluation crop, mirror image"},
            [data.digests[path] for path in self.paths],
            model.pooling.width,
            mirrored=[self._position[path] for path, _ in data.train],
            about=f"{data.root.resolve()} at {data.preprocessing}, {precision}",
        )

    def setup(self, stage: str | None = None) -> None:
        """Compute the descriptors that are missing, shared among the ranks of the trainer."""
        if self._ready:
            return
        assert self.trainer is not None
        self.data.trainer = self.trainer  # whose ranks share the cores
        strategy, (rank, ranks) = self.trainer.strategy, rank_and_world_size(self.trainer)
        modules = [self, *self.beside]
        stores = [each.store for each in modules]
        with ExitStack() as locks:
            # In one order, so that no two runs wait for each other.
            for _, store in sorted({store.key: store for store in stores}.items()):
                locks.enter_context(_locked(store, rank, strategy.broadcast))
            opened = on_rank_zero(rank, strategy.broadcast, lambda: [store.open() for store in stores])
            lacking = [set(chain(*shards)) for shards in opened]
            if shards := in_shards(chain(*chain(*opened))):
                self._compute(shards[rank::ranks], lacking, strategy.root_device)
                strategy.barrier()
            complete = strategy.reduce_boolean_decision(not any([store.scan() for store in stores]))
        if not complete:
            raise UserError(
                f"not every machine of this run sees the same {self.store.folder}: set BCNN_STORES to "
                "a folder on a disk that they share, or choose last=sgd last.store=false"
            )
        for each in modules:
            each.trainer, each._ready = self.trainer, True

    def train_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(self.data.train, self.data.train_sampler(self.trainer))

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.data.val, self.trainer))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.data.test, self.trainer))

    def predict_dataloader(self) -> list[DataLoader]:
        return []  # `Trainer.predict` starts the ranks and has the store built, no more

    def evaluation_dataloader(
        self, samples: Sequence[tuple[str, int]], sampler: SeededSampler | None = None
    ) -> DataLoader:
        """Return a loader of the first view of these images, in order, or of what a sampler draws."""
        return DataLoader(
            StoredDescriptors(self.store, self.numbers(samples), samples),
            self.data.rank_batch(self.trainer),
            sampler=sampler,
            collate_fn=lambda batch: batch,  # `__getitems__` returns a whole one
        )

    def numbers(self, samples: Sequence[tuple[str, int]]) -> list[int]:
        """Return the numbers of these images' descriptors; those of mirror images come next."""
        return [self._position[path] * VIEWS for path, _ in samples]

    def descriptors(
        self, samples: Sequence[tuple[str, int]], views: int = 1
    ) -> tuple["StoredDescriptors", Tensor]:
        """Return descriptors (images, width) and labels (images,).

        Two views are averaged: a linear classifier's logits of the mean are the mean of its logits.
        """
        stored = StoredDescriptors(self.store, self.numbers(samples), samples, views)
        return stored, stored.labels

    def _compute(self, shards: list[list[str]], lacking: list[set[str]], device: torch.device) -> None:
        """Compute shards of descriptors, for this module and those beside it that lack an image."""
        # Only the very last shard has fewer images, so a batch of SHARD images is one shard.
        path_of = dict(zip(self.store.digests, self.paths, strict=True))
        samples = [(path_of[digest], 0) for each in shards for digest in each]
        loader = self.data.evaluation_dataloader(samples, batch_size=SHARD)
        modules = [self, *self.beside]
        for each in modules:
            each.model.to(device).backbone.eval()
        written: deque[Future[None]] = deque()
        with (
            progress("computing descriptors", len(samples)) as task,
            ThreadPoolExecutor(WRITERS) as writers,
            torch.no_grad(),
        ):
            for digests, (images, _) in zip(shards, loader, strict=True):
                images = images.to(device, non_blocking=True)
                flipped = [images.flip(-1)] if self.store.views(digests) > 1 else []
                with autocast(device, self.precision):
                    maps = [self.model.maps(view) for view in (images, *flipped)]
                for each, lacks in zip(modules, lacking, strict=True):
                    if lacks.isdisjoint(digests):
                        continue
                    descriptors = each._pool(images, maps, [path_of[digest] for digest in digests])
                    written.append(writers.submit(each.store.write, digests, descriptors))
                if len(written) > 2 * WRITERS:
                    written.popleft().result()
                task.advance(len(images))
            for future in written:
                future.result()

    def _pool(
        self, images: Images, views: Sequence[Sequence[Tensor]], paths: Sequence[str]
    ) -> np.ndarray:
        """Return descriptors (images, views, width) of the maps of each view, as they are stored."""
        with autocast(views[0][0].device, self.precision):
            pooled = [self.model.pool(images, maps) for maps in views]
        descriptors = torch.stack(pooled, dim=1).half()
        finite = descriptors.isfinite().flatten(1).all(dim=1)
        if not finite.all():  # an overflow, which no later run would notice on disk
            raise UserError(
                f"the descriptor of {paths[int(finite.int().argmin())]} is not finite in "
                f"{self.precision}: try trainer.precision=32-true, or other weights"
            )
        return descriptors.cpu().numpy()


@contextmanager
def _locked(store: FeatureStore, rank: int, broadcast: Callable[[Any], Any]) -> Iterator[None]:
    """Keep other runs from adding to a store; rank zero waits for those that do."""
    lock = store.lock()
    try:
        if not on_rank_zero(rank, broadcast, lambda: _acquire(lock, 0)):
            logger.info("another run is computing descriptors of this network: waiting for it")
            while not on_rank_zero(rank, broadcast, lambda: _acquire(lock, WAIT)):
                pass
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, seconds: float) -> bool:
    with suppress(Timeout):
        lock.acquire(seconds)
    return lock.is_locked


class StoredDescriptors(Dataset[tuple[Tensor, Tensor]]):
    """Descriptors (images, width) of a store, read when asked for: by slices, or in batches of draws.

    In a slice, several `views` are averaged, in float32. In a batch, the seed of a draw chooses one.
    """

    def __init__(
        self, store: FeatureStore, first: list[int], samples: Sequence[tuple[str, int]], views: int = 1
    ) -> None:
        self.store, self.first, self.views = store, first, views
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, part: slice, /) -> Tensor:  # type: ignore[override]
        numbers = [first + view for first in self.first[part] for view in range(self.views)]
        descriptors = torch.from_numpy(self.store.read(numbers))
        if self.views == 1:
            return descriptors
        return descriptors.unflatten(0, (-1, self.views)).mean(dim=1, dtype=torch.float32)

    def __getitems__(self, draws: Sequence[int] | Sequence[Draw]) -> tuple[Tensor, Tensor]:
        pairs = [draw if isinstance(draw, tuple) else (draw, 0) for draw in draws]
        numbers = [self.first[index] + seed % VIEWS for index, seed in pairs]
        labels = self.labels[[index for index, _ in pairs]]
        return torch.from_numpy(self.store.read(numbers)), labels


def identify_maps(
    backbone: Backbone, data: FineGrainedDataModule, precision: str, projected: bool = True
) -> dict[str, Any]:
    """Return what determines a backbone's maps of an image, projected or not, in plain values."""
    return {
        "backbone": _digest(backbone, without="" if projected else "projection."),
        "preprocessing": vars(data.preprocessing),
        "decoding": f"{VERSION}; JPEGs reduced to no less than {MARGIN} times the side",
        "precision": precision,
    }


def _digest(part: nn.Module, without: str = "") -> str:
    """Return a digest of a part's tensors, but those of a prefix, and of the file that defines it."""
    digest = hashlib.sha256()
    with suppress(OSError, TypeError):  # a class typed into a notebook has no file
        digest.update(inspect.getsource(sys.modules[type(part).__module__]).encode())
    for name, tensor in sorted(part.state_dict().items()):
        if not (without and name.startswith(without)):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
