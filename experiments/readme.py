"""Put the tables that the other scripts print from their rows into the README.

python experiments/readme.py           # writes the README
python experiments/readme.py --check   # exit code 1 where it would change
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from common import ROOT
from tables import MORE

TABLES = (
    "benchmark_fit",
    "table_rules",
    "table_side_effects",
    "table_opinions",
    "table_composition",
    "table_regularisation",
    "table_sizes",
    "table_examples",
)


def printed(name: str) -> str:
    """What stands in the README of what a table's script prints."""
    script = ROOT / "experiments" / f"{name}.py"
    command = [sys.executable, str(script), "--from-rows"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout.split(MORE)[0].strip()


def filled(text: str) -> str:
    """A text with every table between its marks made anew."""
    for name in TABLES:
        first, last = (f"<!-- {mark}{name} -->" for mark in ("", "/"))
        before, rest = text.split(first)
        _, after = rest.split(last)
        text = f"{before}{first}\n{printed(name)}\n{last}{after}"
    return text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="write nothing")
    arguments = options.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    made = filled(text)
    if not arguments.check:
        path.write_text(made, encoding="utf-8")
    elif made != text:
        sys.exit("README.md: its tables are not those of the rows; run experiments/readme.py")


if __name__ == "__main__":
    main()
