#!/usr/bin/env bash
# Trains on a Cloud TPU VM of one host (v5litepod-8, v6e-8 and smaller): copies this checkout to it, makes the
# environment and starts the training. Run again, the same command resumes.
#
#   launch/tpu_vm.sh [--dry-run] NAME ZONE CONFIG WORKDIR [--section.field value ...]
#
# NAME and ZONE are those of the TPU VM; WORKDIR is a gs:// folder or one on the VM. PROJECT, if set, is the Google Cloud
# project.
set -euo pipefail

usage() { sed -n 's/^# \{0,1\}//p' "$0" | sed 1d; }

dry_run=false
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=true; shift ;;
esac
if [[ $# -lt 4 ]]; then
  echo "error: NAME, ZONE, CONFIG and WORKDIR are required" >&2
  usage >&2
  exit 2
fi
name=$1
zone=$2
config=$3
workdir=$4
shift 4

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=(--zone "$zone")
[[ -z ${PROJECT:-} ]] || where+=(--project "$PROJECT")

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

archive=mole_jax.tar.gz
packed=${TMPDIR:-/tmp}
if ! $dry_run; then
  packed=$(mktemp -d)
  trap 'rm -rf "$packed"' EXIT
fi
# Only what git tracks: no environment, data or runs.
run git -C "$root" archive --format=tar.gz --prefix=mole_jax/ --output "$packed/$archive" HEAD
run gcloud compute tpus tpu-vm scp "$packed/$archive" "$name:$archive" "${where[@]}"

train=$(printf '%q ' .venv/bin/python -m mole_jax.train --config "$config" --workdir "$workdir" "$@")
# jax[tpu] of the pinned jax brings the libtpu that belongs to it; the other two reach gs:// folders.
remote="set -e; tar xzf $archive; cd mole_jax; make setup"
remote+="; .venv/bin/python -m ensurepip >/dev/null 2>&1 || true"
remote+="; .venv/bin/python -m pip install \"jax[tpu]==\$(sed -n 's/^jax==//p' requirements.txt)\" gcsfs google-cloud-storage"
remote+="; $train"
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "$remote"
