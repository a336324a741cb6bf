"""`megagpt evaluate RUN_DIR --task NAME`: what a trained model can do (L3).

The command is that of megagpt.use.evaluate, which scores corpora, with tasks and EleutherAI's
harness added.
"""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError
from megagpt.use import evaluate as corpora
from megagpt.use.learned import add_tasks, is_share
from megagpt.use.loading import load_placed

if TYPE_CHECKING:
    from megagpt.tasks.catalogue import Wanted
    from megagpt.tasks.scoring import TaskResult
    from megagpt.use.likelihood import Scorer

log = logging.getLogger("megagpt.tasks")


GOES_WITH = {
    "by_document": ("--data",),
    "stride": ("--data", "--task"),
    "max_tokens": ("--data", "--task"),
    "shots": ("--task", "--harness"),
    "limit": ("--task", "--harness"),
    "begin_document": ("--task",),
    "training_data": ("--task",),
    "all_checkpoints": ("--task",),
    "include_path": ("--harness",),
}
"""Options that are for some of what is asked for; with the rest they would do nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    corpora.add_options(parser)
    _add_tasks(parser.add_argument_group("tasks"))
    harness = parser.add_argument_group(
        "EleutherAI's harness, with pip install -e '.[harness]' in megagpt's checkout"
    )
    harness.add_argument(
        "--harness", metavar="TASKS", default="", help="names of its tasks, with commas between"
    )
    harness.add_argument(
        "--include-path", metavar="DIR", type=Path, help="folder with further tasks' files"
    )


def _add_tasks(tasks: "argparse._ArgumentGroup") -> None:
    tasks.add_argument(
        "--task",
        metavar="NAME[=SOURCE]",
        action="append",
        default=[],
        help="arithmetic, scramble=WORDS, lambada, hellaswag, piqa, arc_easy, arc_challenge, "
        "openbookqa, winogrande, storycloze, choice=FILE.jsonl, exact=FILE.jsonl, text8=FILE, "
        "enwik8=FILE, or gpt3[=FOLDER|=hub], all of the paper's beside its eight sizes. SOURCE: "
        "JSON lines, or hf:NAME[/CONFIG][:SPLIT]; repeatable",
    )
    number = partial(tasks.add_argument, metavar="N", type=int, default=0)
    number(
        "--shots",
        metavar="K",
        default=None,
        help="examples before each question, or as many of them as fit into n_ctx (default: 0; "
        "with gpt3 the paper's)",
    )
    number("--limit", help="examples of each task (default: all)")
    number(
        "--seed",
        help="decides the questions made here and the examples before them (default: 0)",
    )
    tasks.add_argument(
        "--lambada",
        choices=["word", "token", "stopword"],
        default="word",
        help="what counts as its answer: the last word (default), the last token, as GPT-2's table "
        "has it, or the last token without stop words",
    )
    tasks.add_argument(
        "--begin-document", action="store_true", help="put END-OF-DOCUMENT before each prompt"
    )
    tasks.add_argument(
        "--training-data",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="prepared corpus in which the 13-grams of each question are looked for; accuracy is "
        "told for clean and dirty questions apart; repeatable",
    )
    tasks.add_argument(
        "--all-checkpoints",
        action="store_true",
        help="every checkpoint of the run, oldest first: the learning curve of the tasks, in "
        "tasks.jsonl and report.html of the run folder",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the figures of each task, or of each corpus."""
    asked = [f"--{name}" for name in ("data", "task", "harness") if getattr(args, name)]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)}: give one of them at a time")
    for key, kinds in GOES_WITH.items():
        if asked and getattr(args, key) not in (None, False, 0, []) and asked[0] not in kinds:
            option = f"--{key.replace('_', '-')}"
            raise UsageError(f"{option}: is for {' and '.join(kinds)}; leave it out")
    if args.harness:
        _harness(args)
    elif args.task:
        _tasks(args)
    else:
        corpora.run(args)


