"""megagpt plan RUN.toml: what will happen, from the run file alone (L0: no torch)."""

import argparse

from megagpt.config import load_run
from megagpt.config.flops import flops_per_token, parameters
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout, layout_of
from megagpt.plan.memory import activation_bytes, state_bytes
from megagpt.plan.table import as_text, idle_as_text, ramp, stages_as_text


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    made = commands.add_parser(
        "plan",
        help="what a run will do: layout, batch ramp, steps",
        description="Checks a run file against a number of ranks and prints what will happen.",
    )
    made.add_argument("file", metavar="RUN.toml", help="run file")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a key")
    made.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks that will train, one a GPU (default: pipeline x tensor, one data rank)",
    )
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises UsageError with every reason why the run cannot go so."""
    config = load_run(args.file, args.overrides)
    share = config.parallel.pipeline * config.parallel.tensor
    world = share if args.gpus is None else args.gpus
    layout: Layout = layout_of(config, world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    rows = ramp(config, layout)
    n_parameters, schedule = parameters(config.model), config.schedule
    flops = flops_per_token(config.model) * schedule.end_tokens
    print(f"{args.file}: {n_parameters:,} parameters, {config.model.n_layer} layers")
    print(
        f"layout: {layout}, ZeRO stage {ds_config['zero_optimization']['stage']}, "
        f"micro-batch up to {config.parallel.micro_batch}, {config.parallel.dtype}"
    )
    stage = ds_config["zero_optimization"]["stage"]
    states, most = state_bytes(config, layout, stage), max(row.micro_batch for row in rows)
    print(
        f"memory: {states / 1e9:.3g} GB a rank for weights, gradients and optimizer without "
        f"offload, {activation_bytes(config, layout, most) / 1e9:.3g} GB for activations with "
        f"micro-batches of {most}"
    )
    print(
        f"run: {schedule.end_tokens:,} tokens in {schedule.n_steps:,} steps, {flops:.3e} model "
        f"FLOPs ({flops / 8.64e19:,.3g} PF-days)\n"
    )
    if layout.pipeline > 1:
        print(stages_as_text(config, layout) + "\n")
    print(as_text(rows))
    if idle := idle_as_text(config, layout, rows):
        print("\n" + idle)
    return 0
