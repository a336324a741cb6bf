"""Hostile names through every writer of another language: each reader gets the name, or is spared.

The languages: sbatch's lines, the shell, TOML's overrides, HTML, JSON within a page, matplotlib's
texts, rich's markup and the terminal.
"""

import dataclasses
import html
import io
import json
import random
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest
from rich.console import Console

from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.config import parse_run
from megagpt.config.presets import ModelConfig
from megagpt.config.sections import DataSource
from megagpt.errors import UsageError, visible
from megagpt.hub.card import model_card
from megagpt.hub.compare import Comparison
from megagpt.log.markdown import cell
from megagpt.report.dashboard import frame
from megagpt.report.page import script_data, write_page
from megagpt.report.picture import draw_runs
from megagpt.report.series import Run, read_run
from megagpt.run.folder import summary
from megagpt.submit.job import directive, pattern, script, sweep_of, toml
from tests.lib.corpus import run_file, write_corpus
from tests.lib.weights import weights_folder
from tests.report.test_report import CONFIG, make_run

PIECES = [
    *"ab \\'\"$`;&|<>(){}[]*?~!%#=,:/_^-",
    *(
        "$(id)",
        "${HOME}",
        "<!--<script>",
        "</script>",
        "]]>",
        "&lt;",
        r"$\foo$",
        "[/red]",
        "[bold]",
    ),
    *("%j", "%a", "\N{GREEK SMALL LETTER ALPHA}", "\N{HIRAGANA LETTER A}"),
]
"""What means something in one of the languages."""
CONTROLS = [
    "\n",
    "\necho PWNED; #",
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\r",
    "\x9b2J",
    "\u202e",
    "\u2028",
    "\udcff",
]
"""What acts on a terminal or ends a line, and half a character."""


def drawn(count: int, more: list[str], seed: int = 14) -> list[str]:
    draw = random.Random(seed)
    names = ["".join(draw.choices([*PIECES, *more], k=draw.randint(1, 8))) for _ in range(count)]
    return [
        f"<!--<script>{names[0]}",
        r"$\foo$",
        "_hidden",
        "x\necho PWNED; #"[: 99 if more else 1],
        *names,
    ]


LINES = drawn(60, [])
"""Names in one line."""
TEXTS = drawn(60, CONTROLS)


# --- SLURM and the shell ------------------------------------------------------------------------


def read_by_sbatch(line: str) -> list[str]:
    """The options of a line, by the rules of sbatch's own reader (src/sbatch/opt.c)."""
    words, word, quote, escaped, begun = [], "", "", False, False
    for letter in line.removeprefix("#SBATCH"):
        if letter.isspace() and not quote:
            words, word, begun = (words + [word] if begun else words), "", False
            escaped = False
            continue
        begun = True
        if escaped:
            escaped, word = False, word + letter
        elif letter == "\\":
            escaped = True
        elif letter == quote:
            quote = ""
        elif not quote and letter in "\"'":
            quote = letter
        elif not quote and letter == "#":
            break
        else:
            word += letter
    assert not quote, line
    return words + [word] if begun else words


def test_sbatch_reads_what_was_meant():
    for name in LINES:
        assert read_by_sbatch(f"#SBATCH --job-name={directive(name)}") == [f"--job-name={name}"]


