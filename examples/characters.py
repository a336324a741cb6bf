"""What chargpt and text8 share: a model of bytes, its options, its training and a sample."""

import argparse
from pathlib import Path

import tiktoken
from training import run_text, train

from megagpt.checkpoint import load_model
from megagpt.model import GPT
from megagpt.use.generate import TextOptions, generate

VOCABULARY = 257
"""The bytes and END-OF-DOCUMENT."""


def reading(made: argparse.ArgumentParser, data: str, context: int, batch: int) -> None:
    """Adds what a step reads to a command line."""
    add = made.add_argument
    add("--data", type=Path, default=Path(data), help="folder of the shards")
    add("--context", type=int, default=context, help="characters seen at once")
    add("--batch", type=int, default=batch, help="sequences of a step")


def learn(args: argparse.Namespace, prompt: str, length: int) -> tuple[GPT, tiktoken.Encoding]:
    """Trains on the shards and prints a sample: what the model writes behind `prompt`."""
    train(args, run_text(args, args.data, args.context, VOCABULARY, args.batch))
    model, encoding, _ = load_model(args.output)
    drawn = TextOptions(max_tokens=length, temperature=0.8, seed=args.seed, start=not prompt)
    print(prompt + "".join(generate(model, encoding, prompt, drawn)))
    return model, encoding
