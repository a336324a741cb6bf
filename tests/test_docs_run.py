"""The commands of docs/ run as they are printed, on small stand-ins for what they name: a tiny
model in every run folder, a few texts in every input. What another test runs is listed with it.

README, the first tutorial, weights.md and the examples have tests of their own.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megagpt import cli
from megagpt.checkpoint import list_checkpoints
from megagpt.config import load_run
from megagpt.start.launcher import check
from tests.lib.corpus import run_file, sentences, write_corpus
from tests.lib.distributed import group_of_one
from tests.lib.here import train_here
from tests.test_docs import PAGES, ROOT, commands, without_redirect

ELSEWHERE = {
    r"make |python3 -m venv": "tests/test_docs.py",
    r"python benchmarks/": "tests/test_docs.py",
    r"(MEGAGPT_TEST_GB=\d+ )?python -m pytest": "tests/test_docs_run.py",
    r"python -m tests\.lib\.campaign": "tests/run/test_faults.py",
    r"python -m tests\.lib\.flips": "tests/run/test_flips.py",
    r"python -m tests\.lib\.corpus_flips": "tests/corpus/test_corpus_flips.py",
    r"python -m tests\.lib\.wild": "tests/run/test_wild.py",
    r"python -m tests\.lib\.hostile_commands": "tests/test_hostile_commands.py",
    r"python -m tests\.lib\.power_cuts": "tests/run/test_faults.py",
    r"python -m tests\.virtual\.ten_days": "tests/virtual/test_ten_days.py",
    r"python -m tests\.virtual\.goodput": "tests/plan/test_goodput.py",
    r"megagpt evaluate runs/questions": "tests/examples/test_examples.py",
    r"python -m tests\.lib\.hostile ": "tests/corpus/test_hostile.py",
    r"python examples/": "tests/examples/test_examples.py",
    r"python data_prep/(openwebtext|fineweb)\.py": "tests/start/test_run_files.py",
    r"python data_prep/images\.py": "tests/corpus/test_images_script.py",
    r"python -m megagpt\.tasks\.harness|.*--harness": "tests/tasks/test_harness.py",
    r"python -m megagpt\.train .*--dry-run": "tests/run/test_dry_run.py",
    r"deepspeed .*--split": "tests/use/test_shared.py",
    r"deepspeed .*spike_action": "tests/health/test_guard.py",
    r"(deepspeed|torchrun) .*megagpt\.doctor|.*--hostfile": "tests/check/test_doctor_hosts.py",
    r"megagpt parity": "tests/check/test_parity.py",
    r"megagpt verify-resume": "tests/health/test_guard_run.py",
    r"megagpt export": "tests/hub/test_export.py",
    r"megagpt chat": "tests/use/test_chat.py",
    r"megagpt serve": "tests/serve/test_serve_command.py",
    r"megagpt plan --calibrate": "tests/plan/test_beside.py",
    r"megagpt train .*openwebtext": "tests/start/test_run_files.py",
}
"""Commands that only parse here, by a pattern -> the test that runs the like of them."""
OWN = ("README.md", "first-model.md", "weights.md")
RUNS = """gpt3-125m quickstart a b c try gpt2-124m-openwebtext gpt3-1.3b-fineweb""".split()
CORPORA = "web web-validation books wiki openwebtext-validation".split()
SHORTER = {
    "--task": ["--limit", "2"],
    "--shots": ["--shots", "1"],
    "--all-checkpoints": ["--limit", "1"],
    "FILE.bin... --output": ["--output", "data/imported"],
    "--raw int32": ["--output", "data/raw"],
    "--stride": ["--stride", "64"],
    "generate": ["--max-tokens", "5"],
    "watch": ["--once"],
    "train_tokenizer.py": ["--vocab-size", "300"],
    "quickstart.toml": [
        "data.train=[{path='data/web'}]",
        "data.validation=[]",
        "model.n_ctx=64",
        "output=new",
    ],
    "tokenize_corpus.py INPUT... --output": ["--output", "data/own", "--workers", "1"],
    "--tokenizer data/tokenizer.json": ["--output", "data/own-ids", "--workers", "1"],
}
"""What makes a command short, or lets it use the stand-ins: a word of it -> words after it."""
HERE = {
    "INPUT...": "input",
    "FOLDER": "pairs --tokenizer bytes",
    "FILE.bin...": "pairs/pairs_00000.bin --tokenizer bytes",
    "FILE.bin": "pairs/pairs_00000.bin --tokenizer bytes",
    "RUN_DIR": "runs/a",
    "piqa=hf:baber/piqa:validation": "piqa=piqa.jsonl",
    "schedule.total_tokens=2000000": "schedule.total_tokens=4096",
    "--submit": "",
    "int32": "uint16",
    "data/python-stdlib": "data/python-stdlib --workers 1 --tokenizer bytes",
}
"""Words of the pages -> what stands here for them."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every name of the pages means something small."""
    root = tmp_path_factory.mktemp("docs")
    file = run_file(
        root,
        model={"n_ctx": 128, "attention": ["dense"], "band_width": 64},
        schedule={"total_tokens": 2048, "warmup_tokens": 0},
        evaluate={"batches": 1},
    )
    with group_of_one():
        train_here(file)
    for name in RUNS:
        shutil.copytree(root / "run", root / "runs" / name)
    for name in CORPORA:
        write_corpus(root / "data" / name, sentences(60, 3))
    write_corpus(root / "pairs", sentences(60, 4))
    (root / "pairs/manifest.json").unlink()
    (root / "input").mkdir()
    (root / "input/own.txt").write_text("".join(sentences(400, 5)))
    (root / "mine.toml").write_text(file.read_text().replace(f'"{root}/run"', '"runs/mine"'))
    # A batch that any number of a site's GPUs can share.
    large = file.read_text().replace("batch_tokens = 1024", "batch_tokens = 655360")
    large = re.sub(r"ramp_(start_)?tokens = \d+", r"ramp_\1tokens = 0", large)
    (root / "RUN.toml").write_text(large.replace(f'"{root}/run"', '"runs/large"'))
    for name, rows in sets().items():
        for place in (root, root / "my-sets"):
            place.mkdir(exist_ok=True)
            (place / name).write_text(rows)
    (root / "data/text8").write_text(" ".join(sentences(60, 6)))
    for name in ("launch", "data_prep", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    return root


def sets() -> dict[str, str]:
    """Rows of the tasks' files."""
    piqa = {"goal": "Open a jar", "sol1": "twist", "sol2": "shout", "label": 0}
    hellaswag = {"activity_label": "Ice", "ctx_a": "A man", "ctx_b": "then", "label": "0"}
    rows = {
        "piqa.jsonl": piqa,
        "hellaswag_val.jsonl": hellaswag | {"endings": ["goes", "stops", "reads", "writes"]},
        "lambada_test.jsonl": {"text": "a sentence that ends"},
        "lambada.jsonl": {"text": "a sentence that ends"},
    }
    lines = {name: json.dumps(row) + "\n" for name, row in rows.items()}
    return lines | {"words.txt": "reads\nwrites\nmodel\n"}


def pages() -> list[Path]:
    """The pages whose commands run here."""
    found = [page for page in PAGES if page.name not in OWN and "benchmarks" not in page.parts]
    return [page for page in found if commands(page)]


def run(line: str, root: Path) -> int:
    """A command of a page in this process; its exit code."""
    words = []
    for word in without_redirect(shlex.split(line)):
        words += HERE[word].split() if word in HERE else [word]
    words += [word for key, more in SHORTER.items() if key in line for word in more]
    if words[:2] == ["megagpt", "train"]:
        return trained(words[2:])
    if words[0] == "python":
        return script(ROOT / words[1], words[2:])
    return cli.main(words[1:])


def trained(words: list[str]) -> int:
    """What `megagpt train` checks, and then a training in this process instead of ranks."""
    overrides = [word for word in words[1:] if "=" in word]
    check(load_run(words[0], overrides), 1)
    with group_of_one():
        train_here(Path(words[0]), *overrides, allow_changes="--allow-changes" in words)
    return 0


def script(path: Path, words: list[str]) -> int:
    """A script of data_prep with these words."""
    before, sys.argv = sys.argv, [str(path), *words]
    try:
        return int(runpy.run_path(str(path), run_name="here")["main"]())
    finally:
        sys.argv = before


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(os, "environ", os.environ | {"HF_HUB_OFFLINE": "1"})
    newest = list_checkpoints(world / "run")[-1].name.removeprefix("step_").lstrip("0")
    for line in commands(page):
        if elsewhere(line):
            continue
        code = run(line.replace("--checkpoint 12000", f"--checkpoint {newest}"), world)
        said = capsys.readouterr()
        refused = "doctor" in line and ".toml" in line or "--gpus 24" in line
        assert code == (2 if refused else 0), f"{line}\n{said.out}{said.err}"
        # What a machine without the data and GPUs of a real run lacks, and nothing else.
        failed = [row for row in said.out.splitlines() if row.startswith("FAIL")]
        allowed = r"FAIL +(shards|GPUs|precision|disk|memory|versions|/dev/shm|open files)"
        assert all(re.match(allowed, row) for row in failed), said.out


def elsewhere(line: str) -> str:
    """The test that runs the like of a command; "" for one that runs here."""
    return next((test for pattern, test in ELSEWHERE.items() if re.match(pattern, line)), "")


def test_what_runs_elsewhere_is_there():
    lines = [line for page in PAGES for line in commands(page)]
    for pattern, test in ELSEWHERE.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        assert any(re.match(pattern, line) for line in lines), pattern
        words = re.findall(
            r"[a-z_-]{4,}", re.sub(r"\\.[a-z]*|python|megagpt|deepspeed", " ", pattern)
        )
        assert any(word.strip("-") in text for word in words), f"{pattern}: {test}"


def test_tests_that_the_docs_name_are_there():
    lines = [line for page in PAGES for line in commands(page) if "-m pytest" in line]
    files = [word for line in lines for word in line.split() if word.startswith("tests/")]
    assert files and all((ROOT / file).is_file() for file in files), files


def test_the_tutorials_print_what_the_commands_say(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    for name in ("tutorials/first-gpu-run.md", "tutorials/first-cluster-run.md",
                 "how-to/choose-batch-and-layout.md"):  # fmt: skip
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        pairs = re.findall(r"(?ms)^```\n(megagpt [^\n]*)\n```\n```text\n(.*?)^```", text)
        assert pairs, name
        for line, answer in pairs:
            run(line, world)
            said = capsys.readouterr()
            for expected in answer.strip().splitlines():
                assert expected in said.out + said.err, f"{line}: {expected}"
