"""Centred descriptors: the same function, and no answer to what moves all images together."""

from pathlib import Path

import pytest
import torch
from conftest import configure, toy
from torch.nn.functional import cross_entropy, linear

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.head import Head
from bcnn.models.third_party import to_original
from bcnn.training.module import BCNNModule
from bcnn.training.run import run


def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(["a", "b", "c"])
    torch.nn.init.normal_(model.head.weight)
    return model


def test_another_centre_leaves_every_logit() -> None:
    network, rows = model(), torch.rand(4, 131_328)
    before = network.head(rows)
    network.head.center_on(torch.rand(131_328))
    torch.testing.assert_close(network.head(rows), before, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("batch_mean", [True, False])
def test_logits_and_gradients_are_those_of_the_centred_rows(batch_mean: bool) -> None:
    network = model().double().train()
    network.head.mean.normal_()
    network.head.batch_mean = batch_mean
    rows, labels = torch.randn(5, 131_328, dtype=torch.float64, requires_grad=True), torch.arange(5) % 3
    leaves = [rows, *network.head.parameters()]
    centred = rows - (rows.mean(dim=0) if batch_mean else network.head.mean)
    logits = linear(centred, *network.head.parameters())
    torch.testing.assert_close(network.head(rows), logits)
    want = torch.autograd.grad(cross_entropy(logits, labels), leaves)
    torch.testing.assert_close(
        torch.autograd.grad(cross_entropy(network.head(rows), labels), leaves), want
    )


def test_rows_in_half_precision_are_multiplied_and_summed_in_that_of_the_weights() -> None:
    network = model().double()
    rows, labels = torch.rand(5, 131_328).half(), torch.arange(5) % 3
    results = []
    for inputs in (rows, rows.double()):
        logits = network.head(inputs)
        loss = cross_entropy(logits, labels)
        results.append((logits, *torch.autograd.grad(loss, [*network.head.parameters()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_in_training_a_shift_of_the_whole_batch_changes_nothing() -> None:
    head = Head(6, 2).double().train()
    torch.nn.init.normal_(head.weight)
    head.batch_mean = True
    rows = torch.rand(8, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(head(rows + 100), head(rows))
    head(rows).square().sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.sum(0), torch.zeros(6, dtype=torch.float64))


def test_evaluation_takes_the_same_mean_off_every_row() -> None:
    head = Head(3, 2).eval()
    torch.nn.init.normal_(head.weight)
    head.batch_mean = True
    head.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    rows = torch.rand(2, 3)
    torch.testing.assert_close(head(rows), (rows - head.mean) @ head.weight.mT)


@pytest.mark.parametrize("width", [1, 3455, 3456, 3457, 5 * 3456, 5 * 3456 + 100])
def test_rows_of_any_width(width: int) -> None:
    head = Head(width, 3).double()
    torch.nn.init.normal_(head.weight)
    rows = torch.rand(4, width, dtype=torch.float64, requires_grad=True)
    plain, logits = rows @ head.weight.mT, head(rows)
    torch.testing.assert_close(logits, plain)
    expected = torch.autograd.grad(plain.square().sum(), [rows, head.weight])
    found = torch.autograd.grad(logits.square().sum(), [rows, head.weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("tiny")
def test_the_centre_of_a_finetuned_checkpoint_is_that_of_its_own_weights(
    images: Path, tmp_path: Path
) -> None:
    epochs = ["model.backbone.name=tiny", "finetune.epochs=2", "finetune.batch_size=6"]
    run(configure(*toy(images, *epochs, f"output={tmp_path}")))
    network = load_model(tmp_path / "finetune" / "best.ckpt").eval()
    data = FineGrainedDataModule(images, size=32, num_workers=0, val_fraction=0.34)
    data.setup()
    with torch.no_grad():
        rows = [network.descriptor(batch) for batch, _ in data.evaluation_dataloader(data.train)]
    torch.testing.assert_close(network.head.mean, torch.cat(rows).mean(0), rtol=1e-3, atol=1e-6)


def test_stage_last_leaves_the_centre() -> None:
    module = BCNNModule(model(), "last").train()
    module(torch.rand(4, 131_328))
    assert not module.model.head.mean.any()


def test_files_keep_the_centre_and_the_original_layout_has_it_in_the_bias(tmp_path: object) -> None:
    network = model()
    network.backbone.set_normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    network.head.center_on(torch.rand(131_328) / 300)
    images = torch.rand(2, 3, 32, 32)
    for name, state in (("own.pth", network.state_dict()), ("source.pth", to_original(network))):
        torch.save(state, f"{tmp_path}/{name}")
        torch.testing.assert_close(
            load_model(f"{tmp_path}/{name}")(images), network(images), rtol=1e-4, atol=1e-4
        )
