"""Public sets: small archives in each one's layout, served from files, through the code users run."""

import hashlib
import io
import itertools
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bounded, configure, mutated
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from bcnn.data import sets
from bcnn.data.download import unpack
from bcnn.data.public import PublicSet
from bcnn.models.checkpoint import load_model
from bcnn.training.run import run
from bcnn.utils.errors import UserError

SPLITS = ("train", "val", "test")
NUMBERS = itertools.count()  # no two images are the same
Files = dict[str, bytes]


@dataclass
class Toy:
    """A published set in small: its files, and what they say of each image, by name of the file."""

    kind: type[PublicSet]
    files: Files
    expected: dict[str, dict[str, str]]  # split → name of the image → class


def jpeg(label: int) -> bytes:
    pixels = np.random.default_rng(next(NUMBERS)).integers(0, 80, (36, 44, 3), np.uint8)
    pixels[..., label % 3] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


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


def lines(*rows: object) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def cub200() -> Toy:
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    images = [(label, n, n < 4) for label in range(3) for n in range(6)]
    paths = [f"{classes[label]}/{classes[label][4:]}_{n:04d}.jpg" for label, n, _ in images]
    members = {
        "attributes.txt": lines("1 has_bill_shape::curved_(up_or_down)"),
        "CUB_200_2011/classes.txt": lines(*(f"{i} {name}" for i, name in enumerate(classes, 1))),
        "CUB_200_2011/images.txt": lines(*(f"{i} {path}" for i, path in enumerate(paths, 1))),
        "CUB_200_2011/image_class_labels.txt": lines(
            *(f"{i} {label + 1}" for i, (label, _, _) in enumerate(images, 1))
        ),
        "CUB_200_2011/train_test_split.txt": lines(
            *(f"{i} {int(train)}" for i, (_, _, train) in enumerate(images, 1))
        ),
    }
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for path, (label, _, train) in zip(paths, images, strict=True):
        members[f"CUB_200_2011/images/{path}"] = jpeg(label)
        expected["train" if train else "test"][Path(path).name] = classes[label]
    return Toy(sets.CUB200, {"CUB_200_2011.tgz": tar(members)}, expected)


def nabirds() -> Toy:
    # Ids are of leaves of a tree; its inner nodes are in classes.txt too.
    names = {295: "Common Eider (Adult male)", 1010: "Green Heron", 317: "Bufflehead"}
    images = [(key, f"{key:04d}-{n}", n < 3) for key in names for n in range(5)]
    members = {
        "nabirds/classes.txt": lines(
            "0 Birds", "1 Ducks, Geese, and Swans", *(f"{key} {name}" for key, name in names.items())
        ),
        "nabirds/hierarchy.txt": lines("1 0", "295 1"),
        "nabirds/images.txt": lines(*(f"{i} {k:04d}/{i.replace('-', '')}.jpg" for k, i, _ in images)),
        "nabirds/image_class_labels.txt": lines(*(f"{i} {k}" for k, i, _ in images)),
        "nabirds/train_test_split.txt": lines(*(f"{i} {int(train)}" for _, i, train in images)),
    }
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for key, image, train in images:
        name = f"{image.replace('-', '')}.jpg"
        members[f"nabirds/images/{key:04d}/{name}"] = jpeg(key)
        expected["train" if train else "test"][name] = names[key]
    return Toy(sets.NABirds, {"nabirds.tar.gz": tar(members)}, expected)


