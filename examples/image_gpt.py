"""An Image GPT of small digits: it draws, completes halves, and what its layers know is measured.

    python examples/image_gpt.py
    python examples/image_gpt.py --images mine.npz --data data/mine --run mine.toml  # one's own

scikit-learn's digits (8 x 8 pixels, 17 greys), each anywhere in a field of 12 x 12, train
launch/runs/igpt-digits.toml. Pictures of what it draws and completes go into the run folder. Then a
logistic regression tells the digit from each layer's features, averaged over the pixels, with all
labels; and with 25, 10 and 4 labels a class from those of one layer, and from the raw pixels. The
last line is the figure with 4.
"""

import argparse
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tomli_w
import torch
from probing import FEW, Labelled, by_layer, few_labels, over_splits
from training import SCRIPTS, run, script, train

from megagpt.checkpoint.export import open_weights
from megagpt.config import dump_run, load_run
from megagpt.corpus.unfinished import beside
from megagpt.errors import UsageError
from megagpt.files import write_durably
from megagpt.model import GPT
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer.palette import Palette
from megagpt.use.pictures import completions, features, grid, half, paint, png

RUN = SCRIPTS.parent / "launch/runs/igpt-digits.toml"
RAW = "raw pixels"
COLUMNS = 8


class Part(NamedTuple):
    """Images of one split: pixels (N, n_ctx) and classes (N,)."""

    pixels: torch.Tensor
    labels: np.ndarray

    def known(self) -> "Part":
        """The images whose class is known."""
        return Part(self.pixels[self.labels >= 0], self.labels[self.labels >= 0])


def read(folder: Path, n_ctx: int) -> Part:
    """A prepared split in the order of its files; labels of -1 where none is known."""
    loader = TokenLoader([(folder, 1.0)], n_ctx, 0, shuffle=False)
    pixels = torch.from_numpy(loader.samples(0, loader.n_windows)[:, 1:])
    there = folder / "labels.npy"
    return Part(pixels, np.load(there) if there.exists() else np.full(len(pixels), -1))


def probed(args: argparse.Namespace, part: Part) -> Part:
    """The training images that are probed."""
    rows = np.arange(len(part.labels))
    if args.images != "digits":  # which are mixed; files in folders come class by class
        rows = np.random.default_rng(args.seed).permutation(rows)
    return Part(part.pixels[rows[: args.probed]], part.labels[rows[: args.probed]])


def run_text(args: argparse.Namespace) -> str:
    """The run file on this data; the learning rate's course is stretched or shortened whole."""
    tree = tomllib.loads(dump_run(load_run(args.run)))  # with all that its preset says
    tree |= {"output": str(args.output), "seed": args.seed}
    sources = [{"path": str(path)} for path in (args.data, beside(args.data, "-validation"))]
    tree["data"] |= {"train": sources[:1], "validation": sources[1:]}
    if args.steps:
        schedule = tree["schedule"]
        total = args.steps * schedule["batch_tokens"]
        warmup = min(schedule["warmup_tokens"], total // 2)
        schedule |= {"total_tokens": total, "warmup_tokens": warmup, "decay_tokens": 0}
    return tomli_w.dumps(tree)


def draw(model: GPT, palette: Palette, held: Part, folder: Path, seed: int) -> None:
    """Two pictures: images of the model's own; originals, their upper halves, three completions."""
    own = palette.decode(paint(model, torch.zeros(4 * COLUMNS, 0), seed).numpy())
    sheet = own.reshape(4, COLUMNS, *own.shape[1:])
    write_durably(folder / "drawn.png", png(grid(sheet, 6)))
    first = held.pixels[:COLUMNS]
    whole = palette.decode(first.numpy())
    done = [palette.decode(one.numpy()) for one in completions(model, first, seed, 3)]
    write_durably(folder / "completed.png", png(grid(np.stack([whole, half(whole), *done]), 6)))
    print(f"{folder}/drawn.png and completed.png: images of its own, and completed upper halves")


def labelled(model: GPT, palette: Palette, part: Part) -> Labelled:
    """What each layer knows of images, and their pixels as numbers; grey ones have one channel."""
    kinds = {f"layer {i}": f.cpu().numpy() for i, f in enumerate(features(model, part.pixels))}
    shown = palette.decode(part.pixels.numpy()).astype(float)
    grey = (shown == shown[..., :1]).all()
    raw = (shown[..., :1] if grey else shown).reshape(len(shown), -1)
    return Labelled(kinds | {RAW: raw}, part.labels)


def main() -> None:
    """Writes the data, trains, draws, and probes."""
    made = argparse.ArgumentParser(
        description="Trains an Image GPT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--images", default="digits", help="what data_prep/images.py takes")
    add("--run", type=Path, default=RUN, help="run file")
    add("--data", type=Path, default=Path("data/digits"), help="folder of the shards")
    add("--output", type=Path, default=Path("runs/image_gpt"), help="run folder")
    add("--steps", type=int, default=0, help="steps to train; 0: as the run file says")
    add("--probed", type=int, default=1426, help="training images that are probed, at most")
    add("--draws", type=int, default=20, help="draws of few labels")
    add("--splits", type=int, default=0, help="random splits to probe besides, 2 or more; 0: none")
    add("--ranks", type=int, default=1, help="processes, started by deepspeed where several")
    add("--seed", type=int, default=1337, help="initial weights and data order")
    add("--allow-changes", action="store_true", help="go on with a run that had other options")
    args = made.parse_args()
    if args.draws < 2:
        raise UsageError(f"--draws {args.draws}: must be 2 or more, for an interval of their mean")
    if args.splits < 0 or args.splits == 1:
        raise UsageError(f"--splits {args.splits}: must be 2 or more, or 0")
    place = ["--output", args.data, "--validation-fraction", 0.2]
    if args.images == "digits":
        place += ["--field", 12, "--copies", 8]
    script("images.py", args.images, *place)
    model = train(args, run_text(args))
    palette, n_ctx = open_weights(args.output).palette(), model.config.n_ctx
    assert palette is not None
    held = read(beside(args.data, "-validation"), n_ctx)
    draw(model, palette, held, args.output, args.seed)
    own = probed(args, read(args.data, n_ctx))
    parts = [labelled(model, palette, one.known()) for one in (own, held)]
    if min(len(np.unique(part.labels)) for part in parts) < 2:
        print("no probe: the images are of no classes, or of one")
        return
    for name, share in by_layer(*parts).items():
        print(f"{name}: {share:.1f}% with all labels")
    for few in reversed(FEW):
        print(few_labels(*parts, few, RAW, args.draws))
    if args.splits:
        print("\n".join(over_splits(*parts, args.splits)))


if __name__ == "__main__":
    run(main)
