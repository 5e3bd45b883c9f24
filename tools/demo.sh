#!/usr/bin/env bash
# The main job, end to end, on this machine.  Writes DIR/report.html and DIR/summary.json.
#   bash tools/demo.sh [--out DIR] [--store DIR] [--scans DIR] [--participants N]
# Run it again to reuse what the first run made.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
exec .venv/bin/python -m tools.demo "$@"
