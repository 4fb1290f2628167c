"""Stage `last` without the features: descriptors computed once, then read from the store."""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
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
from bcnn.models.bilinear_cnn import BCNN, DEFAULT
from bcnn.training.feature_store import CHUNK, VIEWS, FeatureStore
from bcnn.utils.device import autocast
from bcnn.utils.distributed import on_rank_zero
from bcnn.utils.errors import UserError
from bcnn.utils.progress import progress, track
from bcnn.utils.terminal import say

WRITERS = 4  # threads that write chunks: checksum and disk let go of the interpreter's lock
WAIT = 60  # seconds at a time for another run: ranks that wait for rank 0 give up after 30 minutes


class CachedFeatureDataModule(L.LightningDataModule):
    """The image set of another data module, as descriptors from the store.

    An image has a row of its evaluation crop and, if it is trained on, one of that crop's mirror image.
    Training draws one of the two at random, or takes their mean; validation and test read the first.

    Args:
        images: set up already; its splits, labels and batch size are used.
        model: whose frozen features compute the descriptors.
        precision: Lightning's name of the precision that the features run in.
        dtype: of the rows on disk.
    """

    def __init__(
        self, images: FineGrainedDataModule, model: BCNN, precision: str, dtype: str = "float16"
    ) -> None:
        super().__init__()
        self.images = images
        self.model = model
        self.precision = precision
        splits = (*images.train, *images.val, *images.test)
        self.paths = sorted(path for path, _ in splits)
        self._position = {path: i for i, path in enumerate(self.paths)}
        self._ready = False
        self._batch = np.empty((0, 0))
        identity = {
            "features": hash_tensors(model.backbone.state_dict()),
            "images": hash_files(self.paths),
            **images.preprocessing.identity(),
            "decoding": f"{VERSION}; JPEGs reduced to no less than {MARGIN} times the side",
            "views": "evaluation crop, mirror image",
            "precision": precision,
        }
        if model.chosen != DEFAULT:  # which stores of before do not name
            identity |= model.chosen
        self.store = FeatureStore(
            identity,
            len(self.paths),
            model.pooling.width,
            dtype,
            about=f"{images.root.resolve()} at {images.preprocessing}, {precision}",
            mirrored=[self._position[path] for path, _ in images.train],
        )

    def setup(self, stage: str | None = None) -> None:
        """Verify the store and compute what is missing, shared among the ranks of the trainer."""
        if self._ready:
            return
        assert self.trainer is not None
        self.images.trainer = self.trainer  # whose ranks share the cores
        strategy = self.trainer.strategy
        rank, ranks = rank_and_world_size(self.trainer)
        with ExitStack() as until_built:
            self._lock(until_built, rank, strategy)
            missing, damaged = on_rank_zero(rank, strategy.broadcast, self.store.open)
            self._refuse_unshared(strategy, self.store.folder.is_dir())
            if damaged:
                say(f"{damaged} damaged chunks in the store: computing them again")
            if missing:
                self._build(missing[rank::ranks], strategy.root_device)
                strategy.barrier()
            if ranks > 1:
                self.store.find_chunks()
                self._refuse_unshared(strategy, self.store.complete)
        self._ready = True

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.images.train, self.images.train_sampler(self.trainer))

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.images.val, self.trainer))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.images.test, self.trainer))

    def evaluation_dataloader(self, samples: Sequence[tuple[str, int]]) -> DataLoader:
        """The first view of these images, in order."""
        return self._loader(samples)

    def rows(self, samples: Sequence[tuple[str, int]]) -> list[int]:
        """Where the store has these images' descriptors (their mirror images' come next)."""
        return [self._position[path] * VIEWS for path, _ in samples]

    def means(self, samples: Sequence[tuple[str, int]]) -> tuple["StoredRows", Tensor]:
        """A row an image, the mean of its views, to be read once the store is set up; and the labels.

        A linear classifier's logits of a mean are the mean of its logits.
        """
        labels = torch.tensor([label for _, label in samples])
        return StoredRows(self.store, self.rows(samples), VIEWS), labels

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Row numbers → descriptors, where the next batch's will be too.

        To allocate 17 MB (64 rows) anew in every step takes as long as to fill them.
        """
        rows, labels = batch
        if len(self._batch) < len(rows):
            self._batch = np.empty((len(rows), self.store.width), self.store.dtype)
        out = self._batch[: len(rows)]
        self.store.read(rows.tolist(), out)
        return torch.from_numpy(out), labels

    def _loader(
        self, samples: Sequence[tuple[str, int]], draws: SeededSampler | None = None
    ) -> DataLoader:
        return DataLoader(
            _Rows(self, samples),
            batch_size=self.images.rank_batch(self.trainer),
            sampler=draws,
            collate_fn=lambda batch: batch,  # already one, from __getitems__
        )

    def _lock(self, until: ExitStack, rank: int, strategy: Strategy) -> None:
        """Have rank 0 hold the store's lock; says so where another run has it."""

        def held(seconds: float) -> bool:
            lock = self.store.lock()
            try:
                until.enter_context(lock.acquire(seconds))
            except Timeout:
                return False
            except OSError as error:
                raise UserError(
                    f"{lock.lock_file} cannot be written ({error.strerror}): set BCNN_STORES to "
                    "another folder"
                ) from error
            return True

        if on_rank_zero(rank, strategy.broadcast, lambda: held(0)):
            return
        if rank == 0:
            say("another run is building the same descriptors: waiting for it")
        while not on_rank_zero(rank, strategy.broadcast, lambda: held(WAIT)):
            pass

    def _refuse_unshared(self, strategy: Strategy, there: bool) -> None:
        """Raises UserError, on every rank, where one of them does not see what the others write."""
        if not strategy.reduce_boolean_decision(there):
            raise UserError(
                f"not every machine of this run sees the same {self.store.folder}: set BCNN_STORES to "
                "a folder on a disk that they share, or choose last=sgd last.store=false"
            )

    def _build(self, chunks: list[int], device: torch.device) -> None:
        positions = [i for chunk in chunks for i in self.store.chunk_images(chunk)]
        samples = [(self.paths[i], i) for i in positions]
        # Chunks are whole but for the very last one, so a batch of CHUNK images is one chunk.
        loader = self.images.evaluation_dataloader(samples, batch_size=CHUNK)
        model = self.model.to(device)
        dtype = torch.from_numpy(np.empty(0, self.store.dtype)).dtype
        written: deque[Future[None]] = deque()
        with (
            progress("computing descriptors", len(samples)) as task,
            ThreadPoolExecutor(WRITERS) as writers,
            torch.no_grad(),
        ):
            for chunk, (images, _) in zip(chunks, loader, strict=True):
                images = images.to(device, non_blocking=True)
                flipped = [images.flip(-1)] if self.store.views(chunk) > 1 else []
                with autocast(device, self.precision):
                    views = [model.descriptor(view) for view in (images, *flipped)]
                rows = torch.stack(views, dim=1).flatten(0, 1).to(dtype)
                self._refuse_overflow(chunk, rows)
                written.append(writers.submit(self.store.write, chunk, rows.cpu().numpy()))
                if len(written) > 2 * WRITERS:
                    written.popleft().result()
                task.advance(len(images))
            for each in written:
                each.result()

    def _refuse_overflow(self, chunk: int, rows: Tensor) -> None:
        """Raises UserError where rows are not finite on disk, which no later run could mend."""
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.int().argmin()) // self.store.views(chunk)
            image = self.store.chunk_images(chunk)[first]
            raise UserError(
                f"the features of {self.paths[image]} are not finite numbers in {self.precision}: try "
                "trainer.precision=32-true, or other weights"
            )


