"""What generation costs on this CPU, beside transformers' generate on the exported model.

    python benchmarks/generation.py > table.md

Random weights of the 125M shape in fp32, with GPT-3's alternating bands and dense. Greedy, so that
both make the same tokens, which is compared. Runs of the two alternate on one thread; times are CPU
seconds (user + system), the least of `--rounds`, since other work shares the machine.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from megagpt.checkpoint.export import open_weights, write_weights
from megagpt.checkpoint.weights import PlannedTensor
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.hub.exporting import write_export
from megagpt.hub.importing import placeholder_run
from megagpt.hub.naming import shapes_of
from megagpt.model import initial_value
from megagpt.tokenizer import fingerprint, load_tokenizer
from megagpt.use.generator import Continuation, Generator, write_texts
from megagpt.use.loading import load_placed
from megagpt.use.options import TextOptions

BATCH = 8


def made_folders(root: Path, config: ModelConfig) -> tuple[Path, Path]:
    """Weights as ours and as transformers reads them."""
    encoding = load_tokenizer("gpt2")
    ours, theirs = root / "ours", root / "theirs"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
    planned = [
        PlannedTensor(name, shape, lambda n=name, s=shape: initial_value(n, s, config, 1))
        for name, shape in shapes_of(config).items()
    ]
    known = {"tokenizer": "gpt2", "vocabulary": fingerprint(encoding)}
    write_weights(ours, planned, placeholder_run(config), {"step": 0, "tokens": 0, **known}, 10**9)
    with contextlib.redirect_stdout(io.StringIO()):
        write_export(open_weights(ours), encoding, theirs, torch.float32, 10**9)
    return ours, theirs


def least(rounds: int, *works: Callable[[], object]) -> list[float]:
    """CPU seconds of each, in turns."""
    found = [float("inf")] * len(works)
    for _ in range(rounds):
        for index, work in enumerate(works):
            gc.collect()
            t0 = time.process_time()
            work()
            found[index] = min(found[index], time.process_time() - t0)
    return found


class Pair:
    """The same model twice."""

    def __init__(self, root: Path, config: ModelConfig) -> None:
        ours, theirs = made_folders(root, config)
        self._readers = {n: load_placed(ours, "fp32", "cpu", n)[:2] for n in (1, BATCH)}
        self.other = transformers.AutoModelForCausalLM.from_pretrained(theirs).eval()
        self.n_vocab = config.vocab_size

    def prompts(self, batch: int, length: int) -> torch.Tensor:
        """Random ids (B, T)."""
        draw = torch.Generator().manual_seed(batch)
        return torch.randint(0, self.n_vocab - 1, (batch, length), generator=draw)

    def our_tokens(self, ids: torch.Tensor, count: int) -> list[list[int]]:
        """Greedy, through the generator that every command uses."""
        options = TextOptions(max_tokens=count, temperature=0.0, stop=False)
        texts = [Continuation(row, options) for row in ids.tolist()]
        write_texts(Generator(*self._readers[len(texts)], len(texts)), texts)
        return [text.tokens for text in texts]

    def their_tokens(self, ids: torch.Tensor, count: int) -> list[list[int]]:
        """transformers' generate."""
        more = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            made = self.other.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **more
            )
        return made[:, ids.shape[1] :].tolist()


def rows(pair: Pair, label: str, args: argparse.Namespace) -> None:
    """Prints the table's lines of one model."""
    for batch in (1, BATCH):
        ids = pair.prompts(batch, args.prompt)
        works = [
            partial(make, ids, count)
            for count in (1, args.tokens + 1)
            for make in (pair.our_tokens, pair.their_tokens)
        ]
        same = pair.our_tokens(ids, 8) == pair.their_tokens(ids, 8)
        first_ours, first_theirs, ours, theirs = least(args.rounds, *works)
        made = batch * args.tokens
        speeds = made / (ours - first_ours), made / (theirs - first_theirs)
        line(f"{label}, batch {batch}: tokens/s", *speeds, speeds[0] / speeds[1], same)
    ids = pair.prompts(1, 1024)
    times = least(args.rounds, lambda: pair.our_tokens(ids, 1), lambda: pair.their_tokens(ids, 1))
    same = pair.our_tokens(ids, 1) == pair.their_tokens(ids, 1)
    line(f"{label}: first token of 1,024, s", *times, times[1] / times[0], same)


def line(label: str, ours: float, theirs: float, ratio: float, same: bool) -> None:
    """One line of the table."""
    print(f"| {label} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} | {same} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt3-125m", help="preset (default: gpt3-125m)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are timed (32)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the least counts (3)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    config = PRESETS[args.model].model
    print(f"{date.today()}, {platform.processor() or platform.machine()}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} thread, {args.model}\n")  # fmt: skip
    print("| | megagpt | transformers | times faster | same tokens |\n|---|---|---|---|---|")
    dense = dataclasses.replace(config, attention=("dense",))
    for label, one in (("alternating bands", config), ("dense", dense)):
        with tempfile.TemporaryDirectory() as root:
            rows(Pair(Path(root), one), label, args)


if __name__ == "__main__":
    main()
