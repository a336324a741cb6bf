"""Who may import whom: lower rooms never import higher ones, and light commands stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("errors", "files", "config", "plan"),
    ("tokenizer", "corpus", "order", "model", "log"),
    ("cluster", "engine", "checkpoint", "run", "health"),
)
"""Rooms of L0, L1 and L2; every other one is an entry room, L3."""
FORBIDDEN = (
    ("torch", "tiktoken", "deepspeed", "transformers", "datasets", "safetensors"),
    ("deepspeed", "transformers"),
    (),
    ("deepspeed",),
)
"""Third parties that a layer may not import: deepspeed belongs to L2 alone."""
ENTRIES_OF_ENTRIES = {
    ("__main__", "cli"),
    ("doctor", "check"),
    ("loop", "use"),
    ("train", "loop"),
}
"""Imports between entry rooms that are meant."""
LARGEST_LINES = 400

PACKAGE = sorted(ROOT.glob("megagpt/**/*.py"))
SCRIPTS = sorted(ROOT.glob("data_prep/*.py"))


def room(module: str) -> str:
    """config of megagpt.config, data of megagpt.order.windows."""
    return module.split(".")[1] if "." in module else ""


def layer(name: str) -> int:
    return next((i for i, rooms in enumerate(LAYERS) if name in rooms), 3)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            if node.module == "megagpt":
                # `from megagpt import config` names the room; `__version__` is no room.
                yield from (f"megagpt.{a.name}" for a in node.names if a.name[0] != "_")
            else:
                yield node.module


def parts(path: Path) -> tuple[str, int]:
    name = path.relative_to(ROOT / "megagpt").parts[0].removesuffix(".py")
    return name, -1 if name == "__init__" else layer(name)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_rooms_never_import_higher_ones(path):
    own, height = parts(path)
    for module in imports(path):
        top = module.split(".")[0]
        if top == "megagpt":
            other = room(module)
            assert layer(other) <= height, f"L{height} imports {module}"
            if height == 3 and layer(other) == 3 and other != own:
                assert (own, other) in ENTRIES_OF_ENTRIES, f"{own} imports {module}"
        else:
            assert top not in FORBIDDEN[height], f"L{height} imports {module}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_of_data_prep_know_only_the_data_rooms(path):
    for module in imports(path):
        if module.split(".")[0] == "megagpt":
            assert room(module) in ("corpus", "tokenizer", "errors"), module
        assert module.split(".")[0] not in ("torch", "deepspeed"), module


def test_the_layers_name_rooms_that_exist():
    there = {path.stem if path.is_file() else path.name for path in ROOT.glob("megagpt/*")}
    missing = {name for rooms in LAYERS for name in rooms} - there
    assert not missing


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text().splitlines()) <= LARGEST_LINES


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
