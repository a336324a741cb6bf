"""A vocabulary that goes with the weights reads back as itself, here and by Hugging Face."""

import json
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import END_OF_DOCUMENT, fingerprint, load_tokenizer
from megagpt.tokenizer.gpt2 import gpt2_encoding
from megagpt.tokenizer.json import write_tokenizer_file
from megagpt.tokenizer.portable import FILE, described, tokenizer_content

TEXTS = [
    "I'll see  two\n\n\tfour 8,900.50",
    "na\u00efve \u4e2d\u6587 \U0001f600",
    "a" * 50 + " \x00\x7f",
]


def foreign() -> tiktoken.Encoding:
    """GPT-2's first merges under another pattern, other special tokens and with gaps in the ids."""
    ranks = dict(list(gpt2_encoding()._mergeable_ranks.items())[:400])
    special = {END_OF_DOCUMENT: 500, "<|pad|>": 502}
    return tiktoken.Encoding(
        "foreign",
        pat_str=r"\p{L}+|\p{N}|[^\p{L}\p{N}]",
        mergeable_ranks=ranks,
        special_tokens=special,
    )


@pytest.mark.parametrize("name", ["gpt2", "bytes", "foreign"])
def test_a_named_vocabulary_as_a_file(name, tmp_path):
    encoding = foreign() if name == "foreign" else load_tokenizer(name)
    content = described(encoding).encode()
    if name != "foreign":
        assert tokenizer_content(name, fingerprint(encoding)) == content
    path = tmp_path / FILE
    path.write_bytes(content)
    read = load_tokenizer(path, fingerprint(encoding))
    assert (read.n_vocab, fingerprint(read)) == (encoding.n_vocab, fingerprint(encoding))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        ids = encoding.encode_ordinary(text)
        assert read.encode_ordinary(text) == ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.token_to_id(END_OF_DOCUMENT) == encoding._special_tokens[END_OF_DOCUMENT]


def test_a_file_goes_as_it_is(tmp_path):
    path = tmp_path / "mine.json"
    write_tokenizer_file(path, [("t", "h"), ("th", "e")], END_OF_DOCUMENT)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))  # as nobody else writes it
    known = fingerprint(load_tokenizer(path))
    assert tokenizer_content(str(path), known) == path.read_bytes()
    path.rename(tmp_path / FILE)
    assert tokenizer_content(str(tmp_path)) == (tmp_path / FILE).read_bytes()


def test_another_vocabulary_than_expected_does_not_go(tmp_path):
    with pytest.raises(DamageError, match="another one than the tokens were made with"):
        tokenizer_content("bytes", fingerprint(gpt2_encoding()))
    with pytest.raises(UsageError, match="does not exist"):
        tokenizer_content(str(Path(tmp_path) / FILE))
