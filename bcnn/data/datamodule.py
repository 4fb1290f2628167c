"""Image folders as a LightningDataModule."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.image_cache import load_reduced
from bcnn.data.image_io import load_image
from bcnn.data.index import (
    ImageIndex,
    Samples,
    listed,
    mistakes,
    no_images,
    read_folder,
    read_list,
)
from bcnn.data.integrity import broken, check, write_broken
from bcnn.data.review import duplicates, flat, imbalance, repeats
from bcnn.data.sampler import Draw, SeededSampler, current_epoch, rank_and_world_size, shard
from bcnn.data.splits import (
    SHORT,
    Content,
    SplitRecord,
    draw_place,
    draw_splits,
    follow,
    refuse_fractions,
    shares,
    too_few,
)
from bcnn.data.subset import choose_classes
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.utils import terminal
from bcnn.utils.environment import default_workers
from bcnn.utils.errors import UserError

OnInvalidImage = Literal["raise", "skip"]
Sampling = Literal["balanced"]

say = rank_zero_only(terminal.say)


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images by path, each with its label.

    Args:
        samples: (path, label) pairs.
        transform: PIL image → uint8 tensor (3, height, width).
        load: path → PIL image.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        load: Callable[[str], Image.Image] = load_image,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.load = load

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: int | Draw) -> tuple[Tensor, int]:
        """An image by its index; or by (index, seed), where the seed decides what `transform` draws."""
        if isinstance(draw, tuple):
            index, seed = draw
            with torch.random.fork_rng(devices=[]):
                # `torch.manual_seed` takes a millisecond, to note for CUDA where it was called.
                torch.default_generator.manual_seed(seed)
                return self[index]
        path, label = self.samples[draw]
        return self.transform(self.load(path)).as_subclass(Tensor), label


class FineGrainedDataModule(L.LightningDataModule):
    """Photographs in class folders, with or without splits, or named in a list.

    `setup` decodes every image once and remembers that it did (`bcnn.data.integrity`). After it,
    `classes` holds the names of the classes, and `train`, `val` and `test` hold (path, label) pairs;
    `val` and `test` may be empty. `split` is the record of which images these are.

    Args:
        root: `root/{train,val,test}/<class>/*`, val and test being optional, or `root/<class>/*`.
        list: instead of `root`, a CSV or text file of `path,label[,split]`.
        size: side of the square crops in pixels.
        resize: the short side ("keep") or both sides ("squash"), to `size / crop_pct` pixels.
        crop_pct: share of the resized side that a crop takes, as in timm.
        train_scale: least share of an image's area that a training crop takes, before it is resized
            to nine tenths of `size`; None: training crops are of evaluation's scale and size.
        classes: names of classes to leave the others out, or how many to draw by `seed`; None: all.
        val_fraction: share of each class, drawn by `seed`, to validate on where no image is in val.
            0 trains on everything.
        test_fraction: the same for test; None: 0.2 where nothing says which images are in which
            split, else 0.
        on_invalid_image: what to do about files that cannot be decoded: "raise", or "skip" them.
        sampler: "balanced" draws every class equally often in training; None: every image once.
        batch_size: images a step, of all ranks together, as many of each.
        num_workers: processes that decode images, of each rank; None: see `default_workers`.
        seed: of the shares, and of the classes, that are drawn.
        interpolation: between pixels, wherever an image is resized; None: the network's own, see
            `resize_for`.
        cache: large photographs to train on are kept at the size needed, on disk, from the first epoch
            on (`load_reduced`); those to evaluate are not.

    Raises:
        UserError: from `setup`: an argument is out of range, a folder or its images are missing or
            broken, there is one class only or too few images of one, or val or test hold classes
            that train lacks.
    """

    classes: list[str]
    train: Samples
    val: Samples
    test: Samples
    split: SplitRecord
    content: Content

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 448,
        resize: Resize = "keep",
        crop_pct: float = 1.0,
        classes: Sequence[str] | int | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        list: str | Path | None = None,
        test_fraction: float | None = None,
        on_invalid_image: OnInvalidImage = "raise",
        sampler: Sampling | None = None,
        train_scale: float | None = 0.5,
        interpolation: Interpolation | None = "bilinear",  # as runs of before there was a choice mean
        cache: bool = False,
    ) -> None:
        super().__init__()
        self.list = None if list is None else Path(str(list)).expanduser()
        self.places = [place for place in (root, list) if place is not None]
        # what messages call the set; a folder called 2024 comes as a number from a configuration
        self.root = Path(str(self.places[0]) if self.places else "").expanduser()
        self.interpolation = interpolation
        self.cache = cache
        self.preprocessing = Preprocessing(size, resize, crop_pct, interpolation or "bilinear")
        self.step = self.least = 1  # of the sides of training images: what the backbone asks for
        self.train_scale = train_scale
        self.subset = classes
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.on_invalid_image = on_invalid_image
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.classes, self.train, self.val, self.test = [], [], [], []

    def setup(self, stage: str | None = None) -> None:
        if self.classes:
            return
        self._refuse_options()
        self._undrawn = layout = self.labelled()
        _refuse(mistakes(layout, self.root))
        fractions = self.val_fraction, self.test_fraction
        _refuse(too_few(layout, self.content, self.root, *fractions))
        self._take(draw_splits(layout, self.content, *fractions, self.seed))
        for warning in [] if self.sampler else imbalance(layout):
            say(f"warning: {warning}")

    def labelled(self) -> ImageIndex:
        """The intact images and their labels as folders or a list have them, with nothing drawn.

        Raises:
            UserError: there are no images, or broken ones that are not to be left out.
        """
        layout = self._layout()
        _refuse(no_images(layout, self.root))
        for remark in layout.remarks:
            say(f"warning: {remark}")
        if self.subset is not None:
            layout = choose_classes(layout, self.subset, self.seed)
        findings = check(self.root, layout.paths)
        layout = self._without_broken(layout, broken(findings))
        _refuse(no_images(layout, self.root))
        self.content = {path: finding.digest for path, finding in findings.items()}
        for review in (duplicates, repeats, flat):
            for warning in review(layout, findings):
                say(f"warning: {warning}")
        return layout

    def resize_for(self, interpolation: Interpolation) -> None:
        """Take a network's own interpolation, where none was chosen."""
        if self.interpolation is None:
            self.preprocessing = replace(self.preprocessing, interpolation=interpolation)

    def follow(self, before: SplitRecord) -> None:
        """Take the splits of a model that is going to be trained further.

        Images that it was trained on would be the easiest of any validation or test. Where it knows
        none of these images, the splits stay as they are drawn.
        """
        here = {self.content[path][:SHORT] for path in self._undrawn.paths}
        known = here & before.known
        if known:
            layout, said = follow(self._undrawn, self.content, before)
            trained = {label for _, label in layout.train}
            lost = [name for label, name in enumerate(layout.classes) if label not in trained]
            if lost:
                raise UserError(
                    f"{self.root}: no images to train on are left of {listed(lost)}: those here "
                    "validated or tested the checkpoint; add others"
                )
            self._take(layout)
            self.split = replace(self.split, recipe=before.recipe)  # which these were drawn with
            recipe = ", ".join(f"{name}={value}" for name, value in before.recipe.items())
            say(
                f"splits as the checkpoint records them ({recipe}): {len(known)} of its "
                f"{len(before.known)} images are here, and {len(here - known)} that it does not know"
            )
            for sentence in said:
                say(f"warning: {sentence}")
        self.split = self.split.after(before)

    def _take(self, layout: ImageIndex) -> None:
        self.classes = layout.classes
        self.train, self.val, self.test = layout.splits.values()
        val_share, test_share = shares(self._undrawn, self.val_fraction, self.test_fraction)
        recipe = {"seed": self.seed, "val_fraction": val_share, "test_fraction": test_share}
        self.split = SplitRecord.of(layout, self.content, recipe)

    def _layout(self) -> ImageIndex:
        """Where the images are. A set with files of its own reads them here."""
        return read_list(self.list) if self.list else read_folder(self.root)

    def _refuse_options(self) -> None:
        if len(self.places) != 1:
            raise UserError("give either data.root=FOLDER or data.list=FILE")
        numbers = {
            "crop_pct": self.preprocessing.crop_pct,
            "train_scale": self.train_scale,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
        }
        for name, value in numbers.items():
            if not isinstance(value, int | float | None):
                raise UserError(f"data.{name}={value}: expected a number")
        for name, value in {"num_workers": self.num_workers or 0, "seed": self.seed}.items():
            if type(value) is not int or value < 0:
                raise UserError(f"data.{name}={value}: a whole number, 0 at least")
        if not isinstance(self.preprocessing.size, int) or self.preprocessing.size < 1:
            raise UserError(f"data.size={self.preprocessing.size}: a whole number of pixels")
        if self.preprocessing.resize not in get_args(Resize):
            choices = ", ".join(get_args(Resize))
            raise UserError(f"data.resize={self.preprocessing.resize}: choose from {choices}")
        if self.interpolation not in (None, *get_args(Interpolation)):
            choices = ", ".join(get_args(Interpolation))
            raise UserError(f"data.interpolation={self.interpolation}: choose null or {choices}")
        if not 0 < self.preprocessing.crop_pct <= 1:
            raise UserError(f"data.crop_pct={self.preprocessing.crop_pct}: a share from over 0 to 1")
        if self.train_scale is not None and not 0 < self.train_scale <= 1:
            raise UserError(f"data.train_scale={self.train_scale}: a share from over 0 to 1, or null")
        if self.on_invalid_image not in get_args(OnInvalidImage):
            raise UserError(
                f"data.on_invalid_image={self.on_invalid_image}: choose from {', '.join(get_args(OnInvalidImage))}"
            )
        if self.sampler not in (None, *get_args(Sampling)):
            raise UserError(
                f"data.sampler={self.sampler}: choose null or {', '.join(get_args(Sampling))}"
            )
        if not isinstance(self.cache, bool):
            raise UserError(f"data.cache={self.cache}: true or false")
        refuse_fractions(self.val_fraction, self.test_fraction)

    def _without_broken(self, layout: ImageIndex, reasons: dict[str, str]) -> ImageIndex:
        if not reasons:
            return layout
        file = write_broken(self.root, reasons)
        if self.on_invalid_image == "raise":
            raise UserError(
                f"{len(reasons)} of {len(layout.paths)} images cannot be decoded: "
                f"{listed((f'{path} ({reason})' for path, reason in reasons.items()), 3)}; "
                f"{file} lists them: repair or remove them, or leave them out with data.on_invalid_image=skip"
            )
        labels = Counter(label for path, label in layout.samples if path in reasons)
        counts = (f"{layout.classes[label]} {count}" for label, count in labels.most_common())
        say(f"left out {len(reasons)} images that cannot be decoded ({file}): {listed(counts)}")
        return layout.without(reasons)

    def class_weights(self) -> Tensor:
        """(classes,): weights by which every class weighs the same, 1 on average over the images."""
        labels = torch.tensor([label for _, label in self.train])
        counts = torch.bincount(labels, minlength=len(self.classes)).clamp(min=1)
        return len(self.train) / (len(self.classes) * counts.float())

    def train_sampler(self, trainer: L.Trainer | None) -> SeededSampler:
        """What draws the training images, by the epochs of a trainer if there is one."""
        weights = None
        if self.sampler == "balanced":
            weights = self.class_weights()[[label for _, label in self.train]]
        epoch = partial(current_epoch, trainer) if trainer else None
        rank, ranks = rank_and_world_size(trainer)
        if len(self.train) < ranks:
            raise UserError(
                f"{len(self.train)} images to train on are fewer than the {ranks} devices: set "
                "trainer.devices"
            )
        return SeededSampler(len(self.train), self.seed, weights, epoch, rank, ranks)

    def rank_batch(self, trainer: L.Trainer | None) -> int:
        """Images that one rank takes of a batch."""
        return max(1, self.batch_size // rank_and_world_size(trainer)[1])

    def train_dataloader(self) -> DataLoader:
        transform = self.preprocessing.training(self.train_scale, self.step, self.least)
        draws = self.train_sampler(self.trainer)
        batch = self.rank_batch(self.trainer)
        return self._loader(self.train, transform, batch, draws, self.cache)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.val, self.trainer))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.test, self.trainer))

    def sample_dataloader(self, images: int = 256) -> DataLoader:
        """Centre crops of so many training images at most, drawn by `seed`: of each class its share."""
        drawn = sorted(self.train, key=lambda s: (s[1], draw_place(self.content[s[0]], self.seed)))
        count = min(images, len(drawn))
        sample = [drawn[(2 * k + 1) * len(drawn) // (2 * count)] for k in range(count)]
        return self.evaluation_dataloader(shard(sample, self.trainer))

    def evaluation_dataloader(
        self, samples: Sequence[tuple[str, int]], batch_size: int | None = None
    ) -> DataLoader:
        """Centre crops of these images, in order: batches of (uint8 images, labels)."""
        transform = self.preprocessing.evaluation()
        return self._loader(samples, transform, batch_size or self.rank_batch(self.trainer))

    def _loader(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        draws: SeededSampler | None = None,
        cache: bool = False,
    ) -> DataLoader:
        load = load_reduced if cache else load_image
        count = self.num_workers
        if count is None:
            count = default_workers(self.trainer.num_devices if self.trainer else 1)
        return DataLoader(
            ImageList(samples, transform, partial(load, side=self.preprocessing.side)),
            batch_size=batch_size,
            sampler=draws,
            # a rest of one image has no mean
            drop_last=draws is not None and len(draws) > batch_size,
            num_workers=count,
            persistent_workers=count > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _refuse(sentences: Sequence[str]) -> None:
    if sentences:
        raise UserError(sentences[0])
