"""Commands that study embeddings with a table of the user's own: arguments, and what they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from neurojepa.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from neurojepa.downstream.labels import People


# ---- arguments -----------------------------------------------------------------------------------

def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parsers of ``RUN``'s commands."""
    command = commands.add_parser("reliability", help="how alike rescans are, at one site or more")
    embeddings_arguments(command)
    table_arguments(command, required=False)
    command.add_argument("--label", nargs="+", default=[], help="its columns that are read out of "
                         "every scan")
    class_arguments(command)
    command.add_argument("--across-visits", action="store_true", help="scans of all visits of a "
                         "person are rescans, as where people travelled between scanners "
                         "(default: scans of one visit)")

    command = commands.add_parser("survive", help="when an event happens, from censored times")
    embeddings_arguments(command)
    table_arguments(command)
    command.add_argument("--time", required=True, help="its column of times from the scan to the "
                         "event, or to the end of follow-up")
    command.add_argument("--event", required=True, help="its column of whether the event ended "
                         "that time (1, yes, true), or follow-up did (0, no, false)")
    command.add_argument("--positive", help="the value of --event that says that it happened, "
                         "where it is another one")
    command.add_argument("--session", help="its column of visits, of which each person has one "
                         "row: the visit from which time counts (default: the first visit)")
    command.add_argument("--reference", help="column of risks that are known, for a row of its "
                         "own: such as a clinical score, or the true hazard of made-up people")
    cv_arguments(command)
    command = commands.add_parser("change", help="how a label changes between visits")
    embeddings_arguments(command)
    table_arguments(command)
    command.add_argument("--session", required=True, help="its column of visits")
    command.add_argument("--time", required=True, help="its column of when each visit was, such as "
                         "the age in years")
    command.add_argument("--label", required=True, help="its column of numbers that change")
    cv_arguments(command)
    command = commands.add_parser("transfer", help="one modality told from another")
    embeddings_arguments(command, modality=False)
    command.add_argument("--from", dest="source", required=True, help="modality to tell from, such "
                         "as T1w")
    command.add_argument("--to", required=True, help="modality that is told, such as PET or ALFF")
    table_arguments(command)
    command.add_argument("--session", help="its column of visits, where scans of one visit are "
                         "paired; default: means over a person's visits")
    command.add_argument("--site", help="column of sites, of the table or the scans: they are left "
                         "out one by one")
    cv_arguments(command)


def embeddings_arguments(command: argparse.ArgumentParser, modality: bool = True) -> None:
    """Where embeddings are, and where results go."""
    command.add_argument("embeddings", metavar="EMBEDDINGS", help="folder that embed wrote")
    command.add_argument("--out", required=True, help="folder for what is written")
    if modality:
        command.add_argument("--modality", help="of the scans, where there are several")


def table_arguments(command: argparse.ArgumentParser, required: bool = True) -> None:
    """Where labels are, and how their ids become those of embeddings."""
    command.add_argument("--labels", required=required, help="table of your own (.csv, .tsv), "
                         "joined by your own ids")
    command.add_argument("--id", default="participant_id", help="its column of ids (default: "
                         "participant_id)")
    command.add_argument("--missing", nargs="+", default=[], help="values that mean missing, "
                         "beside empty and n/a: such as 999 (write -9 as --missing=-9)")
    command.add_argument("--key", help="file of the pseudonym key that embed used")


def apply_arguments(command: argparse.ArgumentParser, model: str) -> None:
    """What is applied to scans as they are; ``model`` is its name in the help."""
    command.add_argument("model", metavar=model, help="folder that fit wrote")
    command.add_argument("scans", nargs="+", metavar="SCANS", help="as of embed: files, a folder, "
                         "a dataset, a table of files or a feed")
    command.add_argument("--out", required=True, help="folder for what is written")
    command.add_argument("--modality", help="only this one; of files, what they are where names do "
                         "not say it")
    command.add_argument("--preset", default="default", choices=["quick", "default", "paper"],
                         help="how thoroughly scans are prepared (default: default)")
    command.add_argument("--key", help="file of the pseudonym key")
    command.add_argument("--device", help="of torch (default: the first GPU if there is one)")