@pytest.mark.skipif(not shutil.which("sbatch"), reason="no SLURM is installed here")
def test_sbatch_itself_reads_what_was_meant(tmp_path):
    """It says what it found in a script before it looks for a controller, which there is none."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=test\nSlurmctldHost=localhost\nNodeName=localhost\nAuthType=auth/none\n"
        "PartitionName=low Nodes=localhost Default=YES\n"
    )
    lines = "".join(f"#SBATCH --comment={directive(name)}\n" for name in LINES)
    (tmp_path / "job").write_text(f"#!/bin/bash\n{lines}exit\n")
    done = subprocess.run(
        ["sbatch", "-vvv", tmp_path / "job"],
        env={"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.findall(r'Found in script, argument "--comment=(.*)"', done.stderr)
    assert found == LINES, done.stderr[:500]


def test_a_job_runs_nothing_but_its_own_lines():
    for name in LINES:
        text = script({"job-name": name}, [f"{name}.toml", *TEXTS[:3]], [[f"output={name}"], ["b"]])
        head, _, rest = text.partition("case $SLURM_ARRAY_TASK_ID in\n")
        assert all(line.startswith(("#", "#SBATCH --job-name=")) for line in head.splitlines())
        body, _, _ = rest.rpartition("\nexport PYTHON")
        shell = subprocess.run(
            ["bash", "-c", f'case 0 in\n{body}\nprintf "%s\\0" "$@"'],
            capture_output=True,
            timeout=60,
        )
        assert shell.stderr == b""
        words = shell.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]
        assert words == [f"{name}.toml", *TEXTS[:3], f"output={name}"]


@pytest.mark.parametrize("name", ["x\necho PWNED", "a\rb", "\x1b[0m", "\udcff", "a\u2028b", "a\0"])
@pytest.mark.parametrize("option", ["--name", "--partition", "--account", "--qos"])
def test_what_no_line_can_hold_is_refused_and_nothing_is_written(tmp_path, capsys, name, option):
    if option != "--name" and name != "x\necho PWNED":
        return
    size = ("--nodes", "1", "--gpus-per-node", "2", "--time", "1:00:00")
    assert main(["launch", "slurm", str(run_file(tmp_path)), *size, option, name]) == 2
    assert re.search(r"one line of UTF-8|the character NUL", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_a_newline_is_refused(capsys, tmp_path):
    (tmp_path / "evil.toml").write_text(CONFIG.replace('"runs/x"', r'"runs/a\necho PWNED; #"'))
    size = ("--nodes", "1", "--gpus-per-node", "2", "--time", "1:00:00")
    assert main(["launch", "slurm", str(tmp_path / "evil.toml"), *size]) == 2
    assert "output = 'runs/a\\necho PWNED; #': must be one line" in capsys.readouterr().err


def test_the_log_lies_where_the_run_is():
    assert pattern("runs/50%j") == "runs/50%%j"
    with pytest.raises(UsageError, match="SLURM replaces nothing in the name of a log"):
        pattern(r"runs/a\b")


def test_a_job_for_the_current_folder_has_its_name(tmp_path, monkeypatch):
    file = run_file(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    size = ("--nodes", "1", "--gpus-per-node", "2", "--time", "1:00:00")
    assert main(["launch", "slurm", str(file), "output=.", *size]) == 0
    assert "#SBATCH --job-name=here\n" in Path("job.sbatch").read_text()


def test_what_is_told_to_be_typed_next_can_be_typed(tmp_path, capsys, monkeypatch):
    name = "a $(id) 'b"
    monkeypatch.chdir(tmp_path)
    size = ("--nodes", "1", "--gpus-per-node", "2", "--time", "1:00:00")
    assert main(["launch", "slurm", str(run_file(tmp_path)), f"output={toml(name)}", *size]) == 0
    command = capsys.readouterr().out.split("not submitted: say --submit, or ")[1]
    assert shlex.split(command) == ["sbatch", f"{name}/job.sbatch"]
    shutil.rmtree(tmp_path / name)
    make_run(tmp_path / name)
    told = summary(parse_run(CONFIG, [f"output={toml(name)}"]))
    commands = dict(re.findall(r"(tensorboard --logdir|megagpt \w+) (.*)", told))
    assert shlex.split(commands["tensorboard --logdir"]) == [f"{name}/tensorboard"]
    assert shlex.split(commands["megagpt report"])[0] == name


def test_overrides_hold_a_folder_of_any_name():
    for name in LINES:
        assert parse_run(CONFIG, [f"output={toml(name)}"]).output == name
    points = sweep_of(["seed=1,2"], '"a"#b')
    assert [parse_run(CONFIG, p).output for p in points] == ['"a"#b/seed-1', '"a"#b/seed-2']


def test_values_that_a_name_cannot_tell_apart_have_folders_of_their_own():
    points = sweep_of(["log.wandb=a b,a-b"], "runs/x")
    assert len({point[-1] for point in points}) == 2


# --- the report ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("report") / "run", restart=True))


class Tags(HTMLParser):
    """The elements of a page in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[object] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))


def hostile(run: Run, name: str) -> Run:
    """The run with the name wherever a text can stand."""
    events = [e | {"reason": name} for e in run.events]
    spike = {"event": "spike", "step": 5, "tokens": 5000, "time": 1.0, "reason": name}
    sources = {"sources": {name: {"epochs": 0.5}, "b": {"epochs": 0.1}}}
    steps = [step | sources for step in run.steps]
    evaluations = [e | {"validation_losses": {name: 3.0, "b": 2.0}} for e in run.evaluations]
    facts = {"layout": name}
    return dataclasses.replace(
        run, name=name, steps=steps, events=[*events, spike], evaluations=evaluations, facts=facts
    )


def test_a_page_is_the_same_page_for_every_name(recorded, tmp_path):
    pages = {}
    for name in ["harmless", *TEXTS]:
        pair = [hostile(recorded, name), dataclasses.replace(recorded, name="other")]
        pages[name] = write_page(pair, tmp_path / "report.html").read_text(encoding="utf-8")
    expected = Tags(pages["harmless"]).tags
    for name, page in pages.items():
        assert Tags(page).tags == expected, name
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
        assert "<" not in data
        loss = json.loads(data)["charts"][0]
        assert loss["lines"][1]["name"] == name
        assert visible(name) in (text := html_unescaped(page)), name
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def html_unescaped(page: str) -> str:
    return html.unescape(page.partition('<script type="application/json"')[0])


