"""What a run says when it ends or is interrupted: figures, and the command that goes on from there."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.training.run_state import RUN, RunState, StageResult
from bcnn.utils.options import literal, program
from bcnn.utils.terminal import say

SPLITS = {"val": "validation", "test": "test"}


@rank_zero_only
def say_figures(results: list[StageResult], images: FineGrainedDataModule) -> None:
    """The figures of the stages, side by side."""
    say("", _row("", (result.stage for result in results)))
    crossed = "the training images, each by classifiers that have not seen it"
    counted = {name: f"{len(of)} images" for name, of in (("val", images.val), ("test", images.test))}
    for split, count in (counted if images.val else counted | {"val": crossed}).items():
        for name in ("top1", "top5") if len(images.classes) > 5 else ("top1",):
            figures = [result.metrics.get(f"{split}_{name}") for result in results]
            if any(figure is not None for figure in figures):
                cells = ("–" if figure is None else f"{figure:.1%}" for figure in figures)
                say(_row(f"{SPLITS[split]} top-{name[-1]}", cells) + f"  of {count}")
    if not images.test:
        say(f"{images.root} has no test images: no test figures")


@rank_zero_only
def say_where(record: RunState, results: list[StageResult], report: Path | None) -> None:
    """Where everything is, and what to do next."""
    checkpoint = results[-1].checkpoint
    say("", f"all of this run: {record.cfg.output}")
    if report:
        say(f"report: {report}")
    say(f"best checkpoint: {checkpoint}")
    if record.words is not None:
        say(f"predict: {shlex.join([*program('predict'), f'ckpt={checkpoint.resolve()}', 'PHOTO'])}")
        say(f"next: {_next(record.cfg, record.words, results[-1])}")


@rank_zero_only
def say_how_to_go_on(output: Path) -> None:
    """What an interrupted run leaves; nothing where it has not begun to train."""
    if not (output / RUN).is_file():
        return
    found = [path for stage in ("finetune", "last") for path in (output / stage).glob("*t.ckpt")]
    say("", f"best weights until now: {found[0] if found else 'none yet'}")
    say(f"go on with: {train_command(f'resume={output.absolute()}')}")


def facts(
    record: RunState, results: list[StageResult], images: FineGrainedDataModule
) -> dict[str, str]:
    """Where the model of a run comes from, for its report."""
    kept, words = results[-1], record.words
    splits = (("to train on", images.train), ("to validate", images.val), ("to test", images.test))
    return {
        "what went wrong": kept.failure,
        "command": "" if words is None else train_command(*words),
        "photographs": str(Path(images.list or images.root).absolute()),
        "seen at": str(images.preprocessing),
        "numbers": ", ".join(f"{len(samples)} {use}" for use, samples in splits),
        "checkpoint": str(kept.checkpoint.absolute()),
    }


def since(circumstances: dict[str, str], resumed: bool) -> dict[str, str]:
    """What this process knows of itself, said of a run of which it may have seen the end alone."""
    limit = " since it was gone on with; before that is not known" if resumed else ""
    return {name: known and known + limit for name, known in circumstances.items()}


def advice(cfg: DictConfig, stage: str) -> str:
    """What to try where a stage went wrong."""
    return f"try {stage}.optimizer.lr={cfg[stage].optimizer.lr / 10:g}"


def _next(cfg: DictConfig, words: list[str], result: StageResult) -> str:
    """Fine-tune what `last` saved; or go on from a finetune at a tenth of its rate."""
    change = {"stage": "finetune", "ckpt": str(result.checkpoint.resolve())}
    if result.stage == "finetune":
        change["finetune.optimizer.lr"] = f"{cfg.finetune.optimizer.lr / 10:g}"
    given = OverridesParser.create().parse_overrides(words)
    kept = [each.input_line for each in given if each.key_or_group not in {*change, "output"}]
    return train_command(
        *(literal(f"{name}={value}", sweep=False) for name, value in change.items()), *kept
    )


def train_command(*words: str | None) -> str:
    """What trains with these words, for a shell."""
    return shlex.join([*program("train"), *map(str, words)])


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:16}" + "".join(f"{cell:>12}" for cell in cells)
