"""init_from: a new run that starts from weights which are there, under any layout."""

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.export import load_model, open_weights
from megagpt.checkpoint.start import check_start
from megagpt.cluster.ranks import Ranks
from megagpt.cluster.stop import StopRequest
from megagpt.config import load_run
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_file
from megagpt.hub.exporting import write_export
from megagpt.hub.importing import import_model
from megagpt.log import read_metrics
from megagpt.loop import Trainer
from megagpt.model import initial_value
from megagpt.order.loader import training_loader
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of
from megagpt.tokenizer import fingerprint, load_tokenizer
from megagpt.tokenizer.portable import described
from megagpt.use.dialogue import with_turns
from tests.lib.corpus import run_file
from tests.lib.distributed import free_port, group_of_one, run_together, steps
from tests.lib.reshape import train
from tests.lib.weights import weights_folder

RUN = {
    "schedule": {"total_tokens": 3072, "warmup_tokens": 512, "ramp_tokens": 0, "batch_tokens": 256},
    "checkpoint": {"every_tokens": 1024},
    "evaluate": {"every_tokens": 0, "batches": 1},
    "log": {"tensorboard": False, "details_every_steps": 0},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """run.toml with its corpora, and weights/ of its model."""
    file = run_file(tmp_path, **RUN)
    weights_folder(tmp_path / "weights", load_run(file).model, "bytes")
    return tmp_path


def go(root: Path, output: str, *overrides: str) -> Path:
    """Trains on one rank, from weights/ unless told otherwise; the run folder."""
    words = [f'init_from="{root / "weights"}"', *overrides]
    with group_of_one():
        train(root / "run.toml", Ranks(), "", str(root / output), *words)
    return root / output


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


@pytest.mark.timeout(1200)
def test_every_layout_starts_the_same_curve(root):
    alone = losses(go(root, "alone"))
    # The first loss is that of the weights, computed in plain torch.
    model = load_model(root / "weights")[0]
    loader = training_loader(load_run(root / "run.toml"))
    x, y = next(iter(loader.micro_batches(0, 8, 0, 1, 8)))
    assert alone[0] == pytest.approx(float(model(x, y)), rel=1e-5)
    plans = [[("zero1", 1, 1), ("zero3", 1, 1)], [("pipeline", 2, 1)], [("pipeline", 1, 2)]]
    for plan in plans:
        hops = [
            ["", str(root / "-".join(map(str, layout))), *layout, f"init_from={root / 'weights'}"]
            for layout in plan
        ]
        place = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
        port = f"--master-port={free_port()}"
        script = ["-m", "tests.lib.reshape", str(root / "run.toml"), json.dumps(hops)]
        done = run_together([sys.executable, *place, port, *script], timeout_s=1200)
        assert done.returncode == 0, done.stderr
        for hop in hops:
            assert losses(Path(hop[1])) == pytest.approx(alone, rel=1e-5)


def test_what_was_exported_and_imported_trains_as_the_original(root):
    # Dense, so that what comes back is the same bit for bit; a folded bias is another parameter.
    dense = 'model.attention=["dense"]'
    config = load_run(root / "run.toml", [dense]).model
    weights_folder(root / "dense", config, "bytes")
    source = open_weights(root / "dense")
    (root / "out").mkdir()
    write_export(source, source.tokenizer(), root / "out", torch.float32, 10**9)
    import_model(str(root / "out"), root / "back")
    curves = [
        losses(go(root, f"{name}-run", dense, f'init_from="{root / name}"'))
        for name in ("dense", "back")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 12


def test_a_checkpoint_starts_a_run_with_everything_else_fresh(root):
    first = go(root, "first", 'init_from=""')
    second = go(root, "second", f'init_from="{first}"', "model.n_ctx=16", "seed=2")
    facts = json.loads((second / "run.json").read_text())["init_from"]
    source = list_checkpoints(first)[-1]
    assert facts["path"] == str(source) and facts["step"] == 12 and facts["tokens"] == 3072
    assert facts["sha256"] == open_weights(source).digest
    records = steps(second)
    assert records[0]["step"] == 1 and records[0]["lr"] == steps(first)[0]["lr"]
    # With nothing learnt the weights are the source's, positions cut.
    still = go(root, "still", f'init_from="{first}"', "model.n_ctx=16", "schedule.peak_lr=1e-30")
    old, new = (dict(load_model(run)[0].named_parameters()) for run in (first, still))
    assert torch.equal(new["wpe.weight"], old["wpe.weight"][:16])
    for name in set(old) - {"wpe.weight"}:
        torch.testing.assert_close(new[name], old[name], rtol=1e-6, atol=0)


def test_a_resume_does_not_read_the_weights_again(root):
    run = go(root, "run", "schedule.total_tokens=1024")
    told = json.loads((run / "run.json").read_text())["init_from"]
    (root / "weights").rename(root / "gone")

    def resume(*overrides: str) -> None:
        asked = load_run(root / "run.toml", [f"output={run}", *overrides])
        layout = layout_of(asked, 1)
        tree = resolve(asked, layout, read_ds_config(asked.parallel.ds_config))
        with group_of_one(), StopRequest() as stop:
            trainer = Trainer(asked, layout, Ranks(), tree)
            trainer.run(stop, allow_changes=False)
            trainer.close()

    short = "schedule.total_tokens=1024"
    # Weights cannot be put under a run that is there already.
    with pytest.raises(UsageError, match=r"init_from: '.*weights' -> '.*other'"):
        resume(short, f'init_from="{root / "other"}"')
    with pytest.raises(UsageError, match=r"init_from: '.*weights' -> ''"):
        resume(short)
    resume(short, f'init_from="{root / "weights"}"')
    assert json.loads((run / "run.json").read_text())["init_from"] == told
    assert len([r for r in read_metrics(run) if "loss" in r]) == 4


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.n_layer=3", "model.n_layer: 2 -> 3"),
        ("model.n_head=4", "model.n_head: 2 -> 4"),
        ("model.d_model=64", "model.d_model: 32 -> 64"),
        ("model.n_ctx=64", "model.n_ctx: 32 -> 64"),
        ("model.band_width=4", "asked):\n  - model.band_width: 8 -> 4\nset"),
        ('model.attention=["dense"]', "model.attention: "),
        ('model.activation="gelu"', "model.activation: 'gelu_tanh' -> 'gelu'"),
    ],
)
def test_weights_of_another_model_are_refused_by_key(override, problem, root):
    with pytest.raises(UsageError, match="holds the weights of another model") as error:
        go(root, "run", override)
    assert problem in str(error.value)
    assert "set these keys of [model] to what they are there" in str(error.value)


