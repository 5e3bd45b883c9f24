"""``complete``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from neurojepa.downstream.commands import apply_arguments
from neurojepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np


def add_complete(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("complete", help="make a modality that was not scanned")
    parts = parser.add_subparsers(dest="part", required=True)
    fit = parts.add_parser("fit", help="learn to complete one modality from others")
    fit.add_argument("feed", metavar="FEED", help="a packed feed with visits that have them")
    fit.add_argument("--weights", required=True, help="exported weights that know them")
    fit.add_argument("--from", dest="sources", required=True, nargs="+", help="modalities that are "
                     "there, such as T1w, or T1w T2w; of several, a visit may lack some")
    fit.add_argument("--to", required=True, help="modality that is completed, such as FLAIR")
    fit.add_argument("--out", required=True, help="folder for what is learnt and its test; "
                     "the same command goes on where it was killed")
    fit.add_argument("--cohort", help="only this cohort of the feed; default: all")
    fit.add_argument("--epochs", type=int, default=10, help="of the networks (default: 10)")
    fit.add_argument("--allow-seen", action="store_true", help="test people who were in the "
                     "pretraining, too; the report says so")
    fit.add_argument("--device", help="of torch (default: the first GPU if there is one)")
    apply = parts.add_parser("apply", help="make synthetic images of scans")
    apply_arguments(apply, "C")


def run_complete(arguments: argparse.Namespace) -> int:
    return (_apply if arguments.part == "apply" else _fit)(arguments)


def _fit(arguments: argparse.Namespace) -> int:
    import numpy as np

    from neurojepa.downstream import complete_page as pages
    from neurojepa.downstream.api import load_model, seen_of
    from neurojepa.downstream.commands import print_rows
    from neurojepa.downstream.complete import learn
    from neurojepa.downstream.completed import write_completion
    from neurojepa.downstream.embed import select_rows
    from neurojepa.downstream.finetuned import check_out, check_tokens, record_of
    from neurojepa.downstream.output import write_task
    from neurojepa.downstream.sources import had, spoken, visits_of
    from neurojepa.feed.format import open_feed
    from neurojepa.storage import join

    sources = arguments.sources
    if len({*sources, arguments.to}) <= len(sources):
        raise ConfigError(f"--from {' '.join(sources)} --to {arguments.to}: name each modality "
                          "once")
    check_out(arguments.out, arguments.weights, "completes")
    model, feed = load_model(arguments.weights, arguments.device), open_feed(arguments.feed)
    check_tokens(model.weights.config, arguments.weights)
    if model.weights.places is None:
        raise ConfigError(f"{arguments.weights}: exported without what tokens are compared with; "
                          "export them again, with their feed")
    model.check_grid(feed)
    rows, _ = model.known(feed, select_rows(feed, None, arguments.cohort))
    names, scans = (np.array(feed.index[name].to_pylist())[rows]
                    for name in ("participant", "scan_id"))
    told = seen_of(model.weights.seen, names.tolist(), scans.tolist())
    seen = np.array([each is True for each in told])
    warnings = [] if model.weights.seen is not None else [
        "who was in the pretraining of the weights is not known: if people tested were, scores may "
        "be too good"]
    if arguments.allow_seen and seen.any():
        warnings.append(f"{len(set(names[seen]))} people were seen in the pretraining of the "
                        "weights, and may be tested all the same (--allow-seen)")
        seen[:] = False
    visits = visits_of(feed, rows, sources, arguments.to, seen)
    has = had(sources, visits.sources)
    if len(sources) > 1:
        print("visits by the sources that they have: " + ", ".join(
            f"{number} {name}" for name, number in has.items()), flush=True)
    before = record_of(arguments.weights)
    found = learn(model.weights, model.weights.places.to(model.device), feed, visits,
                  epochs=arguments.epochs, keep=join(arguments.out, "state"), settings={
                      "weights": before["sha256"], "pooling": before["pooling"]["sha256"],
                      "code": before.get("code", {}).get("sha256"), "feed": feed.fingerprint,
                      "from": " ".join(sources), "to": arguments.to}, warnings=warnings)
    print_rows(arguments.to, found.rows, warnings)
    record = {"input": arguments.feed, "weights": arguments.weights, "from": spoken(sources),
              "sources": sources, "to": arguments.to, "visits_with": has, "notes": [],
              **pages.record_of(found)}
    ids = feed.index["scan_id"].to_pylist()
    taught = [name for k in np.flatnonzero(visits.parts != "test") for name in (
        visits.participant[k], ids[visits.target[k]],
        *(ids[row] for row in visits.sources[k] if row >= 0))]
    write_completion(arguments.out, model.weights, arguments.weights, model.weights.places,
                     found.completion, taught, {
                         "from": spoken(sources), "sources": sources, "to": arguments.to,
                         "latents": found.latents,
                         "weights_from": os.path.basename(arguments.weights.rstrip("/")),
                         "scores": record["scores"]})
    write_task(join(arguments.out, "evaluation"), "complete/1", record,
               methods=partial(pages.methods, found), page=partial(pages.complete_page, found),
               predictions=pages.predictions_of(found))
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    import numpy as np

    from neurojepa.downstream import complete_page as pages
    from neurojepa.downstream.api import load_model
    from neurojepa.downstream.completed import complete_scans, read_completion
    from neurojepa.downstream.output import write_task
    from neurojepa.downstream.sources import groups_of, had

    model = load_model(arguments.model, arguments.device)
    completion, about = read_completion(arguments.model, model.weights)
    sources = about["sources"]
    with model.found(arguments.scans, arguments.out, arguments.modality, None, arguments.preset,
                     arguments.key, 1) as (feed, rows, scans, _):
        names = np.array(feed.index["modality"].to_pylist())[rows]
        groups = groups_of(feed, rows, sources)
        if not len(groups):
            raise DataError(f"no {' or '.join(sources)} scan, from which {about['to']} is made, "
                            f"among {', '.join(sorted(set(names.tolist())))}")
        made = complete_scans(model.weights, completion, about, feed, groups, scans, arguments.out,
                              lambda done: print(f"{done} of {len(groups)} scans", flush=True,
                                                 end="\r" if done < len(groups) else "\n"))
        has = had(sources, groups)
        notes = _not_read(names, groups, sources)
    for note in notes:
        print(note)
    record = {"model": arguments.model, "from": about["from"], "sources": sources,
              "to": about["to"], "images": len(made), "images_with": has,
              "latents": about["latents"], "notes": notes,
              "made": [{"from": each.names, "scan_ids": each.scan_ids} for each in made]}
    write_task(arguments.out, "complete-apply/1", record, methods=pages.applied_methods,
               page=partial(pages.applied_page, made), predictions=[
                   ["participant_id", "session_id", "synthetic", "file", "from"],
                   *([each.who.participant, each.who.session, about["to"], each.path,
                      " ".join(each.names)] for each in made)])
    return 0


def _not_read(names: np.ndarray, groups: np.ndarray, sources: Sequence[str]) -> list[str]:
    """What is to be said of scans, of these modalities, of which no image was made, and of images
    that were made of fewer sources."""
    import numpy as np

    others = int((~np.isin(names, sources)).sum())
    further = len(names) - others - int((groups >= 0).sum())
    lacking = {name: int((rows < 0).sum()) for name, rows in zip(sources, groups.T, strict=True)}
    return [*([f"{others} scans of other modalities were not read"] if others else []),
            *([f"{further} more scans of the same visit and modality were not read, the first one "
               "was"] if further else []),
            *(f"{number} of {len(groups)} images were made without {name}, which the visit lacks"
              for name, number in lacking.items() if number)]
