"""Hostile inputs for preparation: sound documents in every format, and what disks and people do to
them. Each case says which documents must be found all the same.

    python -m tests.lib.hostile --cases 20000 --seed 1

reads so many in this process and prints how many were tried and what was found, by kind.
"""

import argparse
import bz2
import collections
import gzip
import io
import json
import lzma
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
from backports import zstd

from megagpt.corpus.documents import find_sources
from megagpt.corpus.texts import Problem, join, read
from megagpt.corpus.unit import plan_units

WORDS = (
    'alpha, beta "gamma" [delta] {epsilon} \\zeta \u00e9ta th\u00ebta \u4e2d\u6587 \U0001f600 '
    '{"text": "inner"} ["x", "y"] , ] } \n \t'
).split(" ")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}
ARRAYS: list[dict[str, object]] = [{}, {"indent": 1}, {"separators": (",", ":")}]
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\x00\x00\x00five!"
"""A frame of zstd that every reader passes over."""


@dataclass
class Case:
    """One file, and what must come of it."""

    kind: str
    name: str
    content: bytes
    must: list[str]
    """Documents that must be found, in order."""
    truth: list[str]
    """All documents that were put in."""
    changed: int = 0
    """How many others may be found: documents that a fault has changed without a trace."""
    whole: bool = False
    """Whether no problem may be named."""
    named: bool = False
    """Whether one must be."""
    garbled: bool = False
    """Whether a named file may give anything: the checksum comes behind what it is for."""


@dataclass
class Figures:
    """What came of the cases of a kind."""

    tried: int = 0
    sound: int = 0
    """Documents that had to be found."""
    lost: int = 0
    """Of them."""
    changed: int = 0
    """Documents with another text, which nothing in the file tells."""
    believed: int = 0
    """Files that lost a document, or hold one that nobody wrote, without a word."""
    failures: list[str] = field(default_factory=list)


def documents(draw: random.Random, count: int) -> list[str]:
    """Texts that are hard to find the ends of; no two are alike."""
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for n in range(count)]


def parts(texts: list[str], form: str, draw: random.Random) -> list[bytes]:
    """(separators and documents in turn): b"".join gives the file, odd places are documents."""
    strings = form == "strings"
    made = [json.dumps(t if strings else {"id": n, "text": t}, ensure_ascii=draw.random() < 0.5)
            for n, t in enumerate(texts)]  # fmt: skip
    if form == "jsonl":
        return [b"", *(part for line in made for part in (line.encode(), b"\n"))]
    comma = draw.choice([b",", b", ", b",\n  "])
    result = [b"["]
    for line in made:
        result += [line.encode(), comma]
    return [*result[:-1], b"]\n"]


