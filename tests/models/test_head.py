"""The head: centring changes no function, and removes what moves all images together."""

from pathlib import Path

import pytest
import torch
from conftest import configure, toy
from torch import nn
from torch.nn.functional import cross_entropy, linear

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.models.checkpoint import load_model
from bcnn.models.head import Head
from bcnn.training.module import BCNNModule
from bcnn.training.run import train


@pytest.fixture
def head() -> Head:
    """In float64, with weights and a mean drawn at random."""
    torch.manual_seed(0)
    head = Head(300, 3).double()
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    nn.init.normal_(head.mean)
    return head


def test_another_mean_keeps_every_logit(head: Head) -> None:
    descriptors = torch.rand(4, 300).double()
    before = head(descriptors)
    head.center_on(torch.rand(300).double())
    torch.testing.assert_close(head(descriptors), before)


@pytest.mark.parametrize("batch_mean", [True, False])
def test_logits_and_gradients_are_those_of_centred_descriptors(head: Head, batch_mean: bool) -> None:
    head.train().batch_mean = batch_mean
    x, labels = torch.randn(5, 300).double().requires_grad_(), torch.arange(5) % 3
    leaves = [x, *head.parameters()]
    logits = linear(x - (x.mean(dim=0) if batch_mean else head.mean), head.weight, head.bias)
    torch.testing.assert_close(head(x), logits)
    expected = torch.autograd.grad(cross_entropy(logits, labels), leaves)
    found = torch.autograd.grad(cross_entropy(head(x), labels), leaves)
    torch.testing.assert_close(found, expected)


def test_descriptors_in_half_precision_are_summed_in_that_of_the_weights(head: Head) -> None:
    half, labels = torch.rand(5, 300).half(), torch.arange(5) % 3
    results = []
    for x in (half, half.double()):
        logits = head(x)
        loss = cross_entropy(logits, labels)
        results.append((logits, *torch.autograd.grad(loss, [*head.parameters()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_in_training_a_shift_of_the_whole_batch_changes_nothing(head: Head) -> None:
    head.train().batch_mean = True
    x = torch.rand(8, 300, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(head(x + 100), head(x))
    head(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(0), torch.zeros(300, dtype=torch.float64))


def test_evaluation_subtracts_the_same_mean_from_every_descriptor(head: Head) -> None:
    head.eval().batch_mean = True
    x = torch.rand(2, 300).double()
    torch.testing.assert_close(head(x), (x - head.mean) @ head.weight.mT + head.bias)


@pytest.mark.usefixtures("tiny")
def test_the_mean_in_a_finetuned_checkpoint_is_that_of_its_own_weights(
    images: Path, tmp_path: Path
) -> None:
    epochs = ["model.backbone.name=tiny", "finetune.epochs=2", "finetune.batch_size=6"]
    train(configure(*toy(images, *epochs, f"output={tmp_path}")))
    network = load_model(tmp_path / "finetune" / "best.ckpt").eval()
    data = FineGrainedDataModule(images, size=32, num_workers=0, val_fraction=0.34)
    data.setup()
    with torch.no_grad():
        found = [network.descriptor(batch) for batch, _ in data.evaluation_dataloader(data.train)]
    torch.testing.assert_close(network.head.mean, torch.cat(found).mean(0), rtol=1e-3, atol=1e-6)


def test_stage_last_keeps_the_mean(tiny: nn.Module) -> None:
    module = BCNNModule(tiny, "last").train()
    module(torch.rand(4, tiny.pooling.width))
    assert not module.model.head.mean.any()
