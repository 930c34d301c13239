"""Tests of the commands that make an intervention (whole commands: tests/test_cli.py)."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from tl_laai import fit_commands
from tl_laai.distillation import Distillation
from tl_laai.selection import PRESETS, fit_auto


def test_a_layer_that_is_no_number_is_refused_by_name() -> None:
    assert fit_commands._layer("3") == 3
    with pytest.raises(ValueError, match=r"--layer holds 'three'; give a number from 0, or auto"):
        fit_commands._layer("three")


def test_every_preset_of_the_library_can_be_asked_for() -> None:
    assert set(get_args(fit_commands.Preset)) == set(PRESETS)


def test_the_help_tells_how_long_a_teacher_is_fitted_by_default() -> None:
    assert Distillation().teacher_steps == fit_commands.DEFAULT_TEACHER_STEPS
    assert fit_commands._settings("paper") == ("answers", "prompt_end", 0.02, 0)
    assert fit_commands._settings("distill") == ("auto", "prompt_end", 0.0, None)
    options = {name for settings in PRESETS.values() for name in settings}
    assert options <= set(inspect.signature(fit_auto).parameters)
