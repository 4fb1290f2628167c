"""Public sets: small archives in each one's layout, downloaded through the code that users run."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import Request

import numpy as np
import pytest
from conftest import configure
from hydra.utils import instantiate
from scipy.io import savemat
from test_image_io import encoded
from torchvision.datasets import Flowers102

from bcnn.data import public
from bcnn.data.public import PublicSet
from bcnn.utils.errors import UserError

JPEG = encoded("JPEG")
Files = dict[str, bytes]
Splits = dict[str, dict[str, str]]  # split → name of the image's file → class


class Toy(NamedTuple):
    """A published set in small."""

    kind: type[PublicSet]
    files: Files
    expected: Splits


def tar(members: Files, mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def mat(**arrays: object) -> bytes:
    stream = io.BytesIO()
    savemat(stream, arrays)
    return stream.getvalue()


def lines(rows: Iterable[str]) -> bytes:
    return "\n".join(rows).encode()


def birds(kind: type[PublicSet], classes: dict[int, str], folder: str, groups: list[str]) -> Toy:
    """CUB-200-2011 and NABirds have the same lists; NABirds' classes are leaves of a tree."""
    images = [(f"{k}-{n}", f"{k:04d}/{k}{n}.jpg", k, n < 3) for k in classes for n in range(5)]
    members = {
        f"{folder}/classes.txt": lines([*groups, *(f"{k} {name}" for k, name in classes.items())]),
        f"{folder}/images.txt": lines(f"{i} {path}" for i, path, _, _ in images),
        f"{folder}/image_class_labels.txt": lines(f"{i} {k}" for i, _, k, _ in images),
        f"{folder}/train_test_split.txt": lines(f"{i} {int(train)}" for i, _, _, train in images),
        **{f"{folder}/images/{path}": JPEG for _, path, _, _ in images},
    }
    expected: Splits = {"train": {}, "val": {}, "test": {}}
    for _, path, k, train in images:
        expected["train" if train else "test"][Path(path).name] = classes[k]
    return Toy(kind, {kind.files: tar(members)}, expected)


def cub200() -> Toy:
    names = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 3: "003.Sooty_Albatross"}
    return birds(public.CUB200, names, "CUB_200_2011", [])


def nabirds() -> Toy:
    names = {295: "Common Eider (Adult male)", 317: "Bufflehead", 1010: "Green Heron"}
    return birds(public.NABirds, names, "nabirds", ["0 Birds", "1 Ducks, Geese, and Swans"])


def flowers102() -> Toy:
    ids = {"train": [3, 1, 5], "val": [2, 4, 9], "test": [6, 7, 8, 10, 11, 12]}
    labels = [1, 2, 3] * 4
    files = {
        "102flowers.tgz": tar({f"jpg/image_{i:05d}.jpg": JPEG for i in range(1, 13)}),
        "imagelabels.mat": mat(labels=np.array([labels], np.uint8)),
        "setid.mat": mat(trnid=[ids["train"]], valid=[ids["val"]], tstid=[ids["test"]]),
    }
    names = {1: "pink primrose", 2: "hard-leaved pocket orchid", 3: "canterbury bells"}
    expected = {s: {f"image_{i:05d}.jpg": names[labels[i - 1]] for i in ids[s]} for s in ids}
    return Toy(public.Flowers, files, expected)


def pets() -> Toy:
    breeds = {"Abyssinian": "Abyssinian", "american_bulldog": "American Bulldog", "Ragdoll": "Ragdoll"}
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    expected: Splits = {"train": {}, "val": {}, "test": {}}
    for label, (file, breed) in enumerate(breeds.items(), 1):
        for number in range(6):
            split = "trainval" if number < 4 else "test"
            rows[split].append(f"{file}_{number} {label} 1 1")
            expected["train" if number < 4 else "test"][f"{file}_{number}.jpg"] = breed
    images = {f"images/{name}": JPEG for split in expected.values() for name in split}
    annotations = {f"annotations/{split}.txt": lines(rows[split]) for split in rows}
    files = {"images.tar.gz": tar(images), "annotations.tar.gz": tar(annotations)}
    return Toy(public.Pets, files, expected)


def dogs() -> Toy:
    names = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02116738-African_hunting_dog"]
    expected: Splits = {"train": {}, "val": {}, "test": {}}
    images: Files = {}
    lists: Files = {}
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        paths = [f"{name}/{name[:9]}_{n}.jpg" for name in names for n in numbers]
        images |= dict.fromkeys((f"Images/{path}" for path in paths), JPEG)
        expected[split] = {Path(path).name: Path(path).parent.name for path in paths}
        lists[f"{split}_list.mat"] = mat(file_list=np.array([[path] for path in paths], object))
    return Toy(public.Dogs, {"images.tar": tar(images, "w"), "lists.tar": tar(lists, "w")}, expected)


