"""The cores that this process may use, and how many of them decode images."""

import math
import os
from contextlib import suppress
from pathlib import Path

MOST = 16  # processes that decode: each takes a moment to start, and memory
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each so many, or "max"


def cores() -> int:
    """Of the machine's cores, those left to this process by affinity, SLURM, container, sweep."""
    found = [os.cpu_count() or 1]
    with suppress(AttributeError):  # Linux alone has it
        found.append(len(os.sched_getaffinity(0)))
    for name in ("SLURM_CPUS_PER_TASK", "BCNN_CORES"):  # ours: of a job of a sweep, where others run
        with suppress(KeyError, ValueError):
            found.append(int(os.environ[name]))
    with suppress(OSError, ValueError):
        quota, period = QUOTA.read_text().split()
        found.append(math.ceil(int(quota) / int(period)))
    return max(1, min(found))


def default_workers(processes: int = 1) -> int:
    """Processes that decode images, where nobody says how many: one a core, 16 at most.

    Args:
        processes: that train together on this machine, and share its cores unless SLURM has shared
            them out.
    """
    shared = 1 if "SLURM_CPUS_PER_TASK" in os.environ else processes
    return max(1, min(MOST, cores() // shared))
