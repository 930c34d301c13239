"""The README's tables are those that the experiments print from the rows in `figures/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="runs no model: once, as pinned, is enough")
def test_every_table_of_the_readme_is_printed_by_its_script() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "readme.py"), "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
