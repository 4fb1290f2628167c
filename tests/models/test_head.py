"""The head: centring changes no function, and removes what moves all images together."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, configure, folder_data, toy
from torch import nn
from torch.nn.functional import cross_entropy, linear

from bcnn.models.checkpoint import load_model
from bcnn.models.head import Head
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


@pytest.mark.parametrize(("training", "batch_mean"), [(True, True), (True, False), (False, True)])
def test_logits_and_gradients_are_those_of_centred_descriptors(
    head: Head, training: bool, batch_mean: bool
) -> None:
    head.train(training).batch_mean = batch_mean
    x, labels = torch.randn(5, 300).double().requires_grad_(), torch.arange(5) % 3
    leaves = [x, *head.parameters()]
    mean = x.mean(dim=0) if training and batch_mean else head.mean
    logits = linear(x - mean, head.weight, head.bias)
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


@pytest.mark.usefixtures("tiny")
def test_the_mean_in_a_finetuned_checkpoint_is_that_of_its_own_weights(
    images: Path, tmp_path: Path
) -> None:
    epochs = [SMALL, "finetune.epochs=2", "finetune.batch_size=6"]
    train(configure(*toy(images, *epochs, f"output={tmp_path}")))
    network = load_model(tmp_path / "finetune" / "best.ckpt").eval()
    data = folder_data(images)
    with torch.no_grad():
        found = [network.descriptor(batch) for batch, _ in data.evaluation_dataloader(data.train)]
    torch.testing.assert_close(network.head.mean, torch.cat(found).mean(0), rtol=1e-3, atol=1e-6)
