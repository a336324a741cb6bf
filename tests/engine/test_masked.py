"""A masked corpus trains as plain torch does over the scored targets, under every layout."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig, load_run
from megagpt.corpus.records import Masked, prepare
from megagpt.errors import UnsoundError
from megagpt.log import read_metrics
from megagpt.model import GPT, decays, initialise
from megagpt.order.loader import TokenLoader, training_loader
from megagpt.run.inputs import evaluation_samples
from megagpt.run.state import RunState
from tests.engine.test_layouts import Layout, name
from tests.lib.corpus import run_file, sentences
from tests.lib.distributed import free_port, group_of_one, launch, run_together, steps
from tests.lib.here import train_here
from tests.lib.reshape import train

N_CTX = 32
TOLERANCE = 1e-6
"""Relative, of the loss in fp32."""
RUN = {
    # Steps of 3, 6, 9 and 12 sequences.
    "schedule": {
        "total_tokens": 45 * N_CTX,
        "warmup_tokens": 6 * N_CTX,
        "peak_lr": 1e-3,
        "batch_tokens": 12 * N_CTX,
        "ramp_start_tokens": 3 * N_CTX,
        "ramp_tokens": 20 * N_CTX,
    },
    "checkpoint": {"every_tokens": 0},
    "evaluate": {"every_tokens": 15 * N_CTX, "batches": 5},
    "log": {"tensorboard": False},
}


def masked_samples(count: int, seed: int, kind: str) -> list[Masked]:
    """Samples that score between one and all of their targets."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        size = N_CTX + 1 if kind == "records" else int(draw.integers(2, 60))
        scored = draw.random(size) < draw.choice([0.05, 0.5, 1.0])
        scored[-1] = True
        scored[0] = scored[0] and kind == "documents"
        found.append(Masked(draw.integers(0, 40, size) + number % 7, scored))
    return found


def masked_run(root: Path, kind: str = "records") -> Path:
    """A run file over a masked corpus and a masked validation set."""
    for seed, split in enumerate(("train", "validation")):
        samples = masked_samples(60, seed, kind)
        prepare(root / split, vocabulary="bytes", split=split, **{kind: samples})
    return run_file(root, **RUN)


def mean_loss(model: GPT, loader: TokenLoader, first: int, count: int) -> torch.Tensor:
    """Torch's own cross-entropy over the scored targets of some samples."""
    ids = torch.from_numpy(loader.samples(first, count))
    places, store = loader.places(first, count), loader.stores[0]
    scored = torch.from_numpy(store.scored(places.window, loader.n_ctx))
    logits = model.logits(ids[:, :-1])
    return F.cross_entropy(logits[scored], ids[:, 1:][scored])


def plain_losses(
    config: RunConfig, mean_loss: Callable[[GPT, TokenLoader, int, int], torch.Tensor] = mean_loss
) -> tuple[list[float], list[float]]:
    """(loss of each step, loss of each evaluation) of a loop in plain torch: whole steps at once,
    and torch's own AdamW."""
    model = GPT(config.model)
    initialise(model.named_parameters(), config.model, config.seed)
    wanted = config.optimizer
    groups = [
        {"params": [p], "weight_decay": wanted.weight_decay if decays(n) else 0.0}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=wanted.betas, eps=wanted.eps)
    loader, run = training_loader(config), RunState()
    held = TokenLoader([(Path(config.data.validation[0].path), 1.0)], config.model.n_ctx, 0)
    count = evaluation_samples(config, held.n_windows)
    every, losses = config.evaluate.every_tokens, []
    evaluations = [mean_loss(model, held, 0, count).item()]
    while run.tokens < config.schedule.total_tokens:
        step = run.next_step(config)
        loss = mean_loss(model, loader, step.first_sample, step.n_samples)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        optimizer.step()
        losses.append(loss.item())
        before = run.tokens
        run = run.replaced(step=step.number, tokens=step.tokens)
        done = run.tokens >= config.schedule.total_tokens
        if before // every != run.tokens // every or done:
            evaluations.append(mean_loss(model, held, 0, count).item())
    return losses, evaluations


def compare(run: Path, expected: tuple[list[float], list[float]]) -> None:
    losses, evaluations = expected
    found = [record["loss"] for record in steps(run)]
    assert found == pytest.approx(losses, rel=TOLERANCE)
    held = [r["validation_loss"] for r in read_metrics(run) if "validation_loss" in r]
    assert held == pytest.approx(evaluations, rel=TOLERANCE)
    assert not any("validation_bits_per_byte" in r for r in read_metrics(run))


def run_layouts(file: Path, layouts: list[tuple[Layout, int]]) -> list[Path]:
    """Trains (layout, micro-batch) pairs of one split on so many ranks in one torchrun."""
    ranks = layouts[0][0][0]
    outputs = [file.parent / f"{name(layout)}-{size}" for layout, size in layouts]
    plan = [
        ("", str(output), *layout[1:], f"parallel.micro_batch={size}")
        for output, (layout, size) in zip(outputs, layouts, strict=True)
    ]
    place = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    script = ["-m", "tests.lib.reshape", str(file), json.dumps(plan)]
    port = f"--master-port={free_port()}"
    done = run_together([sys.executable, *place, port, *script], timeout_s=1200)
    assert done.returncode == 0, done.stderr
    return outputs


