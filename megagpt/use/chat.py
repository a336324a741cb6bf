"""`megagpt chat RUN_DIR`: a dialogue with a trained model in the terminal (L3)."""

import argparse
import contextlib
import io
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megagpt.errors import MegagptError, UsageError, print_exactly
from megagpt.files import write_file
from megagpt.use.generate import add_drawing, drawing
from megagpt.use.loading import add_placing, add_run_dir, add_split
from megagpt.use.options import TextOptions

if TYPE_CHECKING:
    from megagpt.use.dialogue import ChatFormat, Turn
    from megagpt.use.generator import Generator

log = logging.getLogger("megagpt.use.chat")

HELP = """\
/reset          begin anew
/system TEXT    begin anew with this as the model's instruction; without a text: with none
/seed N         the number that decides the draws of the answers to come
/save FILE      write the dialogue as a line of JSON: {"messages": [...]}
/exit           leave, as Ctrl-D does
Ctrl-C          stop the answer"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Talks with the model of the run folder's newest checkpoint. A tokenizer with "
        "tokens for turns (<|system|>, <|user|>, <|assistant|>, <|end|>) has them written by "
        "these; for any other they are lines that begin with User: and Assistant:, which a model "
        "that has read such text goes on with."
    )
    parser.epilog = "Commands:\n" + HELP.replace("%", "%%")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_run_dir(parser)
    parser.add_argument("--system", metavar="TEXT", default="", help="the model's instruction")
    add_drawing(parser)
    add_placing(parser)
    add_split(parser, "chat")


def run(args: argparse.Namespace) -> None:
    """Talks until the end of the input."""
    options = TextOptions(**drawing(args), slide=False)
    options.check()
    from megagpt.use.together import placed_generator

    with placed_generator(args, rows=1) as (generator, _):
        if generator is not None:
            _talk(generator, options, args.system)


def _talk(generator: "Generator", options: TextOptions, system: str) -> None:
    """The dialogue itself."""
    from megagpt.use.dialogue import PlainTurns, special_tokens

    form = special_tokens(generator.encoding)
    if form is None:
        log.info("the tokenizer has no tokens for turns: they are written as lines of text")
    dialogue = Dialogue(generator, form or PlainTurns(generator.encoding), options, system)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives the line its history and editing)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is no UTF-8 is no reason to leave, nor for half a surrogate pair in a file.
        sys.stdin.reconfigure(errors="replace")
    log.info("context: %d tokens; /help names the commands", generator.n_ctx)
    with _Interrupt() as interrupt:
        for line in interrupt.lines():
            try:
                if line == "/exit":
                    break
                if line.startswith("/"):
                    print(dialogue.command(line))
                elif line.strip():
                    interrupt.pressed = False
                    dialogue.answer(line, lambda: interrupt.pressed)
            except (MegagptError, OSError) as error:
                print(f"megagpt: {error}")


_ENDS = {
    "": "; stopped",
    "length": "; cut at its longest",
    "error": "; the model's numbers for the next token are none",
}
"""What is told of an answer that did not end by itself."""


class _Interrupt:
    """Ctrl-C: gives up the line that is typed, ends an answer between two tokens, and nothing
    else."""

    def __init__(self) -> None:
        self.pressed = False
        self._asking = False

    def __enter__(self) -> "_Interrupt":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._asking:
            self._asking = False
            raise KeyboardInterrupt

    def lines(self) -> Iterator[str]:
        """What the user types, up to Ctrl-D."""
        asked = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                self._asking = True
                line = input(asked)
                self._asking = False
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            except EOFError:
                print()
                return
            yield line


class Dialogue:
    """The turns so far, as tokens for the model and as text for /save."""

    def __init__(
        self, generator: "Generator", form: "ChatFormat", options: TextOptions, system: str = ""
    ) -> None:
        self._generator, self._form, self._system = generator, form, system
        self._options = replace(options, stop_tokens=form.stop_tokens, stop_texts=(
            *options.stop_texts, *form.stop_texts
        ))  # fmt: skip
        self._turns: list[list[int]] = []
        """Tokens of each turn that is still in the context, without the system's."""
        self._said: list[Turn] = []
        self._answers = 0

    # --- commands --------------------------------------------------------------------------------

    def command(self, line: str) -> str:
        """Does what a line that begins with / says; what to tell of it."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self._reset()
            return "a new dialogue"
        if name == "/system":
            self._system = rest
            self._reset()
            return "a new dialogue, " + (f"instructed: {rest}" if rest else "without instruction")
        if name == "/seed":
            if not (rest.isdecimal() and rest.isascii() and len(rest) < 20):
                raise UsageError(f"/seed {rest}: must be a whole number, 0 or more")
            self._options = replace(self._options, seed=int(rest))
            return f"seed {int(rest)}"
        if name == "/save":
            return self._save(rest)
        raise UsageError(f"{name}: no command; /help names them")

    def _reset(self) -> None:
        self._turns, self._said, self._answers = [], [], 0

    def _save(self, name: str) -> str:
        if not name:
            raise UsageError("/save: give the name of a file")
        system = [("system", self._system)] if self._system else []
        messages = [{"role": role, "content": text} for role, text in (*system, *self._said)]
        write_file(Path(name), json.dumps({"messages": messages}) + "\n")
        return f"{len(messages)} messages written to {name}"

    # --- answers ---------------------------------------------------------------------------------

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> None:
        """Prints the answer to a turn of the user, as it is made, until it is `stopped`. Raises
        UsageError for a turn that the context does not hold."""
        from megagpt.use.generator import Continuation, pieces_of

        turn = self._form.turn("user", text)
        dropped, ids = self._fitted(turn)
        if dropped:
            log.info("the oldest %d turns no longer fit into the context", dropped)
        self._turns = [*self._turns[dropped:], turn]
        self._said.append(("user", text))
        most = min(self._options.max_tokens, self._generator.n_ctx - len(ids))
        asked = replace(self._options, max_tokens=most)
        made = Continuation(ids, asked, self._answers)
        words, t0 = "", time.perf_counter()
        for piece in pieces_of(self._generator, made):
            piece = piece if words else piece.lstrip()
            words += piece
            print_exactly(piece)
            if stopped():
                break
        if not made.finish:
            self._generator.cancel(made)
        print(flush=True)
        elapsed_s = time.perf_counter() - t0
        told = _ENDS.get(made.finish, "")
        speed = len(made.tokens) / elapsed_s
        log.info("%d tokens, %.1f tokens/s%s", len(made.tokens), speed, told)
        self._turns.append(self._form.close(made.tokens))
        self._said.append(("assistant", words.rstrip()))
        self._answers += 1

    def _fitted(self, turn: list[int]) -> tuple[int, list[int]]:
        """(turns to drop, what the model reads): the oldest go, whole, until an answer of
        max_tokens fits, or of half the context where that is less."""
        form, n_ctx = self._form, self._generator.n_ctx
        first = form.begin() + (form.turn("system", self._system) if self._system else [])
        room = n_ctx - max(1, min(self._options.max_tokens, n_ctx // 2))
        for dropped in range(0, len(self._turns) + 1, 2):
            turns = [*self._turns[dropped:], turn]
            ids = first + [token for one in turns for token in one] + form.opening()
            if len(ids) <= room:
                return dropped, ids
        raise UsageError(
            f"{len(ids)} tokens with this turn alone, but {room} of the context's {n_ctx} are for "
            "reading; say it in fewer words, or give a smaller --max-tokens"
        )