def _tasks(args: argparse.Namespace) -> None:
    from megagpt.tasks.catalogue import wanted

    if args.max_tokens < 0:
        raise UsageError(f"--max-tokens {args.max_tokens}: must be 0 (all) or more")
    found = wanted(args.task, args.seed, bool(args.shots))
    if args.all_checkpoints:
        _learn(args, found)
        return
    folder = corpora.checkpoint_of(args.folder, args.checkpoint)
    _print(args, found, evaluated(args, found, folder))


def _learn(args: argparse.Namespace, found: "Wanted") -> None:
    """The learning curve: every checkpoint of a run, oldest first. What one reaches is in the run's
    folder before the next is read. Raises UsageError for a folder that is no run with any."""
    from megagpt.checkpoint.record import list_checkpoints
    from megagpt.report import PAGE
    from megagpt.report.page import write_page
    from megagpt.report.series import read_run

    run: Path = args.folder
    if args.checkpoint is not None:
        raise UsageError("--all-checkpoints and --checkpoint: give one of them")
    folders = list_checkpoints(run)
    if not folders:
        raise UsageError(f"{run}: no checkpoint here; --all-checkpoints wants a run folder")
    for folder in folders:
        results, facts = evaluated(args, found, folder)
        add_tasks(run, [_point(result, facts) for result in results])
        _print(args, found, (results, facts))
    log.info("%s", write_page([read_run(run)], run / PAGE))


def _point(result: "TaskResult", facts: dict[str, Any]) -> dict[str, Any]:
    """A task's headline at a step."""
    return {
        "step": facts["step"],
        "tokens": facts["tokens"],
        "task": result.task,
        "figure": result.headline,
        **asdict(result.figures[result.headline]),
        "chance": result.chance,
        "examples": result.examples,
        "shots": list(result.shots),
    }


def _harness(args: argparse.Namespace) -> None:
    try:
        from megagpt.tasks.harness import harness_lines, run_harness
    except ImportError as error:
        raise UsageError(
            f"--harness: lm_eval cannot be imported ({error}); pip install -e '.[harness]' in "
            "megagpt's checkout"
        ) from None
    from megagpt.log.metrics import encode
    from megagpt.use.likelihood import Scorer

    folder = corpora.checkpoint_of(args.folder, args.checkpoint)
    model, encoding, _ = load_placed(folder, args.dtype, args.device)
    scorer = Scorer(model, encoding, args.batch_size)
    names = args.harness.split(",")
    found = run_harness(scorer, names, args.include_path, args.shots, args.limit)
    if args.json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        told = {key: found[key] for key in kept if key in found}
        print(encode({"checkpoint": str(folder), **told}).decode(), end="")
    else:
        print(harness_lines(found))


def evaluated(
    args: argparse.Namespace, found: "Wanted", folder: Path
) -> "tuple[list[TaskResult], dict[str, Any]]":
    """(results, facts) of the model in `folder`; its PF-days are NaN where the tokens that it was
    trained on are not known."""
    from megagpt.config.flops import parameters, pf_days
    from megagpt.use.likelihood import Scorer

    model, encoding, facts = load_placed(folder, args.dtype, args.device)
    results = _scored(Scorer(model, encoding, args.batch_size), found, args)
    tokens = facts["tokens"]
    compute = pf_days(parameters(model.config), tokens) if tokens else math.nan
    return results, facts | {"n_ctx": model.config.n_ctx, "pf_days": compute}


