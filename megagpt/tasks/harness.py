"""EleutherAI's lm-evaluation-harness on our models (L3; needs the extra megagpt[harness]).

    megagpt evaluate RUN_DIR --harness hellaswag,piqa
    python -m megagpt.tasks.harness run --model megagpt --model_args folder=RUN_DIR --tasks ...

The second is the harness's own command line, which knows our model as well then. It cuts texts into
requests, and Scorer answers them; the contexts and windows are those of its class for transformers.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from megagpt.corpus.progress import Progress
from megagpt.errors import UsageError, ended
from megagpt.use.evaluate import checkpoint_of
from megagpt.use.likelihood import Pair, Scorer
from megagpt.use.loading import load_placed
from megagpt.use.options import TextOptions

# The harness would draw standard errors in processes forked from this one, and what the threads of
# torch hold then may keep those from ending. A thousand draws are one process's work there, too.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
TEXT_TOKENS = 256
"""Tokens of a generated text where a task does not say, as in the harness."""
BOOTSTRAP = 1000
"""Draws for standard errors of figures that have no formula."""


@register_model("megagpt")
class HarnessModel(TemplateLM):
    """A model as the harness asks it."""

    backend = "causal"

    def __init__(
        self,
        folder: str | Path = "",
        scorer: Scorer | None = None,
        checkpoint: int | None = None,
        device: str | None = None,
        dtype: str = "fp32",
        batch_size: int | str = 8,
        **others: Any,
    ) -> None:
        """folder: what `megagpt evaluate` takes, where there is no scorer. batch_size: requests of
        one forward pass. Raises UsageError for what it does not know."""
        super().__init__()
        unknown = [name for name, value in others.items() if value is not None]
        if unknown or not (scorer or folder) or not str(batch_size).isdigit():
            raise UsageError(
                "--model megagpt: takes folder=RUN_DIR, checkpoint=STEP, dtype=fp32|bf16|fp16, a "
                f"device and a batch size that is a number; found {', '.join(unknown) or 'others'}"
            )
        if scorer is None:
            model, encoding, _ = load_placed(checkpoint_of(Path(folder), checkpoint), dtype, device)
            scorer = Scorer(model, encoding, int(batch_size))
        self.scorer = scorer

    @property
    def eot_token_id(self) -> int:
        """END-OF-DOCUMENT."""
        return self.scorer.end

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self.scorer.n_ctx

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Ids of a text; our tokenizers add nothing."""
        return self.scorer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """(nats, whether greedy) of requests ((texts), context ids, continuation ids)."""
        pairs: list[Pair] = [
            (context or [self.scorer.end], after) for _, context, after in requests
        ]
        with Progress("asking for likelihoods", len(pairs), "requests") as progress:
            found = self.scorer.likelihoods(pairs, progress.add)
        answers = [(one.logprob, one.greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts."""
        texts = [request.args[0] for request in requests]
        found = self.scorer.rolling([self.scorer.encode(text) for text in texts])
        for text, answer in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the requests' stops; requests of other settings apart."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(settings, []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            settings = requests[numbers[0]].args[1]
            for number, text in zip(numbers, self._texts(contexts, settings), strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _texts(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        asked: dict[str, Any] = normalize_gen_kwargs(settings, TEXT_TOKENS)
        stops, most = [text for text in asked["until"] if text], asked["max_gen_toks"]
        if not 0 < most < self.scorer.n_ctx:
            raise UsageError(
                f"max_gen_toks {most}: must be 1 to {self.scorer.n_ctx - 1}, so that the model's "
                "context has room for a prompt; set it in the task's generation_kwargs"
            )
        options = TextOptions(
            max_tokens=most,
            temperature=asked.get("temperature") or 0.0,
            top_k=asked.get("top_k") or 0,
            top_p=asked.get("top_p") or 1.0,
            stop_texts=tuple(stops),
        )
        options.check()
        with Progress("making texts", len(contexts), "texts") as progress:
            return self.scorer.texts(
                [self.scorer.encode(context) or [self.scorer.end] for context in contexts],
                [options] * len(contexts),
                lambda number, text: False,
                progress.add,
            )


def run_harness(
    scorer: Scorer, names: Sequence[str], folder: Path | None, shots: int | None, limit: int
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate returns for tasks by name. folder: of further tasks' files.
    shots: None leaves each task its own; limit 0: all examples.

    Raises UsageError for a name that is none.
    """
    manager, unknown = _manager(names, folder)
    if unknown:
        raise UsageError(
            f"--harness {','.join(unknown)}: no task of lm_eval {lm_eval.__version__}; python -m "
            "megagpt.tasks.harness ls tasks lists them, and --include-path adds a folder"
        )
    # Whatever it prints is no result.
    with contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=HarnessModel(scorer=scorer),
            tasks=list(names),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    assert found is not None
    return dict(found)


def _manager(names: Sequence[str], folder: Path | None) -> tuple[TaskManager, list[str]]:
    """(what knows the tasks, names that it does not know)."""
    path = None if folder is None else str(folder)
    # Reading the index of all of the harness's own tasks takes seconds.
    for defaults in (True,) if path is None else (False, True):
        manager = TaskManager(include_path=path, include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            break
    return manager, unknown


def harness_lines(found: dict[str, Any]) -> str:
    """The harness's own table."""
    from lm_eval.utils import make_table

    return str(make_table(found)).rstrip()


def main() -> int:
    """The harness's own command line, with our model among its own."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
