"""What a run says when it ends or is interrupted: figures, and the command that goes on from there."""

import shlex
import shutil
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from bcnn.data.folder import ImageFolderData
from bcnn.options import literal
from bcnn.terminal import say
from bcnn.training.record import RUN, Record, Result

SPLITS = {"val": "validation", "test": "test"}


@rank_zero_only
def summarise(record: Record, results: list[Result], images: ImageFolderData) -> None:
    """The figures of the stages, where the best weights are, and what to do next."""
    say("")
    for result in results:
        for split, count in (("val", len(images.val)), ("test", len(images.test))):
            if f"{split}_top1" in result.metrics:
                top1, top5 = (result.metrics[f"{split}_{name}"] for name in ("top1", "top5"))
                say(
                    f"{result.stage:9}{SPLITS[split]:>11}: top-1 {top1:.1%}, top-5 {top5:.1%} "
                    f"({count} images)"
                )
    if not images.test:
        say(f"{images.root} has no test images: no test figures")
    say(f"best checkpoint: {results[-1].checkpoint}")
    if record.words is not None:
        say(f"next: {_next(record.cfg, record.words, results[-1])}")


@rank_zero_only
def say_how_to_go_on(output: Path) -> None:
    """What an interrupted run leaves; nothing where it has not begun to train."""
    if not (output / RUN).is_file():
        return
    found = [path for stage in ("finetune", "last") for path in (output / stage).glob("*t.ckpt")]
    say("", f"best weights until now: {found[0] if found else 'none yet'}")
    say(f"go on with: {_command(f'resume={output.absolute()}')}")


def advice(cfg: DictConfig, stage: str) -> str:
    """What to try where a stage went wrong."""
    return f"try {stage}.optimizer.lr={cfg[stage].optimizer.lr / 10:g}"


def _next(cfg: DictConfig, words: list[str], result: Result) -> str:
    """Fine-tune what `last` saved; or go on from a finetune at a tenth of its rate."""
    change = {"stage": "finetune", "ckpt": str(result.checkpoint.resolve())}
    if result.stage == "finetune":
        change["finetune.optimizer.lr"] = f"{cfg.finetune.optimizer.lr / 10:g}"
    given = OverridesParser.create().parse_overrides(words)
    kept = [each.input_line for each in given if each.key_or_group not in {*change, "output"}]
    return _command(*(literal(f"{name}={value}", sweep=False) for name, value in change.items()), *kept)


def _command(*words: str | None) -> str:
    """`python train.py *words`, for a shell, with the Python and the script of this process."""
    program = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([program, sys.argv[0], *map(str, words)])
