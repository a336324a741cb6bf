"""One reader of hostfiles: deepspeed, the doctor and the script see the same hosts."""

import subprocess
import sys

import pytest

from megagpt.cluster.hostfile import read_hostfile
from megagpt.errors import UsageError
from tests.lib.distributed import environment


def test_a_hostfile_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("# a comment\nhost-a slots=8\n\nhost-b  slots=4\n")
    assert read_hostfile(path) == dict(fetch_hostfile(str(path))) == {"host-a": 8, "host-b": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=" + "9" * 5000, "line 1: 'a slots=999"),
        (b"\xff\xfea", r"cannot read the hostfile \(not UTF-8\)"),
        (None, r"cannot read the hostfile \(No such file or directory\)"),
        ("# nobody\n", "no host in it"),
        ("a slots=1\na slots=2\n", "line 2: a stands there twice; add its slots up"),
        ("me@a slots=1\nA slots=2\n", "line 2: a stands there twice; add its slots up"),
        ("a[1-3] slots=1\n", r"line 1: 'a\[1-3\] slots=1': must read"),
        ("a\x1b[1m slots=1\n$(b) slots=1\n", "(?s)line 1: .*line 2: "),
        ("a slots=0\nb\nc slot=3\n", r"(?s)line 1: 'a slots=0': must read.*line 2: 'b'.*line 3"),
    ],
)
def test_hostfiles_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    "text",
    [
        "host-a\tslots=8\nhost-b slots=4\t\n",
        "\ufeffhost-a slots=8\r\nhost-b slots=4\r\n",
        "  host-a slots=8\n\t# none\nhost-b slots=4 # the old one\n",
        "host-a slots=8#\n\n\nhost-b slots = 4",
    ],
)
def test_what_editors_leave_means_nothing(tmp_path, text):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(text, newline="")
    assert list(read_hostfile(path).items()) == [("host-a", 8), ("host-b", 4)]
    line = [sys.executable, "-m", "megagpt.cluster.hostfile", str(path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    # What deepspeed is given has nothing left to be read in two ways.
    path.write_text(done.stdout)
    assert dict(fetch_hostfile(str(path))) == {"host-a": 8, "host-b": 4}
