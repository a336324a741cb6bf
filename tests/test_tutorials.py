"""Tutorials and README do what they say: their commands run as printed, from an empty folder, on a
smaller text and for a shorter time; docs/how-to/python.md's code runs on what they made."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib.corpus import sentences
from tests.lib.distributed import ROOT, environment, python
from tests.start.test_run_files import archive
from tests.test_docs import commands

TUTORIAL = ROOT / "docs/tutorials/first-model.md"
WRONG = 3
"""Commands of the tutorial that are mistakes, on purpose: the last ones."""


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"))


def execute(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A command of a page, in a folder that is not the checkout."""
    words = shlex.split(line)
    if words[0] == "python":
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    else:
        assert words[0] == "megagpt"
        words = [sys.executable, "-m", *words]
    return subprocess.run(
        [*words, *more], cwd=folder, env=environment(), capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """The folder where the tutorial was followed, and what each command said."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "my.txt").write_text("".join(sentences(3000, 1)))
    done = []
    for line in [line for line in commands(TUTORIAL) if not line.startswith("make")]:
        short = {"init": ["--minutes", "0.06"], "generate": ["--max-tokens", "20"]}
        more = short.get(shlex.split(line)[1], [])
        done.append((line, execute(line, folder, *more)))
    return folder, done


def test_the_tutorial_runs_as_printed(tutorial):
    folder, done = tutorial
    assert len(done) == 5 + WRONG
    for line, result in done[:-WRONG]:
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert (folder / "runs/mine/report.html").is_file()


def test_the_tutorials_mistakes_get_the_answers_that_it_prints(tutorial):
    answers = blocks(TUTORIAL, "text")[-WRONG:]
    for (line, result), answer in zip(tutorial[1][-WRONG:], answers, strict=True):
        assert result.returncode == 2, line
        assert answer.strip() in result.stderr


def test_the_code_for_python_runs(tutorial):
    folder = tutorial[0]
    code = "\n".join(blocks(ROOT / "docs/how-to/python.md", "python"))
    done = python(code, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "data/again: 1 documents" in done.stdout and "steps, validation" in done.stdout


def doors() -> list[list[str]]:
    """The commands of README's three doors."""
    text = (ROOT / "README.md").read_text().split("## Three doors")[1].split("\n## ")[0]
    return [found.strip().splitlines() for found in re.findall(r"(?s)```\n(.*?)```", text)]


def test_each_door_has_four_commands():
    assert [len(lines) for lines in doors()] == [4, 4, 4]


def test_readmes_laptop_door_runs_as_printed(tmp_path):
    """Shakespeare, from a small archive, for a few steps."""
    short = {
        "data_prep/shakespeare.py": ["--file", str(archive(tmp_path / "x.tar.gz"))],
        "train": ["schedule.total_tokens=8192", "schedule.warmup_tokens=0", "evaluate.batches=1"],
        "generate": ["--max-tokens", "5"],
    }
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for line in doors()[0]:
        result = execute(line, tmp_path, *short.get(shlex.split(line)[1], []))
        assert result.returncode == 0, f"{line}: {result.stderr}"


@pytest.mark.parametrize("door", [1, 2])
def test_readmes_other_doors_need_only_their_data(door, tmp_path):
    """Without data and GPUs the checks say so; nothing else is wrong."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    check, start = doors()[door][1:3]
    result = execute(check, tmp_path)
    if door == 1:
        assert result.returncode == 0 and "on 8 h100" in result.stdout
    else:
        assert [line for line in result.stdout.splitlines() if "FAIL" in line] == [
            line for line in result.stdout.splitlines() if "FAIL  shards" in line
        ]
    result = execute(start, tmp_path)
    assert result.returncode == 2
    assert re.search(r"data/\S+ does not exist|no prepared corpus there", result.stderr)


def test_readmes_run_file_is_one(tmp_path):
    from megagpt.config import parse_run
    from megagpt.plan.sanity import oddities

    [text] = blocks(ROOT / "README.md", "toml")
    config = parse_run(text)
    assert len([line for line in text.splitlines() if line]) <= 12
    assert not list(oddities(config))
