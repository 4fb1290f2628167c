"""The convex solver of stage `last`, at growing numbers of rows."""

import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from bcnn.benchmark.harness import measure, title, trainer
from bcnn.benchmark.options import Options
from bcnn.model.network import BCNN, CHANNELS
from bcnn.model.pooling.bilinear import packed_size
from bcnn.store import VIEWS, DescriptorStore
from bcnn.training.convex import ConvexModule
from bcnn.training.descriptors import DescriptorData


def convex_solver(options: Options) -> dict[str, float]:
    """Stage `last` solved for one λ on `options.images` random descriptors in two views each."""
    count, width = options.images, packed_size(CHANNELS)
    store = DescriptorStore({"benchmark": "random rows"}, count, width)
    store.open()
    generator = np.random.default_rng(0)
    for chunk in range(store.chunk_count):
        rows = generator.random((len(store.chunk_images(chunk)) * VIEWS, width), np.float32)
        store.write(chunk, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    data: Any = SimpleNamespace(  # as much of a DescriptorData as the solver reads
        images=SimpleNamespace(train=[(str(i), i % options.classes) for i in range(count)]),
        rows=lambda samples: [VIEWS * int(name) for name, _ in samples],
        read=partial(DescriptorData.read, SimpleNamespace(store=store)),  # type: ignore[arg-type]
    )
    model = BCNN([str(k) for k in range(options.classes)])
    fit = trainer(options, max_epochs=1, limit_train_batches=1, precision="32-true")
    start = time.perf_counter()
    fit.fit(ConvexModule(model, data, [1e-6]), DataLoader(TensorDataset(torch.zeros(1))))
    return {"seconds": time.perf_counter() - start}


def table(options: Options) -> Table:
    """A line for each number of rows."""
    table = Table("rows", "seconds", "memory", title=title(options))
    for rows in options.rows:
        row = measure(convex_solver, replace(options, images=rows // VIEWS))
        table.add_row(str(rows), f"{row['seconds']:.1f}", f"{row['peak'] / 1e9:.2f} GB")
    return table
