"""What preparation survives: damaged input and hostile text."""

import gzip
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megagpt.corpus import array as array_module
from megagpt.corpus import open as open_module
from megagpt.corpus import part as part_module
from megagpt.corpus import texts as reading
from megagpt.corpus.array import Broken, array_elements
from megagpt.corpus.open import opened
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.errors import DamageError
from megagpt.tokenizer import encoder as encoder_module
from tests.corpus.test_prepare import content, decoded, jsonl, pack, sample_texts


def options(folder: Path, **changes: object) -> PrepareOptions:
    return PrepareOptions(
        output=folder / "out", **({"backend": "tiktoken", "workers": 2} | changes)
    )


BROKEN = [
    (b'{"text": "\xff"}', "invalid UTF-8", "byte 11 of the line"),
    (b'{"text": "x"', "broken JSON", ""),
    (b'{"other": "x"}', "missing text field", "no field 'text' .fields: other"),
    (b'{"text": null}', "text is not a string", "it is NoneType"),
    (b'{"text": 7}', "text is not a string", "it is int"),
    (b'{"text": ""}', "empty document", ""),
    (b"[1, 2]", "text is not a string", "it is list"),
]


@pytest.mark.parametrize("line, reason, detail", BROKEN)
def test_a_bad_line_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, reason: str, detail: str
) -> None:
    path = tmp_path / "in.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 5 + b"\n" + line + b"\n" + good * 5)
    summary = prepare([path], options(tmp_path, unit_bytes=40))
    assert decoded(tmp_path / "out") == ["good"] * 10
    assert summary.left_out == {reason: 1}
    assert f"{path}:7: {reason}" in caplog.text and f"{reason}: 1" in summary.text()
    with pytest.raises(DamageError, match=rf"in.jsonl:7: {reason}.*{detail}.*without --strict"):
        prepare([path], options(tmp_path / "strict", strict=True))


def test_strict_passes_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(10))
    assert sum(prepare([path], options(tmp_path, strict=True)).documents) == 10


def test_bom_blank_lines_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b", "x": NaN}')
    for unit_bytes in (5, 1 << 20):
        folder = tmp_path / str(unit_bytes)
        assert not prepare([path], options(folder, unit_bytes=unit_bytes)).left_out
        assert decoded(folder / "out") == ["a", "b"]


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    summary = prepare([path], options(tmp_path))
    assert decoded(tmp_path / "out") == ["a\ufffdb", "\U0001f600"]
    assert summary.notes == {"lone surrogates replaced by U+FFFD": 1}


def test_text_files_that_are_not_utf8_or_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in/b.txt").touch()
    (tmp_path / "in/c.txt").write_bytes(b"\xef\xbb\xbfgood")
    summary = prepare([tmp_path / "in"], options(tmp_path))
    assert decoded(tmp_path / "out") == ["good"]
    assert summary.left_out == {"invalid UTF-8": 1, "empty document": 1}
    assert "a.txt: invalid UTF-8 (byte 4: unexpected end of data); left out" in caplog.text


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_truncated_compressed_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, name: str
) -> None:
    draw = random.Random(5)
    texts = [str(draw.random()) * 20 for _ in range(2000)]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name == "a.json":
        raw = json.dumps(texts).encode()
    packed = gzip.compress(raw) if ending == "gz" else zstd.compress(raw)
    path = tmp_path / f"{name}.{ending}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    good = jsonl(tmp_path / "good.jsonl", ["good"])
    summary = prepare([path, good], options(tmp_path, unit_bytes=4000))
    assert summary.left_out == {"truncated or damaged file": 1}
    found = decoded(tmp_path / "out")
    assert found[:-1] == ([] if name == "a.txt" else texts[: len(found) - 1])
    assert found[-1] == "good" and (name == "a.txt" or len(found) > 100 or ending == "zst")
    assert path.name in caplog.text and "truncated or damaged file" in caplog.text


