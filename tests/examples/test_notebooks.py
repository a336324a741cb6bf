"""The notebooks, cell by cell as Jupyter runs them, with smaller figures in their second cell."""

import re
import shutil
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

from megagpt.checkpoint.export import open_weights
from megagpt.hub.exporting import write_export
from tests.lib.distributed import ROOT, environment
from tests.lib.weights import banded, weights_folder


def executed(root: Path, name: str, **values: object) -> str:
    """What a copy of the notebook prints, in a folder of its own, with other values in the cell
    that sets them."""
    shutil.copytree(ROOT / "examples", root / "examples")
    notebook = nbformat.read(root / "examples" / name, as_version=4)
    nbformat.validate(notebook)
    cell = notebook.cells[1]
    for key, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value!r}", cell.source)
        assert count == 1, key
    place = {"metadata": {"path": str(root / "examples")}}
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources=place)
    client.execute(env=environment())
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    assert any("image/png" in one.get("data", {}) for one in outputs), "a picture is shown"
    return "".join(one.text for one in outputs if one.get("name") == "stdout")


def test_the_demo_that_sorts(tmp_path: Path) -> None:
    printed = executed(tmp_path, "demo.ipynb", STEPS=30)
    assert "536 records of 12 tokens" in printed and "85584 parameters" in printed
    assert re.search(r"\[2, 0, 1, 2, 1, 0\] -> \[[012](, [012]){5}\]\ntest: \d+ of 193\n$", printed)
    assert (tmp_path / "runs/demo/metrics.jsonl").exists()


def test_the_demo_of_generation_reads_what_transformers_reads(tmp_path: Path) -> None:
    weights_folder(tmp_path / "ours", banded(n_ctx=64), "bytes")
    source, theirs = open_weights(tmp_path / "ours"), tmp_path / "theirs"
    theirs.mkdir()
    write_export(source, source.tokenizer(), theirs, torch.float32, 10**9)
    printed = executed(tmp_path, "generate.ipynb", MODEL=str(theirs), TOKENS=8)
    assert "257 tokens" in printed
    assert printed.count("The lighthouse keeper") == 5 and printed.count("-----") == 4
    assert re.search(r"next: '.*', [\d.]+%\n$", printed)
