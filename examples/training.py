"""What the examples share: a run file trained by megagpt.train, and answers of the model."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch

from megagpt.checkpoint.export import Weights, open_weights
from megagpt.corpus.unfinished import beside
from megagpt.errors import MegagptError, UsageError, ended
from megagpt.files import write_file
from megagpt.model import GPT

MODELS = {"nano": (3, 3, 48), "micro": (4, 4, 128), "mini": (6, 6, 192)}
"""minGPT's sizes: layers, heads, width. Here the output matrix is tied to the embedding."""
SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep"
BASE = Path("runs/chargpt")
"""The model that others start from unless told otherwise: that of examples/chargpt.py."""


def options(
    description: str, output: str, steps: int, model: str = "", lr: float = 3e-3
) -> argparse.ArgumentParser:
    """The command line that all examples have; without a `model`: from weights that are there."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--output", type=Path, default=Path(output), help="run folder; goes on where it stopped")
    add("--steps", type=int, default=steps, help="steps to train")
    if model:
        add("--model", choices=MODELS, default=model, help="minGPT's sizes")
    else:
        add("--start", type=Path, default=BASE, help="run folder, checkpoint or imported weights "
            "to start from; the default is trained first where it is not there")  # fmt: skip
    add("--lr", type=float, default=lr, help="peak learning rate")
    add("--ranks", type=int, default=1, help="processes, started by deepspeed where several")
    add("--seed", type=int, default=3407, help="initial weights and data order")
    add("--allow-changes", action="store_true", help="go on with a run that had other options")
    return made


def run(main: Callable[[], None]) -> None:
    """An example as a command: what a user or a file did wrong is one message and an exit code."""
    sys.exit(ended(lambda: main() or 0))


def run_text(args: argparse.Namespace, data: Path, n_ctx: int, vocab_size: int, batch: int) -> str:
    """A run file: `batch` sequences a step, a warm-up, a cosine to zero."""
    shape = dict(zip(("n_layer", "n_head", "d_model"), MODELS[args.model], strict=True))
    sources = {"train": [(data, 1.0)], "validation": [beside(data, "-validation")]}
    return text_of(args, shape | {"n_ctx": n_ctx, "vocab_size": vocab_size}, sources, batch)


def text_of(
    args: argparse.Namespace,
    model: dict[str, Any],
    sources: dict[str, Any],
    batch: int,
    **more: Any,
) -> str:
    """A run file of a [model] and corpora: train, of (folder, weight); validation, of folders.

    more: keys of the file itself, and tables that are laid over those here.
    """
    if args.ranks < 1:
        raise UsageError(f"--ranks {args.ranks}: must be 1 or more")
    n_ctx, total = model["n_ctx"], args.steps * batch * model["n_ctx"]
    tree: dict[str, Any] = {
        "output": str(args.output),
        "seed": args.seed,
        "model": model,
        "data": {
            "train": [{"path": str(path), "weight": w} for path, w in sources["train"]],
            "validation": [{"path": str(path)} for path in sources["validation"]],
        },
        "schedule": {
            "total_tokens": total,
            "warmup_tokens": total // 20,
            "peak_lr": args.lr,
            "min_lr_ratio": 0.0,
            "batch_tokens": batch * n_ctx,
        },
        # Where the loss is nearly zero, every step that it is not looks like a spike.
        "optimizer": {"weight_decay": 0.1, "spike_threshold": 1e9},
        "parallel": {"ds_config": "zero1", "micro_batch": -(-batch // args.ranks), "dtype": "fp32"},
        "checkpoint": {"every_tokens": max(1, total // 10)},
        "evaluate": {"every_tokens": max(1, total // 20), "batches": 1},
        "log": {
            "every_steps": max(1, args.steps // 20),
            "details_every_steps": 0,
            "check_replicas_every_steps": 0,
        },
    }
    for key, value in more.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    return tomli_w.dumps(tree)


def script(name: str, *words: object) -> None:
    """Runs one of data_prep."""
    call([sys.executable, str(SCRIPTS / name), *map(str, words)])


def call(line: list[str], **where: Any) -> None:
    """Runs a program; where that fails, the example ends with its exit code."""
    sys.stdout.flush()
    if code := subprocess.run(line, **where).returncode:
        sys.exit(code)


def start(folder: Path) -> Weights:
    """The weights to start from; BASE is trained, or trained to its end, where it is not done."""
    done = folder != BASE
    with suppress(MegagptError):
        found = open_weights(folder)
        done = done or found.facts["tokens"] >= found.config.schedule.total_tokens
    if not done:
        print(f"{folder}, to start from, is trained first", file=sys.stderr, flush=True)
        call([sys.executable, str(Path(__file__).with_name("chargpt.py"))], stdout=sys.stderr)
    return open_weights(folder)


def train(args: argparse.Namespace, text: str) -> GPT:
    """Trains the run file on `args.ranks` processes, from the last checkpoint on where there is
    one; the model of the last."""
    file = beside(args.output, ".toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
    line = ["megagpt.train", str(file), *["--allow-changes"] * args.allow_changes]
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(args.ranks)]
    by = [*deepspeed, "--module"] if args.ranks > 1 else ["-m"]
    call([sys.executable, *by, *line])
    return open_weights(args.output).model()


@torch.no_grad()
def answers(model: GPT, questions: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest `count` ids after each question (N, T), one after another: (N, count)."""
    ids = questions
    for _ in range(count):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]
