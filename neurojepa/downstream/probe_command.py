"""``probe``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.downstream.commands import class_arguments, folds_of, print_rows
from neurojepa.downstream.opened import open_both
from neurojepa.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from neurojepa.downstream.attending import Tokens
    from neurojepa.feed.format import Feed
    from neurojepa.weights import Weights


def probe_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is its own to the command's parser."""
    command.add_argument("embeddings", nargs="?", metavar="EMBEDDINGS", help="folder that embed "
                         "wrote")
    command.add_argument("--labels", nargs="+", default=["age", "diagnosis"], help="table of your "
                         "own (.csv, .tsv), joined by your own ids; with --feed: names of its "
                         "labels (default: age diagnosis)")
    command.add_argument("--id", default="participant_id", help="its column of ids (default: "
                         "participant_id)")
    command.add_argument("--session", help="its column of visits, where labels change with them")
    command.add_argument("--label", nargs="+", help="its columns to be told")
    class_arguments(command)
    command.add_argument("--missing", nargs="+", default=[], help="values that mean missing, "
                         "beside empty and n/a: such as 999 (write -9 as --missing=-9)")
    command.add_argument("--cv", default="5x5", help="repeats x folds of the outer "
                         "cross-validation (default: 5x5)")
    command.add_argument("--site", help="column of sites: they are left out one by one, made alike "
                         "by ComBat, and it is told whether the label goes with them")
    command.add_argument("--adjust", nargs="+", default=[], help="columns whose influence is taken "
                         "from the features: of the table or age, sex, brain_ml, field_strength")
    command.add_argument("--readout", choices=("linear", "attentive"), default="linear",
                         help="attentive: beside the others a row of a head that attends to "
                         "tokens, of --weights and of --feed where one was embedded")
    command.add_argument("--allow-seen", action="store_true", help="test people who were in the "
                         "pretraining, too; the report says so")
    command.add_argument("--key", help="file of the pseudonym key that embed used")


def run_probe(arguments: argparse.Namespace) -> int:
    if arguments.embeddings:
        if (arguments.feed or arguments.weights) and arguments.readout != "attentive":
            raise ConfigError("probe EMBEDDINGS with labels of a table, or --weights and --feed "
                              "with labels of the feed; not both (but --readout attentive needs "
                              "weights)")
        return _study(arguments)
    if not (arguments.feed and arguments.weights and arguments.out):
        raise ConfigError("probe needs EMBEDDINGS, or --weights, --feed and --out")
    for name in ("label", "session", "positive", "order", "missing", "site", "adjust", "readout"):
        if getattr(arguments, name) not in (None, [], "linear"):
            raise ConfigError(f"--{name}: probe --feed has no use for it; name labels of the feed "
                              "by --labels, or embed and study the EMBEDDINGS")
    return _probe_feed(arguments)


