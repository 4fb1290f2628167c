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
    """Return the number of data-loading workers: one a core, at most 16; ranks share the cores."""
    shared = 1 if "SLURM_CPUS_PER_TASK" in os.environ else ranks  # SLURM has divided the cores already
    return max(1, min(MAX_WORKERS, cores() // shared))


def software() -> dict[str, str]:
    """Return the versions of the libraries, and the commit if this is a clone."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("bcnn", "torch", "torchvision", "lightning", "torchmetrics"):
        with suppress(PackageNotFoundError):  # `python train.py` in a clone needs no installation
            versions.append(f"{name} {version(name)}")
    return {"commit": commit(CLONE), "versions": ", ".join(versions)}


def commit(clone: Path) -> str:
    """Return the commit of a clone and whether files are altered; "" if the folder is not a clone."""
    if (clone / ".git").exists():  # else git would search the folders above
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
        with suppress(OSError, subprocess.SubprocessError):  # no git, or a clone of another user
            run = subprocess.run(command, cwd=clone, capture_output=True, check=True, timeout=10)
            return run.stdout.decode().strip().replace("-dirty", ", with altered files")
    return ""
