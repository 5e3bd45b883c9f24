"""How other hosts are reached."""

from __future__ import annotations

import os
import shlex
import sys

# A host that vanishes ends its ssh within 8 s instead of never; nothing of ours is forwarded to it.
OPTIONS = "-T -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=4 " \
          "-o ServerAliveCountMax=2 -o ForwardAgent=no -o ForwardX11=no -o ClearAllForwardings=yes"


def ssh_options() -> str:
    """The user's own ssh options, from where pdsh has them, too, then ours (the first one counts).
    """
    return f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {OPTIONS}".strip()


def module_on(host: str, module: str, words: list[str] | None = None) -> list[str]:
    """The command that runs a module of ours on a host, in the same folder as here.

    Parameters
    ----------
    host
        Empty for this machine, without ssh.
    words
        Arguments; all users of the host can read them.
    """
    if not host:
        return [sys.executable, "-m", module, *(words or [])]
    command = (f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m {module} "
               + " ".join(map(shlex.quote, words or [])))
    return ["ssh", *shlex.split(ssh_options()), host, command.strip()]
