"""The dispatcher of `python -m fp4jax.analyze`, with subcommands made up here; and the real table's modules."""

import importlib
import inspect
import sys
import types

import pytest

from fp4jax import analyze
from fp4jax.cli import Parser


@pytest.fixture
def made_up(monkeypatch):
    """A subcommand "made_up" that records its arguments; returns (record, set what it raises)."""
    module, record = types.ModuleType("made_up_module"), []
    module.error = None

    def function(arguments):
        record.append(arguments)
        if module.error is not None:
            raise module.error

    module.function = function
    monkeypatch.setitem(sys.modules, "made_up_module", module)
    monkeypatch.setitem(analyze.SUBCOMMANDS, "made_up", analyze.Subcommand("for tests", "made_up_module", "function"))
    return module, record


def test_subcommand_gets_the_rest_of_the_arguments(made_up):
    assert analyze.main(["made_up", "--quick", "--debug", "--out=x"]) == 0
    assert made_up[1] == [["--quick", "--out=x"]]


@pytest.mark.parametrize("arguments", ([], ["--help"], ["-h"]))
def test_usage_lists_every_subcommand(arguments, capsys):
    assert analyze.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and row.summary in printed for name, row in analyze.SUBCOMMANDS.items())


def test_unknown_subcommand_is_one_line(made_up, capsys):
    assert analyze.main(["geomtry"]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: unknown subcommand 'geomtry'; there are: {', '.join(analyze.SUBCOMMANDS)}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("p must be in (0, .5)\nsecond line"), 1, "error: p must be in (0, .5)\n"),
        (FileNotFoundError("no file x"), 1, "error: no file x\n"),
        (KeyError("layer"), 1, "error: KeyError: 'layer' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_are_one_line(made_up, error, code, line, capsys):
    made_up[0].error = error
    assert analyze.main(["made_up"]) == code
    assert capsys.readouterr().err == line


def test_debug_lets_the_error_through(made_up):
    made_up[0].error = ValueError("seen")
    with pytest.raises(ValueError, match="seen"):
        analyze.main(["made_up", "--debug"])


@pytest.mark.parametrize("row", analyze.SUBCOMMANDS.values(), ids=analyze.SUBCOMMANDS)
def test_every_row_names_a_function_of_arguments(row):
    function = getattr(importlib.import_module(row.module), row.function)
    assert len(inspect.signature(function).parameters) == 1


def test_parser_raises_one_line():
    parser = Parser("made_up", "for tests")
    parser.add_argument("--quick", action="store_true")
    with pytest.raises(ValueError, match=r"^made_up: unrecognized arguments: --qick \(--help lists the flags\)$"):
        parser.parse_args(["--qick"])
    with pytest.raises(ValueError, match="unrecognized arguments: --qui"):
        parser.parse_args(["--qui"])
