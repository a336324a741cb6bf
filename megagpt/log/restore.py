"""What a run's event files still tell of steps that metrics.jsonl has lost (L1).

TensorBoard has every figure as a float32, and no text: a step comes back with about seven digits of
each figure, and without its digest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.log.boards import event_files
from megagpt.log.metrics import Place, place_of
from megagpt.log.repair import sound_records
from megagpt.log.tags import record_of


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
