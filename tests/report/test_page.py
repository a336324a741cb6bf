"""The page of a report: its data, its table, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megagpt.report.charts import charts, chinchilla, frontier, kaplan
from megagpt.report.page import write_page
from megagpt.report.series import read_facts, read_run, read_runs
from megagpt.report.table import facts, restart_rows, shares
from tests.report.test_report import CONFIG, make_run, parse


def data_of(page: Path) -> list[dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    return json.loads(found[1])


def test_laws_against_the_papers():
    # GPT-3 175B: 3640 PF-days, a loss of 1.73 (figure 3.1).
    assert frontier(3640) == pytest.approx(1.73, abs=0.01)
    # Chinchilla itself: 70B parameters and 1.4T tokens.
    assert chinchilla(70e9, 1.4e12) == pytest.approx(1.936, abs=0.005)
    # With data without end only the size counts: (N_c / N)^0.076.
    assert kaplan(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-3)


def test_the_page_holds_the_run(tmp_path):
    folder = make_run(tmp_path / "run", restart=True)
    page = write_page([read_run(folder)], tmp_path / "report.html")
    text = page.read_text()
    # Nothing is loaded: the only address is in uPlot's notice, and the policy forbids all others.
    assert re.findall(r"\w+://[^ ]*", text) == ["https://github.com/leeoniya/uPlot"]
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(", text)
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert "The MIT License (MIT)" in text and "Leon Sorokin" in text
    assert "<td>125M (85.1M without embeddings)</td>" in text
    assert "What the restarts cost" in text and "[data]" in text
    assert "<td>data/web (100%)</td>" in text
    found = {chart["title"]: chart for chart in data_of(page)}
    loss = found["loss"]
    names = [line["name"] for line in loss["lines"]]
    assert names == ["each step", "training", "validation"]
    assert loss["lines"][0]["x"] == [1000.0 * step for step in range(1, 61)]
    assert loss["lines"][0]["y"][9] == pytest.approx(9.0 / 10**0.3, rel=1e-4)
    assert loss["marks"][0]["x"] == 20_000 and "10 steps again" in loss["marks"][0]["text"]
    assert {"loss over compute", "batch size", "gradient norm, before clipping"} <= set(found)
    assert "loss scale" not in found  # nothing recorded


def test_names_and_files_cannot_break_the_page(tmp_path):
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>")
    (folder / "config.toml").write_text("</pre><script>alert(2)</script>")
    runs = read_runs([folder, make_run(tmp_path / "b")])
    page = write_page(runs, tmp_path / "report.html")
    text = page.read_text()
    assert "<img" not in text.split('id="data"')[0] and "<script>alert" not in text
    assert data_of(page)[0]["lines"][0]["name"].startswith("<img src=x")


def test_what_is_not_finite_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "tokens": 61000, "loss": "NaN", "grad_norm": "Infinity"}\n')
    text = json.dumps(charts([read_run(folder)]), allow_nan=False)
    assert "spike at step 61: loss nan" in text


def test_where_the_wall_time_went(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    step = {"loss": 3.0, "batch_tokens": 10, "step_s": 2.0}
    lines = [
        {"event": "start", "step": 0, "tokens": 0, "time": 100.0},
        {"step": 1, "tokens": 10, "time": 103.0, **step},
        {"event": "resume", "step": 1, "tokens": 10, "time": 115.0}
        | {"lost_steps": 1, "lost_tokens": 10, "lost_s": 2.0, "down_s": 10.0},
        {"step": 2, "tokens": 20, "time": 118.0, **step},
        {"step": 2, "tokens": 20, "time": 119.5, "validation_loss": 3.0, "evaluate_s": 1.5},
        {"event": "checkpoint", "step": 2, "tokens": 20, "time": 120.0, "stall_s": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert run.wall_s == 20.0 and run.goodput == pytest.approx(0.2)
    assert shares(run) == [
        ("useful steps", 4.0),
        ("steps done again", 2.0),
        ("down", 10.0),
        ("evaluation", 1.5),
        ("checkpoints", 0.5),
        ("the rest", 2.0),
    ]
    place = ["restart", "1970-01-01 00:01:55 UTC", "1", "10"]
    expected = [*place, "1 (10 tokens)", "2 s", "10 s", "12 s"]
    assert restart_rows(run) == [expected]
    assert dict(facts(run))["goodput"] == "20.0%"


def test_two_runs_are_compared(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", 40)])
    text = write_page(runs, tmp_path / "report.html").read_text()
    assert "<title>a and b</title>" in text and "<td>60</td><td>40</td>" in text
    found = {chart["title"]: chart for chart in charts(runs)}
    assert [line["name"] for line in found["learning rate"]["lines"]] == ["a", "b"]
    assert found["loss"]["lines"][-1]["x"] == [20_000.0, 40_000.0]
    compute = [line["name"] for line in found["loss over compute"]["lines"]]
    # Runs of a few thousand tokens are beyond what the published laws were fitted to.
    assert compute[-1] == "b, validation"
    assert "laws are not drawn" in found["loss over compute"]["note"]
    parts = [line["name"] for line in found["time of a step by part"]["lines"]]
    assert {name.split(", ")[0] for name in parts} == {"a", "b"}


def test_a_large_run_has_the_laws_and_its_utilization(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    step = {"loss": 3.0, "batch_tokens": 524_288, "tokens_per_s": 1e6, "mfu": 0.4}
    step |= {"step_s": 0.5, "data_s": 0.1, "memory_peak_bytes": 7e9}
    lines = [{**step, "step": i, "tokens": i * 10**9} for i in (1, 100, 300)]
    lines.append({"tokens": 3e11, "validation_loss": 3.0, "validation_bits_per_byte": 0.97})
    run = read_facts(tmp_path, lines)
    assert dict(facts(run))["bits per byte"] == "0.9700" and dict(facts(run))["MFU"] == "40.0%"
    found = {chart["title"]: chart for chart in charts([run])}
    assert [line["name"] for line in found["time of a step by part"]["lines"]] == ["data", "step"]
    [memory] = found["memory of rank 0"]["lines"]
    assert memory["name"] == "memory peak" and memory["y"] == pytest.approx([7e9] * 3)
    [line] = [x for x in found["model FLOPs utilization"]["lines"] if x["kind"] == "line"]
    assert line["y"] == pytest.approx([40.0] * 3)
    compute = {line["name"]: line for line in found["loss over compute"]["lines"]}
    ends = {
        "Kaplan 2020 at this size": kaplan(85_056_000, 3e11),
        "Chinchilla 2022 at this size": chinchilla(125_226_240, 3e11),
        # Its line goes on to twice the run's compute.
        "GPT-3 frontier 2.57 C^-0.048": frontier(2 * 6 * 85_056_000 * 3e11 / 8.64e19),
    }
    for name, loss in ends.items():
        assert compute[name]["y"][-1] == pytest.approx(loss, rel=1e-4)
    assert compute["training"]["x"][-1] == pytest.approx(6 * 85_056_000 * 3e11 / 8.64e19)


def test_runs_without_validation_are_named_by_their_training_loss(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = ({"step": i, "tokens": 10 * i, "loss": 3.0 / i} for i in (1, 2))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    loss = charts(read_runs([tmp_path / "a", tmp_path / "b"]))[0]
    assert [(line["name"], line["kind"]) for line in loss["lines"]] == [
        ("a", "line"),
        ("b", "line"),
    ]


def test_a_long_run_is_thinned(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    losses = 3 + np.exp(-np.arange(20_000) / 3000)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            file.write(json.dumps({"step": step, "tokens": step * 10, "loss": loss}) + "\n")
    page = write_page([read_run(folder)], tmp_path / "report.html")
    assert page.stat().st_size < 350_000
    assert data_of(page)[0]["lines"][0]["x"][-1] == 200_000


def test_the_command_writes_the_page(tmp_path, capsys):
    args = parse(make_run(tmp_path / "run"))
    assert args.run(args) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert capsys.readouterr().out.endswith("report.html\n")


PROBE = """
<script>
const seen = PLOTS.map((plot, i) => {
  const { canvas } = plot.ctx, { data } = plot.ctx.getImageData(0, 0, canvas.width, canvas.height);
  const pixels = {};
  for (let p = 0; p < data.length; p += 4) {
    const colour = "#" + [0, 1, 2].map((k) => data[p + k].toString(16).padStart(2, "0")).join("");
    pixels[colour] = (pixels[colour] || 0) + (data[p + 3] === 255);
  }
  return {
    title: CHARTS[i].title,
    colours: CHARTS[i].lines.filter((l) => l.kind !== "faint").map((l) => pixels[l.colour] || 0),
    marked: pixels["#8a94a0"] || 0,
    ranges: ["x", "y"].map((name) => [plot.scales[name].min, plot.scales[name].max]),
  };
});
document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
</script>
"""
"""Counts, for each chart that uPlot drew, the pixels that have the colour of each of its lines."""


def dom_of(page: Path, folder: Path) -> str:
    """The page as a browser has built it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    return subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_chart(tmp_path):
    page = write_page([read_run(make_run(tmp_path / "run", restart=True))], tmp_path / "r.html")
    data = data_of(page)
    dom = dom_of(page, tmp_path)
    assert dom.count("<canvas") == len(data)
    # The legend names each line, with its last value.
    text = re.sub(r"<[^>]+>", "", dom.split('id="data"')[0])
    assert "tokens60k" in text and f"validation{data[0]['lines'][2]['y'][-1]:.4g}" in text
    assert "NaN" not in text and "undefined" not in text
    page.write_text(page.read_text().replace("</main>", f"</main>{PROBE}"))
    seen = json.loads(dom_of(page, tmp_path).split("SEEN")[-2])
    assert [chart["title"] for chart in seen] == [chart["title"] for chart in data]
    for chart, drawn in zip(data, seen, strict=True):
        # A line may be covered by one of the same height, as Kaplan's never is.
        assert max(drawn["colours"]) > 20, chart["title"]
        (x0, x1), (y0, y1) = drawn["ranges"]
        lines = chart["lines"]
        assert x0 <= min(x for line in lines for x in line["x"]), chart["title"]
        assert x1 >= max(x for line in lines for x in line["x"]), chart["title"]
        assert y0 <= min(line["y"][-1] for line in lines) < y1, chart["title"]
    assert all(count > 20 for count in seen[0]["colours"]) and seen[0]["marked"] > 5
