"""The rank that ``srun`` has given this process, in the variables that other launchers set.

https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from neurojepa.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 10_000  # below those that Linux lends to clients


def slurm_ranks(environment: Mapping[str, str], launcher: str) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a Slurm step.

    Empty where there are no other tasks, or where RANK is set already.  What the user has set of
    MASTER_ADDR and MASTER_PORT stays.

    Raises
    ------
    ConfigError
        Each of the tasks would start a world of its own, or srun says too little.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or not tasks.isdigit() or int(tasks) < 2:
        return {}
    if launcher != "env":
        raise ConfigError(f"run.launcher = {launcher!r}: srun has started {tasks} tasks, and each "
                          "would start a training of its own; leave run.launcher out, or use srun "
                          "--ntasks=1")
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID",
             "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    missing = [name for name in names.values() if not environment.get(name, "").isdigit()]
    if missing or not nodes:
        raise ConfigError(f"srun has started {tasks} tasks but does not set "
                          f"{', '.join(missing or ['SLURM_STEP_NODELIST'])}; set RANK, LOCAL_RANK, "
                          "WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each task")
    job = f"{environment.get('SLURM_JOB_ID', '0')}{environment.get('SLURM_STEP_ID', '0')}"
    port = FIRST_PORT + int(re.sub(r"\D", "", job) or 0) % PORTS
    return {**{name: environment[source] for name, source in names.items()},
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(nodes),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(port)}


def first_node(nodes: str) -> str:
    """The first of a list as Slurm writes it: ``gpu[07-09,12],login1`` is gpu07."""
    first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not first:
        raise ConfigError(f"SLURM_STEP_NODELIST = {nodes!r}: cannot be read; set MASTER_ADDR")
    return "".join(part or "" for part in first.groups())
