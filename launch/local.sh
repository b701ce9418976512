#!/usr/bin/env bash
# Trains on this machine, on all its devices. Run again, the same command resumes.
#
#   launch/local.sh [--dry-run] CONFIG WORKDIR [--section.field value ...]
set -euo pipefail

usage() { sed -n 's/^# \{0,1\}//p' "$0" | sed 1d; }

dry_run=false
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=true; shift ;;
esac
if [[ $# -lt 2 ]]; then
  echo "error: CONFIG and WORKDIR are required" >&2
  usage >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The project's own environment where it has been made, whatever python is active otherwise.
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
command=("$python" -m mole_jax.train --config "$config" --workdir "$workdir" "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
fi
