"""Preparation side by side: CPU seconds, wall seconds and peak memory on the same JSON lines.

    python benchmarks/data_prep.py [--megatron CHECKOUT] [--megabytes 80] [--workers 2]

The input is made from text files of this machine unless --input names one. Raw tiktoken reads the
lines and calls encode_ordinary, nothing else. What is not there is left out of the table. CPU
seconds count all child processes; memory is the largest sum of the processes' proportional set
sizes, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("/usr/share/doc", "/usr/include", str(Path(os.__file__).parent))
PIECE = 20_000
"""Characters of a document of the made input."""
RAW = """
import json, sys
from megagpt.tokenizer import load_tokenizer
encode = load_tokenizer("gpt2").encode_ordinary
print(sum(len(encode(json.loads(line)["text"])) for line in open(sys.argv[1], "rb")))
"""


def make_input(path: Path, size: int) -> None:
    """About `size` bytes of JSON lines from the text files of this machine, in a fixed order."""
    files = [file for folder in FOLDERS for file in Path(folder).rglob("*") if file.is_file()]
    files.sort(key=lambda file: hashlib.sha256(str(file).encode()).digest())
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            try:
                text = file.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), PIECE):
                line = json.dumps({"text": text[start : start + PIECE]}, ensure_ascii=False)
                written += out.write(line + "\n")
            if written >= size:
                return


def memory_bytes(root: int) -> int:
    """Proportional set size of a process and all its descendants."""
    import psutil

    total = 0
    try:
        process = psutil.Process(root)
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def measure(command: list[str], env: dict[str, str]) -> tuple[float, float, float, str]:
    """(CPU seconds, wall seconds, peak memory in MB, standard output) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    t0 = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        peak = 0

        def watch() -> None:
            nonlocal peak
            while child.poll() is None:
                peak = max(peak, memory_bytes(child.pid))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        out = child.communicate()[0]
        watcher.join()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[1:3]} failed: {errors.read()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - t0, peak / 1e6, out


def commands(args: argparse.Namespace, path: Path, work: Path) -> dict[str, list[str]]:
    """Name -> command, of all that is there."""
    prepare = [
        sys.executable, str(ROOT / "data_prep/tokenize_corpus.py"), str(path),
        "--workers", str(args.workers),
    ]  # fmt: skip
    result = {"raw tiktoken (encode_ordinary, 1 process)": [sys.executable, "-c", RAW, str(path)]}
    for backend in ("tiktoken", "fastokens"):
        output = ["--backend", backend, "--output", str(work / backend / "web")]
        result[f"megagpt, {backend}"] = [*prepare, *output]
    if args.megatron:
        vocabulary = write_vocabulary(work)
        result["Megatron-LM preprocess_data.py"] = [
            sys.executable, str(args.megatron / "tools/preprocess_data.py"),
            "--input", str(path), "--output-prefix", str(work / "megatron"),
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(vocabulary),
            "--append-eod", "--workers", str(args.workers), "--log-interval", "100000",
        ]  # fmt: skip
    return result


def write_vocabulary(work: Path) -> Path:
    """GPT-2's tokenizer as a folder that transformers opens without a network."""
    from megagpt.tokenizer import END_OF_DOCUMENT
    from megagpt.tokenizer.gpt2 import gpt2_merges
    from megagpt.tokenizer.json import write_tokenizer_file

    folder = work / "gpt2"
    folder.mkdir()
    write_tokenizer_file(folder / "tokenizer.json", gpt2_merges(), END_OF_DOCUMENT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def main() -> None:
    """Run everything and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, help="JSON lines with a text field")
    parser.add_argument("--megabytes", type=int, default=80, help="size of the made input")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts")
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        path = args.input or work / "input.jsonl"
        if not args.input:
            make_input(path, args.megabytes * 1_000_000)
        size = path.stat().st_size / 1e6
        versions = [f"{lib} {importlib.metadata.version(lib)}" for lib in ("tiktoken", "fastokens")]
        print(f"{size:.1f} MB of JSON lines, {args.workers} workers, {os.cpu_count()} cores, "
              f"Python {platform.python_version()}, {', '.join(versions)}\n")  # fmt: skip
        print("| | CPU s | against raw tiktoken | wall s | peak memory MB |\n|---|---|---|---|---|")
        raw = 0.0
        for label, command in commands(args, path, work).items():
            results = []
            for _ in range(args.repeats):
                for output in ("fastokens", "tiktoken"):
                    shutil.rmtree(work / output, ignore_errors=True)
                try:
                    results.append(measure(command, env))
                except RuntimeError as error:
                    print(f"| {label} | failed: {str(error).splitlines()[-1]} | | | |", flush=True)
                    break
            if results:
                cpu = min(result[0] for result in results)
                raw = raw or cpu
                wall = min(result[1] for result in results)
                peak = min(result[2] for result in results)
                row = f"{cpu:.2f} | {cpu / raw:.2f} | {wall:.1f} | {peak:.0f}"
                print(f"| {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
