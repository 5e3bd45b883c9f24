"""The house rules that a reader relies on: which module imports which, and that none goes round.

Imports inside functions count as much as those at the top; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# What a package may import of the project besides itself; a package stands for all below it.
ARROWS = {
    "neurojepa": (),  # but for the one module below
    "data_prep": ("neurojepa.storage", "neurojepa.errors", "neurojepa.feed.format",
                  "neurojepa.report"),
    "cluster": ("neurojepa.storage", "neurojepa.errors", "neurojepa.ports", "neurojepa.recipes",
                "neurojepa.feed.samples", "neurojepa.messages"),
}
# Raw scans become a feed or an image, and ids pseudonyms, by the one way there is, called inside
# functions.
EXCEPTIONS = {"neurojepa.downstream.scans": "data_prep",
              "neurojepa.downstream.unasked": "data_prep",
              "neurojepa.downstream.images": "data_prep",
              "neurojepa.downstream.labels": "data_prep"}
OWN = ("neurojepa", "data_prep", "cluster", "tools", "tests")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in (*ARROWS, "tests")
           for path in (ROOT / package).rglob("*.py")}


def imported(module: str) -> Iterator[str]:
    """Dotted names that a module imports: ``from a import b`` is a.b."""
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    crossing = [(module, name) for module in MODULES if module.split(".")[0] == package
                for name in imported(module)
                if name.split(".")[0] in OWN and name.split(".")[0] != package
                and name.split(".")[0] != EXCEPTIONS.get(module)
                and not any(f"{name}.".startswith(f"{allowed}.") for allowed in ARROWS[package])]
    assert not crossing


def test_no_test_module_imports_another() -> None:
    """What several tests use stands in tests/helpers."""
    crossing = [(module, name) for module in MODULES if module.startswith("tests.")
                for name in imported(module)
                if name.startswith("tests.") and name.split(".")[1] != "helpers"]
    assert not crossing


def test_no_import_goes_round() -> None:
    # ``from a import b`` names the module a.b, or something that the module a defines
    graph = {module: {known for name in imported(module)
                      for known in [name if name in MODULES else name.rpartition(".")[0]]
                      if known in MODULES and known != module} for module in MODULES}
    while ends := {module for module, below in graph.items() if not below}:
        graph = {module: below - ends for module, below in graph.items() if module not in ends}
    # what is left leads into a circle; walk until a module comes again
    way: list[str] = [min(graph)] if graph else []
    while way and way.count(way[-1]) == 1:
        way.append(min(graph[way[-1]]))
    assert not way, " -> ".join(way[way.index(way[-1]):])


def test_drivers_load_when_a_uri_needs_them() -> None:
    """Commands that only look, such as the status of a run, start at once."""
    code = "import neurojepa.storage, cluster.__main__, sys; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                                capture_output=True).stdout.split())
    assert not loaded & {"torch", "pydantic", "pyarrow", "fsspec", "s3fs", "botocore", "numpy"}
