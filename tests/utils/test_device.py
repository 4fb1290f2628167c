"""Devices and precisions, with `torch.cuda` replaced where no GPU is needed."""

import pytest
import torch

from bcnn.utils.device import about_device, double_device, fastest_precision, validate_accelerator
from bcnn.utils.errors import UserError


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of NVIDIA's of this compute capability."""
    answers = {
        "is_available": True,
        "get_device_capability": capability,
        "get_device_name": "Some GPU",
        "is_bf16_supported": capability >= (8, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"amx_tile": True}, "bf16-mixed"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"avx2": True, "avx512_bf16": False}, "32-true"),
        ({"neon": True}, "32-true"),
    ],
)
def test_bfloat16_is_used_on_a_cpu_that_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert fastest_precision("cpu") == expected


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_is_not_replaced_by_the_cpu() -> None:
    validate_accelerator("auto")
    with pytest.raises(UserError, match=r"accelerator=cuda: .* finds no GPU"):
        validate_accelerator("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", (0, 0), "cpu"),
        ("mps", (0, 0), "cpu"),  # has no float64
        ("cuda", (8, 0), "cuda"),
        ("cuda", (9, 0), "cuda"),
        ("cuda", (8, 9), "cpu"),  # a 64th of the rate in float32
        ("cuda", (12, 0), "cpu"),
    ],
)
def test_float64_is_computed_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], expected: str
) -> None:
    pretend_gpu(monkeypatch, capability)
    assert double_device(torch.device(device)).type == expected
