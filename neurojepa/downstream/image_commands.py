"""Commands on scans in their own space: arguments, and what they run."""

from __future__ import annotations

import argparse


def add_image_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parsers of ``IMAGE_RUN``'s commands."""
    command = commands.add_parser("register", help="lay a scan over another one, deformably")
    command.add_argument("moving", metavar="MOVING", help="the scan that is deformed (NIfTI, MGZ, "
                         "or a folder of DICOM slices with a / at its end)")
    command.add_argument("fixed", metavar="FIXED", help="the scan that it is laid over, of the "
                         "same modality")
    command.add_argument("--out", required=True, help="folder for what is written")
    command.add_argument("--moving-labels", metavar="FILE", help="label map in MOVING's space, on "
                         "any grid, to be carried along; names in a .tsv beside it")

    command = commands.add_parser("segment", help="find regions in scans, as others are labelled")
    kinds = command.add_subparsers(dest="kind", required=True)
    part = kinds.add_parser("fit", help="make a model, from labelled scans")
    part.add_argument("scans", nargs="+", metavar="SCANS", help="scans (NIfTI, MGZ) to learn from")
    part.add_argument("--method", choices=("atlas", "network"), default="atlas", help="atlas: "
                      "labelled heads are laid over a scan and vote; network: one learns, for many "
                      "labelled people (default: atlas)")
    part.add_argument("--labels", nargs="+", required=True, help="label map of each scan, in the "
                      "same order and the scan's space, on any grid; names in a .tsv beside "
                      "them (columns index and name)")
    part.add_argument("--out", required=True, help="folder of the model; the same command goes on "
                      "where it was stopped")
    part.add_argument("--steps", type=int, help="network: of two windows each (default: 2000)")
    part.add_argument("--mm", type=float, help="network: voxels that it sees (default: 2)")
    part.add_argument("--device", help="network: of torch (default: the first GPU if there is one)")
    part = kinds.add_parser("apply", help="find the regions in scans")
    part.add_argument("model", metavar="MODEL", help="folder that fit wrote")
    part.add_argument("scans", nargs="+", metavar="SCANS", help="scans (NIfTI, MGZ)")
    part.add_argument("--out", required=True, help="folder for what is written")
    part.add_argument("--truth", nargs="+", help="label map of each scan on its own grid, in the "
                      "same order, to compare with; scans of people whom the model learnt from "
                      "are not")
    part.add_argument("--allow-seen", action="store_true", help="compare those, too; the report "
                      "says so")
    part.add_argument("--workers", type=int, default=1, help="atlas: labelled heads laid over a "
                      "scan at once (default: 1)")
    part.add_argument("--device", help="network: of torch (default: the first GPU if there is one)")


def run_register(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.images import read_image, read_labels
    from neurojepa.downstream.regions import names_beside
    from neurojepa.downstream.register import register
    from neurojepa.downstream.register_page import write_registration

    labels, names = None, {}
    if arguments.moving_labels:
        labels, names = read_labels(arguments.moving_labels), names_beside(arguments.moving_labels)
    moving, fixed = read_image(arguments.moving), read_image(arguments.fixed)
    for note in (*moving.notes, *fixed.notes):
        print(note)
    found = register(moving, fixed)
    record = write_registration(arguments.out, found, labels, names)
    alike, error = record["correlation"], record["inverse_error_mm"]
    print(f"correlation within the brain {alike['affine']:.3f} after the affine, "
          f"{alike['deformed']:.3f} after the deformation; {record['folds']} voxels fold; there "
          f"and back {error['mean']:.2f} mm on average")
    return 0


def run_segment(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import segment_task as task
    from neurojepa.downstream.api import device_named

    device = device_named(arguments.device)
    if arguments.kind == "fit":
        task.run_fit(arguments.scans, arguments.labels, arguments.out, method=arguments.method,
                     steps=arguments.steps, mm=arguments.mm, device=device)
    else:
        task.run_apply(arguments.model, arguments.scans, arguments.out, truth=arguments.truth,
                       allow_seen=arguments.allow_seen, workers=arguments.workers, device=device)
    return 0


IMAGE_RUN = {"register": run_register, "segment": run_segment}
