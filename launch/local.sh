#!/usr/bin/env bash
# Trains on this machine, on all its devices. Run again, the same command resumes.
#
#   launch/local.sh [--dry-run] CONFIG WORKDIR [--section.field value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start 2 'CONFIG and WORKDIR' "$@"

# The project's own environment where it has been made, whatever python is active otherwise.
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# In place of this shell, so that a signal reaches the training.
$dry_run || run() { exec "$@"; }
run "$python" -m mole_jax.train --config "${arguments[0]}" --workdir "${arguments[1]}" "${arguments[@]:2}"