def table(values: list[object], kind: pyarrow.DataType) -> bytes:
    """A Parquet file with checksums of its pages."""
    file = io.BytesIO()
    data = pyarrow.table({"id": range(len(values)), "text": pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(data, file, row_group_size=16, write_page_checksum=True)
    return file.getvalue()


# --- what is done to them -----------------------------------------------------------------------


def put_together(draw: random.Random) -> Case:
    """Several whole things in one file, with the padding that the formats allow."""
    form = draw.choice(["jsonl", "strings", "objects"])
    ending = draw.choice(list(COMPRESS))
    texts = documents(draw, 12)
    content = b""
    for start in range(0, 12, 4):
        plain = b"".join(parts(texts[start : start + 4], form, draw))
        mark = b"\xef\xbb\xbf" * (draw.random() < 0.3)
        content += COMPRESS[ending](mark + plain)
        if ending == ".xz":
            content += b"\0" * draw.choice([0, 4, 64])
        if ending == ".gz":
            content += b"\0" * draw.choice([0, 1, 511])
        if ending == ".zst":
            content += SKIPPABLE * draw.choice([0, 1])
    name = ("a.jsonl" if form == "jsonl" else "a.json") + ending
    return Case("put together, padded", name, content, texts, texts, whole=True)


def cut_short(draw: random.Random) -> Case:
    """A file of which the end is missing."""
    form = draw.choice(["jsonl", "strings", "objects"])
    ending = draw.choice(list(COMPRESS))
    texts = documents(draw, 20)
    made = parts(texts, form, draw)
    content = COMPRESS[ending](b"".join(made))
    size = draw.randrange(len(content))
    must = texts if ending == "" else []
    if not ending:
        ends = [sum(map(len, made[: n + 1])) for n in range(len(made))]
        # An object that ends where the file does has not been seen to end.
        must = [text for n, text in enumerate(texts) if ends[2 * n + 1] < size]
    lines = form == "jsonl" and (not ending or size == 0)
    name = ("a.jsonl" if form == "jsonl" else "a.json") + ending
    return Case("cut short", name, content[:size], must, texts, named=not lines)


def flip_plain(draw: random.Random) -> Case:
    """One bit of an uncompressed file: it costs the document that it is in."""
    form = draw.choice(["jsonl", "strings", "objects"])
    texts = documents(draw, 12)
    made = parts(texts, form, draw)
    content = bytearray(b"".join(made))
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    before, hit = 0, set()
    for n, part in enumerate(made):
        if before <= place < before + len(part):
            # A separator belongs to the documents on both sides.
            hit = {n // 2} if n % 2 else {n // 2 - 1, n // 2}
        before += len(part)
    must = [text for n, text in enumerate(texts) if n not in hit]
    name = "a.jsonl" if form == "jsonl" else "a.json"
    return Case("one bit, plain", name, bytes(content), must, texts, changed=2)


def flip_packed(draw: random.Random) -> Case:
    """One bit of a file with checksums."""
    texts = documents(draw, 1500 if draw.random() < 0.1 else 40)
    ending = draw.choice([*list(COMPRESS)[1:], ".parquet"])
    if ending == ".parquet":
        content = bytearray(table(list(texts), pyarrow.string()))
    else:
        content = bytearray(
            zstd.compress(b"".join(parts(texts, "jsonl", draw)),
                          options={zstd.CompressionParameter.checksum_flag: 1})
            if ending == ".zst" else COMPRESS[ending](b"".join(parts(texts, "jsonl", draw)))
        )  # fmt: skip
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    name = "a.parquet" if ending == ".parquet" else "a.jsonl" + ending
    return Case("one bit, compressed or Parquet", name, bytes(content), [], texts, garbled=True)


def bad_value(draw: random.Random) -> Case:
    """One value that is none among sound ones."""
    texts = documents(draw, 30)
    bad = draw.randrange(30)
    must = texts[:bad] + texts[bad + 1 :]
    if draw.random() < 0.25:
        values: list[object] = [text.encode() for text in texts]
        values[bad] = draw.choice([b"\xff", b"caf\xe9 x", b"\xed\xa0\x80", b"\xc3"])
        array = pyarrow.array(values, pyarrow.binary())
        strings = pyarrow.StringArray.from_buffers(30, *array.buffers()[1:], array.buffers()[0])
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": strings}), file, row_group_size=16)
        return Case("one bad value", "a.parquet", file.getvalue(), must, texts, named=True)
    form = draw.choice(["jsonl", "strings", "objects"])
    made = parts(texts, form, draw)
    deep = draw.randint(1100, 4000)
    made[2 * bad + 1] = draw.choice([
        b'{"text": nope}', b"nope", b"NaN", b"-", b"null", b"{}", b"[]", b"7", b'""',
        b'{"text": null}', b'{"text": "\xff"}', b'"\xff"', b'"caf\xe9"', b'{"te\xffxt": "x"}',
        b'{"text": "a\\x"}', b'"\\u12"', b'"tab\there"', b'{"text": 1e999}', b"9" * 5000,
        b'{"text": {"a": ["x", "y"]}}', b"[" * deep + b"]" * deep, b'{"id": nope, "l": ["x", "y"]}',
        b'{"a":' * deep + b"1" + b"}" * deep, b'{"id": 1 "text": "x"}', b'{"text": "x",}',
    ])  # fmt: skip
    name = "a.jsonl" if form == "jsonl" else "a.json"
    ending = draw.choice(list(COMPRESS))
    content = COMPRESS[ending](b"".join(made))
    return Case("one bad value", name + ending, content, must, texts, named=True)


def odd_value(draw: random.Random) -> Case:
    """Values that are unusual and sound."""
    texts = documents(draw, 9)
    lines = [json.dumps({"text": text})[1:-1] for text in texts]
    odd = [f'"n": {"9" * 5000}', f'"n": 0.{"3" * 400}', '"n": NaN', '"n": -Infinity', '"n": 1e999',
           '"s": "\\ud800"', f'"n": -{"1" * 400}']  # fmt: skip
    objects = [f"{{{line}, {draw.choice(odd)}}}" for line in lines]
    if draw.random() < 0.5:
        content, name = "\n".join(objects).encode(), "a.jsonl"
    else:
        content, name = ("[" + ",".join(objects) + "]").encode(), "a.json"
    return Case("unusual values", name, content, texts, texts, whole=True)


def other_letters(draw: random.Random) -> Case:
    """Files that are not in UTF-8."""
    texts = [text + " \u00e9" for text in documents(draw, 5)]
    encoding = draw.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
    form = draw.choice(["a.jsonl", "a.json", "a.txt"])
    if form == "a.jsonl":
        text = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    else:
        text = json.dumps(texts, ensure_ascii=False) if form == "a.json" else "\n".join(texts)
    ending = draw.choice(list(COMPRESS))
    content = COMPRESS[ending](text.encode(encoding, "ignore"))
    return Case("other encodings", form + ending, content, [], texts, named=True)


def rubbish(draw: random.Random) -> Case:
    """Bytes that mean nothing, or almost something."""
    pieces = [*(bytes([code]) for code in b'[]{}",:\\\n \0\xff9'), b"null", b'"text"', b'{"a":',
              b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b\x08", b"BZh9"]  # fmt: skip
    if draw.random() < 0.3:
        content = draw.randbytes(draw.randrange(300))
    else:
        content = b"".join(draw.choices(pieces, k=draw.randrange(200)))
    form = draw.choice(["a.jsonl", "a.json", "a.txt", "a.parquet"])
    name = form + (draw.choice(list(COMPRESS)) if form != "a.parquet" else "")
    return Case("rubbish", name, content, [], [], changed=sys.maxsize)


KINDS = (put_together, cut_short, flip_plain, flip_packed, bad_value, odd_value, other_letters,
         rubbish)  # fmt: skip


# --- what came of it ----------------------------------------------------------------------------


def look(case: Case, folder: Path, figures: Figures) -> None:
    """Read the case, and count what was found and what was not."""
    path = folder / case.name
    path.write_bytes(case.content)
    found, problems = [], []
    # Small units, so that their borders are met too.
    for unit in plan_units(find_sources([path]).sources, unit_bytes=300):
        for item in join(read(unit, "text")):
            (problems if isinstance(item, Problem) else found).append(item)
    path.unlink()
    texts = [item[1] for item in found]
    named = [problem for problem in problems if problem.reason]
    known, there = set(case.truth), set(texts)
    others = [text for text in texts if text not in known]
    lost = [text for text in case.must if text not in there]
    missing = [text for text in case.truth if text not in there]
    figures.tried += 1
    figures.sound += len(case.must)
    figures.lost += len(lost)
    figures.changed += len(others) if case.changed < 9 else 0
    wrong = []
    if lost:
        wrong.append(f"lost {lost[:2]}")
    order = [text for text in texts if text in known]
    if order != [text for text in case.truth if text in there] and not (case.garbled and named):
        wrong.append("another order, or a document twice")
    if not named and (case.named and missing or len(others) > case.changed):
        wrong.append(f"no word of {missing[:2]} {others[:2]}")
    if not named and len(missing) > len(others) and not case.name.endswith(".jsonl"):
        wrong.append(f"no word of {missing[:2]}")
    if case.whole and named:
        wrong.append(f"named {named[:2]}")
    if wrong:
        figures.believed += 1
        figures.failures.append(f"{case.kind} {case.name}: {'; '.join(wrong)}")


def campaign(cases: int, seed: int) -> dict[str, Figures]:
    """Reads `cases` files of each kind in turn; an exception is for the caller."""
    result: dict[str, Figures] = collections.defaultdict(Figures)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            draw = random.Random(f"{seed} {number}")
            case = KINDS[number % len(KINDS)](draw)
            try:
                look(case, Path(folder), result[case.kind])
            except Exception as error:
                raise AssertionError(f"case {number} of seed {seed}: {case.name}") from error
    return dict(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    failed = False
    for kind, figures in campaign(args.cases, args.seed).items():
        print(
            f"{kind}: {figures.tried:,} files, {figures.sound:,} sound documents, {figures.lost} "
            f"lost, {figures.changed} changed, {figures.believed} believed"
        )
        print(*figures.failures[:10], sep="\n", file=sys.stderr)
        failed |= bool(figures.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
