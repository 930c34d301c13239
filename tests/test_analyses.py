"""Tests of the commands that look into a model or a fit (whole commands: tests/test_cli.py)."""

from __future__ import annotations

import logging
from typing import get_args

import pytest

from tl_laai import analyses, models


def test_the_backends_offered_are_those_that_load_model_takes() -> None:
    assert get_args(analyses.Backend) == get_args(models.Backend)


def test_layers_that_are_no_numbers_are_refused_by_name() -> None:
    assert analyses._layer("3") == 3
    with pytest.raises(ValueError, match=r"--layers holds 'three'; give numbers such as 0,3,6"):
        analyses._layer("three")


def test_what_the_library_logs_is_shown_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = logging.LogRecord("tl_laai", logging.INFO, __file__, 1, "%d fits", (3,), None)
    analyses._Shown().emit(record)
    assert "3 fits" in capsys.readouterr().err
