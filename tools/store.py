"""A real S3 server on loopback for the demo and the tests: SeaweedFS in a child process.

    with serve_s3(directory) as environment: ...   # AWS_* variables that point to it
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from neurojepa.errors import ClusterError
from neurojepa.ports import free_port


@contextlib.contextmanager
def serve_s3(directory: Path, timeout_s: float = 60) -> Iterator[dict[str, str]]:
    """Start ``weed`` with its data below ``directory``; yields the environment of its clients.

    Raises
    ------
    ClusterError
        ``weed`` is not installed, or did not answer in time; the message names its log.
    """
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise ClusterError("no `weed` program; run tools/setup.sh, or pass --store DIR")
    logs, data = directory / "log", directory / "data"
    logs.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    access, secret = "neurojepa-local", "neurojepa-local-only"
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [{
        "name": "local", "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}))
    ports: set[int] = set()
    while len(ports) < 4:
        ports.add(free_port(twin=10000))  # where the gRPC twin listens
    s3, master, volume, filer = ports
    command = [
        weed, f"-logdir={logs}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}",
        "-filer", "-s3", f"-s3.config={config}", "-master.volumeSizeLimitMB=256", "-volume.max=40",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.telemetry=false",  # on by default; nothing may leave the machine
    ]
    output = directory / "weed.txt"
    with output.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        _wait_until_ready(process, s3, master, timeout_s, output)
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "AWS_ACCESS_KEY_ID": access,
               "AWS_SECRET_ACCESS_KEY": secret, "AWS_REGION": "us-east-1"}
    finally:
        process.kill()  # SIGTERM waits half a minute; the store is durable without it
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], s3: int, master: int, timeout_s: float,
                      log: Path) -> None:
    """S3 answers, and there is a volume to write to: that may join seconds later."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"the local S3 server ended with status {process.returncode}; "
                               f"see {log}")
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException), \
                socket.create_connection(("127.0.0.1", s3), 1), \
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", master, 5)) as asked:
            asked.request("GET", "/dir/status")
            if json.load(asked.getresponse()).get("Topology", {}).get("Max"):
                return
        time.sleep(0.2)
    raise ClusterError(f"the local S3 server did not answer on port {s3} within "
                       f"{timeout_s:.0f} s; see {log}")
