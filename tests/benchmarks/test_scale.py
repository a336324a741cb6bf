"""What a start and a save ask for does not grow with the number of ranks, but on rank 0."""

import subprocess
import sys
from pathlib import Path

from tests.lib.distributed import environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/scale.py"


def test_what_a_rank_asks_for_does_not_grow_with_their_number():
    line = [sys.executable, str(SCRIPT), "--ranks", "4", "24", "--shards", "48", "--layers", "2"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line.strip("|").split("|") for line in done.stdout.splitlines()]
    keys = [cell.strip() for cell in head[2:]]
    found = {}
    for ranks, what, *cells in rows:
        means = [float(cell.split()[0].replace(",", "")) for cell in cells]
        found[int(ranks), what.strip()] = dict(zip(keys, means, strict=True))
    few, many = found[4, "resume"], found[24, "resume"]
    # Its share of the checksums and its own slices, whatever the others wrote.
    assert few["opens"] < 7 and many["opens"] < 4 and many["stats"] <= 3
    few, many = (found[n, "compare the data, later starts"] for n in (4, 24))
    # Two files of a shard are looked at by one rank.
    assert few["stats"] > 2 * 48 / 4 and many["stats"] < 2 * 48 / 24 + 15
    assert many["opens"] < 4 and many["bytes"] < few["bytes"]
    assert found[24, "save, and retire one"]["opens"] < 3
