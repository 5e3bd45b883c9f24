"""``fuse``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
from functools import partial

from neurojepa.downstream import commands as shared


def add_fuse(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    command = commands.add_parser("fuse", help="a label from images and columns of a table, with "
                                  "gaps")
    shared.embeddings_arguments(command)
    shared.table_arguments(command)
    command.add_argument("--label", required=True, help="its column that is told")
    command.add_argument("--block", nargs="+", required=True, metavar="NAME=COLUMN,COLUMN",
                         help="its columns that are measured together, such as "
                         "fluid=abeta,tau; people who lack a block stay")
    shared.class_arguments(command)
    command.add_argument("--session", help="its column of visits, where it changes with them")
    shared.cv_arguments(command)


def run_fuse(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import fuse_page as pages
    from neurojepa.downstream.blocks import parse_blocks
    from neurojepa.downstream.fuse import fuse
    from neurojepa.downstream.output import write_task
    from neurojepa.downstream.table import read_embeddings

    repeats, folds = shared.folds_of(arguments.cv)
    blocks = parse_blocks(arguments.block)
    table = read_embeddings(arguments.embeddings)
    people = shared.people_of(arguments, table, arguments.modality, arguments.session,
                              volumes=False)
    found = fuse(people, arguments.label, blocks, adjust=tuple(arguments.adjust),
                 positive=tuple(arguments.positive), order=tuple(arguments.order), folds=folds,
                 repeats=repeats, allow_seen=arguments.allow_seen)
    shared.print_rows(arguments.label, found.rows, (*found.notes, *found.warnings))
    write_task(arguments.out, "fuse/1", {
        "embeddings": arguments.embeddings, "labels": arguments.labels, "cv": arguments.cv,
        "modality": arguments.modality or table["modality"][0].as_py(),
        "allow_seen": arguments.allow_seen, "notes": people.notes, **pages.record_of(found)},
        methods=partial(pages.methods, found), page=partial(pages.fuse_page, found),
        predictions=pages.predictions_of(found))
    return 0
