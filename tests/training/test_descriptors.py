"""Stage `last` from the store is stage `last` through the frozen network."""

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import build, folder_data, network, quiet_trainer, write_images
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_data import CachedFeatureDataModule, StoredRows
from bcnn.training.feature_store import CHUNK, VIEWS
from bcnn.training.module import BCNNModule
from bcnn.utils.errors import UserError


def forward_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that pass the features."""
    counts: list[int] = []
    original = BCNN.descriptor

    def counted(self: BCNN, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return original(self, images)

    monkeypatch.setattr(BCNN, "descriptor", counted)
    return counts


def test_rows_are_the_descriptors_of_the_crop_and_its_mirror_image(images: Path) -> None:
    folder, model = folder_data(images), network()
    data = build(CachedFeatureDataModule(folder, model, "32-true"))
    for split in (folder.train, folder.val, folder.test):
        batch, _ = next(iter(folder.evaluation_dataloader(split)))
        with torch.no_grad():
            views = model.descriptor(batch), model.descriptor(batch.flip(-1))
        first = data.rows(split)
        for view, expected in enumerate(views):
            found = StoredRows(data.store, [row + view for row in first])[:]
            # of a unit row, whose entries are about 0.003; float16 is in steps of 6e-8 near zero
            torch.testing.assert_close(found.float(), expected, rtol=2**-11, atol=3e-8)


def test_a_row_an_image_is_the_mean_of_its_views(images: Path) -> None:
    folder = folder_data(images)
    data = build(CachedFeatureDataModule(folder, network(), "32-true"))
    rows, labels = data.means(folder.train)
    first, second = (
        StoredRows(data.store, [r + k for r in data.rows(folder.train)])[:] for k in (0, 1)
    )
    assert not torch.equal(first, second)
    assert len(rows) == len(folder.train) and labels.tolist() == [label for _, label in folder.train]
    torch.testing.assert_close(rows[:], (first.float() + second.float()) / 2, rtol=1e-6, atol=0)
    assert torch.equal(rows[3:5], rows[:][3:5])


def test_what_is_only_tested_has_no_mirror_image(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(images / "test", 6, seed=9)  # 18 images to test on, the first in the order of paths
    counts = forward_images(monkeypatch)
    data = build(CachedFeatureDataModule(folder_data(images), network(), "32-true"))
    assert sum(counts) == CHUNK + VIEWS * (36 - CHUNK) == data.store.rows
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert all(rows.any() for rows, _ in (data.on_before_batch_transfer(b, 0) for b in loader))


def test_images_pass_the_features_once_and_never_again(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = forward_images(monkeypatch)
    build(CachedFeatureDataModule(folder_data(images), network(), "32-true"))
    assert sum(counts) == 24 * VIEWS
    again = build(CachedFeatureDataModule(folder_data(images, val_fraction=0.1), network(), "32-true"))
    for loader in (again.train_dataloader(), again.val_dataloader(), again.test_dataloader()):
        list(loader)
    assert sum(counts) == 24 * VIEWS


@pytest.mark.parametrize(
    "change",
    ["features", "image", "size", "resize", "interpolation", "precision", "mean", "decoding"],
)
def test_whatever_determines_the_rows_makes_another_store(
    images: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = CachedFeatureDataModule(folder_data(images), network(), "32-true").store.key
    model, options, precision = network(), {}, "32-true"
    if change == "features":
        model = network(seed=1)
    elif change == "image":
        write_images(images / "train", 1, seed=9)
    elif change == "mean":
        model.backbone.set_normalization([0.1, 0, 0], [1, 1, 1])
    elif change == "decoding":
        monkeypatch.setattr("bcnn.training.feature_data.MARGIN", 1)
    elif change == "precision":
        precision = "bf16-mixed"
    else:
        options = {change: {"size": 40, "resize": "squash", "interpolation": "bicubic"}[change]}
    assert CachedFeatureDataModule(folder_data(images, **options), model, precision).store.key != before


def test_keys_of_before_there_was_a_choice_of_interpolation_are_today_s() -> None:
    assert Preprocessing(32).identity() == {"size": 32, "resize": "keep", "crop_pct": 1.0}


def test_the_head_and_the_split_do_not(images: Path) -> None:
    before = CachedFeatureDataModule(folder_data(images), network(), "32-true").store.key
    model = network()
    torch.nn.init.normal_(model.head.weight)
    folder = folder_data(images, val_fraction=0.2, batch_size=3)
    assert CachedFeatureDataModule(folder, model, "32-true").store.key == before


def train_head(data: L.LightningDataModule, in_order: DataLoader) -> torch.Tensor:
    module = BCNNModule(network(), "last", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))
    data.train_dataloader = lambda: in_order  # type: ignore[method-assign]
    quiet_trainer(max_epochs=6, limit_val_batches=0).fit(module, datamodule=data)
    return module.model.head.weight.detach()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-4), ("float16", 2e-3)])
def test_same_views_in_the_same_order_give_the_same_classifier(
    images: Path, dtype: str, bound: float
) -> None:
    folder = folder_data(images, batch_size=5)
    data = build(CachedFeatureDataModule(folder, network(), "32-true", dtype))
    # the validation loader: in order, without the draw between the two views
    from_store = train_head(data, data.evaluation_dataloader(folder.train))
    through_network = train_head(folder, folder.evaluation_dataloader(folder.train))
    error = (from_store - through_network).norm() / through_network.norm()
    assert through_network.norm() > 1 and error < bound


def test_training_draws_both_views_and_validation_only_the_first(images: Path) -> None:
    folder = folder_data(images)
    data = build(CachedFeatureDataModule(folder, network(), "32-true"))
    data.trainer = None  # so that passes are epochs
    loader = data.train_dataloader()
    seen = set()
    for _ in range(8):
        rows, _ = data.on_before_batch_transfer(next(iter(loader)), 0)
        seen |= {row.numpy().tobytes() for row in rows}
    assert len(seen) == len(folder.train) * VIEWS
    rows, labels = data.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    torch.testing.assert_close(rows, StoredRows(data.store, data.rows(folder.val))[:], rtol=0, atol=0)
    assert labels.tolist() == [label for _, label in folder.val]


def test_damage_is_said_and_computed_again(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(CachedFeatureDataModule(folder_data(images), network(), "32-true"))
    intact = StoredRows(data.store, range(48))[:]
    chunk = sorted(data.store.folder.glob("*.rows"))[1]
    chunk.write_bytes(chunk.read_bytes()[:-2])
    counts = forward_images(monkeypatch)
    again = build(CachedFeatureDataModule(folder_data(images), network(), "32-true"))
    assert "1 damaged" in capsys.readouterr().out
    assert sum(counts) == 8 * VIEWS  # the second chunk: 24 images less a chunk of 16
    assert torch.equal(StoredRows(again.store, range(48))[:], intact)


def _build_in_process(root: Path, queue: multiprocessing.Queue) -> None:
    counts: list[int] = []
    original = BCNN.descriptor

    def counted(self: BCNN, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return original(self, images)

    BCNN.descriptor = counted  # type: ignore[method-assign]
    torch.set_num_threads(1)
    build(CachedFeatureDataModule(folder_data(root), network(), "32-true"))
    queue.put(sum(counts))


@pytest.mark.slow
def test_of_two_runs_at_once_one_builds_and_the_other_uses_it(images: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    runs = [context.Process(target=_build_in_process, args=(images, queue)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert sorted(queue.get(timeout=1) for _ in runs) == [0, 24 * VIEWS]


class Ranks(SingleDeviceStrategy):
    """What a rank sees of the others, without them: `first` is what rank 0 broadcasts to it."""

    def __init__(self, all_see: bool = True, first: Iterator[object] = iter(())) -> None:  # noqa: B008
        super().__init__("cpu")
        self.all_see = all_see
        self.first = first

    def broadcast(self, obj: object, src: int = 0) -> object:
        return next(self.first, obj)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision and self.all_see


def of_rank(images: Path, model: BCNN, rank: int, strategy: Ranks) -> CachedFeatureDataModule:
    """The data of a rank of two, which it shares with another that is not there."""
    data = CachedFeatureDataModule(folder_data(images), model, "32-true")
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=2, strategy=strategy, print=print
    )
    return data


def test_machines_without_a_shared_disk_are_a_sentence(images: Path, tiny: BCNN) -> None:
    data = of_rank(images, tiny, 0, Ranks(all_see=False))
    expected = rf"not every machine of this run sees .*{data.store.key}: set BCNN_STORES .*store=false"
    with pytest.raises(UserError, match=expected):
        data.setup()
    data.trainer.strategy.all_see = True
    with pytest.raises(UserError, match=expected):  # the other's half is not there
        data.setup()
    assert len(list(data.store.folder.glob("*.rows"))) == 1
    assert not data.store.lock().is_locked


def test_a_mistake_of_the_first_rank_is_told_by_every_other(images: Path, tiny: BCNN) -> None:
    data = of_rank(images, tiny, 1, Ranks(first=iter([True, UserError("cannot be written")])))
    with pytest.raises(UserError, match="cannot be written"):
        data.setup()
    assert not data.store.folder.exists()  # nor does it make the folder


def test_ranks_that_wait_for_another_run_meet_now_and_then(
    images: Path, tiny: BCNN, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bcnn.training.feature_data.WAIT", 0.01)
    strategy = Ranks()
    data = of_rank(images, tiny, 0, strategy)
    other, told = data.store.lock(), []

    def broadcast(obj: object, src: int = 0) -> object:
        told.append(obj)
        if len(told) == 4:
            other.release()
        return obj

    monkeypatch.setattr(strategy, "broadcast", broadcast)
    monkeypatch.setattr(data, "_build", lambda *_, **__: None)
    with other, suppress(UserError):  # of chunks that are not there
        data.setup()
    assert told[:4] == [False] * 4 and True in told
    assert capsys.readouterr().out.count("another run is building the same descriptors") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_and_not_kept(
    images: Path, tiny: BCNN, value: float
) -> None:
    tiny.backbone.features.weight.data.fill_(value)
    data = CachedFeatureDataModule(folder_data(images), tiny, "32-true")
    with pytest.raises(UserError, match=r"blue/0\.png are not finite numbers in 32-true"):
        build(data)
    assert not list(data.store.folder.glob("*.rows"))
