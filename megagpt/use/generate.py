"""`megagpt generate RUN_DIR`: texts from a trained model, streamed to the terminal (L3)."""

import argparse
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import MegagptError, UsageError, print_exactly
from megagpt.use.loading import add_placing, add_run_dir, add_split
from megagpt.use.options import TextOptions, add_fields, given

if TYPE_CHECKING:
    import tiktoken

    from megagpt.model import GPT
    from megagpt.use.generator import Continuation, Generator

log = logging.getLogger("megagpt.use.generate")


def generate(
    model: "GPT", encoding: "tiktoken.Encoding", prompt: str, options: TextOptions | None = None
) -> Iterator[str]:
    """The text that follows `prompt` (not included), one piece a token, as soon as it is known.

    A piece is empty while a character is not whole, or may be the beginning of a stop text.

    Raises UsageError for options that make no sense, and for an empty prompt with start=False.
    """
    from megagpt.use.generator import Continuation, Generator, pieces_of

    options = options or TextOptions()
    options.check()
    generator = Generator(model, encoding, rows=1)
    yield from pieces_of(generator, Continuation(generator.ids(prompt, options), options))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Continues prompts with the model of the run folder's newest checkpoint. The "
        "texts go to stdout as they are made, everything else to stderr."
    )
    parser.epilog = (
        "Several texts are made in one batch, each by draws of its own: decided by the "
        "seed, the number of the sample and the position. Beyond n_ctx tokens the last half of the "
        "context is read anew and the text goes on."
    )
    add_run_dir(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="beginning of the text (default: none); repeatable",
    )
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file that holds the prompt; - reads stdin"
    )
    parser.add_argument(
        "--continue",
        dest="mid_document",
        action="store_true",
        help="the prompt is from the middle of a document, not its beginning",
    )
    add_drawing(parser)
    parser.add_argument(
        "--no-stop", action="store_true", help="go on with another document at END-OF-DOCUMENT"
    )
    number = parser.add_argument
    number("--samples", metavar="N", type=int, default=1, help="texts of each prompt (default: 1)")
    number("--batch-size", metavar="N", type=int, default=8, help="texts at a time (default: 8)")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="multiply texts one by one: each is bit for bit what it would be alone, and takes as "
        "long; otherwise rounding differs, and now and then a token",
    )
    add_placing(parser)
    add_split(parser, "generate")
    parser.add_argument("--json", action="store_true", help="one JSON object a text on stdout")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a text's length and draws; `drawing` reads them."""
    add_fields(parser, TextOptions)
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="the text ends before the first of these; repeatable",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="number that decides the draws (default: random)"
    )


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """What add_drawing's options say, as arguments of TextOptions."""
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    return given(args, TextOptions) | {"seed": seed, "stop_texts": tuple(args.stop)}


def run(args: argparse.Namespace) -> None:
    """Prints the texts."""
    for name in ("samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    prompts = _prompts(args)
    options = TextOptions(**drawing(args), stop=not args.no_stop, start=not args.mid_document)
    options.check()

    from megagpt.use.together import placed_generator

    rows = min(args.batch_size, len(prompts) * args.samples)
    with placed_generator(args, rows, args.batch_invariant) as (generator, _):
        if generator is not None:
            _write(args, generator, prompts, options)


def _write(
    args: argparse.Namespace, generator: "Generator", prompts: list[str], options: TextOptions
) -> None:
    """Makes and prints the texts."""
    from megagpt.use.generator import Continuation, write_texts

    texts = [
        Continuation(generator.ids(prompt, options), options, number)
        for prompt in prompts
        for number in range(args.samples)
    ]
    beginnings = [prompt for prompt in prompts for _ in range(args.samples)]
    t0 = time.perf_counter()
    if args.json:
        made = write_texts(generator, texts)
        for prompt, text, words in zip(beginnings, texts, made, strict=True):
            told = {"prompt": prompt, "sample": text.number, "text": words, "finish": text.finish}
            print_exactly(json.dumps({**told, "tokens": len(text.tokens)}) + "\n")
    else:
        _print_in_order(generator, beginnings, texts)
    elapsed_s = time.perf_counter() - t0
    n_tokens = generator.made_tokens
    log.info("%d tokens in %.2f s: %.1f tokens/s", n_tokens, elapsed_s, n_tokens / elapsed_s)
    log.info("seed %d", options.seed)
    if broken := sum(text.finish == "error" for text in texts):
        raise MegagptError(
            f"{broken} of {len(texts)} texts ended early: the model's numbers for the next token "
            "are none; take another --dtype, or a checkpoint from before its weights went wrong"
        )


def _print_in_order(
    generator: "Generator", prompts: Sequence[str], texts: "Sequence[Continuation]"
) -> None:
    """Makes the texts and prints one after another, the one whose turn it is as it grows."""
    from megagpt.use.generator import growing

    waiting, done, turn = [""] * len(texts), [False] * len(texts), 0
    _begin(prompts, turn)
    for number, piece in growing(generator, texts):
        waiting[number] += piece
        done[number] = bool(texts[number].finish)
        while turn < len(texts):
            print_exactly(waiting[turn])
            waiting[turn] = ""
            if not done[turn]:
                break
            print(flush=True)
            turn += 1
            _begin(prompts, turn)


def _begin(prompts: Sequence[str], turn: int) -> None:
    """Prints the beginning of the text whose turn it is, if there is one left."""
    if turn < len(prompts):
        if len(prompts) > 1:
            print(f"--- {turn + 1} of {len(prompts)} ---")
        print_exactly(prompts[turn])


def _prompts(args: argparse.Namespace) -> list[str]:
    try:
        if args.prompt_file is None:
            # Bytes of a command line that are no UTF-8 arrive as halves of surrogate pairs.
            return [os.fsencode(prompt).decode() for prompt in args.prompt or [""]]
        if args.prompt_file == "-":
            return [sys.stdin.buffer.read().decode()]
        return [Path(args.prompt_file).read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--prompt-file {args.prompt_file}: {error}; give a readable UTF-8 text file"
            if args.prompt_file is not None
            else f"--prompt: not UTF-8 ({error})"
        ) from error
