"""Weights & Biases as a second board: the figures and texts that TensorBoard gets (L1).

The package wandb is optional. Its step axis is tokens, and it drops a point that lies behind the
newest it has: a run that resumes after a crash takes the same steps again, so the curve stays one.
"""

import html
import importlib.util
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagpt.errors import UsageError

ID = "wandb_id"
"""File of the run folder that names the run on the server, so that resuming goes on with it."""


def check_wandb(project: str) -> None:
    """Raises UsageError where the run file wants wandb and the package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f'log.wandb = "{project}": the package wandb is not installed; run `pip install '
            'wandb`, or set log.wandb = ""'
        )


class WandbBoard:
    """A run of a project, open for writing; the same methods as `Board`."""

    def __init__(self, folder: Path, project: str, *, resume_tokens: int = 0) -> None:
        check_wandb(project)
        import wandb

        path, configuration = folder / ID, folder / "config.toml"
        if not resume_tokens or not path.exists():
            path.write_text(secrets.token_hex(8))
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
        self._html = wandb.Html

    def scalars(self, values: Mapping[str, float], tokens: int, wall_time: float = 0.0) -> None:
        """Write figures by tag at `tokens` consumed; wandb takes its own time."""
        self._run.log(dict(values), step=tokens)

    def text(self, tag: str, text: str, tokens: int) -> None:
        """Write a text at `tokens` consumed."""
        self._run.log({tag: self._html(f"<pre>{html.escape(text)}</pre>")}, step=tokens)

    def close(self) -> None:
        """Hand in what is not sent yet."""
        self._run.finish()
