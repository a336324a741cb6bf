"""Tasks of files that lie here, of every kind of request that EleutherAI's harness makes."""

import json
import math
from pathlib import Path
from typing import Any

from megagpt.config.presets import ModelConfig
from megagpt.hub.exporting import export_model
from megagpt.use.likelihood import Scorer
from megagpt.use.loading import load_placed
from megagpt.use.options import TextOptions
from tests.lib.corpus import sentences
from tests.lib.weights import weights_folder

TASKS = ("local_words", "local_choice", "local_text", "local_answer")
FILES = {
    "words": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\n"
    "doc_to_target: '{{completion}}'\ntarget_delimiter: ''\n",
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
    "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{context}}'\n"
    "doc_to_target: '{{completion}}'\ngeneration_kwargs: {until: [' '], max_gen_toks: 1}\n",
}
METRICS = {
    "words": ("acc", "perplexity"),
    "choice": ("acc", "acc_norm", "acc_bytes"),
    "text": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "answer": ("exact_match",),
}


def make_tasks(root: Path, n_ctx: int, seed: int) -> None:
    """Weights in `model`, their export in `export`, and the tasks in `tasks`."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=32, n_ctx=n_ctx, vocab_size=257)
    # Of some seeds the likeliest next byte depends on the context, and often is a letter.
    weights_folder(root / "model", config, "bytes", seed=seed)
    export_model(root / "model", root / "export")
    texts = sentences(40, 1)
    rows = [
        {
            "context": context,
            # Every other answer is what the model says.
            "completion": letter if n % 2 else "q",
            "choices": [texts[4 * n + 2][:18], texts[4 * n + 3][:40].strip(), f"\u00e9{n}"],
            "gold": n % 3,
            "text": " ".join(texts[4 * n : 4 * n + 2 + n % 3]),
        }
        for n, (context, letter) in enumerate(_said(root / "model")[:10])
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, lines in FILES.items():
        metrics = "".join(f"  - metric: {metric}\n" for metric in METRICS[name])
        (root / "tasks").mkdir(exist_ok=True)
        (root / "tasks" / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    validation: {root / 'rows.jsonl'}\nvalidation_split: validation\n"
            f"test_split: null\n{lines}metric_list:\n{metrics}metadata: {{version: 1.0}}\n"
        )


def _said(model: Path) -> list[tuple[str, str]]:
    """Contexts, and the letter that the model says after each."""
    scorer = Scorer(*load_placed(model, "fp32", "cpu")[:2], 8)
    contexts = [f"\n{text[:30].strip()} {n} =" for n, text in enumerate(sentences(40, 1))]
    one = [TextOptions(temperature=0.0, max_tokens=1)] * len(contexts)
    letters = scorer.texts([scorer.encode(c) for c in contexts], one, lambda n, text: False)
    found = zip(contexts, letters, strict=True)
    return [(context, letter) for context, letter in found if letter.isalpha() and letter.isascii()]


def harness_figures(results: dict[str, Any]) -> dict[str, float]:
    """Every figure that is no standard error and no text; of a perplexity its logarithm, which is
    what rounds: at 33 nats an error of 1e-8 in them is one of 3e-7 in the perplexity."""
    return {
        f"{task} {name}": math.log(value) if "perplexity" in name else value
        for task in TASKS
        for name, value in results.get(task, {}).items()
        if isinstance(value, float) and "stderr" not in name
    }


def asked_by_the_harness(root: Path, kind: str, **arguments: Any) -> dict[str, float]:
    """What the harness says of all tasks through a class of its own, made with `arguments`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=list(TASKS),
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(root / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    return harness_figures(found["results"])


def by_transformers(root: Path) -> dict[str, float]:
    """The same of the exported model by its class for transformers."""
    return asked_by_the_harness(root, "hf", pretrained=str(root / "export"), dtype="float32")
