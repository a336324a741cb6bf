"""Runs the items one after another; a failure stops nothing.

    python -m benchmarks.gpu_check [ITEM...] [--device cpu] [--limit-s 540] [--output DIR]
    python -m benchmarks.gpu_check --table [--output DIR]     # results.jsonl as Markdown

Each item is a process of its own with its own limit. Under the output folder: results.jsonl,
log.txt (what every item printed) and table.md. An item starts while at least half of its limit
is left of the call's.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.gpu_check.items import Item, chosen
from benchmarks.gpu_check.results import FILE, LIMIT, read, record
from benchmarks.gpu_check.table import render

ROOT = Path(__file__).resolve().parents[2]
CPU_SLOWER = 15
"""Limits on a CPU, which may be busy with other things, are so many times those on a GPU."""
PACKAGES = ("torch", "triton", "deepspeed", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "numpy")


def main() -> None:
    """Measures, then prints the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("items", nargs="*", help="groups or names; none: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit-s", type=float, default=0, help="of the call; 0: 540, cpu 7200")
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu/out")
    parser.add_argument("--commit", default="", help="of the checkout, where git cannot tell")
    parser.add_argument("--nanogpt", default="", help="folder with nanoGPT's model.py")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    results = options.output / "results.jsonl"
    if not options.table:
        options.output.mkdir(parents=True, exist_ok=True)
        measure(options, results)
    text = render(list(read(results)))
    print("\n" + text)
    if not options.table:
        (options.output / "table.md").write_text(text + "\n")


def measure(options: argparse.Namespace, results: Path) -> None:
    """All items that the call's time holds."""
    cpu = options.device == "cpu"
    ends = time.monotonic() + (options.limit_s or (7200 if cpu else 540))
    os.environ.update(environment(options, results))
    record("call", **about(options))
    for item in chosen(options.items):
        limit = item.limit_s * (CPU_SLOWER if cpu else 1)
        left = ends - time.monotonic()
        if left < limit / 2:
            record("item", item=item.name, code=None, s=0.0)
            continue
        run(item, min(limit, left), options.output / "log.txt")


def environment(options: argparse.Namespace, results: Path) -> dict[str, str]:
    """Variables of every item."""
    work = ROOT / ".gpu"
    found = {
        FILE: str(results.resolve()),
        "DEVICE": options.device,
        "NANOGPT": options.nanogpt,
        "GPU_CHECK_WORK": os.environ.get("GPU_CHECK_WORK", str(work / "work")),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        # No network: nothing may look for a tokenizer, nor for a compiler of DeepSpeed's kernels.
        "HF_HUB_OFFLINE": "1",
        "DS_BUILD_OPS": "0",
        "DS_SKIP_CUDA_CHECK": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def about(options: argparse.Namespace) -> dict[str, object]:
    """What the figures are of: code, card, versions."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    card = platform.processor() or platform.machine()
    if options.device == "cuda":
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": options.commit or commit,
        "device": options.device,
        "card": card,
        "versions": versions,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def run(item: Item, limit_s: float, log: Path) -> None:
    """One item; it and all its processes are ended at the limit."""
    t0 = time.monotonic()
    with log.open("a+") as file:
        file.write(f"\n===== {item.name}, at most {limit_s:.0f} s\n")
        file.flush()
        process = subprocess.Popen(
            command(item),
            cwd=ROOT,
            env={**os.environ, LIMIT: str(time.time() + limit_s)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = "limit"
        end(process)
    record("item", item=item.name, code=code, s=round(time.monotonic() - t0, 1))
    if code != 0:
        print("\n".join(f"    {line[:200]}" for line in log.read_text().splitlines()[-6:]))


def command(item: Item) -> list[str]:
    """The command line of an item."""
    if item.group == "tests":
        # Only files with such tests: others may import what a machine lent for minutes lacks.
        marked = [p for p in (ROOT / "tests").rglob("*.py") if "mark.gpu" in p.read_text()]
        where = [ROOT / "tests/gpu"] if os.environ["DEVICE"] == "cpu" else marked
        # Each result as it comes: what is cut off keeps the others.
        flags = ["-m", "gpu", "-vv", "-rs", "-p", "no:cacheprovider", "--durations=8"]
        # Most of a test is starting and compiling, which a GPU's host does for eight at a time.
        flags += ["-n", "2" if os.environ["DEVICE"] == "cpu" else "8"]
        return [sys.executable, "-m", "pytest", *flags, *map(str, where)]
    return [sys.executable, "-m", f"benchmarks.gpu_check.{item.group}", item.name]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of an item: tests start ranks in sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in [*family, process]:
        try:
            member.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    process.wait()


if __name__ == "__main__":
    main()
