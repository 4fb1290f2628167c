"""What is said of the device, and which are refused: as torch tells of GPUs that are not here."""

import re
from pathlib import Path

import pytest
import torch
from conftest import configure, toy

from bcnn.training.config import refuse_mistakes
from bcnn.training.run import run
from bcnn.utils.device import about_device, best_device, double_device, fastest_precision
from bcnn.utils.errors import UserError


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *built: str) -> None:
    """One GPU of NVIDIA's, as `torch.cuda` would tell of it."""
    answers = {
        "is_available": True,
        "get_device_capability": capability,
        "get_arch_list": list(built),
        "get_device_name": "Some GPU",
        "is_bf16_supported": capability >= (8, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def test_a_run_on_the_cpu_says_so_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(configure(*toy(tmp_path / "nowhere", f"output={tmp_path / 'out'}")))
    reason = "the fastest here" if fastest_precision("cpu") == "32-true" else "as asked for"
    seen = "as asked for" if best_device().type != "cpu" else ".*sees no GPU"
    expected = rf"CPU \(torch .*{seen}\), 32-true \({reason}\), {torch.get_num_threads()} threads?"
    assert re.fullmatch(expected, capsys.readouterr().out.splitlines()[0])


def test_a_run_on_gpus_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), "sm_90")
    line = about_device(torch.device("cuda", 0), "bf16-mixed", 8)
    assert line == (
        f"Some GPU (torch {torch.__version__}), bf16-mixed (the fastest here), 8 processes that share "
        "every batch"
    )
    assert "16-mixed (as asked for)" in about_device(torch.device("cuda", 0), "16-mixed", 1)
    single = about_device(torch.device("cuda", 0), "32-true", 1)
    assert "32-true (as asked for, convolutions in TF32" in single
    assert "as asked for), 32-true" in about_device(torch.device("cpu"), "32-true", 1)


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((9, 0), ["sm_80", "sm_90"]),
        ((8, 9), ["sm_80"]),  # of the same generation
        ((12, 0), ["sm_90a", "sm_100f", "compute_90"]),  # compiled when the program starts
        ((12, 1), ["sm_120"]),
    ],
)
def test_a_gpu_that_torch_was_built_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    pretend(monkeypatch, capability, *built)
    assert best_device().type == "cuda"


@pytest.mark.parametrize(
    ("capability", "built"),
    [((6, 1), ["sm_75", "compute_120"]), ((12, 0), ["sm_90"]), ((8, 0), ["sm_86"])],
)
def test_a_gpu_that_torch_was_not_built_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    pretend(monkeypatch, capability, *built)
    number = ".".join(map(str, capability))
    expected = rf"Some GPU has compute capability {number}, .* built for {built[0]}.*: install"
    with pytest.raises(UserError, match=expected):
        best_device()
    with pytest.raises(UserError, match=expected):
        refuse_mistakes(configure("model.weights=random"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        UserError,
        match=r"trainer\.accelerator=gpu: torch .*, built for CUDA 13\.0, sees no GPU; .* nvidia-smi",
    ):
        refuse_mistakes(configure("trainer=gpu"))


@pytest.mark.parametrize(
    ("device", "capability", "there"),
    [
        ("cpu", (0, 0), True),
        ("mps", (0, 0), False),  # which has no float64
        ("cuda", (8, 0), True),
        ("cuda", (9, 0), True),
        ("cuda", (8, 9), False),  # a 64th of float32's rate
        ("cuda", (12, 0), False),
    ],
)
def test_float64_is_computed_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], there: bool
) -> None:
    pretend(monkeypatch, capability)
    assert double_device(torch.device(device)).type == (device if there else "cpu")
