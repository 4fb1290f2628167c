"""Image sets by name: the public benchmarks, and the embedded butterflies."""

from abc import abstractmethod
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from torchvision.datasets import FGVCAircraft, Flowers102, OxfordIIITPet, StanfordCars

from bcnn.data import butterflies
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.download import Published, fetch, published, unpack
from bcnn.data.index import ImageIndex, Samples
from bcnn.utils.errors import UserError

ANEW = "move the folder away to have it made anew"


class Butterflies(FineGrainedDataModule):
    """The embedded set: drawn into `root` on first use, then loaded like any other folder."""

    def prepare_data(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root.with_name(f".{self.root.name}.lock")):  # runs that start together
            butterflies.write(self.root)


class PublicSet(FineGrainedDataModule):
    """A published set with its official split; its files are fetched and unpacked on first use.

    `root` is the folder that holds `folder`, or `folder` itself. Files that are in `root` already are
    taken from there.

    A subclass says:
        folder: what the set unpacks to; torchvision's name where torchvision reads it.
        parts: what `folder` has to hold.
        files: what the set is published as. MD5: torchvision's or, where it has none, those that
            several public loaders of the set agree on.
        counts: official numbers of images to train, validate and test on.
        by_hand: of files that no program can fetch: why, and who has them.
    """

    folder: str
    parts: tuple[str, ...]
    files: tuple[Published, ...]
    counts: tuple[int, int, int]
    by_hand: str = ""

    def prepare_data(self) -> None:
        """Fetch and unpack the set if need be.

        Raises:
            UserError: a file cannot be had, or there is no room or no permission for it.
        """
        home = self._home()
        if (home / self.folder).exists():
            return
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f".{self.folder}.lock"):  # runs that start together
                if not (home / self.folder).exists():
                    self._make(home)
        except OSError as error:
            raise UserError(f"cannot make {home / self.folder}: {error}") from error

    def _home(self) -> Path:
        own = self.root.name == self.folder and (self.root / self.parts[0]).exists()
        return self.root.parent if own else self.root

    def _make(self, home: Path) -> None:
        absent = [file.name for file in self.files if not file.url and not (home / file.name).exists()]
        if absent:
            raise UserError(
                f"{self.by_hand}: put {', '.join(absent)} into {home}, "
                f"or unpacked ({', '.join(self.parts)}) into {home / self.folder}"
            )
        for file in self.files:
            fetch(file, home)
        with TemporaryDirectory(prefix=".unfinished-", dir=home) as scratch:
            for file in self.files:
                unpack(home / file.name, Path(scratch) / file.into)
            (Path(scratch) / self.folder).rename(home / self.folder)  # only a whole set has the name

    def _layout(self) -> ImageIndex:
        place = self._home() / self.folder
        absent = [part for part in self.parts if not (place / part).exists()]
        if absent:
            raise UserError(f"{place} lacks {', '.join(absent)}: add them, or {ANEW}")
        try:
            # In a process of its own, as a damaged .mat file can take down the one that reads it.
            with ProcessPoolExecutor(1) as pool:
                layout = pool.submit(self._official, place).result()
        except Exception as error:  # parsers raise whatever the bytes lead them into
            raise UserError(f"{place} is not as published ({error}): {ANEW}") from error
        absent = [path for path in layout.paths if not Path(path).is_file()]
        if absent or [len(samples) for samples in layout.splits.values()] != list(self.counts):
            example = f", for example {absent[0]}" if absent else ""
            raise UserError(
                f"{place} has {len(layout.paths) - len(absent)} of the set's {sum(self.counts)} images"
                f"{example}: {ANEW}"
            )
        return layout

    @abstractmethod
    def _official(self, place: Path) -> ImageIndex:
        """What the set's own files in `place` say."""


