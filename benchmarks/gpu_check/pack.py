"""Wheels for a machine with torch and no network: run where there is a network.

    python -m benchmarks.gpu_check.pack [--output .gpu/pack] [--nanogpt DIR]

For CPython 3.12 on x86-64, whatever runs here: the runtime pins of requirements.txt and what they
need, without what such a machine has (PRESENT). DeepSpeed, which comes as source, is built here as
a pure Python wheel.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PRESENT = set(
    """torch numpy setuptools tiktoken tensorboard rich matplotlib safetensors pyarrow tokenizers
    transformers datasets packaging psutil einops msgpack ninja py-cpuinfo tqdm nvidia-ml-py
    filelock pytest pytest-timeout pytest-xdist hypothesis pyyaml regex requests scipy zipp
    markdown-it-py pygments""".split()
)
"""On the machine already, or not needed there: the versions that it has are used."""
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in GLIBC] + ["manylinux2014_x86_64"]
TARGET = {"python_version": "3.12", "python_full_version": "3.12.0", "extra": ""}
LIMIT = 40 << 20
"""Bytes that may travel."""


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu/pack")
    parser.add_argument("--nanogpt", type=Path, help="a checkout, whose model.py travels too")
    options = parser.parse_args()
    wheels = options.output / "wheels"
    shutil.rmtree(options.output, ignore_errors=True)
    wheels.mkdir(parents=True)
    waiting, seen = runtime_pins(), set(PRESENT)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in seen:
            seen.add(name)
            waiting += needs(fetch(requirement, wheels))
    if options.nanogpt:
        (options.output / "nanogpt").mkdir()
        shutil.copy(options.nanogpt.expanduser() / "model.py", options.output / "nanogpt")
    files = [path for path in options.output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print("\n".join(sorted(path.name for path in files)))
    print(f"{size / 2**20:.1f} MiB in {options.output}")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT >> 20} MiB")


def runtime_pins(file: Path = ROOT / "requirements.txt") -> list[Requirement]:
    """What training needs: the pins before those of tests and linters."""
    runtime = file.read_text().split("# tests and linters")[0]
    words = [line.split("#")[0].strip() for line in runtime.splitlines()]
    return [Requirement(word) for word in words if word]


def fetch(requirement: Requirement, wheels: Path) -> Path:
    """The requirement's wheel, downloaded or built."""
    before = set(wheels.iterdir())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if requirement.name == "deepspeed":
        # Its set-up reads torch, so no isolation; no operator is compiled: none is used.
        how = ["wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(wheels)]
    else:
        how = ["download", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
        how += ["--python-version", "3.12", "--implementation", "cp"]
        how += [word for platform in PLATFORMS for word in ("--platform", platform)]
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, *how, str(requirement)], check=True, env=environment, cwd=ROOT)
    (made,) = set(wheels.iterdir()) - before
    return made


def needs(wheel: Path) -> list[Requirement]:
    """What a wheel's metadata asks for on the target, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate(TARGET)]


if __name__ == "__main__":
    main()
