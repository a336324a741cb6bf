"""Counts what the package is made of: python tests/lib/structure.py [FOLDER]

Lines of code are those that hold a token of the program: docstrings (attributes' among them),
comments and blank lines are left out. Packages are the entries of megagpt/, without the two
dunder files; an import between packages is one pair (importer, imported).
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
IGNORED |= {tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of code of one file."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in IGNORED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def package_of(path: Path, root: Path) -> str:
    """The entry of megagpt/ that a file belongs to: corpus of megagpt/corpus/pipe.py."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            if node.module == "megagpt":
                # `from megagpt import config` names a package; `__version__` is none.
                found |= {f"megagpt.{a.name}" for a in node.names if a.name[0] != "_"}
            else:
                found.add(node.module)
    return found


def edges(root: Path) -> set[tuple[str, str]]:
    """(importer, imported) for every pair of packages of megagpt."""
    pairs = set()
    for path in root.rglob("*.py"):
        own = package_of(path, root)
        for module in imports(path):
            top, _, rest = module.partition(".")
            if top == "megagpt" and rest and rest.split(".")[0] != own:
                pairs.add((own, rest.split(".")[0]))
    return pairs


def main(root: Path) -> None:
    """Prints the counts of a package's folder."""
    code, files = Counter[str](), Counter[str]()
    for path in sorted(root.rglob("*.py")):
        name = package_of(path, root)
        code[name] += code_lines(path.read_text(encoding="utf-8"))
        files[name] += 1
    for name, lines in code.most_common():
        print(f"{lines:6,} lines of code in {files[name]:2} files  {name}")
    entries = [name for name in code if not name.startswith("__")]
    print(f"{sum(code.values()):6,} lines of code, {len(entries)} packages and files at the top,")
    print(f"{len(edges(root)):6,} imports between them")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "megagpt"))
