"""Commands for operators: keep a run alive, see what it is doing, and end it.

    python -m cluster supervise --ranks 2 -- --config configs/demo.yaml run.dir=runs/demo
    python -m cluster supervise --hostfile hosts -- --config configs/base.yaml
    python -m cluster status runs/demo --json
    python -m cluster watch s3://bucket/runs/base
    python -m cluster dashboard runs/demo s3://bucket/runs/base
    python -m cluster stop s3://bucket/runs/base
    python -m cluster export runs/demo s3://bucket/runs/base
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from neurojepa.errors import ConfigError, run_command

if TYPE_CHECKING:
    from cluster.launcher import Launcher
    from cluster.rundir import RunDir

ENDED = {"finished": 0, "stopped": 75, "failed": 1}  # states after which watch ends, and its status


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    # what follows -- is the training's; argparse would mix it with ours
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    if options.command == "supervise":
        return _supervise(options, words[split + 1:])
    if split < len(words):
        raise ConfigError(f"{options.command}: takes nothing after --")
    return {"watch": _watch, "status": _status, "stop": _stop,
            "export": _export, "dashboard": _dashboard}[options.command](options)


def count(text: str) -> int:
    """At least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seconds(text: str) -> float:
    """Finite, and not negative."""
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time of 0 seconds or more")
    return value


def port(text: str) -> int:
    if not 0 <= (value := int(text)) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no port, which lie between 0 and 65535")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    supervise = commands.add_parser(
        "supervise", help="start a training and restart it when it fails",
        usage="%(prog)s [options] -- --config C [a.b=value ...]",
        epilog="exit status: 0 finished, 75 stopped on request (queue it again), 2 gave up")
    supervise.add_argument("--ray", action="store_true",
                           help="start the ranks on the Ray cluster of RAY_ADDRESS")
    supervise.add_argument("--hostfile", help="lines 'HOST slots=N'; default: this machine")
    supervise.add_argument("--master-addr", help="address of the hostfile's first host as the "
                           "others see it (default: its name there)")
    supervise.add_argument("--min-hosts", type=count, metavar="N",
                           help="of the hostfile that have to take part (default 1)")
    supervise.add_argument("--max-hosts", type=count, metavar="N",
                           help="that take part at most; the rest are spares (default: all)")
    supervise.add_argument("--ranks", type=int,
                           help="ranks on this machine (default: run.ranks)")
    supervise.add_argument("--max-restarts", type=int, default=3, metavar="K",
                           help="restarts in a row without a new checkpoint (default 3)")
    supervise.add_argument("--retry-minutes", type=seconds, default=30, metavar="M",
                           help="and for how long it is tried without one before giving up "
                           "(default 30)")
    supervise.add_argument("--hang-seconds", type=seconds, default=60, metavar="S",
                           help="no step for this long (and for ten median steps) is a hang "
                           "(default 60)")
    supervise.add_argument("--start-seconds", type=seconds, default=600, metavar="S",
                           help="longest time to the first step (default 600)")
    supervise.add_argument("--notify-url-file", metavar="FILE", help="file that holds the URL of a "
                           "webhook, which is told when the run needs somebody")
    supervise.add_argument("--notify-command", metavar="CMD", help="command that is told so on its "
                           "standard input, as JSON; no shell")
    status = commands.add_parser("status", help="one screen about a run")
    status.add_argument("run", help="run directory, local or URI")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    watch = commands.add_parser("watch", help="the status, refreshed until the run has ended")
    watch.add_argument("run", help="run directory, local or URI")
    watch.add_argument("--every", type=seconds, default=5, metavar="S",
                       help="seconds between looks (default 5)")
    dashboard = commands.add_parser("dashboard", help="a page about runs, for a browser")
    dashboard.add_argument("runs", nargs="+", metavar="run", help="run directories, local or URIs")
    dashboard.add_argument("--port", type=port, default=8780, help="default: %(default)s")
    dashboard.add_argument("--address", default="127.0.0.1", help="to listen on; elsewhere than on "
                           "loopback, a browser needs the token that is printed once "
                           "(default: %(default)s)")
    stop = commands.add_parser("stop", help="end a run, with a checkpoint, from any machine")
    stop.add_argument("run", help="run directory, local or URI")
    stop.add_argument("--now", action="store_true", help="without a checkpoint")
    stop.add_argument("--wait", type=seconds, default=180, metavar="S",
                      help="how long to wait for it (default 180)")
    export = commands.add_parser("export", help="metrics of runs for Prometheus, over HTTP")
    export.add_argument("runs", nargs="+", metavar="run", help="run directories, local or URIs")
    export.add_argument("--port", type=port, default=9464, help="default: %(default)s")
    export.add_argument("--address", default="127.0.0.1",
                        help="to listen on; who reaches it can read losses and host names "
                        "(default: %(default)s)")
    return parser


