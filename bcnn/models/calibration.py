"""What held-out images show of a model: how sure it is, and what is unlike its training images.

All of it assumes that new images are drawn like the held-out ones ("exchangeable"): see docs/sure.md.
"""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = 64  # principal axes of the training images' descriptors
SKETCH = 1024  # numbers that a descriptor is reduced to first, or the axes would take megabytes
ACCEPTED = 0.95  # of held-out images of known classes that are not unlike the training images
ENOUGH = 19  # held-out images: of fewer, no prediction set of that coverage leaves a class out
FEW = 50  # held-out images: of fewer, the largest novelties are too low for images to come
TEMPERATURES = (-4.0, 4.0)  # natural logarithms of the least and the largest


class Subspace(nn.Module):
    """The first principal axes of training descriptors, and how much of another lies outside them.

    Descriptors are reduced by `sketch`, which about keeps distances ("feature hashing", Weinberger et
    al., ICML 2009). Source of the rest: "ViM", Wang et al., CVPR 2022, §4.1.
    """

    mean: Tensor
    axes: Tensor

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SKETCH))
        self.register_buffer("axes", torch.zeros(axes, SKETCH, dtype=torch.float16))

    @classmethod
    def of(cls, descriptors: Tensor) -> Self:
        """Return the subspace of descriptors (n, width): `AXES` axes, at most n / 2."""
        x = sketch(descriptors)
        mean = x.mean(dim=0)
        axes = torch.linalg.svd(x - mean, full_matrices=False).Vh[: min(AXES, len(x) // 2)]
        space = cls(len(axes)).to(x.device)
        space.mean.copy_(mean)
        space.axes.copy_(axes)
        return space

    def residual(self, descriptors: Tensor) -> Tensor:
        """Descriptors (batch, width) → share of the squared distance from the mean, 0..1 (batch,)."""
        x = sketch(descriptors) - self.mean
        inside = (x @ self.axes.float().mT).square().sum(dim=1)
        return 1 - inside / x.square().sum(dim=1).clamp_min(1e-12)


def sketch(descriptors: Tensor) -> Tensor:
    """Return (batch, `SKETCH`): sums of every `SKETCH`-th number, with signs that the index gives."""
    width = descriptors.shape[1]
    mixed = torch.arange(width, device=descriptors.device) * 2654435761 % 2**32  # a hash
    mixed = (mixed >> 15 ^ mixed) * 2246822519 % 2**32
    signed = descriptors.float() * ((mixed >> 13 & 1) * 2 - 1)
    return F.pad(signed, (0, -width % SKETCH)).unflatten(1, (-1, SKETCH)).sum(dim=1)


class Calibration(nn.Module):
    """A temperature, thresholds of prediction sets, and a measure of novelty, from held-out images.

    Args:
        axes: of the subspace of training descriptors.
        images: held-out images.
    """

    temperature: Tensor
    scores: Tensor
    moments: Tensor
    limit: Tensor

    def __init__(self, axes: int, images: int) -> None:
        super().__init__()
        self.subspace = Subspace(axes)
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("scores", torch.zeros(images))  # see `threshold`; sorted
        self.register_buffer("moments", torch.zeros(2, 2))  # means and deviations of `_raw_scores`
        self.register_buffer("limit", torch.zeros(()))  # of novelty

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor, labels: Tensor, residual: Tensor, subspace: Subspace) -> Self:
        """Return the calibration by held-out images.

        Args:
            logits: (n, classes), by a model that was not trained on the images.
            labels: (n,).
            residual: (n,), by a subspace of other images.
            subspace: of the training images, for images to come.
        """
        logits, labels, residual = logits.float().cpu(), labels.cpu(), residual.float().cpu()
        images = len(logits)
        self = cls(len(subspace.axes), images)
        self.subspace.load_state_dict(subspace.state_dict())
        self.temperature.fill_(_temperature(logits, labels))
        shares = (logits / self.temperature).softmax(dim=1)
        of_class = shares.gather(1, labels[:, None])[:, 0]
        self.scores.copy_((1 - of_class).sort().values)
        raw = _raw_scores(logits, residual)
        spread = raw.std(dim=0, correction=0).clamp_min(1e-6)
        self.moments.copy_(torch.stack([raw.mean(dim=0), spread]))
        novelty = self._novelty(raw).sort().values
        rank = min(images, math.ceil((images + 1) * ACCEPTED - 1e-9))
        least = _limit_of_few(images) if images < FEW else -math.inf
        self.limit.fill_(max(float(novelty[rank - 1]), least))
        return self

    def sizes(self) -> dict[str, int]:
        """Return the numbers that another one of these sizes is made from."""
        return {"axes": len(self.subspace.axes), "images": len(self.scores)}

    def threshold(self, coverage: float) -> float:
        """Return the least probability of the classes in a prediction set; 0 where all classes must be.

        The set holds the true class of a share `coverage` of images like the held-out ones, and more of
        few: of n held-out images, none but the set of all classes can promise more than n / (n + 1).

        Source: Sadinle, Lei & Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error
        Levels", JASA 2019; the finite sample: Vovk et al., "Algorithmic Learning in a Random World",
        2005, §2.2.
        """
        rank = math.ceil((len(self.scores) + 1) * coverage - 1e-9)  # 0.9 · 110 is 99.00000000000001
        return 1 - float(self.scores[rank - 1]) if rank <= len(self.scores) else 0.0

    def novelty(self, logits: Tensor, descriptors: Tensor) -> Tensor:
        """Return (batch,): above zero, the image is unlike the training images.

        The larger of two scores, in standard deviations above the limit that `ACCEPTED` of the held-out
        images keep: no logit is large (of classes nearby; Vaze et al., "Open-Set Recognition:
        A Good Closed-Set Classifier is All You Need?", ICLR 2022), or the descriptor lies outside the
        subspace of the training images (of anything else).
        """
        return self._novelty(_raw_scores(logits, self.subspace.residual(descriptors))) - self.limit

    def _novelty(self, raw: Tensor) -> Tensor:
        return ((raw - self.moments[0]) / self.moments[1]).amax(dim=1)


def prediction_sets(probabilities: Tensor, threshold: float) -> Tensor:
    """Return which classes are in the sets (batch, classes): the likeliest and all at the threshold."""
    likeliest = probabilities.amax(dim=1, keepdim=True)
    return (probabilities >= threshold - 1e-6) | (probabilities == likeliest)


def _raw_scores(logits: Tensor, residual: Tensor) -> Tensor:
    """Return (batch, 2): how small the largest logit is, and how far outside the descriptor lies."""
    return torch.stack([-logits.float().amax(dim=1), residual], dim=1)


def _limit_of_few(images: int) -> float:
    """Return the least limit of novelty by the moments of fewer than `FEW` images; of one, none.

    The end of Student's prediction interval for one more normal score, half of those not `ACCEPTED` for
    each of the two scores. Source: Hahn & Meeker, "Statistical Intervals", 1991, §4.7.
    """
    from scipy.stats import t  # here, since prediction needs no scipy

    if images < 2:
        return torch.finfo(torch.float32).max
    quantile = float(t.ppf((1 + ACCEPTED) / 2, images - 1))
    return quantile * math.sqrt((images + 1) / (images - 1))


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """Return by what to divide logits for the least cross-entropy.

    Labels are smoothed as by one image more of each kind: where all held-out images are right, the best
    temperature would be 0. Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    §4.2; Platt, "Probabilistic Outputs for Support Vector Machines", 1999, §2.2.
    """
    from scipy.optimize import minimize_scalar  # here, since prediction needs no scipy

    smoothing = 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return F.cross_entropy(scaled, labels, label_smoothing=smoothing).item()

    return math.exp(minimize_scalar(loss, bounds=TEMPERATURES, method="bounded").x)
