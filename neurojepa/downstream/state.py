"""Where a fit stands, in one safetensors file that is written whole: it is killed and goes on.

    last.NAME, best.NAME    tensors that learn, as they are and as they were best
    adam.NAME.KEY           what the optimizer knows of them
    record                  JSON in the header: settings, and whatever tells how far it came
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import read_if_there

LATER = ("pooling",)  # settings that states of earlier versions lack: these go on without


def packed(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """A state's bytes; ``record`` has ``settings``."""
    from safetensors.torch import save

    return save({name: each.detach().cpu().contiguous() for name, each in tensors.items()},
                {"record": json.dumps(record)})


def tensors_of(learning: Mapping[str, Tensor], best: Mapping[str, Tensor],
               adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a fit goes on from."""
    found = {f"last.{name}": each for name, each in learning.items()}
    found |= {f"best.{name}": each for name, each in best.items()}
    for name, each in learning.items():
        found |= {f"adam.{name}.{key}": value
                  for key, value in adam.state.get(each, {}).items()}
    return found


def restore(tensors: Mapping[str, Tensor], learning: Mapping[str, Tensor],
            adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Set what learns, and its optimizer, to a state's ``tensors``; returns the best ones."""
    best = {}
    with torch.no_grad():
        for name, each in learning.items():
            each.copy_(tensors[f"last.{name}"])
            best[name] = tensors[f"best.{name}"].to(each.device)
            of_adam = {key.removeprefix(f"adam.{name}."): value for key, value
                       in tensors.items() if key.startswith(f"adam.{name}.")}
            if of_adam:
                adam.state[each] = {key: value if key == "step" else value.to(each.device)
                                    for key, value in of_adam.items()}
    return best


def read_state(uri: str, settings: Mapping[str, Any], task: str
               ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The record and tensors of a state; None where there is none yet.

    Parameters
    ----------
    settings : what it must have in common with this run
    task : of which it is the state, for messages

    Raises
    ------
    ConfigError
        It is of a run with other settings.
    DataError
        It is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if (data := read_if_there(uri)) is None:
        return None
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")  # of safetensors' header, which is JSON
        record = json.loads(json.loads(data[8:8 + length])["__metadata__"]["record"])
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{uri}: is no state of a {task}, or a damaged one ({error}); remove "
                        "it to begin anew") from error
    for name, now in settings.items():
        if name in LATER and name not in record["settings"]:
            continue
        if (then := record["settings"].get(name)) != now:
            raise ConfigError(f"{uri}: is the state of a {task} with {name} {then}, now "
                              f"it is {now}; choose another --out, or give what was given then")
    return record, tensors
