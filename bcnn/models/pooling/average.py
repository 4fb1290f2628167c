"""Average pooling: the mean of the features, without pairs; the first-order baseline.

Source: Lin, Chen & Yan, "Network In Network", ICLR 2014, §3.2.
"""

from torch import Tensor

from bcnn.models.pooling.base import Pooling


class Average(Pooling):
    """The mean of the features over locations."""

    degree = 1.0

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.width = channels

    def pool(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        x = maps.flatten(2)
        mean = (x if mass is None else x * mass[:, None]).mean(dim=2)
        return mean * mean.any(dim=1, keepdim=True)  # zeros have no direction: a gradient of zero
