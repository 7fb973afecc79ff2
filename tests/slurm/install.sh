#!/usr/bin/env bash
# Installs Debian's Slurm and munge for tests/slurm, if INSTALL=1 and there is none. Never fails: without
# Slurm the tests are skipped, and say so.
set -uo pipefail

LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT

have_slurm() {
    for program in slurmctld slurmd munged sbatch srun; do
        command -v "$program" >/dev/null || return 1
    done
}

skip() {
    echo "slurm-test: SKIPPED, Slurm is not installed: $*"
    exit 0
}

if have_slurm; then
    echo "slurm-test: $(slurmctld -V) is installed"
    exit 0
fi
[ "${INSTALL:-}" = 1 ] || skip "make slurm-test INSTALL=1 installs slurm-wlm and munge by apt-get"
command -v apt-get >/dev/null || skip "there is no apt-get; install slurmctld, slurmd, munged, sbatch, srun"
[ "$(id -u)" = 0 ] || skip "apt-get needs root"
export DEBIAN_FRONTEND=noninteractive
echo "slurm-test: installing slurm-wlm and munge"
if ! { timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends slurm-wlm munge; } \
    >"$LOG" 2>&1; then
    tail -n 5 "$LOG"
    skip "apt-get could not fetch or install the packages (its last words stand above)"
fi
have_slurm || skip "the packages are installed, but their programs are not on the PATH"
echo "slurm-test: $(slurmctld -V) is installed now"
