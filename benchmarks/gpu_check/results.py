"""Results: one JSON object a line, appended as it comes, so that a killed call keeps them.

An item's process finds the file and its own time limit in its environment.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE, LIMIT = "GPU_CHECK_RESULTS", "GPU_CHECK_ITEM_ENDS"


def record(kind: str, **facts: Any) -> None:
    """Append one line, to the file and to the item's log."""
    line = json.dumps({"kind": kind, **facts})
    print(line, flush=True)
    if FILE in os.environ:
        with Path(os.environ[FILE]).open("a") as file:
            file.write(line + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; none where there is no file."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # cut off by the end of a call


def seconds_left() -> float:
    """Until this item's process is killed; an hour where nobody set a limit."""
    return float(os.environ.get(LIMIT, time.time() + 3600)) - time.time()


def first_line(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0]
