"""The vocabularies: golden ids, the offline message, tokenizer files and their refusals."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt import tokenizer
from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import end_of_document, fingerprint, load_tokenizer
from megagpt.tokenizer import gpt2 as bpe
from megagpt.tokenizer.encoder import Encoder
from megagpt.tokenizer.json import encoding_merges, read_tokenizer_file, write_tokenizer_file

GOLDEN = json.loads((Path(__file__).parents[1] / "data/gpt2_golden.json").read_text())["cases"]


def test_gpt2_gives_the_golden_ids() -> None:
    encoding = load_tokenizer("gpt2")
    assert len(GOLDEN) == 40
    for text, ids in GOLDEN:
        assert encoding.encode_ordinary(text) == ids, text[:40]
    assert encoding.n_vocab == 50257
    assert end_of_document(encoding) == 50256
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def test_bytes_are_their_own_ids() -> None:
    encoding = load_tokenizer("bytes")
    text = "h\u00e9 \U0001f600\n\0"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert (encoding.n_vocab, end_of_document(encoding)) == (257, 256)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_decoding_returns_the_text(text: str) -> None:
    for name in ("gpt2", "bytes"):
        encoding = load_tokenizer(name)
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_fingerprint_tells_vocabularies_apart() -> None:
    gpt2, plain = load_tokenizer("gpt2"), load_tokenizer("bytes")
    assert fingerprint(gpt2) == fingerprint(bpe.gpt2_encoding.__wrapped__())
    assert fingerprint(gpt2) != fingerprint(plain)
    assert len(fingerprint(plain)) == 64


def test_damaged_merge_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "gpt2_vocab.bpe"
    damaged.write_bytes(bpe.GPT2_MERGES.read_bytes()[:-2])
    monkeypatch.setattr(bpe, "GPT2_MERGES", damaged)
    with pytest.raises(DamageError, match="gpt2_vocab.bpe: sha256 is not 1ce166.*install"):
        bpe.gpt2_merges()


def test_unknown_name_and_missing_file_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown tokenizer gpt9: .*bytes, .*gpt2"):
        load_tokenizer("gpt9")
    with pytest.raises(UsageError, match="nothere.json does not exist"):
        load_tokenizer("nothere.json")


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from megagpt.tokenizer import load_tokenizer\n"
        "from megagpt.errors import UsageError\n"
        "try:\n    load_tokenizer('o200k_base')\n"
        "except UsageError as error:\n    print(error)\n"
    )
    # A port that nothing listens on stands for a machine without a network.
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "o200k_base: tiktoken could not load its vocabulary (ProxyError)" in result.stdout
    assert "TIKTOKEN_CACHE_DIR" in result.stdout


def test_a_download_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import tiktoken

    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: threading.Event().wait(2))
    with pytest.raises(UsageError, match="no answer in 0.05 s"):
        load_tokenizer("o200k_base")


def small_file(path: Path, **changes: object) -> Path:
    write_tokenizer_file(path, [("t", "h"), ("th", "e"), ("a", "n")], "<|endoftext|>")
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["model"][key] = value
    path.write_text(json.dumps(data))
    return path


def test_tokenizer_file_reads_back(tmp_path: Path) -> None:
    path = small_file(tmp_path / "tokenizer.json")
    encoding = load_tokenizer(path)
    assert encoding.n_vocab == 256 + 3 + 1
    assert end_of_document(encoding) == 259
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("the ant")] == [
        "the", " ", "an", "t",
    ]  # fmt: skip
    assert encoding_merges(encoding) == [("t", "h"), ("th", "e"), ("a", "n")]
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(encoding)


def test_merges_of_gpt2_are_found_from_ranks_alone() -> None:
    import tiktoken

    gpt2 = load_tokenizer("gpt2")
    ranks = dict(list(gpt2._mergeable_ranks.items())[:3000])
    cut = tiktoken.Encoding("x", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={})
    assert encoding_merges(cut) == bpe.gpt2_merges()[: 3000 - 256]
    assert encoding_merges(load_tokenizer("bytes")) is None


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def sequence(*steps: dict) -> dict:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def test_the_pattern_of_a_split_is_taken(tmp_path: Path) -> None:
    changes = sequence(SPLIT, BYTE_LEVEL)
    assert read_tokenizer_file(small_file(tmp_path / "t.json", **changes))._pat_str == r"\w+|\W"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Without the key Hugging Face splits by GPT-2's pattern once more.
        (sequence(SPLIT, {"type": "ByteLevel"}), "not ByteLevel or Split and ByteLevel"),
        (
            sequence({**SPLIT, "invert": True}, BYTE_LEVEL),
            "not Byte",
        ),
        (sequence(SPLIT, SPLIT, BYTE_LEVEL), "not ByteLevel or"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "not ByteLevel or"),
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"type": "Unigram"}, "its model is Unigram, not BPE"),
        ({"dropout": 0.1}, "its model sets dropout"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"pre_tokenizer": None}, "its pre_tokenizer is not ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "not ByteLevel"),
        ({"merges": ["th e", "t h", "a n"]}, "ids do not follow the order of its merges"),
        ({"merges": ["t h", "th e", "q q"]}, "merge 3 makes a word that is not"),
        ({"merges": ["t h", "th e"]}, "1 words of its vocabulary come from no merge"),
        ({"vocab": {"a": 0}, "merges": []}, "lacks some of the 256 bytes"),
        ({"vocab": {"\u4e2d": 0}, "merges": []}, "outside the byte alphabet"),
    ],
)
def test_files_that_tiktoken_would_get_wrong_are_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_tokenizer_file(small_file(tmp_path / "t.json", **changes))


def split_by(regex: str) -> dict:
    """The changes that make a file cut text by a regular expression."""
    pattern = SPLIT | {"pattern": {"Regex": regex}}
    return sequence(pattern, BYTE_LEVEL)


def added(content: str, number: int, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


END = added("<|endoftext|>", 259)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # BLOOM's pattern, which leaves full stops and line ends out.
        (split_by(r" ?[^(\s|[.,!?])]+"), "its pattern passes over ' ', which would vanish"),
        (split_by(r"[^\n]+"), r"its pattern passes over '\\n', which would vanish"),
        (split_by(r"[^\u3002]+"), "its pattern passes over '\u3002', which would vanish"),
        (split_by("a*"), "its pattern matches the empty string"),
        (split_by(r"(?=e)|[\s\S]"), "its pattern matches the empty string"),
        (split_by("(a"), "its pattern is not one of tiktoken's .*arsing error"),
        # A $ ends a line for Hugging Face, a text for tiktoken.
        (split_by(r"\w+$|[\s\S]"), "Hugging Face tokenizers give other ids for '  two   three"),
        ({"added_tokens": [END, added("  ", 260, special=False)]}, "its added token '  ' .260. fr"),
        ({"added_tokens": [added("<|endoftext|>", 5)]}, "'&' and '<|endoftext|>' have one id, 5"),
        ({"added_tokens": [END, added("<|x|>", 259)]}, "'<|endoftext|>' and '<|x|>' have one id"),
        ({"added_tokens": [END, added("th", 270)]}, "its word 'th' has two ids, 256 and 270"),
        ({"added_tokens": [END, added("<|x|>", -1)]}, "its word '<|x|>' has the id -1"),
        ({"added_tokens": [END, added("<|x|>", 2**31)]}, "'<|x|>' has the id 2147483648"),
        ({"merges": ["t h", "th e", "a n", "zz z"]}, "a merge is not of two words"),
        ({"merges": ["t h", "the", "a n"]}, "a merge is not of two words"),
        ({"decoder": {"type": "none"}}, "Hugging Face tokenizers cannot read it"),
    ],
)
def test_a_file_is_refused_unless_its_ids_are_proven(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=f"t.json: .*{message}.*train_tokenizer.py"):
        read_tokenizer_file(small_file(tmp_path / "t.json", **changes))


def test_ids_in_merge_order_are_not_enough(tmp_path: Path) -> None:
    """tiktoken makes pqbc of pq and bc, which the list knows no merge for."""
    path = tmp_path / "t.json"
    merges = [("b", "c"), ("p", "q"), ("pq", "b"), ("pqb", "c")]
    write_tokenizer_file(path, merges, "<|endoftext|>")
    theirs = tokenizers.Tokenizer.from_file(str(path)).encode("pqbc").tokens
    assert theirs == ["pq", "bc"]
    with pytest.raises(UsageError, match="makes 'pqbc' of pqb and c, which tiktoken .* pq and bc"):
        read_tokenizer_file(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.data())
def test_a_file_that_is_taken_gives_hugging_faces_ids(pairs: list, data: st.DataObject) -> None:
    """Merges drawn at random: those that pass the proof agree on any text of their letters."""
    words, merges = ["a", "b", "c"], []
    for left, right in pairs:
        merge = (words[left % len(words)], words[right % len(words)])
        if "".join(merge) not in words:
            merges.append(merge)
            words.append("".join(merge))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.json"
        write_tokenizer_file(path, merges, "<|endoftext|>")
        try:
            encoding = read_tokenizer_file(path)
        except UsageError:
            return
        theirs = tokenizers.Tokenizer.from_file(str(path))
    for _ in range(20):
        text = data.draw(st.text("abc", min_size=1, max_size=30))
        assert encoding.encode_ordinary(text) == theirs.encode(text).ids


def test_text_that_a_pattern_passes_over_is_noticed_while_encoding(tmp_path: Path) -> None:
    gap = "\U0001f999"
    encoding = read_tokenizer_file(small_file(tmp_path / "t.json", **split_by(f"[^{gap}]+")))
    encoder = Encoder(encoding)
    assert encoder.encode_pieces(["the ant", "\u00e9\u4e2d"])[1].tolist() == [4, 5]
    with pytest.raises(UsageError, match=f"stand for 1 of 5 bytes of 'x{gap}', so text would van"):
        encoder.encode_pieces(["the ant", f"x{gap}", "then"])


def test_tokenizer_file_without_end_of_document(tmp_path: Path) -> None:
    path = small_file(tmp_path / "t.json", added_tokens=[])
    with pytest.raises(UsageError, match="has no <|endoftext|> token"):
        read_tokenizer_file(path)


def test_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"model": ')
    with pytest.raises(DamageError, match="t.json: not a tokenizer.json"):
        read_tokenizer_file(path)
    path.write_text("{}")
    with pytest.raises(DamageError, match="KeyError: 'model'"):
        read_tokenizer_file(path)
