"""Sampling against distributions computed by hand, generation against the model without cache."""

import argparse
import math
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.model import GPT, initialise
from megagpt.tokenizer import load_tokenizer
from megagpt.use import generate as command
from megagpt.use.generate import TextOptions, generate
from megagpt.use.sampling import distribution, sample, tokens

GREEDY = partial(sample, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> GPT:
    config = ModelConfig(
        n_layer=2, n_head=2, d_model=32, n_ctx=16, vocab_size=257,
        attention=("dense", "banded"), band_width=4,
    )  # fmt: skip
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
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    generator = torch.Generator().manual_seed(1)
    drawn = sample(probabilities.log().expand(n, -1), 1.0, generator=generator)
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[4] == 0
    expected = probabilities[:4].double() * n
    # Chi-square with 3 degrees of freedom is above 16.3 once in a thousand seeds.
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3


def test_the_same_seed_draws_the_same():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    a, b, c = (sample(logits, 1.0, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_cached_generation_is_uncached_generation(model):
    prompt = torch.tensor([256, 100, 101, 102])
    ids = prompt.tolist()
    for _ in range(12):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert list(islice(tokens(model, prompt, GREEDY), 12)) == ids[4:]
    assert len(set(ids[4:])) > 4  # not a model that repeats itself


def test_a_long_text_slides(model):
    n_ctx = model.config.n_ctx
    prompt = torch.arange(40)  # longer than the context: its last n_ctx tokens count
    found = list(islice(tokens(model, prompt, GREEDY), 3 * n_ctx))
    window, expected = prompt.tolist()[-n_ctx:], []
    for _ in range(3 * n_ctx):
        expected.append(int(model.logits(torch.tensor([window]))[0, -1].argmax()))
        window = [*window, expected[-1]]
        if len(window) > n_ctx:
            window = window[-(n_ctx // 2) :]
    assert found == expected and len(set(found)) > 4


def test_only_ids_of_the_tokenizer_are_drawn(model):
    draw = partial(sample, temperature=5.0, generator=torch.Generator().manual_seed(0))
    assert max(islice(tokens(model, torch.tensor([1]), draw, 10), 100)) < 10


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
    assert pieces == ["a", "", "", "\N{EURO SIGN}", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("start", [True, False])
def test_a_prompt_begins_a_document_unless_told_otherwise(model, encoding, start):
    prompt = "a<|endoftext|>"[:9]
    ids = torch.tensor([256] * start + [*prompt.encode()])
    expected = bytes(t for t in islice(tokens(model, ids, GREEDY, n_vocab=257), 6) if t < 256)
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
        ({"start": False}, "the prompt has no token"),
    ],
)
def test_options_that_make_no_sense(model, encoding, options, message):
    with pytest.raises(UsageError, match=message):
        list(generate(model, encoding, "", TextOptions(**options)))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["generate", *words])


def test_arguments_are_checked_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="--samples 0: must be 1 or more"):
        command.run(parse("nowhere", "--samples", "0"))
    with pytest.raises(UsageError, match="top_k = -3: must be 0 .all tokens. or more"):
        command.run(parse("nowhere", "--top-k", "-3"))
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("absent", "latin"):
        path = str(tmp_path / name)
        with pytest.raises(UsageError, match=f"--prompt-file {path}: .*; give a readable UTF-8"):
            command.run(parse("nowhere", "--prompt-file", path))
