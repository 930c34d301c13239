"""The house rules that no single room can keep: levels, light imports, docstrings, pins, README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from runtime_types import after_the_call

import tl_laai

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tl_laai"

# A room imports rooms of lower levels only. `__init__.py` is the door: it looks up, lazily, and
# rooms never go through it.
LEVELS = {
    "artifacts": 0,
    "attention": 0,
    "checkpoints": 0,
    "executors": 0,
    "fingerprints": 0,
    "hooking": 0,
    "metrics": 0,
    "opinions": 0,
    "penalties": 0,
    "products": 0,
    "recording": 0,
    "rows": 0,
    "splits": 0,
    "bootstrap": 1,
    "curvature": 1,
    "models": 1,
    "poll_readers": 1,
    "tasks": 1,
    "vocabulary": 1,
    "abstract_backend": 2,
    "distributions": 2,
    "interventions": 2,
    "polls": 2,
    "solvers": 2,
    "bridge_backend": 3,
    "hooked_backend": 3,
    "objectives": 3,
    "prompts": 3,
    "relaxation": 3,
    "adapters": 4,
    "backends": 4,
    "candidates": 4,
    "canvas": 4,
    "edits": 5,
    "heatmaps": 5,
    "memory": 5,
    "packing": 5,
    "activations": 6,
    "decoding": 6,
    "engine": 6,
    "figures": 6,
    "prefix": 6,
    "controls": 7,
    "evaluation": 7,
    "made_up_inputs": 7,
    "problems": 7,
    "side_effects": 7,
    "teachers": 7,
    "attribution": 8,
    "batches": 8,
    "distillation": 8,
    "finetuning": 8,
    "methods": 8,
    "recipes": 8,
    "rounds": 8,
    "surveys": 8,
    "display": 9,
    "finetuning_selection": 9,
    "fitting": 9,
    "head_vectors": 9,
    "lessons": 9,
    "opinion_recipes": 9,
    "opinion_teachers": 9,
    "paths": 9,
    "vectors": 9,
    "work": 9,
    "baselines": 10,
    "crossvalidation": 10,
    "options": 10,
    "sweep_units": 10,
    "comparisons": 11,
    "demo": 11,
    "opinion_baselines": 11,
    "selection": 11,
    "sweeps": 11,
    "analyses": 12,
    "fit_options": 12,
    "opinion_commands": 12,
    "fit_commands": 13,
    "cli": 14,
}
NEVER_IMPORT_TORCH = ("bootstrap", "figures", "metrics", "rows")
MODEL_CLASSES = {"HookedTransformer", "TransformerBridge"}

ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def parse(room: str) -> ast.Module:
    """Return the syntax tree of one file of the package."""
    return ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


def imported_names(tree: ast.AST, *, module_level_only: bool = False) -> Iterator[str]:
    """Yield what a file imports as dotted names: ``from a.b import c`` yields ``a.b.c``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("tl_laai." if node.level else "") + (node.module or "")
            yield from (f"{base.rstrip('.')}.{alias.name}" for alias in node.names)
        elif not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported_names(node, module_level_only=module_level_only)


def imported_from(node: ast.stmt) -> Iterator[str]:
    """Yield what one import statement imports."""
    return imported_names(ast.Module(body=[node], type_ignores=[]))


def imported_rooms(tree: ast.AST, *, module_level_only: bool = False) -> set[str]:
    """Return the second part of every ``tl_laai.x`` that a file imports, but not its version."""
    names = imported_names(tree, module_level_only=module_level_only)
    parts = [name.split(".") for name in names]
    rooms = {part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "tl_laai"}
    return rooms - {"__version__"}


def closure(room: str) -> set[str]:
    """Return a room and every room that importing it loads."""
    seen: set[str] = set()
    waiting = {room}
    while waiting:
        seen |= waiting
        found = (imported_rooms(parse(name), module_level_only=True) for name in waiting)
        waiting = {name for names in found for name in names if name in ROOMS} - seen
    return seen


def loads_torch(statement: str) -> bool:
    """Tell whether a fresh interpreter has torch in memory after a statement."""
    script = f"{statement}; import sys; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip() == "True"