class CUB200(PublicSet):
    """Caltech-UCSD Birds-200-2011: Wah et al., technical report CNS-TR-2011-001."""

    folder = "CUB_200_2011"
    parts = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images")
    files = published(
        {"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
        "https://data.caltech.edu/records/65de6-vp158/files/",
    )
    counts = (5994, 0, 5794)

    def _official(self, place: Path) -> ImageIndex:
        """The lists are lines of an image's or a class's id and what they say of it."""
        paths, labels, training, names = (_table(place / part) for part in self.parts[:4])
        used = sorted(set(labels.values()), key=int)  # NABirds also names groups of classes
        label = {key: index for index, key in enumerate(used)}
        splits: dict[str, Samples] = {"1": [], "0": []}
        for image, path in paths.items():
            splits[training[image]].append((str(place / "images" / path), label[labels[image]]))
        return ImageIndex([names[key] for key in used], train=splits["1"], test=splits["0"])


class NABirds(CUB200):
    """Van Horn et al., "Building a bird recognition app and large scale dataset", CVPR 2015."""

    folder = "nabirds"
    files = published({"nabirds.tar.gz": "df21a9e4db349a14e2b08adfd45873bd"})
    counts = (23929, 0, 24633)
    by_hand = "the Cornell Lab gives NABirds to who agrees to its terms (dl.allaboutbirds.org/nabirds)"


class Aircraft(PublicSet):
    """The 100 variants of FGVC-Aircraft: Maji et al., arXiv:1306.5151. Training: train and val."""

    folder = "fgvc-aircraft-2013b"
    parts = ("data",)
    files = published(
        {"fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732"},
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/",
    )
    counts = (6667, 0, 3333)

    def _official(self, place: Path) -> ImageIndex:
        train, test = (FGVCAircraft(place.parent, s, loader=str) for s in ("trainval", "test"))
        return ImageIndex(train.classes, _listed(train), test=_listed(test))


class Cars(PublicSet):
    """Stanford Cars: Krause et al., "3D object representations", 3DRR workshop, ICCV 2013."""

    folder = "stanford_cars"
    parts = ("cars_train", "cars_test", "devkit", "cars_test_annos_withlabels.mat")
    files = published(
        {
            "cars_train.tgz": "065e5b463ae28d29e77c1b4b166cfe61",
            "cars_test.tgz": "4ce7ebf6a94d07f1952d94dd34c4d501",
            "car_devkit.tgz": "c3b158d763b6e2245038c8ad08e45376",
            "cars_test_annos_withlabels.mat": "b0a2b23655a3edd16d84508592a98d10",
        },
        into="stanford_cars",
    )
    counts = (8144, 0, 8041)
    by_hand = "Stanford's site has the Cars no more (github.com/pytorch/vision/issues/7545 has copies)"

    def _official(self, place: Path) -> ImageIndex:
        train, test = (StanfordCars(place.parent, s, loader=str) for s in ("train", "test"))
        return ImageIndex(train.classes, _listed(train), test=_listed(test))


class Flowers(PublicSet):
    """Oxford 102 Flowers: Nilsback & Zisserman, ICVGIP 2008."""

    folder = "flowers-102"
    parts = ("jpg", "imagelabels.mat", "setid.mat")
    files = published(
        {
            "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
            "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        },
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        into="flowers-102",
    )
    counts = (1020, 1020, 6149)

    def _official(self, place: Path) -> ImageIndex:
        splits = (Flowers102(place.parent, s, loader=str) for s in ("train", "val", "test"))
        train, val, test = (_listed(split) for split in splits)
        return ImageIndex(list(Flowers102.classes), train, val, test)


class Pets(PublicSet):
    """Oxford-IIIT Pet: Parkhi et al., "Cats and dogs", CVPR 2012."""

    folder = "oxford-iiit-pet"
    parts = ("images", "annotations")
    files = published(
        {
            "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
            "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
        },
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/",
        into="oxford-iiit-pet",
    )
    counts = (3680, 0, 3669)

    def _official(self, place: Path) -> ImageIndex:
        pets = [OxfordIIITPet(place.parent, split) for split in ("trainval", "test")]
        # It takes no loader: what it keeps is the only way to the paths.
        train, test = ([(str(p), k) for p, k in zip(s._images, s._labels, strict=True)] for s in pets)
        return ImageIndex(pets[0].classes, train, test=test)


class Dogs(PublicSet):
    """Stanford Dogs: Khosla et al., FGVC workshop, CVPR 2011."""

    folder = "stanford_dogs"
    parts = ("Images", "train_list.mat", "test_list.mat")
    files = published(
        {
            "images.tar": "1bb1f2a596ae7057f99d7d75860002ef",
            "lists.tar": "edbb9f16854ec66506b5f09b583e0656",
        },
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        into="stanford_dogs",
    )
    counts = (12000, 0, 8580)

    def _official(self, place: Path) -> ImageIndex:
        from scipy.io import loadmat  # here as in torchvision: other sets need not wait for it

        names: dict[int, str] = {}
        splits: list[Samples] = []
        for part in self.parts[1:]:
            lists = loadmat(place / part, squeeze_me=True)
            labels = [int(label) - 1 for label in lists["labels"]]
            files = [str(file) for file in lists["file_list"]]  # n02085620-Chihuahua/…jpg
            names |= {k: Path(file).parent.name for file, k in zip(files, labels, strict=True)}
            splits.append([(str(place / "Images" / f), k) for f, k in zip(files, labels, strict=True)])
        classes = [names[label] for label in range(len(names))]
        return ImageIndex(classes, train=splits[0], test=splits[1])


def _table(path: Path) -> dict[str, str]:
    """Lines of a key, a space and a value."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())


def _listed(dataset: Iterable[Any]) -> Samples:
    """The samples of a torchvision set whose `loader=str` leaves the images closed."""
    return [(path, int(label)) for path, label in dataset]
