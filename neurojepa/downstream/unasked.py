"""Scans that are not prepared where one modality alone is asked for: those of PET and BOLD.

The anatomical scans of a session are placed together, and left and right are checked across them
and across visits, so they are all needed whichever is asked for.  No other scan is placed by, or
checked against, PET or BOLD.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from neurojepa.storage import exists, join, read_bytes, write_bytes

# a modality of scans that no other one needs -> the modalities of what is made of it
APART = {"PET": {"PET"}, "BOLD": {"BOLD", "tSNR", "ALFF", "fALFF"}}


def manifest_of(modality: str | None, manifest: str, archive: str) -> str:
    """A manifest without scans that a modality does not need; prints how many are left out.

    What the archive has of them already stays, so that asking for less throws no work away.
    """
    from data_prep.archive import open_archive
    from data_prep.scan import labels_path, read_manifest
    from data_prep.tables import write_table

    if modality is None:
        return manifest
    had = {modality}
    if exists(join(archive, "archive.json")):
        had |= set(open_archive(archive).scans["modality"].to_pylist())
    unasked = [name for name, made in APART.items() if made.isdisjoint(had)]
    scans, _ = read_manifest(manifest)
    left_out = pc.is_in(scans["modality"], pa.array(unasked, pa.string()))
    counts = Counter(scans["modality"].filter(left_out).to_pylist())
    if not counts or sum(counts.values()) == scans.num_rows:
        return manifest  # of no scan at all, preparing tells more
    print("not prepared, as --modality " + modality + " needs none of them: "
          + ", ".join(f"{number} {name}" for name, number in sorted(counts.items())), flush=True)
    wanted = manifest.removesuffix(".parquet") + ".asked.parquet"
    write_bytes(labels_path(wanted), read_bytes(labels_path(manifest)))
    write_table(wanted, scans.filter(pc.invert(left_out)))
    return wanted
