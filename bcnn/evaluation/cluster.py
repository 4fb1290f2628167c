"""Parts of predictions that Ray Data's actors write, on this machine or on a cluster."""

import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray.data

from bcnn.evaluation.parts import Part, write_parts
from bcnn.evaluation.writers import Predictor, WriteTo
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.device import best_device
from bcnn.utils.errors import UserError

PARTS = 8  # at most, that an actor is sent at a time: its decoding processes start anew for them


class PartWriter:
    """An actor: it holds the model, and writes some parts at a time."""

    def __init__(self, tools: ray.ObjectRef, folder: str, cores: int) -> None:
        """Fetch the arguments of `write_parts_on_ray`; relative paths begin at the folder."""
        self.folder = folder
        os.environ["BCNN_CORES"] = str(cores)
        model, self.predictor, self.write_to = ray.get(tools)
        model.to(best_device())

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Write the parts of rows, but for those that are there: by an actor that died after them."""
        try:
            os.chdir(self.folder)
            texts = zip(map(Path, rows["file"]), map(os.fsdecode, rows["images"]), strict=True)
            parts = [Part(file, text.split("\0")) for file, text in texts if not file.exists()]
            errors = [each.error for each in write_parts(parts, self.predictor, self.write_to)]
        except (UserError, OSError) as error:  # Ray would show it inside a traceback of its own
            return {"errors": [[]], "failure": [str(error)]}
        return {"errors": [errors], "failure": [""]}


def write_parts_on_ray(
    address: str, parts: Iterable[Part], tools: tuple[BCNN, Predictor, WriteTo]
) -> Iterator[str]:
    """Yield the error of each image, "" where there is none, while actors write the parts.

    What an actor has not written when it dies is sent to another. All parts are listed first, and held
    in memory.

    Args:
        address: of a cluster; auto: that of this machine; local: a cluster made for this call.
        tools: a model on the CPU, and a predictor and a writer that hold the same model.
    """
    # The paths of a part are one value of bytes: they need not be valid Unicode.
    rows = [{"file": str(file), "images": os.fsencode("\0".join(images))} for file, images in parts]
    if not rows:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.init(address, logging_level="error", log_to_driver=False):
        ray.data.DataContext.get_current().enable_progress_bars = False
        actors, share = _actors()
        pool = ray.data.ActorPoolStrategy(
            min_size=1, initial_size=min(actors, len(rows)), max_size=len(rows)
        )
        at_once = max(1, min(PARTS, len(rows) // (4 * actors)))  # all actors end at about the same time
        items = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / at_once))
        written = items.map_batches(
            PartWriter,
            batch_size=None,
            fn_constructor_args=(ray.put(tools), os.getcwd(), share["num_cpus"]),
            compute=pool,
            **share,
        )
        for row in written.iter_rows():
            if row["failure"]:
                raise UserError(row["failure"])
            yield from row["errors"]


def _actors() -> tuple[int, dict[str, int]]:
    """Return how many actors the cluster holds, and what each takes: a GPU and its cores, or a core."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [each for each in machines if each.get("GPU")]
    if not gpus:
        return max(1, int(sum(each.get("CPU", 0) for each in machines))), {"num_cpus": 1}
    cores = max(1, min(int(each.get("CPU", 0) // each["GPU"]) for each in gpus))
    return int(sum(each["GPU"] for each in gpus)), {"num_gpus": 1, "num_cpus": cores}
