"""README and docs speak of what is there: links, files, make targets, commands that parse."""

import re
import shlex
from pathlib import Path

import pytest

from megagpt import cli, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines of the page's code blocks that look like one of our commands."""
    # Opening and closing fences in turn, so that no text between two blocks is taken for one.
    fenced = re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"))
    blocks = [text for language, text in fenced if language in ("", "sh", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    starts = ("megagpt ", "python ", "deepspeed ", "make ", "torchrun ", "python3 ")
    return [line.split(" #")[0].strip() for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    prose = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    heads = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"(?m)^#+ (.*)$", prose)
    ]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_into_pages_lead_to_a_heading(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert anchor in anchors(page.parent / link if link else page), (
                f"{page}: {link}#{anchor}"
            )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name != "benchmarks"], ids=lambda p: p.name
)
def test_every_page_leads_on(page):
    assert re.search(r"\]\([^)]*\.md", page.read_text(encoding="utf-8")), (
        f"{page}: no link to a page"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    for line in commands(page):
        words = [w for w in shlex.split(line) if w not in ("|", "&&")]
        if words[0] == "make":
            target = words[1]
            assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), line
        elif words[0] == "megagpt":
            if words[1] not in ("RUN_DIR", "COMMAND", "--help", "--version"):
                cli.parser(words[1]).parse_args(without_redirect(words[1:]))
        elif "megagpt.train" in words:
            train.parser().parse_args(words[words.index("megagpt.train") + 1 :])
        elif words[0].startswith("python") and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), line


def without_redirect(words: list[str]) -> list[str]:
    """The words before a shell's redirection."""
    ends = [i for i, word in enumerate(words) if word.startswith((">", "2>"))]
    return words[: ends[0]] if ends else words


def test_the_readmes_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 9


def test_what_the_notes_ask_is_where_the_page_says():
    page = (ROOT / "docs/reference/models.md").read_text(encoding="utf-8")
    section = page.partition("## What the notes ask, where it is")[2].partition("\n## ")[0]
    paths = re.findall(r"`((?:megagpt|data_prep|examples|launch)/[\w/.-]+)", section)
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists(), path
    for function, path in re.findall(r"`(\w+)` in `([\w/.]+)`", section):
        assert f"def {function}(" in (ROOT / path).read_text(), function


def test_the_tests_that_pages_name_are_there():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40
    assert not {name for name in named if f"def {name}(" not in code}
    paths = set(re.findall(r"[`/ ](?:tests/)?((?:[a-z_]+/)?test_\w+\.py)", text))
    assert len(paths) > 30
    assert not {name for name in paths if not any(str(f).endswith(f"/{name}") for f in files)}
