"""The direction of imports: a module imports only what stands above it here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hyperfunc"

ALLOWED: dict[str, set[str]] = {
    "tree": set(),
    "arguments": set(),
    "hypernet": {"arguments"},
    "tiling": set(),
    "layers": {"tiling"},
    "primary": {"tree", "arguments"},
    "targets": {"arguments", "layers", "tiling", "primary"},
    "_attention": set(),
    "randomness": {"tree", "_attention"},
    "vmap_rules": {"tree", "_attention"},
    "compiled_norms": {"vmap_rules"},
    "residual": {"arguments"},
    "files": {"tree"},
    "exits": set(),
    "interrupt": {"exits"},
    "_version": set(),
    "flags": {"exits"},
    "console": set(),
    "curves": set(),
    "painter": {"curves", "interrupt"},
    "environment": set(),
    "precision": set(),
    "launch": {"exits"},
    "watch": {"exits"},
    "distributed": {"tree", "exits", "watch"},
    "histogram": {"tree"},
    "journal": {"files"},
    "tracking": {"exits", "histogram"},
    "data": {"tree", "files"},
    "optim": {"tree", "arguments"},
    "winograd": set(),
    "graph_passes": {"winograd"},
    "capture": {"tree", "arguments", "compiled_norms", "graph_passes", "winograd"},
    "checkpoint": {"tree", "arguments", "files", "exits", "flags"},
    "model": {
        *("tree", "arguments", "hypernet", "tiling", "layers", "targets", "primary", "randomness", "residual"),
        "vmap_rules",
    },
    "overview": {"hypernet", "model"},
    "conditions": {"tree", "arguments", "hypernet", "primary", "randomness", "vmap_rules", "model"},
    "fitting": {"tree", "hypernet", "tiling", "primary", "model"},
    "sync_norm": {"model"},
    "differentiate": {"tree"},
    "training": {
        *("tree", "data", "differentiate", "conditions", "model", "optim", "precision", "randomness", "residual"),
    },
    "ensembles": {"tree", "arguments", "model", "optim", "randomness", "training", "vmap_rules"},
    "model_file": {"arguments", "checkpoint", "model", "conditions", "ensembles"},
    "stateful": {"tree", "primary", "conditions", "ensembles", "model", "randomness"},
    "population": {"tree", "data", "exits", "interrupt", "training"},
    "sweep": {"files", "flags"},
    "config": {"flags", "hypernet", "launch", "precision", "residual", "tracking", "data", "training", "sweep"},
    "run": {"tree", "distributed", "precision", "data", "optim", "model", "training", "flags", "config"},
    "build": {"tree", "precision", "optim", "model", "config"},
    "report": {
        *("tree", "exits", "files", "_version", "console", "painter", "histogram", "journal", "tracking"),
        *("config", "run", "build"),
    },
    "run_file": {
        *("tree", "files", "flags", "console", "distributed", "journal", "checkpoint", "optim"),
        *("config", "run", "build", "report"),
    },
    "shares": {
        *("files", "interrupt", "exits", "console", "distributed", "population", "sweep"),
        *("config", "run", "run_file"),
    },
}
TOP = {"__init__", "check_gpu", "plot"}
"""These may import everything, and nothing imports them."""


def module_of(path: Path) -> str:
    """The module that a file belongs to: a folder is one module."""
    return path.stem if path.parent == PACKAGE else path.parent.name


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {"a relative import"}
        elif isinstance(node, ast.ImportFrom) and node.module == "hyperfunc":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hyperfunc."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[-1] for alias in node.names if alias.name.startswith("hyperfunc")}
    return found


def test_every_module_has_its_place() -> None:
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} == ALLOWED.keys() | TOP


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_one_way(name: str) -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if module_of(path) == name]
    assert set().union(*map(imported, paths)) - {name} <= ALLOWED[name]


def test_the_pytree_module_of_torch_has_one_importer() -> None:
    users = [path.stem for path in PACKAGE.rglob("*.py") if "_pytree" in path.read_text()]
    assert users == ["tree"]
