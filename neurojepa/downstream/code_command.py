"""``code``: learn a session code on weights, and write both as weights whose tokens are h."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from neurojepa.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from neurojepa.downstream.api import Model
    from neurojepa.feed.format import Feed

PURPOSE = """- read sparsely, from any one scan, what the scans of a session have in common: to find
  a person's scan of another contrast, or to try a label across contrasts
- not for what one contrast alone shows, such as lesions: for that take {}, which they were
  learnt on"""


def add_code(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    command = commands.add_parser("code", help="learn a sparse code of what the scans of a session "
                                  "have in common")
    command.add_argument("--weights", required=True, help="exported weights of a mae or a jepa, "
                         "which stay as they are")
    command.add_argument("--feed", required=True, help="a packed feed whose split train has "
                         "sessions with two scans or more")
    command.add_argument("--out", required=True, help="folder for the weights with the code")
    command.add_argument("--people", type=int, default=200, help="who teach the code, at most "
                         "(default: 200)")
    command.add_argument("--l1", type=float, default=2e-3, help="penalty on the atoms: more of it "
                         "leaves fewer active (default: 0.002)")
    command.add_argument("--seed", type=int, default=0, help="of the code's first weights and the "
                         "order of tokens (default: 0)")
    command.add_argument("--device", help="of torch (default: the first GPU if there is one)")


def run_code(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.api import load_model
    from neurojepa.downstream.embed import select_rows
    from neurojepa.downstream.finetuned import check_tokens
    from neurojepa.downstream.sessions import STEPS, rows_of_sessions, session_code
    from neurojepa.feed.format import open_feed

    if arguments.people < 1 or not 0 < arguments.l1 < float("inf"):
        raise ConfigError(f"--people {arguments.people}, --l1 {arguments.l1:g}: both have to be "
                          "above 0")
    check_empty(arguments.out)
    model, feed = load_model(arguments.weights, arguments.device), open_feed(arguments.feed)
    weights = model.weights
    check_tokens(weights.config, arguments.weights)
    if weights.model.session_code is not None:
        raise ConfigError(f"{arguments.weights}: has a session code already; name the weights that "
                          "it was learnt on")
    model.check_grid(feed)
    rows, _ = model.known(feed, select_rows(feed, None, None, "train"))
    rows = rows_of_sessions(feed, rows, arguments.people)
    code, active = session_code(
        weights.model, weights.config, feed, rows, l1=arguments.l1, seed=arguments.seed,
        encoded=lambda done, of: _show(done, of, "scans encoded"),
        learnt=lambda done, of: None if done % 50 else _show(done, of, "steps learnt"))
    print(f"{code.atoms} atoms, {active:.1%} of them active in a token", flush=True)
    weights.model.session_code = code
    settings = {"atoms": code.atoms, "active": active, "l1": arguments.l1, "steps": STEPS,
                "seed": arguments.seed}
    _write(arguments, model, feed, rows, settings)
    return 0


def _write(arguments: argparse.Namespace, model: Model, feed: Feed, taught: np.ndarray,
           settings: dict[str, Any]) -> None:
    """Write the weights with their code; ``taught`` are the rows that it was learnt from."""
    from neurojepa.downstream.embed import fit_places, teaching_rows
    from neurojepa.downstream.finetuned import write_with

    usual, _ = model.known(feed, teaching_rows(feed))
    print(f"learning what is usual at each place of the brain from {len(usual)} scans", flush=True)
    places = fit_places(model.weights.model, model.weights.config, feed, usual)
    train = feed.index.filter([split == "train" for split in feed.index["split"].to_pylist()])
    settings |= {"feed": feed.fingerprint, "scans": _counts(feed, taught),
                 "people": len(set(feed.index["participant"].take(taught).to_pylist()))}
    write_with(arguments.out, model.weights, arguments.weights, places,
               [*train["participant"].to_pylist(), *train["scan_id"].to_pylist()], {},
               {"code": settings, "pooling": {"feed": feed.fingerprint,
                                              "scans": _counts(feed, usual)}},
               PURPOSE.format(os.path.basename(arguments.weights.rstrip("/"))))
    print(f"wrote weights with the code to {arguments.out}")


def check_empty(out: str) -> None:
    """Raise ConfigError where a folder holds something, which might be written over."""
    from neurojepa.storage import list_names

    if there := list_names(out):
        raise ConfigError(f"--out {out}: holds {there[0]}; choose a folder that is empty, or not "
                          "there")


def _show(done: int, of: int, what: str) -> None:
    print(f"{done} of {of} {what}", end="\r" if done < of else "\n", flush=True)


def _counts(feed: Feed, rows: np.ndarray) -> dict[str, int]:
    return dict(sorted(Counter(feed.index["modality"].take(rows).to_pylist()).items()))
