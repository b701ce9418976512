# Shared by the launch scripts, which source it. A script's first comment is its help; exit status 2 is a mistake of
# the one who called it.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false

usage() { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; }

# start COUNT 'NAMES' "$@": takes --help and --dry-run, and checks that COUNT arguments NAMES follow. Leaves the arguments
# in `arguments`.
start() {
  local count=$1 names=$2
  shift 2
  case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
  esac
  if [[ $# -lt $count ]]; then
    echo "error: $names are required (try --help)" >&2
    exit 2
  fi
  arguments=("$@")
}

quoted() { local line; printf -v line '%q ' "$@"; printf '%s' "${line% }"; }

# Runs a command, or prints it where only that is asked for.
run() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}
