"""docs/reference/commands.md is what the commands' own parsers say.

After a change of an option, `make docs` writes the page anew.
"""

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megagpt import cli, train

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/commands.md"
TEXT = """# Commands: every argument and option

Written from the code by `make docs`; a test compares the two. `COMMAND --help` prints the same.
What the exit code of a command means: [exit-codes.md](exit-codes.md).

Overrides (`section.key=value`) change single keys of a run file for one call; every key is in
[run-file.md](run-file.md).
"""
BASE = "tokenize_corpus.py"
"""The script whose options the others share."""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every command and script, in the order of the page."""
    for name in cli.COMMANDS:
        yield from _with_subcommands(f"megagpt {name}", _choices(cli.parser(name))[name])
    yield "python -m megagpt.train", train.parser()
    scripts = sorted((ROOT / "data_prep").glob("*.py"), key=lambda path: (path.name != BASE, path))
    for script in scripts:
        yield f"python data_prep/{script.name}", _of_script(script)


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _with_subcommands(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = _choices(parser)
    if not inner:
        yield name, parser
    for word, made in inner.items():
        yield from _with_subcommands(f"{name} {word}", made)


class _Found(Exception):
    pass


def _of_script(script: Path) -> argparse.ArgumentParser:
    """The parser that a script's main() would read the command line with."""
    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: object) -> None:
        found.append(self)
        raise _Found

    main = runpy.run_path(str(script), run_name="page")["main"]
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        pytest.raises(_Found),
    ):
        main()
    return found[0]


def page() -> str:
    """The whole page."""
    parts = [TEXT]
    helps = {f"megagpt {name}": text for name, (_, text) in cli.COMMANDS.items()}
    shared: list[str] = []
    for name, parser in parsers():
        about = helps.get(name) or (parser.description or "").split("\n\n")[0]
        rows = [_row(action) for action in parser._actions if _shown(action)]
        parts.append(f"\n## {name}\n{_sentence(about or _help_of(name))}\n")
        if name.endswith(BASE):
            shared = rows
        elif shared and len([row for row in rows if row in shared]) > 5:
            parts.append(f"The options of {BASE}, but for:\n")
            rows = [row for row in rows if row not in shared]
        if rows:
            parts.append(f"\n| | meaning | default |\n|---|---|---|\n{''.join(rows)}")
    return "".join(parts)


def _help_of(name: str) -> str:
    """The help line of a command's command, which its parent has."""
    _, command, *words = name.split()
    parser = cli.parser(command)
    about = ""
    for word in [command, *words]:
        [inner] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        about = next((c.help or "" for c in inner._choices_actions if c.dest == word), "")
        parser = inner.choices[word]
    return about


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:].removesuffix(".") + "."


def _shown(action: argparse.Action) -> bool:
    hidden = isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS
    return not hidden


def _row(action: argparse.Action) -> str:
    how = argparse.HelpFormatter("x")
    if action.option_strings:
        value = ""
        if action.nargs != 0:
            value = f" {how._format_args(action, how._get_default_metavar_for_optional(action))}"
        name = ", ".join(f"`{option}{value}`" for option in action.option_strings)
    else:
        shown = how._format_args(action, how._get_default_metavar_for_positional(action))
        name = f"`{shown}`"
    meaning = " ".join(how._expand_help(action).split()) if action.help else ""
    default = _default(action)
    if default:
        meaning = re.sub(r" ?\(default: [^()]*\)$|^default: \S+$", "", meaning)
    cells = (name, meaning, default)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _default(action: argparse.Action) -> str:
    value = action.default
    if action.required and action.option_strings:
        return "required"
    if value in (None, False, "", argparse.SUPPRESS) or value == () or value == []:
        return ""
    if value is True and action.nargs == 0:
        return ""
    return f"`{value}`"


def test_every_argument_has_a_meaning():
    silent = [
        f"{name}: {action.dest}"
        for name, parser in parsers()
        for action in parser._actions
        if _shown(action) and not (action.help or "").strip()
    ]
    assert not silent


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
