"""A campaign over the command line: hostile arguments and files, and never a traceback.

    python -m tests.lib.hostile_commands --trials 2000 --seed 1

Each trial takes a command that works and spoils one thing: an argument, or a file that it reads.
The command must then end with one of its exit codes, and print nothing that acts on a terminal, nor
a traceback. Commands that train run in copies of a process that has imported torch already.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt import train
from megagpt.cli import main
from tests.lib.distributed import environment

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "before_redesign"
SIZE = "--nodes 1 --gpus-per-node 2 --time 1:00:00"
COMMANDS = (
    "plan run.toml seed=2 --gpus 2",
    f"launch slurm run.toml {SIZE} --cpus-per-task 2 --name n --partition p --sweep seed=1,2",
    f"launch slurm run.toml {SIZE} --chain 2",
    "data inspect corpus --documents 2 --characters 9",
    "data verify corpus corpus-validation",
    "data import corpus --output new --shard-tokens 9999 --tokenizer gpt2",
    "data batch run --step 3 --characters 9",
    "data batch run.toml --step 3 --json seed=1",
    "checkpoint list run",
    "checkpoint verify run",
    "checkpoint reshape run new --ranks 3",
    "checkpoint consolidate run new --shard-gb 1e-5",
    "generate weights --prompt a --max-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 1",
    "generate run --prompt-file run.toml --max-tokens 1 --samples 2 --device cpu --seed 2",
    "evaluate weights --data corpus-validation --max-tokens 64 --batch-size 4 --stride 16",
    "evaluate run --data corpus-validation --checkpoint 18 --max-tokens 32 --dtype bf16 --json",
    "report run --output new",
    "watch run --once --every 2",
)
"""Commands that work in a copy of the fixture."""
STOP = "checkpoint.stop_after_steps=1"
TRAINING = (
    f"train run.toml {STOP}",
    f"train run.toml output=new {STOP} schedule.peak_lr=1e-3",
    f"train run.toml model.dropout=0.5 {STOP} --allow-changes",
)
"""Commands that train in one process."""
HEAVY = (
    "doctor run.toml --wait 1",
    *TRAINING,
    "parity run.toml --steps 1 --only PP2 model.dropout=0.1",
    "verify-resume run.toml --steps 1 --ranks 1 seed=2",
)
WORDS = (
    *("", ".", "..", "/", "/dev/null", "/proc/self/mem", "/proc/no/x", "run.toml", "corpus", "run"),
    *(
        "\udcff",
        "\x1b[2J",
        "a\nb",
        "[/red]",
        "$(id)",
        "x" * 300,
        "x/" * 3000,
        "-",
        "--",
        "=",
        "a=b",
    ),
    *("0", "-1", "1", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 400, "9" * 5000, "0x10"),
    *("model.n_layer=1e400", "schedule.peak_lr=" + "9" * 400, "a.b.c=1", "seed=" + "[" * 2000),
    *(
        "model=[]",
        "data=1",
        "data.train=1",
        "data.train=[]",
        "output=",
        "output=run.toml",
        "seed=x",
    ),
    *("output=/proc/x", "output=.", "output=/", "schedule.total_tokens=" + "9" * 18, "é"),
)
"""What stands in the place of an argument."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1e300,
        -1e300,
        10**400,
        2**63,
        "",
        "x",
        "NaN",
        "\ud800",
        "\x1b[31m",
        "../x",
    ),
    *([], {}, [[]], {"a": {}}, "9" * 500, 1.5, "/", "a\0b"),
)
"""What stands in the place of a value of JSON."""
LIMIT_S = {"train": 120, "parity": 300, "verify-resume": 300}
"""Of a command; 60 for others."""
CODES = (0, 1, 2, 3, 75)
NOWHERE = ("output=/", "/")
"""Words that no command which writes may get where its disk is somebody's."""


class Warm:
    """Runs commands one after another, each in a copy of one process that knows torch already."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.lib.hostile_commands", "--serve"]
        # What the trainer sets before it imports DeepSpeed.
        variables = environment() | {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=variables)

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        """(exit code, what was printed) of a command in `folder`."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([str(folder), words]), file=self._process.stdin, flush=True)
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """What the process of Warm does."""
    import megagpt.loop  # noqa: F401  (torch and DeepSpeed)

    for line in sys.stdin:
        folder, words = json.loads(line)
        with tempfile.TemporaryFile() as said:
            if (pid := os.fork()) == 0:
                os.chdir(folder)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os._exit(_called(words))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said.seek(0)
            print(json.dumps([code, said.read().decode(errors="replace")]), flush=True)


