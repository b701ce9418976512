#!/usr/bin/env bash
# Trains on GPUs of a SLURM cluster, one process a GPU, as jax.distributed finds them there. A job that is preempted or
# nears its time limit saves, goes back into the queue and resumes; a mistake in config or data (status 2) does not.
#
#   launch/slurm.sh [--dry-run] CONFIG WORKDIR [--section.field value ...]
#
# This checkout, its .venv (with jax[cuda13]) and WORKDIR must be on disks that all nodes see. Environment: NODES (1) and
# GPUS, of a node (8); SBATCH_OPTIONS, further options of sbatch, split at spaces ('--partition a100 --time 24:00:00').
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start 2 'CONFIG and WORKDIR' "$@"
gpus=${GPUS:-8}
python=${PYTHON:-$root/.venv/bin/python}
train=("$python" -m mole_jax.train --config "${arguments[0]}" --workdir "${arguments[1]}" "${arguments[@]:2}")

# Every task sees all GPUs of its node, because jax picks its own by the task's number on it. SIGTERM comes two minutes
# before the end, and no task is killed because another has saved and left. Output is appended, or a job that resumes
# would start its log again.
submit=(sbatch --job-name mole_jax --nodes "${NODES:-1}" --ntasks-per-node "$gpus" --gpus-per-node "$gpus")
submit+=(--requeue --signal TERM@120 --open-mode append)
read -ra more <<<"${SBATCH_OPTIONS:-}"
submit+=("${more[@]}")

job="#!/bin/bash
export PYTHONPATH=$(quoted "$root")\${PYTHONPATH:+:\$PYTHONPATH}
# The shell outlives the signal that ends the step, to put the job back; as a child, srun passes it on to all tasks.
trap 'kill -TERM \$step 2>/dev/null' TERM
srun --kill-on-bad-exit=0 $(quoted "${train[@]}") &
step=\$!
while true; do
  wait \$step
  status=\$?
  kill -0 \$step 2>/dev/null || break
done
[ \$status -ne 143 ] || scontrol requeue \$SLURM_JOB_ID
exit \$status"

if $dry_run; then
  run "${submit[@]}"
  echo "$job"
else
  "${submit[@]}" <<<"$job"
fi
