"""Recipes: YAML files that say how to train.  Those in ``configs/`` come with the package, by name.

``--config configs/demo.yaml`` is a file; ``--config demo`` is the recipe that comes with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from neurojepa.errors import ConfigError

SHIPPED = {path.stem: path for path in sorted(Path(__file__).with_name("configs").glob("*.yaml"))}


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The plain tree of a recipe: a file, or else the name of one that comes with the package.

    Raises
    ------
    ConfigError
        There is neither, or the file cannot be read or is no YAML mapping.
    """
    path = Path(name)
    if not path.is_file():
        path = SHIPPED.get(str(name), path)
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: cannot read the config (no such file); name a file, or one of "
                          f"{', '.join(SHIPPED)}, which come with the package") from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot read the config ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected a mapping of data/model/objective/optim/train/run")
    return tree


def read_override(item: str) -> tuple[str, Any]:
    """The dotted key of ``a.b=value`` and its value, which is YAML.

    Raises
    ------
    ConfigError
        It is written otherwise.
    """
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {item!r}: expected a.b=value, for example train.steps=100")
    try:
        return dotted, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not valid YAML") from error
