"""python -m data_prep synth | index | doctor | prepare | pack | verify | withdraw | report

    python -m data_prep synth   --out cohort --participants 8
    python -m data_prep index   --cohort bids --source cohort --out cohort.parquet
    python -m data_prep prepare --manifest cohort.parquet --out archive --preset quick
    python -m data_prep pack    --archive archive --out feed --grid 3mm
    python -m data_prep verify  feed

Every step can be interrupted and run again; sources and targets are local paths or s3:// URIs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from neurojepa.errors import ConfigError, run_command

COHORTS = {
    "ukb": "UK Biobank: bulk zips by field and instance, or a RAP project's Bulk folder; tables",
    "abcd": "ABCD: NBDC releases (BIDS and tables), NDA packages, derivatives of collection 3165",
    "adni": "ADNI: the tree as LONI delivers it, NIfTI or DICOM, and its CSV tables",
    "bids": "any BIDS dataset with its derivatives, or a folder of loose *_T1w.nii.gz files",
    "files": "whatever files a --table lists, with person and modality; see cohorts/files.py",
}
Steps: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
GRIDS = ["1.5mm", "1.6mm", "3mm", "paper"]  # of TRAINING_GRIDS, whose import would slow --help


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one step."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for add in (_add_synth, _add_index, _add_doctor, _add_prepare, _add_pack, _add_verify,
                _add_withdraw, _add_report):
        add(steps)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _add_synth(steps: Steps) -> None:
    step = steps.add_parser("synth", help="make a synthetic BIDS cohort with labels")
    step.add_argument("--out", required=True)
    step.add_argument("--participants", type=_positive, required=True)
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--spacing-mm", type=float, default=2.0)
    step.add_argument("--workers", type=_positive, default=os.cpu_count() or 1)
    step.add_argument("--anatomies", type=Path, help="folder of label maps people are made from")
    step.add_argument("--linked", type=float, default=0.0, metavar="SHARE", help="of people, whose "
                      "PET and BOLD follow what their T1w shows (default: 0)")
    step.set_defaults(run=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from data_prep.synth import synthesise

    if arguments.spacing_mm <= 0:
        raise ConfigError(f"--spacing-mm {arguments.spacing_mm}: must be above 0")
    synthesise(arguments.out, participants=arguments.participants, seed=arguments.seed,
               spacing_mm=arguments.spacing_mm, workers=arguments.workers,
               anatomies=arguments.anatomies, linked=arguments.linked)
    return 0


def _add_index(steps: Steps) -> None:
    step = steps.add_parser(
        "index", help="list a cohort's scans, with pseudonyms and splits",
        description="List the scans of a cohort as delivered; archives are read in place and no "
                    "voxels are decoded.  Run again with the same --out, only what is new or "
                    "changed is opened, and people keep their splits.",
        epilog="cohorts:\n" + "\n".join(f"  {name:5s} {text}" for name, text in COHORTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    step.add_argument("--cohort", choices=list(COHORTS), required=True, metavar="COHORT",
                      help="kind of source, see below")
    step.add_argument("--source", required=True, help="folder or s3:// prefix of the cohort")
    step.add_argument("--table", action="append", default=[], metavar="URI",
                      help="a table of the cohort that lies outside the source; may be repeated")
    step.add_argument("--links", metavar="CSV", help="columns cohort, participant, person: the "
                      "same people in several cohorts, who then share a split")
    step.add_argument("--beside", action="append", default=[], metavar="MANIFEST",
                      help="manifest of another cohort in --links, whose splits hold for its "
                           "people here too; may be repeated")
    step.add_argument("--withdrawn", action="append", default=[], metavar="CSV|FOLDER",
                      help="withdrawal list whose people are left out, as withdraw takes it")
    step.add_argument("--out", required=True, help="manifest to write or renew, *.parquet")
    step.add_argument("--name", help="cohort name in all tables (default: the source's last part)")
    step.add_argument("--key", help="file of the pseudonym key (default: $NEUROJEPA_KEY_FILE, "
                      "else one made once at ~/.config/neurojepa/pseudonym.key)")
    step.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> int:
    from data_prep.identity import load_key
    from data_prep.index import index

    index(arguments.cohort, arguments.source, out=arguments.out, key=load_key(arguments.key),
          name=arguments.name, tables=arguments.table, links=arguments.links,
          beside=arguments.beside, withdrawn=arguments.withdrawn)
    return 0


def _add_doctor(steps: Steps) -> None:
    step = steps.add_parser("doctor", help="one person or file: what index and prepare see of it")
    step.add_argument("source", help="folder or s3:// prefix of the cohort")
    step.add_argument("who", metavar="PERSON|FILE", help="id as the source has it, or a file")
    step.add_argument("--cohort", choices=list(COHORTS), default="bids", metavar="COHORT",
                      help="kind of source, as for index (default: bids)")
    step.add_argument("--table", action="append", default=[], metavar="URI",
                      help="as for index; may be repeated")
    step.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from data_prep.doctor import doctor

    doctor(arguments.source, arguments.who, cohort=arguments.cohort, tables=arguments.table)
    return 0


def _add_prepare(steps: Steps) -> None:
    step = steps.add_parser("prepare", help="scans -> quality-checked volumes in MNI space")
    step.add_argument("--manifest", required=True, nargs="+")
    step.add_argument("--out", required=True, help="archive to make or add to")
    step.add_argument("--preset", default="default", choices=["quick", "default", "paper"],
                      help="quick: for a first look; paper: the published order, scan by scan")
    step.add_argument("--mask-tool", default="deepbet", choices=["deepbet", "synthstrip", "hd-bet"],
                      help="brain extraction: built in, or a command installed on every node")
    step.add_argument("--workers", type=_positive, help="people prepared at once (default: as "
                      "many as the machine or the cluster has CPUs)")
    step.add_argument("--ray-address", help="a running Ray cluster (default: $RAY_ADDRESS, as in "
                      "a Ray job; else a local one)")
    step.add_argument("--memory-gib", type=float, default=8.0,
                      help="what the work on a person may take before it is ended (default: 8)")
    step.add_argument("--minutes-per-scan", type=float, default=30.0,
                      help="and how long it may last (default: 30)")
    step.add_argument("--retry-quarantined", action="store_true",
                      help="try the people again of whom an earlier run had to give up a scan")
    step.add_argument("--turn", metavar="TABLE", help="TSV or CSV with columns file and turn: "
                      "scans with wrong axes, and where their R, A and S really point, such as "
                      "LPS; RAS says that the header is right")
    step.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from data_prep.prepare.driver import prepare
    from data_prep.prepare.person import Limits
    from data_prep.volumes.preset import PRESETS

    preset = replace(PRESETS[arguments.preset], mask_tool=arguments.mask_tool)
    limits = Limits(int(arguments.memory_gib * 2**30), 60 * arguments.minutes_per_scan)
    prepare(arguments.manifest, out=arguments.out, preset=preset, workers=arguments.workers,
            ray_address=arguments.ray_address, limits=limits,
            retry_quarantined=arguments.retry_quarantined, turns=arguments.turn)
    return 0


def _add_pack(steps: Steps) -> None:
    step = steps.add_parser("pack", help="archive -> WebDataset tars at a training grid")
    step.add_argument("--archive", required=True)
    step.add_argument("--out", required=True, help="feed to make or replace")
    step.add_argument("--grid", default="1.5mm", choices=GRIDS)
    step.add_argument("--shard-mib", type=_positive, default=256, help="about the size of a tar")
    step.add_argument("--workers", type=_positive, help="shards packed at once (default: as many "
                      "as the cluster has CPUs, without one 1)")
    step.add_argument("--ray-address", help="a running Ray cluster to pack on (default: "
                      "$RAY_ADDRESS, as in a Ray job; else this machine)")
    step.set_defaults(run=_pack)


def _pack(arguments: argparse.Namespace) -> int:
    from data_prep.pack import pack
    from neurojepa.feed.format import TRAINING_GRIDS

    pack(arguments.archive, out=arguments.out, grid=TRAINING_GRIDS[arguments.grid],
         shard_bytes=arguments.shard_mib << 20, workers=arguments.workers,
         ray_address=arguments.ray_address)
    return 0


def _add_verify(steps: Steps) -> None:
    step = steps.add_parser("verify", help="check a feed or an archive; exit 1 if damaged")
    step.add_argument("target", metavar="FEED|ARCHIVE")
    step.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from data_prep.verify import verify

    return verify(arguments.target)


def _add_withdraw(steps: Steps) -> None:
    step = steps.add_parser("withdraw", help="delete people who left a study")
    step.add_argument("--list", required=True, action="append", dest="lists",
                      metavar="CSV|FOLDER", help="as delivered: UK Biobank's w<app>_<date>.csv, or "
                      "columns cohort and participant (original ids); the newest of a study counts")
    step.add_argument("--cohort", help="of lists without that column: the name given to index")
    step.add_argument("--key", help="file of the pseudonym key that index used")
    step.add_argument("targets", nargs="+", metavar="ARCHIVE|FEED")
    step.add_argument("--runs", nargs="+", default=[], metavar="RUN",
                      help="run directories and exports: list what saw the people")
    step.set_defaults(run=_withdraw)


def _withdraw(arguments: argparse.Namespace) -> int:
    from data_prep.identity import load_key
    from data_prep.withdrawal.withdraw import withdraw

    withdraw(arguments.lists, targets=arguments.targets, key=load_key(arguments.key, make=False),
             cohort=arguments.cohort, runs=arguments.runs)
    return 0


def _add_report(steps: Steps) -> None:
    step = steps.add_parser("report", help="an archive's quality as an HTML page")
    step.add_argument("archive")
    step.add_argument("--out", required=True, help="page to write, *.html")
    step.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from data_prep.report.report import report

    report(arguments.archive, arguments.out)
    return 0


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
