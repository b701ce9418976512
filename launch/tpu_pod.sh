#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size until the run is finished: asks for the slice as a queued resource, waits for
# it, starts the same command on all workers (launch/tpu_vm.sh), and after a preemption asks again and resumes. A
# finished run gives the slice back. Let it run where it is not cut off (tmux on a small VM).
#
#   launch/tpu_pod.sh [--dry-run] NAME ZONE TYPE CONFIG WORKDIR [--section.field value ...]
#
# NAME is for the queued resource and its slice, TYPE the accelerator type (v5litepod-64, v5p-128, v6e-256), WORKDIR a
# gs:// folder. Environment: PROJECT, the Google Cloud project; RUNTIME, the runtime version, where TYPE is none of the
# three; SPOT=false, to pay for a slice that is not preempted; WAIT, seconds between looks at the queue (60).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start 5 'NAME, ZONE, TYPE, CONFIG and WORKDIR' "$@"
name=${arguments[0]} zone=${arguments[1]} type=${arguments[2]} workdir=${arguments[4]}
where=(--zone "$zone" ${PROJECT:+--project "$PROJECT"})
wait=${WAIT:-60}
if [[ $workdir != *://* ]]; then
  echo "error: WORKDIR '$workdir' is on a disk that goes with the slice; give a gs:// folder" >&2
  exit 2
fi
case "$type" in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=${RUNTIME:-} ;;
esac
if [[ -z ${RUNTIME:-$runtime} ]]; then
  echo "error: TYPE '$type' is none of v5litepod-N, v5p-N, v6e-N; set RUNTIME to its runtime version" >&2
  exit 2
fi

create=(gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}")
create+=(--accelerator-type "$type" --runtime-version "${RUNTIME:-$runtime}")
[[ ${SPOT:-true} == false ]] || create+=(--spot)
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
train=("$root/launch/tpu_vm.sh" "$name" "$zone" "${arguments[@]:3}")

if $dry_run; then
  for step in create describe; do
    declare -n command=$step
    run "${command[@]}"
  done
  "${train[0]}" --dry-run "${train[@]:1}"
  run "${delete[@]}"
  exit
fi

state() { "${describe[@]}" 2>/dev/null || echo NONE; }

failures=0 # in a row, on a slice that is still there
while true; do
  now=$(state)
  case "$now" in
    ACTIVE)
      status=0
      "${train[@]}" || status=$?
      case "$status" in
        0)
          "${delete[@]}"
          exit 0
          ;;
        143) failures=0 ;;
        2) failures=3 ;;
        *) failures=$((failures + 1)) ;;
      esac
      sleep "$wait" # a preempted slice is not said to be so at once
      if [[ $failures -ge 3 && $(state) == ACTIVE ]]; then
        echo "error: status $status (why: see above); $name is still there, give it back with $(quoted "${delete[@]}")" >&2
        exit "$status"
      fi
      ;;
    NONE)
      failures=0
      "${create[@]}"
      ;;
    FAILED | SUSPENDING | SUSPENDED) "${delete[@]}" ;;
    *)
      echo "$name: $now" >&2
      sleep "$wait"
      ;;
  esac
done
