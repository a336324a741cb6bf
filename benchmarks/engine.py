"""What the engine costs: our loop against a bare PyTorch loop, and the way to the first step.

    python benchmarks/engine.py overhead [--dtype bf16] [--rounds 7]
    python benchmarks/engine.py start [--ranks 2]

overhead: the same model, batches and optimizer in one process, in turn: ZeRO-1 under our loop
(with loading, logging and the digest of every step) and a loop of plain torch. tokens/s, ratio of
medians. start: the quickstart's model under the deepspeed launcher, seconds to the end of the first
step and where they go. Both need data/python-stdlib (make quickstart prepares it).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "launch/runs/quickstart.toml"
LAUNCHED = "BENCHMARK_LAUNCHED"


def main() -> None:
    """Runs one of the two benchmarks."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("what", choices=("overhead", "start", "rank"))
    made.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    made.add_argument("--rounds", type=int, default=7, help="rounds of 4 steps each")
    made.add_argument("--ranks", type=int, default=2)
    made.add_argument("--output", default="", help=argparse.SUPPRESS)
    made.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = made.parse_args()
    os.chdir(ROOT)
    if args.what == "overhead":
        overhead(args.dtype, args.rounds)
    elif args.what == "start":
        start(args.ranks)
    else:
        rank(args.output)


def build(output: str, *overrides: str):
    """A started run of the quickstart on this rank, and the seconds of each phase of its start."""
    from megagpt.cluster.process import join, prepare_environment
    from megagpt.cluster.ranks import discover
    from megagpt.config import load_run
    from megagpt.plan.ds_config import read_ds_config, resolve
    from megagpt.plan.layout import layout_of

    phases, t0 = {}, time.perf_counter()
    config = load_run(RUN, [f"output={output}", *overrides])
    ranks = discover(os.environ)
    layout = layout_of(config, ranks.world)
    tree = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    prepare_environment(ranks, os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    phases["read configuration"] = time.perf_counter() - t0
    t0 = time.perf_counter()
    join(ranks)
    phases["import torch and deepspeed, join"] = time.perf_counter() - t0
    t0 = time.perf_counter()
    from megagpt.loop import Trainer

    Path(output).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, layout, ranks, tree)
    phases["model, initial weights, deepspeed.initialize"] = time.perf_counter() - t0
    t0 = time.perf_counter()
    ours = Ours(trainer)
    phases["verify data, look for checkpoints, open logs"] = time.perf_counter() - t0
    return ours, phases


def rank(output: str) -> None:
    """One rank of the start benchmark; rank 0 prints its phases."""
    began = time.time() - float(os.environ[LAUNCHED])
    ours, phases = build(output)
    trainer, t0 = ours.trainer, time.perf_counter()
    ours.step()
    phases["first step"] = time.perf_counter() - t0
    if trainer.ranks.rank == 0:
        total = time.time() - float(os.environ[LAUNCHED])
        print("PHASES " + json.dumps({"launcher": began, **phases, "total": total}), flush=True)
    trainer.close()
    from megagpt.cluster.process import leave

    leave()


def start(ranks: int) -> None:
    """Five launches; medians."""
    runs = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    str(Path(sys.executable).parent / "deepspeed"),
                    "--num_gpus", str(ranks), __file__, "rank", "--output", f"{folder}/run",
                ],
                env={**os.environ, LAUNCHED: str(time.time())},
                capture_output=True,
                text=True,
                check=True,
            )  # fmt: skip
        line = next(x for x in done.stdout.splitlines() if "PHASES " in x)
        runs.append(json.loads(line.split("PHASES ")[1]))
    for phase in runs[0]:
        print(f"{statistics.median(r[phase] for r in runs):6.2f} s  {phase}")


def overhead(dtype: str, rounds: int) -> None:
    """Rounds of both loops in turn."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as folder:
        changes = ("schedule.ramp_start_tokens=0", "schedule.ramp_increment_tokens=2048")
        ours, _ = build(f"{folder}/run", f"parallel.dtype={dtype}", *changes)
        trainer = ours.trainer
        bare = Bare(trainer)
        tokens = trainer.config.schedule.batch_tokens
        speeds: dict[str, list[float]] = {"megagpt": [], "plain torch": []}
        for number in range(rounds + 1):
            for name, step in (("megagpt", ours.step), ("plain torch", bare.step)):
                t0 = time.perf_counter()
                for _ in range(4):
                    step()
                if number:  # the first round warms up
                    speeds[name].append(4 * tokens / (time.perf_counter() - t0))
        for name, values in speeds.items():
            print(
                f"{name:<12} {statistics.median(values):8.0f} tokens/s "
                f"(min {min(values):.0f}, max {max(values):.0f})"
            )
        pairs = zip(*speeds.values(), strict=True)
        print(f"ratio {statistics.median(a / b for a, b in pairs):.3f} (median of rounds), {dtype}")
        trainer.close()


class Ours:
    """The loop of a started run, a step at a time, without agreements and checkpoints."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.run = trainer.start(allow_changes=False)

    def step(self) -> None:
        """One step and its record."""
        step = self.run.next_step(self.trainer.config)
        result = self.trainer.train_step(self.run, step)
        before, self.run = self.run, self.run.after(step, result)
        self.trainer.record(before, self.run, step, result)


class Bare:
    """The same training in plain torch: fp32 masters by hand under bf16."""

    def __init__(self, trainer) -> None:
        import torch

        from megagpt.engine.optimizer import build_optimizer
        from megagpt.model import GPT, initialise
        from megagpt.plan.layout import micro_batch_of

        config = trainer.config
        self.micro_batch = micro_batch_of(config, trainer.layout, config.schedule.batch_tokens)
        self.trainer, self.torch, self.samples = trainer, torch, 0
        self.model = GPT(config.model)
        initialise(self.model.named_parameters(), config.model, config.seed)
        self.masters = [
            (n, torch.nn.Parameter(p.detach().clone())) for n, p in self.model.named_parameters()
        ]
        if config.parallel.dtype == "bf16":
            self.model.bfloat16()
        self.optimizer = build_optimizer(config.optimizer, self.masters)

    def step(self) -> None:
        """Forward, backward, clip, AdamW on one batch."""
        torch, config = self.torch, self.trainer.config
        count, micro = config.schedule.batch_tokens // config.model.n_ctx, self.micro_batch
        batches = self.trainer.loader.micro_batches(self.samples, count, 0, 1, micro)
        self.samples += count
        total = 0.0
        for x, y in batches:
            loss = self.model(x, y) / (count // micro)
            loss.backward()
            total += float(loss)
            # Gradients accumulate in fp32, as the engine's do.
            for (_, master), own in zip(self.masters, self.model.parameters(), strict=True):
                if master.grad is None:
                    master.grad = own.grad.float()
                else:
                    master.grad += own.grad
                own.grad = None
        torch.nn.utils.clip_grad_norm_([m for _, m in self.masters], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for (_, master), own in zip(self.masters, self.model.parameters(), strict=True):
                own.copy_(master)


if __name__ == "__main__":
    main()