TOYS: dict[str, Callable[[], Toy]] = {
    toy.__name__: toy for toy in (cub200, nabirds, flowers102, pets, dogs)
}


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Files:
    """The files that can be downloaded."""
    files: Files = {}

    class Response(io.BytesIO):
        def __init__(self, request: Request) -> None:
            self.url = request.full_url
            name = Path(self.url).name
            if name not in files:
                raise URLError("no internet")
            super().__init__(files[name])
            self.length = len(files[name])

    monkeypatch.setattr("urllib.request.urlopen", Response)
    return files


Make = Callable[[str, Path], tuple[PublicSet, Toy]]


@pytest.fixture
def make(web: Files, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A toy set where the real one would be, and the data module that its configuration gives."""

    def make(name: str, root: Path) -> tuple[PublicSet, Toy]:
        toy = TOYS[name]()
        web.update(toy.files)
        checksums = dict(toy.files)
        monkeypatch.setattr(
            "torchvision.datasets.utils.check_md5",
            lambda path, md5: Path(path).read_bytes() == checksums[Path(path).name],
        )
        monkeypatch.setattr(toy.kind, "counts", tuple(map(len, toy.expected.values())))
        monkeypatch.setattr(Flowers102, "classes", Flowers102.classes[:3])
        if name == "nabirds":  # unpacked by hand
            for content in toy.files.values():
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    archive.extractall(root, filter="data")
        small = ("data.size=32", "data.num_workers=0", "data.val_fraction=0")
        return instantiate(configure(f"data={name}", f"data.root={root}", *small).data), toy

    return make


def found(data: PublicSet) -> Splits:
    data.prepare_data()
    data.setup()
    return {
        split: {Path(path).name: data.classes[label] for path, label in getattr(data, split)}
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("name", TOYS)
def test_the_official_split_of_what_was_published(
    name: str, make: Make, web: Files, tmp_path: Path
) -> None:
    root = tmp_path / "data" / name
    data, toy = make(name, root)
    assert found(data) == toy.expected
    assert [path.name for path in root.iterdir() if path.name[0] != "."] == [toy.kind.folder]
    assert not [path for path in root.rglob("*") if path.suffix in (".tgz", ".gz", ".tar")]
    web.clear()  # it is there: nothing is downloaded again, nor written
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    for either in (root, root / toy.kind.folder):  # the folder that holds the set, or the set's own
        assert found(type(data)(either, size=32, val_fraction=0)) == toy.expected
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == before


@pytest.mark.parametrize("name", ["CUB200", "NABirds", "Aircraft", "Cars", "Flowers", "Pets", "Dogs"])
def test_what_cannot_be_downloaded_is_to_be_got_by_hand(name: str, web: Files, tmp_path: Path) -> None:
    kind: type[PublicSet] = getattr(public, name)
    with pytest.raises(UserError) as error:
        kind(tmp_path).prepare_data()
    place = tmp_path / kind.folder
    assert all(word in str(error.value) for word in (kind.files, kind.source, str(place)))
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == []


@pytest.mark.parametrize("name", ["pets", "flowers102", "dogs"])
def test_a_download_that_broke_off_leaves_nothing_and_starts_again(
    name: str, make: Make, web: Files, tmp_path: Path
) -> None:
    data, toy = make(name, tmp_path)
    last = [*toy.files][-1]
    web[last] = web[last][:-100]
    with pytest.raises(UserError, match="cannot download"):
        data.prepare_data()
    assert not (tmp_path / toy.kind.folder).exists()
    web[last] = toy.files[last]
    assert found(data) == toy.expected


def test_an_archive_cannot_write_outside_its_folder(
    make: Make, web: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, toy = make("pets", tmp_path / "data")
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda path, md5: True)
    for name in ("../../evil.txt", f"{toy.kind.folder}/../../../evil.txt"):
        web["images.tar.gz"] = tar({name: b"evil"})
        with pytest.raises(UserError, match="outside the destination"):
            data.prepare_data()
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_set_with_missing_images_is_not_trained_on(make: Make, tmp_path: Path) -> None:
    data, _ = make("cub200", tmp_path)
    data.prepare_data()
    next((tmp_path / "CUB_200_2011").rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match=r"has 14 of the set's 15 images, for example .*jpg"):
        data.setup()
