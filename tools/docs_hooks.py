"""Pages of the site that are made from other files when it is built, so that they cannot go stale.

    index.md, CHANGELOG.md ...   the files of the same name at the top of the repository
    reference/config.md          from the fields of neurojepa/config.py
    reference/commands.md        what each command prints for --help
    notebooks/*.md               from the notebooks, as they are: without outputs

mkdocs calls ``on_files`` (see mkdocs.yml).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from neurojepa import config as configuration

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"README.md": "index.md"} | {name: name for name in (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
COMMANDS = {"data_prep.__main__": "neurojepa-data", "neurojepa.pretrain": "neurojepa-pretrain",
            "cluster.__main__": "neurojepa-cluster", "neurojepa.__main__": "neurojepa",
            "neurojepa.weights": "neurojepa weights"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {page: top_level(name) for name, page in TOP_LEVEL.items()}
    pages["reference/config.md"] = "\n".join(config_page())
    pages["reference/commands.md"] = "\n".join(commands_page())
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = "\n".join(notebook_page(path))
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def top_level(name: str) -> str:
    """A file of the repository's top folder, its links as they are seen from docs/."""
    return (ROOT / name).read_text().replace("](docs/", "](")


def notebook_page(path: Path) -> Iterator[str]:
    """A notebook as Markdown, with a link to the file itself."""
    for cell in nbformat.read(path, as_version=4).cells:
        yield cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        yield ""
    yield f"[Download this notebook]({path.name})"


# ---- configuration -------------------------------------------------------------------------------

def config_page() -> Iterator[str]:
    """Every key with what it may be, its default and its meaning."""
    schema = configuration.RootConfig.model_json_schema()
    yield "# Configuration\n"
    yield ("A recipe is a YAML file of the sections below. It says only what differs from these "
           "defaults. `a.b=value` on the command line overrides it, and the value is YAML. An "
           "unknown key is an error that names the nearest one.\n")
    for name, section in schema["properties"].items():
        yield from _section(name, section, schema, 2)


def _section(path: str, section: dict[str, Any], schema: dict[str, Any],
             level: int) -> Iterator[str]:
    model = _model(section, schema)
    yield f"{'#' * level} `{path}`\n"
    text = getattr(configuration, model["title"]).__dict__.get("__doc__")  # not the base class's
    if text:
        yield inspect.cleandoc(text).replace("``", "`") + "\n"
    rows = {key: field for key, field in model["properties"].items() if not _model(field, schema)}
    for key, field in rows.items():
        needed = key in model.get("required", [])
        begins = "required" if needed else f"default {_default(field)}"
        yield (f"**`{path}.{key}`** &ensp; {_allowed(field)} &ensp; {begins}<br>\n"
               f"{field.get('description', '')}\n")
    for key, field in model["properties"].items():
        if key not in rows:
            yield from _section(f"{path}.{key}", field, schema, level + 1)


def _model(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The branch of the tree that a field holds; empty where it is a value."""
    name = field.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else {}


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "empty"
    value = yaml.safe_dump(field["default"], default_flow_style=True, width=1000)
    return f"`{value.removesuffix('...' + chr(10)).strip()}`"


def _allowed(field: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in field:
        return " or ".join(_allowed(choice) for choice in field["anyOf"])
    if choices := field.get("enum") or ([field["const"]] if "const" in field else None):
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = field.get("type")
    if kind == "null":
        return "`null`"
    if kind == "array":
        items = field.get("items") or field["prefixItems"][0]
        return f"list of {_allowed(items)}"
    if kind == "object":
        return "mapping"
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`",
             "string": "text"}[str(kind)]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f"{words} {', '.join(bounds)}".strip()


# ---- commands ------------------------------------------------------------------------------------

def commands_page() -> Iterator[str]:
    """What every command and subcommand prints for --help."""
    yield "# Commands\n"
    yield ("Every command exits with 0 when it did its work, and with 2 and one line when its "
           "input cannot work. All can be interrupted and run again.\n")
    for module, script in COMMANDS.items():
        text, spelt = help_of(module), f"python -m {module.removesuffix('.__main__')}"
        yield f"## `{spelt}`\n\nAlso `{script}`.\n\n```text\n{text}\n```\n"
        for name in subcommands(text):
            yield f"### `{name}` {{ #{module.split('.')[-2]}-{name} }}\n"
            shown = help_of(module, name)
            yield f"```text\n{shown}\n```\n"
            for part in subcommands(shown) if "{fit,apply}" in shown else ():
                yield f"```text\n{help_of(module, name, part)}\n```\n"


def help_of(module: str, *words: str) -> str:
    """The text of ``python -m MODULE WORDS --help``."""
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "84"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return printed.getvalue().strip()


def subcommands(text: str) -> list[str]:
    """The names in the first {a,b,c} of a help text that are described below it."""
    found = re.search(r"\{([a-z,-]+)\}", text)
    return found[1].split(",") if found else []
