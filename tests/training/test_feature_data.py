"""Stage `last` from the store is stage `last` through the frozen network."""

import inspect
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build, folder_data, network, write_images
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.pooling import POOLINGS
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.feature_store import SHARD, VIEWS
from bcnn.utils.errors import UserError


def store_of(images: Path, model: BCNN, **options: object) -> CachedFeatureDataModule:
    return build(CachedFeatureDataModule(folder_data(images, **options), model, "32-true"))


def test_descriptors_are_those_of_the_crop_and_its_mirror_image(images: Path, tiny: BCNN) -> None:
    data, bound = store_of(images, tiny), 2**-10
    for split in (data.data.train, data.data.val, data.data.test):
        batch, labels = next(iter(data.data.evaluation_dataloader(split)))
        with torch.no_grad():
            views = tiny.descriptor(batch), tiny.descriptor(batch.flip(-1))
        for view, expected in enumerate(views):
            found = data.store.read([number + view for number in data.numbers(split)])
            torch.testing.assert_close(torch.tensor(found).float(), expected, rtol=bound, atol=3e-8)
        means, found_labels = data.descriptors(split, views=2)
        torch.testing.assert_close(means[1:], sum(views)[1:] / 2, rtol=bound, atol=3e-8)
        assert torch.equal(found_labels, labels)


def test_images_pass_the_backbone_once(images: Path, tiny: BCNN, passes: list[int]) -> None:
    write_images(images / "test", 6, seed=9)  # 18 images to test on, the first in the order of paths
    store_of(images, tiny)
    assert sum(passes) == SHARD + VIEWS * (36 - SHARD)
    nn.init.normal_(tiny.head.weight)
    again = store_of(images, tiny, val_fraction=0.1, batch_size=3)
    for loader in (again.train_dataloader(), again.val_dataloader(), again.test_dataloader()):
        assert all(descriptors.any() for descriptors, _ in loader)
    assert sum(passes) == SHARD + VIEWS * (36 - SHARD)


def test_a_frozen_backbone_is_in_evaluation_mode(images: Path, tiny: BCNN) -> None:
    tiny.backbone.features = nn.Sequential(tiny.backbone.features, nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in tiny.backbone.named_buffers()}
    nn.Module.train(tiny.backbone, True)
    data = store_of(images, tiny)
    batch, _ = next(iter(data.data.evaluation_dataloader(data.data.train)))
    found, _ = data.descriptors(data.data.train)
    with torch.no_grad():
        expected = tiny.eval().descriptor(batch)
    torch.testing.assert_close(found[:].float(), expected, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.backbone.named_buffers())


CHANGES = "backbone project size resize interpolation precision mean decoding pooling class code"


@pytest.mark.parametrize("change", CHANGES.split())
def test_whatever_determines_descriptors_makes_another_store(
    images: Path, change: str, monkeypatch: pytest.MonkeyPatch, tiny: BCNN
) -> None:
    before = CachedFeatureDataModule(folder_data(images), tiny, "32-true").store.key
    model, options, precision = tiny, {}, "32-true"
    if change == "backbone":
        model.backbone.features.weight.data[0] = 0
    elif change == "project":
        model = BCNN(model.classes, model.preprocessing, {"name": "tiny"}, project=3)
    elif change == "mean":
        model.backbone.set_normalization([0.1, 0, 0], [1, 1, 1])
    elif change == "decoding":
        monkeypatch.setattr("bcnn.training.feature_data.MARGIN", 1)
    elif change == "precision":
        precision = "bf16-mixed"
    elif change == "pooling":
        model.pooling.register_buffer("weights", torch.ones(1))
    elif change == "class":  # of the same file, with the same arguments
        monkeypatch.setitem(POOLINGS, "other", type(model.pooling))
        model = model.with_pooling({"name": "other"})
    elif change == "code":
        monkeypatch.setattr(inspect, "getsource", lambda module: "x = 1")
    else:
        options = {change: {"size": 40, "resize": "squash", "interpolation": "bicubic"}[change]}
    assert CachedFeatureDataModule(folder_data(images, **options), model, precision).store.key != before


