"""``explain``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
from functools import partial

from neurojepa.downstream.commands import people_of, positive_argument, table_arguments
from neurojepa.errors import ConfigError


def add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    command = commands.add_parser("explain", help="where in a scan a label is read from")
    command.add_argument("scans", nargs="+", metavar="SCANS", help="as embed takes them: files, a "
                         "folder, a BIDS dataset, a table of files or a feed")
    command.add_argument("--weights", required=True, help="exported weights, those of the "
                         "embeddings")
    command.add_argument("--embeddings", required=True, help="folder that embed wrote: the people "
                         "who teach the readout")
    table_arguments(command)
    command.add_argument("--label", required=True, help="its column that is read")
    positive_argument(command)
    command.add_argument("--out", required=True, help="folder for maps and the page")
    command.add_argument("--modality", help="only scans of this modality; the readout is taught by "
                         "embeddings of the same")
    command.add_argument("--cohort", help="of a feed, only this cohort")
    command.add_argument("--most", type=int, default=20, help="so many scans at most, the first "
                         "ones (default: 20)")
    command.add_argument("--atlas", help="label map in MNI152 space (NIfTI; names in a .tsv "
                         "beside it); default: lobes by coordinates")
    command.add_argument("--preset", default="default", choices=["quick", "default", "paper"],
                         help="as of embed")
    command.add_argument("--device", help="as of embed")


def run_explain(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import explain_page as pages
    from neurojepa.downstream.api import load_model
    from neurojepa.downstream.explain import Teachers, check_weights, explain
    from neurojepa.downstream.labels import one_modality
    from neurojepa.downstream.native import Maps
    from neurojepa.downstream.output import write_task
    from neurojepa.downstream.regions import load_regions
    from neurojepa.downstream.table import read_embeddings

    if arguments.most < 1:
        raise ConfigError(f"--most {arguments.most}: at least one scan is needed")
    table = one_modality(read_embeddings(arguments.embeddings), arguments.modality)
    modality = table["modality"][0].as_py()
    people = people_of(arguments, table, modality, volumes=False)
    teachers = Teachers.of(people, arguments.label, tuple(arguments.positive), table)
    model = load_model(arguments.weights, arguments.device)
    check_weights(model.weights, people.values.shape[1])
    with model.found(arguments.scans, arguments.out, modality, arguments.cohort, arguments.preset,
                     arguments.key, 1) as (feed, rows, scans, _):
        notes = [*people.notes]
        if len(rows) > arguments.most:
            notes.append(f"{len(rows) - arguments.most} scans beyond the first {arguments.most} "
                         "were not explained (--most)")
        rows = rows[:arguments.most]
        regions = load_regions(feed.grid, model.weights.config.model.patch_voxels, arguments.atlas)
        found = explain(model.weights, feed, rows, scans, teachers, regions, lambda done: print(
            f"{done} of {len(rows)} scans", end="\r" if done < len(rows) else "\n", flush=True))
        maps = Maps(arguments.out, feed.grid, scans)
        paths = [maps.write(each.who, each.map, "saliency", arguments.label, {
            "Description": f"what each voxel of the prepared scan adds to the score of "
                           f"{arguments.label}, interpolated; integrated gradients",
            "Units": found.unit, "Score": each.score, "ScoreOfUsualScan": each.usual})
            for each in found.scans]
    for line in (*notes, *found.warnings):
        print(line)
    for check in found.checks:
        print(f"{check.who.participant}: {check.part} drawn anew: rank correlation "
              f"{check.rank:.2f}, of absolute values {check.rank_of_size:.2f}")
    write_task(arguments.out, "explain/1", {
        "embeddings": arguments.embeddings, "labels": arguments.labels, "modality": modality,
        "weights": arguments.weights, "feed": feed.fingerprint, "maps": paths,
        "notes": notes, **pages.record_of(found)}, methods=partial(pages.methods, found),
        page=partial(pages.explain_page, found, feed.grid), predictions=pages.predictions_of(found))
    return 0