def cv_arguments(command: argparse.ArgumentParser) -> None:
    """How people are tested, and what with."""
    command.add_argument("--cv", default="5x5", help="repeats x folds of the outer "
                         "cross-validation (default: 5x5)")
    command.add_argument("--adjust", nargs="+", default=[], help="columns of covariates: of the "
                         "table or age, sex, brain_ml, field_strength")
    command.add_argument("--allow-seen", action="store_true", help="test people who were in the "
                         "pretraining, too; the report says so")


def class_arguments(command: argparse.ArgumentParser) -> None:
    """What a label's values mean."""
    positive_argument(command)
    command.add_argument("--order", nargs="+", default=[], help="levels of an ordinal label, from "
                         "low to high")


def positive_argument(command: argparse.ArgumentParser) -> None:
    """What a label's values mean where levels have no order."""
    command.add_argument("--positive", nargs="+", default=[], help="positive class of a label of "
                         "two; of more, that one against the rest")


def folds_of(cv: str) -> tuple[int, int]:
    """Repeats and folds of --cv.

    Raises
    ------
    ConfigError
        It is not written as repeats x folds.
    """
    repeats, _, folds = cv.partition("x")
    if not (repeats.isdigit() and folds.isdigit() and int(repeats) and int(folds) > 1):
        raise ConfigError(f"--cv {cv}: write repeats x folds, such as 5x5")
    return int(repeats), int(folds)


def people_of(arguments: argparse.Namespace, table: pa.Table, modality: str | None,
              session: str | None = None, *, volumes: bool = True) -> People:
    """Embeddings joined with the table, and with region volumes; what did not meet is printed."""
    from neurojepa.downstream.labels import join as join_labels
    from neurojepa.downstream.volumes import read_volumes

    people = join_labels(table, arguments.labels, key=arguments.key, id_column=arguments.id,
                         session_column=session, modality=modality,
                         missing=arguments.missing,
                         volumes=read_volumes(arguments.embeddings) if volumes else None)
    for note in people.notes:
        print(note)
    return people


# ---- what they run -------------------------------------------------------------------------------

