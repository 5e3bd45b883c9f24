#!/usr/bin/env bash
# Sets everything up on a Debian machine, then checks style, types and behaviour.
# bash tools/test.sh tests/neurojepa/model/test_moe.py -k float64   passes its arguments to pytest.
# bash tools/test.sh -m "not slow"   answers in three minutes; other marks: cluster, browser, scans, gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh

# Real hosts (network namespaces with sshd), the pdsh launcher, Slurm, a browser for pages, Prometheus.
missing=()
for pair in sshd:openssh-server pdsh:pdsh ip:iproute2 chromium:chromium munged:munge \
    slurmctld:slurmctld slurmd:slurmd srun:slurm-client \
    prometheus:prometheus; do
    PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update
        # of its own: it recommends an exporter that would watch this machine
        [[ " ${missing[*]} " != *" prometheus "* ]] ||
            apt-get -qq install -y --no-install-recommends prometheus
        apt-get -qq install -y "${missing[@]}"
    else
        echo "not root: tests that need ${missing[*]} are skipped" >&2
    fi
fi

.venv/bin/ruff check .
.venv/bin/mypy
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
