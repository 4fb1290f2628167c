"""Lightning's names for mixed precision, and which of them a device is built for."""

from contextlib import AbstractContextManager

import torch
from omegaconf import DictConfig

# what autocast computes convolutions in; other precisions need no autocast
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def fastest_precision(accelerator: str = "auto") -> str:
    """bf16-mixed where the device computes in bfloat16, 16-mixed on older GPUs, else 32-true.

    Args:
        accelerator: Lightning's name: "auto", "gpu", "cuda", "cpu", …
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if on_cpu and native else "32-true"


def best_device() -> torch.device:
    """A GPU where there is one, be it NVIDIA's or Apple's, and the CPU otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str | None = None) -> AbstractContextManager[object]:
    """What computes in a precision on a device.

    Args:
        device: of the tensors.
        precision: Lightning's name; None: the fastest of the device.
    """
    dtype = AUTOCAST.get(precision or fastest_precision(device.type))
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def training_layout(device: torch.device, precision: str) -> torch.memory_format:
    """How weights and maps lie in memory for the fastest training step.

    Channels last, but for float32 on a CPU, whose backward pass that makes slower: a step of VGG-16 at
    448 px takes 1.3 to 1.4 times as long (two AVX2 cores).
    """
    on_cpu = device.type == "cpu" and precision not in AUTOCAST
    return torch.contiguous_format if on_cpu else torch.channels_last


def chosen_precision(trainer: DictConfig) -> str:
    """What `trainer.precision` asks for, "auto" being the fastest of the device."""
    precision = str(trainer.precision)
    return fastest_precision(trainer.accelerator) if precision == "auto" else precision
