"""Errors a user can act on, and how a command ends when one is raised.

Every message names the fact, the place (file, field, value) and the cure.  A command prints it as
one line and exits with status 2; anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable

# Packages that not every command needs, by the extra of pyproject.toml that brings them.
EXTRAS = {"deepspeed": "train", "ray": "train", "prometheus_client": "train",
          "tensorboard": "train", "webdataset": "train", "s3fs": "s3", "huggingface_hub": "hub",
          "monai": "segment"}


class NeurojepaError(Exception):
    """A condition the user can act on; the message is the whole explanation."""


class ConfigError(NeurojepaError):
    """A configuration value or command line that cannot work."""


class DataError(NeurojepaError):
    """A scan, archive or feed that is missing, damaged or inconsistent."""


class CheckpointError(NeurojepaError):
    """A checkpoint that is absent, uncommitted, damaged or of another run."""


class ClusterError(NeurojepaError):
    """A host, launcher or scheduler that did not do its part."""


class LeaseHeld(ClusterError):
    """A run directory that has a live owner."""


class LeaseLost(ClusterError):
    """A run directory that another owner has taken over."""


def run_command(main: Callable[[], int | None], teardown: bool = True) -> None:
    """Run a command's ``main`` and exit: 0, its own status, 2 with one line, or 130 on Ctrl-C.

    Parameters
    ----------
    teardown : whether Python is torn down at the end.  A rank does without: gloo's threads live as
        long as DeepSpeed keeps the groups, and one that lets go of a tensor while Python ends
        aborts the process (status -6), whose work is done or whose error is told.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # as SIGPIPE would end it
    except NeurojepaError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: this needs {package}, which is not installed; run: pip install "
              f"'neurojepa[{EXTRAS[package]}]'", file=sys.stderr)
        status = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'standard output'}: no space left on its disk; free some "
              "and run the same command again", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        status = 130
    if teardown:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _reader_left() -> bool:
    """Whether it is our standard output that nobody reads any more, as after ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # asks for errors alone
    return bool(poll.poll(0))
