"""The one reader of hostfiles: HOST slots=N on each line (L0, stdlib only).

python -m megagpt.cluster.hostfile FILE      what it says in its plainest form, for deepspeed
"""

import re
import sys
from pathlib import Path

from megagpt.errors import EXIT_OK, UsageError, ended


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in the file's order. Tabs, blanks before a line, comments behind it, a BOM and
    the line ends of Windows mean nothing.

    Raises UsageError with every bad line: deepspeed would name one, or train on this host alone
    when the file is missing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(
            f"{path}: cannot read the hostfile ({why}); give a file with lines such as "
            "`host-a slots=8`"
        ) from None
    slots: dict[str, int] = {}
    names: set[str] = set()
    problems = []
    for number, line in enumerate((line.partition("#")[0].strip() for line in lines), 1):
        match = re.fullmatch(r"(\w[\w.@:%-]*)\s+slots\s*=\s*(\d{1,6})", line, re.ASCII)
        if not line:
            continue
        if match is None or int(match[2]) < 1:
            problems.append(f"line {number}: {line!r:.100}: must read `HOST slots=N`, N at least 1")
        elif (name := match[1].rpartition("@")[2].lower()) in names:
            problems.append(f"line {number}: {name} stands there twice; add its slots up")
        else:
            names.add(name)
            slots[match[1]] = int(match[2])
    if not slots and not problems:
        problems.append("no host in it; write a line `HOST slots=N` for each")
    if problems:
        raise UsageError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return slots


def main(path: str) -> int:
    """Prints the hosts with their slots."""
    print("".join(f"{host} slots={n}\n" for host, n in read_hostfile(Path(path)).items()), end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(ended(lambda: main(sys.argv[1])))
