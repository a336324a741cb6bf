"""What the run runs on, for the record (L1, stdlib only)."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from megagpt import __version__

PACKAGES = ("torch", "deepspeed", "numpy", "tiktoken", "tensorboard", "triton")
_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES")


def versions(*packages: str) -> dict[str, str]:
    """Versions of megagpt, of Python, and of those packages that are installed."""
    numbers = {"megagpt": __version__, "python": platform.python_version()}
    for name in packages or PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return numbers


def environment() -> dict[str, str]:
    """Host, processors, versions and the commit of the code, as name: text."""
    facts = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": str(os.cpu_count()),
    }
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return facts | versions() | variables | _devices() | _commit()


def _devices() -> dict[str, str]:
    """The GPUs that torch sees; torch is asked only where the program has loaded it already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        "cuda": str(torch.version.cuda),
    }


def _commit() -> dict[str, str]:
    """The commit of the code, and whether it was changed since; nothing outside a checkout."""
    try:
        # An installed copy may lie inside the checkout of something else, which does not track it.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit + (" and changes" if changes else "")}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
