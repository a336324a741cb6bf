"""TensorBoard's event files after damage, and what they still tell of damage elsewhere (L1).

A record is its length (8 bytes), a checksum of these, its content, a checksum of that; TensorBoard
stops at the first that is wrong, whatever follows it. Here the next sound one is looked for: the
sound records stay, and the file as it was is kept.

Steps that metrics.jsonl has lost come back from there. TensorBoard has every figure as a float32,
and no text: a step comes back with about seven digits of each figure, and without its digest.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c

from megagpt.files import copy_aside, write_durably
from megagpt.log.metrics import Place, place_of
from megagpt.log.tags import record_of

EVENTS = "events.out.tfevents."
FRAME = 16
"""Bytes of a record beside its content."""


def event_files(folder: Path) -> list[Path]:
    """The event files of `folder` in the order in which TensorBoard reads them."""
    return sorted(path for path in folder.glob(EVENTS + "*") if path.is_file())


def repair_events(path: Path) -> str:
    """Writes the file anew without its damaged records; what was done, "" where nothing was.

    A record that is cut short at the end is what a kill leaves, and hides nothing.
    """
    records = list(sound_records(path.read_bytes()))
    sound = [record for record in records if record]
    gaps = len(records) - len(sound)
    if not gaps:
        return ""
    # No name that TensorBoard takes for a file of its own.
    aside = copy_aside(path, path.name.replace("tfevents", "damaged"))
    write_durably(path, b"".join(sound))
    return (
        f"{path}: damaged in {gaps} place(s), where TensorBoard stops; its {len(sound)} sound "
        f"records are kept, and the file as it was is {aside}"
    )


def sound_records(data: bytes) -> Iterator[bytes]:
    """The sound records of an event file, frame included; empty for damage that others follow."""
    at = 0
    while at < len(data):
        if end := _end(data, at):
            yield data[at:end]
        elif (end := _next(data, at + 1)) < len(data):
            yield b""
        at = end


def _end(data: bytes, at: int) -> int:
    """Where the sound record at `at` ends; 0 where there is none."""
    head = data[at : at + 8]
    end = at + FRAME + int.from_bytes(head, "little")
    if end > len(data) or data[at + 8 : at + 12] != _checksum(head):
        return 0
    return end if data[end - 4 : end] == _checksum(data[at + 12 : end - 4]) else 0


def _next(data: bytes, at: int) -> int:
    """Where the first sound record from `at` on begins; the end of the file where there is none."""
    places = range(at, len(data) - FRAME + 1)
    return next((place for place in places if _end(data, place)), len(data))


def masked_crc(data: bytes) -> int:
    """CRC-32C as TensorFlow stores it: turned and moved, since a checksum of checksums would be
    weak."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    return masked_crc(data).to_bytes(4, "little")


def recorded(folder: Path, wanted: Callable[[Place], bool]) -> dict[Place, dict[str, Any]]:
    """The steps and evaluations of the wanted places, in order, from the event files of `folder`.

    What a later session of the run took anew counts as that session saw it.
    """
    files = event_files(folder)
    if not files:
        return {}
    import numpy as np
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    found: dict[Place, dict[str, Any]] = {}
    for content in (frame for path in files for frame in sound_records(path.read_bytes())):
        event = Event.FromString(content[12:-4])
        if event.session_log.status == SessionLog.START:
            found = {at: one for at, one in found.items() if one["tokens"] < event.step}
        # The shortest decimals that are this float32: 0.001, not 0.0010000000474974513.
        values = {
            value.tag: float(str(np.float32(value.simple_value)))
            for value in event.summary.value
            if value.WhichOneof("value") == "simple_value"
        }
        record = {"tokens": event.step, **record_of(values), "time": round(event.wall_time, 3)}
        if {"loss", "validation_loss"} & record.keys() and "step" in record:
            if wanted(place := place_of(record)):
                found[place] = record | {"restored_from": "tensorboard"}
    return dict(sorted(found.items()))
