"""What a preparation survives while it runs: kills, signals, full disks, other input."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megagpt.corpus.documents import Documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.errors import Stopped, UsageError
from tests.corpus.test_damage import options
from tests.corpus.test_prepare import content, decoded, jsonl, sample_texts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_prep/tokenize_corpus.py"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FLAGS = {"unit_bytes": 1 << 19, "deduplicate": True, "shard_tokens": 700_000}


def run_script(*args: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, args), "--backend", "tiktoken"]
    return subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of a second's work, and its shards from a run in peace."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(7)
    words = [f"w{n}" for n in range(3000)]
    path = jsonl(folder / "in.jsonl", (" ".join(draw.choices(words, k=400)) for _ in range(9000)))
    prepare([path], options(folder / "calm", **FLAGS))
    return path, content(folder / "calm/out")


def kill_child(path: Path, output: Path, delay_s: float, victim: str) -> bool:
    """Prepare in another process and kill it (or one of its workers) after a while; whether it
    was still at work."""
    code = (
        "import sys; from pathlib import Path\n"
        "from megagpt.corpus.pipe import PrepareOptions, prepare\n"
        "prepare([Path(sys.argv[1])], PrepareOptions(output=Path(sys.argv[2]), workers=2, "
        "backend='tiktoken', unit_bytes=1 << 19, deduplicate=True, shard_tokens=700_000))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, path, output], env=ENV, stderr=subprocess.PIPE, text=True
    )
    while not (output / ".preparation/plan.json").exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(delay_s)
    if victim == "worker":
        import psutil

        workers = psutil.Process(child.pid).children() if child.poll() is None else []
        if workers:
            workers[0].kill()
        message = child.communicate(timeout=60)[1]
        assert "a worker was killed by SIGKILL" in message or child.returncode == 0
    else:
        child.kill()
        child.communicate()
    return child.returncode != 0


def test_kills_at_any_moment_do_not_change_a_byte(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, calm = corpus
    output = tmp_path / "out"
    draw = random.Random(8)
    kills = 0
    for attempt in range(8):
        victim = "worker" if attempt % 4 == 3 else "parent"
        if not kill_child(path, output, draw.uniform(0, 1.0), victim):
            break
        kills += 1
    prepare([path], options(tmp_path, **FLAGS))
    assert kills >= 2
    assert content(output) == calm


def test_an_unfinished_output_refuses_other_input(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, _ = corpus
    assert kill_child(path, tmp_path / "out", 0.0, "parent")
    with pytest.raises(UsageError, match="holds no manifest|did not finish; run the same"):
        read_manifest(tmp_path / "out")
    with pytest.raises(UsageError, match="unfinished preparation of something else .*text_field"):
        prepare([path], options(tmp_path, text_field="body"))
    other = jsonl(tmp_path / "other.jsonl", ["x"])
    with pytest.raises(UsageError, match="the input files differ or have changed"):
        prepare([other], options(tmp_path, **FLAGS))


def takes_sigterm(process: subprocess.Popen) -> bool:
    """Whether the process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_stop_by_signal_ends_cleanly_and_continues(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, _ = corpus
    # From before the first import to the middle of the work.
    for delay_s in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4):
        process = run_script(path, "--output", tmp_path / "out")
        while not takes_sigterm(process):
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 75, errors
        assert "stopped; run the same command again to continue" in errors
    process = run_script(path, "--output", tmp_path / "out")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "9,000 documents" in out


def test_two_processes_do_not_share_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    from megagpt.corpus import unfinished

    path = jsonl(tmp_path / "in.jsonl", ["x"])
    (tmp_path / "out/.preparation").mkdir(parents=True)
    with (tmp_path / "out/.preparation/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(unfinished, "LOCK_WAIT_S", 0.1)
        with pytest.raises(UsageError, match="another process is preparing it"):
            prepare([path], options(tmp_path))
        # It ends and removes its state while another waits for the lock.
        monkeypatch.setattr(unfinished, "LOCK_WAIT_S", 20)
        threading.Timer(0.3, lambda: (shutil.rmtree(tmp_path / "out"), lock.close())).start()
        with pytest.raises(UsageError, match="another process has just finished it; run the same"):
            prepare([path], options(tmp_path))


def test_a_full_disk_stops_cleanly_and_continues(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    """A tiny file system in a mount namespace of its own; skipped where that is not allowed."""
    path, _ = corpus
    mount = tmp_path / "small"
    mount.mkdir()
    script = f"{sys.executable} {SCRIPT} {path} --output {mount}/out --backend tiktoken"
    steps = (
        f"mount -t tmpfs -o size=3m none {mount} || exit 99; "
        f"{script}; echo first $?; "
        f"mount -o remount,size=100m {mount}; {script}; echo second $?; "
        f"{sys.executable} -c \"from megagpt.corpus.verify import verify_shards as v; "
        f"print('problems', v('{mount}/out'))\""
    )  # fmt: skip
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("unshare is not installed")
    command = [unshare, "-m"] if os.geteuid() == 0 else [unshare, "-rm"]
    result = subprocess.run(
        [*command, "sh", "-c", steps], env=ENV, capture_output=True, text=True, timeout=200
    )
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("mounting is not allowed here")
    assert "first 1" in result.stdout, result.stderr
    assert "No space left on device; make space and run the same command" in result.stderr
    assert "Traceback" not in result.stderr
    assert "second 0" in result.stdout and "problems []" in result.stdout


def test_standard_input_that_differs_after_a_kill_is_refused(tmp_path: Path) -> None:
    texts = sample_texts(30)

    def broken() -> list[str]:
        raise KeyboardInterrupt

    def first():
        yield from texts
        yield from broken()

    flags = {"unit_bytes": 200}
    with pytest.raises(Stopped, match="out: stopped; run the same command again"):
        prepare([Documents("mine", first)], options(tmp_path, **flags))
    with pytest.raises(UsageError, match="had read other documents from this input"):
        prepare([Documents("mine", lambda: ["other"] * 30)], options(tmp_path, **flags))
    prepare([Documents("mine", lambda: texts)], options(tmp_path, **flags))
    assert decoded(tmp_path / "out") == texts


def test_input_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))

    def growing():
        with path.open("a") as file:
            file.write('{"text": "late"}\n')
        yield "x"

    with pytest.raises(UsageError, match="in.jsonl changed while it was read"):
        prepare([path, Documents("mine", growing)], options(tmp_path))
