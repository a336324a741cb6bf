"""Text that a corpus shares with evaluation files, as in appendix C of the GPT-3 paper (numpy).

Brown et al. 2020: what counts are 13-grams of words in lower case without punctuation. A 13-gram
of the evaluation files that occurs in more than 10 documents of the corpus is a common phrase and
stays. Any other goes, with 200 characters on either side; of the pieces between, those below 200
characters go; and a document that falls into more than 10 pieces goes whole.

A word is a run of letters, digits and underscores, so that "don't" is two. Copies of a document
count once: the paper's corpora had been deduplicated before, and a leaked page that was copied
eleven times would pass for a common phrase.

Sets of 13-grams are sorted arrays of 64-bit hashes, which worker processes share.

A first pass over the corpus counts: a worker writes what it saw in a unit to `N.grams`, the parent
puts them together, and `rare.grams` keeps the 13-grams that are to be removed. All of it stays
until the preparation ends: a killed run continues, and the second pass knows whether it reads the
same documents.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.documents import Source, find_sources, total_bytes
from megagpt.corpus.duplicates import Hashes, row_hashes, text_hash, word_hashes
from megagpt.corpus.progress import Progress
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.texts import Problem, join, read, utf8
from megagpt.corpus.unfinished import State, payload_digest, unit_path
from megagpt.corpus.unit import Unit, plan_units
from megagpt.corpus.workers import Workers
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_durably

GRAM = 13
WINDOW = 200
PIECES = 10
COMMON = 10
"""Documents that a 13-gram may occur in before it is a common phrase."""
SLICE = 1 << 20
"""Characters of a document whose words are in memory at a time."""

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s")


def _slices(text: str) -> Iterator[tuple[int, str]]:
    """(place, part in lower case) of parts that are cut at white space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + SLICE)
        end = space.start() if space else len(text)
        part = text[start:end].lower()
        if len(part) != end - start:  # a few capitals grow; offsets would not fit
            part = "".join(c.lower() if len(c.lower()) == 1 else c for c in text[start:end])
        yield start, part
        start = end


def text_grams(text: str) -> Iterator[Hashes]:
    """The 13-grams of a text in order, slice by slice."""
    words = np.zeros(0, np.uint64)
    for _, part in _slices(text):
        words = np.concatenate((words[1 - GRAM :], word_hashes(_WORD.findall(part))))
        yield row_hashes(words, GRAM)


