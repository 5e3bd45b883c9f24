"""Checkpoints of the official Neuro-JEPA code, read without pickle: which parts, which tensors.

The official trainer writes encoder, target_encoder, predictor, opt, scaler and counters into one
file; released weights are the encoder's tensors alone.  What wraps a module (DDP, torch.compile)
is taken off its tensors' names.  ``LEFT_OUT`` says what need not be mapped, and why; anything else
that has no place is the caller's error to raise.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from neurojepa.errors import DataError

PARTS = ("encoder", "target_encoder")
WRAPPERS = ("module.", "_orig_mod.", "backbone.")  # of DDP, torch.compile, and its own
CHECKPOINTED = "_checkpoint_wrapped_module."
LEFT_OUT = {
    "encoder": "the trained encoder; its moving average was asked for",
    "target_encoder": "the moving average; official tasks read the encoder (--part takes this one)",
    "predictor": "fills hidden tokens in training; embeddings need none",
    "opt": "state of the optimiser", "scaler": "state of the loss scaler",
    "epoch": "a counter", "global_step": "a counter", "loss": "of the last epoch"}
COUNTS = "how many tokens each expert got since its last update"


def locate(checkpoint: str) -> Path:
    """The file of tensors that a path names: itself, or model.safetensors in a folder.

    Raises
    ------
    DataError
        It is not there.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a checkpoint on this machine (.pt, "
                        ".safetensors), or the folder with model.safetensors")
    return path


def read(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, on the CPU.

    Raises
    ------
    DataError
        It is none, is damaged, or needs pickled objects.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path}: holds pickled objects besides tensors ({asked[1]}); reading them can run "
                "code, so they are not read; where you trust the file, load it with the official "
                "code, and save the encoder's tensors as .safetensors") from error
        raise DataError(f"{path}: is no checkpoint, or damaged") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
            AttributeError, struct.error, OSError) as error:  # what torch trips over, too
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: is no checkpoint, or damaged: {reason}") from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: holds a {type(found).__name__}, a checkpoint is a table of "
                        "tensors by name")
    return found


def parts_of(found: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The trainer's parts by name; of tensors alone one part, ``tensors``.

    Raises
    ------
    DataError
        It is neither, or has a part that is not known.
    """
    for wrapped in ("state_dict", "model"):
        if set(found) == {wrapped}:
            found = found[wrapped]
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{path}: is no table of tensors by name")
    if any(isinstance(value, Mapping) for value in found.values()):
        if "encoder" not in found:
            raise DataError(f"{path}: holds {', '.join(sorted(found))}, a checkpoint of the "
                            "official trainer holds encoder")
        if odd := sorted(set(found) - set(LEFT_OUT)):
            raise DataError(f"{path}: holds {odd[0]!r}, which no official checkpoint has; nothing "
                            "was converted, so that nothing is lost unseen")
        return found
    return {"tensors": found}


def encoder_of(parts: Mapping[str, Any], part: str,
               path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of the part by their plain names, and what is left out.

    Raises
    ------
    DataError
        There is no such part, or it holds something else than tensors.
    """
    chosen = parts.get("tensors", parts.get(part))
    if not isinstance(chosen, Mapping):
        raise DataError(f"{path}: holds no {part}")
    if unnamed := [name for name in chosen if not isinstance(name, str)]:
        raise DataError(f"{path}: {part} is no table of tensors by name; it has {unnamed[0]!r}")
    if "tensors" in parts and part != "encoder":
        raise DataError(f"{path}: holds one encoder's tensors alone; leave --part out")
    left = [{"name": name, "tensors": _count(value), "why": LEFT_OUT[name]}
            for name, value in parts.items() if name not in (part, "tensors")]
    found: dict[str, Tensor] = {}
    for name, tensor in chosen.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{path}: {name} is a {type(tensor).__name__}, no tensor")
        plain = name.replace(CHECKPOINTED, "")
        while prefix := next((each for each in WRAPPERS if plain.startswith(each)), ""):
            plain = plain.removeprefix(prefix)
        if plain in found:
            raise DataError(f"{path}: two tensors are named {plain} without their wrappers' names")
        if re.fullmatch(r"blocks\.\d+\.mlp\.counts", plain):
            left.append({"name": name, "tensors": 1, "why": COUNTS})
        else:
            found[plain] = tensor
    return found, left


def _count(value: Any) -> int:
    """Tensors in a tree."""
    if isinstance(value, Mapping):
        return sum(map(_count, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_count, value))
    return int(isinstance(value, Tensor))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def licence_beside(folder: Path) -> str | None:
    """``license`` in the front matter of a README.md, as model hubs have it."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL)
    try:
        tree = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None  # then none is stated
    licence = tree.get("license") if isinstance(tree, dict) else None
    return str(licence) if licence else None
