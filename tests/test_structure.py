"""The house rules that a reader relies on: which module imports which."""

import ast
from pathlib import Path

import pytest

FORBIDDEN = {
    "neurojepa": lambda name: name.split(".")[0] in ("data_prep", "cluster", "tools", "tests"),
    "data_prep": lambda name: (name.split(".")[0] in ("cluster", "tools", "tests")
                               or (name.startswith("neurojepa") and name not in
                                   ("neurojepa", "neurojepa.storage", "neurojepa.feed.format",
                                    "neurojepa.errors"))),
    "cluster": lambda name: (name.split(".")[0] in ("data_prep", "tools", "tests")
                             or (name.startswith("neurojepa") and name not in
                                 ("neurojepa.storage", "neurojepa.ports", "neurojepa.errors"))),
}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    crossing = [(str(path), name) for path in Path(package).rglob("*.py") for name in imports(path)
                if FORBIDDEN[package](name)]
    assert not crossing


def test_no_test_module_imports_another() -> None:
    """What several tests use stands in tests/helpers."""
    crossing = [(str(path), name) for path in Path("tests").rglob("*.py") for name in imports(path)
                if name.startswith("tests.") and name.split(".")[1] != "helpers"]
    assert not crossing
