"""Fine-tuning on any text: minGPT's oldest wish, on a model of one's own or an imported one.

    python examples/finetune_text.py                           # Python's language reference
    python examples/finetune_text.py --text mine.txt --start gpt2-weights
    python examples/finetune_text.py --keep 0.3                # and goes on reading the old text

`--start` is a run folder, or what `megagpt import` wrote; the model of examples/chargpt.py unless
given. The new text's last tenth is held out. The last line is the perplexity of a token before and
after, on the held-out part of the new text and on that of the old one, which the model forgets
unless it is kept in mind: with `--keep 0.3` three samples of ten are of the old text.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

from training import options, run, script, start, text_of, train

from megagpt.checkpoint import load_model
from megagpt.checkpoint.export import Weights
from megagpt.corpus.unfinished import beside
from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.tokenizer.portable import described
from megagpt.use.generate import TextOptions, generate
from megagpt.use.score import ScoreOptions, evaluate


def write(args: argparse.Namespace, weights: Weights) -> Path:
    """The new text as shards in the vocabulary of the weights; the folder of its held-out part."""
    text = args.text
    if text is None:
        text = beside(args.data, ".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        write_file(text, "\n".join(topics[name] for name in sorted(topics)))
    name, encoding = weights.facts["tokenizer"], weights.tokenizer()
    if name not in ("gpt2", "bytes"):
        name = str(beside(args.data, "-tokenizer.json"))
        write_file(Path(name), described(encoding))
    words = [text, "--format", "text", "--output", args.data, "--tokenizer", name]
    words += ["--validation-fraction", 0.1, "--validation-by-place"]
    script("tokenize_corpus.py", *words)
    return beside(args.data, "-validation")


def look(args: argparse.Namespace, folder: Path, held_out: list[Path]) -> list[float]:
    """The perplexity of a token in each held-out part; prints a sample."""
    model, encoding, _ = load_model(folder)
    drawn = TextOptions(
        max_tokens=args.sample, temperature=0.8, seed=args.seed, start=not args.prompt
    )
    print(f"--- {folder}\n{args.prompt}{''.join(generate(model, encoding, args.prompt, drawn))}")
    read = ScoreOptions(max_tokens=args.score_tokens)
    return [evaluate(model, encoding, part, read).perplexity.value for part in held_out]


def main() -> None:
    """Writes the data, trains, and tells what was learned and what was forgotten."""
    made = options("Fine-tunes a model on a text.", "runs/finetuned", 600, lr=1e-3)
    add = made.add_argument
    add("--text", type=Path, help="a text file in UTF-8 instead of Python's language reference")
    add("--data", type=Path, default=Path("data/finetune"), help="folder of the shards")
    add("--keep", type=float, default=0.0, help="share of the samples that is of the old text")
    add("--batch", type=int, default=16, help="sequences of a step")
    add("--score-tokens", type=int, default=200_000, help="tokens of each part that are scored")
    add("--prompt", default="The ", help="how the samples begin")
    add("--sample", type=int, default=300, help="tokens of a sample")
    args = made.parse_args()
    weights = start(args.start)
    data = weights.config.data  # of imported weights: a placeholder
    if not 0 <= args.keep < 1:
        raise UsageError(f"--keep {args.keep}: must be 0 or more and below 1")
    if args.keep and not all(Path(s.path).exists() for s in data.train):
        raise UsageError(
            f"--keep {args.keep}: what {args.start} was trained on is not here; leave it out"
        )
    new = write(args, weights)
    old = [Path(s.path) for s in data.validation if Path(s.path).exists()]
    share = args.keep / sum(s.weight for s in data.train)
    kept = [(s.path, share * s.weight) for s in data.train if args.keep]
    sources = {"train": [(args.data, 1 - args.keep), *kept], "validation": [new, *old]}
    before = look(args, weights.folder, [new, *old])
    more = {"init_from": str(args.start), "evaluate": {"batches": 20}}
    train(args, text_of(args, asdict(weights.config.model), sources, args.batch, **more))
    after = look(args, args.output, [new, *old])
    told = [f"{one:.3f} -> {two:.3f}" for one, two in zip(before, after, strict=True)]
    print(f"perplexity of the new text {told[0]}, of the old text {', '.join(told[1:]) or 'none'}")


if __name__ == "__main__":
    run(main)