def test_damaged_weights_another_tokenizer_and_no_weights_are_refused(root):
    with pytest.raises(UsageError, match="init_from = '.*nothing': .*no checkpoint here"):
        go(root, "one", f'init_from="{root / "nothing"}"')
    config = load_run(root / "run.toml").model
    index = root / "weights" / "model.safetensors.index.json"
    weights_folder(root / "other", config, "bytes", vocabulary="of another tokenizer")
    with pytest.raises(UsageError, match="were trained with another tokenizer"):
        go(root, "two", f'init_from="{root / "other"}"')
    few, more = load_tokenizer("bytes"), with_turns(load_tokenizer("bytes"))
    known = root / "known"
    weights_folder(known, config, "bytes", vocabulary=fingerprint(few))
    write_file(root / "turns.json", described(more))
    start = dataclasses.replace(load_run(root / "run.toml"), init_from=str(known))
    for name, size, told in (
        (str(root / "turns.json"), more.n_vocab, ""),
        ("gpt2", 50257, "whose ids mean other text, and not only more of it; prepare the corpora"),
    ):
        larger = dataclasses.replace(start, model=dataclasses.replace(config, vocab_size=size))
        tokenizer = name, fingerprint(load_tokenizer(name))
        with pytest.raises(UsageError, match=told) if told else nullcontext():
            check_start(larger, tokenizer)
    index.write_text(index.read_text().replace('"step": 0', '"step": 1'))
    with pytest.raises(DamageError, match="its checksum is not that of its content"):
        go(root, "three")


def test_a_larger_vocabulary_gets_rows_by_name(root):
    config = load_run(root / "run.toml", ["model.vocab_size=200"]).model
    values = weights_folder(root / "small", config, "")
    still = go(root, "still", f'init_from="{root / "small"}"', "schedule.peak_lr=1e-30")
    found = open_weights(still).read("wte.weight")[:257]
    run = load_run(root / "run.toml")
    drawn = initial_value("wte.weight", (257, 32), run.model, run.seed)
    expected = torch.cat([values["wte.weight"], drawn[200:]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with pytest.raises(UsageError, match="model.vocab_size: 300 -> 257"):
        weights_folder(root / "large", load_run(root / "run.toml", ["model.vocab_size=300"]).model)
        go(root, "run", f'init_from="{root / "large"}"')
