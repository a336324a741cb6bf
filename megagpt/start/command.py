"""`megagpt init [NAME]`: a run file for a corpus, a size and the machine at hand.

megagpt init mine --data data/mine
megagpt init web --data data/fineweb --size gpt3-1.3b --gpus 32 --gpu h100
"""

import argparse
import math
import shlex
from pathlib import Path

import psutil

from megagpt.check.machine import Gpu, gpus
from megagpt.check.run_file import WITHOUT_BF16
from megagpt.cluster.ranks import cores
from megagpt.config import parse_run
from megagpt.config.flops import parameters
from megagpt.config.presets import PRESETS
from megagpt.corpus.manifest import MANIFEST, CorpusManifest, read_manifest
from megagpt.corpus.pipe import validation_folder
from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.plan.accelerators import ACCELERATORS, accelerator_in, known_gpu
from megagpt.plan.candidates import Cluster
from megagpt.start.fit import MINUTES, SIZES, Fitted, Wish, fit
from megagpt.start.run_text import run_text

DATA = Path("data")
"""Where a corpus is looked for when none is named."""
PREPARE = (
    "python data_prep/tokenize_corpus.py TEXT... --output data/NAME --validation-fraction 0.1 "
    "--validation-by-place"
)
"""By place, because of one text nothing else is kept aside."""


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = (
        "Writes NAME.toml, a commented run file of at most 20 lines: the vocabulary, "
        "context, tokens, batch, warm-up and layout are fitted to the corpus and the machine."
    )
    made.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="default: the corpus's name"
    )
    made.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="DIR",
        help="prepared corpora, mixed by their sizes; default: data/NAME, or the one in data/",
    )  # fmt: skip
    made.add_argument(
        "--size", default="", metavar="SIZE",
        help=f"{', '.join(SIZES)}, or a preset: {', '.join(PRESETS)}",
    )  # fmt: skip
    made.add_argument("--tokens", type=float, metavar="N", help="to train on, as 3e9")
    made.add_argument(
        "--minutes", type=float, default=MINUTES, metavar="M",
        help="of training on a CPU, where --tokens is not given (default: %(default)g)",
    )  # fmt: skip
    made.add_argument("--gpus", type=int, default=0, metavar="N", help="default: those found here")
    made.add_argument(
        "--gpu", default="", metavar="NAME", help=f"their kind: {', '.join(ACCELERATORS)}"
    )
    made.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")


def run(args: argparse.Namespace) -> None:
    """Writes the file and says what comes next. Raises UsageError for what cannot be."""
    name = args.name.removesuffix(".toml")
    if not name and len(args.data) > 1 and not args.data[-1].exists():
        raise UsageError(f"--data {args.data[-1]}: no such folder; a NAME stands before --data")
    corpora = [_corpus(path) for path in args.data or [_meant_corpus(name)]]
    name = name or corpora[0].folder.name
    path = Path(f"{name}.toml")
    if path.exists():
        raise UsageError(f"{path}: is there already; give another NAME, or remove it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it, or give another NAME")
    for option, value in (("tokens", args.tokens), ("minutes", args.minutes)):
        if value is not None and not value > 0:
            raise UsageError(f"--{option} {value:g}: must be above 0")
    wish = Wish(size=args.size, tokens=math.ceil(args.tokens or 0), minutes=args.minutes)
    cards = [] if args.gpus else gpus()
    machine = machine_of(args, cards)
    fitted = fit(corpora, _validation(corpora[0]), machine, f"runs/{path.stem}", wish)
    text = run_text(fitted, corpora[0], str(path))
    names = [card.name for card in cards] or [(args.gpu or "").upper()]
    if any(old in name for name in names for old in WITHOUT_BF16):
        text += 'dtype = "fp16"\n'
    # What is written is what load_run reads, or nothing is.
    parse_run(text, name=str(path))
    write_file(path, text)
    print(_told(fitted, path))


def _told(fitted: Fitted, path: Path) -> str:
    """What was chosen, and the next commands."""
    config, schedule = fitted.config, fitted.config.schedule
    lines = [
        f"wrote {path}: {fitted.size}, {parameters(config.model):,} parameters, "
        f"{schedule.total_tokens:,} tokens ({fitted.epochs:.3g} epochs: {fitted.why_tokens}) in "
        f"{schedule.n_steps:,} steps",
    ]
    if not config.data.validation:
        lines.append("no validation corpus was found, so only the training loss will be known")
    if judged := fitted.judged:
        low, high = (judged.days * 24 * end for end in judged.time_ends)
        cluster = judged.cluster
        lines.append(
            f"on {cluster.gpus:,} {cluster.gpu}: {judged.peak / 1e9:.1f} of "
            f"{cluster.device.memory_gb:.0f} GB a GPU, {judged.days * 24:,.3g} hours (80%: "
            f"{low:,.3g} to {high:,.3g})"
        )
    lines.append(f"next: megagpt train {shlex.quote(str(path))}")
    return "\n".join(lines)


def machine_of(args: argparse.Namespace, cards: list[Gpu]) -> Cluster | int:
    """The GPUs that are named or found, else the cores of this CPU. Raises UsageError."""
    named = args.gpu and known_gpu(args.gpu)
    for option in ("gpus", "gpus_per_node"):
        if getattr(args, option) < (option != "gpus"):
            name = option.replace("_", "-")
            raise UsageError(f"--{name} {getattr(args, option)}: must be above 0")
    count = args.gpus or len(cards)
    if not count:
        return cores()
    found = (accelerator_in(cards[0].name) or "a100") if cards else "h100"
    return Cluster(
        gpu=named or found,
        gpus=count,
        per_node=min(count, args.gpus_per_node),
        domain=min(count, args.gpus_per_node),
        host_gb=psutil.virtual_memory().total / 1e9 if cards else 0.0,
    )


# --- corpora ------------------------------------------------------------------------------------


def _meant_corpus(name: str) -> Path:
    """data/NAME, or the one corpus below data/. Raises UsageError where there is none, or are
    several."""
    if name and (DATA / name / MANIFEST).is_file():
        return DATA / name
    found = sorted(path.parent for path in DATA.glob(f"*/{MANIFEST}"))
    found = [path for path in found if not path.name.endswith(("-validation", "-test"))]
    if not found:
        raise UsageError(
            f"no prepared corpus in {DATA}/; make one:\n  {PREPARE}\nor name its folder: --data DIR"
        )
    if len(found) > 1:
        raise UsageError(f"--data: name one or several of {', '.join(map(str, found))}")
    return found[0]


def _corpus(path: Path) -> CorpusManifest:
    """A prepared corpus. Raises UsageError for text that is not prepared yet."""
    if path.is_file() or (path.is_dir() and not (path / MANIFEST).exists()):
        raise UsageError(f"--data {path}: is not a prepared corpus; make one of text:\n  {PREPARE}")
    # `.` and `..` have no name, after which the run is called.
    return read_manifest(path if path.name not in ("", "..") else path.resolve())


def _validation(corpus: CorpusManifest) -> CorpusManifest | None:
    """The corpus's validation split, where there is one with something in it."""
    folder = validation_folder(corpus.folder)
    held_out = read_manifest(folder) if (folder / MANIFEST).exists() else None
    return held_out if held_out and held_out.tokens else None
