"""`megagpt import PATH OUT`: what others trained, as a folder of weights of ours (L3). Each tensor
is naming.py's."""

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken

from megagpt.checkpoint import record
from megagpt.checkpoint.export import new_folder, write_weights
from megagpt.checkpoint.weights import SHARD_BYTES, PlannedTensor, add_shard_option
from megagpt.config import RunConfig, dump_run, parse_run
from megagpt.config.presets import ModelConfig
from megagpt.config.schedule import Schedule
from megagpt.config.sections import DataConfig, DataSource
from megagpt.errors import DamageError, UsageError
from megagpt.files import temporary_of, write_file
from megagpt.hub.naming import imported
from megagpt.hub.palettes import palette_beside
from megagpt.hub.shapes import read_config
from megagpt.hub.weight_files import FORMS, open_foreign
from megagpt.tokenizer import END_OF_DOCUMENT, fingerprint, load_tokenizer
from megagpt.tokenizer.json import write_tokenizer_file
from megagpt.tokenizer.portable import FILE, described

log = logging.getLogger(__name__)

MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""A vocabulary and its merges, by transformers and by OpenAI."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Writes a folder that generate, evaluate, init_from, export and checkpoint "
        f"verify take. PATH is {FORMS}."
    )
    parser.add_argument("path", metavar="PATH", help="file, folder, or name on the hub")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; new")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer of the weights where they come without one: a name or a tokenizer.json; "
        "rows of the embedding beyond its tokens are cut. Of Image GPT: its palette, a "
        "kmeans_centers.npy or a corpus's tokenizer.json",
    )
    add_shard_option(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the folder; prints where."""
    import_model(args.path, args.output, args.tokenizer, args.shard_bytes)
    print(args.output)


def import_model(
    path: str, output: Path, tokenizer: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the model at `path` as a folder of weights in fp32. Memory: one parameter.

    Raises UsageError for what our model cannot compute, named by its key or tensor, and when
    `output` holds something already; DamageError for a file that is not what its format says.
    """
    target = new_folder(output)
    theirs = open_foreign(path)
    config = read_config(theirs.config, str(theirs.path))
    palette = encoding = None
    if config.family == "igpt":
        palette = palette_beside(theirs.path, config, tokenizer)
    else:
        encoding = _tokenizer(theirs.path, config, tokenizer)
    cut = config
    if encoding is not None and tokenizer and encoding.n_vocab < config.vocab_size:
        log.info("%d rows of the embedding are no token: cut", config.vocab_size - encoding.n_vocab)
        cut = replace(config, vocab_size=encoding.n_vocab)
    # The bounds of a run file's keys hold for what others wrote, too.
    checked = parse_run(dump_run(placeholder_run(cut)), name=str(theirs.path))
    tensors = [_cut(one, cut) for one in imported(theirs.config, config, theirs.names, theirs.fp32)]
    with record.written_whole(target, temporary_of(target)) as folder:
        facts: dict[str, Any] = {"step": 0, "tokens": 0, "tokenizer": "", "vocabulary": ""}
        if encoding is not None:
            facts |= {"tokenizer": FILE, "vocabulary": fingerprint(encoding)}
            write_file(folder / FILE, described(encoding))
        if palette is not None:
            facts |= {"tokenizer": FILE, "vocabulary": palette.fingerprint}
            write_file(folder / FILE, palette.text)
        write_weights(folder, tensors, checked, facts, shard_bytes)


def _cut(one: PlannedTensor, config: ModelConfig) -> PlannedTensor:
    """The embedding with no more rows than the model has tokens; anything else as it is."""
    rows = config.n_embedding
    if one.name != "wte.weight" or one.shape[0] <= rows:
        return one
    return PlannedTensor(one.name, (rows, *one.shape[1:]), lambda: one.make()[:rows])


def placeholder_run(config: ModelConfig) -> RunConfig:
    """A run file that holds the model; nothing else in it means anything."""
    sources = (DataSource(path="CORPUS"),)
    size = config.n_ctx
    return RunConfig(
        output="RUN",
        model=config,
        data=DataConfig(train=sources),
        schedule=Schedule(total_tokens=size, batch_tokens=size, peak_lr=1e-5),
    )


# --- the tokenizer ------------------------------------------------------------------------------


def _tokenizer(path: Path, config: ModelConfig, name: str | None) -> tiktoken.Encoding | None:
    """The tokenizer that is named, or that lies beside the weights; None where there is none that
    tiktoken can reproduce. Raises UsageError for one with more tokens than the model has."""
    if name:
        encoding = load_tokenizer(name)
    elif config.family != "gpt2" or (found := _beside(path)) is None:
        log.warning(
            "%s: comes without a tokenizer that megagpt can read, so these weights cannot read or "
            "write text; name one with --tokenizer",
            path,
        )
        return None
    else:
        encoding = found
    if encoding.n_vocab > config.vocab_size:
        raise UsageError(
            f"{path}: its tokenizer {encoding.name!r} has {encoding.n_vocab} tokens, but the model "
            f"{config.vocab_size}; name another with --tokenizer"
        )
    return encoding


def _beside(path: Path) -> tiktoken.Encoding | None:
    """The tokenizer whose files lie in a folder."""
    try:
        if (path / FILE).is_file():
            return load_tokenizer(path / FILE)
        for vocabulary, merges in MERGES:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return _of_merges(path / vocabulary, path / merges)
    except (UsageError, DamageError) as error:
        log.warning("%s", error)
    return None


def _of_merges(vocabulary: Path, merges: Path) -> tiktoken.Encoding:
    """The tokenizer of GPT-2's form with these merges. Raises UsageError when its ids are not
    those of the vocabulary."""
    import tempfile

    try:
        first, *lines = merges.read_text(encoding="utf-8").rstrip("\n").split("\n")
        lines = lines if first.startswith("#version") else [first, *lines]
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(f"{merges}: not GPT-2's merges ({error}); copy it again") from None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_file(Path(folder) / FILE, pairs, END_OF_DOCUMENT)
        encoding = load_tokenizer(Path(folder) / FILE)
        words = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))["model"]["vocab"]
    if ids != words | {END_OF_DOCUMENT: len(words)}:
        raise UsageError(f"{vocabulary}: its ids are not GPT-2's, the bytes and then the merges")
    return encoding
