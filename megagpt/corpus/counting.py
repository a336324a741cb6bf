"""The first pass of a decontamination: which 13-grams of the evaluation files are common phrases.

A worker writes what it saw in a unit to `N.grams`, this process puts them together, and
`rare.grams` keeps the 13-grams that are to be removed. All of it stays until the preparation
ends: a killed run continues, and the second pass knows whether it reads the same documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.corpus.clean import text_hash
from megagpt.corpus.contamination import Hashes, common, enough, shared_grams, sightings
from megagpt.corpus.flow import flow
from megagpt.corpus.part import part_path, payload_digest, utf8
from megagpt.corpus.pool import Pool
from megagpt.corpus.progress import Progress
from megagpt.corpus.source import Source, Unit, plan_units
from megagpt.corpus.state import State
from megagpt.corpus.stream import TRUNCATED
from megagpt.corpus.unit import LargeText, unit_items
from megagpt.files import write_durably

RARE = "rare.grams"


@dataclass(frozen=True)
class CountJob:
    """What a worker does with a unit; see megagpt.corpus.pool."""

    folder: Path
    text_field: str
    grams: Hashes
    note: str = ""

    def start(self) -> None:
        """Nothing to check."""

    def run(self, unit: Unit) -> None:
        """Write the sightings of one unit."""
        seen = [np.zeros(0, np.uint64)]
        for item in unit_items(unit, self.text_field):
            if isinstance(item, LargeText):
                try:
                    item = "".join(item.pieces())
                except (UnicodeDecodeError, EOFError, *TRUNCATED):
                    continue  # the second pass says what is wrong with it
            if isinstance(item, str):
                text, content = utf8(item)
                places = shared_grams(text, self.grams)
                if len(places):
                    seen.append(sightings(places, text_hash(content)))
        head = json.dumps({"digest": payload_digest(unit.payload)}).encode() + b"\n"
        raw = enough(np.concatenate(seen)).astype("<u8").tobytes()
        write_durably(part_path(self.folder, unit.number, "grams"), head + raw)


def rare_grams(
    grams: Hashes,
    sources: Sequence[Source],
    state: State,
    *,
    text_field: str,
    workers: int,
    unit_bytes: int,
) -> Hashes:
    """Those of `grams` that are no common phrases of the sources, sorted; reads all of them."""
    kept = state.folder / RARE
    if kept.exists():
        return np.fromfile(kept, "<u8")
    pool = Pool(workers, CountJob(state.folder, text_field, grams))
    progress = Progress("counting 13-grams", sum(source.bytes for source in sources))
    seen, waiting, size = np.zeros(0, np.uint64), [np.zeros(0, np.uint64)], 0
    try:
        units = plan_units(sources, unit_bytes)
        for unit in flow(units, pool, lambda unit: state.done(unit, "grams")):
            path = part_path(state.folder, unit.number, "grams")
            waiting.append(np.frombuffer(path.read_bytes().partition(b"\n")[2], "<u8"))
            size += len(waiting[-1])
            if size > len(seen) + (1 << 20):
                seen, waiting, size = enough(np.concatenate((seen, *waiting))), [], 0
            progress.add(unit.size)
    finally:
        progress.close()
        pool.close()
    rare = np.delete(grams, common(np.concatenate((seen, *waiting))))
    write_durably(kept, rare.astype("<u8").tobytes())
    return rare
