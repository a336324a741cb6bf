"""Tutorials and README do what they say: their commands run as printed, from an empty folder, on a
smaller text and for a shorter time; docs/how-to/python.md's code runs on what they made."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.log import read_metrics
from megagpt.log.metrics import _NUMBERS
from megagpt.log.tags import _GROUP
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


def test_the_reference_names_every_figure_of_the_run(tutorial):
    page = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:event: )?([\w.]+)`", page))
    lines = list(read_metrics(tutorial[0] / "runs/mine"))
    assert {"loss" in line for line in lines} == {True, False}
    found = {name for line in lines for name in line} | set(_GROUP) | set(_NUMBERS)
    found -= {"checkpoint_stall_s"}  # the tag of an event's stall_s
    # Those of a layer are named by figure: norms.parameter.LAYER.
    layers = {name.split(".")[0] for name in named}
    assert not found - named - layers - {"perplexity", "validation_perplexity"}
    assert {line["event"] for line in lines if "event" in line} <= named


def test_the_reference_names_every_file_of_the_run(tutorial):
    page = (ROOT / "docs/reference/files-of-a-run.md").read_text(encoding="utf-8")
    names = [name for row in re.findall(r"(?m)^\| (`.*?`) (?:\.\.\. )?\|", page)
             for name in re.findall("`(.+?)`", row)]  # fmt: skip
    run = tutorial[0] / "runs/mine"
    for path in sorted(run.rglob("*")):
        place = path.relative_to(run)
        known = [name.strip("/").rpartition("/")[2] for name in names]
        patterns = [re.sub(r"\d+", r"\\d+", re.escape(name)) for name in known]
        folders = [name.rstrip("/") for name in names if name.endswith("/")]
        assert any(re.fullmatch(one, path.name) for one in patterns) or any(
            place.parts[0] == folder for folder in folders if folder != "checkpoints"
        ), place


def test_the_reference_names_every_key_of_the_manifests(tutorial):
    for page, file in (
        ("files-of-a-run", next(tutorial[0].glob("runs/mine/checkpoints/step_*/manifest.json"))),
        ("data-formats", tutorial[0] / "data/mine/manifest.json"),
    ):
        text = (ROOT / f"docs/reference/{page}.md").read_text(encoding="utf-8")
        rows = re.findall(r"(?m)^\| (`.*?`) \|", text.split("key of manifest.json")[1])
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert not set(json.loads(file.read_text())) - named, page


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
        # How much space is left is the machine's matter.
        found = {line.split()[1] for line in result.stdout.splitlines() if "FAIL" in line}
        assert found - {"disk"} == {"shards"}
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
