"""What the module trains in a stage, how long its steps are, and that Lightning alone runs it."""

import copy
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import folder_data, network, quiet_trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.module import BCNNModule


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=4)


def sgd(lr: float) -> object:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-5)


@pytest.mark.parametrize(("stage", "cached"), [("last", False), ("last", True), ("finetune", False)])
def test_a_plain_trainer_trains_saves_and_opens_a_stage(
    images: Path, tmp_path: Path, tiny: BCNN, stage: str, cached: bool
) -> None:
    data: L.LightningDataModule = folder_data(images, batch_size=4)
    if cached:
        data = CachedFeatureDataModule(data, tiny, "32-true")
    tuning = {"centering": True, "polyak": 2.0} if stage == "finetune" else {}
    before = tiny.head.weight.clone()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(BCNNModule(tiny, stage, **tuning), datamodule=data)  # type: ignore[arg-type]
    assert not torch.equal(tiny.head.weight, before)
    found = trainer.test(datamodule=data, ckpt_path="best")[0]
    assert 0 <= found["test_top1"] <= 1
    again = BCNNModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert again.stage == stage and again.model.classes == tiny.classes
    state = tiny.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.model.state_dict().items())
    assert all(p.requires_grad == (stage == "finetune") for p in again.model.backbone.parameters())
    other = {"last": "finetune", "finetune": "last"}[stage]
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert BCNNModule.load_from_checkpoint(path, stage=other).stage == other


def test_a_model_that_was_loaded_is_trained_in_training_mode(tiny: BCNN) -> None:
    module = BCNNModule(tiny.eval(), "finetune")
    assert module.model.head.training and not module.model.backbone.training


def test_last_leaves_the_features_bit_for_bit_and_without_gradients() -> None:
    model = network()
    before = copy.deepcopy(model.backbone.features.state_dict())
    head = model.head.weight.clone()
    quiet_trainer(max_epochs=2).fit(BCNNModule(model, "last", sgd(1.0)), batches())
    assert all(torch.equal(before[k], v) for k, v in model.backbone.features.state_dict().items())
    assert all(p.grad is None for p in model.backbone.features.parameters())
    assert not torch.equal(model.head.weight, head)


def test_last_keeps_no_graph_through_the_features() -> None:
    module = BCNNModule(network(), "last", sgd(1.0))
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    images, labels = next(iter(batches()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(module(images), labels)
    assert loss.requires_grad
    assert all(len(shape) <= 2 for shape in saved)  # no feature map among them
    assert all(p.requires_grad is False for p in module.model.backbone.features.parameters())


def test_finetune_trains_every_layer() -> None:
    model = network()
    torch.nn.init.normal_(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    quiet_trainer(max_epochs=1).fit(BCNNModule(model, "finetune", sgd(1e-4)), batches())
    frozen = [k for k, v in model.state_dict().items() if torch.equal(before[k], v)]
    assert frozen == ["backbone.mean", "backbone.std", "head.mean"]


def test_layers_under_the_first_opened_are_left_and_get_no_gradients() -> None:
    model = network()
    torch.nn.init.normal_(model.head.weight)
    before = copy.deepcopy(model.backbone.features.state_dict())
    module = BCNNModule(model, "finetune", sgd(1e-4), unfreeze_from="conv5_2")
    quiet_trainer(max_epochs=1).fit(module, batches())
    moved = [
        key
        for key, v in model.backbone.features.state_dict().items()
        if not torch.equal(before[key], v)
    ]
    assert moved == ["26.weight", "26.bias", "28.weight", "28.bias"]
    assert model.backbone.features[24].weight.grad is None


def test_training_accuracy_is_that_of_all_images_of_each_epoch() -> None:
    model = network()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
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
        model = network()
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        before = [p.detach().clone() for p in model.parameters()]
        module = BCNNModule(model, "finetune", lambda p: torch.optim.SGD(p, lr=lr), polyak=polyak)
        quiet_trainer(max_steps=1).fit(module, batches())
        steps = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        return float(torch.nn.utils.get_total_norm(steps))

    model = network()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
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
    images, labels = next(iter(batches()))
    third = DataLoader(TensorDataset(images, torch.full_like(labels, 2)), batch_size=len(labels))
    quiet_trainer(max_steps=1).fit(module, third)
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_grad_checkpointing_keeps_less_in_memory() -> None:
    images, _ = next(iter(batches()))

    def kept(maps: Callable[[BCNN], torch.Tensor]) -> int:
        model, found = network(), {}
        weights = {p.data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 4 and tensor.data_ptr() not in weights:
                found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps(model)
        return sum(found.values())

    def checkpointed(model: BCNN) -> torch.Tensor:
        model.backbone.grad_checkpointing = True
        return model.backbone(images)

    plain = kept(lambda model: model.backbone.features(images.float()))
    assert kept(lambda model: model.backbone(images)) < 0.75 * plain
    assert kept(checkpointed) < 0.3 * plain


def test_checkpoints_describe_themselves() -> None:
    module = BCNNModule(network(), "last")
    assert dict(module.hparams) == {
        "backbone": {"name": "vgg16"},
        "pooling": {"name": "bilinear"},
        "preprocessing": {"size": 32, "resize": "keep", "crop_pct": 1.0, "interpolation": "bilinear"},
        "classes": ["blue", "green", "red"],
        "split": None,
        "stage": "last",
    }


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
