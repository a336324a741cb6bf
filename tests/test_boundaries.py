"""The rules of the packages: who may import whom, how large things are, and what stays light."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.lib.structure import code_lines, edges, imports, package_of

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    ("errors", "files", "config", "plan"),
    ("tokenizer", "corpus", "order", "model", "log"),
    ("cluster", "engine", "checkpoint", "run", "health"),
    (
        "check",
        "hub",
        "report",
        "start",
        "submit",
        "use",
        "tasks",
        "serve",
        "loop",
        "train",
        "doctor",
        "cli",
        "__main__",
    ),
)
"""Packages of L0 to L3; those of one level may import each other, but not in a circle."""
FORBIDDEN = (
    ("torch", "tiktoken", "deepspeed", "transformers", "datasets", "safetensors"),
    ("deepspeed", "transformers"),
    ("transformers",),
    ("deepspeed", "transformers"),
)
"""Third parties that a level may not import."""
DEEPSPEED = ("cluster", "engine")
"""The packages that may: engine trains with it, cluster joins its process group."""
HUB = ("transformers",)
"""What hub may import, in the process that checks an export."""
LEAVES = ("errors", "files")
"""Packages that everyone may use; they do not count as imports between packages."""
LARGEST = {"file": 400, "function": 60, "imports": 7, "core": 15_536, "around": 8_870, "top": 26}
"""Lines of a file and a function, imports of a package, lines of code of what trains and of what
stands around it, entries of megagpt/. Lower these as packages become simpler."""
AROUND = ("plan", "hub", "use", "tasks", "serve", "start", "submit")
"""Packages that plan a run, begin it, or use what it trained."""
SAME_NAME = {"__init__", "command"}
"""Modules that may stand in several packages."""

PACKAGE = sorted(ROOT.glob("megagpt/**/*.py"))
SCRIPTS = sorted(ROOT.glob("data_prep/*.py"))


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=named)
def test_lower_levels_never_import_higher_ones(path):
    own = package_of(path, ROOT / "megagpt")
    if own == "__init__":
        assert not imports(path)
        return
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "megagpt":
            other = rest.split(".")[0] or "errors"
            assert level(other) <= level(own), f"{own} imports {module}"
        else:
            allowed = HUB if own == "hub" else ()
            assert top in allowed or top not in FORBIDDEN[level(own)], f"{own} imports {module}"
            assert top != "deepspeed" or own in DEEPSPEED, f"{own} imports {module}"


def test_packages_do_not_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for importer, imported in edges(ROOT / "megagpt"):
        below.setdefault(importer, set()).add(imported)
    done: set[str] = set()
    names = {name for names in LEVELS for name in names}
    while free := {n for n in names - done if below.get(n, set()) <= done}:
        done |= free
    assert not names - done, f"in circles: { ({n: below[n] - done for n in names - done}) }"


def test_no_package_imports_too_many_others():
    counts = Counter(a for a, b in edges(ROOT / "megagpt") if b not in LEAVES)
    most = {name: count for name, count in counts.items() if count > LARGEST["imports"]}
    assert most.keys() <= {"train", "loop"}, most


def test_every_level_names_packages_that_exist():
    there = {package_of(path, ROOT / "megagpt") for path in PACKAGE} - {"__init__"}
    assert there == {name for names in LEVELS for name in names}
    assert len(there - {"__main__"}) <= LARGEST["top"]


def test_names_are_unique():
    files = Counter(p.stem for p in PACKAGE if p.stem not in SAME_NAME)
    assert not {name for name, count in files.items() if count > 1}
    classes = Counter(
        node.name
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not {name for name, count in classes.items() if count > 1}


def test_the_package_stays_small():
    lines = {"core": 0, "around": 0}
    for path in PACKAGE:
        kind = "around" if package_of(path, ROOT / "megagpt") in AROUND else "core"
        lines[kind] += code_lines(path.read_text())
    assert lines["core"] <= LARGEST["core"] and lines["around"] <= LARGEST["around"], lines


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=named)
def test_no_file_or_function_is_too_long_to_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LARGEST["file"]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LARGEST["function"], node.name


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_scripts_of_data_prep_know_only_preparation(path):
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "megagpt":
            assert rest.split(".")[0] in ("corpus", "tokenizer", "errors", "files"), module
        assert top not in ("torch", "deepspeed"), module


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import megagpt", "torch numpy deepspeed tiktoken rich matplotlib"),
        ("main(['--help'])", "torch numpy deepspeed tiktoken rich matplotlib"),
        ("main(['plan', '--help'])", "torch deepspeed tiktoken rich matplotlib"),
        ("main(['plan', RUN])", "torch deepspeed tiktoken rich matplotlib"),
    ],
)
def test_light_commands_import_nothing_heavy(code, heavy, tmp_path):
    (tmp_path / "run.toml").write_text(
        'model = "gpt3-175b"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n'
    )
    script = f"""
import sys
RUN = {str(tmp_path / "run.toml")!r}
def main(argv):
    from megagpt.cli import main
    try:
        assert main(argv) == 0
    except SystemExit as end:
        assert end.code == 0
{code}
print([name for name in {heavy!r}.split() if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
