#!/usr/bin/env bash
# One run as several processes on this machine, on CPU, for trying. See --help.
#
# Relies on `lavit train` reading LAVIT_COORDINATOR, LAVIT_NUM_PROCESSES and
# LAVIT_PROCESS_ID; jax reads the rest: JAX_PLATFORMS,
# JAX_CPU_COLLECTIVES_IMPLEMENTATION (gloo) and XLA_FLAGS.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
PROGRAM=local
# shellcheck source=lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=lib/group.sh
source "$here/lib/group.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh --config FILE --workdir DIR [--processes K] ...

Train on this machine's CPU as a pod would: K processes with D virtual devices
each, which talk through gloo. For trying a mesh or a resume without a TPU.

Nothing is installed here. A run that goes on with other versions of its
libraries than those it began with names them in its log; to have them back:
pip install -c WORKDIR/versions.txt ...

  --config FILE       configs/tiny/pretrain.py, for example
  --workdir DIR       shared by all of them
  --processes K       2
  --devices D         virtual devices of each (2)
  --port P            of the coordinator; default: a free one
  --env NAME=VALUE    in the environment of the run; may be repeated
  --max-restarts R    after crashes (0)
  --resume            start again after status 75 (told to end, saved)
  --grace S           seconds between SIGTERM and SIGKILL (60)
  --dry-run           print the commands, run none
  -- --config.x=y ... overrides of the config

Every line of output has its process in front: [0], [1] ... Ctrl-C or SIGTERM
lets them save and end; twice kills them. When one fails, all are ended.

exit status: the worst of all: 0 done; 2 a mistake in flags or config; 75 told
to end, the same command resumes; else the first crash.

examples:
  launch/local.sh --config configs/tiny/pretrain.py --workdir runs/pair
  launch/local.sh --processes 4 --devices 2 --config configs/tiny/pretrain.py \
    --workdir runs/four -- --config.mesh.fsdp=4 --config.steps=20
HELP
}

CONFIG="" WORKDIR="" PROCESSES=2 DEVICES=2 PORT="" GRACE=60 DRY_RUN=0
MAX_RESTARTS=0 RESUME=0 VARIABLES=() OVERRIDES=()

while (($#)); do
  case $1 in
  --help | -h)
    usage
    exit 0
    ;;
  --)
    shift
    OVERRIDES+=("$@")
    break
    ;;
  --config.*) OVERRIDES+=("$1") ;;
  --resume) RESUME=1 ;;
  --dry-run) DRY_RUN=1 ;;
  --*=*)
    set -- "${1%%=*}" "${1#*=}" "${@:2}"
    continue
    ;;
  --config | --workdir | --processes | --devices | --port | --env | \
    --max-restarts | --grace)
    value "$@"
    case $1 in
    --config) CONFIG=$2 ;;
    --workdir) WORKDIR=$2 ;;
    --processes) PROCESSES=$2 ;;
    --devices) DEVICES=$2 ;;
    --port) PORT=$2 ;;
    --env)
      assignment "$2"
      VARIABLES+=("$2")
      ;;
    --max-restarts) MAX_RESTARTS=$2 ;;
    --grace) GRACE=$2 ;;
    esac
    shift
    ;;
  *) mistake "unknown argument '$1'" ;;
  esac
  shift
done
number --processes "$PROCESSES" 1
number --devices "$DEVICES" 1
number --max-restarts "$MAX_RESTARTS"
number --grace "$GRACE"
if [[ -n $PORT ]]; then
  number --port "$PORT" 1
fi
if [[ -z $CONFIG ]]; then
  mistake "--config is missing"
fi
if [[ -z $WORKDIR ]]; then
  mistake "--workdir is missing"
fi

# A port that nobody listens on; another one for every attempt.
free_port() {
  local try port
  for ((try = 0; try < 50; try++)); do
    port=$((20000 + RANDOM % 40000))
    if ! (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      printf '%d' "$port"
      return
    fi
  done
  say "found no free port; name one with --port"
  exit 1
}

before_attempt() { COORDINATOR_PORT=${PORT:-$(free_port)}; }

# The command line of process I, in CMD.
to_process() {
  local flags="--xla_force_host_platform_device_count=$DEVICES"
  # Inside a SLURM allocation jax would take its numbers from there.
  CMD=(env -u SLURM_JOB_ID JAX_PLATFORMS=cpu)
  CMD+=(JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
  CMD+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flags")
  if ((PROCESSES > 1)); then
    CMD+=("LAVIT_COORDINATOR=127.0.0.1:$COORDINATOR_PORT")
    CMD+=("LAVIT_NUM_PROCESSES=$PROCESSES" "LAVIT_PROCESS_ID=$1")
  fi
  CMD+=(${VARIABLES[@]+"${VARIABLES[@]}"})
  CMD+=("$(lavit_here "$root")" train --config "$CONFIG" --workdir "$WORKDIR")
  CMD+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

one() {
  to_process "$1"
  exec "${CMD[@]}"
}

if ((DRY_RUN)); then
  before_attempt
  for ((i = 0; i < PROCESSES; i++)); do
    to_process "$i"
    printf '%s &\n' "$(quote "${CMD[@]}")"
  done
  echo wait
  exit 0
fi
supervise "$PROCESSES"
exit "$WORST"
