"""Learning-rate schedules: functions of (optimizer, total_steps) that a configuration names."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, ReduceLROnPlateau


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Return a linear warm-up over a share `warmup` of the steps, then half a cosine down to zero.

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts; Goyal et al. 2017 for the warm-up.
    """
    ramp = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < ramp:
            return (step + 1) / (ramp + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total_steps - ramp)))

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer, total_steps: int, milestones: Sequence[float] = (0.5,), factor: float = 0.1
) -> MultiStepLR:
    """Return torch's `MultiStepLR`; `milestones` are shares of the steps."""
    steps = [round(share * total_steps) for share in milestones]
    return MultiStepLR(optimizer, steps, factor)


def reduce_on_plateau(
    optimizer: Optimizer, total_steps: int, factor: float = 0.1, patience: int = 1
) -> ReduceLROnPlateau:
    """Return torch's `ReduceLROnPlateau`, to which the number of steps does not matter."""
    return ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
