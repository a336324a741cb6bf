"""A small real corpus for tests of training: byte tokens of generated sentences."""

import json
import random
from pathlib import Path

import numpy as np

from megagpt.corpus.manifest import CorpusManifest, Subset, write_manifest
from megagpt.corpus.shards import ShardWriter
from megagpt.files import sealed_json
from megagpt.tokenizer import fingerprint, load_tokenizer

WORDS = "the a small large model learns reads writes token tokens from text and then stops".split()


def sentences(count: int, seed: int) -> list[str]:
    """Documents of a few words each, the same for the same seed."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 30))) + ".\n" for _ in range(count)]


def write_corpus(folder: Path, documents: list[str], tokenizer: str = "bytes") -> Path:
    """Shards of the documents; returns the folder."""
    folder.mkdir(parents=True)
    encoding = load_tokenizer(tokenizer)
    writer = ShardWriter(folder, encoding.n_vocab, shard_tokens=20_000)
    for text in documents:
        tokens = np.array([*encoding.encode_ordinary(text), encoding.eot_token], np.uint16)
        writer.add(tokens, np.array([len(tokens)]))
    shards = tuple(writer.close())
    write_manifest(
        CorpusManifest(
            folder=folder,
            tokenizer_name=tokenizer,
            vocab_size=encoding.n_vocab,
            end_of_document=encoding.eot_token,
            fingerprint=fingerprint(encoding),
            dtype=np.dtype(np.uint16),
            split=Subset(name="train", validation_fraction=0.0, rule="all documents"),
            shards=shards,
            sources=(),
            totals={
                "documents": len(documents),
                "tokens": sum(s.tokens for s in shards),
                "text_bytes": sum(len(t.encode()) for t in documents),
            },
        )
    )
    return folder


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change keys of a manifest, `tokenizer__name` in an inner object, and seal it again."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    for name, value in changes.items():
        *where, key = name.split("__")
        place = tree
        for step in where:
            place = place[int(step) if step.isdigit() else step]
        place[key] = value
    path.write_text(sealed_json(tree))


def run_file(root: Path, **sections: dict[str, object]) -> Path:
    """A corpus under `root` and a run file that trains a tiny model on it; returns the file."""
    if not (root / "train").exists():
        write_corpus(root / "train", sentences(600, 1))
        write_corpus(root / "validation", sentences(60, 2))
    tree: dict[str, dict[str, object]] = {
        "model": {
            "n_layer": 2,
            "n_head": 2,
            "d_model": 32,
            "n_ctx": 32,
            "vocab_size": 257,
            "attention": ["dense", "banded"],
            "band_width": 8,
        },
        "schedule": {
            "total_tokens": 30 * 512,
            "warmup_tokens": 2048,
            "peak_lr": 3e-3,
            "batch_tokens": 1024,
            "ramp_start_tokens": 256,
            "ramp_tokens": 8192,
        },
        "parallel": {"ds_config": "zero1", "micro_batch": 2, "dtype": "fp32"},
        "checkpoint": {"every_tokens": 4096},
        "evaluate": {"every_tokens": 8192, "batches": 2},
    }
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    lines = ["seed = 1", f'output = "{root / "run"}"', "[data]"]
    lines += [f'train = [{{ path = "{root / "train"}" }}]']
    lines += [f'validation = [{{ path = "{root / "validation"}" }}]']
    for name, section in tree.items():
        lines += [f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in section.items())]
    path = root / "run.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')
