"""Data sets by name: the public benchmarks with their official splits, and the embedded butterflies."""

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from torchvision.datasets import FGVCAircraft, Flowers102, OxfordIIITPet, StanfordCars
from torchvision.datasets.utils import download_and_extract_archive

from bcnn.data import butterflies
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import ImageIndex, Samples
from bcnn.utils.errors import UserError

# For torchvision, too: no member of an archive is written outside its folder. Python 3.14's default.
tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # type: ignore[assignment]


class Butterflies(FineGrainedDataModule):
    """The embedded set: drawn into `root` on first use, then read like any folder."""

    def prepare_data(self) -> None:
        """Draw the images if there are none."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root.with_name(f".{self.root.name}.lock")):
            butterflies.write(self.root)


class PublicSet(FineGrainedDataModule):
    """A published set with its official split; downloaded on first use.

    `root` is the folder that holds `folder`, or `folder` itself.
    """

    folder: str  # that the set is unpacked to; torchvision's name if torchvision reads it
    counts: tuple[int, int, int]  # of images to train, validate and test on
    files: str
    source: str  # where a person gets them
    reader: Any  # torchvision's data set
    splits = ("train", "", "test")  # names that it has for train, val and test

    def prepare_data(self) -> None:
        """Download and unpack the set if it is not there; an unfinished one never has its name."""
        home = self._home()
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{self.folder}.lock"):
            if (home / self.folder).exists():
                return
            with TemporaryDirectory(prefix=".unfinished-", dir=home) as scratch:
                try:
                    self.download(Path(scratch))
                except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError) as error:
                    raise UserError(
                        f"cannot download {type(self).__name__} ({error}): get {self.files} from "
                        f"{self.source} and unpack to {home / self.folder}"
                    ) from error
                for archive in (*Path(scratch).rglob("*.tar"), *Path(scratch).rglob("*.t*gz")):
                    archive.unlink()
                Path(scratch, self.folder).rename(home / self.folder)

    def read_index(self) -> ImageIndex:
        """Return the official split; raise UserError if images are missing."""
        folder = self._home() / self.folder
        index = self.read_official(folder)
        absent = [path for path in index.paths if not Path(path).is_file()]
        if absent or [len(samples) for samples in index.splits.values()] != [*self.counts]:
            example = f", for example {absent[0]}" if absent else ""
            raise UserError(
                f"{folder} has {len(index.paths) - len(absent)} of the set's {sum(self.counts)} images"
                f"{example}: move the folder away to have it made again"
            )
        return index

    def download(self, home: Path) -> None:
        """Make `folder` in `home`."""
        self.reader(home, download=True)

    def read_official(self, folder: Path) -> ImageIndex:
        """Return the index that the set's own files in `folder` give."""
        index = ImageIndex([])
        for samples, name in zip(index.splits.values(), self.splits, strict=True):
            if name:
                dataset = self.reader(folder.parent, name, loader=str)  # leaves images closed
                index.classes = list(dataset.classes)
                samples += [(path, int(label)) for path, label in dataset]
        return index

    def _home(self) -> Path:
        is_set = self.root.name == self.folder and not (self.root / self.folder).exists()
        return self.root.parent if is_set else self.root


class CUB200(PublicSet):
    """Caltech-UCSD Birds-200-2011: Wah et al., technical report CNS-TR-2011-001."""

    folder = "CUB_200_2011"
    counts = (5994, 0, 5794)
    files = "CUB_200_2011.tgz"
    source = "https://data.caltech.edu/records/65de6-vp158"

    def download(self, home: Path) -> None:
        url = f"{self.source}/files/{self.files}"
        download_and_extract_archive(url, home, md5="97eceeb196236b17998738112f37df78")

    def read_official(self, folder: Path) -> ImageIndex:
        """Read lists whose lines are the id of an image or a class, and its value."""
        names = ("images", "image_class_labels", "train_test_split", "classes")
        paths, labels, is_training, classes = (_table(folder / f"{name}.txt") for name in names)
        used = sorted(set(labels.values()), key=int)  # NABirds also names groups of classes
        label = {key: index for index, key in enumerate(used)}
        splits: dict[str, Samples] = {"1": [], "0": []}
        for image, path in paths.items():
            splits[is_training[image]].append((str(folder / "images" / path), label[labels[image]]))
        return ImageIndex([classes[key] for key in used], train=splits["1"], test=splits["0"])


