"""Texts that are made together: each is what it would be alone."""

import json
import random

import pytest
import torch

from megagpt.checkpoint import load_model
from megagpt.cli import main
from megagpt.model import GPT, initialise
from megagpt.tokenizer import load_tokenizer
from megagpt.use.generator import Continuation, Generator, pieces_of, write_texts
from megagpt.use.options import TextOptions
from megagpt.use.pieces import TextStream, token_text
from tests.lib.weights import banded, weights_folder
from tests.use.test_generate import speaker

CONFIG = banded(n_ctx=64, band_width=7)


@pytest.fixture(scope="module")
def model() -> GPT:
    """In float64, so that no rounding of a batch decides a draw."""
    built = GPT(CONFIG)
    initialise(built.named_parameters(), CONFIG, seed=5)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.mul_(30.0 if parameter.dim() > 1 and name != "wte.weight" else 1.0)
    return built.double()


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer("bytes")


def drawn_texts(count: int, seed: int) -> list[Continuation]:
    """Prompts of 1 to 60 tokens and options of every kind."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        options = TextOptions(
            max_tokens=draw.randint(0, 80),
            temperature=draw.choice([0.0, 0.7, 1.5]),
            top_k=draw.choice([0, 0, 5]),
            top_p=draw.choice([1.0, 0.9]),
            frequency_penalty=draw.choice([0.0, 1.0]),
            repetition_penalty=draw.choice([1.0, 1.2]),
            seed=draw.randint(0, 3),
            stop=draw.random() < 0.5,
            stop_texts=draw.choice([(), ("e",), ("ab", "\x07")]),
            stop_tokens=draw.choice([(), tuple(range(0, 257, 25))]),
            logprobs=draw.choice([-1, 0, 3]),
            slide=draw.random() < 0.5,
        )
        prompt = [draw.randrange(257) for _ in range(draw.randint(1, 60))]
        texts.append(Continuation(prompt, options, number % 3))
    return texts


def end_of(text: Continuation) -> tuple[list[int], str]:
    return text.tokens, text.finish


@pytest.mark.parametrize("rows", [2, 5])
def test_a_text_is_what_it_would_be_alone(model, encoding, rows):
    together = drawn_texts(10, seed=rows)
    made = write_texts(Generator(model, encoding, rows), together)
    for text, words, alone in zip(together, made, drawn_texts(10, seed=rows), strict=True):
        assert write_texts(Generator(model, encoding, 1), [alone]) == [words]
        assert end_of(text) == end_of(alone)
    assert {text.finish for text in together} == {"stop", "length"}


def test_texts_come_and_go_at_any_step(model, encoding):
    """Some are cancelled: waiting, half read, or half written. The others do not notice."""
    texts, draw = drawn_texts(12, seed=9), random.Random(1)
    generator, cancelled = Generator(model, encoding, 3), set()
    for text in texts:
        generator.add(text)
        for _ in range(draw.randint(0, 6)):
            generator.step()
        if draw.random() < 0.4:
            victim = draw.choice(texts)
            generator.cancel(victim)
            cancelled.add(id(victim))
    while generator.busy:
        generator.step()
    assert generator.texts == generator.waiting == 0 and not any(generator.cache.lengths)
    ends = [end_of(text) for text in texts if id(text) not in cancelled]
    alone = drawn_texts(12, seed=9)
    write_texts(Generator(model, encoding, 1), alone)
    kept = [end_of(a) for a, text in zip(alone, texts, strict=True) if id(text) not in cancelled]
    assert ends == kept and 3 < len(ends) < 12


@pytest.mark.parametrize("alone", [True, False])
def test_rows_one_by_one_are_bit_for_bit_the_same(encoding, alone):
    """In fp32: the log probabilities show every bit."""
    model = GPT(CONFIG)
    initialise(model.named_parameters(), CONFIG, seed=5)
    options = TextOptions(max_tokens=20, temperature=1.0, logprobs=0, stop=False)

    def logprobs(numbers: range) -> list[list[float]]:
        generator = Generator(model, encoding, 8, alone)
        texts = [Continuation([1, 2 * n], options, n) for n in numbers]
        found: dict[int, list[float]] = {id(text): [] for text in texts}
        for text in texts:
            generator.add(text)
        while generator.busy:
            for text, piece in generator.step():
                found[id(text)] += [one.logprob for one in piece.tokens]
        return list(found.values())

    together = logprobs(range(8))
    single = [logprobs(range(n, n + 1))[0] for n in range(8)]
    if alone:
        assert together == single
    for a, b in zip(together, single, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_samples_of_one_prompt_read_it_once(model, encoding):
    options = TextOptions(max_tokens=10, temperature=1.0, score_prompt=True, logprobs=1)
    texts = [Continuation(list(range(50)), options, n) for n in range(6)]
    generator = Generator(model, encoding, 4)
    write_texts(generator, texts)
    # Four samples fill the rows; the others read it again, once.
    assert generator.read_tokens == 100
    assert len({tuple(text.tokens) for text in texts}) > 4
    assert all(text.scores == texts[0].scores for text in texts)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_samples_of_one_prompt_are_what_each_would_be_alone(model, encoding, rows):
    """Copies of a prompt in the first row and in others, behind a text that goes on."""

    def texts() -> list[Continuation]:
        options = TextOptions(max_tokens=15, temperature=1.0, stop=False)
        same = [Continuation(list(range(20)), options, n) for n in range(4)]
        other = [Continuation([7, 8], options, n) for n in range(3)]
        return [*same[:2], *other, *same[2:]]

    together = texts()
    write_texts(Generator(model, encoding, rows), together)
    for text, alone in zip(together, texts(), strict=True):
        write_texts(Generator(model, encoding, 1), [alone])
        assert text.tokens == alone.tokens


def test_prompts_are_shared_only_where_as_much_is_told(model, encoding):
    """Of one prompt in three requests each gets as many likeliest tokens as it asked for."""
    asked = [
        TextOptions(max_tokens=1, temperature=1.0, logprobs=n, score_prompt=score)
        for n, score in ((1, True), (3, True), (5, False))
    ]
    texts = [Continuation(list(range(9)), options) for options in asked]
    write_texts(Generator(model, encoding, 4), texts)
    for text, count in zip(texts[:2], (1, 3), strict=True):
        assert {len(one.top) - count for one in text.scores[1:]} <= {0, 1}
    assert texts[2].scores == []


def test_log_probabilities_are_those_of_the_model(model, encoding):
    ids = [256, *b"abcdefgh"]
    options = TextOptions(
        max_tokens=6, temperature=0.0, logprobs=3, score_prompt=True, stop=False, top_k=2
    )
    text = Continuation(ids, options)
    generator, records = Generator(model, encoding, 1), []
    generator.add(text)
    while generator.busy:
        records += [one for _, piece in generator.step() for one in piece.tokens]
    whole = torch.tensor([ids + text.tokens])
    logs = model.logits(whole)[0].detach().log_softmax(-1)
    found = [*text.scores, *records]
    assert [one.token for one in found] == whole[0].tolist()
    assert found[0].logprob is None and found[0].top == []
    for position, one in enumerate(found[1:]):
        assert one.logprob == pytest.approx(float(logs[position, one.token]), abs=1e-5)
        assert one.logprob in [log for _, log in one.top]  # the same float
        best = logs[position].topk(3)
        assert [log for _, log in one.top[:3]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert len(one.top) == 3 + (one.token not in best.indices)
    assert all(one.logprob == one.top[0][1] for one in records)  # greedy


def test_prompts_are_read_in_pieces(encoding, monkeypatch):
    monkeypatch.setattr("megagpt.use.generator.PIECE", 7)
    model = GPT(CONFIG)
    initialise(model.named_parameters(), CONFIG, seed=5)
    options = TextOptions(max_tokens=3, temperature=0.0, logprobs=0, score_prompt=True)
    text = Continuation(list(range(40)), options)
    generator = Generator(model, encoding, 1)
    generator.add(text)
    for _ in range(5):
        assert generator.step() == []
    logs = model.logits(torch.arange(40)[None])[0].log_softmax(-1)
    generator.step()
    found = [one.logprob for one in text.scores[1:]]
    assert found == pytest.approx([float(logs[i, i + 1]) for i in range(39)], abs=1e-5)


def test_numbers_that_are_none_end_a_text(encoding):
    model = speaker([*b"abc"], n_prompt=1)
    with torch.no_grad():
        model.wpe.weight[2] = torch.nan
    text = Continuation([256], TextOptions(max_tokens=9, temperature=1.0))
    assert write_texts(Generator(model, encoding, 2), [text]) == ["ab"]
    assert text.finish == "error"


# --- text ---------------------------------------------------------------------------------------


def test_stop_texts_wait_and_end(encoding):
    model = speaker([*b"say: enough\n\nmore"], n_prompt=1)
    for stops, expected in (
        (("\n\n",), "say: enough"),
        (("\n\n", "gh"), "say: enou"),
        (("\n\n\n",), "say: enough\n\nmore"),
        (("say",), ""),
    ):
        options = TextOptions(max_tokens=17, temperature=0.0, stop_texts=stops, logprobs=0)
        text = Continuation([256], options)
        generator, records = Generator(model, encoding, 1), []
        generator.add(text)
        made = ""
        while generator.busy:
            for _, piece in generator.step():
                made += piece.text
                records += piece.tokens
        assert made == expected
        assert bytes(one.token for one in records).decode() == expected
        assert [one.offset for one in records] == list(range(len(expected)))
    pieces = list(pieces_of(generator, Continuation([256], TextOptions(
        max_tokens=17, temperature=0.0, stop_texts=("enough\t",))
    )))  # fmt: skip
    assert pieces[:6] == [*"say: ", ""] and "enough\n" in pieces and len(pieces) == 17


def test_streams_are_the_text_whatever_is_cut():
    """A campaign: any bytes in any pieces, any stop texts, against the whole text cut by find."""
    draw = random.Random(3)
    for _ in range(400):
        letters = "ab\N{EURO SIGN}\N{GRINNING FACE}"
        data = "".join(draw.choices(letters, k=draw.randint(0, 12))).encode()
        data = data[: len(data) - draw.choice([0, 0, 1])]
        stops = ["".join(draw.choices(letters, k=draw.randint(1, 3))) for _ in range(2)]
        stream, made, place = TextStream(stops), "", 0
        while place < len(data) and not stream.stopped:
            n = draw.randint(1, 3)
            made += stream.push(data[place : place + n])
            place += n
        made += stream.end()
        whole = data.decode(errors="replace")
        cuts = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
        assert made == whole[: min(cuts, default=(0, len(whole)))[1]]
        assert stream.stopped == bool(cuts) and stream.length == len(made)


def test_tokens_of_parts_of_characters_stay_apart():
    assert token_text(b" caf\xc3\xa9") == " caf\u00e9"
    assert token_text(b"\xe2\x80") == "bytes:\\xe2\\x80" != token_text(b"\xe2\x81")


def test_stop_tokens_and_the_least_length(encoding):
    model = speaker([*b"ab", 256, *b"cd"], n_prompt=1)
    options = {"max_tokens": 5, "temperature": 0.0}
    for more, expected, finish in (
        ({}, "ab", "stop"),
        ({"stop_tokens": (ord("b"),)}, "a", "stop"),
        ({"stop_tokens": (ord("d"),), "stop": False}, "ab<|endoftext|>c", "stop"),
        ({"logit_bias": {256: -100.0, ord("x"): 90.0}}, "xxxxx", "length"),
    ):
        text = Continuation([256], TextOptions(**options, **more))
        assert write_texts(Generator(model, encoding, 1), [text]) == [expected], more
        assert text.finish == finish
    text = Continuation([256], TextOptions(**options, min_tokens=4))
    write_texts(Generator(model, encoding, 1), [text])
    assert 256 not in text.tokens[:4] and len(text.tokens) >= 4


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("weights") / "weights"
    weights_folder(folder, CONFIG, "bytes")
    return folder


def test_the_command_makes_many_texts_in_their_order(folder, capsys):
    words = ["generate", str(folder), "--max-tokens", "12", "--seed", "3", "--temperature", "2"]
    both = [*words, "--prompt", "one", "--prompt", "another", "--samples", "2"]
    assert main([*both, "--json", "--batch-size", "3", "--batch-invariant"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        ("one", 0), ("one", 1), ("another", 0), ("another", 1),
    ]  # fmt: skip
    for line in lines[::2]:
        assert main([*words, "--prompt", line["prompt"]]) == 0
        assert capsys.readouterr().out == line["prompt"] + line["text"] + "\n"
    assert main([*both, "--batch-invariant"]) == 0
    expected = "".join(
        f"--- {n} of 4 ---\n{line['prompt']}{line['text']}\n" for n, line in enumerate(lines, 1)
    )
    assert capsys.readouterr().out == expected


def test_weights_are_rounded_as_they_are_loaded(folder):
    whole, _, _ = load_model(folder)
    half, _, _ = load_model(folder, "cpu", torch.bfloat16)
    for ours, rounded in zip(whole.parameters(), half.parameters(), strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(ours.bfloat16(), rounded)
