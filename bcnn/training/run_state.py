"""What a run writes down to be gone on with: its configuration, and the stages that ended."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bcnn.data.splits import SplitRecord
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import Neighbour
from bcnn.evaluation.results import PREDICTIONS
from bcnn.training.checkpointing import STATE
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write

RUN = "run.yaml"
STAGE = "result.json"
HELD_OUT = "held_out.npz"
PATHS = (("", "ckpt"), ("data", "root"), ("data", "list"), ("model", "weights"))


@dataclass
class RunState:
    """Of a run, in `output/run.yaml`.

    Args:
        cfg: everything that was composed, paths being absolute and the precision that of the machine.
        words: the overrides it was composed from; None where no command did.
        identity: tells runs apart.
        images: digest of the split.
        finished: all is done, the report too.
    """

    cfg: DictConfig
    words: list[str] | None
    identity: str = field(default_factory=lambda: uuid4().hex[:8])
    images: str = ""
    finished: bool = False

    def write(self) -> None:
        """Paths become absolute: the run may be gone on with from another working folder."""
        cfg: Any = OmegaConf.to_container(self.cfg, resolve=True)
        for group, name in PATHS:
            options = cfg[group] if group else cfg
            place = Path(str(options[name])).expanduser()
            if place.is_file() or (name == "root" and place.is_dir()):
                options[name] = str(place.absolute())
        with atomic_write(Path(self.cfg.output) / RUN) as part:
            OmegaConf.save(OmegaConf.create(vars(self) | {"cfg": cfg}), part)

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self.finished = True
        self.write()
        for state in Path(self.cfg.output).glob(f"*/{STATE}"):
            state.unlink()

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """The record of a run that was interrupted, in the folder where it is now.

        Raises:
            UserError: there is none in the folder, or the run is finished.
        """
        try:
            record = cls(**{str(name): value for name, value in OmegaConf.load(folder / RUN).items()})
            record.cfg.output = str(folder)
        except (OSError, YAMLError, OmegaConfBaseException, TypeError, AttributeError) as error:
            raise UserError(
                f"resume={folder}: no run to go on with: {RUN} lacks or is damaged"
            ) from error
        if record.finished:
            raise UserError(f"resume={folder}: this run is finished, there is nothing left to do")
        return record


@dataclass
class StageResult:
    """What a stage ended with: the file of its best weights, their figures, and what went wrong."""

    stage: str
    checkpoint: Path
    metrics: dict[str, float]
    failure: str = ""
    predictions: Predictions | None = None  # of test or validation images; on rank zero
    held_out: Predictions | None = None  # of training images, in cross-validation
    nearest: dict[int, list[Neighbour]] = field(default_factory=dict)  # of the worst mistakes; not kept

    def write(self, output: Path) -> None:
        """Into the stage's folder of a run, with a relative path, since a run can be moved."""
        checkpoint, folder = self.checkpoint.resolve(), output.resolve()
        place = checkpoint.relative_to(folder) if checkpoint.is_relative_to(folder) else checkpoint
        plain = {"checkpoint": str(place), "metrics": self.metrics, "failure": self.failure}
        for found, name in ((self.predictions, PREDICTIONS), (self.held_out, HELD_OUT)):
            if found:
                found.save(output / self.stage / name)
        with atomic_write(output / self.stage / STAGE) as part:
            part.write_text(json.dumps(plain, indent=1))

    @classmethod
    def read(cls, output: Path, stage: str) -> "StageResult | None":
        """Of a stage that ended; None if it did not.

        Raises:
            UserError: the file is damaged.
        """
        file = output / stage / STAGE
        if not file.is_file():
            return None
        try:
            plain = json.loads(file.read_text())
            checkpoint = output / plain["checkpoint"]
            files = (output / stage / name for name in (PREDICTIONS, HELD_OUT))
            predictions, held_out = (Predictions.load(f) if f.is_file() else None for f in files)
            return cls(
                stage,
                checkpoint,
                dict(plain["metrics"]),
                str(plain["failure"]),
                predictions,
                held_out,
            )
        except (ValueError, TypeError, KeyError, BadZipFile) as error:
            raise UserError(f"{file} is damaged: remove it to train the stage again") from error


def digest(split: SplitRecord) -> str:
    """Tells whether images are the same and in the same splits."""
    return hashlib.sha256(json.dumps(split.plain(), sort_keys=True).encode()).hexdigest()
