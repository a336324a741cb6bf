"""What can go wrong, and the exit code that says so (L0, stdlib only).

Every command ends with one of these codes. Code that finds a problem raises one of the classes
below with a message that names the file, key or value, the rule it breaks and the remedy; the
command line prints the message and exits with the class's code, without a traceback. So it does
with what a disk says (OSError), and with a reader of its output that has gone.

What is printed holds names and text that others wrote. `visible` is the quoting of the terminal's
language, and every command's stdout and stderr go through it.
"""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
"""Anything that has no code of its own."""
EXIT_USAGE = 2
"""Wrong usage or configuration."""
EXIT_DAMAGE = 3
"""Damaged input, named in the message."""
EXIT_UNSOUND = 4
"""The training went wrong: weights or moments that cannot be, or no update any more. Nothing of it
was saved; the checkpoints before are kept."""
EXIT_STOPPED = 75
"""Stopped by a signal or a time limit with a checkpoint saved; run again to go on (EX_TEMPFAIL)."""


class MegagptError(Exception):
    """A problem that the user can act on."""

    exit_code = EXIT_FAILURE


class UsageError(MegagptError):
    """Wrong usage or configuration: exit code 2."""

    exit_code = EXIT_USAGE


class DamageError(MegagptError):
    """A file that is not what its checksum or its format says: exit code 3."""

    exit_code = EXIT_DAMAGE


class UnsoundError(MegagptError):
    """A training whose state is not to be saved: exit code 4."""

    exit_code = EXIT_UNSOUND


class Stopped(MegagptError):
    """The run was asked to stop and saved a checkpoint: exit code 75."""

    exit_code = EXIT_STOPPED


# --- the terminal -------------------------------------------------------------------------------

_ACTING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that act on a terminal instead of standing there: controls but tab and newline, marks
that turn the direction of writing, other ends of lines; and the halves of surrogate pairs."""


def visible(text: str) -> str:
    """`text` with every character spelled out that would act on a terminal: ESC as \\x1b.

    A byte of a file name that is no UTF-8 is spelled out as that byte.
    """
    return _ACTING.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Python reads the undecodable bytes of names as U+DC80 to U+DCFF.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Output:
    """stdout or stderr: prints what is visible, in characters that the stream's encoding has.

    must_arrive: a write that fails raises OSError that names the stream; otherwise nobody can be
    told, and the text is dropped.
    """

    def __init__(self, stream: Any, name: str, must_arrive: bool) -> None:
        # rich draws with escape sequences; it looks for this name and writes there itself.
        self.rich_proxied_file = stream
        self._name, self._must_arrive = name, must_arrive

    def write(self, text: str) -> int:
        """Print the text."""
        self.write_exactly(visible(text))
        return len(text)

    def write_exactly(self, text: str) -> None:
        """Print the text, whatever it does."""
        encoding = getattr(self.rich_proxied_file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self.rich_proxied_file.write(text))

    def flush(self) -> None:
        """Hand in what is printed."""
        self._try(self.rich_proxied_file.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            # What is still buffered would fail again when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.rich_proxied_file.fileno())
                os.close(nowhere)
            if self._must_arrive:
                raise OSError(error.errno, error.strerror, self._name) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def print_exactly(text: str) -> None:
    """Prints a text that a file or a pipe must get unchanged, visible where a terminal reads it."""
    if isinstance(sys.stdout, Output) and not sys.stdout.isatty():
        sys.stdout.write_exactly(text)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def outputs(must_arrive: bool = True) -> Iterator[None]:
    """Puts stdout and stderr through Output; what was closed before the start leads nowhere."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free: files opened later must not get a standard stream's number.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            # What rich draws, where there are no such characters.
            stream.reconfigure(errors="replace")
    nowhere = open(os.devnull, "w") if None in before else None  # noqa: SIM115
    sys.stdout = Output(before[0] or nowhere, "stdout", must_arrive)
    sys.stderr = Output(before[1] or nowhere, "stderr", False)
    try:
        yield
    finally:
        printed, (sys.stdout, sys.stderr) = sys.stdout, before
        printed.flush()


# --- the end of a command -----------------------------------------------------------------------

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""
_NAMELESS = (*FULL, errno.EIO, errno.ESTALE)
"""Errors that tell enough without the name of a file, which reads and writes do not know."""


def ended(
    work: Callable[[], int],
    speaks: Callable[[], bool] = lambda: True,
    hint: str = "",
    must_arrive: bool = True,
) -> int:
    """Runs a command's work and returns its exit code; what a user, a disk or a file did is told
    in one message on stderr.

    speaks: whether this process is the one that tells. hint: what to do about a full disk.
    must_arrive: whether the command is for what it prints; a run trains on without a reader.
    """
    message, code = "", EXIT_FAILURE
    try:
        with outputs(must_arrive):
            try:
                code = work()
            except (MegagptError, OSError, MemoryError) as error:
                message, code = _told(error, hint)
                if speaks() and message:
                    print(f"megagpt: {message}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                code = 130
    except OSError as error:
        if error.filename != "stdout":
            raise
        # The rest of the output failed, as the command ended.
        message, code = _told(error, hint)
        with outputs(False):
            print(f"megagpt: {message}\n" if message else "", end="", file=sys.stderr, flush=True)
    return code


def _told(error: Exception, hint: str) -> tuple[str, int]:
    """(message, exit code). Raises the error again where only a traceback can tell what it was."""
    if isinstance(error, MegagptError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory: this host has less than what was asked for takes", EXIT_FAILURE
    assert isinstance(error, OSError)
    if error.errno == errno.EPIPE and error.filename == "stdout":
        # The reader of a pipe, such as head, has seen enough.
        return "", EXIT_OK
    if error.filename is None and error.errno not in _NAMELESS:
        raise error
    name = "a disk" if error.filename is None else error.filename
    name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    full = error.errno in FULL
    return f"{name}: {error.strerror}{hint * full}", EXIT_DAMAGE if full else EXIT_FAILURE
