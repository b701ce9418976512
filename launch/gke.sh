#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, as a JobSet (jobset.sigs.k8s.io must be installed in the cluster): one pod a host,
# all started together, all restarted together after a preemption, and not at all after a mistake in config or data
# (status 2). Prints the JobSet with --dry-run, else hands it to kubectl.
#
#   launch/gke.sh [--dry-run] NAME IMAGE DEVICES CONFIG WORKDIR [--section.field value ...]
#
# IMAGE is built from launch/Containerfile, in which CONFIG must be; WORKDIR is a gs:// folder. DEVICES is
# ACCELERATOR:TOPOLOGY for a TPU slice (tpu-v5p-slice:4x4x4, tpu-v6e-slice:8x8, tpu-v5-lite-podslice:4x8), or
# ACCELERATOR:HOSTSxGPUS for GPUs (nvidia-h100-80gb:2x8). Environment: SLICES (1); CHIPS_PER_HOST (4); SPOT=true for spot
# nodes; RESTARTS (100).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start 5 'NAME, IMAGE, DEVICES, CONFIG and WORKDIR' "$@"
name=${arguments[0]} image=${arguments[1]} accelerator=${arguments[2]%%:*} size=${arguments[2]#*:}
slices=${SLICES:-1}

mistake() {
  echo "error: $1" >&2
  exit 2
}

[[ ${arguments[2]} =~ ^[a-z0-9-]+:[0-9]+(x[0-9]+)+$ ]] ||
  mistake "DEVICES '${arguments[2]}' is neither ACCELERATOR:TOPOLOGY nor ACCELERATOR:HOSTSxGPUS"
# Kubernetes' own rule, less the room that the names of pods need behind it.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  mistake "NAME '$name' must be at most 40 lower-case letters, digits and hyphens, beginning with a letter"

# A YAML string of any text: what YAML would refuse or take for a line's end (control characters, separators, marks) is
# written as its number. Byte by byte, whatever the locale.
text() {
  local LC_ALL=C value=$1 code byte escape
  value=${value//\\/\\\\}
  value=${value//\"/\\\"}
  for code in {1..31} 127; do
    printf -v escape '\\x%02x' "$code"
    printf -v byte '%b' "$escape"
    value=${value//"$byte"/"$escape"}
  done
  for code in {128..159}; do
    printf -v escape '\\x%02x' "$code"
    printf -v byte '%b' "\xc2$escape"
    value=${value//"$byte"/"$escape"}
  done
  for code in 2028:e280a8 2029:e280a9 feff:efbbbf fffe:efbfbe ffff:efbfbf; do
    byte=${code#*:}
    printf -v byte '%b' "\x${byte:0:2}\x${byte:2:2}\x${byte:4:2}"
    value=${value//"$byte"/"\u${code%:*}"}
  done
  printf '"%s"' "$value"
}

# An argument; Kubernetes reads $$ as $, and fills in $(NAME).
argument() { text "${1//\$/\$\$}"; }

args=(--config "${arguments[3]}" --workdir "${arguments[4]}" "${arguments[@]:5}")
list=
for one in "${args[@]}"; do list+=", $(argument "$one")"; done

case "$accelerator" in
  tpu-*)
    chips=$((${size//x/*}))
    per_host=${CHIPS_PER_HOST:-4}
    ((chips < per_host)) && per_host=$chips
    ((chips % per_host == 0)) || mistake "TOPOLOGY $size has $chips chips, not a multiple of CHIPS_PER_HOST $per_host"
    hosts=$((chips / per_host))
    selector="cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $size"
    resource="google.com/tpu: $per_host"
    ;;
  *)
    [[ $size =~ ^[0-9]+x[0-9]+$ && $slices == 1 ]] || mistake "GPUs are given as HOSTSxGPUS, without SLICES; got $size"
    hosts=${size%x*}
    selector="cloud.google.com/gke-accelerator: $accelerator"
    resource="nvidia.com/gpu: ${size#*x}"
    # jax knows TPU pods by themselves; here the first pod, by the name that JobSet gives it, is the coordinator.
    if ((hosts > 1)); then
      for one in --coordinator "$name-host-0-0.$name:8482" --processes "$hosts"; do
        list+=", $(argument "$one")"
      done
      list+=", \"--process\", \"\$(JOB_COMPLETION_INDEX)\"" # Kubernetes fills it in
    fi
    ;;
esac
[[ ${SPOT:-false} == false ]] || selector+='
                cloud.google.com/gke-spot: "true"'

jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: host
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                $selector
              containers:
                - name: train
                  image: $(text "$image")
                  args: [${list#, }]
                  resources:
                    limits:
                      $resource"

if $dry_run; then
  echo "$jobset"
else
  kubectl apply -f - <<<"$jobset"
fi
