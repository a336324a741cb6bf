"""What the data order costs: computing it, opening 10^12 tokens, reading a step.

    python benchmarks/data_order.py > table.md

Everything runs in one process after another on one thread; times are CPU seconds (user + system)
unless a column says otherwise, the best of three. The corpora are made in a temporary folder: 10^12
tokens as sparse files, which take no room, and 200 million random tokens that the page cache holds.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from megagpt.corpus.manifest import CorpusManifest, Shard, write_manifest
from megagpt.order.loader import TokenLoader
from megagpt.order.mixture import Mixture
from megagpt.order.permutation import Permutation

N_CTX = 2048
BATCH = 256
"""Samples of a step: 524,288 tokens, GPT-3's batch at 125M."""
TABLE_2_2 = [0.60, 0.22, 0.08, 0.08, 0.03]

OPENING = """
import json, re, sys, time

def peak_mb():
    # Not ru_maxrss, which starts at the peak of the parent process.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000

t0 = time.perf_counter()
from pathlib import Path
from megagpt.order.loader import TokenLoader
imported_s = time.perf_counter() - t0
idle = peak_mb()
t0 = time.perf_counter()
loader = TokenLoader([(Path(sys.argv[1]), 1.0)], 2048, seed=1)
opened_s = time.perf_counter() - t0
batch = loader.samples(10**8, 256)
first_s = time.perf_counter() - t0
print(json.dumps([imported_s, opened_s, first_s, idle, peak_mb()]))
"""


def cost(work: Callable[[], object], seconds: float = 0.5) -> float:
    """CPU seconds of one call: the best of three runs of `seconds` each."""
    best = float("inf")
    for _ in range(3):
        calls, t0 = 0, time.process_time()
        while time.process_time() - t0 < seconds:
            work()
            calls += 1
        best = min(best, (time.process_time() - t0) / calls)
    return best


def corpus(folder: Path, n_shards: int, shard_tokens: int, sparse: bool) -> Path:
    """A folder of shards of random tokens, or of nothing; checksums are not computed."""
    folder.mkdir()
    # Corpora are told apart by their checksums, which are made up.
    made_up = hashlib.sha256(str(folder).encode()).hexdigest()
    rng, shards = np.random.default_rng(0), []
    for i in range(n_shards):
        name = f"{folder.name}_{i:05d}"
        with (folder / f"{name}.bin").open("wb") as file:
            if sparse:
                file.truncate(2 * shard_tokens)
            else:
                file.write(rng.integers(0, 50257, shard_tokens, np.uint16).tobytes())
        shards.append(Shard(name, shard_tokens, 1, 2 * shard_tokens, made_up, made_up))
    write_manifest(
        CorpusManifest(
            folder=folder,
            tokenizer_name="gpt2",
            vocab_size=50257,
            end_of_document=50256,
            fingerprint="",
            dtype=np.dtype("<u2"),
            shards=tuple(shards),
        )
    )
    return folder


