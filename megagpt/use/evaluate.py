"""`megagpt evaluate RUN_DIR --data DIR`: how well a trained model predicts a corpus (L3).

One process reads the checkpoint of any layout. The corpus is cut as in training: windows of n_ctx
targets, one after another across the borders of documents, so that every token is scored once,
END-OF-DOCUMENT too. All but the first of a window's targets see the window's tokens before them
and no others: the earliest have next to no context. With a stride S < n_ctx a window moves S
tokens at a time and only its last S targets are scored, so that each sees n_ctx - S tokens and
more (save at the start of the corpus), for n_ctx / S times the work. A record is one window, and
of a masked corpus the targets count that the mask names.
"""

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import UsageError
from megagpt.use.loading import DTYPES, add_placing, add_run_dir, device_named

if TYPE_CHECKING:
    from megagpt.corpus.manifest import CorpusManifest

log = logging.getLogger("megagpt.use.evaluate")

CONFIDENCE = 0.95
"""Of the intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of the corpus, and the interval that holds the figure of all such text with
    probability CONFIDENCE; NaN where there are too few documents to tell."""

    value: float
    low: float
    high: float

    def interval(self, form: str, scale: float = 1.0) -> str:
        """What stands behind the figure for people, each number times `scale`; "" without one."""
        if math.isnan(self.low):
            return ""
        return f"   {CONFIDENCE:.0%}: {scale * self.low:{form}} to {scale * self.high:{form}}"

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """A rising function of the figure."""
        return Estimate(function(self.value), function(self.low), function(self.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What the model makes of one corpus."""

    data: str
    tokens: int
    """Tokens scored."""
    documents: int
    """Documents with a token among them."""
    bytes: int
    """Bytes of text that the scored tokens stand for; END-OF-DOCUMENT stands for none."""
    left_out: int
    """Tokens of the corpus that are not scored: the first (of each record), those that fill no
    window, those that the mask leaves out, and those beyond max_tokens."""
    loss: Estimate
    """Mean over the scored tokens, nats per token."""
    perplexity: Estimate
    """exp(loss)."""
    bits_per_byte: Estimate
    """All bits, those of END-OF-DOCUMENT too, over the bytes of text; NaN without text."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of corpora; megagpt.tasks.command adds those of tasks."""
    parser.description = (
        "Scores every token of prepared corpora once with the weights of a run, one of "
        "its checkpoints or a consolidated folder, on one process, whatever layout trained them; "
        "or tests the model on tasks. "
        "The result goes to stdout, everything else to stderr."
    )
    parser.epilog = (
        f"Intervals hold {CONFIDENCE:.0%} and treat documents as independent. Windows of "
        "n_ctx tokens follow each other as in training: the first tokens of each have little "
        "context, unless --stride gives them more."
    )
    add_run_dir(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="corpus: a folder with a manifest.json; repeatable",
    )
    number = partial(parser.add_argument, metavar="N", type=int, default=0)
    step = "step of the run's checkpoint (newest)"
    number("--checkpoint", metavar="STEP", default=None, help=step)
    number("--batch-size", default=8, help="windows at a time (default: 8)")
    number(
        "--max-tokens",
        help="tokens of each corpus at most, in windows drawn at random, always the same: those "
        "that the run's own evaluation reads first (default: all)",
    )
    number(
        "--stride",
        help="tokens scored in each window, a divisor of n_ctx; fewer give every token more "
        "context and take longer (default: n_ctx)",
    )
    parser.add_argument(
        "--by-document",
        action="store_true",
        help="score each document by itself from END-OF-DOCUMENT on, as EleutherAI's harness does",
    )
    add_placing(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Prints the figures of each corpus."""
    import torch

    from megagpt.checkpoint.export import open_weights
    from megagpt.corpus.manifest import read_manifest
    from megagpt.log.metrics import encode
    from megagpt.use.likelihood import Scorer
    from megagpt.use.score import ScoreOptions, evaluate, evaluate_apart

    if not args.data:
        raise UsageError("nothing to evaluate: give --data DIR, --task NAME or --harness TASKS")
    if args.by_document and (args.stride or args.max_tokens):
        raise UsageError(
            "--by-document: scores every document whole; leave out --stride and --max-tokens"
        )
    options = ScoreOptions(
        batch_size=args.batch_size, stride=args.stride, max_tokens=args.max_tokens
    )
    device = device_named(args.device)
    weights = open_weights(checkpoint_of(args.folder, args.checkpoint))
    facts = weights.told()
    manifests = [read_manifest(data) for data in args.data]
    # Neither has a tokenizer where ids stand for no text; those of images have a palette.
    palette = weights.palette()
    texts = facts["tokenizer"] or any(manifest.tokenizer_name for manifest in manifests)
    encoding = weights.tokenizer() if texts and not palette else None
    model = weights.model(device, getattr(torch, DTYPES[args.dtype]))
    if args.by_document:
        for manifest in manifests:
            _check_documents(manifest)
        scorer = Scorer(model, encoding or weights.tokenizer(), args.batch_size)
        results = [evaluate_apart(scorer, folder) for folder in args.data]
    else:
        results = [evaluate(model, palette or encoding, folder, options) for folder in args.data]
    if args.json:
        how = {
            "checkpoint": str(facts["checkpoint"]),
            "step": facts["step"],
            "trained_tokens": facts["tokens"],
            "n_ctx": model.config.n_ctx,
            "stride": options.stride or model.config.n_ctx,
            "by_document": args.by_document,
            "dtype": args.dtype,
            "confidence": CONFIDENCE,
        }
        print(encode({**how, "results": [asdict(result) for result in results]}).decode(), end="")
        return
    log.info("{checkpoint}: step {step}, trained on {tokens:,} tokens".format(**facts))
    for result in results:
        print("\n".join(_lines(result)))


def _check_documents(manifest: "CorpusManifest") -> None:
    """Raises UsageError for a corpus that is not of documents whose every token is scored."""
    if manifest.record_length or manifest.masked:
        raise UsageError(
            f"--by-document: {manifest.folder} is of records, or has a mask, and is scored as it "
            "is trained; leave --by-document out"
        )


def _lines(result: Result) -> Iterator[str]:
    """A result for people."""
    unscored = f", {result.left_out:,} tokens left out" if result.left_out else ""
    size = f" and {result.bytes:,} bytes" if result.bytes else ""
    scored = f"{result.tokens:,} tokens{size} of {result.documents:,} documents"
    yield f"{result.data}: {scored}{unscored}"
    for name, estimate, unit in (
        ("loss", result.loss, " nats per token"),
        ("perplexity", result.perplexity, ""),
        ("bits per byte", result.bits_per_byte, ""),
    ):
        if math.isnan(estimate.value):  # ids that stand for no text
            continue
        yield f"  {name:<14}{estimate.value:.4f}{unit}{estimate.interval('.4f')}"


def checkpoint_of(folder: Path, step: int | None) -> Path:
    """The run folder, or its checkpoint of a step. Raises UsageError when there is none."""
    if step is None:
        return folder
    from megagpt.checkpoint.record import list_checkpoints, step_of

    steps = {step_of(path): path for path in list_checkpoints(folder)}
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UsageError(
            f"--checkpoint {step}: {folder} has no checkpoint of this step; there are: {known}"
        )
    return steps[step]
