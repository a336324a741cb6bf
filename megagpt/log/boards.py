"""Boards: where a browser shows the figures of a run while it goes on (L1).

TensorBoard's event files and Weights & Biases stand behind one small interface, written by one
process, with tokens consumed as the step axis. All figures of a step go into one event, which
keeps files small and a step's cost at a fraction of a millisecond.

After a crash the run takes some steps again, and neither board may show them twice. A new event
file opens with the session mark at which TensorBoard, and whatever else reads the files with
TensorBoard's own code, drops every point that lies behind it. wandb refuses a point that lies
behind its newest, and the same steps would have been the same points.
"""

import html
import importlib.util
import io
import logging
import os
import platform
import secrets
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megagpt.errors import UsageError
from megagpt.files import displaced, write_file
from megagpt.log.repair import EVENTS, event_files, repair_events

log = logging.getLogger(__name__)
FIRST_SCREEN = Path(__file__).with_name("first_screen.toml")
WANDB_ID = "wandb_id"
"""File of the run folder that names the run on the server, so that resuming goes on with it."""


class Board(Protocol):
    """Receives figures and texts."""

    def scalars(self, values: Mapping[str, float], tokens: int, wall_time: float) -> None:
        """Write figures by tag at `tokens` consumed; `wall_time` in seconds since 1970."""

    def text(self, tag: str, text: str, tokens: int) -> None:
        """Write a text, read as Markdown, at `tokens` consumed."""

    def image(self, tag: str, png: bytes, tokens: int) -> None:
        """Write a picture, the content of a PNG file, at `tokens` consumed."""

    def sync(self) -> None:
        """Return once what was written survives a power cut, where it is on this disk."""
        return None

    def displaced(self) -> bool:
        """Whether what is written is lost, since its file was moved or removed."""
        return False

    def close(self) -> None:
        """Hand in what is not written yet; a second call does nothing."""


class TensorBoard(Board):
    """One event file, open for writing."""

    def __init__(self, folder: Path, *, resume_tokens: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        folder.mkdir(parents=True, exist_ok=True)
        self._Event, self._Summary, self._text = Event, Summary, summary.text
        for path in event_files(folder):
            if problem := repair_events(path):
                log.error("%s", problem)
        self.path = _new_path(folder)
        # torch's FileWriter would open the file anew for every event and name it by this host's
        # clock alone. "x": two writers of one file would spoil each other's curve.
        self._file = self.path.open("xb")
        self._writer = RecordWriter(self._file)
        self._write(0, file_version="brain.Event:2")
        # Points at this step and later are dropped. The evaluation before the first step is made
        # again where a run begins anew, the one of the last checkpoint is not.
        first = resume_tokens + 1 if resume_tokens else 0
        self._write(first, session_log=SessionLog(status=SessionLog.START))
        # Its first screen: category -> chart -> regular expressions of the tags in it.
        screen = tomllib.loads(FIRST_SCREEN.read_text(encoding="utf-8"))
        layout = {
            category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
            for category, charts in screen.items()
        }
        self._write(resume_tokens, summary=summary.custom_scalars(layout))

    def _write(self, tokens: int, wall_time: float = 0.0, **content: Any) -> None:
        event = self._Event(step=tokens, wall_time=wall_time or time.time(), **content)
        self._writer.write(event.SerializeToString())
        # What is flushed survives the process, however it is killed.
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], tokens: int, wall_time: float = 0.0) -> None:
        """Write figures by tag at `tokens` consumed; `wall_time` in seconds, 0: now."""
        summary = self._Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._write(tokens, wall_time, summary=summary)

    def text(self, tag: str, text: str, tokens: int) -> None:
        """Write a text, read as Markdown, at `tokens` consumed."""
        summary = self._text(tag, text)
        summary.value[0].tag = tag  # torch appends "/text_summary"
        self._write(tokens, summary=summary)

    def image(self, tag: str, png: bytes, tokens: int) -> None:
        """Write a picture at `tokens` consumed."""
        # A PNG's header: width and height behind its signature and the name of the first chunk.
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        summary = self._Summary()
        shown = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        summary.value.add(tag=tag, image=self._Summary.Image(**shown))
        self._write(tokens, summary=summary)

    def sync(self) -> None:
        """Return once every event is on the disk."""
        os.fsync(self._file.fileno())

    def displaced(self) -> bool:
        """Whether the name is no longer this file's."""
        return displaced(self.path, self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if not self._writer.closed:
            self._writer.close()


def _new_path(folder: Path) -> Path:
    """A name that sorts behind all others, even where this host's clock is behind."""
    seconds = [path.name.removeprefix(EVENTS).split(".")[0] for path in event_files(folder)]
    latest = max((int(text) for text in seconds if text.isdigit()), default=0)
    second = max(int(time.time()), latest + 1)
    return folder / f"{EVENTS}{second:010d}.{platform.node() or 'localhost'}.{os.getpid()}.0"


def check_wandb(project: str) -> None:
    """Raises UsageError where the run file wants wandb and the package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f'log.wandb = "{project}": the package wandb is not installed; run `pip install '
            'wandb`, or set log.wandb = ""'
        )


class Wandb(Board):
    """A run of a project on the server, which has what is written, or wandb's own files do."""

    def __init__(self, folder: Path, project: str, *, resume_tokens: int = 0) -> None:
        check_wandb(project)
        import wandb

        path, configuration = folder / WANDB_ID, folder / "config.toml"
        if not resume_tokens or not path.exists():
            write_file(path, secrets.token_hex(8))
        try:
            self._run: Any = wandb.init(
                project=project,
                id=path.read_text(),
                name=folder.resolve().name,
                dir=str(folder),
                resume="allow",
                config=tomllib.loads(configuration.read_text()) if configuration.exists() else {},
                # What the run says on the terminal is in its own hands.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UsageError(
                f'log.wandb = "{project}": {error}; run `wandb login`, export WANDB_MODE=offline '
                'to sync later, or set log.wandb = ""'
            ) from None
        self._html, self._image = wandb.Html, wandb.Image

    def scalars(self, values: Mapping[str, float], tokens: int, wall_time: float = 0.0) -> None:
        """Write figures by tag at `tokens` consumed; wandb takes its own time."""
        self._run.log(dict(values), step=tokens)

    def text(self, tag: str, text: str, tokens: int) -> None:
        """Write a text at `tokens` consumed."""
        self._run.log({tag: self._html(f"<pre>{html.escape(text)}</pre>")}, step=tokens)

    def image(self, tag: str, png: bytes, tokens: int) -> None:
        """Write a picture at `tokens` consumed."""
        from PIL import Image

        self._run.log({tag: self._image(Image.open(io.BytesIO(png)))}, step=tokens)

    def close(self) -> None:
        """Hand in what is not sent yet."""
        self._run.finish()


def open_boards(folder: Path, tensorboard: bool, wandb: str, resume_tokens: int) -> list[Board]:
    """The boards of the run in `folder`; wandb: its project, "" for none.

    Raises UsageError where wandb refuses a run that begins; one that goes on does not end because
    of a board.
    """
    boards: list[Board] = []
    if tensorboard:
        boards.append(TensorBoard(folder / "tensorboard", resume_tokens=resume_tokens))
    if wandb:
        try:
            boards.append(Wandb(folder, wandb, resume_tokens=resume_tokens))
        except UsageError as error:
            if not resume_tokens:
                raise
            log.warning("going on without wandb: %s", error)
    return boards