class NABirds(CUB200):
    """Van Horn et al., "Building a bird recognition app and large scale dataset", CVPR 2015."""

    folder = "nabirds"
    counts = (23929, 0, 24633)
    files = "nabirds.tar.gz"
    source = "the Cornell Lab, by agreeing to its terms (dl.allaboutbirds.org/nabirds),"

    def download(self, home: Path) -> None:
        raise RuntimeError("its owners publish no address")


class Aircraft(PublicSet):
    """The 100 variants of FGVC-Aircraft: Maji et al., arXiv:1306.5151. Training: train and val."""

    folder = "fgvc-aircraft-2013b"
    counts = (6667, 0, 3333)
    files = "fgvc-aircraft-2013b.tar.gz"
    source = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
    reader = FGVCAircraft
    splits = ("trainval", "", "test")


class Cars(PublicSet):
    """Stanford Cars: Krause et al., "3D object representations", 3DRR workshop, ICCV 2013."""

    folder = "stanford_cars"
    counts = (8144, 0, 8041)
    files = "cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat"
    source = "a copy (github.com/pytorch/vision/issues/7545), as Stanford's site has them no more,"
    reader = StanfordCars  # which refuses to download


class Flowers(PublicSet):
    """Oxford 102 Flowers: Nilsback & Zisserman, ICVGIP 2008."""

    folder = "flowers-102"
    counts = (1020, 1020, 6149)
    files = "102flowers.tgz, imagelabels.mat and setid.mat"
    source = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    reader = Flowers102
    splits = ("train", "val", "test")


class Pets(PublicSet):
    """Oxford-IIIT Pet: Parkhi et al., "Cats and dogs", CVPR 2012."""

    folder = "oxford-iiit-pet"
    counts = (3680, 0, 3669)
    files = "images.tar.gz and annotations.tar.gz"
    source = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    reader = OxfordIIITPet

    def read_official(self, folder: Path) -> ImageIndex:
        """Read lists of `name class species breed`: torchvision's reader does not give the paths."""
        splits = []
        for split in ("trainval", "test"):
            lines = (folder / "annotations" / f"{split}.txt").read_text().splitlines()
            rows = [line.split() for line in lines if line]
            splits.append([(str(folder / "images" / f"{r[0]}.jpg"), int(r[1]) - 1) for r in rows])
        return ImageIndex(OxfordIIITPet(folder.parent).classes, splits[0], test=splits[1])


class Dogs(PublicSet):
    """Stanford Dogs: Khosla et al., FGVC workshop, CVPR 2011."""

    folder = "stanford_dogs"
    counts = (12000, 0, 8580)
    files = "images.tar and lists.tar"
    source = "http://vision.stanford.edu/aditya86/ImageNetDogs/"

    def download(self, home: Path) -> None:
        for name, md5 in (
            ("images.tar", "1bb1f2a596ae7057f99d7d75860002ef"),
            ("lists.tar", "edbb9f16854ec66506b5f09b583e0656"),
        ):
            download_and_extract_archive(self.source + name, home / self.folder, md5=md5)

    def read_official(self, folder: Path) -> ImageIndex:
        from scipy.io import loadmat  # as in torchvision: other sets do without

        entries = []
        for split in ("train", "test"):  # files n02085620-Chihuahua/…jpg; labels are in this order
            files = loadmat(folder / f"{split}_list.mat", squeeze_me=True)["file_list"]
            paths = [folder / "Images" / file for file in files]
            entries += [(str(path), path.parent.name, split) for path in paths]
        return ImageIndex.of(entries)


def _table(path: Path) -> dict[str, str]:
    """Return the lines `key value` of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())