def _find(grams: Hashes, among: Hashes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Where each of `grams` stands in the sorted `among`, and whether it does."""
    places = np.searchsorted(among, grams)
    places[places == len(among)] = 0
    return places, among[places] == grams


def evaluation_grams(paths: Sequence[str], text_field: str) -> Hashes:
    """All 13-grams of evaluation files of any input format, sorted.

    Raises UsageError when the files hold no 13-gram at all, or a folder has others, DamageError
    when some of them cannot be read.
    """
    found = find_sources([Path(path) for path in paths])
    if found.others:
        raise UsageError(
            f"decontamination files {', '.join(paths)}: {len(found.others)} in there have endings "
            f"that are not known, such as {found.others[0]}; name the files that are to be read, "
            "or give a pattern such as 'FOLDER/*.jsonl'"
        )
    wrong = [f"{path}: {reason}" for path, reason, _ in found.problems]
    parts: list[Hashes] = []
    for unit in plan_units(found.sources):
        for item in join(read(unit, text_field)):
            if not isinstance(item, Problem):
                parts += [np.unique(part) for part in text_grams(item[1])]
            elif item.reason not in ("", "empty document"):
                path = item.path or found.sources[unit.sources[0]].path
                wrong.append(f"{path}: {item.reason} ({item.detail})")
    if wrong:
        # What is not known cannot be cut out.
        raise DamageError(f"decontamination file {wrong[0]}; repair it, or leave it out")
    grams = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    if not len(grams):
        raise UsageError(
            f"decontamination files {', '.join(paths)}: no text of {GRAM} words in them; give "
            "text files or JSON lines with the text field"
        )
    return grams


def shared_grams(text: str, grams: Hashes) -> npt.NDArray[np.intp]:
    """The places in `grams` (sorted, not empty) of those that occur in the text, each once."""
    found = [places[here] for places, here in (_find(g, grams) for g in text_grams(text))]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.intp)


def clean_pieces(text: str, grams: Hashes) -> list[str]:
    """What stays of a document without `grams`: itself, some pieces, or nothing."""
    if not len(shared_grams(text, grams)):
        return [text]
    cuts: list[list[int]] = []
    for first, last in _spans(text, grams):
        if cuts and first - WINDOW <= cuts[-1][1]:
            cuts[-1][1] = last + WINDOW
        else:
            cuts.append([max(first - WINDOW, 0), last + WINDOW])
    starts, ends = [0, *(last for _, last in cuts)], [*(first for first, _ in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return [piece for piece in pieces if len(piece) >= WINDOW] if len(pieces) <= PIECES else []


def _spans(text: str, grams: Hashes) -> Iterator[tuple[int, int]]:
    """First character and end of each 13-gram of the text that is one of `grams`, in order."""
    words, bounds = np.zeros(0, np.uint64), np.zeros((0, 2), np.int64)
    for start, part in _slices(text):
        matches = list(_WORD.finditer(part))
        words = np.concatenate(
            (words[1 - GRAM :], word_hashes([match.group() for match in matches]))
        )
        here = np.array([match.span() for match in matches], np.int64).reshape(-1, 2) + start
        bounds = np.concatenate((bounds[1 - GRAM :], here))
        for place in np.flatnonzero(_find(row_hashes(words, GRAM), grams)[1]).tolist():
            yield int(bounds[place, 0]), int(bounds[place + GRAM - 1, 1])


# --- the first pass: common phrases ---------------------------------------------------------------


def sightings(places: npt.NDArray[np.intp], document: int) -> Hashes:
    """One number for each 13-gram (by its index) that was seen in a document (by its hash)."""
    return (places.astype(np.uint64) << np.uint64(32)) | np.uint64(document & 0xFFFFFFFF)


def enough(seen: Hashes) -> Hashes:
    """Sorted sightings without doubles, and of each 13-gram no more than tell that it is common:
    what is left does not depend on the order, nor on how the sightings were put together."""
    seen = np.unique(seen)
    places = seen >> np.uint64(32)
    earlier = np.arange(len(seen)) - np.searchsorted(places, places)
    return seen[earlier <= COMMON]


def common(seen: Hashes) -> npt.NDArray[np.intp]:
    """Indices of the 13-grams that were seen in more than COMMON documents."""
    places, counts = np.unique(enough(seen) >> np.uint64(32), return_counts=True)
    return places[counts > COMMON].astype(np.intp)


@dataclass(frozen=True)
class GramCounter:
    """Writes the sightings of a unit, in a worker process; see megagpt.corpus.workers."""

    folder: Path
    text_field: str
    grams: Hashes

    def __call__(self, unit: Unit) -> str:
        """Of texts with a problem the second pass says what is wrong."""
        seen = [np.zeros(0, np.uint64)]
        for item in join(read(unit, self.text_field)):
            if isinstance(item, Problem):
                continue
            text, content = utf8(item[1])
            places = shared_grams(text, self.grams)
            if len(places):
                seen.append(sightings(places, text_hash(content)))
        head = json.dumps({"digest": payload_digest(unit.payload)}).encode() + b"\n"
        raw = enough(np.concatenate(seen)).astype("<u8").tobytes()
        write_durably(unit_path(self.folder, unit.number, "grams"), head + raw)
        return ""


def rare_grams(
    sources: Sequence[Source], state: State, options: PrepareOptions, notes: Counter[str]
) -> Hashes:
    """13-grams of the evaluation files that are to be removed, sorted; `notes` gets the number of
    the others, common phrases of the sources. Reads all of these, where there are such files."""
    if not options.decontaminate:
        return np.zeros(0, np.uint64)
    grams = evaluation_grams(options.decontaminate, options.text_field)
    result = state.folder / "rare.grams"
    if not result.exists():
        rare = np.delete(grams, common(_seen(grams, sources, state, options)))
        write_durably(result, rare.astype("<u8").tobytes())
    rare = np.fromfile(result, "<u8")
    if left := len(grams) - len(rare):
        notes["13-grams of evaluation files left as common"] = left
    return rare


def _seen(
    grams: Hashes, sources: Sequence[Source], state: State, options: PrepareOptions
) -> Hashes:
    """The sightings of all sources."""
    seen, waiting, size = np.zeros(0, np.uint64), [np.zeros(0, np.uint64)], 0
    units = plan_units(sources, options.unit_bytes)
    with (
        Workers(options.workers, GramCounter(state.folder, options.text_field, grams)) as pool,
        Progress("counting 13-grams", total_bytes(sources)) as progress,
    ):
        for unit in pool.in_order(units, lambda unit: state.is_done(unit, "grams")):
            content = unit_path(state.folder, unit.number, "grams").read_bytes()
            waiting.append(np.frombuffer(content.partition(b"\n")[2], "<u8"))
            size += len(waiting[-1])
            if size > len(seen) + (1 << 20):
                seen, waiting, size = enough(np.concatenate((seen, *waiting))), [], 0
            progress.add(unit.size)
    return np.concatenate((seen, *waiting))
