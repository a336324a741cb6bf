"""Names of tasks, as the command takes them, to tasks.

NAME[=SOURCE]: `arithmetic` and `scramble` are groups; SOURCE is a file, a folder or an address of
`datasets`. A task of arithmetic or scrambling may come from one of OpenAI's own files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megagpt.errors import UsageError
from megagpt.tasks import arithmetic as sums
from megagpt.tasks import scramble as words
from megagpt.tasks.examples import Task
from megagpt.tasks.overlap import frequent_words
from megagpt.tasks.sets import SETS, task_of
from megagpt.tasks.stream import NAMES

GPT3 = "gpt3"
ARITHMETIC, SCRAMBLE = "arithmetic", "scramble"
PAPER_SETS = ("lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
"""Sets of the comparison with the paper that `datasets` finds; storycloze needs a file."""
FILES = (".jsonl", ".json", ".jsonl.gz")
"""Endings of files of questions, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a name asks for."""

    tasks: list[Task]
    streams: list[tuple[str, Path]]
    """(name, file) of one long text."""
    missing: dict[str, str]
    """Tasks of the paper that are not there, with the reason."""
    paper: bool
    """Whether all of the paper's are asked for, and shown beside it."""


def wanted(specs: Sequence[str], seed: int, gapped: bool) -> Wanted:
    """All tasks of the names, in order. gapped: LAMBADA with examples before it.

    Raises UsageError for an unknown name and a source that cannot be read.
    """
    found = Wanted([], [], {}, any(spec.partition("=")[0] == GPT3 for spec in specs))
    for spec in specs:
        name, _, source = spec.partition("=")
        if name == GPT3:
            _add_paper(found, source, seed)
        elif name in NAMES:
            if not source:
                raise UsageError(f"--task {name}: give the unpacked file, as --task {name}=FILE")
            found.streams.append((name, Path(source)))
        else:
            found.tasks.extend(_named(name, source, seed, gapped))
    names = [task.name for task in found.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--task: {', '.join(sorted(twice))} is asked for twice; name each once")
    return found


def _named(name: str, source: str, seed: int, gapped: bool) -> list[Task]:
    """The tasks of one name."""
    name = sums.LABELS.get(name, words.LABELS.get(name, name))
    if name == ARITHMETIC:
        if source:
            raise UsageError("--task arithmetic: is made here and takes no file; name one task")
        return [sums.arithmetic(one, seed) for one in sums.PAPER]
    if name in sums.KINDS and not source:
        return [sums.arithmetic(name, seed)]
    if name in sums.KINDS:
        return [replace(task_of(name, source, form="exact"), paper_shots=sums.SHOTS)]
    if name == SCRAMBLE or name in words.KINDS:
        return _scrambled(name, source, seed)
    if name in SETS:
        return [task_of(name, source, gapped and name == "lambada")]
    raise UsageError(
        f"--task {name}: unknown; there are {GPT3}, {ARITHMETIC}, {SCRAMBLE}, "
        f"{', '.join((*SETS, *NAMES))}, and each task of the two groups by its name, as 2D+ or CL"
    )


def _scrambled(name: str, source: str, seed: int) -> list[Task]:
    """One task of scrambled words, or all five."""
    if source.endswith(FILES) and name in words.KINDS:
        task = task_of(name, source, form="exact")
        return [replace(task, instruction=words.INSTRUCTION, paper_shots=words.SHOTS)]
    path = Path(source or words.SYSTEM)
    if not path.exists():
        raise UsageError(
            f"--task {name}: no list of words at {path}; give one, as --task {name}=WORDS.txt, or "
            "a prepared corpus, whose own words are counted"
        )
    listed = frequent_words(path) if path.is_dir() else words.read_words(path)
    names = list(words.KINDS) if name == SCRAMBLE else [name]
    return [words.scramble(one, listed, str(path), seed) for one in names]


def _add_paper(found: Wanted, source: str, seed: int) -> None:
    """The tasks of the paper that we can make or find: with a folder its files, with `hub` what
    `datasets` finds. What is not there is told, and no reason to stop."""
    found.tasks.extend(sums.arithmetic(one, seed) for one in sums.PAPER)
    folder = Path(source) if source not in ("", "hub") else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--task gpt3={source}: no folder; give one with lambada.jsonl and others")
    listed = folder / "words.txt" if folder is not None else words.SYSTEM
    _try(found, SCRAMBLE, lambda: _scrambled(SCRAMBLE, str(listed), seed))
    for name in (*PAPER_SETS, "storycloze"):
        file = None if folder is None else _file_of(folder, name)
        if file is not None or source == "hub":
            _try(found, name, partial(_named, name, str(file or ""), seed, False))
        else:
            reason = f"no {name}.jsonl in {folder}" if folder else "no file of it given"
            found.missing[name] = reason


def _try(found: Wanted, name: str, make: Callable[[], list[Task]]) -> None:
    try:
        found.tasks.extend(make())
    except UsageError as error:
        found.missing[name] = str(error)


def _file_of(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}{ending}" for ending in FILES)
    return next((file for file in files if file.is_file()), None)