class StoredRows:
    """Rows of a store, read when a slice of them is asked for.

    Args:
        store: complete.
        indices: of the rows; the first of several.
        views: rows to take the mean of, in float32; of one, it is in the dtype on disk.
    """

    def __init__(self, store: FeatureStore, indices: Sequence[int], views: int = 1) -> None:
        self.store = store
        self.indices = indices
        self.views = views

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice, /) -> Tensor:
        indices = [first + view for first in self.indices[part] for view in range(self.views)]
        out = np.empty((len(indices), self.store.width), self.store.dtype)
        self.store.read(indices, out)
        rows = torch.from_numpy(out)
        if self.views == 1:
            return rows
        return rows.unflatten(0, (-1, self.views)).mean(dim=1, dtype=torch.float32)


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """Row numbers of a split in the store, and their labels, a batch at a time."""

    def __init__(self, data: CachedFeatureDataModule, samples: Sequence[tuple[str, int]]) -> None:
        self.first = torch.tensor(data.rows(samples))
        self.labels = torch.tensor([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: Sequence[int] | Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Of each draw its seed chooses the view; an index alone is of the first."""
        indices, views = torch.tensor(
            [(draw[0], draw[1] % VIEWS) if isinstance(draw, tuple) else (draw, 0) for draw in draws]
        ).unbind(1)
        return self.first[indices] + views, self.labels[indices]


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """Of a backbone's state."""
    digest = hashlib.sha256()
    for name in sorted(state, key=lambda name: name in ("mean", "std")):  # the order of older stores
        digest.update(state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_files(paths: Sequence[str]) -> str:
    """Of their bytes, in their order."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: hashlib.sha256(Path(path).read_bytes()).digest(), paths)
        read = track(digests, "reading images", len(paths))
        return hashlib.sha256(b"".join(read)).hexdigest()
