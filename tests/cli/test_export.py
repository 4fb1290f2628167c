"""`bcnn export`: what its files hold and compute, and that they replace nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, Bcnn
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VGG16_Weights
from torchvision.transforms.functional import normalize

from bcnn.cli.app import main
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import infer
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from benchmarks.harness import OriginalNet

CLASSES = ["däisy", "iris, blue", "tulip"]
PREPROCESSING = Preprocessing(64, "keep", interpolation="bicubic")


@pytest.fixture(scope="module")
def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(CLASSES, PREPROCESSING)
    model.backbone.set_normalization([0.48, 0.46, 0.41], [1 / 255] * 3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(model.head.weight)
    model.head.mean.normal_(std=0.003)
    return model.eval()


@pytest.fixture(scope="module")
def ckpt(model: BCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_model(model, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Landscape, portrait, and one that its EXIF tag turns."""
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for path, size, turn in zip(paths, [(90, 70), (66, 120), (120, 80)], (1, 1, 6), strict=True):
        noise = np.random.default_rng(size).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return paths


def batch(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def onnx_file(ckpt: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bcnn.cli.errors.raise_interruptions", lambda: None)
        assert main(["export", str(ckpt)]) == 0
    return ckpt.with_suffix(".onnx")


@pytest.mark.parametrize("count", [1, 5])
def test_onnx_computes_the_logits_for_any_batch_size(model: BCNN, onnx_file: Path, count: int) -> None:
    session = onnxruntime.InferenceSession(onnx_file)
    (logits,) = session.run(["logits"], {"images": batch(count).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(batch(count)), rtol=0, atol=1e-4)


def test_onnx_describes_itself_and_nothing_of_this_machine(onnx_file: Path) -> None:
    said = onnxruntime.InferenceSession(onnx_file).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == CLASSES
    assert (said["size"], said["resize"], said["output"]) == ("64", "keep", "logits")
    assert "short side to 64 px (bicubic, antialiased)" in said["preprocessing"]
    content = onnx.load(onnx_file)
    assert not any(node.metadata_props or node.doc_string for node in content.graph.node)
    # The upper triangle is in the file, not computed anew for every image.
    assert [node.op_type for node in content.graph.node].count("Gather") == 1
    assert not {"Floor", "Where", "Range", "NonZero"} & {node.op_type for node in content.graph.node}


def test_a_consumer_with_numpy_and_pillow_alone_agrees(
    model: BCNN, onnx_file: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet of docs/export.md, which needs neither torch nor this project."""
    text = (ROOT / "docs" / "export.md").read_text()
    code = text[text.index("import json") :].partition("```")[0]
    code = code.replace('"best.onnx"', repr(str(onnx_file)))
    for path in photos:
        names: dict[str, Any] = {}
        capsys.readouterr()
        exec(code.replace('"photo.jpg"', repr(path)), names)
        image = PREPROCESSING.evaluation()(load_image(path))
        with torch.no_grad():
            expected = model(image[None])[0]
        assert capsys.readouterr().out.strip() == CLASSES[expected.argmax()]
        atol = 0.02 * float(expected.std())
        np.testing.assert_allclose(names["logits"][0], expected, rtol=0, atol=atol)


def test_onnx_of_a_calibrated_model_marks_what_it_does_not_know(
    bcnn: Bcnn, calibrated: BCNN, tmp_path: Path
) -> None:
    save_model(calibrated, tmp_path / "m.safetensors")
    assert bcnn("export", tmp_path / "m.safetensors", "--softmax").code == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    images[2] = torch.tensor([0, 0, 128])[:, None, None]
    names = ["probabilities", "novelty"]
    probabilities, novelty = map(torch.from_numpy, session.run(names, {"images": images.numpy()}))
    torch.testing.assert_close(probabilities, calibrated.predict(images), rtol=0, atol=1e-4)
    expected = infer(calibrated, images, "32-true").novelty
    torch.testing.assert_close(novelty, expected, rtol=0, atol=1e-2)
    assert (novelty > 0).tolist() == [False, False, True]
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["thresholds"])["0.9"] == calibrated.calibration.threshold(0.9)
    assert float(said["temperature"]) == float(calibrated.calibration.temperature)


def test_pt2_runs_in_any_batch_size_and_names_its_classes(
    bcnn: Bcnn, model: BCNN, ckpt: Path, photos: list[str]
) -> None:
    outcome = bcnn("export", ckpt, "--format", "pt2", *(w for p in photos for w in ("--images", p)))
    assert outcome.code == 0
    assert "largest difference to PyTorch on 3 images: " in outcome.out
    extra = {"metadata.json": ""}
    program = torch.export.load(ckpt.with_suffix(".pt2"), extra_files=extra).module()
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == CLASSES
    for count in (1, 4):
        expected = model(batch(count)).detach()
        torch.testing.assert_close(program(batch(count)).detach(), expected, rtol=0, atol=1e-4)


def test_pth_works_in_the_original_network_under_the_original_normalisation(
    bcnn: Bcnn, model: BCNN, ckpt: Path, tmp_path: Path
) -> None:
    """The model's own normalisation is another; its first convolution makes up for that."""
    assert bcnn("export", ckpt, "--format", "pth", "--output", tmp_path / "m.pth").code == 0
    source, preset = OriginalNet(len(CLASSES)), VGG16_Weights.IMAGENET1K_V1.transforms()
    source.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True), strict=True)
    with torch.no_grad():
        expected = model(batch(3))
        found = source(normalize(batch(3) / 255, preset.mean, preset.std))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.std()))


def test_mistakes_are_one_sentence_and_nothing_is_replaced(
    bcnn: Bcnn, ckpt: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.onnx").write_text("precious")
    for words, sentence in (
        (["--output", tmp_path / "mine.onnx"], "mine.onnx exists"),
        (["--format", "safetensors"], "best.safetensors exists"),
        (["--output", tmp_path / "model.bin"], "has to end in .onnx"),
        (["--precision", "int8", "--output", tmp_path / "m.onnx"], "add --images IMAGES"),
        (["--precision", "float16", "--format", "pt2"], "float16 is for --format onnx"),
    ):
        outcome = bcnn("export", ckpt, *words)
        assert outcome.code == 1 and sentence in outcome.err
    assert (tmp_path / "mine.onnx").read_text() == "precious"


@pytest.mark.slow
def test_weights_beside_an_onnx_file_come_with_it_and_replace_nothing(
    bcnn: Bcnn, tiny: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above 2 GB, which this is not."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    save_model(tiny, tmp_path / "m.safetensors")
    (tmp_path / "m.onnx.data").write_text("precious")
    outcome = bcnn("export", tmp_path / "m.safetensors")
    assert outcome.code == 1 and "m.onnx.data exists" in outcome.err
    (tmp_path / "m.onnx.data").unlink()
    assert bcnn("export", tmp_path / "m.safetensors", "--softmax").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "m.safetensors"}
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(["probabilities"], {"images": images.numpy()})
    expected = tiny(images).softmax(1).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