def test_data_of_a_page_is_what_it_was():
    for name in TEXTS:
        assert json.loads(script_data({name: [name]})) == {name: [name]}


def test_a_picture_is_drawn_for_every_name(recorded, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels = []
    legend = Axes.legend

    def spied(axes, *args, **options):
        made = legend(axes, *args, **options)
        labels.extend(text.get_text() for text in made.get_texts())
        return made

    monkeypatch.setattr(Axes, "legend", spied)
    names = TEXTS[:12]
    path = draw_runs([hostile(recorded, name) for name in names], tmp_path / "report.png")
    assert path.stat().st_size > 20_000
    assert len([label for label in labels if label.endswith(tuple("0123456789"))]) == len(names)
    draw_runs([hostile(recorded, r"$\foo$")], path)


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "td":
            self.cells.append("")
        else:
            assert tag in ("table", "thead", "tbody", "tr", "th"), tag

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_a_cell_of_a_table_holds_any_text():
    # As TensorBoard does it.
    convert = markdown.Markdown(extensions=["tables"]).convert
    for name in TEXTS:
        text = " ".join(visible(name).split())
        made = Cells(convert(f"| | |\n|---|---|\n| {cell(name)} | end |\n")).cells
        assert [one.strip() for one in made] == [text, "end"], name


def test_the_card_of_a_model_holds_any_name(tmp_path):
    shape = ModelConfig(n_layer=1, n_head=2, d_model=16, n_ctx=8, vocab_size=257)
    weights_folder(tmp_path / "made", shape, "bytes")
    made = open_weights(tmp_path / "made")
    found = Comparison(
        difference=0.0,
        largest=1.0,
        tokens=1,
        other_tokens=0,
        texts=1,
        other_texts=0,
        tolerance=1e-5,
    )
    convert = markdown.Markdown(extensions=["tables"]).convert
    for name in TEXTS:
        text, folder = " ".join(visible(name).split()), name.replace("/", "") or "x"
        data = dataclasses.replace(made.config.data, train=(DataSource(path=name),))
        weights = dataclasses.replace(
            made,
            config=dataclasses.replace(made.config, data=data),
            facts=made.facts | {"tokens": 1, "tokenizer": f"x/{folder}"},
        )
        card = model_card(weights, tmp_path / folder, found, "fp32", name)
        rows = [line for line in card.splitlines() if line.startswith("|")]
        cells = [one.strip() for one in Cells(convert("\n".join(rows))).cells]
        assert f"{text} (weight 1)" in cells, name
        short = " ".join(visible(folder).split())
        assert any(one.endswith(f"tokenizer {short}".strip()) for one in cells), name
        assert f"\n# {cell(folder)}\n" in card and f" Over {cell(name)} the" in card


# --- the terminal -------------------------------------------------------------------------------

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def test_what_is_visible_stands_there_and_says_what_it_was():
    for name in TEXTS:
        assert not ACTING.search(visible(name))
    for name in LINES:
        assert visible(name) == name
    assert (
        visible("a\x1b[31m\r\x9b\u202e\ud800\udcff\t\n")
        == "a\\x1b[31m\\x0d\\x9b\\u202e\\ud800\\xff\t\n"
    )


def test_the_dashboard_shows_every_name(recorded):
    for name in TEXTS:
        console = Console(file=io.StringIO(), width=300, color_system=None)
        console.print(frame(hostile(recorded, name), 1e9, 300))
        text = console.file.getvalue()
        assert not ACTING.search(text)
        [first] = visible(name).splitlines()[:1] or [""]
        assert first.strip() in text.splitlines()[0] or "\t" in name, name


def test_documents_act_on_no_terminal(tmp_path, capsys):
    texts = ["\x1b]0;owned\x07\x1b[2J", "plain \x9b31m", "line\nline\r\n", "\u202eright"]
    write_corpus(tmp_path / "corpus", texts)
    assert main(["data", "inspect", str(tmp_path / "corpus"), "--documents", "9"]) == 0
    out = capsys.readouterr().out
    assert not ACTING.search(out)
    assert "\\x1b]0;owned\\x07\\x1b[2J" in out and "line\nline\\x0d\n" in out


def test_names_in_messages_act_on_no_terminal(tmp_path, capsys):
    for name in TEXTS:
        assert main(["plan", str(tmp_path / name.replace("/", "-"))]) == 2
        found = capsys.readouterr().err
        assert not ACTING.search(found) and "cannot read the run file" in found
