"""Stage `last` without the features: descriptors computed once, then read from the store."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.decoding import MARGIN, VERSION
from bcnn.data.folder import ImageFolderData
from bcnn.data.sampler import Draw
from bcnn.errors import UserError
from bcnn.model.network import BCNN, DEFAULT
from bcnn.precision import autocast
from bcnn.progress import progress, track
from bcnn.store import CHUNK, VIEWS, DescriptorStore
from bcnn.terminal import say


class DescriptorData(L.LightningDataModule):
    """The image set of another data module, as descriptors from the store.

    Every image has two rows, of its evaluation crop and of that crop's mirror image. Training draws
    one of the two at random, validation and test read the first.

    Args:
        images: set up already; its splits, labels and batch size are used.
        model: whose frozen features compute the descriptors.
        precision: Lightning's name of the precision that the features run in.
        dtype: of the rows on disk.
    """

    def __init__(
        self, images: ImageFolderData, model: BCNN, precision: str, dtype: str = "float16"
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
            "features": _hash_backbone(model),
            "images": _hash_files(self.paths),
            **asdict(images.framing),
            "decoding": f"{VERSION}; JPEGs reduced to no less than {MARGIN} times the side",
            "views": "evaluation crop, mirror image",
            "precision": precision,
        }
        if model.chosen != DEFAULT:  # which stores of before do not name
            identity |= model.chosen
        self.store = DescriptorStore(
            identity,
            len(self.paths),
            model.pooling.width,
            dtype,
            about=f"{images.root.resolve()} at {images.framing}, {precision}",
        )

    def setup(self, stage: str | None = None) -> None:
        """Verify the store and compute what is missing, shared among the ranks of the trainer."""
        if self._ready:
            return
        assert self.trainer is not None
        strategy = self.trainer.strategy
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        with self._lock() if rank == 0 else nullcontext():
            missing, damaged = self.store.open() if rank == 0 else ([], 0)
            missing = strategy.broadcast(missing)
            if damaged:
                say(f"{damaged} damaged chunks in the store: computing them again")
            if missing:
                self._build(missing[rank::ranks], strategy.root_device)
                strategy.barrier()
            if ranks > 1:
                self.store.find_chunks()
                strategy.barrier()
        self._ready = True

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.images.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.images.val, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.images.test, shuffle=False)

    def rows(self, samples: Sequence[tuple[str, int]]) -> list[int]:
        """Where the store has these images' descriptors (their mirror images' come next)."""
        return [self._position[path] * VIEWS for path, _ in samples]

    def views(self, samples: Sequence[tuple[str, int]]) -> tuple["StoredRows", Tensor]:
        """Every view of these images, to be read once the store is set up, and their labels."""
        rows = [first + view for view in range(VIEWS) for first in self.rows(samples)]
        labels = torch.tensor([label for _, label in samples] * VIEWS)
        return StoredRows(self.store, rows), labels

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

    def _loader(self, samples: Sequence[tuple[str, int]], shuffle: bool) -> DataLoader:
        return DataLoader(
            _Rows(self, samples),
            batch_size=self.images.batch_size,
            sampler=self.images.train_sampler(self.trainer) if shuffle else None,
            collate_fn=lambda batch: batch,  # already one, from __getitems__
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The store's lock; says so where another run has it."""
        lock = self.store.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another run is building the same descriptors: waiting for it")
            lock.acquire()
        except OSError as error:
            raise UserError(
                f"{lock.lock_file} cannot be written ({error.strerror}): set BCNN_STORES to another "
                "folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _build(self, chunks: list[int], device: torch.device) -> None:
        positions = [i for chunk in chunks for i in self.store.chunk_images(chunk)]
        samples = [(self.paths[i], i) for i in positions]
        # Chunks are whole but for the very last one, so a batch of CHUNK images is one chunk.
        loader = self.images.evaluation_dataloader(samples, batch_size=CHUNK)
        model = self.model.to(device)
        with progress("computing descriptors", len(samples)) as task, torch.no_grad():
            for chunk, (images, _) in zip(chunks, loader, strict=True):
                images = images.to(device)
                with autocast(device, self.precision):
                    views = [model.descriptor(images), model.descriptor(images.flip(-1))]
                rows = torch.stack(views, dim=1).flatten(0, 1).cpu().numpy()
                self._refuse_overflow(chunk, rows)
                self.store.write(chunk, rows)
                task.advance(len(images))

    def _refuse_overflow(self, chunk: int, rows: np.ndarray) -> None:
        """Raises UserError where rows are not finite on disk, which no later run could mend."""
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows.astype(self.store.dtype)).all(axis=1)
        if not finite.all():
            image = self.store.chunk_images(chunk)[int(finite.argmin()) // VIEWS]
            raise UserError(
                f"the features of {self.paths[image]} are not finite numbers in {self.precision}: try "
                "trainer.precision=32-true, or other weights"
            )


class StoredRows:
    """Rows of a store by index, read when a slice of them is asked for, in the dtype on disk."""

    def __init__(self, store: DescriptorStore, indices: Sequence[int]) -> None:
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice, /) -> Tensor:
        indices = self.indices[part]
        out = np.empty((len(indices), self.store.width), self.store.dtype)
        self.store.read(indices, out)
        return torch.from_numpy(out)


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """Row numbers of a split in the store, and their labels, a batch at a time."""

    def __init__(self, data: DescriptorData, samples: Sequence[tuple[str, int]]) -> None:
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


def _hash_backbone(model: BCNN) -> str:
    digest = hashlib.sha256()
    state = model.backbone.state_dict()
    for name in sorted(state, key=lambda name: name in ("mean", "std")):  # the order of older stores
        digest.update(state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hash_files(paths: Sequence[str]) -> str:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: hashlib.sha256(Path(path).read_bytes()).digest(), paths)
        read = track(digests, "reading images", len(paths))
        return hashlib.sha256(b"".join(read)).hexdigest()
