"""A model shared out over two processes writes what it writes in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.checkpoint.sharing import shared_config
from megagpt.cli import main
from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from tests.lib.distributed import ROOT, environment, free_port
from tests.lib.weights import weights_folder
from tests.use.test_generator import CONFIG


def launched(launcher: str, *words: str) -> list[dict]:
    """The texts that two ranks have made."""
    if launcher == "torchrun":
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        line += [f"--master-port={free_port()}", "-m", "megagpt"]
    else:
        script = str(Path(sys.executable).with_name("deepspeed"))
        line = [sys.executable, script, "--num_gpus", "2", "--master_port", str(free_port())]
        line += ["--module", "megagpt"]
    done = subprocess.run(
        [*line, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)]
)
def test_two_ranks_write_what_one_writes(launcher, tmp_path, capsys):
    weights_folder(tmp_path / "weights", CONFIG, "bytes")
    words = ["generate", str(tmp_path / "weights"), "--prompt", "one", "--prompt", "another two"]
    words += ["--max-tokens", "40", "--samples", "2", "--json"]
    assert main([*words, "--seed", "4"]) == 0
    expected = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert launched(launcher, *words, "--seed", "4", "--split") == expected
    if launcher == "deepspeed":  # without a seed they agree on one
        assert len(launched(launcher, *words, "--split")) == 4


EACH_ITS_OWN = """
import os, sys
from pathlib import Path
import torch
from megagpt.checkpoint.sharing import leave, load_shared
from megagpt.cluster.process import end
own = Path(sys.argv[1]) / ("weights" + os.environ["RANK"])
print("read:", load_shared(own, torch.float32)[2]["checkpoint"].name, flush=True)
leave()
end(0)
"""


def test_ranks_that_see_two_newest_checkpoints_read_one(tmp_path):
    for rank in range(2):
        weights_folder(tmp_path / f"weights{rank}", CONFIG, "bytes")
    (tmp_path / "read.py").write_text(EACH_ITS_OWN)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    line += [f"--master-port={free_port()}", str(tmp_path / "read.py"), str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    said = [row for row in done.stdout.splitlines() if row.startswith("read:")]
    assert said == ["read: weights0"] * 2, done.stderr


def test_what_cannot_be_shared_is_told(tmp_path, capsys):
    weights_folder(tmp_path / "weights", CONFIG, "bytes")
    assert main(["generate", str(tmp_path / "weights"), "--split"]) == 2
    assert "--split: one process has nobody to share with; start it as" in capsys.readouterr().err
    igpt = ModelConfig(family="igpt", n_layer=1, n_head=2, d_model=8, n_ctx=8)
    for config, ranks in ((CONFIG, 3), (igpt, 2)):
        with pytest.raises(UsageError, match=f"--split: {ranks} ranks cannot share a model of"):
            shared_config(config, ranks)