def aircraft() -> Toy:
    names = ["707-320", "747-100", "DC-8"]
    data = "fgvc-aircraft-2013b/data"
    members = {f"{data}/variants.txt": lines(*names)}
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    listed: dict[str, list[str]] = {split: [] for split in ("train", "val", "trainval", "test")}
    for number in range(18):
        split, image, name = ("train", "val", "test")[number % 3], f"{number:07d}", names[number // 6]
        members[f"{data}/images/{image}.jpg"] = jpeg(number // 6)
        for part in (split, *(["trainval"] if split != "test" else [])):
            listed[part].append(f"{image} {name}")
        expected["test" if split == "test" else "train"][f"{image}.jpg"] = name
    for split, rows in listed.items():
        members[f"{data}/images_variant_{split}.txt"] = lines(*rows)
    return Toy(sets.Aircraft, {"fgvc-aircraft-2013b.tar.gz": tar(members)}, expected)


def cars() -> Toy:
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo 2012"]
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    images: dict[str, Files] = {"train": {}, "test": {}}
    annotations = {}
    for split, count in (("train", 5), ("test", 2)):
        rows = np.zeros((1, 3 * count), [(name, object) for name in fields])
        for index in range(3 * count):
            label, file = index % 3, f"{split}{index + 1:05d}.jpg"
            rows[0, index] = (1, 1, 40, 30, np.uint8(label + 1), file)
            images[split][f"cars_{split}/{file}"] = jpeg(label)
            expected[split][file] = names[label]
        annotations[split] = mat(annotations=rows)
    devkit = {
        "devkit/cars_meta.mat": mat(class_names=np.array([names], object)),
        "devkit/cars_train_annos.mat": annotations["train"],
    }
    files = {
        "cars_train.tgz": tar(images["train"]),
        "cars_test.tgz": tar(images["test"]),
        "car_devkit.tgz": tar(devkit),
        "cars_test_annos_withlabels.mat": annotations["test"],
    }
    return Toy(sets.Cars, files, expected)


def flowers102() -> Toy:
    ids = {"train": [3, 1, 5], "val": [2, 4, 9], "test": [6, 7, 8, 10, 11, 12]}
    labels = [1, 2, 3] * 4
    members = {f"jpg/image_{i:05d}.jpg": jpeg(labels[i - 1]) for i in range(1, 13)}
    files = {
        "102flowers.tgz": tar(members),
        "imagelabels.mat": mat(labels=np.array([labels], np.uint8)),
        "setid.mat": mat(trnid=[ids["train"]], valid=[ids["val"]], tstid=[ids["test"]]),
    }
    names = {1: "pink primrose", 2: "hard-leaved pocket orchid", 3: "canterbury bells"}
    expected = {s: {f"image_{i:05d}.jpg": names[labels[i - 1]] for i in ids[s]} for s in SPLITS}
    return Toy(sets.Flowers, files, expected)


def pets() -> Toy:
    breeds = {"Abyssinian": "Abyssinian", "american_bulldog": "American Bulldog", "Ragdoll": "Ragdoll"}
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    images: Files = {}
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, (file, breed) in enumerate(breeds.items(), 1):
        for number in range(1, 7):
            split = "trainval" if number < 5 else "test"
            rows[split].append(f"{file}_{number} {label} {1 + (file == 'american_bulldog')} 1")
            images[f"images/{file}_{number}.jpg"] = jpeg(label)
            expected["train" if number < 5 else "test"][f"{file}_{number}.jpg"] = breed
    annotations = {f"annotations/{split}.txt": lines(*rows[split]) for split in rows}
    files = {"images.tar.gz": tar(images), "annotations.tar.gz": tar(annotations)}
    return Toy(sets.Pets, files, expected)


def dogs() -> Toy:
    names = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02116738-African_hunting_dog"]
    expected: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    images: Files = {}
    listed: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, name in enumerate(names):
        for number in range(6):
            split, file = "train" if number < 4 else "test", f"{name[:9]}_{number}.jpg"
            images[f"Images/{name}/{file}"] = jpeg(label)
            listed[split].append((f"{name}/{file}", label + 1))
            expected[split][file] = name
    lists = {
        f"{split}_list.mat": mat(
            file_list=np.array([[file] for file, _ in rows], object),
            labels=np.array([[label] for _, label in rows], np.uint8),
        )
        for split, rows in listed.items()
    }
    return Toy(sets.Dogs, {"images.tar": tar(images, "w"), "lists.tar": tar(lists, "w")}, expected)


TOYS: dict[str, Callable[[], Toy]] = {
    toy.__name__: toy for toy in (cub200, nabirds, aircraft, cars, flowers102, pets, dogs)
}
BY_HAND = ("nabirds", "cars")
Publish = Callable[..., Toy]

NOBODY = "http://127.0.0.1:9/"  # nothing listens on this port


@dataclass
class Site:
    """A web server: the files it has, and those that it breaks off in the middle of."""

    url: str = ""
    files: Files = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path[1:]
            if name not in site.files:
                self.send_error(404)
                return
            content = site.files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in site.broken else content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(site: Site, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Have a toy set where the real one would be downloaded from, with its own checksums."""

    def publish(toy: Toy, url: str = site.url) -> Toy:
        site.files |= toy.files
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in toy.files.items()}
        assert [file.name for file in toy.kind.files] == list(toy.files)
        files = tuple(
            replace(file, md5=md5[file.name], url=file.url and url + file.name)
            for file in toy.kind.files
        )
        monkeypatch.setattr(toy.kind, "files", files)
        monkeypatch.setattr(toy.kind, "counts", tuple(len(toy.expected[split]) for split in SPLITS))
        if toy.kind is sets.Flowers:  # torchvision knows two checksums and the names itself
            monkeypatch.setattr(Flowers102, "classes", Flowers102.classes[:3])
            known = {"label": "imagelabels.mat", "setid": "setid.mat"}
            sums = {key: (name, md5[name]) for key, name in known.items()}
            monkeypatch.setattr(Flowers102, "_file_dict", sums)
        return toy

    return publish


def data(name: str, root: Path, *overrides: str) -> PublicSet:
    small = [f"data={name}", f"data.root={root}", "data.size=32", "data.num_workers=0", *overrides]
    return instantiate(configure(*small).data)  # type: ignore[no-any-return]


def place(toy: Toy, root: Path) -> None:
    """Put the published files where a person is told to."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in toy.files.items():
        (root / name).write_bytes(content)


def found(images: PublicSet) -> dict[str, dict[str, str]]:
    """As `Toy.expected`, of images that can all be opened."""
    splits = {split: getattr(images, split) for split in SPLITS}
    for samples in splits.values():
        for path, _ in samples:
            Image.open(path).load()
    return {
        split: {Path(path).name: images.classes[label] for path, label in samples}
        for split, samples in splits.items()
    }


@pytest.mark.parametrize("name", TOYS)
def test_official_split_of_what_was_published(name: str, publish: Publish, tmp_path: Path) -> None:
    toy = publish(TOYS[name]())
    root = tmp_path / "data" / name
    if name in BY_HAND:
        place(toy, root)
    images = data(name, root, "data.val_fraction=0")
    images.prepare_data()
    images.setup()
    assert found(images) == toy.expected
    assert [path.name for path in root.glob(".unfinished*")] == []
    batch, labels = next(iter(images.train_dataloader()))
    assert batch.shape[1:] in ((3, 29, 29), (3, 32, 32)) and batch.dtype == torch.uint8
    assert labels.max() < len(images.classes)


@pytest.mark.parametrize("name", TOYS)
def test_a_set_that_is_there_is_used_and_nothing_written(
    name: str, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = publish(TOYS[name]())
    root = tmp_path / "data"
    place(toy, root)
    data(name, root).prepare_data()
    publish(toy, NOBODY)
    for file in toy.files:
        (root / file).unlink()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for either in (root, root / toy.kind.folder):  # the folder that holds it, or the set's own
        images = data(name, either, "data.val_fraction=0")
        images.prepare_data()
        images.setup()
        assert found(images) == toy.expected
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("name", BY_HAND)
def test_what_no_program_can_fetch_is_named_with_its_owner_and_place(
    name: str, publish: Publish, tmp_path: Path
) -> None:
    toy = publish(TOYS[name]())
    root = tmp_path / "data" / name
    with pytest.raises(UserError) as told:
        data(name, root).prepare_data()
    owner = {"nabirds": "dl.allaboutbirds.org/nabirds", "cars": "github.com/pytorch/vision/issues/7545"}
    assert all(word in str(told.value) for word in (owner[name], *toy.files, str(root)))
    place(toy, root)
    (root / next(iter(toy.files))).unlink()
    with pytest.raises(UserError, match=next(iter(toy.files))):
        data(name, root).prepare_data()


@pytest.mark.parametrize("name", sorted(set(TOYS) - set(BY_HAND)))
def test_without_internet_one_sentence_names_the_file_and_its_place(
    name: str, publish: Publish, tmp_path: Path
) -> None:
    toy = publish(TOYS[name](), NOBODY)
    root = tmp_path / "data" / name
    file = toy.kind.files[0].name
    with pytest.raises(UserError) as told:
        data(name, root).prepare_data()
    assert NOBODY + file in str(told.value) and str(root / file) in str(told.value)
    assert "\n" not in str(told.value)
    place(toy, root)  # as told
    images = data(name, root, "data.val_fraction=0")
    images.prepare_data()
    images.setup()
    assert found(images) == toy.expected


def test_a_broken_off_download_leaves_nothing_and_the_next_run_starts_over(
    publish: Publish, site: Site, tmp_path: Path
) -> None:
    toy = publish(pets())
    site.broken = {"annotations.tar.gz"}
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"annotations\.tar\.gz broke off"):
        data("pets", root).prepare_data()
    assert {path.name for path in root.iterdir() if path.name[0] != "."} == {"images.tar.gz"}
    site.broken = set()
    del site.files["images.tar.gz"]  # it is there, and not fetched again
    images = data("pets", root, "data.val_fraction=0")
    images.prepare_data()
    images.setup()
    assert found(images) == toy.expected


def test_another_file_than_the_published_one_is_refused_and_never_overwritten(
    publish: Publish, site: Site, tmp_path: Path
) -> None:
    publish(cub200())
    site.files["CUB_200_2011.tgz"] = tar({"CUB_200_2011/images.txt": b"1 forged.jpg"})
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"CUB_200_2011\.tgz broke off or is another file"):
        data("cub200", root).prepare_data()
    assert [path for path in root.rglob("*") if path.name[0] != "."] == []
    (root / "CUB_200_2011.tgz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"CUB_200_2011\.tgz is damaged, or not the published file"):
        data("cub200", root).prepare_data()
    assert (root / "CUB_200_2011.tgz").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../evil.txt", "CUB_200_2011/../../evil.txt"])
def test_an_archive_cannot_write_outside_its_folder(
    name: str, publish: Publish, tmp_path: Path
) -> None:
    members = {"CUB_200_2011/images.txt": b"", name: b"evil"}
    publish(replace(cub200(), files={"CUB_200_2011.tgz": tar(members)}))
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"cannot unpack .*CUB_200_2011\.tgz"):
        data("cub200", root).prepare_data()
    assert not list(tmp_path.rglob("evil.txt"))
    assert [path.name for path in root.iterdir() if path.name[0] != "."] == ["CUB_200_2011.tgz"]


def test_an_absolute_name_in_an_archive_is_below_its_folder_too(
    publish: Publish, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.txt"
    members = {"CUB_200_2011/images.txt": b"", str(evil): b"evil"}
    publish(replace(cub200(), files={"CUB_200_2011.tgz": tar(members)}))
    data("cub200", tmp_path / "data").prepare_data()
    assert not evil.exists()


def test_a_link_out_of_the_folder_is_refused(publish: Publish, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        link = tarfile.TarInfo("CUB_200_2011")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    publish(replace(cub200(), files={"CUB_200_2011.tgz": stream.getvalue()}))
    with pytest.raises(UserError, match="cannot unpack"):
        data("cub200", tmp_path / "data").prepare_data()


def crafted(*members: tuple[str, bytes, str, int]) -> bytes:
    """A tar of members (name, type, name that a link leads to, size)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, target, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, size
            archive.addfile(member, io.BytesIO(bytes(min(size, 1 << 20))) if size < 1 << 20 else None)
    return stream.getvalue()


def test_links_and_devices_of_an_archive_are_not_made(tmp_path: Path) -> None:
    links = [("a/link", tarfile.SYMTYPE, "f", 0), ("a/hard", tarfile.LNKTYPE, "a/f", 0)]
    (tmp_path / "a.tar").write_bytes(crafted(("a/f", tarfile.REGTYPE, "", 9), *links))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a", "f"]
    for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
        (tmp_path / "a.tar").write_bytes(crafted(("a/zero", kind, "", 0)))
        with pytest.raises(UserError, match="cannot unpack"):
            unpack(tmp_path / "a.tar", tmp_path / "more")


def test_an_archive_of_far_more_than_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(crafted(("a", tarfile.REGTYPE, "", 1 << 40)))
    with pytest.raises(UserError, match="a is larger than images can be"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


NAMES = st.lists(
    st.sampled_from(("..", "a", "b", "", ".", "~", "\n", "x" * 300, "\udcff", "C:")), max_size=5
)
MEMBERS = st.lists(
    st.tuples(
        NAMES.map("/".join),
        st.sampled_from((b"0", b"0", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"x", b"S")),
        NAMES.map("/".join),
        st.sampled_from((0, 3, 3, 1000, 1 << 50)),
    ),
    max_size=6,
)
SAFE = [("a", b"5", "", 0), ("a/b", b"0", "", 700), ("a/l", b"2", "b", 0), ("x" * 200, b"0", "", 9)]


@pytest.mark.fuzz
def test_no_archive_writes_outside_its_folder(tmp_path: Path) -> None:
    members = {"a/b": b"some bytes" * 100, "a/c": b"others"}
    seeds = [crafted(*SAFE), *(tar(members, mode) for mode in ("w", "w:gz", "w:bz2", "w:xz"))]
    archive, folder = tmp_path / "a.tar", tmp_path / "in" / "out"

    @given(MEMBERS.map(lambda each: crafted(*each)) | mutated(seeds))
    def holds(content: bytes) -> None:
        archive.write_bytes(content)
        with bounded():
            try:
                unpack(archive, folder)
            except UserError as error:
                assert str(error).startswith(f"cannot unpack {archive}: ")
        assert {*tmp_path.iterdir(), *folder.parent.iterdir()} == {archive, folder.parent, folder}
        assert all(not path.is_symlink() for path in folder.rglob("*"))
        shutil.rmtree(folder.parent)

    holds()


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TOYS)
def test_lists_of_a_set_are_read_or_told_in_a_sentence(
    name: str, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = publish(TOYS[name]())
    place(toy, tmp_path)
    images = data(name, tmp_path)
    images.prepare_data()
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda _: True)  # or none but its own is read
    folder = tmp_path / toy.kind.folder
    lists = {p: p.read_bytes() for p in folder.rglob("*") if p.suffix in (".txt", ".mat")}

    @settings(max_examples=settings.default.max_examples // 20)  # each starts a process
    @given(st.sampled_from(sorted(lists)), mutated(list(lists.values())))
    def holds(changed: Path, content: bytes) -> None:
        changed.write_bytes(content)
        with bounded():
            try:
                assert all(Path(path).is_file() for path in images._layout().paths)
            except UserError as error:
                assert str(error).startswith(str(folder)) and "\n" not in str(error)
        changed.write_bytes(lists[changed])

    holds()


def test_a_damaged_archive_is_said_to_be(publish: Publish, tmp_path: Path) -> None:
    toy = cub200()
    half = toy.files["CUB_200_2011.tgz"][: len(toy.files["CUB_200_2011.tgz"]) // 2]
    publish(replace(toy, files={"CUB_200_2011.tgz": half}))
    with pytest.raises(UserError, match="cannot unpack"):
        data("cub200", tmp_path / "data").prepare_data()
    assert not (tmp_path / "data" / "CUB_200_2011").exists()


def test_a_set_with_missing_parts_is_not_trained_on(publish: Publish, tmp_path: Path) -> None:
    toy = publish(cub200())
    data("cub200", tmp_path).prepare_data()
    place = tmp_path / toy.kind.folder
    next(place.rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match=r"has 17 of the set's 18 images, for example .*jpg"):
        data("cub200", tmp_path).setup()
    (place / "train_test_split.txt").write_text("1 1\n")
    with pytest.raises(UserError, match="not as published"):
        data("cub200", tmp_path).setup()
    (place / "train_test_split.txt").unlink()
    with pytest.raises(UserError, match="lacks train_test_split"):
        data("cub200", tmp_path).setup()


def test_a_list_that_takes_its_reader_down_is_told(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(dogs())
    images = data("dogs", tmp_path)
    images.prepare_data()
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: os._exit(1))
    with pytest.raises(UserError, match=r"stanford_dogs is not as published"):
        images.setup()


def test_a_place_that_cannot_be_written_is_told(publish: Publish, tmp_path: Path) -> None:
    publish(cub200())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot make .*CUB_200_2011"):
        data("cub200", tmp_path / "file").prepare_data()


def test_validation_is_drawn_from_training_unless_the_set_has_its_own(
    publish: Publish, tmp_path: Path
) -> None:
    for name, sizes in (("aircraft", (9, 3, 6)), ("flowers102", (3, 3, 6))):
        toy = publish(TOYS[name]())
        images = data(name, tmp_path / name, "data.val_fraction=0.25")
        images.prepare_data()
        images.setup()
        assert tuple(len(samples) for samples in found(images).values()) == sizes
        assert found(images)["test"] == toy.expected["test"]


def test_some_classes_of_a_set(publish: Publish, tmp_path: Path) -> None:
    publish(cub200())
    choice = "data.classes=[001.Black_footed_Albatross,003.Sooty_Albatross]"
    images = data("cub200", tmp_path, choice)
    images.prepare_data()
    images.setup()
    assert images.classes == ["001.Black_footed_Albatross", "003.Sooty_Albatross"]
    assert len(images.train) + len(images.val) == 8 and len(images.test) == 4


@pytest.mark.slow
def test_both_stages_on_a_set_from_the_web(publish: Publish, tmp_path: Path) -> None:
    publish(aircraft())
    options = [
        "experiment=bcnn",
        "data=aircraft",
        f"data.root={tmp_path / 'data'}",
        "data.size=32",
        "data.num_workers=0",
        "data.val_fraction=0.25",
        "model.weights=random",
        "trainer=cpu",
        "trainer.precision=32-true",
        "finetune.epochs=1",
        "finetune.batch_size=6",
        f"output={tmp_path / 'out'}",
    ]
    run(configure(*options))
    model = load_model(tmp_path / "out" / "finetune" / "best.ckpt")
    assert (model.classes, model.preprocessing.resize) == (["707-320", "747-100", "DC-8"], "squash")
