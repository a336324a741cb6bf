"""The page of a report: its data, its table, and that a browser draws it."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megagpt.log.units import amounts
from megagpt.report.charts import charts, chinchilla, frontier, kaplan
from megagpt.report.page import samples, write_page
from megagpt.report.series import read_facts, read_run, read_runs
from megagpt.report.table import facts, restart_rows, shares
from tests.report.test_report import CONFIG, make_run, parse


def data_of(page: Path) -> list[dict]:
    return content_of(page)["charts"]


def content_of(page: Path) -> dict:
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
    # Both have the same rates: the second is drawn with gaps, so that the first is seen below it.
    rates = [(line["name"], line["over"]) for line in found["learning rate"]["lines"]]
    assert rates == [("a", 0), ("b", 1)]
    assert found["loss"]["lines"][-1]["x"] == [20_000.0, 40_000.0]
    compute = [line["name"] for line in found["loss over compute"]["lines"]]
    # Runs of a few thousand tokens are beyond what the published laws were fitted to.
    assert compute[-1] == "b, validation"
    assert "laws are not drawn" in found["loss over compute"]["note"]
    steps = [line for line in found["time of a step"]["lines"] if line["kind"] == "line"]
    assert [(line["name"], line["run"]) for line in steps] == [("a", 0), ("b", 1)]


def test_a_large_run_has_the_laws_and_its_utilization(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    step = {"loss": 3.0, "batch_tokens": 524_288, "tokens_per_s": 1e6, "mfu": 0.4}
    step |= {"step_s": 0.5, "data_s": 0.1, "memory_peak_bytes": 7e9}
    lines = [{**step, "step": i, "tokens": i * 10**9} for i in (1, 100, 300)]
    lines.append({"tokens": 3e11, "validation_loss": 3.0, "validation_bits_per_byte": 0.97})
    run = read_facts(tmp_path, lines)
    assert dict(facts(run))["bits per byte"] == "0.9700" and dict(facts(run))["MFU"] == "40.0%"
    found = {chart["title"]: chart for chart in charts([run])}
    stack = [(line["name"], line["y"]) for line in found["time of a step by part"]["lines"]]
    # The first is the top of the stack; what no part tells of is the loop.
    assert stack == [("the loop itself", [0.4] * 3), ("data", [0.1] * 3)]
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


def test_laws_are_not_drawn_for_a_small_vocabulary(tmp_path):
    """However much compute: its losses are nats of shorter pieces of text."""
    (tmp_path / "config.toml").write_text(CONFIG + "[model]\nvocab_size = 4096\n")
    lines = [{"loss": 3.0, "step": i, "tokens": i * 10**9} for i in (1, 300)]
    [chart] = (c for c in charts([read_facts(tmp_path, lines)]) if c["title"].endswith("compute"))
    assert [line["name"] for line in chart["lines"]] == ["training"]
    assert "1e-6 PF-days or more with vocabularies of 32,000 tokens" in chart["note"]


@pytest.mark.parametrize("several", [False, True])
def test_figures_of_a_kind_share_a_chart_of_one_run_and_have_one_each_of_several(tmp_path, several):
    def step(number: int) -> dict:
        sources = {"web": {"epochs": 0.0}, "books": {"epochs": 0.1 * number}}
        losses = {"validation_losses": {"web": 3.0, "books": 2.0}, "validation_loss": 2.5}
        memory = {"memory_peak_bytes": 7e9, "host_memory_bytes": 1e9}
        step = {"loss": 3.0, "sources": sources} | losses | memory
        return step | {"step": number, "tokens": 10 * number}

    lines = [step(1), step(2)]
    runs = [read_facts(tmp_path, lines, name) for name in (["a", "b"] if several else ["a"])]
    found = {chart["title"]: [x["name"] for x in chart["lines"]] for chart in charts(runs)}
    found = {name: lines for name, lines in found.items() if lines and name != "loss"}
    if several:
        assert found == dict.fromkeys(
            ["validation loss of web", "validation loss of books", "epochs of web"]
            + ["epochs of books", "memory of rank 0: host memory", "memory of rank 0: memory peak"],
            ["a", "b"],
        )
    else:
        assert found == {
            "validation loss of each set": ["web", "books"],
            "epochs of each source": ["web", "books"],
            "memory of rank 0": ["host memory", "memory peak"],
        }
    # What was never read is drawn at 0.
    [web] = [x for x in charts(runs) if x["title"].startswith("epochs")][0]["lines"][:1]
    assert web["y"] == [0.0, 0.0]


def test_axes_of_steps_and_hours(tmp_path):
    """600 s of training, of which a kill costs two steps; an hour without a process is no hour of
    the run."""
    step = {"loss": 3.0}
    lines = [
        {"event": "start", "step": 0, "tokens": 0, "time": 1000.0},
        {**step, "step": 1, "tokens": 10, "time": 1100.0},
        {"event": "resume", "step": 1, "tokens": 10, "time": 4900.0, "down_s": 3600.0},
        {**step, "step": 2, "tokens": 20, "time": 5000.0},
        {**step, "step": 3, "tokens": 40, "time": 5200.0},
    ]
    run = read_facts(tmp_path, lines, "a")
    page = write_page([run], tmp_path / "report.html")
    assert content_of(page)["runs"] == [
        {
            "name": "a",
            "tokens": [0.0, 10.0, 20.0, 40.0],
            "steps": [0.0, 1.0, 2.0, 3.0],
            "hours": pytest.approx([0.0, 100 / 3600, 400 / 3600, 600 / 3600]),
        }
    ]
    # Of a record without times, the seconds of the steps; without those, none.
    bare = [{**step, "step": n, "tokens": 10 * n, "step_s": 36.0} for n in (1, 2)]
    assert read_facts(tmp_path, bare).hours == pytest.approx([0.01, 0.02])
    assert read_facts(tmp_path, [{**step, "step": 1, "tokens": 10}]).hours is None


def test_restarts_of_several_runs_are_marked_in_their_colours(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", restart=True)])
    [mark] = charts(runs)[0]["marks"]
    assert mark["text"].startswith("b: restart at step 20") and mark["run"] == 1
    assert mark["colour"] == charts(runs)[0]["lines"][-1]["colour"]


def test_the_texts_of_a_run_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "samples").mkdir()
    for step in (*range(0, 61, 6), 90):
        text = f"--- 1 of 1 ---\n<b>at {step}</b>\x1b[31m" + "x" * 5000 * (step == 60)
        (folder / "samples" / f"step_{step:08d}.txt").write_text(text)
    (folder / "samples" / "step_notes.txt").write_text("mine")
    run = read_run(folder)
    # The last and the first, and some between; none of a step that the record does not have.
    assert [sample.step for sample in samples(run)] == [60, 48, 36, 24, 12, 0]
    assert samples(run)[0].tokens == 60_000 and len(samples(run)[0].text) == 4004
    text = write_page([run], tmp_path / "report.html").read_text()
    assert "<details open><summary>run, step 60, 60k tokens</summary><pre>--- 1 of 1 ---" in text
    assert "&lt;b&gt;at 48&lt;/b&gt;\\x1b[31m" in text and "mine" not in text


def test_the_images_of_a_run_are_in_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "samples").mkdir()
    png = b"\x89PNG\r\n\x1a\n" + bytes(40)
    (folder / "samples" / "step_00000020.png").write_bytes(png)
    (folder / "samples" / "step_00000040.png").write_bytes(png + bytes(1_000_000))
    text = write_page([read_run(folder)], tmp_path / "report.html").read_text()
    [data] = re.findall(
        r'<img alt="run, step 20, 20k tokens" src="data:image/png;base64,(.*?)">', text
    )
    assert base64.b64decode(data) == png and "Images that the model made" in text
    assert "img-src data:;" in text


def test_the_usual_step_of_several_runs_is_divided(tmp_path):
    def run(name: str, seconds: float):
        step = {"loss": 3.0, "step_s": seconds, "forward_s": seconds / 4, "backward_s": seconds / 2}
        return read_facts(tmp_path, [{**step, "step": n, "tokens": n} for n in (1, 2)], name)

    text = write_page([run("a", 2.0), run("b", 1.0)], tmp_path / "report.html").read_text()
    for part in ("forward 0.5 s (25.0%)", "backward 1 s (50.0%)", "the loop itself 0.25 s (25.0%)"):
        assert f'title="{part}"' in text
    # The bars are as long as the steps: a forward of 0.5 s of 2 s.
    assert 'title="forward 0.5 s (25.0%)" style="width:25.0000%' in text
    assert 'title="forward 0.25 s (25.0%)" style="width:12.5000%' in text


def test_the_labels_of_an_axis_are_told_apart():
    """As the page's own script labels it, by tests of its pixels; here the picture's."""
    assert amounts([0.0, 0.5, 1.0]) == ["0", "0.5", "1"]
    assert amounts([-5.5e-17, 0.1, 0.2]) == ["0", "0.1", "0.2"]
    assert amounts([1.00001, 1.00002, 1.00003]) == ["1.00001", "1.00002", "1.00003"]
    assert amounts([0.0, 5e-4, 1e-3, 1.5e-3]) == ["0", "5e-4", "1e-3", "1.5e-3"]
    assert amounts([100_000, 100_010]) == ["100k", "100.01k"]
    assert amounts([1.00001e-4, 1.00002e-4]) == ["1.00001e-4", "1.00002e-4"]
    assert amounts([0.0, 2e9, 4e9]) == ["0", "2B", "4B"] and amounts([3.0]) == ["3"]


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
    args.run(args)
    assert (tmp_path / "run" / "report.html").is_file()
    assert capsys.readouterr().out.endswith("report.html\n")


PROBE = """
<script>
const shown = (colour) => document.location.hash ? shade(colour) : colour;
const seen = PLOTS.map((plot, i) => {
  const { canvas } = plot.ctx, { data } = plot.ctx.getImageData(0, 0, canvas.width, canvas.height);
  const pixels = {};
  for (let p = 0; p < data.length; p += 4) {
    const colour = "#" + [0, 1, 2].map((k) => data[p + k].toString(16).padStart(2, "0")).join("");
    pixels[colour] = (pixels[colour] || 0) + (data[p + 3] === 255);
  }
  return {
    title: CHARTS[i].title,
    colours: CHARTS[i].lines.filter((l) => l.kind !== "faint")
      .map((l) => pixels[shown(l.colour)] || 0),
    marked: CHARTS[i].marks.map((m) => pixels[shown(m.colour)] || 0),
    labels: plot.axes.map((axis) => axis._values),
    ranges: ["x", "y"].map((name) => [plot.scales[name].min, plot.scales[name].max]),
  };
});
document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
</script>
"""
"""Counts, for each chart that uPlot drew, the pixels that have the colour of each of its lines."""


def dom_of(page: Path, folder: Path, *options: str, hash: str = "") -> str:
    """The page as a browser has built it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *options]
    return subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", page.as_uri() + hash],
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
        for labels in drawn["labels"]:
            assert len(labels) == len(set(labels)) and len(labels) > 1, chart["title"]
    assert all(count > 20 for count in seen[0]["colours"]) and seen[0]["marked"][0] > 5
    # In the dark every line has the colour that stands for its own.
    dark = "--blink-settings=preferredColorScheme=0"
    night = json.loads(dom_of(page, tmp_path, dark, hash="#night").split("SEEN")[-2])
    assert all(max(drawn["colours"]) > 20 for drawn in night)
    # Over steps instead of tokens.
    choose = 'document.querySelectorAll("#axis input")[1].click();'
    page.write_text(page.read_text().replace(PROBE[:10], f"<script>{choose}</script>{PROBE[:10]}"))
    over = json.loads(dom_of(page, tmp_path).split("SEEN")[-2])
    assert [over[0]["ranges"][0], seen[0]["ranges"][0]] == [[0, 60], [0, 60_000]]
