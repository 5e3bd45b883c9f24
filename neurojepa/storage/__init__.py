"""Files on any store: local disks and object stores alike, through fsspec.

    files      opening, whole objects in and out, what lies in a folder, Parquet
    rows       files of rows (.jsonl) that grow at the end and survive a kill
    conditional, lease    writes that need nobody else to write; who owns a run directory
    outage     which errors mean that a store did not answer, and patience with it

All three packages read and write through here.  Drivers load when a URI needs them.
"""

from neurojepa.storage.files import (
    exists,
    is_local,
    join,
    list_names,
    local_path,
    open_store,
    parquet_bytes,
    parquet_table,
    read_bytes,
    read_if_there,
    read_range,
    remove,
    sha256,
    walk,
    write_bytes,
    write_parts,
)
from neurojepa.storage.outage import Patience, is_outage, no_space, store_errors
from neurojepa.storage.rows import append_rows, drop_rows, read_rows, write_rows

__all__ = [
    "Patience",
    "append_rows",
    "drop_rows",
    "exists",
    "is_local",
    "is_outage",
    "join",
    "list_names",
    "local_path",
    "no_space",
    "open_store",
    "parquet_bytes",
    "parquet_table",
    "read_bytes",
    "read_if_there",
    "read_range",
    "read_rows",
    "remove",
    "sha256",
    "store_errors",
    "walk",
    "write_bytes",
    "write_parts",
    "write_rows",
]
