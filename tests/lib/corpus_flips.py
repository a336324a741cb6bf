"""A campaign of single flipped bits over every file of a corpus, ours and others'.

    python -m tests.lib.corpus_flips --flips 3000 --seed 1 --output DIR

Each flip is one of four: found (a message names what is wrong), harmless (nothing that is read
differs), believed (something else is read, and nothing is said) or crashed (a traceback). Our own
files are asked by `data verify` and by opening them for training, others' by importing them. Prints
one JSON object with the counts of each kind of file; exit code 1 when a flip was believed where a
checksum or redundancy could tell, or crashed.
"""

import argparse
import io
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.corpus.adopt import import_shards
from megagpt.corpus.documents import Documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.shards import HEADER, MAGIC
from megagpt.corpus.verify import verify_shards
from megagpt.errors import MegagptError
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.json import write_tokenizer_file
from tests.lib.corpus import sentences, write_corpus

END = 256
BARE = ("bare tokens", "earlier manifest.json", "Megatron .idx, several sequences, no ends")
"""Where no checksum and no redundancy can tell: a flip may be believed."""
Reading = Callable[[], Any]
"""What is read of a file, as training would: raises MegagptError for what is found."""
Case = tuple[str, Path, Reading, int]
"""Kind of a file, its path, what reads it, and the bytes to flip from its start, 0 for all."""


def campaign(folder: Path, flips: int, seed: int) -> dict[str, dict[str, int]]:
    """{kind of file: {outcome: count}} of so many flips in each, drawn by `seed`."""
    draw = random.Random(seed)
    result = {}
    for kind, path, reading, size in [*_ours(folder / "ours"), *_others(folder / "others")]:
        good, expected = path.read_bytes(), reading()
        counts: Counter[str] = Counter()
        bits = range(8 * (size or len(good)))
        for bit in draw.sample(bits, min(flips, len(bits))):
            content = bytearray(good)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            counts[_outcome(reading, expected)] += 1
        path.write_bytes(good)
        assert reading() == expected
        result[kind] = {"tried": counts.total(), **dict(sorted(counts.items()))}
    return result


def lost(result: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The kinds in which something was believed or crashed that should have been found."""
    return {
        kind: counts
        for kind, counts in result.items()
        if counts.get("crashed") or (counts.get("believed") and kind not in BARE)
    }


def _outcome(reading: Reading, expected: Any) -> str:
    try:
        return "harmless" if reading() == expected else "believed"
    except MegagptError:
        return "found"
    except Exception:
        return "crashed"


def _ours(folder: Path) -> list[Case]:
    """Every file of a corpus with a tokenizer of its own."""
    folder.mkdir(parents=True)
    write_tokenizer_file(folder / "t.json", [("t", "h"), ("th", "e")], "<|endoftext|>")
    options = PrepareOptions(
        output=folder / "web", tokenizer=str(folder / "t.json"), workers=1, validation_fraction=0.2
    )
    prepare([Documents("sentences", lambda: sentences(60, 1))], options)

    def reading(part: Path) -> Any:
        if problems := verify_shards(part):
            raise MegagptError(problems[0])
        windows = TokenWindows(part)
        return windows.manifest, windows.windows(np.arange(windows.n_windows(8)), 8).tobytes()

    cases: list[Case] = []
    for name in ("web", "web-validation"):
        for path in sorted((folder / name).iterdir()):
            ending = path.name if path.suffix == ".json" else path.suffix
            label = f"{ending}{' of the validation split' if name != 'web' else ''}"
            cases.append((label, path, partial(reading, path.parent), 0))
    earlier = write_corpus(folder / "earlier", sentences(40, 3)) / "manifest.json"
    tree = json.loads(earlier.read_text())
    del tree["sha256"], tree["tokenizer"]["sha256"]
    earlier.write_text(json.dumps(tree, indent=1))
    cases.append(("earlier manifest.json", earlier, partial(reading, earlier.parent), 0))
    return cases


def _others(folder: Path) -> list[Case]:
    """Files made by others."""
    encoding = load_tokenizer("bytes")
    documents = [encoding.encode_ordinary(text) for text in sentences(40, 2)]
    ended = [[*document, END] for document in documents]
    one = list(range(41))
    three = [*range(0, 40, 3), 40]
    cases: list[Case] = []
    for kind, sequences, bounds in (
        ("Megatron .idx", ended, one),
        ("Megatron .idx, no ends", documents, one),
        ("Megatron .idx, several sequences", _ends(documents, three), three),
        ("Megatron .idx, several sequences, no ends", documents, three),
    ):
        place = folder / str(len(cases))
        cases.append((kind, _megatron(place, sequences, bounds), _imported(place), 0))
    flat = np.array([token for document in ended for token in document], "<u2")
    head = np.array([20240520, 1, len(flat), *[0] * 253], "<i4").tobytes()
    numpy = io.BytesIO()
    np.save(numpy, flat)
    for kind, name, content, size in (
        ("bare tokens", "a.bin", flat.tobytes(), 0),
        ("llm.c header", "b.bin", head + flat.tobytes(), len(head)),
        (".npy header", "c.npy", numpy.getvalue(), len(numpy.getvalue()) - flat.nbytes),
    ):
        place = folder / name
        place.mkdir()
        (place / name).write_bytes(content)
        cases.append((kind, place / name, _imported(place), size))
    return cases


def _ends(documents: list[list[int]], bounds: list[int]) -> list[list[int]]:
    """The sequences with an end after the last of each document."""
    return [[*d, END] if place + 1 in bounds else d for place, d in enumerate(documents)]


def _megatron(folder: Path, sequences: list[list[int]], bounds: list[int]) -> Path:
    """The index of a pair as Megatron's preprocess_data writes it."""
    folder.mkdir(parents=True)
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    np.concatenate([np.array(s, "<u2") for s in sequences]).tofile(folder / "m.bin")
    pointers = 2 * (np.cumsum(sizes, dtype=np.int64) - sizes)
    head = HEADER.pack(MAGIC, 1, 8, len(sizes), len(bounds))
    parts = [head, sizes.tobytes(), pointers.tobytes(), np.array(bounds, np.int64).tobytes()]
    (folder / "m.idx").write_bytes(b"".join(parts))
    return folder / "m.idx"


def _imported(folder: Path) -> Reading:
    """What an import of the folder gives: the content of its shards."""

    def reading() -> Any:
        output = folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        [made] = import_shards([folder], output, tokenizer="bytes")
        assert made == read_manifest(output)
        return [(shard.sha256, shard.index_sha256) for shard in made.shards]

    return reading


def main() -> int:
    """Run the campaign and print its counts."""
    parser = argparse.ArgumentParser(description="Flip bits of every file of a corpus.")
    parser.add_argument("--flips", type=int, default=3000, help="in each kind of file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder to work in")
    args = parser.parse_args()
    result = campaign(args.output, args.flips, args.seed)
    print(json.dumps(result, indent=1))
    return 1 if lost(result) else 0


if __name__ == "__main__":
    sys.exit(main())
