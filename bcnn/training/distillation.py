"""Distillation: a network learns from the probabilities of a trained one, its teacher.

Source: Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, §3:
both see the same crops, and the labels are not used.
"""

import copy

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.benchmark import Timer
from torchvision.transforms.v2.functional import resize

from bcnn.data.batches import Images, in_order, stacks
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import Before
from bcnn.models.bilinear_cnn import BCNN

RUNS = 5  # of the median time of an image


class Teacher:
    """Gives the probabilities that a trained network gives; no module, so that no checkpoint has it."""

    def __init__(self, model: BCNN) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Return the probabilities (batch, classes) of images, on their device.

        The student's crops are resized to the nearest side that this network takes.
        """
        model = self.model.to(stacks(images)[0].device)
        side = model.preprocessing.multiple
        resized = [resize(x, [side(x.shape[-2]), side(x.shape[-1])]) for x in stacks(images)]
        return model.probabilities(in_order(images, [model(x) for x in resized]))


def divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean Kullback–Leibler divergence of a student's logits from a teacher's probabilities.

    Both are (batch, classes).
    """
    return F.kl_div(logits.log_softmax(dim=1), probabilities, reduction="batchmean")


def compare_with(
    teacher: Teacher,
    student: BCNN,
    predictions: Predictions,
    data: FineGrainedDataModule,
    precision: str | None,
) -> tuple[Before, dict[str, str]]:
    """Return the teacher's predictions of the images that a student's are of, and what both cost."""
    model = teacher.model.to(student.head.bias.device)
    own = copy.copy(data)
    own.use_preprocessing(model.preprocessing)
    samples = [*zip(predictions.paths, predictions.labels.tolist(), strict=True)]
    found = predict_split(model, samples, own.evaluation_dataloader(samples), precision)
    return ("teacher", found), {"teacher": _cost(model), "student": _cost(student)}


def _cost(model: BCNN) -> str:
    """Return the number of weights of a network, and the time of an image on its device, in words."""
    names = {"model": model, "image": Image.new("RGB", 2 * (model.preprocessing.size,))}
    timer = Timer("model.predict(image)", globals=names, num_threads=torch.get_num_threads())
    milliseconds = 1e3 * timer.timeit(RUNS).median
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{weights:.1f} million weights, {milliseconds:.3g} ms an image"
