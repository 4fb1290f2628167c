"""Nearest images by their descriptors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import folder_data

from bcnn.evaluation.neighbours import descriptors, nearest
from bcnn.models.bilinear_cnn import BCNN


def unit(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 20, generator=generator))


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_nearest_are_the_first_of_all_sorted_distances(batch: int) -> None:
    queries, others = unit(4, 0), unit(11, 1)
    others[7] = queries[2]
    apart = (queries[:, None].double() - others[None].double()).norm(dim=2)
    distances, indices = nearest(queries, others.split(batch), 5)
    assert torch.equal(indices, apart.argsort(dim=1)[:, :5])
    torch.testing.assert_close(distances.double(), apart.sort(dim=1).values[:, :5])
    assert indices[2, 0] == 7 and distances[2, 0] == 0
    _, indices = nearest(queries, others[:3].split(batch), 5)  # fewer than asked for: all
    assert sorted(indices[0].tolist()) == [0, 1, 2]


def test_descriptors_of_images_and_of_a_store(tiny: BCNN, images: Path) -> None:
    data = folder_data(images)
    batches = [*data.evaluation_dataloader(data.test, batch_size=4)]
    found = torch.cat([*descriptors(tiny, batches, "32-true")])
    with torch.no_grad():
        torch.testing.assert_close(found, torch.cat([tiny.descriptor(x) for x, _ in batches]))
    stored = found[:3].half()
    (read,) = descriptors(tiny, [(stored, torch.zeros(3))])
    stored.zero_()  # as a store reuses the memory of a batch
    torch.testing.assert_close(read, found[:3], rtol=1e-3, atol=1e-4)
