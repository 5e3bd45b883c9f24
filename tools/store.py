"""A real S3 server on loopback for the demo and the tests: SeaweedFS in a child process.

    with serve_s3(directory) as environment: ...   # AWS_* variables that point to it
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from neurojepa.errors import ClusterError


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
    ports = _free_ports(4)
    command = [
        weed, f"-logdir={logs}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}",
        "-filer", "-s3", f"-s3.config={config}", "-master.volumeSizeLimitMB=256", "-volume.max=40",
        f"-s3.port={ports[0]}", f"-master.port={ports[1]}", f"-volume.port={ports[2]}",
        f"-filer.port={ports[3]}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.telemetry=false",  # on by default; nothing may leave the machine
    ]
    output = directory / "weed.txt"
    with output.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        _wait_for_port(process, ports[0], timeout_s, output)
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}", "AWS_ACCESS_KEY_ID": access,
               "AWS_SECRET_ACCESS_KEY": secret, "AWS_REGION": "us-east-1"}
    finally:
        process.kill()  # SIGTERM waits half a minute; the store is durable without it
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports free here and at +10000, where the server's gRPC twins listen."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if port > 55000 or port in ports:
                continue
            try:
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            ports.append(port)
    return ports


def _wait_for_port(process: subprocess.Popen[bytes], port: int, timeout_s: float,
                   log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"the local S3 server ended with status {process.returncode}; "
                               f"see {log}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise ClusterError(f"the local S3 server did not answer on port {port} within "
                       f"{timeout_s:.0f} s; see {log}")