@contextmanager
def section(title: str, *columns: str) -> Iterator[Callable[..., None]]:
    """A Markdown table; the function adds a row."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    yield lambda *cells: print(f"| {' | '.join(map(str, cells))} |", flush=True)


def order() -> None:
    """Throughput of the permutation and the mixture, beside an index array."""
    n = 10**12 // N_CTX
    with section("Order", "what", "block", "million a CPU-s", "memory") as row:
        for block in (32, 256, 4096, 65536):
            positions = np.arange(block)
            permutation = Permutation(n, 1, "corpus")
            rate = block / cost(partial(permutation, positions))
            row("window of a position, n = 488M", block, f"{rate / 1e6:.2f}", "0")
        mixture = Mixture(TABLE_2_2, list("abcde"))
        for block in (32, 256, 4096, 65536):
            rate = block / cost(partial(mixture.assign, 10**8, block))
            row("source and draw of a sample, 5 sources", block, f"{rate / 1e6:.2f}", "0")
        small = 20_000_000
        rng, t0 = np.random.default_rng(0), time.process_time()
        array = rng.permutation(small)
        rate = small / (time.process_time() - t0)
        memory = f"{array.nbytes // 10**6} MB, {8 * n // 10**6:,} MB for n = 488M"
        row(
            "numpy's permutation of 20M, before the first batch", "all", f"{rate / 1e6:.2f}", memory
        )


def opening(root: Path) -> None:
    """10^12 tokens in a fresh process: to the first batch of 256 samples, and its memory."""
    columns = ("shards", "import s", "open s", "open and first batch s", "idle MB", "peak MB")
    with section("Opening 10^12 tokens (fresh process, wall time)", *columns) as row:
        for n_shards in (1000, 10_000):
            folder = corpus(root / f"sparse{n_shards}", n_shards, 10**12 // n_shards, sparse=True)
            command = [sys.executable, "-c", OPENING, str(folder)]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(3)
            ]
            imported, opened, first, idle, peak = min(runs, key=lambda run: run[2])
            row(
                f"{n_shards:,}",
                *(f"{s:.2f}" for s in (imported, opened, first)),
                *(f"{m:.0f}" for m in (idle, peak)),
            )


def reading(root: Path) -> None:
    """A step of 256 samples, read by one rank; the files are in the page cache."""
    folders = [corpus(root / f"c{i}", 2, 20_000_000, sparse=False) for i in range(5)]
    loader = TokenLoader(list(zip(folders, TABLE_2_2, strict=True)), N_CTX, seed=1)
    step = iter(range(10**9))

    def batches() -> None:
        list(loader.micro_batches(next(step) * BATCH, BATCH, 0, 1, 8))

    def memmap() -> None:
        # The common way without an index: random starts, one slice for each sample.
        data = np.memmap(folders[0] / "c0_00000.bin", np.uint16, "r")
        starts = np.random.randint(0, len(data) - N_CTX - 1, BATCH)
        x = torch.stack([torch.from_numpy(data[s : s + N_CTX].astype(np.int64)) for s in starts])
        y = torch.stack(
            [torch.from_numpy(data[s + 1 : s + 1 + N_CTX].astype(np.int64)) for s in starts]
        )
        assert len(x) == len(y)

    import torch

    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    columns = ("what", "ms for a step of 256 samples", "samples a CPU-s", "million tokens a CPU-s")
    with section("Reading a step of 524,288 tokens", *columns) as row:
        for name, work in (
            ("micro_batches of 8: 5 sources, x and y as int64 tensors", batches),
            ("of that, samples to windows", lambda: loader.places(next(step) * BATCH, BATCH)),
            ("digest of the step", lambda: loader.digest(next(step) * BATCH, BATCH)),
            ("memmap slices at random starts, torch.stack", memmap),
        ):
            seconds[name] = s = cost(work)
            rate = BATCH / s
            row(name, f"{1e3 * s:.2f}", f"{rate:,.0f}", f"{rate * N_CTX / 1e6:.1f}")
    shares(next(iter(seconds.values())) / BATCH)
    loader.close()


def shares(read_s: float) -> None:
    """Reading as a share of training, for ranks of several speeds; read_s is for one sample."""
    rates = [
        ("gpt3-125m, A100-80GB (llm-foundry, published)", 142_830.0),
        ("gpt3-1.3b, H100 (llm-foundry, published)", 45_455.0),
    ]
    columns = ("rank", "tokens/s", "reading, % of the time, not hidden")
    with section("Share of a training step", *columns) as row:
        for name, rate in rates:
            row(name, f"{rate:,.0f}", f"{100 * read_s * rate / N_CTX:.3f}")
        row("a rank for which reading is 1%", f"{0.01 * N_CTX / read_s:,.0f}", "1.000")


def main() -> None:
    """Prints the tables."""
    argparse.ArgumentParser(description="What the data order costs.").parse_args()
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{cores}, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as root:
        order()
        opening(Path(root))
        reading(Path(root))


if __name__ == "__main__":
    main()
