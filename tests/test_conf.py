"""Every configuration composes, and what it describes can be made; README's options are there."""

import re
import shlex

import pytest
import torch
from conftest import ROOT, configure
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.training.config import validate

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in (ROOT / "conf").glob("*/")
}
PLACES = {"scheduler": "scheduler@finetune.scheduler", "optimizer": "optimizer@finetune.optimizer"}
CHOICES = [f"{PLACES.get(name, name)}={choice}" for name in GROUPS for choice in GROUPS[name]]
PAGES = [(ROOT / "README.md").read_text(), *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
PAGE = (ROOT / "docs" / "options.md").read_text()
OPTIONS = PAGE[PAGE.index("| option of `bcnn train`, with its default for") :].split("\n\n")[0]
EXAMPLES = dict.fromkeys(("FLOWERS", "GROCERIES", "CARS"), "data=folder")
EXAMPLES |= dict.fromkeys(("NAME", "SET"), "cub200")
COMMANDS = {
    re.sub("|".join(EXAMPLES), lambda found: EXAMPLES[found[0]], command)
    for page in PAGES
    for command in re.findall(r"bcnn train(?: [^`#\n]*)?", page)
    if not re.search("…|resume=|--help", command)
}


@pytest.mark.parametrize("choice", CHOICES)
def test_composes_without_a_missing_value(choice: str) -> None:
    cfg = configure(choice, "output=here", *["data.root=images"] * (choice == "data=folder"))
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("data", GROUPS["data"])
def test_data_instantiates(data: str) -> None:
    cfg = configure(f"data={data}", "data.root=images")
    assert isinstance(instantiate(cfg.data), FineGrainedDataModule)


@pytest.mark.parametrize("schedule", GROUPS["scheduler"])
@pytest.mark.parametrize(
    "choice", ["last=sgd", "last=original", "finetune=default", "finetune=original"]
)
def test_optimizer_and_schedule_instantiate(choice: str, schedule: str) -> None:
    name = choice.split("=")[0]
    cfg = configure(choice, f"scheduler@{name}.scheduler={schedule}")[name]
    optimizer = instantiate(cfg.optimizer)([torch.zeros(2, requires_grad=True)])
    assert optimizer.defaults["lr"] == cfg.optimizer.lr
    if cfg.scheduler is not None:
        assert instantiate(cfg.scheduler)(optimizer, total_steps=10).get_last_lr()


def test_the_original_recipe_is_the_original_s() -> None:
    cfg = configure("experiment=original")
    for stage, rate in ((cfg.last, 1.0), (cfg.finetune, 0.01)):
        optimizer = stage.optimizer
        assert optimizer._target_ == "torch.optim.SGD"
        assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (rate, 0.9, 1e-5)
        assert stage.scheduler is None and stage.loss.label_smoothing == 0
    assert cfg.last.solver == "sgd" and cfg.data.train_scale is None
    assert cfg.finetune.polyak is None and not cfg.finetune.centering


def test_butterflies_come_with_random_weights_and_folders_with_imagenet() -> None:
    assert configure().model.weights == "random"
    assert configure("data=folder", "data.root=x").model.weights == "imagenet"


@pytest.mark.parametrize(
    ("name", "resize", "side"),
    [("cub200", "keep", 448), ("aircraft", "squash", 512), ("cars", "squash", 448)],
)
def test_protocol_of_the_papers(name: str, resize: str, side: int) -> None:
    cfg = configure(f"experiment={name}")
    assert cfg.data == configure(f"data={name}").data
    assert (cfg.data.size, cfg.data.resize) == (448, resize)
    assert cfg.data.size / cfg.data.crop_pct == side
    assert (cfg.stage, cfg.model.weights) == ("both", "imagenet")
    assert type(instantiate(cfg.data)).__name__.lower() == name


RECIPES = {  # by the authors' code, each named in its file
    "bcnn": ("bilinear", None, "Adam", 1e-4, 1e-5, 45, 128, [0.556]),
    "improved": ("newton_schulz", None, "Adam", 1e-4, 1e-5, 45, 128, [0.556]),
    "isqrt": ("newton_schulz", 256, "SGD", 3e-3, 1e-4, 40, 10, [0.5]),
    "cbp": ("compact", None, "SGD", 1e-3, 5e-4, 100, 10, None),
}


@pytest.mark.parametrize("data", ["cub200", "nabirds"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_constants_of_its_authors_on_any_set(name: str, data: str) -> None:
    cfg = configure(f"experiment={name}", f"data={data}")
    assert cfg.data == configure(f"data={data}").data
    tuning = cfg.finetune
    assert (
        cfg.model.pooling.name,
        cfg.model.project,
        tuning.optimizer._target_.removeprefix("torch.optim."),
        tuning.optimizer.lr,
        tuning.optimizer.weight_decay,
        tuning.epochs,
        tuning.batch_size * tuning.accumulate,
        tuning.scheduler and tuning.scheduler.milestones,
    ) == RECIPES[name]
    assert (cfg.stage, cfg.model.weights, cfg.data.size) == ("both", "imagenet", 448)
    assert tuning.polyak is None and not tuning.centering
    assert cfg.model.pooling.get("root", "signed") == (None if name == "isqrt" else "signed")
    assert cfg.model.pooling.get("centred", False) == (name == "isqrt")


def test_the_documented_defaults() -> None:
    """In the first column of its table of options."""
    folder = ["data=folder", "data.root=photos"]
    cells = " ".join(row.split("|")[1] for row in OPTIONS.splitlines()[2:])
    named = re.findall(r"`([^`]+=[^`]*)`", cells)
    assert len(named) > 20
    assert configure(*folder, *named) == configure(*folder)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_documented_commands_compose_and_are_accepted(command: str) -> None:
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    validate(configure("output=out", *(re.sub(",.*", "", word) for word in words)), words)
