"""What a model was made or judged with."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("bcnn", "torch", "torchvision", "lightning", "torchmetrics")
CLONE = Path(__file__).parents[2]


def software() -> dict[str, str]:
    """Versions by name, and the commit where this is a clone; of now, so ask before work is done."""
    found = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return {"commit": commit(CLONE), "versions": f"Python {platform.python_version()}, {found}"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # `python train.py` in a clone needs no installation
        return "not installed"


def commit(clone: Path) -> str:
    """What is checked out in a clone, and whether files are altered; "" in any other folder."""
    if not (clone / ".git").exists():
        return ""  # git would look in the folders above, which are of something else
    asked = [
        "git",
        "--no-optional-locks",
        "-C",
        str(clone),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        run = subprocess.run(asked, capture_output=True, check=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # there is no git, or the clone is somebody else's
        return ""
    return run.stdout.strip().replace("-dirty", ", with altered files")
