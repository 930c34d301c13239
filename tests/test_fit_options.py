"""What the options of `laai fit` mean (whole commands: tests/test_cli.py)."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from tl_laai import fit_options
from tl_laai.distillation import Distillation
from tl_laai.selection import PRESETS, fit_auto


def test_a_layer_that_is_no_number_is_refused_by_name() -> None:
    assert fit_options.asked_layer("3") == 3
    with pytest.raises(ValueError, match=r"--layer holds 'three'; give a number from 0, or auto"):
        fit_options.asked_layer("three")


def test_every_preset_of_the_library_can_be_asked_for() -> None:
    assert set(get_args(fit_options.Preset)) == set(PRESETS)


def test_the_help_tells_the_defaults_of_the_library() -> None:
    assert Distillation().teacher_steps == fit_options.DEFAULT_TEACHER_STEPS
    n_folds = inspect.signature(fit_auto).parameters["n_folds"].default
    assert n_folds == fit_options.DEFAULT_FOLDS


def test_a_preset_stands_for_settings_that_the_library_takes() -> None:
    assert fit_options.preset_settings("paper") == ("answers", "prompt_end", 0.02, 0)
    assert fit_options.preset_settings("distill") == ("auto", "prompt_end", 0.0, None)
    options = {name for settings in PRESETS.values() for name in settings}
    assert options <= set(inspect.signature(fit_auto).parameters)
