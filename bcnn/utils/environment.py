"""What a process runs in: its share of the cores, and the versions of the software."""

import math
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MAX_WORKERS = 16  # each takes memory, and a moment to start
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU per period, or "max"
LIBRARIES = ("bcnn", "torch", "torchvision", "lightning", "torchmetrics")
CLONE = Path(__file__).parents[2]


def cores() -> int:
    """Return the number of cores that affinity, SLURM, container and sweep leave to this process."""
    found = [os.cpu_count() or 1]
    with suppress(AttributeError):  # Linux only
        found.append(len(os.sched_getaffinity(0)))
    for name in ("SLURM_CPUS_PER_TASK", "BCNN_CORES"):  # the latter is set for each job of a sweep
        with suppress(KeyError, ValueError):
            found.append(int(os.environ[name]))
    with suppress(OSError, ValueError):
        quota, period = QUOTA.read_text().split()
        found.append(math.ceil(int(quota) / int(period)))
    return max(1, min(found))


def default_workers(ranks: int = 1) -> int:
    """Return the default number of data-loading workers: one a core, at most 16.

    Args:
        ranks: on this machine, which share its cores unless SLURM has divided them already.
    """
    shared = 1 if "SLURM_CPUS_PER_TASK" in os.environ else ranks
    return max(1, min(MAX_WORKERS, cores() // shared))


def software() -> dict[str, str]:
    """Return the versions of the libraries, and the commit if this is a clone."""
    found = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return {"commit": commit(CLONE), "versions": f"Python {platform.python_version()}, {found}"}


def commit(clone: Path) -> str:
    """Return the commit of a clone and whether files are altered; "" if the folder is not a clone."""
    if not (clone / ".git").exists():  # git would search the folders above
        return ""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=clone, capture_output=True, check=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git, or a clone of another user
        return ""
    return run.stdout.strip().replace("-dirty", ", with altered files")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # `python train.py` in a clone needs no installation
        return "not installed"