def _called(words: list[str]) -> int:
    """The exit code of a command, 99 for a traceback, which is printed."""
    signal.alarm(LIMIT_S.get(words[0], 60))
    code = 99
    try:
        code = train.main(words[1:]) if words[0] == "train" else main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 99
    except BaseException:
        traceback.print_exc(limit=-6)
    signal.alarm(0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class Campaign:
    """Trials in `folder`, a copy of the fixture that is mended after each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.codes: Counter[int] = Counter()
        self.failures: list[str] = []
        self.warm: Warm | None = None
        self.lay_out()
        self.files = sorted(p for p in folder.rglob("*") if p.is_file() and "end" not in p.parts)

    def lay_out(self) -> None:
        """The folder as it is before a trial."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(FIXTURE, self.folder)
        (self.folder / "continued.json").unlink()

    def trial(self, line: str) -> None:
        """One command with one thing spoilt."""
        words = line.split()
        trains = words[0] in LIMIT_S
        if self.draw.random() < 0.5:
            place = self.draw.randrange(1, len(words))
            choice = self.draw.choice(WORDS)
            words[place] = "." if trains and choice in NOWHERE else choice
            self.run(words, "")
        else:
            # What trains reads the corpora and its run folder without their being named.
            names = [*words, "corpus", "corpus-validation", "run"] if trains else words
            named = [p for p in self.files if p.relative_to(self.folder).parts[0] in names]
            path = self.draw.choice(named or self.files)
            with self.spoilt(path) as how:
                self.run(words, how)

    @contextlib.contextmanager
    def spoilt(self, path: Path) -> Iterator[str]:
        """The file as it should not be; afterwards as it was."""
        content = path.read_bytes()
        kind = self.draw.choice(
            ("cut", "flip", "noise", "empty", "gone", "folder", "bom", "value", "value", "value")
        )
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.write_bytes(getattr(self, f"_{kind}")(content))
        try:
            yield f"{kind} {path.name}"
        finally:
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _cut(self, content: bytes) -> bytes:
        return content[: self.draw.randrange(len(content))]

    def _flip(self, content: bytes) -> bytes:
        spoilt = bytearray(content)
        # Headers are where a flip means most.
        near = min(len(content), self.draw.choice((64, 4096, len(content))))
        for _ in range(self.draw.choice((1, 1, 20))):
            spoilt[self.draw.randrange(near)] ^= 1 << self.draw.randrange(8)
        return bytes(spoilt)

    def _noise(self, content: bytes) -> bytes:
        return self.draw.randbytes(self.draw.choice((1, 100, len(content))))

    def _empty(self, content: bytes) -> bytes:
        return b""

    def _bom(self, content: bytes) -> bytes:
        return b"\xef\xbb\xbf" + content

    def _value(self, content: bytes) -> bytes:
        """Another value somewhere in the JSON, a line of JSON, or a line of TOML."""
        lines = content.splitlines(keepends=True) or [b""]
        with contextlib.suppress(ValueError):
            return json.dumps(self._other(json.loads(content))).encode()
        place = self.draw.randrange(len(lines))
        with contextlib.suppress(ValueError):
            lines[place] = json.dumps(self._other(json.loads(lines[place]))).encode() + b"\n"
            return b"".join(lines)
        key, equals, _ = lines[place].partition(b"=")
        text = self.draw.choice((*WORDS, "[" * 3000, "'x'", "1e400", "1979-05-27", "{}"))
        lines[place] = key + (equals or b"=") + text.encode("utf-8", "surrogateescape") + b"\n"
        return b"".join(lines)

    def _other(self, tree: Any) -> Any:
        if isinstance(tree, dict | list) and tree and self.draw.random() < 0.9:
            keys = list(tree) if isinstance(tree, dict) else range(len(tree))
            key = self.draw.choice(keys)
            if self.draw.random() < 0.2:
                del tree[key]
            else:
                tree[key] = self._other(tree[key])
            return tree
        return self.draw.choice(VALUES)

    def run(self, words: list[str], how: str) -> None:
        """Runs the command in the folder; what is wrong with its end goes to `failures`."""
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        trains = words[0] in LIMIT_S
        code, said = self.run_warm(words) if trains else self.run_here(words)
        self.codes[code] += 1
        if code not in CODES or "Traceback" in said:
            self.fail(words, how, f"exit code {code}: {said[-3000:]}")
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", said):
            self.fail(words, how, f"acts on a terminal: {said!r:.300}")

    def run_warm(self, words: list[str]) -> tuple[int, str]:
        """(exit code, what was printed) of a command that trains; the folder is laid out anew."""
        self.warm = self.warm or Warm()
        try:
            return self.warm.run(words, self.folder)
        finally:
            self.lay_out()

    def run_here(self, words: list[str]) -> tuple[int, str]:
        """(exit code, what was printed) of a command within this process."""
        said = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            return _called(words), said.getvalue()

    def fail(self, words: list[str], how: str, why: str) -> None:
        """Remember a failure."""
        self.failures.append(f"{' '.join(word[:60] for word in words)!r} ({how}): {why}")


def campaign(
    folder: Path, trials: int, seed: int, commands: tuple[str, ...] = COMMANDS
) -> Campaign:
    """So many trials, every command in turn."""
    made = Campaign(folder / "copy", seed)
    try:
        for number in range(trials):
            made.trial(commands[number % len(commands)])
    finally:
        if made.warm:
            made.warm.close()
    return made


def _late(signum: int, frame: object) -> None:
    raise TimeoutError("not done in time")


signal.signal(signal.SIGALRM, _late)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help="see Warm")
    parser.add_argument("--training", action="store_true", help="only what trains, and doctor")
    given = parser.parse_args()
    if given.serve:
        sys.exit(serve())
    with tempfile.TemporaryDirectory() as place:
        commands = HEAVY if given.training else (*COMMANDS, *HEAVY)
        done = campaign(Path(place), given.trials, given.seed, commands)
    for failure in done.failures:
        print(failure)
    print(f"{given.trials} trials, exit codes {dict(done.codes)}, {len(done.failures)} failures")
