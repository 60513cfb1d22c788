"""What the command line imports, and when."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from transformers_moshi_flax import cli

HEAVY = ("jax", "flax", "transformers", "torch", "numpy")


def imported(statement: str) -> set[str]:
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint('\\n', *sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    ["import transformers_moshi_flax", "from transformers_moshi_flax.cli import main; main(['--help'])"],
)
def test_little_is_imported_before_it_is_needed(statement: str) -> None:
    modules = imported(statement)
    assert "transformers_moshi_flax" in modules and not modules & set(HEAVY)


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_the_list_says_what_the_subcommands_say(name: str) -> None:
    command = cli.load(name)
    assert command.name == name
    assert inspect.cleandoc(command.help).splitlines()[0] == cli.SUBCOMMANDS[name]


def test_help_lists_all() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and all(name in result.output for name in cli.SUBCOMMANDS)


def test_help_of_one_is_its_own() -> None:
    result = CliRunner().invoke(cli.app, ["convert", "--help"])
    assert result.exit_code == 0 and "--overwrite" in result.output


def test_an_unknown_one_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["convers"])
    assert error.value.code == 2 and "convers" in capsys.readouterr().err
