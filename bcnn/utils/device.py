"""What a run computes on, and in which of Lightning's precisions; what a device is built for."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from omegaconf import DictConfig

from bcnn.utils.errors import UserError

# what autocast computes convolutions in; other precisions need no autocast
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# NVIDIA's compute capabilities with half of float32's rate in float64; others have a 32nd or a 64th
# ("CUDA C++ Programming Guide", throughput of native arithmetic instructions).
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


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
    """A GPU where there is one, be it NVIDIA's or Apple's, and the CPU otherwise.

    Raises:
        UserError: this torch was not built for the GPU.
    """
    if torch.cuda.is_available():
        _refuse_unbuilt()
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def double_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on a device: there, or on the CPU where that is faster."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_DOUBLE
    return torch.device("cpu") if slow or device.type == "mps" else device


def autocast(device: torch.device, precision: str | None = None) -> AbstractContextManager[object]:
    """What computes in a precision on a device.

    Args:
        device: of the tensors.
        precision: Lightning's name; None: the fastest of the device.
    """
    dtype = AUTOCAST.get(precision or fastest_precision(device.type))
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 matrices on a GPU in float32, whatever the machine allows."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


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


def about_device(device: torch.device, precision: str, ranks: int) -> str:
    """What a run computes on and why, in which of Lightning's precisions, in how many processes."""
    why = "the fastest here" if precision == fastest_precision(device.type) else "as asked for"
    if device.type == "cuda" and precision not in AUTOCAST and torch.backends.cudnn.allow_tf32:
        why += ", convolutions in TF32 where it has that"
    parts = [_name(device), f"{precision} ({why})"]
    if device.type == "cpu":
        threads = torch.get_num_threads()
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
    if ranks > 1:
        parts.append(f"{ranks} processes that share every batch")
    return ", ".join(parts)


def refuse_gpu(accelerator: str) -> None:
    """Say that a GPU cannot be used before work is done without it, or for nothing.

    Args:
        accelerator: Lightning's name.

    Raises:
        UserError: a GPU is asked for and there is none, or this torch was not built for it.
    """
    if accelerator not in ("auto", "gpu", "cuda"):
        return
    if torch.cuda.is_available():
        _refuse_unbuilt()
    elif accelerator == "cuda" or (accelerator == "gpu" and not torch.backends.mps.is_available()):
        raise UserError(
            f"trainer.accelerator={accelerator}: {_blind()}; see whether nvidia-smi finds it, and "
            "whether this torch is a build for CUDA, or choose trainer=auto"
        )


def no_memory(stage: str) -> str:
    """What to do where a device has too little memory for a stage."""
    advice = f"a smaller {stage}.batch_size, with {stage}.accumulate for steps as large as before"
    if stage == "finetune":
        advice += ", or finetune.grad_checkpointing=true"
    return f"the device has too little memory for stage {stage}: try {advice}"


def _name(device: torch.device) -> str:
    torch_ = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({torch_})"
    if device.type == "mps":
        return f"Apple GPU ({torch_})"
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return f"CPU ({f'{torch_}, as asked for' if gpu else _blind()})"


def _blind() -> str:
    built = f", built for CUDA {torch.version.cuda}," if torch.version.cuda else ""
    return f"torch {torch.__version__}{built} sees no GPU"


def _refuse_unbuilt() -> None:
    """Raises UserError where this torch was built for other GPUs of NVIDIA's than the one at hand."""
    built = torch.cuda.get_arch_list()
    found = (re.match("(sm|compute)_([0-9]+)([0-9])", name) for name in built)
    kernels = [(each[1], (int(each[2]), int(each[3]))) for each in found if each]
    mine = torch.cuda.get_device_capability()
    # Kernels run on what is of their generation and no older, intermediate code on all that is newer.
    runs = (made <= mine and (kind == "compute" or made[0] == mine[0]) for kind, made in kernels)
    if kernels and not any(runs):
        raise UserError(
            f"{torch.cuda.get_device_name()} has compute capability {mine[0]}.{mine[1]}, and torch "
            f"{torch.__version__} was built for {', '.join(built)}: install one that was built for it, "
            "or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