@pytest.mark.parametrize(("given", "kept"), [(None, "AUTO,STRICT"), ("COMPATIBLE", "COMPATIBLE")])
def test_products_are_asked_to_round_alike_unless_the_user_asks_otherwise(
    given: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if given is not None:
        monkeypatch.setenv("MKL_CBWR", given)
    script = "import os, tl_laai; print(os.environ['MKL_CBWR'])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == kept


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_level(room: str) -> None:
    assert room in LEVELS, f"give tl_laai/{room}.py a level here and in the README's table"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward_only(room: str) -> None:
    for other in imported_rooms(parse(room)):
        assert other in LEVELS, f"{room}.py imports tl_laai.{other}: import from its room instead"
        assert LEVELS[other] < LEVELS[room], (
            f"{room}.py (level {LEVELS[room]}) imports {other}.py (level {LEVELS[other]})"
        )


def test_nothing_imports_the_command_line() -> None:
    importers = [room for room in ROOMS if "cli" in imported_rooms(parse(room))]
    assert importers == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tl_laai.penalties import SparseGroupLasso", {"penalties"}),
        ("from tl_laai import models, prompts", {"models", "prompts"}),
        ("from tl_laai import fit", {"fit"}),
        ("from tl_laai import __version__", set()),
        ("import tl_laai", {"__init__"}),
        ("import tl_laai.engine as engine", {"engine"}),
        ("from . import engine", {"engine"}),
        ("from .engine import loss", {"engine"}),
        ("def later():\n    from tl_laai.cli import main", {"cli"}),
        ("import numpy, tl_laai_extras.cli", set()),
    ],
)
def test_the_import_reader_sees_every_way_to_import_a_room(source: str, expected: set[str]) -> None:
    assert imported_rooms(ast.parse(source)) == expected


def test_module_level_leaves_out_functions_but_not_branches_and_classes() -> None:
    source = "if x:\n    import a\nclass C:\n    import b\n    def f(self):\n        import c"
    assert set(imported_names(ast.parse(source), module_level_only=True)) == {"a", "b"}


@pytest.mark.parametrize("room", [room for room in NEVER_IMPORT_TORCH if room in ROOMS])
def test_light_rooms_never_reach_torch(room: str) -> None:
    for reached in closure(room):
        heavy = {name for name in imported_names(parse(reached)) if re.match(r"torch\b", name)}
        assert not heavy, f"{room}.py reaches {reached}.py, which imports {sorted(heavy)}"


@pytest.mark.parametrize("room", [room for room in NEVER_IMPORT_TORCH if room in ROOMS])
def test_light_rooms_load_without_torch_in_a_fresh_interpreter(room: str) -> None:
    assert not loads_torch(f"import tl_laai.{room}")


def test_the_package_itself_loads_without_torch() -> None:
    assert not loads_torch("import tl_laai; dir(tl_laai)")
    assert loads_torch("import torch")


@pytest.mark.parametrize("room", ROOMS)
def test_model_classes_are_never_imported_at_module_level(room: str) -> None:
    names = imported_names(parse(room), module_level_only=True)
    found = {name for name in names if MODEL_CLASSES & set(name.split("."))}
    assert not found, f"{room}.py imports {sorted(found)}: TransformerLens 4 lacks one of them"


@pytest.mark.parametrize("room", ["__init__", *ROOMS])
def test_every_module_says_its_purpose_in_the_first_line(room: str) -> None:
    docstring = ast.get_docstring(parse(room))
    assert docstring, f"{room}.py has no module docstring"
    assert docstring.splitlines()[0].endswith((".", ":", ";")), f"{room}.py: first line unfinished"


@pytest.mark.parametrize("name", tl_laai.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(tl_laai, name) is not None
    assert name in dir(tl_laai)


def test_an_unknown_public_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'fti'; public names: .*fit"):
        _ = tl_laai.fti


def test_public_names_are_declared_once_for_people_and_once_for_type_checkers() -> None:
    tree = parse("__init__")
    [branch] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {name.removeprefix("tl_laai.") for node in branch.body for name in imported_from(node)}
    assert typed == {f"{room}.{name}" for name, room in tl_laai._ROOM_OF.items()}
    assert sorted(tl_laai._ROOM_OF) == sorted(tl_laai.__all__)


def test_the_readme_table_names_every_room_and_its_level() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", readme, flags=re.MULTILINE))
    assert table == {room: str(LEVELS[room]) for room in ROOMS}


def test_the_tools_have_the_same_pins_everywhere() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    dev = extras["optional-dependencies"]["dev"]
    assert set(dev) <= set(constraints)
    assert set(re.findall(r"\w+==[\d.]+", hooks)) == {pin for pin in dev if "pre-commit" not in pin}


def test_the_citation_file_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {tl_laai.__version__}\n" in citation


def test_the_run_time_checker_lets_a_function_refuse_in_its_own_words() -> None:
    @jaxtyped(typechecker=after_the_call)
    def first(values: Float[np.ndarray, " n"]) -> float:
        if values.ndim != 1:
            raise ValueError("values must have one axis")
        return values[0]

    assert first(np.ones(2)) == 1.0
    with pytest.raises(ValueError, match="values must have one axis"):
        first(np.ones((2, 2)))


def test_the_run_time_checker_lets_no_wrong_call_return_quietly() -> None:
    @jaxtyped(typechecker=after_the_call)
    def double(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.concatenate([values, values]) if values.size == 3 else 2 * values

    with pytest.raises(TypeCheckError, match="double"):  # a wrong argument
        double(np.ones((2, 2)))
    with pytest.raises(TypeCheckError, match="double"):  # a wrong result
        double(np.ones(3))


def test_the_run_time_checker_is_on_for_the_package() -> None:
    assert tl_laai.SparseGroupLasso.value.__wrapped__.__module__ == "tl_laai.penalties"
