"""The device of a run and its precision."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from time import thread_time

import psutil
import torch

# Lightning's precisions that need autocast, and the type that it computes convolutions in.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# NVIDIA's compute capabilities whose rate in float64 is half that in float32; of others it is a 32nd or
# a 64th ("CUDA C++ Programming Guide", throughput of native arithmetic instructions).
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

MEMORY = Path("/sys/fs/cgroup")  # of a container


def fastest_precision(accelerator: str) -> str:
    """Return bf16-mixed if the device is faster in it, 16-mixed on older GPUs, else 32-true."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    return "bf16-mixed" if on_cpu and _cpu_is_faster_in_bfloat16() else "32-true"


@cache
def _cpu_is_faster_in_bfloat16() -> bool:
    """Return whether the CPU has AMX units, or AVX-512's bfloat16 and convolves faster in it.

    Two CPUs without AMX and of equal speed in float32 differ: VGG-16's training step took half the time
    in bfloat16 on one (AMD Zen 4) and 1.4 times as long on the other. So this is measured, in 0.05 s.
    """
    units = torch.cpu.get_capabilities()
    if units.get("amx_tile"):
        return True
    if not units.get("avx512_bf16"):
        return False
    return 1.2 * _convolution_seconds(torch.bfloat16) < _convolution_seconds(torch.float32)


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Return the least processor time of a few convolutions as VGG-16 has them, of one thread.

    Unlike the time on a clock it is nearly the same beside other programs: all commands of a machine
    come to one precision.
    """
    maps, weight = torch.ones(1, 64, 56, 56, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(10):  # the first prepares
        start = thread_time()
        torch.conv2d(maps, weight, padding=1)
        seconds.append(thread_time() - start)
    torch.set_num_threads(threads)
    return min(seconds)


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def cuda_devices() -> list[str]:
    """Return the GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(numbers)).split(",")[: len(numbers)]


def double_device(device: torch.device) -> torch.device:
    """Return where to compute in float64: the device, or the CPU if that is faster."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_DOUBLE
    return torch.device("cpu") if slow or device.type == "mps" else device


def autocast(device: torch.device, precision: str | None = None) -> torch.autocast:
    """Return the context that computes in a precision, by default the fastest of the device."""
    dtype = AUTOCAST.get(precision or fastest_precision(device.type))
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device; of a GPU's, the driver's figure."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # a container's own limit
        limit, used = (int((MEMORY / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 matrices on a GPU in float32."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def training_layout(device: torch.device) -> torch.memory_format:
    """Return the fastest memory format to train in: channels last, but on a CPU without AVX-512.

    There a step of VGG-16 at 448 px would take 1.3 to 1.4 times as long (two AVX2 cores, float32); with
    AVX-512 it takes 0.8 times as long.
    """
    slow = device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_f")
    return torch.contiguous_format if slow else torch.channels_last


def about_device(device: torch.device, precision: str, ranks: int) -> str:
    """Return device, precision and number of processes in words, for the log and the report."""
    threads = torch.get_num_threads()
    name = "Apple GPU" if device.type == "mps" else f"CPU with {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    processes = f", {ranks} processes" if ranks > 1 else ""
    return f"{name}, {precision}, torch {torch.__version__}{processes}"
