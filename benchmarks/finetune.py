"""Stage finetune: a training step of the two-script original and of this project, on noise."""

from functools import partial

import torch
import torch.nn.functional as F
from harness import Contender, Options, compare, original_step, parser, seconds_per_image
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.module import BCNNModule
from bcnn.utils.console import console
from bcnn.utils.device import AUTOCAST, autocast, fastest_precision, training_layout


def project_step(
    options: Options,
    grad_checkpointing: bool = False,
    compiling: bool = False,
    pooling: str = "bilinear",
    project: int | None = None,
) -> dict[str, float]:
    """Time this project's step, in the fastest precision of the device."""
    device = options.device
    precision = fastest_precision(device.type)
    classes = list(map(str, range(options.classes)))
    model = BCNN(classes, Preprocessing(options.size), None, {"name": pooling}, project).to(device)
    model.to(memory_format=training_layout(device))
    model.backbone.grad_checkpointing = grad_checkpointing
    model.backbone.compiling = compiling
    module = BCNNModule(model, "finetune", centering=True).train()
    sgd = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        with autocast(device):
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        sgd.step()

    seconds = seconds_per_image(step, options)
    return {"seconds": seconds, "rate": _matrix_rate(device, AUTOCAST.get(precision, torch.float32))}


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product."""
    side = 4096 if device.type == "cuda" else 2048
    a = torch.rand(side, side, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.timeit(5).mean


def _flops(options: Options) -> float:
    """Return the FLOPs of a forward and backward pass of one image."""
    model = BCNN([str(k) for k in range(options.classes)])
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, options.size, options.size)).sum().backward()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    names = ("size", "batch", "images", "classes", "pooling", "project")
    asked = parser(__doc__, *names).parse_args()
    contenders: dict[str, Contender] = {
        "the original": original_step,
        "bcnn": project_step,
        "with grad_checkpointing": partial(project_step, grad_checkpointing=True),
    }
    if asked.device.type == "cuda":
        contenders["with compile"] = partial(project_step, compiling=True)
    if asked.pooling:
        name = f"with {asked.pooling}" + f", project={asked.project}" * (asked.project > 0)
        project = asked.project or None
        contenders[name] = partial(project_step, pooling=asked.pooling, project=project)
    title = f"a step of stage finetune: {asked.size} px, batch {asked.batch}, {asked.classes} classes"
    ours = compare(title, contenders, asked)["bcnn"]
    achieved = _flops(asked) / ours["seconds"]
    console.print(
        f"bcnn computes {achieved / 1e12:.2f} TFLOP/s, {achieved / ours['rate']:.0%} of the "
        f"{ours['rate'] / 1e12:.2f} TFLOP/s of a matrix product in the same precision"
    )
