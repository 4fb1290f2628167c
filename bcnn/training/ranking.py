"""How a sweep ends: its jobs, best first, on the screen and in files."""

import json
import shlex
import sys
from pathlib import Path

from bcnn.evaluation.jobs import Job, in_order, swept_options, write_jobs
from bcnn.training.config import STAGES
from bcnn.training.run_state import StageResult
from bcnn.training.sweep import FILE
from bcnn.utils.options import as_called, program
from bcnn.utils.terminal import say


def say_ranking(folder: Path, interrupted: list[str] | None) -> bool:
    """Say and write how the jobs of a sweep went; returns whether all went well.

    Args:
        folder: of the sweep.
        interrupted: the command's words, where it has not come to its end.

    Raises:
        UserError: a file of a job is damaged, or one of the sweep cannot be written.
    """
    jobs = in_order([_job(file) for file in folder.glob(f"**/{FILE}")])
    if not jobs:
        return True
    ended, failed = [job for job in jobs if job.well], [job for job in jobs if job.failure]
    if ended:
        options = swept_options(jobs)
        best = ended[0].ranked
        order = "the best validation top-1 first (the test decides nothing)"
        say("", f"jobs, {order if best else 'without validation images to rank them by'}:")
        say(f"{'job':>5}{'validation':>12}{'loss':>9}{'test':>9}{'seconds':>9}")
        for job in ended:
            cells = f"{job.shown('val_top1'):>12}{job.shown('val_loss'):>9}{job.shown('test_top1'):>9}"
            say(f"{job.folder.name:>5}{cells}{job.seconds:>9.1f}  {job.said(options)}")
        say("")
        if best:
            say(f"best checkpoint: {ended[0].checkpoint}", f"train it again: {ended[0].command}")
    table, page = write_jobs(folder, jobs)
    say(f"table: {table}", f"page: {page}")
    if failed:
        say(f"jobs that failed ({len(failed)}):", file=sys.stderr)
        for job in failed:
            sentence = as_called(job.failure)
            say(f"  {job.folder}: {shlex.join(job.words)}: {sentence}", file=sys.stderr)
    if left := [job for job in jobs if job.seconds is None]:
        say(f"jobs that have not ended ({len(left)}):", file=sys.stderr)
        say(*(f"  {job.folder}" for job in left), file=sys.stderr)
    if interrupted is not None:
        words = [word for word in interrupted if not word.startswith("hydra.sweep.dir=")]
        say(f"go on with the sweep: {_command([*words, f'hydra.sweep.dir={folder}'])}")
    return len(ended) == len(jobs)


def _job(file: Path) -> Job:
    """What a job left, in its note and in the results of its stages."""
    note = json.loads(file.read_text())
    words = note["overrides"]
    results = [StageResult.read(Path(note["output"]), stage) for stage in STAGES["both"]]
    last = next((result for result in reversed(results) if result), None)
    return Job(
        file.parent,
        words,
        _command(words),
        last.metrics if last else {},
        note["seconds"],
        last.checkpoint if last else None,
        note["failure"],
    )


def _command(words: list[str]) -> str:
    return shlex.join([*program("train"), *words])
