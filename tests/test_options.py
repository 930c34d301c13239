"""Tests of what the commands share (whole commands: tests/test_cli.py)."""

from __future__ import annotations

import logging

import pytest

from tl_laai import options


def test_a_layer_that_is_no_number_is_refused_with_the_option_and_what_it_takes() -> None:
    assert options.layer_number("3", option="--layers", allowed="numbers") == 3
    with pytest.raises(ValueError, match=r"--layers holds 'three'; give numbers$"):
        options.layer_number("three", option="--layers", allowed="numbers")


def test_a_backslash_and_an_n_become_a_newline() -> None:
    assert options.newlines(r"Q: a\nA:") == "Q: a\nA:"
    assert options.newlines(r"\\nabla of \phi\n") == "\\nabla of \\phi\n"


def test_what_the_library_logs_is_shown_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = logging.LogRecord("tl_laai", logging.INFO, __file__, 1, "%d fits", (3,), None)
    options._Shown().emit(record)
    assert "3 fits" in capsys.readouterr().err
