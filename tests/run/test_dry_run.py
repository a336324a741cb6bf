"""--dry-run accepts what the planner proposes and writes, and refuses what a start would refuse."""

import json
import subprocess
import sys
import textwrap

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.errors import UsageError
from megagpt.plan.layout import Layout
from megagpt.run.dry_run import dry_run
from megagpt.train import _run, rehearse_run
from tests.lib.corpus import run_file
from tests.lib.distributed import LAUNCH_VARIABLES, ROOT, environment, python
from tests.lib.weights import weights_folder

REHEARSE = """
    import sys
    from megagpt.config import load_run
    from megagpt.engine.rehearsal import kinds_of_ranks, rehearse
    from megagpt.plan.candidates import Cluster
    from megagpt.plan.ds_config import read_ds_config, resolve
    from megagpt.plan.judge import search

    size, gpus, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = load_run(f"launch/runs/gpt3-{size}.toml")
    found = search(config, Cluster(gpu="h100", gpus=gpus))
    for one in found:
        made, layout = one.candidate.config, one.candidate.layout
        tree = resolve(made, layout, read_ds_config(made.parallel.ds_config))
        ranks = kinds_of_ranks(layout)
        for built in rehearse(made, layout, tree, sorted({*ranks[::every], ranks[-1]})):
            assert built.n_parameters and built.layers, built
        print("accepted", one.candidate)
"""


def dry(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megagpt.train", *words, "--dry-run"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def proposed(size: str, gpus: int, every: int = 1) -> int:
    # A process of its own: the dry run makes process groups.
    code = textwrap.dedent(REHEARSE)
    done = python(code, size, str(gpus), str(every), timeout_s=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.count("accepted")


def test_every_layout_that_the_search_proposes_is_accepted():
    assert proposed("6.7b", 64) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "gpus", "every"),
    [("125m", 8, 1), ("760m", 6, 1), ("2.7b", 32, 1), ("13b", 96, 3), ("175b", 1536, 17)],
)
def test_so_it_is_for_other_sizes(size, gpus, every):
    assert proposed(size, gpus, every) > 0


def test_what_the_plan_writes_is_accepted_rank_by_rank(tmp_path, capsys):
    folder = tmp_path / "plan"
    words = ["plan", "launch/runs/gpt3-1.3b.toml", "parallel.pipeline=2", "parallel.tensor=2"]
    words += ["parallel.ds_config=pipeline", "parallel.micro_batch=2", "--gpus", "16"]
    assert main([*words, "--write", str(folder)]) == 0
    capsys.readouterr()
    done = dry(str(folder / "run.toml"))
    assert done.returncode == 0, done.stderr
    first, *ranks = done.stdout.splitlines()
    assert first.startswith("dry run: 16 ranks = pipeline 2 x data 4 x tensor 2; nothing is")
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["stages"]) == 2
    places = [line.split(": ")[0] for line in ranks if line.startswith("rank ")]
    assert places == [
        f"rank {rank} (stage {stage}, tensor rank {tensor}, as 3 others)"
        for rank, stage, tensor in ((0, 0, 0), (1, 0, 1), (8, 1, 0), (9, 1, 1))
    ]
    # Weights of 2 bytes: what was planned is what is built.
    counts = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in ranks[:4]]
    planned = [stage["weights"] / 2 for stage in plan["stages"] for _ in range(2)]
    assert counts == planned
    assert "data/books1: not on this machine, so it is not looked at" in done.stdout
    assert ranks[-1] == "accepted: everything up to the first step"


def test_corpora_that_are_here_are_opened_and_nothing_is_written(tmp_path):
    file = run_file(tmp_path)
    done = dry(str(file), "parallel.ds_config=zero1", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "rank 0 (as the other 1): " in done.stdout
    assert "corpora are there and fit the model" in done.stdout
    assert not (tmp_path / "run").exists()
    other = load_run(file, ["model.vocab_size=300"])
    with pytest.raises(UsageError, match=r"but model.vocab_size = 300"):
        list(dry_run(other, Layout(), {}, []))


def test_what_deepspeed_refuses(tmp_path):
    file, tree = run_file(tmp_path), json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    tree["zero_optimization"]["reduce_bucket_size"] = "large"
    (tmp_path / "own.json").write_text(json.dumps(tree))
    done = dry(str(file), f"parallel.ds_config={tmp_path / 'own.json'}")
    assert done.returncode == 2
    assert "rank 0 of 1 rank: DeepSpeed refuses it: " in done.stderr


def test_what_is_refused_before(tmp_path, monkeypatch):
    # What the command sets is put back.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    file = run_file(tmp_path)
    with pytest.raises(UsageError, match="0 ranks: must be a positive multiple"):
        rehearse_run(str(file), [], 0)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UsageError, match=r"plan.json: not a plan that megagpt plan --write wrote"):
        rehearse_run(str(file), [], None)
    with pytest.raises(UsageError, match="--ranks is for --dry-run"):
        _run([str(file), "--ranks", "2"])
    for name, value in zip(LAUNCH_VARIABLES, ("0", "2", "0", "2", "127.0.0.1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29501")
    with pytest.raises(UsageError, match="--ranks 3: deepspeed started 2 ranks"):
        rehearse_run(str(file), [], 3)


def test_it_looks_at_the_weights_to_start_from(tmp_path):
    file = run_file(tmp_path)
    weights_folder(tmp_path / "weights", load_run(file).model, "bytes")

    def told(*overrides: str) -> str:
        config = load_run(file, overrides)
        return "\n".join(dry_run(config, Layout(), {"zero_optimization": {"stage": 1}}, []))

    start = f"init_from={tmp_path / 'weights'}"
    assert "weights of step 0 are there and fit the model" in told(start)
    absent = str(tmp_path / "absent")
    assert f"init_from = {absent!r}: not on this machine, so" in told(f"init_from={absent}")
    with pytest.raises(UsageError, match="another model .*\n.*model.n_layer: 2 -> 3"):
        told(start, "model.n_layer=3")
    # Those of a corpus that is not here may be of any tokenizer.
    assert "fit the model" in told(start, f'data.train=[{{path="{absent}"}}]')
