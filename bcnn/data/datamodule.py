"""Images by class as a LightningDataModule."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from bcnn.data import splits
from bcnn.data.batches import collate
from bcnn.data.draws import draw_fraction, draw_position, draw_sample
from bcnn.data.groups import join_groups, name_groups
from bcnn.data.image_io import MARGIN, load_image, load_reduced
from bcnn.data.index import ImageIndex, Samples, choose_classes, mistakes, read_folder, read_list
from bcnn.data.integrity import Finding, check, without_broken
from bcnn.data.review import imbalance, leaks, oddities, shared
from bcnn.data.sampler import NO_LABEL, ImageList, SeededSampler, rank_and_world_size, shard
from bcnn.data.splits import SplitRecord
from bcnn.data.taxonomy import FOLDERS, Taxonomy, find_taxonomy
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.data.unlabelled import find_unlabelled
from bcnn.utils.console import logger
from bcnn.utils.environment import default_workers
from bcnn.utils.errors import UserError, validate_choice, validate_share

OnInvalidImage = Literal["raise", "skip"]
Sampling = Literal["balanced"]
NearDuplicates = Literal["together"]

SAMPLE_WORKERS = 4  # processes that decode the few images of `sample_dataloader`


class FineGrainedDataModule(L.LightningDataModule):
    """Images in class folders, with or without splits, or named in a list.

    `setup` checks every image and draws the splits. After it, `classes` are names by label, `train`,
    `val` and `test` (path, label) pairs, `findings` what the check found by path, `digests` the digests
    among it, `groups` the group of each path, and `split` the record of the splits. `val` and `test`
    may be empty. `unlabelled_findings` are of the images without labels.

    For a data set with files of its own, override `read_index`.

    Args:
        root: `root/{train,val,test}/<class>/*`, val and test being optional, or `root/<class>/*`.
        list: instead of `root`, a CSV or text file of `path,label[,split][,group]`.
        size, resize, crop_pct, interpolation: see `Preprocessing`; None: as the network was trained, or
            the default there.
        train_scale: least share of an image's area that a training crop takes before it is resized to
            nine tenths of `size`; None: training crops have evaluation's scale and size.
        classes: names of classes to use, or how many to draw by `seed`; None: all.
        taxonomy: levels above the classes, for `find_taxonomy`; None: there are none.
        train_fraction: share of each class's training images to train on, drawn by `seed`; those of a
            smaller share are among those of a larger one.
        val_fraction: share of each class to draw for validation if no image is in val; 0: train on all.
        test_fraction: the same for test; None: 0.2 if no splits are given, else 0.
        unlabelled: a folder, list or pattern of images without labels, for training by a teacher: those
            that look like none of the labelled ones are trained on, too, with the label `NO_LABEL`.
        group: regular expression, in place of the list's column: its first group, or its match, in a
            path from `root` or the list is the name of the image's group, which no split or fold cuts.
        near_duplicates: "together" puts images that look the same into one group.
        on_invalid_image: "raise" an error at files that cannot be decoded, or "skip" them.
        sampler: "balanced" draws every class equally often in training; None: every image once.
        cache: keep large training images on disk at the size needed.
        batch_size: images a step, over all ranks.
        num_workers: processes that decode, of each rank; None: `default_workers`.
        seed: of splits, classes and training draws.
    """

    classes: list[str]
    train: Samples
    val: Samples
    test: Samples
    split: SplitRecord
    findings: dict[str, Finding]
    unlabelled_findings: dict[str, Finding]
    digests: dict[str, str]
    groups: dict[str, str]
    taxonomy: Taxonomy | None
    _leaks: list[str]  # warnings about the splits
    _sample_loaders: dict[Any, DataLoader]

    def __init__(
        self,
        root: str | Path | None = None,
        list: str | Path | None = None,
        size: int | None = None,
        resize: Resize | None = None,
        crop_pct: float | None = None,
        interpolation: Interpolation | None = None,
        train_scale: float | None = 0.5,
        classes: Sequence[str] | int | None = None,
        taxonomy: str | Path | Sequence[str] | None = None,
        train_fraction: float = 1.0,
        val_fraction: float = 0.1,
        test_fraction: float | None = None,
        unlabelled: str | Path | None = None,
        group: str | None = None,
        near_duplicates: NearDuplicates | None = None,
        on_invalid_image: OnInvalidImage = "raise",
        sampler: Sampling | None = None,
        cache: bool = False,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = root, list
        self.list = Path(list).expanduser() if list else None
        self.root = self.list or Path(root or "").expanduser()
        given = {"size": size, "resize": resize, "crop_pct": crop_pct, "interpolation": interpolation}
        self.given_preprocessing: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.preprocessing = Preprocessing(**self.given_preprocessing)
        self.train_scale = train_scale
        self.chosen_classes, self.given_taxonomy = classes, taxonomy
        self.nested = taxonomy == FOLDERS
        self.train_fraction = train_fraction
        self.fractions = val_fraction, test_fraction
        self.unlabelled = unlabelled
        self.group, self.near_duplicates = group, near_duplicates
        self.on_invalid_image = on_invalid_image
        self.sampler = sampler
        self.cache = cache
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.classes, self.train, self.val, self.test, self._leaks = [], [], [], [], []

    def setup(self, stage: str | None = None) -> None:
        """Read and check the images and draw the splits, once."""
        if self.classes:
            return
        self._validate_arguments()
        self._index = index = self.checked_index()
        too_few = splits.too_few(index, self.digests, self.root, *self.fractions)
        if found := mistakes(index, self.root) + too_few:
            raise UserError(found[0])
        val, test = splits.fractions_to_draw(index, *self.fractions)
        recipe = {"seed": self.seed, "val_fraction": val, "test_fraction": test}
        self.unlabelled_findings = find_unlabelled(self.unlabelled, self.findings)
        self._drawn = splits.draw_splits(index, self.digests, self.groups, *self.fractions, self.seed)
        self._assign(self._drawn, recipe)
        lacking = splits.without_images(self._drawn, val, test) if self.grouped else []
        for warning in lacking + ([] if self.sampler else imbalance(index)):
            logger.warning(warning)

    def read_index(self) -> ImageIndex:
        """Return the class and, if given, the split of each image."""
        return read_list(self.list) if self.list else read_folder(self.root, self.nested)

    def checked_index(self) -> ImageIndex:
        """Return the intact images of the chosen classes, without splits drawn; set `findings`."""
        index = self.read_index()
        if self.chosen_classes is not None:
            index = choose_classes(index, self.chosen_classes, self.seed)
        self.taxonomy = find_taxonomy(self.given_taxonomy, self.list, index.classes, index.parents)
        findings = check(self.root, index.paths)
        index = without_broken(index, findings, self.root, self.on_invalid_image == "skip")
        if not index.samples:
            raise UserError(mistakes(index, self.root)[0])
        self.findings = {path: findings[path] for path in index.paths}
        self.digests = {path: finding.digest for path, finding in self.findings.items()}
        index = name_groups(index, self.group, "data.group", self.root)
        near = self.near_duplicates is not None
        self.groups = join_groups(self.findings, index.groups, near)
        self.grouped = near or bool(index.groups)
        for warning in (*index.remarks, *shared(index, self.digests), *oddities(index, findings)):
            logger.warning(warning)
        return index

    def count(self, split: str) -> str:
        """Return the number of images of a split and, if there are any but copies, of groups."""
        samples: Samples = getattr(self, split)
        groups = len({self.groups[path] for path, _ in samples})
        return f"{len(samples)} images" + (f" of {groups} groups" if self.grouped else "")

    def numbers(self) -> str:
        """Return the number of images, and of groups, of each split."""
        uses = {"train": "to train on", "val": "to validate", "test": "to test"}
        counts = [f"{self.count(split)} {use}" for split, use in uses.items()]
        if self.unlabelled:
            counts.append(f"{len(self.unlabelled_findings)} images without labels")
        return ", ".join(counts)

    def part(self, classes: int, images: int) -> Self:
        """Return a data module of at most so many classes and training images, drawn by `seed`.

        It has no test images.
        """
        drawn = sorted(self.classes, key=lambda name: draw_position(name, self.seed))[:classes]
        part = copy.copy(self)
        part.classes = [name for name in self.classes if name in {*drawn}]
        new = {self.classes.index(name): label for label, name in enumerate(part.classes)}
        part.train, part.val = (
            draw_sample(
                [(path, new[k]) for path, k in split if k in new], self.digests, images, self.seed
            )
            for split in (self.train, self.val)
        )
        part.test, part._sample_loaders = [], {}
        return part

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Take a network's preprocessing, which has the sides that its backbone takes."""
        self.preprocessing = preprocessing

    def follow(self, record: SplitRecord) -> None:
        """Take the splits of a model whose weights are trained further, if it records these images."""
        digests = record.recognise(self.findings)
        if not record.digests.isdisjoint(digests.values()):
            index = splits.follow(self._index, self._drawn, digests, self.groups, record)
            self._assign(index, record.recipe)
        self.split = self.split.after(record)

    def class_weights(self) -> Tensor:
        """Return (classes,): weights that balance the classes, 1 on average over the images."""
        labels = torch.tensor([label for _, label in self.train])
        counts = torch.bincount(labels, minlength=len(self.classes)).clamp(min=1)
        return len(self.train) / (len(self.classes) * counts.float())

    def train_sampler(self, trainer: L.Trainer | None, unlabelled: int = 0) -> SeededSampler:
        """Return the sampler of training images, then unlabelled ones, by the trainer's epochs."""
        weights = None
        if self.sampler == "balanced":
            balanced = self.class_weights()[[label for _, label in self.train]]
            weights = torch.cat([balanced, torch.ones(unlabelled)])
        return SeededSampler.of(len(self.train) + unlabelled, self.seed, weights, trainer)

    def rank_batch(self, trainer: L.Trainer | None) -> int:
        """Return the number of images of a batch that a rank takes."""
        return max(1, self.batch_size // rank_and_world_size(trainer)[1])

    def train_dataloader(self) -> DataLoader:
        transform = self.preprocessing.training(self.train_scale)
        side = self.preprocessing.training_side(self.train_scale, MARGIN)
        load = partial(load_reduced if self.cache else load_image, side=side)
        samples = [*self.train, *((path, NO_LABEL) for path in self.unlabelled_findings)]
        sampler = self.train_sampler(self.trainer, len(self.unlabelled_findings))
        return self._loader(samples, transform, None, load, sampler)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.val, self.trainer))

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader(shard(self.test, self.trainer))

    def sample_dataloader(self, images: int = 256) -> DataLoader:
        """Return evaluation's views of so many training images at most, drawn by `seed` by class."""
        # Made once, with workers that stay, for a batch size: a resumed run must round the same way.
        key = images, self.batch_size, rank_and_world_size(self.trainer), self.preprocessing
        if key not in self._sample_loaders:
            drawn = draw_sample(self.train, self.digests, images, self.seed)
            self._sample_loaders[key] = self._loader(
                shard(drawn, self.trainer), self.preprocessing.evaluation(), max_workers=SAMPLE_WORKERS
            )
        return self._sample_loaders[key]

    def evaluation_dataloader(
        self, samples: Sequence[tuple[str, int]], batch_size: int | None = None
    ) -> DataLoader:
        """Return evaluation's views of these images, in order: batches of `collate`."""
        return self._loader(samples, self.preprocessing.evaluation(), batch_size)

    def _loader(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int | None = None,
        load: Callable[[str], Image.Image] | None = None,
        sampler: SeededSampler | None = None,
        max_workers: int | None = None,
    ) -> DataLoader:
        batch_size = batch_size or self.rank_batch(self.trainer)
        workers = self.num_workers
        if workers is None:
            workers = default_workers(self.trainer.num_devices if self.trainer else 1)
        workers = min(workers, max_workers or workers)
        return DataLoader(
            ImageList(samples, transform, load or partial(load_image, side=self.preprocessing.side)),
            batch_size,
            sampler=sampler,
            collate_fn=collate,
            drop_last=sampler is not None and len(sampler) > batch_size,  # one image has no variance
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _assign(self, index: ImageIndex, recipe: Mapping[str, Any]) -> None:
        share, seed = self.train_fraction, recipe.get("seed", self.seed)
        train = draw_fraction(index.train, self.groups, share, seed)
        index, recipe = replace(index, train=train), {**recipe, "train_fraction": share}
        found = leaks(index, self.findings, self.groups if self.grouped else {})
        for warning in found if found != self._leaks else []:  # `follow` may change nothing
            logger.warning(warning)
        self._leaks = found
        self.classes = index.classes
        self.train, self.val, self.test = index.splits.values()
        others = self.unlabelled_findings.values()
        self.split = SplitRecord.of(index, self.findings, recipe, others)
        self._sample_loaders = {}

    def _validate_arguments(self) -> None:
        """Raise UserError at values that would silently mean something else."""
        if self.sources.count(None) != 1:
            raise UserError("give either data.root=FOLDER or data.list=FILE")
        validate_choice("data.on_invalid_image", self.on_invalid_image, get_args(OnInvalidImage))
        validate_choice("data.sampler", self.sampler, (None, *get_args(Sampling)))
        validate_choice("data.near_duplicates", self.near_duplicates, (None, *get_args(NearDuplicates)))
        validate_share("data.train_scale", self.train_scale)
        validate_share("data.train_fraction", self.train_fraction)
        self.preprocessing.validate()
        splits.validate_fractions(*self.fractions)
