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

from neurojepa.downstream.code_command import add_code, run_code
from neurojepa.downstream.commands import RUN, add_commands
from neurojepa.downstream.complete_command import add_complete, run_complete
from neurojepa.downstream.depart_command import add_depart, run_depart
from neurojepa.downstream.explain_command import add_explain, run_explain
from neurojepa.downstream.finetune_command import add_finetune, run_finetune
from neurojepa.downstream.fuse_command import add_fuse, run_fuse
from neurojepa.downstream.image_commands import IMAGE_RUN, add_image_commands
from neurojepa.downstream.opened import open_both, open_random, open_weights
from neurojepa.downstream.probe_command import probe_arguments, run_probe
from neurojepa.errors import ConfigError, run_command


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
            probe_arguments(command)
        if task == "atoms":
            command.add_argument("--split", choices=("train", "val", "test"), default="test",
                                 help="of the scans shown (default: test)")
            command.add_argument("--atlas", help="label map in MNI152 space (NIfTI; names in a "
                                 ".tsv beside it); default: lobes by coordinates")
    for add in (add_commands, add_code, add_fuse, add_explain, add_depart, add_finetune,
                add_complete, add_image_commands):
        add(commands)
    commands.add_parser("weights", help="verify, export, convert and describe weights")
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
    weights = (open_random(arguments, named[0]) if arguments.weights == "random"
               else open_weights(arguments.weights))
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


def run_atoms(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.atoms import observe
    from neurojepa.downstream.atoms_page import atoms_page, record_of, tables_of
    from neurojepa.downstream.embed import select_rows
    from neurojepa.downstream.regions import load_regions
    from neurojepa.storage import join, write_bytes

    feed, weights = open_both(arguments)
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


if __name__ == "__main__":
    run_command(main, teardown="RANK" not in os.environ)
