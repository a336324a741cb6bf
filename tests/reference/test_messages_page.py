"""docs/reference/messages.md has every message of the sources, and docs/how-to/troubleshooting.md
quotes no other.

After a change of a message, `make docs` writes the first page anew.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megagpt import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/messages.md"
HELP = ROOT / "docs/how-to/troubleshooting.md"
TEXT = """# Messages: every error and warning

Written from the code by `make docs`; a test compares the two. Look for a few words of your message;
`...` stands for a name or a number. A message names the file, key or value, the rule that it breaks
and the remedy. Where one sentence is too short for that, see
[troubleshooting.md](../how-to/troubleshooting.md).

The number is the command's [exit code](exit-codes.md). Without a number a message is a warning or a
refusal of the HTTP server, or a line within another message.
"""
ABOUT = {
    "": "The command line and files",
    "check": "`doctor`, `parity`, `verify-resume`",
    "checkpoint": "Checkpoints and consolidated weights",
    "cluster": "Several ranks and hosts",
    "config": "Run files",
    "corpus": "Preparing and checking corpora",
    "data_prep": "Scripts of data_prep/",
    "engine": "Training on this device",
    "health": "The health of a training",
    "hub": "`import` and `export`",
    "log": "A run's record",
    "model": "The model",
    "order": "Reading corpora",
    "plan": "`plan`, layouts",
    "report": "`report` and `watch`",
    "run": "A run's folder and inputs",
    "serve": "`serve`",
    "start": "`init` and `train`",
    "submit": "`launch`",
    "tasks": "`evaluate --task` and `--harness`",
    "tokenizer": "Tokenizers",
    "use": "`generate`, `chat`, `evaluate`",
}
LOGGED = re.compile(r"^(log|logger|warnings)\.(warning|error|warn)$")


@cache
def codes() -> dict[str, int]:
    """Exit code of every error class of the package, by the class's name."""
    found = {}
    for path in (ROOT / "megagpt").rglob("*.py"):
        names = re.findall(r"(?m)^class (\w+)\(", path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in names if "Error)" in path.read_text(encoding="utf-8") else []:
            made = getattr(importlib.import_module(module), name, None)
            if inspect.isclass(made) and issubclass(made, errors.MegagptError):
                found[name] = made.exit_code
    return found


def messages() -> Iterator[tuple[str, str, str]]:
    """(package, message with ... for what varies, exit code or "") of every raise and warning."""
    for path in sorted([*ROOT.glob("megagpt/**/*.py"), *ROOT.glob("data_prep/*.py")]):
        parts = path.relative_to(ROOT).parts
        package = parts[0] if parts[0] == "data_prep" else parts[1] if len(parts) > 2 else ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for kind, told in _of(node):
                if re.search(r"\w{3}", told.replace("...", "")):
                    yield package, told, str(codes().get(kind, ""))


def _of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(error's class or "", message) of a raise, of a call that logs a warning or an error."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call) or not call.args:
        return
    if isinstance(node, ast.Raise) or LOGGED.match(ast.unparse(call.func)):
        texts = [_text(argument) for argument in call.args]
        yield ast.unparse(call.func), max(texts, key=len)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        words = re.sub(r"%[-+.0-9]*[srdgf]", "...", node.value)
    elif isinstance(node, ast.JoinedStr):
        words = "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        words = _text(node.left) + _text(node.right)
    else:
        words = "..."
    return re.sub(r"\.{4,}", "...", " ".join(words.replace("%%", "%").split()))


def page() -> str:
    """The whole page."""
    parts, found = [TEXT], sorted(set(messages()))
    for package in sorted({package for package, _, _ in found}):
        parts.append(f"\n## {ABOUT.get(package, package)}\n")
        for _, told, code in (one for one in found if one[0] == package):
            parts.append(f"- {f'{code}: ' * bool(code)}`` {told} ``\n")
    return "".join(parts)


@cache
def everything() -> str:
    """All text of the sources, with breaks between literals closed and what varies as {}."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("megagpt/**/*.py"))
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = [_text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    return "\n".join(found)


def quoted() -> list[str]:
    """The messages that troubleshooting.md quotes: its rows' first cells, in backquotes."""
    text = HELP.read_text(encoding="utf-8")
    return [
        m for row in re.findall(r"(?m)^\| (`.+?`) \|", text) for m in re.findall("`(.+?)`", row)
    ]


def test_troubleshooting_quotes_what_is_said():
    assert len(quoted()) > 20
    for told in quoted():
        pieces = [piece.strip() for piece in told.split("...") if piece.strip()]
        assert all(piece in everything() for piece in pieces), told


def test_the_walk_finds_messages_of_each_kind():
    found = {told: code for _, told, code in messages()}
    assert len(found) > 380
    assert found["...: not empty; give a folder that does not exist yet"] == "2"
    assert found["...; repair the input, or run without --strict to leave it out"] == "3"
    assert found["step ..., not saved: ..."] == "4"
    assert found["damaged checkpoint: ..."] == ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
