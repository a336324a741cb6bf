"""Sampling against distributions computed by hand, generation against the model without cache."""

import argparse
import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from megagpt import cli
from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.model import GPT, initialise
from megagpt.tokenizer import load_tokenizer
from megagpt.use import generate as command
from megagpt.use.generate import generate
from megagpt.use.generator import Continuation, Generator, write_texts
from megagpt.use.options import TextOptions
from megagpt.use.sampling import adjusted, candidates, sample, uniform
from tests.lib.weights import banded, weights_folder


@pytest.fixture(scope="module")
def model() -> GPT:
    config = banded(n_ctx=16, band_width=4)
    built = GPT(config)
    initialise(built.named_parameters(), config, seed=5)
    # Weights of the usual size say the same token for ever: these make every position count.
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.mul_(50.0 if parameter.dim() > 1 and name != "wte.weight" else 1.0)
    return built.eval()


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer("bytes")


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).double().log()


def distribution(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Probabilities (1, V) after logits (1, V), 0 of the tokens that may not follow."""
    ids, chances = candidates(logits[0], temperature, top_k, top_p)
    made = torch.zeros(logits.shape, dtype=torch.float64)
    made[0, ids] = chances
    return made


def test_distributions_by_hand():
    logits = logs(0.4, 0.1, 0.3, 0.2)
    cases = [
        ((1.0, 0, 1.0), [0.4, 0.1, 0.3, 0.2]),
        ((0.5, 0, 1.0), [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        ((0.0, 0, 1.0), [1, 0, 0, 0]),
        ((1.0, 2, 1.0), [4 / 7, 0, 3 / 7, 0]),
        ((1.0, 1, 1.0), [1, 0, 0, 0]),
        ((1.0, 9, 1.0), [0.4, 0.1, 0.3, 0.2]),
        # 0.4 is below 0.6; with 0.3 it is reached, and 0.2 is left out.
        ((1.0, 0, 0.6), [4 / 7, 0, 3 / 7, 0]),
        ((1.0, 0, 0.1), [1, 0, 0, 0]),
        # top-k leaves 0.4 and 0.3 = 4/7 and 3/7; 4/7 alone reaches 0.5.
        ((1.0, 2, 0.5), [1, 0, 0, 0]),
        # Temperature comes first: 0.16/0.3 alone reaches 0.5, where 0.4 alone did not.
        ((0.5, 0, 0.5), [1, 0, 0, 0]),
    ]
    for arguments, expected in cases:
        assert distribution(logits, *arguments)[0].tolist() == pytest.approx(expected), arguments


def test_equal_logits_keep_the_lower_ids():
    assert distribution(torch.zeros(1, 5), 1.0, top_k=2)[0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for temperature in (1e-6, 1.0, 1e6):
        found = distribution(logits, temperature)
        assert torch.isfinite(found).all() and found.sum() == pytest.approx(1.0)
    masked = torch.tensor([[0.0, -math.inf]])
    assert distribution(masked, 1.0, top_k=2, top_p=0.9)[0].tolist() == [1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
)
def test_distribution_is_one_and_keeps_the_order(values, temperature, top_k, top_p):
    logits = torch.tensor([values])
    found = distribution(logits, temperature, top_k, top_p)[0]
    assert found.sum().item() == pytest.approx(1.0)
    kept = found > 0
    if top_k:
        assert kept.sum() <= top_k
    if not kept.all() and top_p < 1 and not top_k:
        plain = distribution(logits, temperature)[0]
        assert plain[kept].sum() >= top_p - 1e-9
        # The fewest: without the least likely of them it is not reached.
        assert plain[kept].sum() - plain[kept].min() < top_p + 1e-9
    assert found.argmax() == logits.double()[0].argmax() or found.max() == found[logits.argmax()]


def test_samples_follow_the_distribution():
    n = 20_000
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]).log()
    options = TextOptions(temperature=1.0, seed=1)
    drawn = torch.tensor([sample(logits, options, k % 100, k // 100) for k in range(n)])
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[4] == 0
    expected = torch.tensor([0.5, 0.25, 0.15, 0.1]).double() * n
    # Chi-square with 3 degrees of freedom is above 16.3 once in a thousand seeds.
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3


def test_draws_are_uniform_and_differ_in_every_argument():
    draws = [uniform(*where) for where in product(range(20), range(20), range(20))]
    assert len(set(draws)) == len(draws)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand.
    assert kstest(draws, "uniform").statistic < 1.95 / len(draws) ** 0.5
    assert uniform(3, 1, 4) == uniform(3, 1, 4)


def test_penalties_and_biases_by_hand():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    options = TextOptions(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25,
        logit_bias={3: 4.0, 2: -100.0}, min_tokens=4,
    )  # fmt: skip
    found = adjusted(logits, options, [1], [0, 0, 1], [3])
    # Repetition: 2 / 2, -1 * 2; frequency twice and once; presence once each.
    assert found.tolist() == [1.0 - 1.25, -2.0 - 0.75, -math.inf, -math.inf]
    assert adjusted(logits, options, [1], [0, 0, 1, 0], [3])[3] == 4.0
    assert logits.tolist() == [2.0, -1.0, 0.5, 0.0]


def test_the_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    seen = [3, 7, 7, 40]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None])
    ours = adjusted(logits, TextOptions(repetition_penalty=1.7), seen[:2], seen[2:], [])
    torch.testing.assert_close(ours, theirs[0])


def test_cached_generation_is_uncached_generation(model, encoding):
    ids = [256, 100, 101, 102]
    for _ in range(12):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy(model, encoding, ids[:4], 12) == ids[4:]
    assert len(set(ids[4:])) > 4  # not a model that repeats itself


def greedy(model, encoding, ids: list[int], n: int) -> list[int]:
    """The likeliest tokens."""
    text = Continuation(ids, TextOptions(max_tokens=n, temperature=0.0, stop=False))
    write_texts(Generator(model, encoding, 1), [text])
    return text.tokens


def test_a_long_text_slides(model, encoding):
    n_ctx = model.config.n_ctx
    prompt = list(range(40))  # longer than the context: its last n_ctx tokens count
    found = greedy(model, encoding, prompt, 3 * n_ctx)
    window, expected = prompt[-n_ctx:], []
    for _ in range(3 * n_ctx):
        expected.append(int(model.logits(torch.tensor([window]))[0, -1].argmax()))
        window = [*window, expected[-1]]
        if len(window) > n_ctx:
            window = window[-(n_ctx // 2) :]
    assert found == expected and len(set(found)) > 4


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--json"]])
def test_a_model_that_gives_no_numbers_is_told(tmp_path, capsys, words):
    """As fp16 does that is too narrow for a model's weights."""
    config = ModelConfig(n_layer=1, n_head=1, d_model=4, n_ctx=8, vocab_size=257)
    weights_folder(tmp_path / "w", config, "bytes", std=1e30)
    assert cli.main(["generate", str(tmp_path / "w"), "--prompt", "A", *words]) == 1
    told = capsys.readouterr()
    assert "1 of 1 texts ended early: the model's numbers for the next token are none" in told.err
    assert told.out.startswith("A") or json.loads(told.out)["finish"] == "error"


def test_a_text_that_must_not_slide_ends(model, encoding):
    options = TextOptions(max_tokens=99, temperature=0.0, stop=False, slide=False)
    text = Continuation([1, 2, 3, 4], options)
    generator = Generator(model, encoding, 1)
    write_texts(generator, [text])
    # The token behind the last position is known; nothing follows it.
    assert (len(text.tokens), text.finish) == (model.config.n_ctx - 4 + 1, "length")
    assert text.tokens == greedy(model, encoding, [1, 2, 3, 4], 13)
    with pytest.raises(UsageError, match="17 positions, but the model's context is 16 tokens"):
        generator.add(Continuation([0] * 17, options))


def test_only_ids_of_the_tokenizer_are_drawn(encoding):
    config = ModelConfig(n_layer=1, n_head=1, d_model=16, n_ctx=99, vocab_size=400)
    wide = GPT(config)
    initialise(wide.named_parameters(), config, seed=5)
    text = Continuation([1], TextOptions(max_tokens=90, temperature=50.0, stop=False))
    write_texts(Generator(wide, encoding, 1), [text])
    assert 200 < max(text.tokens) < 257


def test_text_is_a_function_of_the_seed(model, encoding):
    texts = [
        "".join(
            generate(model, encoding, "ab", TextOptions(max_tokens=40, temperature=1.5, seed=seed))
        )
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def speaker(said: list[int], n_prompt: int) -> GPT:
    """A GPT whose weights make it say `said` after n_prompt tokens, whatever they are.

    The blocks add nothing, the embedding is the identity, and each position votes for its token.
    """
    config = ModelConfig(n_layer=1, n_head=1, d_model=257, n_ctx=32, vocab_size=257)
    built = GPT(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        built.wte.weight.copy_(torch.eye(257))
        for position, token in enumerate(said, start=n_prompt - 1):
            built.wpe.weight[position, token] = 10.0
    return built


def test_generation_stops_at_end_of_document(encoding):
    model = speaker([*b"one", 256, *b"two"], n_prompt=2)
    options = {"max_tokens": 7, "temperature": 0.0}
    assert "".join(generate(model, encoding, "x", TextOptions(**options))) == "one"
    both = generate(model, encoding, "x", TextOptions(**options, stop=False))
    assert "".join(both) == "one<|endoftext|>two"


def test_characters_are_streamed_whole(encoding):
    said = [*"a\N{EURO SIGN}".encode(), 0xE2, 0x82]  # the last character is cut
    options = TextOptions(max_tokens=6, temperature=0.0)
    pieces = list(generate(speaker(said, n_prompt=1), encoding, "", options))
    assert pieces == ["a", "", "", "\N{EURO SIGN}", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("start", [True, False])
def test_a_prompt_begins_a_document_unless_told_otherwise(model, encoding, start):
    prompt = "a<|endoftext|>"[:9]
    ids = [256] * start + [*prompt.encode()]
    expected = bytes(t for t in greedy(model, encoding, ids, 6) if t < 256)
    options = TextOptions(max_tokens=6, temperature=0.0, start=start, stop=False)
    text = "".join(generate(model, encoding, prompt, options))
    assert text.replace("<|endoftext|>", "") == expected.decode(errors="replace")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature = -1\.0: must be 0 or more"),
        ({"top_k": -1}, r"top_k = -1: must be 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p = 0\.0: must be greater than 0 and at most 1"),
        ({"max_tokens": -1}, "max_tokens = -1: must be 0 or more"),
        ({"min_tokens": -1}, "min_tokens = -1: must be 0 or more"),
        ({"temperature": math.nan}, "temperature = nan: must be 0 or more"),
        ({"frequency_penalty": 2.5}, r"frequency_penalty = 2\.5: must be -2\.0 to 2\.0"),
        ({"presence_penalty": math.nan}, "presence_penalty = nan: must be -2"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty = 1e-09: must be 0.001 to 1000"),
        ({"repetition_penalty": math.nan}, "repetition_penalty = nan: must be 0.001"),
        ({"logit_bias": {1: 101.0}}, "logit_bias = .*: must be of numbers from -100 to 100"),
        ({"stop_texts": ("a", "")}, r'stop_texts = \["a", ""\]: must be without an empty text'),
        ({"stop_texts": ("a" * 99, "")}, r'stop_texts = \["a{78}\.\.\.: must be without'),
        ({"logprobs": 21}, "logprobs = 21: must be 0 to 20, or -1 for none"),
        ({"start": False}, "the prompt has no token"),
    ],
)
def test_options_that_make_no_sense(model, encoding, options, message):
    with pytest.raises(UsageError, match=message):
        list(generate(model, encoding, "", TextOptions(**options)))


def parse(*words: str) -> argparse.Namespace:
    return cli.parser("generate").parse_args(["generate", *words])


def test_arguments_are_checked_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="--samples 0: must be 1 or more"):
        command.run(parse("nowhere", "--samples", "0"))
    with pytest.raises(UsageError, match="--batch-size 0: must be 1 or more"):
        command.run(parse("nowhere", "--batch-size", "0"))
    with pytest.raises(UsageError, match="top_k = -3: must be 0 .all tokens. or more"):
        command.run(parse("nowhere", "--top-k", "-3"))
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("absent", "latin"):
        path = str(tmp_path / name)
        with pytest.raises(UsageError, match=f"--prompt-file {path}: .*; give a readable UTF-8"):
            command.run(parse("nowhere", "--prompt-file", path))
