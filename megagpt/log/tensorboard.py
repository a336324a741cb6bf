"""TensorBoard's event files, written by one process, with tokens consumed as the step axis.

All figures of a step go into one event, which keeps files small and a step's cost at a fraction
of a millisecond. After a restart the curve must have no doubled and no zig-zag steps, for
whoever reads it: a fresh TensorBoard, one that has been open since before the crash, and
programs. So resuming cuts the old files at the last event that still holds (a record that a kill
left half-written goes too), and the new file opens with the session mark on which an open
TensorBoard drops the orphaned points.
"""

import os
import platform
import struct
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from megagpt.log.tags import FIRST_SCREEN

_PREFIX = "events.out.tfevents."
_HEADER = struct.Struct("<QI")
"""Before each record: its length and that length's masked CRC-32C."""
_FOOTER_BYTES = 4


def event_files(folder: Path) -> list[Path]:
    """The event files of `folder` in the order in which TensorBoard reads them."""
    return sorted(path for path in folder.glob(_PREFIX + "*") if path.is_file())


def cut_events(folder: Path, resume_tokens: int) -> None:
    """Cut the event files behind the last event with a step of at most `resume_tokens`.

    Cuts half-written records too; a file that keeps nothing is removed. At 0 the run begins anew,
    with its first evaluation: nothing is kept.
    """
    for path in event_files(folder):
        end, kept = _sound_bytes(path, resume_tokens) if resume_tokens else (0, 0)
        if not kept:
            path.unlink()
        elif end < path.stat().st_size:
            os.truncate(path, end)


def _sound_bytes(path: Path, resume_tokens: int) -> tuple[int, int]:
    """(length in bytes, events) of the whole records that come before any later step.

    Within a file steps never fall, so the first later step ends it. The mark that opens a file
    has no figures: it is not counted.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    end = kept = 0
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, crc = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != crc:
                break
            body = file.read(length + _FOOTER_BYTES)
            if len(body) < length + _FOOTER_BYTES:
                break
            try:
                event = Event.FromString(body[:length])
            except DecodeError:
                break
            if event.step > resume_tokens:
                break
            end += _HEADER.size + len(body)
            kept += not event.file_version
    return end, kept


class Board:
    """One event file, open for writing."""

    def __init__(self, folder: Path, *, resume_tokens: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        cut_events(folder, resume_tokens)
        self._Event = Event
        self.path = _new_path(folder)
        # "x": two writers on one folder would spoil each other's curve.
        self._writer = RecordWriter(self.path.open("xb"))
        source = SourceMetadata(writer="megagpt.log")
        self._write(Event(file_version="brain.Event:2", source_metadata=source))
        # A reader drops what it holds at this step and later.
        mark = SessionLog(status=SessionLog.START)
        self._write(Event(step=resume_tokens + 1 if resume_tokens else 0, session_log=mark))
        self._write(Event(step=resume_tokens, summary=_layout_summary()))

    def _write(self, event: Any, wall_time: float = 0.0) -> None:
        event.wall_time = wall_time or time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], tokens: int, wall_time: float = 0.0) -> None:
        """Write figures by tag at `tokens` consumed; `wall_time` in seconds, 0: now."""
        event = self._Event(step=tokens)
        for tag, value in values.items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._write(event, wall_time)

    def text(self, tag: str, text: str, tokens: int) -> None:
        """Write a text, read as Markdown, at `tokens` consumed."""
        self._write(self._Event(step=tokens, summary=_text_summary(tag, text)))

    def close(self) -> None:
        """Close the file."""
        if not self._writer.closed:
            self._writer.close()


def _new_path(folder: Path) -> Path:
    """A name that sorts behind all others, even where this host's clock is behind."""
    times = [path.name.removeprefix(_PREFIX).split(".")[0] for path in event_files(folder)]
    latest = max((int(text) for text in times if text.isdigit()), default=0)
    second = max(int(time.time()), latest + 1)
    host = platform.node() or "localhost"
    for n in count():
        path = folder / f"{_PREFIX}{second:010d}.{host}.{os.getpid()}.{n}"
        if not path.exists():
            break
    return path


def _text_summary(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text import metadata

    return Summary(
        value=[
            Summary.Value(
                tag=tag,
                tensor=_string_tensor(text.encode()),
                metadata=metadata.create_summary_metadata(display_name=tag, description=""),
            )
        ]
    )


def _string_tensor(content: bytes) -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    return TensorProto(dtype=DT_STRING, string_val=[content])


def _layout_summary() -> Any:
    """The charts of the custom scalars page, TensorBoard's first screen for a run."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(
                        title=chart, multiline=layout_pb2.MultilineChartContent(tag=list(patterns))
                    )
                    for chart, patterns in charts
                ],
            )
            for title, charts in FIRST_SCREEN
        ]
    )
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=_string_tensor(layout.SerializeToString()),
        metadata=metadata.create_summary_metadata(),
    )
    return Summary(value=[value])
