"""data.sampler=balanced: every class equally often in training batches, and nowhere else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import set_up, write_classes
from torch.utils.data import SequentialSampler

from bcnn.data.datamodule import FineGrainedDataModule, Sampling
from bcnn.data.sampler import NO_LABEL, SeededSampler


@pytest.fixture
def uneven(tmp_path: Path) -> FineGrainedDataModule:
    """30 images of one class and 3 of the other."""
    write_classes(tmp_path / "train", many=30, few=3)
    write_classes(tmp_path / "val", many=4, few=1)
    torch.manual_seed(0)
    return set_up(tmp_path, sampler="balanced", batch_size=11)


def share(batches: object) -> float:
    """Of the labels, over 20 epochs, those of class 0."""
    labels = torch.cat([y for _ in range(20) for _, y in batches])  # type: ignore[attr-defined]
    return (labels == 0).float().mean().item()


def test_images_are_drawn_balanced_in_training_only(uneven: FineGrainedDataModule) -> None:
    assert uneven.classes == ["few", "many"]
    train = uneven.train_dataloader()
    assert len(train) == 3
    assert 0.42 < share(train) < 0.58
    assert isinstance(uneven.val_dataloader().sampler, SequentialSampler)
    uneven.sampler = None
    assert share(uneven.train_dataloader()) == pytest.approx(3 / 33)


def of_rank(data: FineGrainedDataModule, rank: int, ranks: int) -> FineGrainedDataModule:
    """The data as one of the processes that train together has them, in their first epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    fit_loop = SimpleNamespace(epoch_progress=progress)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, fit_loop=fit_loop)  # type: ignore[assignment]
    return data


def drawn(data: FineGrainedDataModule, rank: int = 0, ranks: int = 1) -> list[list[tuple[int, int]]]:
    """The batches of an epoch, as a rank draws them."""
    return list(of_rank(data, rank, ranks).train_dataloader().batch_sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["balanced", None])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_batches_of_all_ranks_together_are_those_of_one(
    uneven: FineGrainedDataModule, sampler: Sampling, ranks: int
) -> None:
    uneven.sampler, uneven.batch_size = sampler, 8
    alone = drawn(uneven)
    assert [len(batch) for batch in alone] == [8, 8, 8, 8]  # of 33 images
    each = [drawn(uneven, rank, ranks) for rank in range(ranks)]
    for batch, *shares in zip(alone, *each, strict=True):
        assert sorted(batch) == sorted(draw for share in shares for draw in share)


@pytest.mark.parametrize("batch_size", [64, 128])
def test_a_set_smaller_than_a_batch_is_one_batch_on_any_number_of_ranks(
    uneven: FineGrainedDataModule, batch_size: int
) -> None:
    uneven.sampler, uneven.batch_size = None, batch_size
    for ranks, share in ((1, 33), (2, 16), (8, 4), (32, 1)):
        for rank in range(ranks):
            assert [len(batch) for batch in drawn(uneven, rank, ranks)] == [share]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_evaluate_every_image_once_in_as_many_batches(
    uneven: FineGrainedDataModule, ranks: int
) -> None:
    uneven.batch_size = 8
    batches = [list(of_rank(uneven, rank, ranks).val_dataloader()) for rank in range(ranks)]
    assert len({len(each) for each in batches}) == 1
    labels = torch.cat([labels for each in batches for _, labels in each])
    assert sorted(labels[labels != NO_LABEL].tolist()) == sorted(label for _, label in uneven.val)


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    first, second = SeededSampler(50, seed=3), SeededSampler(50, seed=3, epoch=lambda: 1)
    zeroth = list(first)
    assert sorted(index for index, _ in zeroth) == list(range(50))
    assert list(first) == list(second) == list(second) != zeroth
    assert list(SeededSampler(50, seed=4)) != zeroth == list(SeededSampler(50, seed=3))
    assert len({seed for _, seed in zeroth}) == 50


def test_draws_are_those_of_earlier_runs() -> None:
    weights = torch.tensor([0.1, 0.9, 0.5, 0.2])
    assert list(SeededSampler(5, seed=3))[:2] == [(1, 1826754659), (0, 2151013925)]
    balanced = SeededSampler(4, seed=3, weights=weights, epoch=lambda: 7)
    assert list(balanced)[:2] == [(1, 2172257467), (1, 1008776183)]


def test_neither_workers_nor_numbers_drawn_before_change_a_crop(uneven: FineGrainedDataModule) -> None:
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


def test_class_weights_make_every_class_weigh_the_same(uneven: FineGrainedDataModule) -> None:
    weights = uneven.class_weights()
    torch.testing.assert_close(weights, torch.tensor([33 / 6, 33 / 60]))
    assert sum(weights[label] for _, label in uneven.train) == pytest.approx(33)
