"""Cohort trees -> quality-checked, normalised volumes in a Zarr archive and a WebDataset feed.

The way of a scan:

    index.py             asks a reader in cohorts/ for Scans (scan.py), gives people pseudonyms
                         (identity.py) and splits (splits.py), and writes a manifest
    prepare/driver.py    hands each person to a worker (pool.py); person.py does the work in a
                         watched child (child.py)
    volumes/pipeline.py  brings the person's scans onto the archive grid: reading/ -> structural/
                         -> placing/ -> functional/ -> output.py, with figures and flags from qc/
    archive.py           keeps the voxels, and one row per scan, whatever became of it (rows.py)
    pack.py              averages them onto a training grid and writes the feed
    verify.py            reads everything back; report/ shows an archive on one page

withdrawal/ takes people out of archives and feeds, synth/ makes a cohort whose truth is known.
tables.py and members.py read what the rooms share: tables, and members of zip and tar archives.
"""
