"""Distillation: what a student learns from, what it may be tested on, and what the report compares."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, batches, quiet_trainer, run, write, write_classes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import resize

from bcnn.data.sampler import NO_LABEL
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.distillation import Teacher, divergence
from bcnn.training.module import BCNNModule
from bcnn.utils.errors import UserError

STUDENT = [SMALL, "stage=both", "finetune.epochs=2", "finetune.optimizer.lr=1e-3"]


def test_the_divergence_is_that_of_kullback_and_leibler() -> None:
    logits, other = torch.randn(
        2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    p, q = other.softmax(1), logits.softmax(1)
    expected = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i in range(5) for k in range(3)) / 5
    assert divergence(logits, p).item() == pytest.approx(expected, rel=1e-12)
    assert divergence(other, p).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_student_learns_its_teacher_s_answers_and_leaves_it_alone(tiny: BCNN, labelled: bool) -> None:
    """Labels, where there are any, contradict the teacher: it decides."""
    images, _ = next(iter(batches()))
    teacher = Teacher(tiny)
    tiny.head.center_on(tiny.descriptor(images).mean(dim=0).detach())
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    answers = tiny(images).argmax(dim=1)
    labels = (answers + 1) % 3 if labelled else torch.full_like(answers, NO_LABEL)
    torch.manual_seed(1)
    student = BCNN(tiny.classes, tiny.preprocessing, {"name": "tiny"})
    nn.init.normal_(student.head.weight, std=1e-2)
    module = BCNNModule(student, "finetune", lambda p: torch.optim.Adam(p, lr=1e-2), teacher=teacher)
    first = divergence(student(images), teacher(images)).item()
    trainer = quiet_trainer(max_epochs=60)
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert divergence(student(images), teacher(images)).item() < 0.3 * first
    assert ("train_loss" in trainer.callback_metrics) == labelled
    assert module.state_dict().keys() == BCNNModule(student, "last").state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_a_teacher_takes_the_crops_of_a_student_with_a_smaller_stride(tiny: BCNN) -> None:
    """Once they are resized to a multiple of its own stride."""
    tiny.preprocessing = replace(tiny.preprocessing, divisor=32)
    crops = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    expected = tiny.probabilities(tiny(resize(crops, [32, 32])))
    torch.testing.assert_close(Teacher(tiny)(crops), expected)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_classes(tmp_path / "photos", ant=16, bee=16, cat=16)
    return tmp_path / "photos"


@pytest.fixture
def teacher(photos: Path, tmp_path: Path, tiny: BCNN) -> Path:
    """A run whose network is larger than the student's, with images split by another seed."""
    words = [SMALL, "+model.backbone.channels=8", "stage=last", "data.seed=5"]
    run(photos, tmp_path / "teacher", *words)
    return tmp_path / "teacher"


def test_a_run_learns_from_a_teacher_and_from_images_without_labels(
    photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that are held out, or broken, are not learned from."""
    taught = load_model(teacher)
    assert taught.split
    others, held_out = tmp_path / "others", photos / "ant"
    for index in range(12):
        write(others / f"{index}.png", seed=50_000 + index)
    for path in held_out.iterdir():
        shutil.copy(path, others / f"copy of {path.name}")
    (others / "broken.png").write_bytes(b"\x89PNG")
    words = [*STUDENT, f"finetune.teacher={teacher}", f"data.unlabelled={others}"]
    run(photos, tmp_path / "student", *words, "data.seed=6")
    printed = capsys.readouterr().out
    left_out = "left out are 1 that cannot be decoded and 16"
    assert f"{others}: 12 images without labels; {left_out}" in printed
    student = load_model(tmp_path / "student")
    assert student.split and student.split.test == taught.split.test
    assert student.split.train > taught.split.train
    assert len(student.split.train) == len(taught.split.train) + 12
    report = (tmp_path / "student" / "report.html").read_text()
    assert "<h2>From teacher to finetune</h2>" in report and "Recall of the " in report
    assert report.count("million weights") == 2 and "12 images without labels" in report


def test_a_teacher_of_other_classes_is_refused(photos: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "cat")
    with pytest.raises(UserError, match=r"finetune\.teacher=.* on other classes .*missing: cat"):
        run(photos, tmp_path / "student", *STUDENT, f"finetune.teacher={teacher}")