def test_one_process_with_accumulation(tmp_path: Path) -> None:
    file = masked_run(tmp_path, "documents")
    with group_of_one():
        train(file, Ranks(), "", str(tmp_path / "run"), "parallel.micro_batch=2")
    compare(tmp_path / "run", plain_losses(load_run(file)))


def test_two_ranks_of_which_one_idles(tmp_path: Path) -> None:
    # Of three sequences the first rank reads two and the second one, and then one again.
    file = masked_run(tmp_path)
    [run] = run_layouts(file, [((2, "zero2", 1, 1), 1)])
    compare(run, plain_losses(load_run(file)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["records", "documents"])
def test_every_layout_micro_batch_and_accumulation(tmp_path: Path, kind: str) -> None:
    file = masked_run(tmp_path, kind)
    expected = plain_losses(load_run(file))
    stages = [f"zero{stage}" for stage in range(4)]
    plans = [[((n, s, 1, 1), m) for s in stages for m in (1, 2, 3, 12)] for n in (1, 2, 3)]
    for split in ((2, 2, 1), (2, 1, 2), (4, 2, 1)):
        plans.append([((split[0], "pipeline", *split[1:]), m) for m in (1, 3)])
    for plan in plans:
        for run in run_layouts(file, plan):
            compare(run, expected)


def test_a_step_that_scores_nothing_is_left_out(tmp_path: Path) -> None:
    # One long document of which the last token alone counts, and steps of one window.
    draw = np.random.default_rng(1)
    count = 8 * N_CTX
    scored = np.arange(count) == count - 1
    prepare(
        tmp_path / "train",
        documents=[Masked(draw.integers(0, 40, count), scored)],
        vocabulary="bytes",
    )
    one = masked_samples(30, 2, "documents")
    prepare(tmp_path / "validation", documents=one, vocabulary="bytes")
    schedule = {"total_tokens": 8 * N_CTX, "batch_tokens": N_CTX, "ramp_start_tokens": N_CTX}
    schedule |= {"ramp_tokens": 0, "warmup_tokens": 0}
    file = run_file(tmp_path, schedule=schedule, log={"tensorboard": False})
    done = launch(file, 1, launcher="python")
    assert done.returncode == 0, done.stderr
    records = steps(tmp_path / "run")
    found = [np.isfinite(record["loss"]) for record in records]
    assert found.count(True) == 1 and records[-1]["skipped_steps"] == 7
    # The last has no loss by right, and the run is complete.
    assert not found[-1]


def test_a_loss_of_scored_targets_that_is_lost_is_no_end(tmp_path: Path) -> None:
    """Masks excuse a step without a target, and no other."""
    file = masked_run(tmp_path)
    said = "the last, not saved: its loss and its validation loss are not finite"
    with group_of_one(), pytest.raises(UnsoundError, match=said):
        train_here(file, "schedule.peak_lr=1e30")
    assert list_checkpoints(tmp_path / "run") == []


def test_evaluate_scores_what_the_mask_names(tmp_path: Path, capsys) -> None:
    """Records of ids that stand for no text, from the corpus to the command's figure."""
    ids = np.random.default_rng(1).integers(0, 10, (40, N_CTX + 1))
    scored = np.arange(N_CTX + 1) % 3 == 1
    for split in ("train", "validation"):
        samples = [Masked(row, scored) for row in ids]
        prepare(tmp_path / split, records=samples, vocabulary=10, split=split)
    model = {"vocab_size": 10}
    schedule = {"total_tokens": 12 * N_CTX, "batch_tokens": 4 * N_CTX, "ramp_start_tokens": 128}
    schedule |= {"ramp_tokens": 0, "warmup_tokens": 0}
    file = run_file(tmp_path, model=model, schedule=schedule)
    with group_of_one():
        train(file, Ranks(), "", str(tmp_path / "run"))
    capsys.readouterr()
    folder = str(tmp_path / "run")
    assert main(["data", "batch", folder, "--step", "2", "--json"]) == 0
    [one, *_] = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["ids"] == ids[one["window"]].tolist() and one["document"] == one["window"]
    assert one["scored"] == [0, *scored[1:].astype(int).tolist()]
    assert main(["data", "batch", folder, "--step", "2"]) == 0
    told = capsys.readouterr().out
    assert "11 of its 32 targets are scored" in told and "as recorded by the run" in told
    assert main(["evaluate", folder, "--data", str(tmp_path / "validation"), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)["results"]
    gpt = open_weights(tmp_path / "run").model()
    rows = torch.from_numpy(ids)
    wanted = torch.from_numpy(scored)[None, 1:].expand(40, -1)
    with torch.no_grad():
        expected = F.cross_entropy(gpt.logits(rows[:, :-1])[wanted], rows[:, 1:][wanted])
    assert told["loss"]["value"] == pytest.approx(float(expected), rel=2e-6)
    assert told["tokens"] == int(scored[1:].sum()) * 40 and told["documents"] == 40
    assert told["left_out"] == ids.size - told["tokens"] and told["bytes"] == 0
    for words, message in (
        (["--data", str(tmp_path / "validation"), "--stride", "8"], "is of records, each of which"),
        (["--data", str(tmp_path / "validation"), "--by-document"], "leave --by-document out"),
        (["--data", str(text_corpus(tmp_path))], "the tokenizer of these weights is not known"),
    ):
        assert main(["evaluate", folder, *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", folder]) == 2
    assert "ids that stand for no text have none" in capsys.readouterr().err


def text_corpus(root: Path) -> Path:
    from tests.lib.corpus import write_corpus

    return write_corpus(root / "text", sentences(5, 1))
