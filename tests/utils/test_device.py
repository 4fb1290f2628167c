"""Devices and precisions, with `torch.cuda` replaced where no GPU is needed."""

import pytest
import torch

from bcnn.utils import device
from bcnn.utils.device import about_device, double_device, fastest_precision


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of NVIDIA's of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))


@pytest.mark.parametrize(
    ("unit", "seconds", "precision"),
    [
        ("amx_tile", {}, "bf16-mixed"),
        ("avx512_bf16", {torch.float32: 2.0, torch.bfloat16: 1.0}, "bf16-mixed"),
        ("avx512_bf16", {torch.float32: 1.0, torch.bfloat16: 1.0}, "32-true"),
        ("avx2", {}, "32-true"),
    ],
)
def test_bfloat16_is_used_on_a_cpu_that_is_faster_in_it(
    monkeypatch: pytest.MonkeyPatch, unit: str, seconds: dict[torch.dtype, float], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    monkeypatch.setattr(device, "_convolution_seconds", seconds.get)
    device._cpu_is_faster_in_bfloat16.cache_clear()
    assert fastest_precision("cpu") == precision
    device._cpu_is_faster_in_bfloat16.cache_clear()


def test_an_older_gpu_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    assert fastest_precision("gpu") == "bf16-mixed"
    pretend_gpu(monkeypatch, (7, 5))
    assert fastest_precision("gpu") == "16-mixed"


def test_device_and_precision_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    line = about_device(torch.device("cuda", 0), "bf16-mixed", 8)
    assert line == f"Some GPU, bf16-mixed, torch {torch.__version__}, 8 processes"
    threads = f"{torch.get_num_threads()} thread"
    assert about_device(torch.device("cpu"), "32-true", 1).startswith(f"CPU with {threads}")


def test_float64_is_computed_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert double_device(torch.device("mps")).type == "cpu"  # has no float64
    for capability in ((8, 0), (9, 0)):
        pretend_gpu(monkeypatch, capability)
        assert double_device(cuda) == cuda
    for capability in ((8, 9), (12, 0)):  # a 64th of the rate in float32
        pretend_gpu(monkeypatch, capability)
        assert double_device(cuda).type == "cpu"


def test_measuring_the_cpu_leaves_the_number_of_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert device._convolution_seconds(torch.float32) > 0
    assert torch.get_num_threads() == threads
