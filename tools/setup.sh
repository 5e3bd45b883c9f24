#!/usr/bin/env bash
# Makes .venv from this project's own files; does nothing when it is already up to date.
# PYTHON=python3.12 bash tools/setup.sh   chooses another interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
fi
exec 9>.setup.lock
flock 9  # two commands on one checkout wait for each other
stamp=.venv/installed-$(cat pyproject.toml constraints.txt tools/setup.sh | sha256sum | cut -c1-16)
[ ! -e "$stamp" ] || exit 0

echo "setting up .venv (a few minutes, once)"
if ! "$python" -m venv --help >/dev/null 2>&1 || ! "$python" -c 'import ensurepip' 2>/dev/null; then
    # Debian keeps venv apart from Python.
    if [ "$(id -u)" = 0 ]; then
        apt-get -qq update && apt-get -qq install -y python3-venv
    else
        echo "error: no venv module; install it: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check -qq"
torch=$(grep '^torch==' constraints.txt)

# PyPI's build of torch is for CUDA. Without an accelerator take the CPU build (a tenth of the
# size): from the machine's own package mirror where it has one, else from PyTorch's index. PyPI's
# build runs on a CPU too, so it is the last resort.
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    $pip install "$torch"
elif ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    $pip install "$torch+cpu" 2>/dev/null ||
        $pip install --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
            "$torch+cpu" 2>/dev/null ||
        $pip install "$torch"
fi
$pip install -c constraints.txt -e '.[dev]'
rm -f .venv/installed-*
touch "$stamp"
