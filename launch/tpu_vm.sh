#!/usr/bin/env bash
# Trains on a Cloud TPU VM that is there, of one host or many: copies the last commit of this checkout to every worker,
# makes the environment and runs the same command on each. Run again, the same command resumes. Ends with the training's
# exit status: 0 done, 2 a mistake in config or data, 143 stopped by SIGTERM after saving; 255 where there is none.
#
#   launch/tpu_vm.sh [--dry-run] NAME ZONE CONFIG WORKDIR [--section.field value ...]
#
# NAME and ZONE are those of the TPU VM; WORKDIR is a gs:// folder, or one on the VM if that has one host. PROJECT, if
# set, is the Google Cloud project.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start 4 'NAME, ZONE, CONFIG and WORKDIR' "$@"
name=${arguments[0]}
where=(--zone "${arguments[1]}" ${PROJECT:+--project "$PROJECT"})
train=(.venv/bin/python -m mole_jax.train --config "${arguments[2]}" --workdir "${arguments[3]}" "${arguments[@]:4}")

archive=mole_jax.tar.gz
status_file=mole_jax.status
packed=${TMPDIR:-/tmp}
if ! $dry_run; then
  packed=$(mktemp -d)
  trap 'rm -rf "$packed"' EXIT
fi
# Only what git tracks: no environment, data or runs.
run git -C "$root" archive --format=tar.gz --prefix=mole_jax/ --output "$packed/$archive" HEAD
run gcloud compute tpus tpu-vm scp "$packed/$archive" "$name:$archive" --worker=all "${where[@]}"

# jax[tpu] of the pinned jax brings the libtpu that belongs to it; the other two reach gs:// folders.
remote="rm -f $status_file; set -e; tar xzf $archive; cd mole_jax; make setup"
remote+="; .venv/bin/python -m ensurepip >/dev/null 2>&1 || true"
remote+="; .venv/bin/python -m pip install \"jax[tpu]==\$(sed -n 's/^jax==//p' requirements.txt)\" gcsfs google-cloud-storage"
remote+="; set +e; $(quoted "${train[@]}"); echo \$? > ~/$status_file"
# What gcloud makes of the workers' exit statuses is not documented, so the training's own is left in a file.
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$remote" || true
read_status=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command "cat $status_file")
if $dry_run; then
  run "${read_status[@]}"
else
  status=$("${read_status[@]}") && [[ $status =~ ^[0-9]+$ ]] || status=255
  exit "$status"
fi