def _study(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.labels import join as join_labels
    from neurojepa.downstream.study import Design, study
    from neurojepa.downstream.study_output import write_studies
    from neurojepa.downstream.table import read_embeddings
    from neurojepa.downstream.volumes import read_volumes

    if not arguments.label or len(arguments.labels) != 1:
        raise ConfigError("probe EMBEDDINGS needs one table, --labels TABLE, and the columns of it "
                          "that are to be told, --label COLUMN")
    if both := set(arguments.label) & set(arguments.adjust):
        raise ConfigError(f"--adjust {min(both)}: is the label itself; leave it out there")
    repeats, folds = folds_of(arguments.cv)
    design = Design(folds, repeats, tuple(arguments.adjust), arguments.site,
                    tuple(arguments.positive), tuple(arguments.order), arguments.allow_seen)
    embeddings = read_embeddings(arguments.embeddings)
    if arguments.cohort:
        cohorts = embeddings["cohort"].to_pylist()
        if arguments.cohort not in cohorts:
            raise ConfigError(f"--cohort {arguments.cohort}: the embeddings are of "
                              f"{', '.join(sorted(set(cohorts)))}")
        embeddings = embeddings.filter([name == arguments.cohort for name in cohorts])
    people = join_labels(embeddings, arguments.labels[0], key=arguments.key,
                         id_column=arguments.id, session_column=arguments.session,
                         modality=arguments.modality, missing=arguments.missing,
                         volumes=read_volumes(arguments.embeddings))
    for note in people.notes:
        print(note)
    studies, tokens = [], _tokens(arguments, embeddings)
    for label in arguments.label:
        studies.append(study(people, label, design, tokens))
        print_rows(label, studies[-1].rows, (*studies[-1].notes, *studies[-1].warnings))
    write_studies(arguments.out or arguments.embeddings, studies, {
        "embeddings": arguments.embeddings, "labels": arguments.labels[0], "cv": arguments.cv,
        "modality": arguments.modality or embeddings["modality"][0].as_py(),
        "allow_seen": arguments.allow_seen, "notes": people.notes})
    return 0


def _tokens(arguments: argparse.Namespace, embeddings: pa.Table) -> Tokens | None:
    """The tokens of the scans studied, for an attentive readout."""
    if arguments.readout != "attentive":
        return None
    from neurojepa.downstream.attending import read_tokens
    from neurojepa.downstream.labels import one_modality
    from neurojepa.storage import join

    if not arguments.weights:
        raise ConfigError("--readout attentive reads tokens anew: name the weights that embedded, "
                          "--weights W, and the feed, --feed FEED, if you embedded one")
    arguments.feed = arguments.feed or join(arguments.embeddings, "scans", "feed")
    feed, weights = open_both(arguments)
    return read_tokens(weights, feed, one_modality(embeddings, arguments.modality))


def _probe_feed(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.embed import embed, select_rows
    from neurojepa.downstream.finetuned import record_of
    from neurojepa.downstream.probe import probe
    from neurojepa.downstream.report import probe_page
    from neurojepa.model_card import identity
    from neurojepa.storage import join, write_bytes
    from neurojepa.weights import untrained

    feed, weights = open_both(arguments)
    rows, notes = _testable(weights, feed, select_rows(feed, arguments.modality, arguments.cohort),
                            arguments.allow_seen)
    for note in notes:
        print(note)
    models = {"neurojepa": weights, "random init": untrained(weights.config, weights.grid)}
    if arguments.weights == "random":
        del models["neurojepa"]
    labels, results = feed.labels(), {}
    for name, each in models.items():
        embeddings = embed(each.model, each.config, feed, rows, each.places)
        results[name] = [probe(embeddings, label, embeddings.labels(labels, label))
                         for label in arguments.labels]
        for result in results[name]:
            scores = ", ".join(f"{metric} {value}" for metric, value in result.scores.items())
            print(f"{name}: {result.target}: {scores}", flush=True)
    record = {
        "weights": arguments.weights, "step": weights.step, "feed": feed.fingerprint,
        "identity": {} if arguments.weights == "random" else identity(record_of(arguments.weights)),
        "modality": arguments.modality, "cohort": arguments.cohort, "notes": notes,
        "results": {name: {result.target: {
            **{metric: value.as_dict() for metric, value in result.scores.items()},
            "num_train_people": result.num_train_people} for result in each}
            for name, each in results.items()},
    }
    write_bytes(join(arguments.out, "report.html"), probe_page(results, record).encode())
    write_bytes(join(arguments.out, "results.json"),
                json.dumps(record, indent=1, default=float).encode())
    return 0


def _testable(weights: Weights, feed: Feed, rows: np.ndarray,
              allowed: bool) -> tuple[np.ndarray, list[str]]:
    """Rows of the feed without people of split test who were seen in the pretraining, if they are
    not ``allowed``; and what is to be said of them."""
    from neurojepa.downstream.api import seen_of

    if weights.seen is None:
        return rows, ["who was in the pretraining of the weights is not known, as they were "
                      "exported without its feed: if people of split test were, scores may be too "
                      "good"]
    person, scan, split = (np.array(feed.index[name].to_pylist())[rows]
                           for name in ("participant", "scan_id", "split"))
    seen = np.array(seen_of(weights.seen, person.tolist(), scan.tolist())) & (split == "test")
    if not seen.any():
        return rows, []
    told = (f"{len(set(person[seen]))} of {len(set(person[split == 'test']))} people of split test "
            "were seen in the pretraining of the weights and ")
    if allowed:
        return rows, [told + "tested all the same (--allow-seen): scores may be too good"]
    return rows[~seen], [told + "are not tested; --allow-seen tests them"]
