"""What the examples share: a run file trained by megagpt.train, and answers of the model."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from megagpt.checkpoint.export import open_weights
from megagpt.files import write_file
from megagpt.model import GPT

MODELS = {"nano": (3, 3, 48), "micro": (4, 4, 128), "mini": (6, 6, 192)}
"""minGPT's sizes: layers, heads, width. Here the output matrix is tied to the embedding."""


def options(description: str, output: str, steps: int, model: str) -> argparse.ArgumentParser:
    """The command line that all examples have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--output", type=Path, default=Path(output), help="run folder; goes on where it stopped")
    add("--steps", type=int, default=steps, help="steps to train")
    add("--model", choices=MODELS, default=model, help="minGPT's sizes")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--ranks", type=int, default=1, help="processes, started by deepspeed where several")
    add("--seed", type=int, default=3407, help="initial weights and data order")
    return made


def run_text(args: argparse.Namespace, data: Path, n_ctx: int, vocab_size: int, batch: int) -> str:
    """A run file: `batch` sequences a step, a warm-up, a cosine to zero."""
    n_layer, n_head, d_model = MODELS[args.model]
    total = args.steps * batch * n_ctx
    return f"""
output = {str(args.output)!r}
seed = {args.seed}

[model]
n_layer = {n_layer}
n_head = {n_head}
d_model = {d_model}
n_ctx = {n_ctx}
vocab_size = {vocab_size}

[data]
train = [{{ path = {str(data)!r} }}]
validation = [{{ path = {str(data) + "-validation"!r} }}]

[schedule]
total_tokens = {total}
warmup_tokens = {total // 20}
peak_lr = {args.lr}
min_lr_ratio = 0.0
batch_tokens = {batch * n_ctx}

[optimizer]
weight_decay = 0.1
spike_threshold = 1e9  # where the loss is nearly zero, every step that it is not looks like one

[parallel]
ds_config = "zero1"
micro_batch = {-(-batch // args.ranks)}
dtype = "fp32"

[checkpoint]
every_tokens = {max(1, total // 10)}

[evaluate]
every_tokens = {max(1, total // 20)}
batches = 1

[log]
every_steps = {max(1, args.steps // 20)}
details_every_steps = 0
check_replicas_every_steps = 0
"""


def train(args: argparse.Namespace, text: str) -> GPT:
    """Trains the run file on `args.ranks` processes; the model of its last checkpoint.

    Where the run folder has a checkpoint, it goes on from there. A training that fails ends the
    example with its exit code.
    """
    file = args.output.with_name(args.output.name + ".toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
    line = [sys.executable, "-m", "megagpt.train", str(file)]
    if args.ranks > 1:
        deepspeed = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
        place = ["--num_gpus", str(args.ranks), "--module"]
        line = [*deepspeed, *place, "megagpt.train", str(file)]
    sys.stdout.flush()
    if code := subprocess.run(line).returncode:
        sys.exit(code)
    return open_weights(args.output).model()


@torch.no_grad()
def answers(model: GPT, questions: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest `count` ids after each question (N, T), one after another: (N, count)."""
    ids = questions
    for _ in range(count):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]
