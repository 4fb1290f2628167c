"""Stage `finetune`: a training step of the original's network, and of this project's."""

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.module import BCNNModule
from bcnn.utils.device import AUTOCAST, autocast, fastest_precision, training_layout
from benchmarks.harness import measure, now, seconds_an_image, title, torch_device
from benchmarks.options import Options
from benchmarks.original import original_loop


def checkpointed_step(options: Options) -> dict[str, float]:
    """`project_step` with `finetune.grad_checkpointing=true`."""
    return project_step(options, checkpointing=True)


def compiled_step(options: Options) -> dict[str, float]:
    """`project_step` with `finetune.compile=true`."""
    return project_step(options, compiling=True)


def pooled_step(options: Options) -> dict[str, float]:
    """`project_step` with the pooling and the projection that the options name."""
    return project_step(options, pooling=options.pooling, project=options.project)


def project_step(
    options: Options,
    checkpointing: bool = False,
    compiling: bool = False,
    pooling: str = "bilinear",
    project: int | None = None,
) -> dict[str, float]:
    """This project's finetune step, in the fastest precision of the device."""
    device = torch_device(options)
    classes = [str(k) for k in range(options.classes)]
    model = BCNN(classes, Preprocessing(options.size), None, {"name": pooling}, project).to(device)
    model.to(memory_format=training_layout(device, fastest_precision(device.type)))
    model.backbone.grad_checkpointing = checkpointing
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

    seconds = seconds_an_image(step, options)
    dtype = AUTOCAST.get(fastest_precision(device.type), torch.float32)
    return {"epoch": seconds, "rate": _matrix_rate(device, dtype)}


def table(options: Options) -> Table:
    """The two side by side, and how near ours comes to the device's limit."""
    contenders = {
        "original's": original_loop,
        "this project's": project_step,
        "with checkpointing": checkpointed_step,
    }
    if torch_device(options).type == "cuda":
        contenders["with torch.compile"] = compiled_step
    if (options.pooling, options.project) != (Options.pooling, Options.project):
        BCNN(["one"], pooling={"name": options.pooling}, project=options.project)  # there is such a one
        projected = f", project={options.project}" if options.project else ""
        contenders[f"with pooling={options.pooling}{projected}"] = pooled_step
    rows = {label: measure(contender, options) for label, contender in contenders.items()}
    original, ours = rows["original's"], rows["this project's"]
    table = Table("finetune step", "s an image", "images/s", "faster", "memory", title=title(options))
    for label, row in rows.items():
        table.add_row(
            label,
            f"{row['epoch']:.3g}",
            f"{1 / row['epoch']:.2f}",
            f"{original['epoch'] / row['epoch']:.2f} ×",
            f"{row['peak'] / 1e9:.2f} GB",
        )
    achieved = _flops(options) / ours["epoch"]
    table.caption = (
        f"this project's step runs at {achieved / 1e12:.2f} TFLOP/s, {achieved / ours['rate']:.0%} "
        f"of the {ours['rate'] / 1e12:.2f} TFLOP/s of a matrix product in the same precision"
    )
    return table


def _flops(options: Options) -> float:
    """Of a forward and backward pass, an image. Counted apart: it would add to the step's memory."""
    model = BCNN([str(k) for k in range(options.classes)])
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, options.size, options.size)).sum().backward()
    return float(counter.get_total_flops())


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 4096 if device.type == "cuda" else 2048  # enough to be busy, a second or two at the most
    a = torch.rand(side, side, device=device, dtype=dtype)
    a @ a
    start = now(device)
    for _ in range(5):
        a @ a
    return 5 * 2 * side**3 / (now(device) - start)