def run_reliability(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import reliability_page as pages
    from neurojepa.downstream.labels import one_modality
    from neurojepa.downstream.reliability import reliability, scans_of, with_labels
    from neurojepa.downstream.table import read_embeddings
    from neurojepa.downstream.volumes import read_volumes

    if bool(arguments.label) != bool(arguments.labels):
        raise ConfigError("reliability: readouts need a table and its columns, --labels TABLE "
                          "--label COLUMN; without either, features alone are compared")
    table = one_modality(read_embeddings(arguments.embeddings), arguments.modality)
    scans, unit, notes = scans_of(table, read_volumes(arguments.embeddings),
                                  arguments.across_visits)
    labels = {}
    if arguments.label:
        people = people_of(arguments, table, arguments.modality, volumes=False)
        notes += people.notes
        labels = with_labels(scans, people, arguments.label)
    found = reliability(scans, unit, labels, tuple(arguments.positive), tuple(arguments.order))
    for line in found.warnings:
        print(line)
    for each in found.measures:
        print(f"{each.name}{', after ComBat' if each.alike else ''}: ICC {each.icc}"
              + (f", nearest is a rescan {each.same}" if each.same else "")
              + (f", site told {each.site}" if each.site else ""), flush=True)
    _write(arguments, pages, found, pages.reliability_page, notes, pages.predictions_of(
        found, scans), modality=table["modality"][0].as_py(),
        rescans="people" if arguments.across_visits else "visits")
    return 0


def run_survive(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import survive_page as pages
    from neurojepa.downstream.labels import first_visits, one_modality
    from neurojepa.downstream.survive import survive
    from neurojepa.downstream.table import read_embeddings

    repeats, folds = folds_of(arguments.cv)
    everything = read_embeddings(arguments.embeddings)
    table = one_modality(everything, arguments.modality)
    notes: list[str] = []
    if not arguments.session:  # later scans exist only of those who lived to have them
        table, notes = first_visits(table, everything)
    people = people_of(arguments, table, arguments.modality, arguments.session)
    found = survive(people, arguments.time, arguments.event, positive=arguments.positive,
                    adjust=tuple(arguments.adjust), reference=arguments.reference, folds=folds,
                    repeats=repeats, allow_seen=arguments.allow_seen)
    print_rows(arguments.event, found.rows, (*notes, *found.notes, *found.warnings))
    _write(arguments, pages, found, pages.survive_page, [*notes, *people.notes],
           pages.predictions_of(found, arguments.time, arguments.event),
           labels=arguments.labels, cv=arguments.cv, modality=table["modality"][0].as_py(),
           time=arguments.time, event=arguments.event, reference=arguments.reference,
           session=arguments.session, allow_seen=arguments.allow_seen)
    return 0


def run_change(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import change_page as pages
    from neurojepa.downstream.change import change
    from neurojepa.downstream.table import read_embeddings

    repeats, folds = folds_of(arguments.cv)
    table = read_embeddings(arguments.embeddings)
    people = people_of(arguments, table, arguments.modality, arguments.session)
    found = change(people, arguments.label, arguments.time, adjust=tuple(arguments.adjust),
                   folds=folds, repeats=repeats, allow_seen=arguments.allow_seen)
    print_rows(arguments.label, found.rows, (*found.notes, *found.warnings))
    for each in found.slopes:
        print(f"{arguments.label}: mixed model, {each.row}: {each.value:+.4g} [{each.low:+.4g}, "
              f"{each.high:+.4g}] for one sd, p {each.p:.2g}", flush=True)
    _write(arguments, pages, found, pages.change_page, people.notes, pages.predictions_of(found),
           labels=arguments.labels, cv=arguments.cv,
           modality=arguments.modality or table["modality"][0].as_py(), time=arguments.time,
           label=arguments.label, allow_seen=arguments.allow_seen)
    return 0


def run_transfer(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import transfer_page as pages
    from neurojepa.downstream.table import read_embeddings
    from neurojepa.downstream.transfer import paired, transfer

    if arguments.source == arguments.to:
        raise ConfigError(f"--from {arguments.source} --to {arguments.to}: name two modalities")
    repeats, folds = folds_of(arguments.cv)
    table = read_embeddings(arguments.embeddings)
    both = [people_of(arguments, table, arguments.source, arguments.session),
            people_of(arguments, table, arguments.to, arguments.session, volumes=False)]
    people, target, notes = paired(*both)
    found = transfer(people, target, adjust=tuple(arguments.adjust), site=arguments.site,
                     folds=folds, repeats=repeats, allow_seen=arguments.allow_seen)
    name = f"{arguments.to} from {arguments.source}"
    print_rows(name, found.rows, (*notes, *found.notes, *found.warnings))
    for shot in found.shots:
        print(f"{name}: {shot.row}, {shot.taught} people teach: " + ", ".join(
            f"{metric} {value}" for metric, value in shot.scores.items()), flush=True)
    _write(arguments, pages, found, pages.transfer_page, [*both[0].notes, *notes],
           pages.predictions_of(found), labels=arguments.labels, cv=arguments.cv,
           **{"from": arguments.source}, to=arguments.to, site=arguments.site,
           allow_seen=arguments.allow_seen)
    return 0


def _write(arguments: argparse.Namespace, pages: Any, found: Any, page: Callable[..., str],
           notes: list[str], predictions: Sequence[Sequence[str]], **said: Any) -> None:
    """Write what was found.

    Parameters
    ----------
    pages : the task's module of ``record_of`` and ``methods``
    said : of the command line, for the record
    """
    from neurojepa.downstream.output import write_task

    write_task(arguments.out, f"{arguments.task}/1", {
        "embeddings": arguments.embeddings, **said, "notes": notes, **pages.record_of(found)},
        methods=partial(pages.methods, found), page=partial(page, found), predictions=predictions)


def print_rows(name: str, rows: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Notes, and each row's scores on a line."""
    for line in notes:
        print(f"{name}: {line}", flush=True)
    for row, found in rows.items():
        print(f"{name}: {row}: " + ", ".join(
            f"{metric} {value}" for metric, value in found.scores.items()), flush=True)


RUN = {"reliability": run_reliability, "survive": run_survive, "change": run_change,
       "transfer": run_transfer}
