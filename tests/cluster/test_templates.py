"""The templates: each is shown in the docs as it is, and its commands are those that we have."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.__main__ import _parser
from cluster.rundir import run_of_arguments
from neurojepa.config import load_config
from tests.helpers import ROOT

FOLDER = ROOT / "cluster/templates"
NAMES = sorted(path.name for path in FOLDER.iterdir())
PAGES = "\n".join(path.read_text() for path in (ROOT / "docs/how-to").glob("*.md"))
VALUES = {"$FEED": "feed", "$RUN": "run", "%i": "base", "$master": "10.0.0.1",
          "$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NODE_RANK": "0",
          "$SKYPILOT_NUM_GPUS_PER_NODE": "8"}


def commands() -> list[tuple[str, list[str]]]:
    """Our commands in all templates, in words, without the interpreter."""
    found = []
    for name in NAMES:
        text = (FOLDER / name).read_text()
        if name.endswith(".yaml"):
            text = "\n".join(strings(yaml.safe_load(text)))
        text = text.replace("\\\n", " ")
        for value, here in VALUES.items():
            text = text.replace(value, here)
        found += [(name, shlex.split(line)) for line in re.findall(
            r"(?:python|torchrun) .*(?:neurojepa\.|cluster ).*", text)]
    return found


def strings(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in strings(value)]
    return [tree] if isinstance(tree, str) else []


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_shown_as_it_is(name: str) -> None:
    assert f'title="{name}"\n{(FOLDER / name).read_text()}```\n' in PAGES


def test_each_kind_of_launch_has_a_command() -> None:
    assert {name for name, _ in commands()} == set(NAMES) - {"Dockerfile"}


@pytest.mark.parametrize(("name", "words"), commands())
def test_its_command_is_understood(name: str, words: list[str]) -> None:
    module = next(word for word in words if word in ("cluster", "neurojepa.pretrain"))
    own, rest = words[1:words.index(module)], words[words.index(module) + 1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args([*own, module, *rest])
        assert (launch.module, launch.training_script, launch.master_port) == (True, module, 29500)
    if module == "cluster":
        split = rest.index("--")
        options = _parser().parse_args(rest[:split])
        assert options.command == "supervise" and options.hostfile
        rest = rest[split + 1:]
    assert rest[0] == "--config" and not [word for word in rest[1:] if word.startswith("-")]
    recipe = rest[1].removeprefix("/etc/neurojepa/").removesuffix(".yaml") if module == "cluster" \
        else rest[1]
    overrides = rest[2:] or ["run.dir=run", "data.feed=feed"]  # a service's are in its file
    assert load_config(recipe, overrides).run.dir
    assert run_of_arguments(["--config", recipe, *overrides])[0].uri.endswith("run") or \
        name == "train.sbatch"


def test_the_manifest_of_kuberay_asks_for_what_the_ranks_need() -> None:
    """Field names as the operator's schema (ray.io/v1) has them; unknown ones it would drop."""
    tree = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    spec, cluster = tree["spec"], tree["spec"]["rayClusterSpec"]
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) == {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes",
                         "rayClusterSpec"}
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec",
                            "workerGroupSpecs"}
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams",
                          "template"}
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert f"run.ranks={group['maxReplicas'] * gpus}" in spec["entrypoint"]
    head = cluster["headGroupSpec"]
    assert set(head) == {"rayStartParams", "template"}
    images = {pod["template"]["spec"]["containers"][0]["image"] for pod in (head, group)}
    assert images == {"registry/neurojepa:cuda"}


def test_the_image_has_all_that_the_package_is_made_of() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\w+)$", text, re.M)
    assert {"cpu", "cuda"} <= set(targets)
    assert set(re.findall(r"--target (\w+)", text)) == {"cpu", "cuda"}
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert not [name for name in copied if not (ROOT / name).exists()]
    assert {"neurojepa", "data_prep", "cluster", "configs", "pyproject.toml",
            "constraints.txt"} <= set(copied)
    if hadolint := shutil.which("hadolint"):
        done = subprocess.run([hadolint, "--failure-threshold", "error", FOLDER / "Dockerfile"],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_unit_is_one_that_systemd_reads(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (FOLDER / "neurojepa@.service").read_text()
    unit = tmp_path / "neurojepa@.service"
    for known, problem in ((text, ""), (text.replace("KillMode=", "KilMode="), "KilMode")):
        # the environment of a real machine
        unit.write_text(known.replace("/opt/neurojepa/.venv/bin/python", sys.executable))
        done = subprocess.run(["systemd-analyze", "verify", tmp_path / "neurojepa@base.service"],
                              capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "neurojepa@" in line]
        assert bool(said) is bool(problem) and problem in "".join(said), done.stderr


def test_the_task_of_skypilot_has_the_keys_that_it_reads() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "job_recovery"}
    assert not re.search(r"\$\{?(?!SKYPILOT_|FEED|RUN|master|\()\w+", task["run"])
