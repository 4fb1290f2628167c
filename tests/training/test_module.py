"""What the module trains in a stage, how long its steps are, and that Lightning alone runs it."""

import copy
from pathlib import Path
from typing import Literal

import lightning as L
import pytest
import torch
from conftest import batches, folder_data, network, quiet_trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.module import BCNNModule


def with_head(model: BCNN) -> BCNN:
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def sgd(lr: float) -> object:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-5)


@pytest.mark.parametrize(("stage", "cached"), [("last", False), ("last", True), ("finetune", False)])
def test_a_plain_trainer_trains_saves_and_opens_a_stage(
    images: Path, tmp_path: Path, calibrated: BCNN, stage: str, cached: bool
) -> None:
    """The calibration of the start, which is of other weights, goes."""
    data: L.LightningDataModule = folder_data(images, batch_size=4)
    if cached:
        data = CachedFeatureDataModule(data, calibrated, "32-true")
    tuning = {"centering": True, "polyak": 2.0} if stage == "finetune" else {}
    before = calibrated.head.weight.clone()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(BCNNModule(calibrated, stage, **tuning), datamodule=data)  # type: ignore[arg-type]
    assert not torch.equal(calibrated.head.weight, before)
    found = trainer.test(datamodule=data, ckpt_path="best")[0]
    assert 0 <= found["test_top1"] <= 1
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    again = BCNNModule.load_from_checkpoint(path)
    assert again.model.calibration is None
    assert again.stage == stage and again.model.head.training and not again.model.backbone.training
    state = calibrated.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.model.state_dict().items())
    assert all(p.requires_grad == (stage == "finetune") for p in again.model.backbone.parameters())
    assert BCNNModule.load_from_checkpoint(path, stage="last").stage == "last"


@pytest.mark.parametrize(
    ("stage", "first", "layers"),
    [("last", None, 0), ("finetune", "conv5_2", 2), ("finetune", None, 13)],
)
def test_a_stage_trains_its_layers_and_the_others_get_no_gradients(
    stage: Literal["last", "finetune"], first: str | None, layers: int
) -> None:
    model = with_head(network())
    before = copy.deepcopy(model.state_dict())
    module = BCNNModule(model, stage, sgd(1e-4), unfreeze_from=first)
    quiet_trainer(max_epochs=1).fit(module, batches())
    moved = [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]
    weights = [name for name, _ in model.named_parameters()]  # two of each layer, the head the last
    assert moved == weights[-2 * (layers + 1) :]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == moved
    assert all(p.requires_grad == (name in moved) for name, p in model.named_parameters())


def test_training_accuracy_is_that_of_all_images_of_each_epoch() -> None:
    model = with_head(network())
    images, labels = batches().dataset.tensors
    right = (model(images).argmax(dim=1) == labels).float().mean()
    assert 0 < right < 1
    module = BCNNModule(model, "last", sgd(0.0))
    for epochs in (1, 2):
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(module, DataLoader(batches().dataset, batch_size=5))  # 5 and 3
        assert trainer.callback_metrics["train_top1"] == right
        assert trainer.callback_metrics["train_top5"] == 1


def test_a_step_of_polyak_is_no_longer_than_loss_over_squared_gradient() -> None:
    def moved(polyak: float | None, lr: float) -> float:
        model = with_head(network())
        before = [p.detach().clone() for p in model.parameters()]
        module = BCNNModule(model, "finetune", lambda p: torch.optim.SGD(p, lr=lr), polyak=polyak)
        quiet_trainer(max_steps=1).fit(module, batches())
        steps = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        return float(torch.nn.utils.get_total_norm(steps))

    model = with_head(network())
    images, labels = next(iter(batches()))
    loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
    loss.backward()
    gradient = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    longest = float(loss / (5 * gradient))
    for lr in (1.0, 1e-2):
        assert moved(5.0, lr) == pytest.approx(longest, rel=0.02)
    small = 1e-3 * longest / float(gradient)
    assert moved(5.0, small) == pytest.approx(moved(None, small), rel=1e-3)  # no limit below


def test_a_loss_of_zero_is_no_step_and_no_ruin() -> None:
    model = network()
    model.head.bias.data[:] = torch.tensor([0.0, 0.0, 1000.0])
    before = [p.detach().clone() for p in model.parameters()]
    module = BCNNModule(model, "finetune", lambda p: torch.optim.SGD(p, lr=1.0), polyak=2.0)
    images, labels = batches().dataset.tensors
    third = DataLoader(TensorDataset(images, torch.full_like(labels, 2)), batch_size=4)
    quiet_trainer(max_steps=1).fit(module, third)
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_a_forward_pass_is_on_another_device(training: bool) -> None:
    module = BCNNModule(network(), "finetune", centering=True).train(training)
    with FakeTensorMode():  # which refuses two devices in one operation, without any of them
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        with torch.no_grad():
            assert functional_call(module, state, images).device.type == "cuda"
