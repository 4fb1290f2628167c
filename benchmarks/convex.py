"""The convex solver of stage `last`, at growing numbers of rows."""

import time
from dataclasses import replace

import numpy as np
import torch
from rich.table import Table

from bcnn.models.pooling.bilinear import packed_size
from bcnn.models.third_party import CHANNELS
from bcnn.training.feature_data import StoredRows
from bcnn.training.feature_store import VIEWS, FeatureStore
from bcnn.training.logistic_regression import ConvexProblem
from benchmarks.harness import measure, now, title, torch_device
from benchmarks.options import Options


def convex_solver(options: Options) -> dict[str, float]:
    """Stage `last` solved for one λ on random descriptors of `options.images` in two views each."""
    count, width = options.images, packed_size(CHANNELS)
    store = FeatureStore({"benchmark": "random rows"}, count, width)
    store.open()
    generator = np.random.default_rng(0)
    for chunk in range(store.chunk_count):
        content = generator.random((len(store.chunk_images(chunk)) * VIEWS, width), np.float32)
        store.write(chunk, content / np.linalg.norm(content, axis=1, keepdims=True))
    rows = StoredRows(store, range(0, count * VIEWS, VIEWS), VIEWS)
    labels = torch.arange(count) % options.classes
    start = time.perf_counter()
    ConvexProblem(rows, labels, options.classes, device=torch_device(options)).solve(1e-6)
    return {"seconds": now(torch_device(options)) - start}


def table(options: Options) -> Table:
    """A line for each number of rows."""
    table = Table("rows", "seconds", "memory", title=title(options))
    for rows in options.rows:
        row = measure(convex_solver, replace(options, images=rows))
        table.add_row(str(rows), f"{row['seconds']:.1f}", f"{row['peak'] / 1e9:.2f} GB")
    return table
