"""The cores that this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each so many, or "max"


def cores() -> int:
    """Of the machine's cores, those left to this process: by affinity, by SLURM, by its container."""
    found = [os.cpu_count() or 1]
    with suppress(AttributeError):  # Linux alone has it
        found.append(len(os.sched_getaffinity(0)))
    with suppress(KeyError, ValueError):
        found.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    with suppress(OSError, ValueError):
        quota, period = QUOTA.read_text().split()
        found.append(math.ceil(int(quota) / int(period)))
    return max(1, min(found))