def test_an_option_at_its_default_is_the_same_store(images: Path, tiny: BCNN) -> None:
    data = folder_data(images)
    chosen = [
        {"name": "sqrt"},
        {"name": "sqrt", "power": 0.5, "centred": False},
        {"name": "sqrt", "power": 1},
    ]
    stores = [CachedFeatureDataModule(data, tiny.with_pooling(p), "32-true").store for p in chosen]
    assert stores[0].key == stores[1].key != stores[2].key


def test_equal_stores_do_not_wait_for_each_other(images: Path, tiny: BCNN) -> None:
    data = folder_data(images)
    first, same = (CachedFeatureDataModule(data, tiny, "32-true") for _ in range(2))
    first.beside = [same]
    build(first)
    assert torch.equal(first.descriptors(data.train)[0][:], same.descriptors(data.train)[0][:])


def test_training_draws_both_views_and_validation_only_the_first(images: Path) -> None:
    data = store_of(images, network())
    data.trainer = None  # so that passes are epochs
    loader, seen = data.train_dataloader(), set()
    for _ in range(8):
        descriptors, _ = next(iter(loader))
        seen |= {each.numpy().tobytes() for each in descriptors}
    assert len(seen) == len(data.data.train) * VIEWS
    descriptors, labels = next(iter(data.val_dataloader()))
    expected, expected_labels = data.descriptors(data.data.val)
    assert torch.equal(descriptors, expected[:]) and torch.equal(labels, expected_labels)


class Ranks(SingleDeviceStrategy):
    """A strategy of one of two ranks, without the other."""

    def __init__(self, all_see: bool = True) -> None:
        super().__init__("cpu")
        self.all_see = all_see

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision and self.all_see


def first_rank(images: Path, model: BCNN, strategy: Ranks) -> CachedFeatureDataModule:
    data = CachedFeatureDataModule(folder_data(images), model, "32-true")
    trainer: Any = SimpleNamespace(global_rank=0, world_size=2, strategy=strategy)
    data.trainer = trainer
    return data


def test_each_rank_computes_its_share_and_sees_a_missing_disk(images: Path, tiny: BCNN) -> None:
    data = first_rank(images, tiny, Ranks())
    expected = rf"not every machine of this run sees .*{data.store.key}: set BCNN_STORES .*store=false"
    with pytest.raises(UserError, match=expected):  # the other rank's shard is not there
        data.setup()
    assert len([*data.store.folder.glob("*.npy")]) == 1
    assert not data.store.lock().is_locked
    build(CachedFeatureDataModule(folder_data(images), tiny, "32-true"))
    with pytest.raises(UserError, match=expected):
        first_rank(images, tiny, Ranks(all_see=False)).setup()


def test_ranks_that_wait_for_another_run_meet_now_and_then(
    images: Path, tiny: BCNN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bcnn.training.feature_data.WAIT", 0.01)
    strategy = Ranks()
    data = first_rank(images, tiny, strategy)
    other, acquired = data.store.lock(), []

    def broadcast(obj: object, src: int = 0) -> object:
        acquired.append(obj[0])  # type: ignore[index]
        if len(acquired) == 4:
            other.release()
        return obj

    monkeypatch.setattr(strategy, "broadcast", broadcast)
    with caplog.at_level("INFO", "bcnn"), other, suppress(UserError):  # of the other rank's shard
        data.setup()
    assert acquired[:4] == [False] * 4 and True in acquired
    assert caplog.text.count("another run is computing descriptors") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_descriptors_that_are_not_finite_are_not_kept(images: Path, tiny: BCNN, value: float) -> None:
    tiny.backbone.features.weight.data.fill_(value)
    data = CachedFeatureDataModule(folder_data(images), tiny, "32-true")
    with pytest.raises(UserError, match=r"blue/0\.png is not finite in 32-true"):
        build(data)
    assert not list(data.store.folder.glob("*.npy"))
