"""data.sampler=balanced: every class equally often in training batches, and nowhere else."""

from pathlib import Path

import pytest
import torch
from conftest import build, set_up, write_classes
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import SequentialSampler

from bcnn.data.folder import ImageFolderData
from bcnn.data.sampler import Draws
from bcnn.model.network import BCNN
from bcnn.training.descriptors import DescriptorData


@pytest.fixture
def uneven(tmp_path: Path) -> ImageFolderData:
    """30 images of one class and 3 of the other."""
    write_classes(tmp_path / "train", many=30, few=3)
    write_classes(tmp_path / "val", many=4, few=1)
    torch.manual_seed(0)
    return set_up(tmp_path, sampler="balanced", batch_size=11)


def share(batches: object) -> float:
    """Of the labels, over 20 epochs, those of class 0."""
    labels = torch.cat([y for _ in range(20) for _, y in batches])  # type: ignore[attr-defined]
    return (labels == 0).float().mean().item()


def test_images_are_drawn_balanced_in_training_only(uneven: ImageFolderData) -> None:
    assert uneven.classes == ["few", "many"]
    train = uneven.train_dataloader()
    assert len(train) == 3
    assert 0.42 < share(train) < 0.58
    assert isinstance(uneven.val_dataloader().sampler, SequentialSampler)
    uneven.sampler = None
    assert share(uneven.train_dataloader()) == pytest.approx(3 / 33)


def test_descriptors_are_drawn_balanced_too(uneven: ImageFolderData) -> None:
    data = build(DescriptorData(uneven, BCNN(uneven.classes, 32), "32-true"))
    data.trainer = None  # so that passes are epochs
    assert 0.42 < share(data.train_dataloader()) < 0.58
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)


def test_ranks_share_the_draws_of_an_epoch(uneven: ImageFolderData) -> None:
    sampler = uneven.train_dataloader().sampler
    assert isinstance(sampler, Draws)
    labels = torch.tensor([label for _, label in uneven.train])
    for rank in range(2):
        mine = DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank)  # Lightning's under DDP
        drawn = [index for _ in range(40) for index, _ in mine]
        assert len(mine) == 17
        assert 0.42 < (labels[drawn] == 0).float().mean() < 0.58


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    first, second = Draws(50, seed=3), Draws(50, seed=3, epoch=lambda: 1)
    zeroth = list(first)
    assert sorted(index for index, _ in zeroth) == list(range(50))
    assert list(first) == list(second) == list(second) != zeroth
    assert list(Draws(50, seed=4)) != zeroth == list(Draws(50, seed=3))
    assert len({seed for _, seed in zeroth}) == 50


def test_neither_workers_nor_numbers_drawn_before_change_a_crop(uneven: ImageFolderData) -> None:
    uneven.sampler = None
    state = torch.get_rng_state()
    alone = [images for images, _ in uneven.train_dataloader()]
    torch.manual_seed(7)
    uneven.num_workers = 2
    shared = [images for images, _ in uneven.train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    uneven.num_workers = 0
    torch.set_rng_state(state)
    dataset = uneven.train_dataloader().dataset
    draws = [dataset[0, seed][0] for seed in (1, 2, 1)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_class_weights_make_every_class_weigh_the_same(uneven: ImageFolderData) -> None:
    weights = uneven.class_weights()
    torch.testing.assert_close(weights, torch.tensor([33 / 6, 33 / 60]))
    assert sum(weights[label] for _, label in uneven.train) == pytest.approx(33)
