"""GPT-1's classifier computes what transformers' and plain torch do, on the paper's input forms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config.flops import parameters
from megagpt.config.presets import ModelConfig
from megagpt.corpus.forms import Forms
from megagpt.corpus.records import Masked
from megagpt.errors import UsageError
from megagpt.model import GPT
from megagpt.model.classifier import refuse_samples

FORMS = Forms(tokens=20, length=8)
SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 23, "family": "gpt1"}
SINGLE = ModelConfig(**SHAPE, n_ctx=8, classes=3)
PAIR = ModelConfig(**SHAPE, n_ctx=16, classes=3, parts=2)
CHOICE = ModelConfig(**SHAPE, n_ctx=24, classes=1, parts=3)


def filled(config: ModelConfig) -> GPT:
    model, draw = GPT(config).double().eval(), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=draw)
    return model


def batch(samples: list[Masked]) -> tuple[Tensor, Tensor]:
    """x and y as the loader cuts them."""
    rows = torch.stack([torch.as_tensor(sample.ids) for sample in samples])
    scored = torch.stack([torch.as_tensor(sample.scored) for sample in samples])[:, 1:]
    return rows[:, :-1], rows[:, 1:].masked_fill(~scored, -100)


def test_the_forms_are_the_papers():
    start, delimiter, extract = 20, 21, 22
    assert FORMS.vocabulary == 23
    ids, scored = FORMS.classification([1, 2], 7)
    assert ids.tolist() == [start, 1, 2, extract, 0, 0, 0, 0, 7]
    assert scored.astype(int).tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1]
    one = [start, 1, 2, delimiter, 5, extract, 0, 0]
    other = [start, 5, delimiter, 1, 2, extract, 0, 0]
    assert FORMS.entailment([1, 2], [5], 1).ids.tolist() == [*one, 1]
    assert FORMS.similarity([1, 2], [5], 0).ids.tolist() == [*one, *other, 0]
    assert FORMS.choice([1, 2], [[5], [6]], 1).ids.tolist() == [
        *one, *[start, 1, 2, delimiter, 6, extract, 0, 0], 1,
    ]  # fmt: skip
    long = list(range(10, 20))
    assert FORMS.classification(long, 0).ids.tolist()[:8] == [start, *long[:6], extract]
    assert FORMS.entailment(long, long, 0).ids.tolist()[:8] == [
        start, 10, 11, delimiter, 10, 11, extract, 0,
    ]  # fmt: skip
    with pytest.raises(UsageError, match="length 4: has no room for 2 texts .*must be 5 or more"):
        Forms(tokens=20, length=4).entailment([1], [2], 0)
    with pytest.raises(UsageError, match="a text holds the id 22; a tokenizer of 20 tokens has 0"):
        FORMS.classification([1, extract], 0)


def samples(config: ModelConfig) -> list[Masked]:
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    if config.classes == 1:
        return [FORMS.choice([11], texts, 2), FORMS.choice([12, 13], texts[::-1], 0)]
    if config.parts == 2:
        return [FORMS.similarity(texts[0], texts[1], 2), FORMS.similarity(texts[1], texts[2], 0)]
    return [FORMS.classification(text, label) for label, text in enumerate(texts)]


@pytest.mark.parametrize("config", [SINGLE, PAIR, CHOICE], ids=["single", "pair", "choice"])
def test_the_loss_is_that_of_plain_torch_sample_by_sample(config):
    model = filled(config)
    expected, scores = [], []
    for ids, scored in samples(config):
        parts = torch.as_tensor(ids[:-1]).view(config.parts, 8)
        counts = torch.as_tensor(scored[:-1]).view(config.parts, 8)
        states, language = [], []
        for row, real in zip(parts, counts, strict=True):
            text = row[: int(real.sum()) + 1]  # without what fills the part up
            hidden = model._hidden(text[None])[0]
            states.append(hidden[-1])
            language.append(F.cross_entropy(hidden[:-1] @ model.wte.weight.t(), text[1:]))
        weight, bias = model.classifier.weight, model.classifier.bias
        if config.classes == 1:
            found = torch.stack(states) @ weight[0] + bias
        else:
            found = sum(states) @ weight.t() + bias
        scores.append(found)
        loss = F.cross_entropy(found, torch.tensor(int(ids[-1])))
        expected.append(loss + config.lm_weight * torch.stack(language).mean())
    x, y = batch(samples(config))
    torch.testing.assert_close(model.class_scores(x), torch.stack(scores))
    assert model(x, y).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
    alone = filled(replace(config, lm_weight=0.0))
    alone.load_state_dict(model.state_dict())
    wanted = F.cross_entropy(torch.stack(scores), y[:, -1])
    assert alone(x, y).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)


def test_transformers_chooses_the_same():
    transformers = pytest.importorskip("transformers")
    model = filled(CHOICE)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 23}
    theirs = transformers.OpenAIGPTDoubleHeadsModel(
        transformers.OpenAIGPTConfig(**sizes, num_labels=1, summary_first_dropout=0.0)
    ).double()
    ours = dict(model.named_parameters())
    names = {"tokens_embed": "wte", "positions_embed": "wpe"}
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            for one, other in names.items():
                name = name.replace(one, other)
            value = ours[name]
            parameter.copy_(value.t() if parameter.shape != value.shape or ".c_" in name
                            and value.dim() == 2 else value)  # fmt: skip
        theirs.multiple_choice_head.summary.weight.copy_(model.classifier.weight)
        theirs.multiple_choice_head.summary.bias.copy_(model.classifier.bias)
    x, _ = batch(samples(CHOICE))
    rows = x.reshape(2, 3, 8).contiguous()
    places = (rows == 22).int().argmax(-1)
    found = theirs.eval()(rows, mc_token_ids=places).mc_logits
    torch.testing.assert_close(model.class_scores(x), found)


def test_dropout_is_one_draw_for_all_parts():
    model = filled(replace(CHOICE, dropout=0.5))
    same = torch.ones(2, 1, 16, dtype=torch.double).expand(2, 3, 16)
    torch.manual_seed(0)
    found = model.classifier.train()(same)
    # Not to the last bit: a product of matrices may round its rows by where they lie in memory.
    torch.testing.assert_close(found, found[:, :1].expand(2, 3), rtol=1e-12, atol=0)
    assert not torch.allclose(found[0], found[1])


def test_samples_that_are_none_are_refused():
    x, y = batch(samples(SINGLE))
    refuse_samples(SINGLE, x, y)
    with pytest.raises(UsageError, match="ends in 2, which is none of the classes 0 to 1"):
        refuse_samples(replace(SINGLE, classes=2), x, y)
    x[1, 2] = 0
    with pytest.raises(UsageError, match="a part without the extract token, 22, the last id"):
        refuse_samples(SINGLE, x, y)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"parts": 2}, "model.parts = 2: must be 1 without model.classes"),
        ({"classes": 1}, "model.classes = 1: must be 2 or more, or model.parts what is chosen"),
        ({"classes": 2, "parts": 3}, "model.n_ctx = 8: must be a multiple of model.parts .3.*6 or"),
        ({"classes": 2, "family": "igpt"}, "model.classes = 2: must be 0 in family igpt"),
    ],
)
def test_shapes_that_cannot_be(more, problem):
    import re

    [found] = ModelConfig(**SHAPE | {"n_ctx": 8} | more).problems()
    assert re.match(problem, found)
