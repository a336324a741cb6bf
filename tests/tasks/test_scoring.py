"""Scores of tasks against plain torch in float64, and against a model that knows the answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from megagpt.corpus.records import prepare
from megagpt.errors import UsageError
from megagpt.tasks.arithmetic import arithmetic
from megagpt.tasks.examples import Example, Task
from megagpt.tasks.overlap import CLEAN, DIRTY, SHORT, cleanness
from megagpt.tasks.paper import PF_DAYS, SIZES, at_compute, paper_lines, paper_rows
from megagpt.tasks.scoring import TaskOptions, proportion, score_task, stopword_ids
from megagpt.tasks.stream import stream
from megagpt.tokenizer import load_tokenizer
from megagpt.use.likelihood import Scorer
from megagpt.use.options import TextOptions
from tests.lib.corpus import sentences, write_corpus
from tests.lib.weights import random_model

N_CTX = 64


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(random_model(N_CTX), load_tokenizer("bytes"), batch_size=3)


@pytest.fixture(scope="module")
def exactly():
    """(context, continuation) as texts -> (nats, all greedy), in float64, one at a time."""
    model = random_model(N_CTX).double()

    @torch.no_grad()
    def answer(context: str, continuation: str, last: int = 0) -> tuple[float, bool]:
        ids = [*(context + continuation).encode()]
        n = last or len(continuation.encode())
        if not context:
            ids = [256, *ids]
        ids = ids[-N_CTX - 1 :]
        logits = model.logits(torch.tensor([ids[:-1]]))[0, -n:]
        targets = torch.tensor(ids[-n:])
        nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        return float(nats), bool((logits.argmax(-1) == targets).all())

    return answer


def questions(count: int = 8) -> tuple[Example, ...]:
    texts = iter(sentences(6 * count, 3))
    made = []
    for number in range(count):
        context, *choices = (next(texts).strip()[: 10 + 7 * (i % 3)].strip() for i in range(4))
        made.append(
            Example(
                contexts=(context,),
                choices=(choices[0], choices[1] + " \u00e9", choices[2]),
                gold=number % 3,
                between=" ",
            )
        )
    return tuple(made)


def task(kind: str, examples: tuple[Example, ...], **more: object) -> Task:
    return Task(name="t", kind=kind, examples=examples, source="here", **more)


def test_all_normalisations_of_a_choice(scorer, exactly):
    examples = questions()
    found = score_task(scorer, task("choice", examples, headline="acc_tokens"), TaskOptions())
    hits: dict[str, list[bool]] = {}
    for example in examples:
        nats = np.array([exactly(*option)[0] for option in example.options])
        alone = np.array([exactly("Answer:", " " + choice)[0] for choice in example.choices])
        scores = {
            "acc": nats,
            "acc_norm": nats / [len(choice) for choice in example.choices],
            "acc_bytes": nats / [len(choice.encode()) for choice in example.choices],
            # Of the tokenizer `bytes`, with the space before the choice.
            "acc_tokens": nats / [1 + len(choice.encode()) for choice in example.choices],
            "acc_unconditional": nats - alone,
        }
        for name, score in scores.items():
            hits.setdefault(name, []).append(int(np.argmax(score)) == example.gold)
    for name, right in hits.items():
        assert found.figures[name].value == np.mean(right), name
    assert len({one.value for one in found.figures.values()}) > 1
    assert found.correct.tolist() == hits["acc_tokens"]
    assert found.chance == pytest.approx(1 / 3) and found.shots == (0, 0)


def test_partial_scoring(scorer, exactly):
    made = tuple(
        Example(contexts=e.choices, choices=(e.contexts[0],), gold=e.gold, between=" ")
        for e in questions()
    )
    found = score_task(scorer, task("partial", made), TaskOptions())
    right = [int(np.argmax([exactly(*option)[0] for option in e.options])) == e.gold for e in made]
    assert found.figures["acc"].value == np.mean(right) and 0 < np.mean(right) < 1


def test_the_likelihood_of_texts(scorer, exactly):
    options = [option for e in questions() for option in e.options] + [("", "text"), ("a ", "b")]
    found = scorer.likelihoods([scorer.pair(*option) for option in options])
    for option, one in zip(options, found, strict=True):
        # A space at the end of a context belongs to what follows.
        nats, greedy = exactly(*(option if option != ("a ", "b") else ("a", " b")))
        assert one.logprob == pytest.approx(nats, rel=1e-5) and one.greedy == greedy
    long = scorer.pair("x" * 100, "abc")
    [cut] = scorer.likelihoods([long])
    assert cut.logprob == pytest.approx(exactly("x" * 100, "abc")[0], rel=1e-5)
    with pytest.raises(UsageError, match="65 tokens to be scored at once: must be 1 to 64"):
        scorer.likelihoods([([1], [2] * 65)])
    with pytest.raises(UsageError, match="0 tokens to be scored .* give a longer text"):
        scorer.likelihoods([([1], [])])
    with pytest.raises(UsageError, match="--batch-size 0: must be 1 or more"):
        Scorer(scorer.model, scorer.encoding, 0)


def test_a_batch_changes_only_the_rounding(scorer):
    pairs = [scorer.pair(*option) for e in questions() for option in e.options]
    one = Scorer(scorer.model, scorer.encoding, 1).likelihoods(pairs)
    for a, b in zip(one, scorer.likelihoods(pairs), strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=1e-6)


@pytest.mark.parametrize("kind", ["word", "token", "stopword"])
def test_three_scorings_of_lambada(kind):
    model, encoding = random_model(N_CTX, 50257), load_tokenizer("gpt2")
    examples = [Example(contexts=(f"text {n} and",), choices=("",), between=" ") for n in range(8)]
    # Last words that the model does and does not find the likeliest.
    banned = stopword_ids(encoding) if kind == "stopword" else []
    made = []
    for number, example in enumerate(examples):
        context = encoding.encode_ordinary(example.contexts[0])
        with torch.no_grad():
            logits = model.logits(torch.tensor([context]))[0, -1]
        logits[banned] = -math.inf
        ranked = logits.argsort(descending=True).tolist()
        words = (encoding.decode([token]) for token in ranked)
        # A token that is one word behind a space.
        word = next(w for w in words if w[0] == " " and w[1:].isalpha() and w.isascii())
        made.append(Example(contexts=example.contexts, choices=(word[1:] + "ing" * (number % 2),)))
    made = [Example(contexts=e.contexts, choices=e.choices, between=" ") for e in made]
    scorer = Scorer(model, encoding)
    options = TaskOptions(lambada=kind)
    found = score_task(scorer, task("word", tuple(made)), options)
    exact = random_model(N_CTX, 50257).double()
    nats, hits = [], []
    for example in made:
        ids = encoding.encode_ordinary("".join(example.options[0]))
        n = len(ids) - len(encoding.encode_ordinary(example.contexts[0])) if kind == "word" else 1
        with torch.no_grad():
            logits = exact.logits(torch.tensor([ids[:-1]]))[0, -n:]
        targets = torch.tensor(ids[-n:])
        nats.append(float(logits.log_softmax(-1).gather(1, targets[:, None]).sum()))
        logits[:, banned] = -math.inf
        hits.append(bool((logits.argmax(-1) == targets).all()))
    assert found.figures["accuracy"].value == np.mean(hits)
    assert found.figures["perplexity"].value == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    assert found.correct.tolist() == hits
    told = {"word": "last word", "token": "(GPT-2's table)", "stopword": "no stop word"}
    assert told[kind] in found.scoring


def test_stop_words_are_tokens_of_their_own():
    encoding = load_tokenizer("gpt2")
    words = {encoding.decode([token]) for token in stopword_ids(encoding)}
    assert {" the", "the", " The", ".", " he"} <= words and not {" house", " menu"} & words


# --- texts of the model's own ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking() -> Scorer:
    """A model that is fond of letters and of ending lines, here and there."""
    model = random_model(N_CTX)
    with torch.no_grad():
        model.wpe.weight *= 10.0
        model.wte.weight[97:123] *= 2.0
        model.wte.weight[10] *= 3.0
    return Scorer(model, load_tokenizer("bytes"), 5)


def said(scorer: Scorer, prompt: str, n: int) -> str:
    """n greedy tokens, one after another without a cache."""
    ids = list(prompt.encode())
    for _ in range(n):
        with torch.no_grad():
            token = int(scorer.model.logits(torch.tensor([ids]))[0, -1].argmax())
        if token == 256:
            break
        ids.append(token)
    return bytes(ids[len(prompt.encode()) :]).decode(errors="replace")


def test_texts_are_those_of_one_at_a_time(talking):
    prompts = ["\n\nQ: What is ", "Q:", "ab", "\n\nQ: What", "cd", "ef"]
    ids = [talking.encode(prompt) for prompt in prompts]
    options = [TextOptions(temperature=0.0, max_tokens=n) for n in (6, 5, 6, 0, 6, 6)]
    together = talking.texts(ids, options, lambda number, text: number == 1)
    sizes = (6, 1, 6, 0, 6, 6)
    expected = [said(talking, prompt, n) for prompt, n in zip(prompts, sizes, strict=True)]
    assert together == expected and len(set(expected)) > 3
    # Only the end of a prompt without room for an answer counts.
    ten = TextOptions(temperature=0.0, max_tokens=10)
    [cut] = talking.texts([[65] * 100], [ten], lambda number, text: False)
    assert cut == said(talking, "A" * 54, 10)


def test_the_answer_must_be_said_and_the_line_ended(talking):
    prompts = [f"{'question'[:n]} =" for n in range(9)]
    texts = [said(talking, prompt, 6) for prompt in prompts]
    lines = [(prompt, *text.partition("\n")) for prompt, text in zip(prompts, texts, strict=True)]
    known = [(prompt, line) for prompt, line, ended, _ in lines if ended and line.strip()]
    assert len(known) > 2, texts
    right = [Example(contexts=(prompt,), choices=(text,)) for prompt, text in known]
    wrong = [Example(contexts=(prompt,), choices=(text + "x",)) for prompt, text in known]
    found = score_task(talking, task("exact", (*right, *wrong)), TaskOptions())
    assert found.correct.tolist() == [True] * len(right) + [False] * len(wrong)
    assert found.figures["exact_match"].value == 0.5 == found.figures["acc"].value
    # It begins as a shorter answer does, but goes on: greedy, though no exact match.
    long = [e for e in right if len(e.choices[0].strip()) > 1]
    assert long, known
    shorter = [Example(contexts=e.contexts, choices=(e.choices[0][:-1],)) for e in long]
    found = score_task(talking, task("exact", tuple(shorter)), TaskOptions())
    assert found.figures["exact_match"].value == 0 and found.figures["acc"].value == 1


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (57, 100), (1, 2000)])
def test_the_interval_is_wilsons(hits, n):
    found = proportion([True] * hits + [False] * (n - hits))
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high])
    assert found.value == hits / n and math.isnan(proportion([]).value)


def test_bits_per_character(scorer, tmp_path):
    text = (" ".join(sentences(600, 4)))[:1601].encode()
    path = tmp_path / "text8"
    path.write_bytes(text)
    exact = random_model(N_CTX).double()
    row = torch.tensor([256, *text[-80:]])
    for stride in (64, 16):
        nats = []
        for place in range(1, len(row)):
            last = -(-place // stride) * stride
            begin = max(0, last - N_CTX)
            with torch.no_grad():
                logits = exact.logits(row[None, begin:place])[0, -1]
            nats.append(-float(logits.log_softmax(-1)[row[place]]))
        found = stream(scorer, "text8", path, stride)
        bits = found.figures["bits_per_character"]
        assert bits.value == pytest.approx(np.mean(nats) / math.log(2), rel=1e-6)
        assert bits.low < bits.value < bits.high
        assert f"move by {stride}, of a file of 1,601 bytes instead" in found.scoring
    assert stream(scorer, "text8", path, 16, most=3).examples == 3
    with pytest.raises(UsageError, match="--stride 65: must be 1 to 64"):
        stream(scorer, "text8", path, 65)
    with pytest.raises(UsageError, match="absent: cannot be read .*give the unpacked file"):
        stream(scorer, "text8", tmp_path / "absent")
    path.write_bytes(b"short")
    with pytest.raises(UsageError, match="5 bytes; give the unpacked file of 100,000,000"):
        stream(scorer, "text8", path)


def test_characters_of_another_tokenizer(tmp_path):
    path = tmp_path / "enwik8"
    path.write_bytes("\u00e9t\u00e9 \u4e2d\u6587 ".encode() * 400)
    scorer = Scorer(random_model(N_CTX, 50257), load_tokenizer("gpt2"))
    found = stream(scorer, "enwik8", path)
    # A character that the cut goes through is left out.
    whole = path.stat().st_size // 20
    size = int(found.scoring.split(": ")[1].split()[0].replace(",", ""))
    assert whole - 3 <= size <= whole
    path.write_bytes(b"\xff\xfe\x00\xfa" * 400)
    with pytest.raises(UsageError, match="not UTF-8 .*only a model of the tokenizer `bytes`"):
        stream(scorer, "enwik8", path)
    path.write_bytes(b"\x80" * 30)  # a test part of one byte
    with pytest.raises(UsageError, match="not UTF-8"):
        stream(scorer, "enwik8", path)
    # A continuation without a token of its own, as the harness would cut it: hell|o is one token.
    assert scorer.pair("He said hell", " ish")[1] == scorer.encode(" ish")
    with pytest.raises(UsageError, match="'o' after 'He said hell': has no token of its own"):
        scorer.pair("He said hell", "o")


def test_clean_and_dirty_questions(tmp_path):
    seen = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    other = "a b c d e f g h i j k l m n o p"
    corpus = write_corpus(tmp_path / "text", ["Before. " + seen.upper() + "!", "short"])
    examples = [
        Example(contexts=(seen,), choices=("a", "b")),
        Example(contexts=(other,), choices=("x",)),
        Example(contexts=("few words",), choices=("x",)),
        # The overlap may run into an answer.
        Example(
            contexts=(seen.rpartition(" twelve")[0],), choices=("twelve thirteen",), between=" "
        ),
    ]
    assert cleanness([examples, examples[:1]], [corpus]) == [[DIRTY, CLEAN, SHORT, DIRTY], [DIRTY]]
    assert cleanness([examples[2:3]], [corpus]) == [[SHORT]]
    # The last token of a record is text, and no END-OF-DOCUMENT.
    prepare(tmp_path / "records", records=[[*seen.encode()]], vocabulary="bytes")
    [[dirty]] = cleanness([[Example(contexts=(seen[4:],), choices=("!",))]], [tmp_path / "records"])
    assert dirty == DIRTY
    prepare(tmp_path / "ids", records=[[1, 2]], vocabulary=3)
    with pytest.raises(UsageError, match="ids: its ids stand for no text; give a corpus that was"):
        cleanness([examples], [tmp_path / "ids"])


def test_sums_that_the_training_data_hold(tmp_path):
    text = "So 12 plus 34 is 46. 98 - 45 = 53, 112 + 7 = 119; 5 + 6 is none, nor 77 plus 123."
    corpus = write_corpus(tmp_path / "text", [text, "12 minus 34"])
    asked = "12 plus 34|98 minus 45|112 plus 7|98 plus 45|12 minus 34|5 plus 6|77 plus 12|2 plus 34"
    examples = [
        Example(contexts=(f"\n\nQ: What is {sum_}?\n\nA:",), choices=(" 1",))
        for sum_ in asked.split("|")
    ]
    expected = [DIRTY, DIRTY, DIRTY, CLEAN, DIRTY, CLEAN, CLEAN, CLEAN]
    assert cleanness([examples], [corpus]) == [expected]


def test_the_paper_at_our_compute(scorer):
    values = (42.7, 54.3, 60.4, 63.6, 67.1, 70.3, 72.5, 76.2)
    for days, value in zip(PF_DAYS, values, strict=True):
        assert at_compute(values, days) == pytest.approx(value)
    assert at_compute(values, math.sqrt(2.6 * 7.42)) == pytest.approx((42.7 + 54.3) / 2)
    assert math.isnan(at_compute(values, 2.5)) and math.isnan(at_compute(values, 4000))
    assert math.isnan(at_compute((1.0,), 10))
    task = arithmetic("two_digit_addition").limited(5)
    result = replace(score_task(scorer, task, TaskOptions()), shots=(41, 44))
    rows = {row.task: row for row in paper_rows([result], 10.0)}
    own = rows["two_digit_addition"]
    assert (own.ours, own.paper["13B"], list(own.paper)) == (0.0, 55.5, list(SIZES))
    assert own.setting == "few-shot" and not own.other_setting and "175B" not in own.unchecked
    assert math.isnan(rows["lambada"].ours) and 54.3 < rows["lambada"].same_compute < 60.4
    assert 6.53 < rows["lambada/perplexity"].same_compute < 9.09
    assert rows["reversed_words"].paper == {"175B": 0.44}
    lines = [" ".join(line.split()) for line in paper_lines(list(rows.values()), 10.0)]
    assert "our compute: 10 PF-days" in lines
    assert "five_digit_addition few-shot" + " -" * 10 + " 9.3" in lines
    [found] = [line for line in lines if line.startswith("lambada zero-shot")]
    known = "42.7? 54.3? 60.4? 63.6 67.1 70.3 72.5 76.2"
    assert found == f"lambada zero-shot - - {rows['lambada'].same_compute:.1f}? {known}"
    assert "is below the paper's 2.6 to 3640" in paper_lines([], 0.1)[1]
    assert "is beyond the paper's" in paper_lines([], 1e5)[1]
    assert "our compute is not known" in paper_lines([], math.nan)[1]


@pytest.mark.parametrize(("shots", "setting", "of_175b"), [(0, "zero", 76.9), (1, "one", 99.6)])
def test_the_paper_in_our_own_setting(scorer, shots, setting, of_175b):
    task = arithmetic("two_digit_addition").limited(3)
    result = replace(score_task(scorer, task, TaskOptions()), shots=(shots, shots))
    passages = [Example(contexts=("once",), choices=("more",), between=" ")] * 3
    lambada = Task(name="lambada", kind="word", examples=tuple(passages), source="here")
    told = replace(score_task(scorer, lambada, TaskOptions()), shots=(shots, shots))
    rows = {row.task: row for row in paper_rows([result, told], 100.0)}
    own = rows["two_digit_addition"]
    assert own.setting == f"{setting}-shot" and own.paper == {"175B": of_175b}
    assert own.unchecked == ["175B"] and not own.other_setting
    # Of LAMBADA only the paper's zero-shot figures are at hand; a perplexity is no share.
    assert rows["lambada"].setting == "zero-shot"
    assert rows["lambada"].other_setting == rows["lambada/perplexity"].other_setting == bool(shots)
    perplexity = told.figures["perplexity"].value
    assert rows["lambada/perplexity"].ours == pytest.approx(perplexity) and perplexity > 1
    [line] = [line for line in paper_lines([rows["lambada"]], 100.0) if line.startswith("lambada")]
    assert ("zero-shot*" in line) == bool(shots) and f" {rows['lambada'].same_compute:.1f} " in line


def test_a_context_that_is_too_short():
    tiny = Scorer(random_model(n_ctx=8), load_tokenizer("bytes"))
    with pytest.raises(UsageError, match="n_ctx 8: a task needs a context of 9 or more tokens"):
        score_task(tiny, arithmetic("two_digit_addition"), TaskOptions())
