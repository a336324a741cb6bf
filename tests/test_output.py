"""What commands do where their output cannot go: no traceback, and an exit code that says it."""

import contextlib
import errno
import io
import os
import subprocess
import sys

import pytest

from megagpt.cli import main
from megagpt.errors import DamageError, Output, ended, outputs
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return run_file(tmp_path_factory.mktemp("output"), schedule={"total_tokens": 4096})


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    megagpt = f'megagpt() {{ "{sys.executable}" -m megagpt "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", megagpt + line],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("line", "code", "stderr"),
    [
        ("megagpt plan {file} >&-", 0, ""),
        ("megagpt plan {file} <&- >&- 2>&-", 0, ""),
        ("megagpt plan none.toml 2>&-", 2, ""),
        ("megagpt plan {file} > /dev/full", 3, "megagpt: stdout: No space left on device\n"),
        ("megagpt plan none.toml 2> /dev/full", 2, ""),
        ("megagpt generate {folder}/none --prompt-file - <&-", 2, None),
    ],
)
def test_streams_that_are_closed_or_full(file, line, code, stderr):
    done = shell(line.format(file=file, folder=file.parent))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert stderr is None or done.stderr == stderr


@pytest.mark.parametrize(
    "environ",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_an_ascii_terminal_is_told_in_ascii(file, environ, tmp_path):
    name = tmp_path / "m\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{HIRAGANA LETTER A}.toml"
    name.write_text(file.read_text(), encoding="utf-8")
    done = shell(f"megagpt plan {name}; megagpt plan {name}.none", **environ)
    assert "Traceback" not in done.stderr
    assert r"/m\xfc\u3042.toml: " in done.stdout or r"/m\xc3\xbc" in done.stdout
    assert "cannot read the run file" in done.stderr


def test_a_run_that_nobody_reads_ends_well(file):
    train = f'"{sys.executable}" -m megagpt.train {file}'
    # The reader of its output is gone before it prints a line.
    done = shell(f"exec 3> >(exec true); sleep 0.2; {train} >&3 2>&3")
    assert done.returncode == 0 and done.stderr == ""
    done = shell(f"rm -r {file.parent}/run; {train} > /dev/full 2> /dev/full")
    assert done.returncode == 0


def test_a_reader_that_has_seen_enough_is_no_failure():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with contextlib.redirect_stdout(Gone()):
        assert ended(lambda: print("much")) == 0
        with outputs(must_arrive=False):
            print("to nobody")


def test_what_a_disk_says_is_one_message(capsys):
    def fails(error):
        def work():
            raise error

        return work

    hint = "; make space"
    assert ended(fails(OSError(errno.ENOSPC, "No space left", b"/a\x1b")), hint=hint) == 3
    assert capsys.readouterr().err == "megagpt: /a\\x1b: No space left; make space\n"
    assert ended(fails(OSError(errno.EIO, "Input/output error")), hint=hint) == 1
    assert capsys.readouterr().err == "megagpt: a disk: Input/output error\n"
    assert ended(fails(PermissionError(errno.EACCES, "Permission denied", "/b"))) == 1
    assert capsys.readouterr().err == "megagpt: /b: Permission denied\n"
    assert ended(fails(MemoryError())) == 1
    assert "out of memory" in capsys.readouterr().err
    assert ended(fails(KeyboardInterrupt())) == 130
    assert ended(fails(DamageError("x")), speaks=lambda: False) == 3
    assert capsys.readouterr().err == ""
    # What only a traceback can tell is not hidden.
    with pytest.raises(ConnectionError):
        ended(fails(ConnectionError(errno.ECONNREFUSED, "Connection refused")))
    with pytest.raises(ZeroDivisionError):
        ended(lambda: 1 // 0)


def test_output_is_a_stream(capsys):
    with outputs():
        assert isinstance(sys.stdout, Output) and sys.stdout.isatty() is False
        assert sys.stdout.write("\x1b") == 1
    assert not isinstance(sys.stdout, Output)
    assert capsys.readouterr().out == "\\x1b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "x", "--gpus", "9" * 400], "gpus = 9999"),
        (["watch", "x", "--every", "1e400"], "every = inf: must be a number below 2^63"),
        (["watch", "x", "--every", "nan"], "every = nan: must be a number below 2^63"),
        (["report", "a", "b\0"], r"folders = 'b\x00': must not hold the character NUL"),
    ],
)
def test_what_no_option_can_be(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
