"""Dialogues as masked corpora: both forms, what is scored, and transformers' template beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from megagpt.checkpoint.export import open_weights
from megagpt.config.presets import ModelConfig
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, UsageError
from megagpt.hub.exporting import write_export, write_tokenizer
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import fingerprint, load_tokenizer
from megagpt.use.dialogue import SpecialTokens, special_tokens, with_turns
from megagpt.use.talks import Talk, is_held_out, masked, prepare_talks, read_talks
from tests.lib.server import chat_folder

TURNS = [("system", "Be."), ("user", "Hi, é?"), ("assistant", "Ho."), ("user", "<|end|>")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[role], "value": text} for role, text in TURNS]


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def form_of(name: str) -> SpecialTokens:
    found = special_tokens(with_turns(load_tokenizer(name)))
    assert found is not None
    return found


def test_both_forms_are_the_same_dialogue(tmp_path):
    file = written(tmp_path / "a.jsonl", {"messages": OPENAI}, {"conversations": SHAREGPT})
    first, second = read_talks(file)
    assert first == second == Talk(TURNS, [False, False, True, False])


def test_answers_and_their_end_are_scored(tmp_path):
    sample = masked(form_of("bytes"), Talk(TURNS, [False, False, True, False]))
    end, system, user, assistant = 260, 257, 258, 259
    told = [[*text.encode(), end] for _, text in TURNS]
    ids = [system, *told[0], user, *told[1], assistant, *told[2], user, *told[3]]
    assert sample.ids == ids, "<|end|> in a text is text"
    scored = [token for token, counts in zip(ids, sample.scored, strict=True) if counts]
    assert scored == [*b"Ho.", end]


def test_an_answer_of_weight_0_is_only_read(tmp_path):
    weighed = [m | {"weight": 0} if m["role"] == "assistant" else m for m in OPENAI]
    (talk,) = read_talks(written(tmp_path / "a.jsonl", {"messages": weighed}))
    assert not any(masked(form_of("bytes"), talk).scored)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_template_of_an_export_gives_the_same_ids_and_the_same_mask(name, tmp_path):
    form = form_of(name)
    write_tokenizer(tmp_path, form.encoding, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # transformers takes a token's name in a text for the token; ours does not, as said elsewhere.
    turns = [*TURNS[:3], ("user", " two  spaces\n"), ("assistant", "\n\nYes, 12 <b>ö</b> ")]
    messages = [{"role": role, "content": text} for role, text in turns]
    found = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    sample = masked(form, Talk(turns, [role == "assistant" for role, _ in turns]))
    assert found["input_ids"] == [*form.begin(), *sample.ids]
    assert found["assistant_masks"] == [0, *sample.scored]
    asked = theirs.apply_chat_template(
        messages[:2], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert asked == form.ids(turns[:2])


def test_what_generates_from_an_export_stops_where_a_turn_ends(tmp_path):
    source = open_weights(chat_folder(tmp_path / "ours"))
    (tmp_path / "out").mkdir()
    write_export(source, source.tokenizer(), tmp_path / "out", torch.float32, 10**9)
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert sorted(ends) == [256, 257, 258, 259, 260]
    assert (tmp_path / "out/chat_template.jinja").exists()


def test_a_corpus_in_the_folder_where_it_is_made(tmp_path, monkeypatch):
    lines = [{"messages": [*OPENAI[:3], {"role": "user", "content": str(i)}]} for i in range(60)]
    file = written(tmp_path / "a.jsonl", *lines)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    parts = prepare_talks([file], load_tokenizer("bytes"), Path("."))
    assert [part.folder.resolve().name for part in parts] == ["here", "here-validation"]


def test_a_corpus_of_dialogues(tmp_path):
    lines = [{"messages": [*OPENAI[:3], {"role": "user", "content": str(i)}]} for i in range(60)]
    unanswered = {"messages": OPENAI[:2]}
    file = written(tmp_path / "a.jsonl", *lines, unanswered)
    encoding = load_tokenizer("bytes")
    parts = prepare_talks([file], encoding, tmp_path / "talks", 0.3)
    assert [part.split.name for part in parts] == ["train", "validation"]
    held_out = sum(is_held_out(talk, 0.3) for talk in [*read_talks(file)][:60])
    assert [part.documents for part in parts] == [60 - held_out, held_out] and 5 < held_out < 40
    assert sum(sum(part.totals["left_out"].values()) for part in parts) == 1
    for part in parts:
        assert verify_shards(part.folder) == []
        assert part.vocab_size == 261 and part.masked
        assert part.fingerprint == fingerprint(with_turns(encoding))
        assert part.fingerprint == fingerprint(load_tokenizer(part.tokenizer))
    # The tokens are rows that a padded embedding has already.
    shapes = [ModelConfig(n_layer=1, n_head=1, d_model=8, n_ctx=8, vocab_size=size,
                          vocab_multiple=64) for size in (257, 261)]  # fmt: skip
    assert shapes[0].embedding_rows == shapes[1].embedding_rows
    store = TokenWindows(parts[0].folder)
    assert np.isin(range(256, 261), store.windows(np.arange(2), 64)).all()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare_talks([file], encoding, tmp_path / "talks", 0.3) == parts
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after == before, "again: nothing, and the folder may be one that is only read"


def test_what_is_no_dialogue_is_named_by_its_line(tmp_path):
    for wrong, told in (
        ({"text": "a"}, "neither of the fields messages, conversations"),
        ([1], "neither of the fields"),
        ({"messages": []}, "its messages are no list of turns"),
        ({"messages": [1]}, "role is None: must be one of system, user, assistant, developer"),
        ({"messages": [{"role": "tool", "content": ""}]}, "role is 'tool': must be one of"),
        ({"messages": [OPENAI[2] | {"weight": 0.5}]}, "weight of a turn is 0.5: must be 0 or 1"),
        ({"conversations": [{"from": "gpt", "value": [1]}]}, "value of a turn is list: must be a"),
    ):
        file = written(tmp_path / "a.jsonl", {"messages": OPENAI}, wrong)
        with pytest.raises(DamageError, match=f"a.jsonl, line 2: .*{told}.*mend the line"):
            list(read_talks(file))
    for raw in ("{", "[" * 100_000):
        (tmp_path / "b.jsonl").write_text(f"\n{raw}\n")
        with pytest.raises(DamageError, match="b.jsonl, line 2: .*mend the line or take it out"):
            list(read_talks(tmp_path / "b.jsonl"))
    with pytest.raises(UsageError, match="none.jsonl: cannot be read .*give JSON lines"):
        list(read_talks(tmp_path / "none.jsonl"))
    for raw in (json.dumps([{"conversations": SHAREGPT}]), "\ufeff[\n  {"):
        (tmp_path / "c.json").write_text(raw)
        with pytest.raises(UsageError, match=r"c.json: an array; .* lines: jq -c '.\[\]' .*c.json"):
            list(read_talks(tmp_path / "c.json"))
    file = written(tmp_path / "a.jsonl", {"messages": OPENAI})
    with pytest.raises(UsageError, match="none of 1 dialogues .* is of this split; give more"):
        prepare_talks([file], load_tokenizer("bytes"), tmp_path / "few")
