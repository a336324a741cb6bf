"""`megagpt evaluate RUN_DIR --data DIR`: how well a trained model predicts a corpus (L3).

One process reads the checkpoint of any layout. The corpus is cut as in training: windows of n_ctx
targets, one after another across the borders of documents, so that every token is scored once,
END-OF-DOCUMENT too. All but the first of a window's targets see the window's tokens before them
and no others: the earliest have next to no context. With a stride S < n_ctx a window moves S
tokens at a time and only its last S targets are scored, so that each sees n_ctx - S tokens and
more (save at the start of the corpus), for n_ctx / S times the work.
"""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megagpt.errors import UsageError
from megagpt.use.tally import CONFIDENCE, Result

log = logging.getLogger("megagpt.use.evaluate")

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names in a run file, and torch's."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss, perplexity and bits per byte of a trained model on a corpus",
        description="Scores every token of prepared corpora once with the weights of a run, one of "
        "its checkpoints or a consolidated folder, on one process, whatever layout trained them. "
        "The result goes to stdout, everything else to stderr.",
        epilog=f"Intervals hold {CONFIDENCE:.0%} and treat documents as independent. Windows of "
        "n_ctx tokens follow each other as in training: the first tokens of each have little "
        "context, unless --stride gives them more.",
    )
    parser.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="run folder, checkpoint or consolidated folder"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        action="append",
        required=True,
        help="corpus: a folder with a manifest.json; repeatable",
    )
    number = parser.add_argument
    number("--checkpoint", metavar="STEP", type=int, help="step of the run's checkpoint (newest)")
    number("--batch-size", metavar="N", type=int, default=8, help="windows at a time (default: 8)")
    number(
        "--max-tokens",
        metavar="N",
        type=int,
        default=0,
        help="tokens of each corpus at most, in windows drawn at random, always the same: those "
        "that the run's own evaluation reads first (default: all)",
    )
    number(
        "--stride",
        metavar="N",
        type=int,
        default=0,
        help="tokens scored in each window, a divisor of n_ctx; fewer give every token more "
        "context and take longer (default: n_ctx)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="fp32",
        help="weights and activations (default: fp32)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the figures of each corpus."""
    import torch

    from megagpt.checkpoint import load_model
    from megagpt.log.metrics import encode
    from megagpt.use.score import Options, evaluate

    options = Options(batch_size=args.batch_size, stride=args.stride, max_tokens=args.max_tokens)
    device = _device(args.device)
    model, encoding, facts = load_model(_checkpoint(args.folder, args.checkpoint))
    # Rounded before it moves: a device may hold a model in 16 bits that it could not in 32.
    model.to(getattr(torch, DTYPES[args.dtype])).to(device)
    results = [evaluate(model, encoding, folder, options) for folder in args.data]
    checkpoint, step, tokens = facts["checkpoint"], facts["step"], facts["tokens"]
    if args.json:
        how = {
            "checkpoint": str(checkpoint),
            "step": step,
            "trained_tokens": tokens,
            "n_ctx": model.config.n_ctx,
            "stride": options.stride or model.config.n_ctx,
            "dtype": args.dtype,
            "confidence": CONFIDENCE,
        }
        print(encode({**how, "results": [asdict(one) for one in results]}).decode(), end="")
        return 0
    log.info("%s: step %d, trained on %s tokens", checkpoint, step, f"{tokens:,}")
    for one in results:
        print("\n".join(_lines(one)))
    return 0


def _lines(one: Result) -> Iterator[str]:
    """A result for people."""
    yield (
        f"{one.data}: {one.tokens:,} tokens and {one.bytes:,} bytes of {one.documents:,} documents"
        + (f", {one.left_out:,} tokens left out" if one.left_out else "")
    )
    for name, estimate, unit in (
        ("loss", one.loss, " nats per token"),
        ("perplexity", one.perplexity, ""),
        ("bits per byte", one.bits_per_byte, ""),
    ):
        interval = ""
        if not math.isnan(estimate.low):
            interval = f"   {CONFIDENCE:.0%}: {estimate.low:.4f} to {estimate.high:.4f}"
        yield f"  {name:<14}{estimate.value:.4f}{unit}{interval}"


def _checkpoint(folder: Path, step: int | None) -> Path:
    """The run folder, or its checkpoint of a step. Raises UsageError when there is none."""
    if step is None:
        return folder
    from megagpt.checkpoint import list_checkpoints
    from megagpt.checkpoint.record import name_of

    there = {path.name: path for path in list_checkpoints(folder)}
    if name_of(step) not in there:
        steps = ", ".join(str(int(name.removeprefix("step_"))) for name in there) or "none"
        raise UsageError(
            f"--checkpoint {step}: {folder} has no checkpoint of this step; there are: {steps}"
        )
    return there[name_of(step)]


def _device(name: str | None) -> str:
    """The device to compute on. Raises UsageError for one that this machine lacks."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not on this machine ({reason}); use cpu") from None
    return name
