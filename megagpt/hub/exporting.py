"""`megagpt export RUN_DIR OUT --format hf`: what was trained here, for transformers (L3).

1) The weights are written tensor by tensor, with config.json and the tokenizer's files, into a
   folder beside OUT.
2) transformers opens it in a process of its own, and what it computes is compared.
3) The measured difference goes into the model card, and one rename makes OUT of the folder.
"""

import argparse
import json
import logging
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

from megagpt.checkpoint import record
from megagpt.checkpoint.export import INDEX, Weights, new_folder, open_weights
from megagpt.checkpoint.weights import SHARD_BYTES, add_shard_option, write_tensors
from megagpt.errors import MegagptError
from megagpt.files import temporary_of, write_file
from megagpt.hub.card import model_card
from megagpt.hub.compare import Comparison, compare
from megagpt.hub.naming import exported
from megagpt.hub.palettes import write_processor
from megagpt.hub.shapes import write_config
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer import END_OF_DOCUMENT
from megagpt.tokenizer.palette import Palette
from megagpt.tokenizer.portable import FILE, described
from megagpt.use.dialogue import CHAT_TEMPLATE, special_tokens
from megagpt.use.loading import add_run_dir

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOWS = 2
"""Full contexts whose logits are compared."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Writes the weights as transformers' own class computes them, with the "
        "tokenizer's files and a model card, and compares what transformers makes of it before "
        "the folder counts."
    )
    add_run_dir(parser)
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; new")
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: Hugging Face's")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default: fp32)"
    )
    add_shard_option(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the folder; prints where, and what was measured."""
    found = export_model(args.folder, args.output, args.dtype, args.shard_bytes)
    print(
        f"{args.output}: {args.dtype}; logits differ by {found.difference:.2g} at most (the "
        f"largest is {found.largest:.3g}); {found.tokens} greedy tokens compared"
    )


def export_model(
    source: Path, output: Path, dtype: str = "fp32", shard_bytes: int = SHARD_BYTES
) -> Comparison:
    """Writes the model of `source` for transformers into `output`, compared with it.

    Raises UsageError for a model that no class of transformers computes and when `output` holds
    something already, MegagptError when what transformers computes is not the same.
    """
    target = new_folder(output)
    weights = open_weights(source)
    encoding = tokenizer_of(weights)
    with record.written_whole(target, temporary_of(target)) as folder:
        write_export(weights, encoding, folder, DTYPES[dtype], shard_bytes)
        windows, data = windows_of(weights)
        found = compare(folder, weights, windows, encoding, DTYPES[dtype])
        if problem := found.problem():
            raise MegagptError(
                f"{output}: not written, for transformers computes something else from it: "
                f"{problem}"
            )
        texts = None if isinstance(encoding, Palette) else encoding
        turns = texts is not None and special_tokens(texts) is not None
        card = model_card(weights, source, found, dtype, data, turns)
        write_file(folder / "README.md", card)
    return found


def write_export(
    weights: Weights,
    encoding: tiktoken.Encoding | Palette | None,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes everything but the card. Memory: one parameter."""
    model = weights.config.model
    texts = None if isinstance(encoding, Palette) else encoding
    end = None if texts is None else texts.eot_token
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", write_config(model, end, name))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends: dict[str, Any] = {key: end for key in keys if end is not None}
    if texts is not None and (turns := special_tokens(texts)):
        ends["eos_token_id"] = [end, *turns.stop_tokens]  # where an answer ends
    _write_json(folder / "generation_config.json", ends)
    planned = list(exported(model, weights.read, dtype))
    file_of = write_tensors(folder, planned, dtype, shard_bytes, {"format": "pt"})
    total = dtype.itemsize * sum(prod(one.shape) for one in planned)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
    if isinstance(encoding, Palette):
        write_processor(folder, encoding, model.n_ctx)
    elif encoding is not None:
        write_tokenizer(folder, encoding, model.n_ctx)


def tokenizer_of(weights: Weights) -> tiktoken.Encoding | Palette | None:
    """The tokenizer, or palette, of the weights; None, said, where it is not known or cannot be
    loaded."""
    try:
        return weights.palette() or weights.tokenizer()
    except MegagptError as error:
        log.warning("the export will hold no tokenizer: %s", error)
        return None


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding, n_ctx: int) -> None:
    """The files that AutoTokenizer, GPT2Tokenizer, vLLM and llama.cpp's converter look for."""
    text = described(encoding)
    write_file(folder / FILE, text)
    model = json.loads(text)["model"]
    words = {**model["vocab"], **encoding._special_tokens}
    _write_json(folder / "vocab.json", words)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_DOCUMENT)
    _write_json(folder / "special_tokens_map.json", ends)
    gpt2 = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_ctx}
    spaces = {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", gpt2 | ends | spaces)
    if special_tokens(encoding):
        write_file(folder / CHAT_TEMPLATE.name, CHAT_TEMPLATE.read_text())


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_file(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def windows_of(weights: Weights) -> tuple[Tensor, str]:
    """(ids of full contexts (WINDOWS, n_ctx), what they are): of the run's own corpora where they
    lie there still, else drawn at random. Image GPT's begin with the start token."""
    model, data = weights.config.model, weights.config.data
    ids, what = None, "random tokens, for none of the run's corpora was there"
    for source in (*data.validation, *data.train):
        try:
            loader = TokenLoader([(Path(source.path), 1.0)], model.n_ctx, 0)
            first = np.arange(WINDOWS) % loader.n_windows
            found = torch.from_numpy(loader.stores[0].windows(first, model.n_ctx).astype(np.int64))
            loader.close()
        except MegagptError:
            continue
        if int(found.max()) < model.n_embedding:
            ids, what = found[:, :-1], f"windows of {source.path}"
            break
    if ids is None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (WINDOWS, model.n_ctx), generator=draw)
        if model.start_token is not None:  # a corpus of images has it
            ids[:, 0] = model.start_token
    return ids, what