def _scored(scorer: "Scorer", found: "Wanted", args: argparse.Namespace) -> "list[TaskResult]":
    """The results of all tasks of one model."""
    from megagpt.tasks.scoring import TaskOptions, score_task
    from megagpt.tasks.stream import stream

    options = TaskOptions(
        shots=args.shots if args.shots is not None or found.paper else 0,
        seed=args.seed,
        begin=args.begin_document,
        lambada=args.lambada,
    )
    results = [score_task(scorer, task.limited(args.limit), options) for task in found.tasks]
    if args.training_data:
        results = _apart(found, results, args)
    most = max(1, args.max_tokens // (args.stride or scorer.n_ctx)) if args.max_tokens else 0
    return results + [stream(scorer, name, path, args.stride, most) for name, path in found.streams]


def _apart(
    found: "Wanted", results: "list[TaskResult]", args: argparse.Namespace
) -> "list[TaskResult]":
    """The results with their accuracy on clean and dirty questions."""
    from megagpt.tasks.overlap import CLEAN, DIRTY, SHORT, cleanness
    from megagpt.tasks.scoring import proportion

    questions = [task.limited(args.limit).asked for task in found.tasks]
    made = []
    for result, kinds in zip(results, cleanness(questions, args.training_data), strict=True):
        parts = {}
        for kind in (CLEAN, DIRTY, SHORT):
            own = [bool(hit) for hit, k in zip(result.correct, kinds, strict=True) if k == kind]
            parts[kind] = (len(own), proportion(own))
        made.append(replace(result, parts=parts))
    return made


# --- what is printed -----------------------------------------------------------------------------


def _print(
    args: argparse.Namespace, found: "Wanted", made: "tuple[list[TaskResult], dict[str, Any]]"
) -> None:
    from megagpt.log.metrics import encode
    from megagpt.tasks.paper import paper_lines, paper_rows
    from megagpt.tasks.scoring import as_record

    results, facts = made
    rows = paper_rows(results, facts["pf_days"]) if found.paper else []
    if args.json:
        told: dict[str, Any] = {
            "checkpoint": str(facts["checkpoint"]),
            "step": facts["step"],
            "trained_tokens": facts["tokens"],
            "pf_days": facts["pf_days"],
            "n_ctx": facts["n_ctx"],
            "dtype": args.dtype,
            "confidence": corpora.CONFIDENCE,
            "tasks": [as_record(result) for result in results],
        }
        if found.paper:
            told |= {"paper": [asdict(row) for row in rows], "missing": found.missing}
        print(encode(told).decode(), end="")
        return
    log.info("{checkpoint}: step {step}, trained on {tokens:,} tokens".format(**facts))
    for result in results:
        print("\n".join(result_lines(result)))
    if found.paper:
        print("\n".join(paper_lines(rows, facts["pf_days"])))
        for name, reason in found.missing.items():
            print(f"without {name}: {reason}")


def result_lines(result: "TaskResult") -> Iterator[str]:
    """A result for people."""
    shots = "-".join(dict.fromkeys(map(str, result.shots)))
    cut = f", {result.cut:,} of them cut on the left" if result.cut else ""
    yield f"{result.task} ({result.source}): {result.examples:,} examples{cut}, K = {shots}"
    yield f"  {result.scoring}"
    for name, one in result.figures.items():
        mark = _quoted_by(name, result)
        yield f"  {name:<20}{_figure(name, one)}{_chance(name, result)}{mark}"
    for kind, (n, one) in result.parts.items():
        yield f"  {kind:<20}{_figure('acc', one)}   {n:,} examples" if n else f"  {kind}: none"


def _quoted_by(name: str, result: "TaskResult") -> str:
    """Who gives this one of several figures."""
    whose = {result.quoted: "EleutherAI's tables", result.headline: "the GPT-3 paper"}
    if result.quoted == result.headline:
        whose = {result.headline: "the GPT-3 paper, EleutherAI's tables"}
    several = len(result.figures) > 2
    return f"   <- {whose[name]}" if several and name in whose else ""


def _figure(name: str, one: corpora.Estimate) -> str:
    scale, unit = (100.0, "%") if is_share(name) else (1.0, "")
    return f"{scale * one.value:.4g}{unit}{one.interval('.4g', scale)}"


def _chance(name: str, result: "TaskResult") -> str:
    """What a guess reaches, and whether the figure says more."""
    if name == "bits_per_character":
        return f"   uniform: {result.chance:.4g}"
    if not is_share(name):
        return ""
    one, told = result.figures[name], f"   chance {100 * result.chance:.3g}%"
    return told + (", within the interval" if one.low <= result.chance <= one.high else "")
