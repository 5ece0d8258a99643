#!/usr/bin/env bash
# One run on GPUs: one machine, SLURM, or several machines by hand. See --help.
#
# Relies on `lavit train` reading LAVIT_COORDINATOR, LAVIT_NUM_PROCESSES and
# LAVIT_PROCESS_ID (by hand), and on LAVIT_DISTRIBUTED=1 making it call
# jax.distributed.initialize(), which reads SLURM's variables. jax would then
# give each process one GPU, the one of its SLURM_LOCALID; JAX_LOCAL_DEVICE_IDS
# gives it all of the node's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
PROGRAM=gpu
# shellcheck source=lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=lib/group.sh
source "$here/lib/group.sh"

usage() {
  cat <<'HELP'
usage: launch/gpu.sh --config FILE --workdir DIR [--gpus K] ...
       launch/gpu.sh --slurm --nodes N --gpus K --config FILE --workdir DIR ...
       launch/gpu.sh --processes N --process-id I --coordinator HOST:PORT ...

Train on GPUs (pip install -e '.[cuda]'). Crashes are tried again; give the
same command again to resume.

Nothing is installed here. A run that goes on with other versions of its
libraries than those it began with names them in its log; to have them back:
pip install -c WORKDIR/versions.txt ...

  --config FILE       configs/tiny/pretrain.py, for example
  --workdir DIR       a disk that all machines share
  --gpus K            the first K GPUs of each machine; default: all of them
                      (SLURM: must be given)
  --env NAME=VALUE    in the environment of the run; may be repeated
  --max-restarts R    after crashes (3)
  --resume            start again after status 75 (told to end, saved)
  --grace S           seconds between SIGTERM and SIGKILL (120)
  --dry-run           print the command, run none
  -- --config.x=y ... overrides of the config

SLURM: one process a node. Outside a job it submits one; inside (sbatch,
salloc) it runs srun. Two minutes before the time limit, or on preemption, the
run saves, and the job is put back into the queue.
  --slurm --nodes N
  --sbatch-flag F     any flag of sbatch; may be repeated

By hand: the same command on each of N machines, with its own number. (Two on
one machine: give each its own GPUs in CUDA_VISIBLE_DEVICES.)
  --processes N --process-id I --coordinator HOST:PORT   (HOST: machine 0)

exit status: 0 done; 2 a mistake in flags or config; 75 told to end, the same
command resumes; else a crash.

examples:
  launch/gpu.sh --config configs/tiny/pretrain.py --workdir runs/pretrain
  launch/gpu.sh --slurm --nodes 4 --gpus 8 --sbatch-flag=--time=24:00:00 \
    --sbatch-flag=--partition=a100 --config configs/lavit_7b/pixels_sdxl.py \
    --workdir /shared/sdxl
  launch/gpu.sh --processes 2 --process-id 0 --coordinator node0:9876 \
    --config configs/lavit_7b/pixels_sdxl.py --workdir /shared/sdxl
HELP
}

CONFIG="" WORKDIR="" GPUS="" NODES=1 SLURM=0 DRY_RUN=0 GRACE=120
PROCESSES="" PROCESS_ID="" COORDINATOR="" MAX_RESTARTS=3 RESUME=0
VARIABLES=() OVERRIDES=() SBATCH_FLAGS=()
ARGUMENTS=("$@") # for the job that runs this script again

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
  --slurm) SLURM=1 ;;
  --dry-run) DRY_RUN=1 ;;
  --*=*)
    set -- "${1%%=*}" "${1#*=}" "${@:2}"
    continue
    ;;
  --config | --workdir | --gpus | --nodes | --processes | --process-id | \
    --coordinator | --env | --max-restarts | --grace | --sbatch-flag)
    value "$@"
    case $1 in
    --config) CONFIG=$2 ;;
    --workdir) WORKDIR=$2 ;;
    --gpus) GPUS=$2 ;;
    --nodes) NODES=$2 ;;
    --processes) PROCESSES=$2 ;;
    --process-id) PROCESS_ID=$2 ;;
    --coordinator) COORDINATOR=$2 ;;
    --env)
      assignment "$2"
      VARIABLES+=("$2")
      ;;
    --max-restarts) MAX_RESTARTS=$2 ;;
    --grace) GRACE=$2 ;;
    --sbatch-flag) SBATCH_FLAGS+=("$2") ;;
    esac
    shift
    ;;
  *) mistake "unknown argument '$1'" ;;
  esac
  shift
