"""`megagpt generate RUN_DIR`: text from a trained model, streamed to the terminal (L3)."""

import argparse
import codecs
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import UsageError, print_exactly

if TYPE_CHECKING:
    import tiktoken

    from megagpt.model import GPT

log = logging.getLogger("megagpt.use.generate")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How a text is made: a token is drawn by temperature first, then top-k, then top-p."""

    max_tokens: int = 200
    """Length of the text at most, without the prompt."""
    temperature: float = 0.8
    """Divides the logits; below 1 the likely get likelier, 0 takes the likeliest always."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that reach this probability together; 1: among all."""
    seed: int = 0
    """The same seed gives the same text."""
    stop: bool = True
    """End at END-OF-DOCUMENT; False: go on with the next document."""
    start: bool = True
    """The prompt is the beginning of a document: END-OF-DOCUMENT, which stands between documents
    in training, is put before it. False: it continues one."""

    def check(self) -> None:
        """Raises UsageError that names every number that makes no sense, with its rule."""
        rules = (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
        )
        problems = [
            f"{name} = {getattr(self, name)}: must be {rule}"
            for name, sound, rule in rules
            if not sound
        ]
        if problems:
            raise UsageError("\n".join(problems))


def generate(
    model: "GPT", encoding: "tiktoken.Encoding", prompt: str, options: TextOptions | None = None
) -> Iterator[str]:
    """The text that follows `prompt` (not included), one piece a token, as soon as it is known.

    A piece is empty while a character is not whole.

    Raises UsageError for options that make no sense, and for an empty prompt with start=False.
    """
    import torch

    from megagpt.tokenizer import END_OF_DOCUMENT, end_of_document
    from megagpt.use.sampling import sample, tokens

    options = options or TextOptions()
    options.check()
    end = end_of_document(encoding)
    ids = [end] * options.start + encoding.encode_ordinary(prompt)
    draw = partial(
        sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed),
    )
    n_vocab = min(encoding.n_vocab, model.config.vocab_size)
    model.eval()
    # A character may be spread over several tokens: its bytes wait until it is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in islice(tokens(model, torch.tensor(ids), draw, n_vocab), options.max_tokens):
        if token != end:
            yield decoder.decode(encoding.decode_single_token_bytes(token))
        elif options.stop:
            break
        else:
            yield decoder.decode(b"", final=True) + END_OF_DOCUMENT
    if rest := decoder.decode(b"", final=True):
        yield rest


def device_named(name: str | None) -> str:
    """The device to compute on; None: a GPU if there is one. Raises UsageError for one that this
    machine lacks."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back: a device may make tensors that hold nothing.
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not on this machine ({reason}); use cpu") from None
    return name


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="text from a trained model",
        description="Continues a prompt with the model of the run folder's newest checkpoint. The "
        "text goes to stdout as it is made, everything else to stderr.",
    )
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="run folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", default="", help="beginning of the text (default: none)"
    )
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file that holds the prompt; - reads stdin"
    )
    number = parser.add_argument
    number("--max-tokens", metavar="N", type=int, default=200, help="tokens at most (default: 200)")
    number(
        "--temperature",
        metavar="T",
        type=float,
        default=0.8,
        help="below 1 the likely tokens get likelier; 0: always the likeliest (default: 0.8)",
    )
    number("--top-k", metavar="K", type=int, default=0, help="draw among the K likeliest tokens")
    number(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw among the fewest likeliest tokens that reach probability P, 0 < P <= 1",
    )
    number("--seed", metavar="N", type=int, help="number that decides the draws (default: random)")
    number("--samples", metavar="N", type=int, default=1, help="texts to make (default: 1)")
    parser.add_argument(
        "--no-stop", action="store_true", help="go on with another document at END-OF-DOCUMENT"
    )
    parser.add_argument(
        "--continue",
        dest="mid_document",
        action="store_true",
        help="the prompt is from the middle of a document, not its beginning",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the texts."""
    if args.samples < 1:
        raise UsageError(f"--samples {args.samples}: must be 1 or more")
    prompt = _prompt(args)

    options = TextOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=secrets.randbelow(2**31) if args.seed is None else args.seed,
        stop=not args.no_stop,
        start=not args.mid_document,
    )
    options.check()

    from megagpt.checkpoint import load_model

    model, encoding, _ = load_model(args.folder, device_named(args.device))
    for number in range(args.samples):
        if args.samples > 1:
            print(f"--- {number + 1} of {args.samples} ---")
        drawn = replace(options, seed=options.seed + number)
        _stream(prompt, generate(model, encoding, prompt, drawn))
    log.info("seed %d", options.seed)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    try:
        if args.prompt_file is None:
            # Bytes of a command line that are no UTF-8 arrive as halves of surrogate pairs.
            return os.fsencode(args.prompt).decode()
        if args.prompt_file == "-":
            return sys.stdin.buffer.read().decode()
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--prompt-file {args.prompt_file}: {error}; give a readable UTF-8 text file"
            if args.prompt_file is not None
            else f"--prompt: not UTF-8 ({error})"
        ) from error


def _stream(prompt: str, pieces: Iterator[str]) -> None:
    """Prompt and text to stdout as they come, speed to the log."""
    t0 = time.perf_counter()
    print_exactly(prompt)
    n_tokens = 0
    for piece in pieces:
        print_exactly(piece)
        n_tokens += 1
    print(flush=True)
    elapsed_s = time.perf_counter() - t0
    log.info("%d tokens in %.2f s: %.1f tokens/s", n_tokens, elapsed_s, n_tokens / elapsed_s)
