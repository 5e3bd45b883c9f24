"""Use exported weights: on scans as they are, or on a feed.

    neurojepa embed SCANS... --weights DIR --out DIR
    neurojepa probe EMBEDDINGS --labels TABLE --id COLUMN --label COLUMN
    neurojepa probe --weights DIR --feed FEED --out DIR [--labels age sex]
    neurojepa reliability EMBEDDINGS --out DIR [--labels TABLE --label COLUMN]
    neurojepa survive EMBEDDINGS --out DIR --labels TABLE --time C --event C
    neurojepa change EMBEDDINGS --out DIR --labels TABLE --session C --time C
    neurojepa transfer EMBEDDINGS --out DIR --from T1w --to PET --labels TABLE
    neurojepa fuse EMBEDDINGS --out DIR --labels TABLE --label COLUMN
        --block NAME=COLUMN,COLUMN
    neurojepa explain SCANS... --weights DIR --embeddings EMBEDDINGS
        --labels TABLE --label COLUMN --out DIR
    neurojepa finetune fit FEED --weights DIR --labels TABLE --label C --out M
    neurojepa finetune apply M SCANS... --out DIR
    neurojepa code --weights DIR --feed FEED --out DIR
    neurojepa depart SCAN --weights DIR --reference FEED --out DIR
    neurojepa complete fit FEED --weights DIR --from T1w --to FLAIR --out C
    neurojepa complete apply C SCANS... --out DIR
    neurojepa register MOVING FIXED --out DIR [--moving-labels FILE]
    neurojepa segment fit SCANS... --labels FILES... --out M
    neurojepa segment apply M SCANS... --out DIR
    neurojepa atoms --weights DIR --feed FEED --out DIR [--atlas FILE]
    neurojepa weights export RUN --out DIR

SCANS are a file, files, a folder of scans or of DICOM slices, a BIDS dataset, a table of files or
a feed.  EMBEDDINGS is a folder that ``embed`` wrote.  ``probe --feed`` is a quick check of a run:
it fits labels of the feed on its split ``train`` and scores its split ``test``, beside the same
architecture at random initialisation.  All write results.json, most of them a report.html, too.
``neurojepa COMMAND --help`` says more about one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.downstream.code_command import add_code, run_code
from neurojepa.downstream.commands import (
    RUN,
    add_commands,
    class_arguments,
    folds_of,
    print_rows,
)
from neurojepa.downstream.complete_command import add_complete, run_complete
from neurojepa.downstream.depart_command import add_depart, run_depart
from neurojepa.downstream.explain_command import add_explain, run_explain
from neurojepa.downstream.finetune_command import add_finetune, run_finetune
from neurojepa.downstream.fuse_command import add_fuse, run_fuse
from neurojepa.downstream.image_commands import IMAGE_RUN, add_image_commands
from neurojepa.errors import ConfigError, run_command

if TYPE_CHECKING:
    import pyarrow as pa

    from neurojepa.downstream.attending import Tokens
    from neurojepa.feed.format import Feed
    from neurojepa.weights import Weights


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["weights"]:
        from neurojepa import weights

        return weights.main(words[1:])
    parser = argparse.ArgumentParser(prog="neurojepa", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", required=True)
    for task, text in (("embed", "write frozen embeddings"), ("probe", "linear probes"),
                       ("atoms", "where atoms fire and what experts see")):
        command = commands.add_parser(task, help=text)
        command.add_argument("--weights", required=task != "probe", help="exported weights, or "
                             "'random' with --config: that architecture, untrained")
        command.add_argument("--config", help="recipe of the architecture for --weights random")
        command.add_argument("--feed", required=task == "atoms", help="a packed feed"
                             + (", the same as SCANS" if task == "embed" else ""))
        command.add_argument("--out", required=task != "probe", help="folder for what is written"
                             + (" (default: of EMBEDDINGS)" if task == "probe" else ""))
        command.add_argument("--modality", help="only this modality; default: all"
                             + ("; files whose names do not say theirs are taken for it"
                                if task == "embed" else ""))
        command.add_argument("--cohort", help="only this cohort; default: all")
        if task == "embed":
            _embed_arguments(command)
        if task == "probe":
            _probe_arguments(command)
        if task == "atoms":
            command.add_argument("--split", choices=("train", "val", "test"), default="test",
                                 help="of the scans shown (default: test)")
            command.add_argument("--atlas", help="label map in MNI152 space (NIfTI; names in a "
                                 ".tsv beside it); default: lobes by coordinates")
    for add in (add_commands, add_code, add_fuse, add_explain, add_depart, add_finetune,
                add_complete, add_image_commands):
        add(commands)
    commands.add_parser("weights", help="verify, export and describe weights")
    arguments = parser.parse_args(words)
    arguments.words = words  # for the ranks that it may start
    run = {"embed": run_embed, "probe": run_probe, "atoms": run_atoms, "fuse": run_fuse,
           "explain": run_explain, "depart": run_depart, "code": run_code, "finetune": run_finetune,
           "complete": run_complete, **RUN, **IMAGE_RUN}[arguments.task]
    return run(arguments)


def _embed_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("scans", nargs="*", metavar="SCANS", help="NIfTI or MGZ files, folders of "
                         "DICOM slices; or one folder of scans, BIDS dataset, table of files "
                         "(.csv, .tsv) or feed")
    command.add_argument("--device", help="of torch, such as cpu or cuda:1 (default: the first GPU "
                         "if there is one)")
    command.add_argument("--regions", action="store_true", help="write regions.parquet too: lobes "
                         "by coordinates, or those of --atlas")
    command.add_argument("--atlas", help="label map in MNI152 space (NIfTI; names in a .tsv "
                         "beside it)")
    command.add_argument("--atoms", action="store_true", help="atoms of the sparse code in place "
                         "of latents, compared with those of the scans embedded (of split train, "
                         "where a feed has one)")
    command.add_argument("--preset", default="default", choices=["quick", "default", "paper"],
                         help="how thoroughly scans are prepared; take the one that the feed of "
                         "the weights was prepared with (default: default)")
    command.add_argument("--key", help="file of the pseudonym key (default: $NEUROJEPA_KEY_FILE, "
                         "else one made once at ~/.config/neurojepa/pseudonym.key)")
    command.add_argument("--workers", type=int, default=1, help="people prepared at once; more "
                         "than one needs Ray (default: 1)")


def run_embed(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.api import Model
    from neurojepa.storage import join, write_bytes

    named = [*arguments.scans, *([arguments.feed] if arguments.feed else [])]
    if not named or (arguments.feed and arguments.scans):
        raise ConfigError("embed what? name scans, or a feed, once")
    weights = (_open_random(arguments, named[0]) if arguments.weights == "random"
               else _open_weights(arguments.weights))
    model = Model(weights, arguments.weights, arguments.device)
    found = model.embed(
        named, out=arguments.out, modality=arguments.modality, cohort=arguments.cohort,
        regions=arguments.regions, atlas=arguments.atlas, atoms=arguments.atoms,
        preset=arguments.preset, key=arguments.key, workers=arguments.workers,
        progress=lambda done, of: print(f"{done} of {of} scans", end="\r" if done < of else "\n",
                                        flush=True))
    found.write(arguments.out)
    record = {"schema": "neurojepa/embed/1", "weights": arguments.weights, "step": weights.step,
              "feed": found.feed, "scans": found.table.num_rows, "skipped": found.skipped,
              "status": dict(Counter(found.scans.about["status"].to_pylist()))
              if found.scans else None}
    write_bytes(join(arguments.out, "results.json"), json.dumps(record, indent=1).encode())
    print(f"{found.table.num_rows} embeddings of {found.values.shape[1]} features in "
          f"{arguments.out}")
    return 0


def _open_weights(uri: str) -> Weights:
    from neurojepa.weights import load

    return load(uri)


def _open_random(arguments: argparse.Namespace, feed: str) -> Weights:
    from neurojepa.config import load_config
    from neurojepa.feed.format import open_feed
    from neurojepa.weights import untrained

    if not arguments.config:
        raise ConfigError("--weights random needs --config RECIPE: whose architecture?")
    config = load_config(arguments.config, [f"data.feed={feed}", "run.dir=unused"])
    return untrained(config, open_feed(feed).grid)


def _probe_arguments(command: argparse.ArgumentParser) -> None:
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
    feed, weights = _open(arguments)
    return read_tokens(weights, feed, one_modality(embeddings, arguments.modality))


def _probe_feed(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.embed import embed, select_rows
    from neurojepa.downstream.probe import probe
    from neurojepa.downstream.report import probe_page
    from neurojepa.storage import join, write_bytes
    from neurojepa.weights import untrained

    feed, weights = _open(arguments)
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


def run_atoms(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.atoms import observe
    from neurojepa.downstream.atoms_page import atoms_page, record_of, tables_of
    from neurojepa.downstream.embed import select_rows
    from neurojepa.downstream.regions import load_regions
    from neurojepa.storage import join, write_bytes

    feed, weights = _open(arguments)
    rows = select_rows(feed, arguments.modality, arguments.cohort, arguments.split)
    patch = weights.config.model.patch_voxels
    regions = load_regions(feed.grid, patch, arguments.atlas)
    seen = observe(weights.model, weights.config, feed, rows, progress=lambda done: print(
        f"{done} of {len(rows)} scans", end="\r" if done < len(rows) else "\n", flush=True))
    record = {"weights": arguments.weights, "step": weights.step, "feed": feed.fingerprint,
              "split": arguments.split, "modality": arguments.modality,
              "cohort": arguments.cohort, "scans": len(rows),
              **record_of(seen, regions, feed, patch)}
    write_bytes(join(arguments.out, "report.html"),
                atoms_page(record, seen, regions, feed, patch).encode())
    write_bytes(join(arguments.out, "results.json"), json.dumps(record, indent=1).encode())
    for name, data in tables_of(record).items():
        write_bytes(join(arguments.out, name), data)
    if seen.atoms:
        print(f"{record['atoms']['active']} of {len(record['atoms']['rows'])} atoms were active")
    print(f"read {join(arguments.out, 'report.html')}")
    return 0


def _open(arguments: argparse.Namespace) -> tuple[Feed, Weights]:
    from neurojepa.feed.format import open_feed

    feed = open_feed(arguments.feed)
    if arguments.weights == "random":
        return feed, _open_random(arguments, arguments.feed)
    weights = _open_weights(arguments.weights)
    if not np.array_equal(weights.grid.affine, feed.grid.affine):
        raise ConfigError(f"--feed {arguments.feed} is packed at grid {feed.grid.name}, the "
                          f"weights were trained at {weights.grid.name}; pack the archive with "
                          f"--grid {weights.grid.name}")
    return feed, weights


if __name__ == "__main__":
    run_command(main, teardown="RANK" not in os.environ)
