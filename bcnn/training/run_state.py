"""What a run writes down so that it can be resumed: its options, its images, the stages that ended."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import Neighbour
from bcnn.evaluation.results import PREDICTIONS
from bcnn.training.schema import working_folder
from bcnn.utils.device import fastest_precision
from bcnn.utils.errors import UserError
from bcnn.utils.files import RESULT, atomic_write, read_json, remove_parts, validate_writable

RUN = "run.yaml"
HELD_OUT = "held_out.npz"


@dataclass
class StageResult:
    """What a stage ended with."""

    stage: str
    checkpoint: Path | None  # None: fast_dev_run keeps none
    metrics: dict[str, float]  # of its weights, on validation and test images
    failure: str = ""
    predictions: Predictions | None = None  # of test images, or else validation images; on rank zero
    held_out: Predictions | None = None  # of training images, in cross-validation
    device: str = ""  # that computed, in words
    nearest: dict[int, list[Neighbour]] = field(default_factory=dict)  # of mistakes; not written

    def write(self, folder: Path) -> None:
        """Write the result into the folder of a run, which can be moved: paths are relative."""
        checkpoint = self.checkpoint.resolve() if self.checkpoint else None
        if checkpoint and checkpoint.is_relative_to(folder.resolve()):
            checkpoint = checkpoint.relative_to(folder.resolve())
        plain = {
            "checkpoint": checkpoint and str(checkpoint),
            "metrics": self.metrics,
            "failure": self.failure,
            "device": self.device,
        }
        for found, name in ((self.predictions, PREDICTIONS), (self.held_out, HELD_OUT)):
            if found:
                found.save(folder / self.stage / name)
        with atomic_write(folder / self.stage / RESULT) as part:
            part.write_text(json.dumps(plain, indent=1))

    @classmethod
    def of(cls, checkpoint: Path) -> "StageResult | None":
        """Return the result of the stage that ended with a file; None where no stage of a run did."""
        result = cls.read(checkpoint.parent.parent, checkpoint.parent.name)
        return result if result and result.checkpoint == checkpoint else None

    @classmethod
    def read(cls, folder: Path, stage: str) -> "StageResult | None":
        """Return the result of a stage in the folder of a run; None where it has not ended."""
        file = folder / stage / RESULT
        if not file.is_file():
            return None
        plain = read_json(file)
        if plain["checkpoint"]:
            plain["checkpoint"] = folder / plain["checkpoint"]
        files = (folder / stage / name for name in (PREDICTIONS, HELD_OUT))
        predictions, held_out = (Predictions.load(f) if f.is_file() else None for f in files)
        return cls(stage, **plain, predictions=predictions, held_out=held_out)


@dataclass
class RunState:
    """A run, written down in `output/run.yaml`."""

    folder: Path
    overrides: list[str] | None  # what it was composed from; None without a command line
    config: dict[str, Any]  # all options, resolved
    directory: str  # the working folder, which relative paths are relative to
    precision: str  # Lightning's name; a resumed run keeps it
    identity: str = field(default_factory=lambda: uuid4().hex[:8])  # tells runs apart
    images: str = ""  # digest of the labelled images and their splits
    finished: bool = False

    @classmethod
    def create(cls, cfg: DictConfig, overrides: list[str] | None) -> "RunState":
        """Return the state of a new run; it is written when there is something to train."""
        folder = Path(cfg.output)
        _validate_new(folder)
        precision = str(cfg.trainer.precision)
        if precision == "auto":
            precision = fastest_precision(cfg.trainer.accelerator)
        return cls(folder, overrides, _plain(cfg), str(working_folder()), precision)

    @classmethod
    def resume(cls, cfg: DictConfig) -> "RunState":
        """Return the state of the run in `cfg.output`; raise UserError if it had other options."""
        state = cls.read(Path(cfg.output))
        for name, (before, now) in _differences(state.config, _plain(cfg)).items():
            raise UserError(
                f"resume={state.folder}: {name} was {before!r} when the run began, and is {now!r} now"
            )
        _remove_leftovers(state.folder)
        return state

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Return the state that is written in a folder."""
        try:
            plain: Any = OmegaConf.to_container(OmegaConf.load(folder / RUN))
            return cls(**plain | {"folder": folder})
        except (OSError, YAMLError, OmegaConfBaseException, TypeError) as error:
            raise UserError(
                f"resume={folder}: no run to resume: {RUN} is missing or damaged"
            ) from error

    @rank_zero_only
    def write(self) -> None:
        """Write the state into the folder of the run."""
        plain = asdict(self)
        del plain["folder"]
        with atomic_write(self.folder / RUN) as part:
            OmegaConf.save(OmegaConf.create(plain), part)

    def begin(self, data: FineGrainedDataModule) -> None:
        """Write the state before the first stage; raise UserError if a resumed run has other images."""
        images = data_digest(data)
        if self.images not in ("", images):
            raise UserError(
                f"{data.root}: the images or their classes changed since {self.folder} began: restore "
                "them, or start a new run"
            )
        self.images = images
        self.write()

    @rank_zero_only
    def finish(self) -> None:
        """Note that nothing is left to do."""
        self.finished = True
        self.write()


def resumable_overrides(state: RunState, given: list[str]) -> list[str]:
    """Return the overrides to compose the configuration of a resumed run from.

    A run's folder may come from somebody else. So an override in it that names code to run, by
    `_target_` or in a group of Hydra's own, counts only where `given`, the other words of the command,
    repeats it.
    """
    stored = state.overrides or []
    code = [word for word in stored if "_target_" in word or word.lstrip("+~").startswith("hydra")]
    if missing := [word for word in code if word not in given]:
        raise UserError(
            f"{state.folder / RUN} names classes to load: if you trust it, repeat {' '.join(missing)}"
        )
    if others := [word for word in given if word not in stored]:
        raise UserError(f"resume= continues with the options of the run: leave out {others[0]}")
    return stored


def data_digest(data: FineGrainedDataModule) -> str:
    """Return a digest of the classes, and of the content, class and split, if any, of every image."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    images = sorted(
        (data.digests[path], data.classes[label], split)
        for split, samples in splits.items()
        for path, label in samples
    )
    unlabelled = sorted(finding.digest for finding in data.unlabelled_findings.values())
    return hashlib.sha256(json.dumps([data.classes, images, unlabelled]).encode()).hexdigest()


@rank_zero_only
def _validate_new(folder: Path) -> None:
    validate_writable(folder)
    for name in (RUN, "figures.json", "last", "finetune"):
        if (folder / name).exists():
            raise UserError(
                f"output={folder} holds a run already ({name}): choose another folder, or resume the "
                f"run by resume={folder}"
            )


@rank_zero_only
def _remove_leftovers(folder: Path) -> None:
    """Remove partial files, and Lightning's checkpoints of a SLURM job, from within an epoch."""
    remove_parts(folder)
    for state in folder.glob("*/hpc_ckpt_*.ckpt"):
        state.unlink()


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return all options but the folder of the run, which may be moved."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return {name: value for name, value in plain.items() if name != "output"}


def _differences(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the options that differ, by name, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in before.keys() | now.keys():
            found |= _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        return found
    return {} if before == now else {name: (before, now)}
