"""Both stages on a GPU: `make test-gpu`."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import configure, toy

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.head import Head
from bcnn.training.logistic_regression import ConvexProblem, cholesky, gram_matrix
from bcnn.training.run import train
from bcnn.utils.device import double_device

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("solver", ["convex", "sgd"])
def test_both_stages_train_and_agree_with_float32(
    images: Path, tmp_path: Path, precision: str, solver: str
) -> None:
    short = [
        f"last={solver}",
        *(["last.epochs=5"] if solver == "sgd" else []),
        "finetune.epochs=10",  # the first steps in float16 may be left out
        "finetune.batch_size=6",
        "trainer=gpu",
    ]
    folders = [tmp_path / name for name in ("32-true", precision)]
    for folder in folders:
        overrides = [*short, f"trainer.precision={folder.name}", f"output={folder}"]
        assert train(configure(*toy(images, *overrides))) >= 0.8
    exact, mixed = (load_model(folder / "last" / "best.ckpt") for folder in folders)
    start, frozen = (model.backbone.features.state_dict() for model in (exact, mixed))
    assert all(torch.equal(start[key], frozen[key]) for key in start)
    for folder in folders:
        tuned = load_model(folder / "finetune" / "best.ckpt").backbone.features.state_dict()
        assert not any(torch.equal(start[key], tuned[key]) for key in start if key.endswith("weight"))
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected, close = (model(batch).softmax(1) for model in (exact, mixed))
    torch.testing.assert_close(close, expected, rtol=0, atol=0.1)


def test_autocast_on_the_gpu_keeps_the_head_in_float32() -> None:
    model = BCNN(["a", "b"]).cuda()
    images = torch.rand(2, 3, 64, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16), torch.no_grad():
        descriptor = model.descriptor(images)
        assert descriptor.dtype == model.head(descriptor).dtype == torch.float32
    torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(2, device=DEVICE))


def test_logits_are_those_of_the_cpu() -> None:
    head = Head(8256, 5).train()
    head.batch_mean = True
    torch.nn.init.normal_(head.weight)
    descriptors = F.normalize(torch.rand(6, 8256))
    there = copy.deepcopy(head).to(DEVICE)(descriptors.to(DEVICE))
    torch.testing.assert_close(there.cpu(), head(descriptors), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [90, 20])  # fewer descriptors than columns, and more
def test_the_convex_solution_is_that_of_the_cpu(width: int) -> None:
    descriptors, labels = F.normalize(torch.rand(40, width)), torch.arange(40) % 3
    here, there = (
        ConvexProblem(descriptors, labels, 3, device=device).solve(1e-3) for device in ("cpu", DEVICE)
    )
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(there.logits.cpu(), here.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_the_gram_matrix_of_wide_descriptors_can_be_factored(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)  # "high" is TF32
    descriptors = F.normalize(torch.randn(2640, 131_328, device=DEVICE)).half()
    try:
        gram = gram_matrix(descriptors, descriptors.float().mean(dim=0))
        gram = gram.to(double_device(gram.device))
        least = torch.linalg.eigvalsh(gram.double())[0]  # 0, along the mean
        assert abs(least) < 1e-4
        cholesky(gram)
    finally:
        torch.set_float32_matmul_precision(before)
