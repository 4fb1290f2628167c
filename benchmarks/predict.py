"""Prediction: `bcnn predict` beside a plain loop over the files."""

import tempfile
from itertools import cycle, islice
from pathlib import Path

import photographs
from harness import Options, compare, now, parser

from bcnn.data.image_files import find_images
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import predict_paths
from bcnn.models.bilinear_cnn import BCNN


def plain_loop(options: Options) -> dict[str, float]:
    """Time images one after the other, decoded in this process, in float32."""
    model, paths = _model(options), _paths(options)
    model.predict(paths[0])  # allocates
    start = now()
    for path in paths:
        model.predict(path).cpu()
    return {"seconds": (now() - start) / len(paths)}


def bcnn_predict(options: Options) -> dict[str, float]:
    """Time batches, decoded by workers, in the fastest precision."""
    model, paths = _model(options), _paths(options)
    list(predict_paths(model, paths[:2], workers=0))
    start = now()
    list(predict_paths(model, paths))
    return {"seconds": (now() - start) / len(paths)}


def _model(options: Options) -> BCNN:
    model = BCNN([str(k) for k in range(options.classes)], Preprocessing(options.size)).eval()
    return model.to(options.device)


def _paths(options: Options) -> list[str]:
    return list(islice(cycle(find_images([options.root])), options.images))


if __name__ == "__main__":
    asked = parser(__doc__, "size", "images", "classes", "root").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not asked.root:
            photographs.write(Path(folder), (500, 375), asked.images)
            asked.root = folder
        contenders = {"a plain loop": plain_loop, "bcnn predict": bcnn_predict}
        compare(f"prediction of {asked.images} files at {asked.size} px", contenders, asked)