@pytest.mark.parametrize(
    ("ending", "why"), [("xz", "Corrupt input data"), ("zst", "Data corruption detected")]
)
def test_a_damaged_stream_is_told_by_its_first_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, why: str
) -> None:
    """And not by what a decompressor says that is asked again."""
    draw = random.Random(5)
    texts = [str(draw.random()) * 20 for _ in range(2000)]
    packed = bytearray(pack(jsonl(tmp_path / "a", texts).read_bytes(), f".{ending}"))
    packed[len(packed) * 3 // 4] ^= 0x5A
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    summary = prepare([tmp_path / f"a.jsonl.{ending}"], options(tmp_path))
    assert summary.left_out == {"truncated or damaged file": 1}
    found = decoded(tmp_path / "out")
    assert len(found) > 500 and found == texts[: len(found)]
    assert f"{why}; the rest of it is left out" in caplog.text


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_whole_compressed_file_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Wherever its bytes are parted, and however many are asked for."""
    text = " ".join(str(n * n % 97) for n in range(1500)).encode() + b"x" * 5000
    path = tmp_path / f"a.{ending}"
    path.write_bytes(pack(text, f".{ending}"))
    for packed in (1, 2, 3, 50, 51, 8192):
        monkeypatch.setattr(open_module, "PACKED", packed)
        for size in (1, 2, 16, 100, 1000, 8192):
            with opened(str(path), ending) as (file, _):
                assert b"".join(iter(lambda: file.read1(size), b"")) == text  # noqa: B023


def test_damaged_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    pyarrow.parquet.write_table(pyarrow.table({"x": ["y"]}), tmp_path / "b.parquet")
    table = pyarrow.table({"text": ["good", None, ""]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    summary = prepare([tmp_path / f"{name}.parquet" for name in "abc"], options(tmp_path))
    assert decoded(tmp_path / "out") == ["good"]
    assert summary.left_out == {
        "truncated or damaged file": 1, "missing text field": 1,
        "text is not a string": 1, "empty document": 1,
    }  # fmt: skip
    assert "no column 'text' (columns: x)" in caplog.text
    assert "c.parquet: document 2" in caplog.text


DEEP = '{"a":' * 2000 + "1" + "}" * 2000
ARRAYS = [
    ('["a", 12, {"b": [1]}, null]', ["a", 12, {"b": [1]}, None], []),
    ("[]", [], []),
    (' [ 1 , "\u00e9" ] ', [1, "\u00e9"], []),
    ("", [], ["not a JSON array"]),
    # What follows the first array, and what is none.
    ('["a"]\n["b"]\n', ["a", "b"], []),
    ('\ufeff["a"]\ufeff["b"]', ["a", "b"], []),
    ('["a"]{"b": 1}\n"c"', ["a", {"b": 1}, "c"], []),
    ('["a"], ["b"]', ["a", "b"], ["a comma outside"]),
    ('["a"], "b"]', ["a", "b"], ["a comma outside"]),
    ('["a"]\0\0', ["a"], ["Expecting value"]),
    # Separators.
    ('["a" "b"]', ["a", "b"], ["'\"' between elements"]),
    ('[{"a": 1}!{"a": 2}, {"a": 3}]', [{"a": 1}, {"a": 3}], ["Expecting value"]),
    ('["a", "b"', ["a", "b"], ["the array has no end"]),
    ('["a",', ["a"], ["the array has no end"]),
    ('["a", ]', ["a"], ["a comma before the end"]),
    ('[,"a",, "b"]', ["a", "b"], ["a comma before the first"] * 2),
    # Elements.
    ('["a", nope, "b"]', ["a", "b"], ["Expecting value"]),
    ('["a", {"b": nope, "c": ["x", "y"]}, "d"]', ["a", "d"], ["Expecting value"]),
    ('["a", "b', ["a"], ["Unterminated string", "the array has no end"]),
    ('["a", "b\\x", "c\td", "e"]', ["a", "e"], ["Invalid", "Invalid"]),
    (f'["a", {DEEP}, {"[" * 9999}{"]" * 9999}, "b"]', ["a", "b"], ["nested too deeply"] * 2),
    (f'["a", {{"b": {"9" * 5000}}}, "b"]', ["a", {"b": float("inf")}, "b"], []),
    ('["a", "b [\\"x|", [\\"x\\",", "c"]', ["a", 'b ["x|', "c"], ["Expecting value"]),
    ('["a", "b"]", "c"]', ["a", "b", "c"], ["text behind", "Expecting value"]),
    # A quote lost, or one too many: no piece of a text becomes an element.
    ('["al, bert", "b!, "c", "d, e", "f"]', ["al, bert", "c", "d, e", "f"], ["text behind"]),
    ('["a", "be"ta", "c", "d"]', ["a", "c", "d"], ["text behind"]),
    ('["a", be, ta", "c", "d"]', ["a", "c", "d"], ["Expecting value"] * 2),
    ('[{"a": "1"}, {"a": "2}, {"a": "3"}, {"a": "4"}]', [{"a": "1"}, {"a": "3"}, {"a": "4"}],
     ["Expecting"]),
    ('[{"i": 1}, {"i": !, "l": [{"a": 2}, {"a": 3}], {"i": 4}]', [{"i": 1}, {"i": 4}],
     ["Expecting value"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "elements", "problems"), ARRAYS)
def test_json_arrays_element_by_element(
    monkeypatch: pytest.MonkeyPatch, text: str, elements: list, problems: list[str]
) -> None:
    for chunk in (1, 2, 5, 1 << 20) if len(text) < 1000 else (3000, 1 << 20):
        monkeypatch.setattr(array_module, "CHUNK", chunk)
        found, said = [], []
        try:
            for element in array_elements(io.BytesIO(text.encode())):
                (said if isinstance(element, Broken) else found).append(element)
        except ValueError as error:
            said.append(Broken(str(error)))
        assert found == elements
        assert [a.detail[: len(b)] for a, b in zip(said, problems, strict=True)] == problems


def test_a_bad_byte_in_an_array_leaves_out_its_element() -> None:
    found = list(array_elements(io.BytesIO(b'["a", "caf\xe9", "\xc3\xa9", "b"]')))
    assert found == ["a", Broken("byte 0xe9", "invalid UTF-8"), "\u00e9", "b"]


def test_the_same_file_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "link.jsonl").symlink_to(path)
    summary = prepare([path, path, tmp_path / "link.jsonl"], options(tmp_path))
    assert summary.left_out == {"file given more than once": 2}
    assert "link.jsonl: file given more than once; left out" in caplog.text
    with pytest.raises(DamageError, match="in.jsonl: file given more than once"):
        prepare([path, path], options(tmp_path / "strict", strict=True))


def test_literal_end_of_document_stays_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["a<|endoftext|>b", "c"])
    for backend in ("tiktoken", "fastokens"):
        folder = tmp_path / backend
        summary = prepare([path], options(folder, backend=backend))
        assert decoded(folder / "out") == ["a<|endoftext|>b", "c"]
        assert summary.documents[0] == 2
        assert summary.notes == {"the literal <|endoftext|> kept as text": 1}


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_large_text_files_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    texts = ["word \u00e9t\u00e9  more\n" * 5000, "x" * 50_000]
    for name, text in zip("ab", texts, strict=True):
        raw = text.encode()
        data = gzip.compress(raw) if ending else raw
        (tmp_path / f"{name}.txt{ending}").write_bytes(data)
    (tmp_path / f"c.txt{ending}").write_bytes(data[:-9] if ending else raw + b"\xff")
    inputs = [tmp_path / f"{name}.txt{ending}" for name in "acb"]
    monkeypatch.setattr(reading, "PIECE_BYTES", 100)
    summary = prepare(inputs, options(tmp_path / "large"))
    assert decoded(tmp_path / "large/out") == texts
    assert sum(summary.left_out.values()) == 1
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 30)
    prepare(inputs, options(tmp_path / "whole"))
    assert content(tmp_path / "large/out") == content(tmp_path / "whole/out")


def test_a_problem_costs_no_text_of_the_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of that file is written when the problem comes."""
    for module, name, value in (
        (reading, "PIECE_BYTES", 100), (part_module, "BATCH", 1000),
        (part_module, "PIECE", 50), (encoder_module, "PIECE", 50),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    texts = ["one word more " * count for count in (50, 73, 80, 150, 10)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
        (tmp_path / f"{number}a.txt").write_bytes(b"" if number % 2 else b"lost " * 99 + b"\xff")
    summary = prepare([tmp_path / "*.txt"], options(tmp_path, workers=1))
    assert decoded(tmp_path / "out") == texts
    assert summary.left_out == {"invalid UTF-8": 3, "empty document": 2}
