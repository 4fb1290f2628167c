"""Which photographs are most like others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, configure, folder_data, network, toy

from bcnn.evaluation.neighbours import nearest, rows
from bcnn.training import stages


def unit(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 20, generator=generator))


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_nearest_are_those_of_all_distances_sorted(batch: int) -> None:
    queries, others = unit(4, 0), unit(11, 1)
    others[7] = queries[2]
    apart = (queries[:, None].double() - others[None].double()).norm(dim=2)
    distances, places = nearest(queries, others.split(batch), 5)
    assert torch.equal(places, apart.argsort(dim=1)[:, :5])
    torch.testing.assert_close(distances.double(), apart.sort(dim=1).values[:, :5])
    assert places[2, 0] == 7 and distances[2, 0] == 0


def test_of_fewer_than_asked_for_there_are_all() -> None:
    _, places = nearest(unit(2, 0), [unit(3, 1)], 5)
    assert sorted(places[0].tolist()) == [0, 1, 2]


def test_rows_of_images_and_rows_that_were_stored(images: Path) -> None:
    model, data = network().eval(), folder_data(images)
    batches = [*data.evaluation_dataloader(data.test, batch_size=4)]
    found = torch.cat([*rows(model, batches, "32-true")])
    with torch.no_grad():
        torch.testing.assert_close(found, torch.cat([model.descriptor(x) for x, _ in batches]))
    stored = found[:3].half()
    (read,) = rows(model, [(stored, torch.zeros(3))])
    stored.zero_()  # as the next batch would take its place
    torch.testing.assert_close(read, found[:3], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["last", "finetune"])
def test_a_report_shows_training_photographs_like_those_mistaken(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    seen: dict[str, Any] = {}

    def keep(*arguments: Any) -> Path:
        seen.update(zip(("predictions", "nearest"), (arguments[2], arguments[-1]), strict=True))
        return original(*arguments)

    original = stages.write_results
    monkeypatch.setattr(stages, "write_results", keep)
    words = ["last=sgd", "last.epochs=1", "last.optimizer.lr=0", f"output={tmp_path / 'out'}"]
    words += ["finetune.epochs=1", "finetune.batch_size=4", "finetune.optimizer.lr=1e-12"]
    words += [f"stage={'both' if stage == 'finetune' else stage}"]
    stages.run(configure(*toy(images, *words)))
    predictions, found = seen["predictions"], seen["nearest"]
    assert len(found) == int((~predictions.correct).sum()) == 4  # all are called the first class
    for index, neighbours in found.items():
        colour = Path(predictions.paths[index]).parent.name
        paths, names, distances = zip(*neighbours, strict=True)
        assert all(Path(path).parts[-3] == "train" for path in paths)
        assert [Path(path).parent.name for path in paths] == [*names]
        assert list(distances) == sorted(distances)
        assert names[0] == colour and {*names} <= {*COLOURS}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<div class="near">') == 4
