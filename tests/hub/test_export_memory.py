"""An export is written in the memory of a parameter, under a limit that the system keeps.

`pytest -m slow -s tests/hub/test_export_memory.py` writes GPT-3 1.3b in 2 GB of address space; it
takes 11 GB of disk, since the moments of the checkpoint are 0 and no block of theirs is kept.
"""

import shutil
from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from tests.checkpoint.test_memory import MB, measured, within, write_checkpoint
from tests.lib.corpus import run_file

START = """
import sys
from pathlib import Path
import torch
from megagpt.checkpoint.export import open_weights
from megagpt.hub.exporting import write_export
torch.set_num_threads(1)
"""
WRITE = (
    START
    + """
Path(sys.argv[2]).mkdir()
write_export(open_weights(Path(sys.argv[1])), None, Path(sys.argv[2]), torch.float32, 5 * 10**9)
"""
)


def words(root: Path, config: RunConfig, sparse: bool = False) -> list[str]:
    """The command that writes an export of a checkpoint of random weights."""
    write_checkpoint(root / "run", config, sparse)
    return ["-c", WRITE, str(root / "run"), str(root / "out")]


def test_writing_takes_the_memory_of_a_parameter(tmp_path):
    # 50 MB of weights in one file, of which no parameter has more than 4 MB.
    config = load_run(run_file(tmp_path, model={"n_layer": 4, "d_model": 512}))
    command = words(tmp_path, config)
    within(35 * MB, "export", ["-c", START], command)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert [path.stat().st_size > 50 * MB for path in files] == [True]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_writing_gpt3_1_3b_takes_2_gb(tmp_path):
    sources = 'output = "x"\n[data]\ntrain = [{ path = "x" }]\n'
    (tmp_path / "run.toml").write_text('model = "gpt3-1.3b"\n' + sources)
    command = words(tmp_path, load_run(tmp_path / "run.toml"), sparse=True)
    peak, space, seconds = measured(command, limit=2000 * MB)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    print(f"{size / MB:,.0f} MB in {seconds:.0f} s; memory {peak / MB:,.0f} MB, {space / MB:,.0f}")
    assert size > 5_200 * MB
    kept = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.safetensors"))
    assert kept < 12_000 * MB
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "out")
