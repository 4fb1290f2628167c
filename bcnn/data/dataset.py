"""Images by path as a torch data set."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcnn.data.image_io import load_image
from bcnn.data.sampler import Draw


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images by path, each with its label.

    Args:
        samples: (path, label) pairs.
        transform: PIL image → uint8 tensor (3, height, width).
        load: path → PIL image.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        load: Callable[[str], Image.Image] = load_image,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.load = load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: int | Draw) -> tuple[Tensor, int]:
        """Return an image by index, or by (index, seed of its random crop and flip)."""
        if isinstance(draw, tuple):
            index, seed = draw
            with torch.random.fork_rng(devices=[]):
                # `torch.manual_seed` takes a millisecond, for CUDA.
                torch.default_generator.manual_seed(seed)
                return self[index]
        path, label = self.samples[draw]
        return self.transform(self.load(path)).as_subclass(Tensor), label
