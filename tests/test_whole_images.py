"""`data.resize=whole`: evaluation sees images of any shape, whole, wherever it takes place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import FINETUNE, ROOT, SMALL, Bcnn, Tiny, build, configure, read_csv, set_up, toy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from bcnn.data.batches import stack_images
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.explain import explain
from bcnn.evaluation.inference import infer
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.export import FORMATS, export_model
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.run import train
from bcnn.utils.device import autocast
from bcnn.utils.errors import UserError

SIZES = [(96, 48), (48, 48), (40, 80), (64, 32), (300, 20)]  # the first and the fourth of one shape


def noise(size: tuple[int, int], colour: int = 0) -> Image.Image:
    pixels = np.random.default_rng([*size, colour]).normal(100, 50, (*size[::-1], 3))
    pixels[..., colour] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder of three colours, in five shapes each."""
    for label, name in enumerate(("red", "green", "blue")):
        for split in ("train", "test"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index, (width, height) in enumerate(SIZES):
                image = noise((width, height + 2 * (split == "test")), label)
                image.save(tmp_path / "photos" / split / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def whole(tiny: BCNN) -> BCNN:
    nn.init.normal_(tiny.backbone.features.weight)  # no two images are alike to it
    tiny.preprocessing = replace(tiny.preprocessing, resize="whole")
    return tiny


def test_what_lies_at_the_edge_counts_in_a_whole_image_alone(whole: BCNN) -> None:
    plain = noise((96, 48))
    marked = plain.copy()
    marked.paste("blue", (80, 0, 96, 48))
    for resize, sees in (("keep", False), ("whole", True)):
        whole.preprocessing = replace(whole.preprocessing, resize=resize)
        change = (whole.predict(plain) - whole.predict(marked)).abs().max()
        assert (change > 0.01) if sees else (change == 0)


@pytest.mark.parametrize("mirror", [False, True])
@given(order=st.permutations(range(5)), count=st.integers(1, 5))
def test_a_batch_gives_what_each_image_gives_alone(
    whole: BCNN, mirror: bool, order: list[int], count: int
) -> None:
    images = [whole.preprocessing.evaluation()(noise(SIZES[index])) for index in order[:count]]
    found = infer(whole, stack_images(images), "32-true", mirror)
    alone = [infer(whole, image[None], "32-true", mirror).logits for image in images]
    torch.testing.assert_close(found.logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_stored_descriptors_are_of_the_whole_image_and_its_mirror_image(
    photos: Path, whole: BCNN
) -> None:
    data = set_up(photos, val_fraction=0.2, num_workers=1)
    data.use_preprocessing(whole.preprocessing)
    stored, _ = build(CachedFeatureDataModule(data, whole, "32-true")).descriptors(data.train, views=2)
    images = [whole.preprocessing.evaluation()(load_image(path)) for path, _ in data.train]
    views = [[whole.descriptor(view[None]) for view in (x, x.flip(-1))] for x in images]
    expected = torch.cat([(one + other) / 2 for one, other in views])
    torch.testing.assert_close(stored[:], expected, rtol=1e-3, atol=1e-4)  # float16 on disk


@pytest.mark.parametrize("size", [(200, 80), (50, 100)])
def test_attribution_is_over_the_whole_image_and_sums_to_the_logit(
    whole: BCNN, size: tuple[int, int]
) -> None:
    found = explain(whole, noise(size))
    assert found.crop == (0, 0, *size) and found.box == pytest.approx((0, 0, *size))
    assert (found.evidence.shape[0] < found.evidence.shape[1]) == (size[0] > size[1])
    with torch.no_grad(), autocast(torch.device("cpu")):
        logits = whole(whole.preprocessing.evaluation()(noise(size))[None])[0]
    torch.testing.assert_close(found.evidence.sum(), logits[found.target], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("tiny")
def test_every_command_gives_a_trained_model_s_answer(bcnn: Bcnn, photos: Path, tmp_path: Path) -> None:
    options = [SMALL, *FINETUNE, "data.resize=whole", "data.size=48", "model.project=3"]
    train(configure(*toy(photos, *options, f"output={tmp_path / 'run'}")))
    (ckpt,) = (tmp_path / "run" / "finetune").glob("*.ckpt")
    model, paths = load_model(ckpt), sorted(map(str, (photos / "test").rglob("*.png")))
    expected = model.predict(paths)  # by Python
    answers = [
        (model.classes[int(p.argmax())], pytest.approx(float(p.max()), abs=1e-4)) for p in expected
    ]
    assert len({name for name, _ in answers}) > 1

    def answers_in(table: Path) -> list[tuple[str, float]]:
        rows = {row["image"]: row for row in read_csv(table)}
        return [(rows[path]["top1"], float(rows[path]["probability"])) for path in paths]

    assert bcnn("evaluate", ckpt, photos, "--output", tmp_path / "again").code == 0
    assert answers_in(tmp_path / "run" / "predictions.csv") == answers
    assert answers_in(tmp_path / "again" / "predictions.csv") == answers
    lines = bcnn("predict", ckpt, photos / "test", "--format", "jsonl").out.splitlines()
    likeliest = [json.loads(line)["predictions"][0] for line in lines]
    assert [(each["class"], each["probability"]) for each in likeliest] == answers
    assert bcnn("export", ckpt, "--softmax", "--output", tmp_path / "m.onnx").code == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for path, p in zip(paths, expected, strict=True):
        image = load_image(path)
        torch.testing.assert_close(explain(model, image).probabilities, p, rtol=0, atol=1e-4)
        x = model.preprocessing.evaluation()(image)[None]
        (found,) = session.run(["probabilities"], {"images": x.numpy()})
        np.testing.assert_allclose(found[0], p, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "pooling"), [("onnx", "sqrt"), ("pt2", "sqrt"), ("pt2", "newton_schulz")]
)
def test_exported_models_take_any_sides(tiny: BCNN, tmp_path: Path, format: str, pooling: str) -> None:
    """With fewer locations than channels, and with more."""
    backbone = {"name": "tiny", "channels": 96}
    model = BCNN(["a", "b"], Preprocessing(32, "whole"), backbone, {"name": pooling}).eval()
    nn.init.normal_(model.head.weight)
    export_model(model, tmp_path / f"m.{format}", format)
    exported = FORMATS[format][1](tmp_path / f"m.{format}")
    for shape in ((1, 3, 8, 8), (3, 3, 8, 64), (2, 3, 40, 24), (5, 3, 60, 60)):
        images = torch.randint(256, shape, dtype=torch.uint8)
        torch.testing.assert_close(exported(images), model(images), rtol=0, atol=5e-3)


def test_a_consumer_with_numpy_and_pillow_alone_sees_the_whole_image(
    whole: BCNN, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet of docs/export.md."""
    export_model(whole, tmp_path / "m.onnx")
    text = (ROOT / "docs" / "export.md").read_text()
    code = text[text.index("import json") :].partition("```")[0]
    code = code.replace("best.onnx", str(tmp_path / "m.onnx"))
    for width, height in SIZES:
        noise((width, height)).resize((4 * width, 4 * height)).save(tmp_path / "photo.png")
        names: dict[str, Any] = {}
        exec(code.replace("photo.jpg", str(tmp_path / "photo.png")), names)
        x = whole.preprocessing.evaluation()(load_image(tmp_path / "photo.png"))
        assert np.abs(names["image"] - x.permute(1, 2, 0).numpy().astype(int)).max() <= 2
        assert capsys.readouterr().out.strip() == whole.classes[int(whole(x[None]).argmax())]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("start", ["new", "checkpoint"])
def test_a_share_that_whole_images_have_no_use_for_is_refused(
    whole: BCNN, photos: Path, tmp_path: Path, start: str
) -> None:
    save_model(whole, tmp_path / "m.safetensors")
    known = [f"ckpt={tmp_path / 'm.safetensors'}"] if start == "checkpoint" else ["data.resize=whole"]
    options = [SMALL, "stage=last", *known, "data.crop_pct=0.5", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"data\.crop_pct=0\.5 has no effect on data\.resize=whole"):
        train(configure(*toy(photos, *options)))


@pytest.mark.usefixtures("tiny")
def test_a_backbone_of_squares_alone_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_features(self: Tiny, x: Tensor) -> Tensor:
        assert x.shape[2] == x.shape[3]
        return self.features(x).relu()

    monkeypatch.setattr(Tiny, "forward_features", forward_features)
    options = [SMALL, "stage=last", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"data\.resize=whole: this backbone takes square images alone"):
        train(configure(*toy(photos, *options, "data.resize=whole")))
    train(configure(*toy(photos, *options)))
    assert "cuts off 50% of the median image" in (tmp_path / "out" / "train.log").read_text()