def _supervise(options: argparse.Namespace, arguments: list[str]) -> int:
    from cluster import notify
    from cluster.agents import require_ssh
    from cluster.rundir import run_of_arguments
    from cluster.supervise import Supervisor

    if options.hostfile and options.ranks:
        raise ConfigError("--ranks is for this machine; with --hostfile its slots count")
    if (options.min_hosts or options.max_hosts) and not options.hostfile:
        raise ConfigError("--min-hosts and --max-hosts are about the hosts of --hostfile; give one")
    run_dir, settings = run_of_arguments(arguments)
    launcher = _launcher(options, arguments, run_dir, settings)
    hosts = launcher.slots()  # a mistake in the hostfile shows before anything starts
    least, most = options.min_hosts or 1, options.max_hosts or max(1, len(hosts))
    if not 1 <= least <= most or (hosts and least > len(hosts)):
        raise ConfigError(f"--min-hosts {least} --max-hosts {most}: {options.hostfile} has "
                          f"{len(hosts)} hosts; choose 1 <= min <= max, and min from these")
    targets = [notify.webhook(options.notify_url_file)] if options.notify_url_file else []
    targets += [notify.command(options.notify_command)] if options.notify_command else []
    if hosts:
        require_ssh()
    supervisor = Supervisor(launcher, run_dir, options.max_restarts, options.hang_seconds,
                            options.start_seconds, last_step=settings.get("train.steps"),
                            retry_s=60 * options.retry_minutes, min_hosts=least, max_hosts=most)
    with notify.notifying(run_dir, targets):
        return supervisor.run()


def _launcher(options: argparse.Namespace, arguments: list[str], run_dir: RunDir,
              settings: dict[str, Any]) -> Launcher:
    ranks = settings.get("run.ranks", 1) if options.ranks is None else options.ranks
    if not isinstance(ranks, int) or ranks < 1:
        key = "run.ranks" if options.ranks is None else "--ranks"
        raise ConfigError(f"{key} = {ranks!r}: expected a whole number, 1 or more")
    if not options.ray:
        from cluster.agents import AgentLauncher

        if options.master_addr and not options.hostfile:
            raise ConfigError("--master-addr is for the first of the hosts of --hostfile; give one")
        return AgentLauncher(arguments, ranks, options.hostfile, options.master_addr)
    if options.hostfile or options.master_addr:
        raise ConfigError("--hostfile and --master-addr are not for --ray, which chooses nodes and "
                          "addresses by itself")
    from cluster.ray_launcher import RayLauncher, check_paths, connect

    least = settings.get("run.min_ranks", 0)
    if not isinstance(least, int) or not 0 <= least <= ranks:
        raise ConfigError(f"run.min_ranks = {least!r}: expected a whole number from 0 to run.ranks "
                          f"({ranks})")
    check_paths(settings)
    connect()
    return RayLauncher(arguments, ranks, run_dir.uri, least)


def _status(options: argparse.Namespace) -> int:
    from cluster.rundir import RunDir
    from cluster.screen import render, wants_colour
    from cluster.status import read_status

    status = read_status(RunDir(options.run), sleep=time.sleep)
    print(json.dumps(status) if options.json else render(status, wants_colour(sys.stdout)))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from cluster.left import Left
    from cluster.rundir import RunDir
    from cluster.screen import render, wants_colour
    from cluster.status import read_status

    before, left = "", Left(options.run)
    while True:
        status = read_status(RunDir(options.run), sleep=time.sleep)
        clear = "\033[2J\033[H" if sys.stdout.isatty() else ""
        print(clear + render(status, wants_colour(sys.stdout)), flush=True)
        state = status["state"]
        # twice in a row: a supervisor calls an attempt failed just before it starts the next one
        if state in ENDED and state in (before, "finished"):
            return ENDED[state]
        if state == "stalled" and (why := left.look()):
            print(f"nobody goes on with it: {why}", flush=True)
            return ENDED["failed"]
        before = state
        time.sleep(options.every)


def _stop(options: argparse.Namespace) -> int:
    from cluster.rundir import RunDir
    from cluster.stop import stop

    return stop(RunDir(options.run), options.now, options.wait)


def _dashboard(options: argparse.Namespace) -> int:
    from cluster.dashboard.server import Dashboard

    try:
        server = Dashboard(options.runs, options.address, options.port)
    except OSError as error:
        raise _cannot_listen(options, error) from error
    with server:
        print(f"{server.url}   (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


def _export(options: argparse.Namespace) -> int:
    from cluster.exporter import serve

    try:
        serve(options.runs, options.address, options.port)
    except OSError as error:
        raise _cannot_listen(options, error) from error
    return 0


def _cannot_listen(options: argparse.Namespace, error: OSError) -> ConfigError:
    return ConfigError(f"--address {options.address} --port {options.port}: cannot listen there "
                       f"({error.strerror}); choose another address or port")


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
