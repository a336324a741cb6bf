"""docs/reference/environment.md names every environment variable that the code reads or sets."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
OTHER = {
    "RUN_DIR": "an argument",
    "SPLIT_RULE": "a name of Python",
    "FIRST_COMPLETED": "a name of Python",
    "END_OF_DOCUMENT": "a name of Python",
    "COMP_LINE": "bash tells argcomplete",
    "TRANSFORMERS_VERBOSITY": "set for a process that checks an export",
    "HF_DATASETS_OFFLINE": "set for a process that checks an export",
}
"""What looks like a variable in the sources, and is none that a user could set."""


def named() -> set[str]:
    """The variables of the page; a name that ends with _* stands for all that begin so."""
    return set(re.findall(r"`([A-Z][A-Z0-9_]*)(?:\*)?`", PAGE)) | set(
        re.findall(r"`([A-Z][A-Z0-9_]*_)\*`", PAGE)
    )


def test_every_variable_of_the_package_is_on_the_page():
    missing = {}
    for path in (ROOT / "megagpt").rglob("*.py"):
        for name in re.findall(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]+)"', path.read_text(encoding="utf-8")):
            if name not in named() | set(OTHER):
                missing[name] = path.name
    assert not missing


def test_every_parameter_of_the_scripts_is_on_the_page():
    given = set()
    for path in [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")]:
        # A script's parameters have a default: NAME=${NAME:-...}.
        given |= set(re.findall(r"(?m)^ *(?:export )?([A-Z][A-Z_]+)=\$\{\1:-", path.read_text()))
    assert len(given) >= 8 and not given - named()


def test_the_page_names_no_other_variables():
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for pattern in ("megagpt/**/*.py", "data_prep/*.py", "launch/**/*.s*")
        for path in ROOT.glob(pattern)
    )
    assert not {name for name in named() if name not in sources}
