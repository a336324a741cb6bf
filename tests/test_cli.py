"""The megagpt command: help for every room, codes for every end."""

import argparse
import os
import subprocess
import sys

import pytest

from megagpt import __version__, errors
from megagpt.cli import COMMANDS, main, parser
from tests.lib.distributed import ROOT


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in COMMANDS)
    assert "75 stopped" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megagpt {name}")


@pytest.mark.parametrize("name", ["train", "launch slurm", "parity", "verify-resume"])
def test_overrides_are_not_called_required(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(name.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and "required: RUN.toml" in said
    assert "key=value" not in said.splitlines()[-1]


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["evaluate"], ["checkpoint", "burn"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: megagpt" in capsys.readouterr().err


def test_only_the_called_room_is_imported():
    made = parser("plan")
    assert made.parse_args(["plan", "x.toml"]).file == "x.toml"


def test_codes_of_errors():
    codes = {c.__name__: c.exit_code for c in errors.MegagptError.__subclasses__()}
    assert codes == {"UsageError": 2, "DamageError": 3, "UnsoundError": 4, "Stopped": 75}
    assert errors.MegagptError.exit_code == 1


def test_an_error_is_one_message_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megagpt", "plan", str(tmp_path / "none.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megagpt: ") and "none.toml: cannot read" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_pipe_that_closes_early_is_no_failure(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "gpt3-125m"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n')
    line = f"{sys.executable} -u -m megagpt plan {path} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stdout.count("\n") == 1


def parsers(name):
    """A command's parser and those of its subcommands."""
    [chosen] = [a for a in parser(name)._actions if isinstance(a, argparse._SubParsersAction)]
    found = [chosen.choices[name]]
    for one in found:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                told = {choice.dest for choice in action._choices_actions if choice.help}
                assert told == set(action.choices), f"{one.prog}: a subcommand without help"
                found += action.choices.values()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    for one in parsers(name):
        silent = [
            action.option_strings or [action.dest]
            for action in one._actions
            if not action.help and not isinstance(action, argparse._SubParsersAction)
        ]
        assert not silent, f"{one.prog}: {silent}"


def completions(line, tmp_path):
    """What the shell offers behind a line."""
    answer = tmp_path / "answer"
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    environ = os.environ | variables
    done = subprocess.run(
        [sys.executable, "-m", "megagpt"], cwd=ROOT, env=environ, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in answer.read_text().split("\n")}


def test_a_shell_completes_commands_and_options(tmp_path):
    assert completions("megagpt in", tmp_path) == {"init"}
    assert {"--ranks", "--launcher"} <= completions("megagpt train --", tmp_path)