done

check() {
  local address="^[A-Za-z0-9.:-]+:[0-9]+$"
  if [[ -z $CONFIG ]]; then
    mistake "--config is missing"
  fi
  if [[ -z $WORKDIR ]]; then
    mistake "--workdir is missing"
  fi
  number --max-restarts "$MAX_RESTARTS"
  number --grace "$GRACE"
  number --nodes "$NODES" 1
  if [[ -n $GPUS ]]; then
    number --gpus "$GPUS" 1
  fi
  if ((SLURM)); then
    if [[ -z $GPUS ]]; then
      mistake "--slurm needs --gpus K, the GPUs of each node"
    fi
    if [[ -n $PROCESSES$PROCESS_ID$COORDINATOR ]]; then
      mistake "--slurm finds processes and coordinator by itself; leave" \
        "--processes, --process-id and --coordinator out"
    fi
  elif ((NODES > 1)); then
    mistake "--nodes goes with --slurm; by hand it is --processes"
  elif [[ -n $PROCESSES$PROCESS_ID$COORDINATOR ]]; then
    number --processes "${PROCESSES:-none}" 1
    number --process-id "${PROCESS_ID:-none}"
    if ((PROCESS_ID >= PROCESSES)); then
      mistake "--process-id runs from 0 to $((PROCESSES - 1)), not $PROCESS_ID"
    fi
    if [[ ! $COORDINATOR =~ $address ]]; then
      mistake "--coordinator takes HOST:PORT, not '$COORDINATOR'"
    fi
  fi
}

first_gpus() { # 0,1,...,K-1
  local i list=0
  for ((i = 1; i < GPUS; i++)); do
    list+=,$i
  done
  printf '%s' "$list"
}

# The command line of this machine's part of the run, in CMD.
to_run() {
  CMD=(env)
  if ((SLURM)); then
    # A process that ends must not have the others killed while they save:
    # the end of one is told by jax's coordination service, or after 2 minutes.
    CMD=(srun "--nodes=$NODES" --ntasks-per-node=1 "--gpus-per-node=$GPUS")
    CMD+=(--kill-on-bad-exit=0 --wait=120 env LAVIT_DISTRIBUTED=1)
    CMD+=("JAX_LOCAL_DEVICE_IDS=$(first_gpus)")
  else
    if [[ -n $GPUS ]]; then
      CMD+=("CUDA_VISIBLE_DEVICES=$(first_gpus)")
    fi
    if [[ -n $PROCESSES ]]; then
      CMD+=("LAVIT_COORDINATOR=$COORDINATOR" "LAVIT_NUM_PROCESSES=$PROCESSES")
      CMD+=("LAVIT_PROCESS_ID=$PROCESS_ID")
    fi
  fi
  CMD+=(${VARIABLES[@]+"${VARIABLES[@]}"})
  CMD+=("$(lavit_here "$root")" train --config "$CONFIG" --workdir "$WORKDIR")
  CMD+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

# The same command as a job. SLURM copies a script away from its neighbours,
# so the job calls it where it lies.
to_submit() {
  CMD=(sbatch --job-name=lavit "--nodes=$NODES" --ntasks-per-node=1)
  CMD+=("--gpus-per-node=$GPUS" --signal=TERM@120 --requeue)
  CMD+=(--open-mode=append)
  CMD+=(${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"})
  CMD+=(--wrap "exec $(quote bash "$here/gpu.sh" "${ARGUMENTS[@]}")")
}

one() {
  to_run
  exec "${CMD[@]}"
}

check
if ((SLURM)) && [[ -z ${SLURM_JOB_ID:-} ]]; then
  to_submit
else
  to_run
fi
if ((DRY_RUN)); then
  printf '%s\n' "$(quote "${CMD[@]}")"
  exit 0
fi
if ((SLURM)) && [[ -z ${SLURM_JOB_ID:-} ]]; then
  exec "${CMD[@]}"
fi
if ((SLURM)); then
  RESUME=0 # status 75 means that the allocation ends: queue, do not restart
fi
supervise 1
if ((SLURM && !STOPPING && WORST == EX_RESUME)); then
  say "putting job $SLURM_JOB_ID back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$WORST"
