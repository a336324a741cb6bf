"""Training steps of this model beside nanoGPT's, transformers' and bare matrix products.

    python benchmarks/model_step.py --nanogpt ~/nanoGPT --model 125m --dtype bf16
    python benchmarks/model_step.py --model 125m --device cuda --contenders ours,ours+compile

A step is forward, backward, clipping to norm 1 and AdamW. Every contender runs in a process of
its own, which also gives its peak memory, and takes one step at a time in turn with the others;
so a machine that is busy with something else is busy for all. Figures are medians over rounds,
ratios the median of the ratios within a round. In bf16 ours has bf16 weights with fp32 masters, as
the training engine has; the others run under autocast, as their own scripts do. On a CPU ours
keeps the memory that a step frees, as the trainer does (megagpt.cluster.process).

A contender's name may be followed by `+compile`, for torch.compile, and by `+keep`, for memory
kept as ours keeps it. `matmul` multiplies the matrices of the same step (every linear layer and the
head; forward, and both gradients) and does nothing else: the limit of the machine. FLOPs are model
FLOPs with causal attention counted in full (megagpt.config.flops).
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config.flops import flops_per_token, parameters
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.plan.accelerators import peak_tflops

if TYPE_CHECKING:
    from torch import Tensor

Step = Callable[["Tensor", "Tensor"], float]
"""Ids (B, T) and targets (B, T) -> loss."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="125m", help="10m, 125m, 350m, 760m or 1.3b")
    parser.add_argument("--n-ctx", type=int, default=1024, help="context in tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--attention", default="dense", help="pattern, such as dense,banded")
    parser.add_argument("--recompute-every", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py")
    parser.add_argument(
        "--contenders",
        default="ours,ours+compile,nanogpt,nanogpt+compile,matmul",
        help="what to time, the first one being what the others are set beside",
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def shape(options: argparse.Namespace) -> ModelConfig:
    """The model that everyone builds: a GPT-3 preset with GPT-2's vocabulary padded to 50,304."""
    if options.model in SMALL:
        base = dataclasses.replace(PRESETS["gpt3-125m"].model, **SMALL[options.model])
    else:
        base = PRESETS[f"gpt3-{options.model}"].model
    return dataclasses.replace(
        base,
        n_ctx=options.n_ctx,
        vocab_multiple=128,
        attention=tuple(options.attention.split(",")),
    )


SMALL = {
    "10m": {"n_layer": 6, "n_head": 4, "d_model": 256, "vocab_size": 20_000},
    "tiny": {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 257},
}
"""Sizes that are no preset."""

# --- contenders: each makes a function that takes one step of a batch (B, T) ---------------------


def ours(options: argparse.Namespace) -> Step:
    import torch

    from megagpt.engine.compiler import compile_model
    from megagpt.model import GPT, decays, initialise

    config = shape(options)
    with torch.device(options.device):
        model = GPT(config, recompute_every=options.recompute_every)
    initialise(model.named_parameters(), config, seed=1)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    if options.dtype == "bf16":
        model.bfloat16()
    else:
        masters = {name: p.detach() for name, p in model.named_parameters()}
    groups = [
        {"params": [m for n, m in masters.items() if decays(n) is kind], "weight_decay": decay}
        for kind, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    if options.compiles:
        compile_model(model, "model" if options.device == "cpu" else "blocks")
    names = dict(model.named_parameters())

    def step(x: "Tensor", y: "Tensor") -> float:
        loss = model(x, y)
        loss.backward()
        for name, master in masters.items():
            grad = names[name].grad
            assert grad is not None
            master.grad = grad.float()
            names[name].grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.dtype == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(list(names.values()), list(masters.values()))
        return float(loss.detach())

    return step


def autocast_step(options, model, loss_of):  # type: ignore[no-untyped-def]
    """A step of a model with fp32 weights, under autocast in bf16."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if options.compiles else model
    kind, half = torch.device(options.device).type, options.dtype == "bf16"

    def step(x, y):  # type: ignore[no-untyped-def]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
            loss = loss_of(run, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def nanogpt(options: argparse.Namespace) -> Step:
    sys.path.insert(0, str(Path(options.nanogpt).expanduser()))
    from model import GPT, GPTConfig

    c = shape(options)
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model}
    config = GPTConfig(block_size=c.n_ctx, vocab_size=c.embedding_rows, bias=True, **sizes)
    model = GPT(config).to(options.device)
    return autocast_step(options, model, lambda run, x, y: run(x, y)[1])


def transformers(options: argparse.Namespace) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    c = shape(options)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model}
    config = GPT2Config(
        vocab_size=c.embedding_rows, n_positions=c.n_ctx, use_cache=False, **dropout, **sizes
    )
    model = GPT2LMHeadModel(config).to(options.device).train()

    def loss_of(run, x, y):  # type: ignore[no-untyped-def]
        return run(input_ids=x, labels=x, shift_labels=y).loss

    return autocast_step(options, model, loss_of)


def matmul(options: argparse.Namespace) -> Step:
    import torch

    c, n = shape(options), options.batch * options.n_ctx
    d, dtype = c.d_model, torch.bfloat16 if options.dtype == "bf16" else torch.float32
    rows = min(n, 2048)  # the head's logits do not fit at once
    sizes = [(n, d, 3 * d, c.n_layer), (n, d, d, c.n_layer), (n, d, 4 * d, c.n_layer)]
    sizes += [(n, 4 * d, d, c.n_layer), (rows, d, c.embedding_rows, n // rows)]
    kind = {"dtype": dtype, "device": options.device}
    products = []
    for m, d_in, d_out, times in sizes:
        x, w = torch.randn(m, d_in, **kind), torch.randn(d_out, d_in, **kind)
        y, dx, dw = torch.randn(m, d_out, **kind), torch.empty_like(x), torch.empty_like(w)
        out = torch.empty_like(y)
        # One of each kind after another, as in a step, so that no operand waits in the cache.
        products += [(x, w.t(), out), (y, w, dx), (y.t(), x, dw)] * times

    def step(x: "Tensor", y: "Tensor") -> float:
        for a, b, out in products:
            torch.mm(a, b, out=out)
        return 0.0

    return step


def batch(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (options.batch, options.n_ctx + 1)
    ids = torch.randint(0, shape(options).vocab_size, size, generator=generator)
    return ids[:, :-1].contiguous().to(options.device), ids[:, 1:].contiguous().to(options.device)


CONTENDERS = {"ours": ours, "nanogpt": nanogpt, "transformers": transformers, "matmul": matmul}


# --- processes -----------------------------------------------------------------------------------


def contend(options: argparse.Namespace) -> None:
    """A contender's process: two steps to warm up, then one for each line on stdin."""
    import torch

    from megagpt.cluster.process import keep_freed_memory

    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    name, *suffixes = options.contender.split("+")
    options.compiles = "compile" in suffixes
    if not cuda and (name == "ours" or "keep" in suffixes):
        keep_freed_memory()
    step = CONTENDERS[name](options)
    x, y = batch(options)
    step(x, y), step(x, y)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        t0, cpu0 = time.perf_counter(), time.process_time()
        loss = step(x, y)
        if cuda:
            torch.cuda.synchronize()
        found = {"wall_s": time.perf_counter() - t0, "cpu_s": time.process_time() - cpu0}
        peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes()
        card = torch.cuda.get_device_name() if cuda else "cpu"
        print(json.dumps({**found, "loss": loss, "peak_bytes": peak, "card": card}), flush=True)


def peak_bytes() -> int:
    """Highest resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def start(contender: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", contender]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    ask(child, "")
    return child


def ask(child: subprocess.Popen[str], line: str) -> dict:
    """One line to the child, one object back; what else it prints is passed over."""
    assert child.stdin and child.stdout
    child.stdin.write(line)
    child.stdin.flush()
    for answer in child.stdout:
        if answer.startswith("{"):
            return json.loads(answer)
    raise SystemExit(f"a contender ended early: {child.args}")


def main() -> None:
    options = arguments()
    if options.contender:
        contend(options)
        return
    names = [
        n for n in options.contenders.split(",") if not n.startswith("nanogpt") or options.nanogpt
    ]
    children = {name: start(name) for name in names}
    rounds = []
    for _ in range(options.rounds):
        rounds.append({name: ask(child, "step\n") for name, child in children.items()})
    for child in children.values():
        child.communicate()
    report(options, names, rounds)


def report(options: argparse.Namespace, names: list[str], rounds: list[dict]) -> None:
    config = shape(options)
    tokens = options.batch * options.n_ctx
    flops = flops_per_token(config) * tokens
    print(
        f"{options.model} ({parameters(config):,} parameters), n_ctx {options.n_ctx}, batch "
        f"{options.batch}, {options.dtype}, {options.attention}, {options.device}, "
        f"{options.threads} threads, {options.rounds} rounds, {rounds[0][names[0]]['card']}"
    )
    print("| | tokens/s | GFLOP/s | s a step | CPU s | peak GB | time / ours | CPU / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        wall = statistics.median(r[name]["wall_s"] for r in rounds)
        cpu = statistics.median(r[name]["cpu_s"] for r in rounds)
        work = products(config) * tokens if name == "matmul" else flops
        ratios = [
            statistics.median(r[name][key] / r[names[0]][key] for r in rounds)
            for key in ("wall_s", "cpu_s")
        ]
        peak = rounds[-1][name]["peak_bytes"] / 1e9
        print(
            f"| {name} | {tokens / wall:.0f} | {work / wall / 1e9:.0f} | {wall:.2f} | {cpu:.2f} "
            f"| {peak:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |"
        )
    card = rounds[0][names[0]]["card"]
    if peak := peak_tflops(card):
        wall = statistics.median(r[names[0]]["wall_s"] for r in rounds)
        print(f"MFU {flops / wall / 1e12 / peak:.1%} of {peak:.0f} TFLOP/s")


def products(config: ModelConfig) -> float:
    """FLOPs of one token's matrix products without attention's: what `matmul` multiplies."""
    d = config.d_model
    return 6.0 * (config.n_layer * 12 * d * d + config.embedding_rows * d)


if __name__ == "__main__":
    main()
