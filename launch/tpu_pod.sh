#!/usr/bin/env bash
# One run on a Cloud TPU, from nothing to its end. See --help.
#
# Relies on: gcloud (logged in), git, tar, ssh here; on the TPU's hosts bash,
# PyPI, and access to the --workdir. On Cloud TPU jax.distributed.initialize()
# needs no arguments; LAVIT_DISTRIBUTED=1 makes `lavit train` call it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
PROGRAM=tpu_pod
# shellcheck source=lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=lib/tpu.sh
source "$here/lib/tpu.sh"
# shellcheck source=lib/tpu_run.sh
source "$here/lib/tpu_run.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu_pod.sh [run|status|logs|stop|delete] --name N --zone Z ...

Train on a Cloud TPU (plain TPU VMs, no GKE): create it or use the one that is
there, copy this checkout's last commit, install it, run `lavit train` on all
hosts, follow the log; after a preemption create it anew and resume.

Give the same command again whenever in doubt: a run in progress is followed,
never started twice, and a run that ended resumes from its last checkpoint.
Ctrl-C only stops following. Nothing is deleted at the end unless you say so.

A run goes on with the libraries it began with: its first start writes their
versions to WORKDIR/versions.txt, and each new TPU installs these. Where that
cannot be done it is said, and the log names what differs. Delete the file to
let a run go on with newer ones.

  run      (default) as above
  status   the TPU's state, and the run's on each host
  logs     the end of the log: --worker W (0; or all), --lines N (100)
  stop     tell the run to save and end; the TPU stays (and costs)
  delete   delete the TPU, whatever runs on it

which TPU:
  --name N            of the TPU: small letters, digits, hyphens
  --zone Z            us-west4-a, for example
  --project P         default: gcloud's own
  --type T            accelerator type: v5litepod-256 (v5e), v5p-256, v6e-256
  --version V         runtime; default: the one of the type
  --slices S          S slices of that type, one run over all (multislice);
                      implies --queued
  --spot              cheaper, can be taken away at any moment
  --queued            wait in the queue for capacity instead of asking again
  --reserved          from your reservation
  --create-flag F     any other flag of `gcloud ... create`; may be repeated
  --ssh-flag F        of `gcloud ... ssh` and `scp`: --internal-ip, say

which run:
  --config FILE       in this checkout, committed: configs/lavit_7b/...
  --workdir DIR       gs://BUCKET/FOLDER, or /mnt/shared/run, say: what all
                      hosts see, and outlives the TPU (Filestore, NFS)
  --job NAME          train (default); or tokenize or latents: all hosts write
                      the caches of a data set to --workdir, which must be a
                      folder. tokenize takes no --config, but --data and
                      --model after --
  --env NAME=VALUE    in the run's environment; may be repeated
  -- --config.x=y ... overrides of the config

how long to try:
  --max-restarts K    after crashes (3); preemptions are not counted
  --capacity-tries C  when there is no capacity (50; up to 10 minutes apart)
  --ready-timeout S   until the TPU is ready (1800 s; queued: 86400 s)
  --delete-at-end     delete the TPU when the run is over: done, or given up
  --dry-run           print every command, run none

exit status: 0 done; 2 a mistake in flags or config; 75 ended before it was
done, the same command resumes; 130 Ctrl-C (the run goes on); else a failure.

examples:
  # one host (8 chips), on demand
  launch/tpu_pod.sh --name lora --zone us-west4-a --type v5litepod-8 \
    --config configs/lavit_7b/pixels_sd15.py --workdir /mnt/shared/lora \
    -- --config.model.lora.rank=16 --config.model.lora.alpha=16

  # a pod, spot, from the queue, deleted when done; look at it first
  launch/tpu_pod.sh --name pre --zone us-west4-a --type v5litepod-256 \
    --queued --spot --config configs/lavit_7b/pixels_sdxl.py \
    --workdir /mnt/shared/pre --delete-at-end --dry-run

  # codes of a data set, by all chips of a pod
  launch/tpu_pod.sh --name codes --zone us-west4-a --type v5litepod-64 \
    --job tokenize --workdir /mnt/shared/codes \
    -- --model /mnt/shared/model --data '/mnt/shared/web/*.tar'

  # two pods as one
  launch/tpu_pod.sh --name big --zone us-east5-a --type v6e-256 --slices 2 \
    --config configs/lavit_7b/pixels_sdxl.py --workdir /mnt/shared/big \
    -- --config.mesh.data=2

  launch/tpu_pod.sh status --name pre --zone us-west4-a
  launch/tpu_pod.sh logs --name pre --zone us-west4-a --worker 3
  launch/tpu_pod.sh delete --name pre --zone us-west4-a

`status`, `stop` and `delete` of several slices need --slices too; slice 1 of
--name big is a TPU of its own, named big-1 (`logs --name big-1`).
Several hosts: put your key in the ssh agent first, so that gcloud can reach
all at once:  ssh-add ~/.ssh/google_compute_engine
HELP
}

ACTION=run NAME="" ZONE="" PROJECT="" TYPE="" VERSION="" SLICES=1
SPOT=0 QUEUED=0 RESERVED=0 DELETE_AT_END=0 DRY_RUN=0
JOB=train CONFIG="" WORKDIR="" WORKER=0 LINES_OF_LOG=100
MAX_RESTARTS=3 CAPACITY_TRIES=50 READY_TIMEOUT=""
CREATE_FLAGS=() SSH_FLAGS=() VARIABLES=(LAVIT_DISTRIBUTED=1) OVERRIDES=()

parse() {
  case ${1:-} in
  run | status | logs | stop | delete)
    ACTION=$1
    shift
    ;;
  esac
  while (($#)); do
    case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      OVERRIDES+=("$@")
      return
      ;;
    --config.*) OVERRIDES+=("$1") ;;
    --spot) SPOT=1 ;;
    --queued) QUEUED=1 ;;
    --reserved) RESERVED=1 ;;
    --delete-at-end) DELETE_AT_END=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    *)
      take "$@"
      shift
      ;;
    esac
    shift
  done
}

take() { # a flag that has a value
  case $1 in
  --name | --zone | --project | --type | --version | --slices | --job | \
    --config | --workdir | --env | --create-flag | --ssh-flag | --max-restarts | \
    --capacity-tries | --ready-timeout | --worker | --lines) value "$@" ;;
  *) mistake "unknown argument '$1'" ;;
  esac
  case $1 in
  --name) NAME=$2 ;;
  --zone) ZONE=$2 ;;
  --project) PROJECT=$2 ;;
  --type) TYPE=$2 ;;
  --version) VERSION=$2 ;;
  --slices) SLICES=$2 ;;
  --job) JOB=$2 ;;
  --config) CONFIG=$2 ;;
  --workdir) WORKDIR=$2 ;;
  --env)
    assignment "$2"
    VARIABLES+=("$2")
    ;;
  --create-flag) CREATE_FLAGS+=("$2") ;;
  --ssh-flag) SSH_FLAGS+=("$2") ;;
  --max-restarts) MAX_RESTARTS=$2 ;;
  --capacity-tries) CAPACITY_TRIES=$2 ;;
  --ready-timeout) READY_TIMEOUT=$2 ;;
  --worker) WORKER=$2 ;;
  --lines) LINES_OF_LOG=$2 ;;
  esac
}

check() {
  local name="^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$" project="^[a-z0-9.:-]+$"
  local zone="^[a-z]+-[a-z]+[0-9]+-[a-z]$" slice
  if [[ ! $NAME =~ $name ]]; then
    mistake "--name takes small letters, digits and hyphens, not '$NAME'"
  fi
  if [[ ! $ZONE =~ $zone ]]; then
    mistake "--zone takes a zone like us-west4-a, not '$ZONE'"
  fi
  if [[ -n $PROJECT && ! $PROJECT =~ $project ]]; then
    mistake "--project takes the id of a project, not '$PROJECT'"
  fi
  if [[ ! $WORKER =~ ^([0-9]+|all)$ ]]; then
    mistake "--worker takes a number or all, not '$WORKER'"
  fi
  number --slices "$SLICES" 1
  number --lines "$LINES_OF_LOG" 1
  NODES=("$NAME")
  if ((SLICES > 1)); then
    QUEUED=1
    NODES=()
    for ((slice = 0; slice < SLICES; slice++)); do
      NODES+=("$NAME-$slice")
    done
  fi
  if [[ $ACTION == run ]]; then
    check_run
  fi
}

check_run() {
  local type="^(v[2-6][a-z]*)-[0-9]+$"
  if [[ ! $TYPE =~ $type ]]; then
    mistake "--type takes an accelerator type like v5litepod-256, v5p-256 or" \
      "v6e-256, not '$TYPE'"
  fi
  if [[ -z $VERSION ]]; then # cloud.google.com/tpu/docs/runtimes
    case $TYPE in
    v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) VERSION=tpu-ubuntu2204-base ;;
    *) mistake "no runtime is known for --type $TYPE; name one: --version V" ;;
    esac
  fi
  number --max-restarts "$MAX_RESTARTS"
  number --capacity-tries "$CAPACITY_TRIES" 1
  if [[ -z $READY_TIMEOUT ]]; then
    READY_TIMEOUT=$((QUEUED ? 86400 : 1800))
  fi
  number --ready-timeout "$READY_TIMEOUT" 1
  case $WORKDIR in
  /?* | gs://?*/?*) ;;
  *) mistake "--workdir takes gs://BUCKET/FOLDER, or a folder such as" \
    "/mnt/shared/run, not '$WORKDIR': a place that all hosts see and that" \
    "outlives the TPU (a bucket, Filestore, NFS)" ;;
  esac
  check_job
  check_code
}

check_job() {
  local word
  case $JOB in
  train) ;;
  tokenize | latents)
    if [[ $WORKDIR == gs://* ]]; then
      mistake "--job $JOB writes caches to a folder that all hosts see" \
        "(Filestore, NFS), not to '$WORKDIR'; copy them to a bucket afterwards"
    fi
    for word in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
      case $word in
      --out | --out=* | --part | --part=*)
        mistake "--job $JOB sets ${word%%=*} itself: caches go to --workdir," \
          "and each host writes a part"
        ;;
      esac
    done
    ;;
  *) mistake "--job takes train, tokenize or latents, not '$JOB'" ;;
  esac
  if [[ $JOB == tokenize && -n $CONFIG ]]; then
    mistake "--job tokenize takes no --config; give --data and --model after --"
  fi
  if [[ $JOB != tokenize && -z $CONFIG ]]; then
    mistake "--config is missing"
  fi
}

check_code() {
  local changed
  if ! REVISION=$(git -C "$root" rev-parse --verify -q "HEAD^{commit}"); then
    mistake "$root is no git checkout with a commit; the TPU gets its code" \
      "from one: git clone it"
  fi
  if [[ -n $CONFIG ]] &&
    ! git -C "$root" cat-file -e "HEAD:$CONFIG" 2>/dev/null; then
    mistake "--config '$CONFIG' is not in the last commit of $root; the hosts" \
      "get what is committed. Give its path from there, and commit it"
  fi
  if ! git -C "$root" cat-file -e "HEAD:$WORKER_PATH" 2>/dev/null; then
    mistake "$WORKER_PATH is not in the last commit of $root; commit it"
  fi
  changed=$(git -C "$root" status --porcelain --untracked-files=no | wc -l)
  if ((changed)); then
    say "note: $((changed)) changed file(s) are not committed, and not copied"
  fi
  # What says that two runs are the same run.
  KEY=$(printf '%s\0' "$JOB" "$CONFIG" "$WORKDIR" "${VARIABLES[@]}" \
    ${OVERRIDES[@]+"${OVERRIDES[@]}"} | git hash-object --stdin | cut -c1-12)
  # What is installed for it: the versions are those of the workdir's run.
  INSTALLED=$REVISION.$(printf '%s' "$WORKDIR" | git hash-object --stdin |
    cut -c1-12)
}

# The same builders, printed: what a first run does, in order.
dry_run() {
  local node
  ARCHIVE=lavit-code.tar.gz
  new_attempt
  echo "# is it there?"
  describe_dry
  echo "# if it is not:"
  to_create
  show
  echo "# until it is READY:"
  describe_dry
  echo "# what the hosts do; a run in progress is followed, not started"
  each_node all "$STATE_COMMAND"
  echo "# the code, and its installation"
  archive_command
  show
  for node in "${NODES[@]}"; do
    to_scp "$ARCHIVE" "$node"
    show
  done
  each_node all "$(setup_command)"
  echo "# the run"
  each_node all "$(start_command)"
  echo "# its log, until it ends"
  to_ssh "${NODES[0]}" 0 "bash $WORKER_SH follow 1"
  show
  each_node all "$STATE_COMMAND"
  if ((DELETE_AT_END)); then
    echo "# at the end"
  else
    echo "# not run: how to delete it; after a preemption this comes before" \
      "the next create"
    printf '# '
  fi
  to_delete
  show
}

describe_dry() {
  local node
  if ((QUEUED)); then
    to_describe_queue
    show
  fi
  for node in "${NODES[@]}"; do
    to_describe "$node"
    show
  done
}

each_node() {
  local node
  for node in "${NODES[@]}"; do
    to_ssh "$node" "$1" "$2"
    show
  done
}

# on_hosts COMMAND: for `status`, `logs`, `stop`: the first slice's --worker,
# or every host.
on_hosts() {
  if ((DRY_RUN)); then
    each_node "$WORKER" "$1"
    return
  fi
  if [[ $WORKER == all ]]; then
    on_all "$TMP/out" "$1" && cat "$TMP/out"
  else
    to_ssh "${NODES[0]}" "$WORKER" "$1"
    "${CMD[@]}"
  fi
}

status_of_run() {
  if ((DRY_RUN)); then
    describe_dry
  else
    tpu_state
    echo "$NAME: $STATE"
    if [[ $STATE != READY ]]; then
      return
    fi
  fi
  WORKER=all
  on_hosts "$STATE_COMMAND" | sed 's/^LAVIT_STATE //'
}

stop_run() {
  WORKER=all
  on_hosts "if [ -f $WORKER_SH ]; then bash $WORKER_SH stop 300; fi"
  say "told to save and end; the TPU $NAME stays. To delete it:" \
    "launch/tpu_pod.sh delete $(place_flags)"
}

delete_tpu() {
  if ((!DRY_RUN && !QUEUED)); then # as it was created, whatever the flags
    to_describe_queue
    describe
    if [[ $STATE != ABSENT ]]; then
      QUEUED=1
    fi
  fi
  if ((DRY_RUN)); then
    to_delete
    show
  else
    delete
    say "$NAME is deleted"
  fi
}

LEFT_BEHIND=0
TMP=""
finish() {
  local status=$?
  if [[ -n ${FOLLOWER:-} ]]; then
    kill "$FOLLOWER" 2>/dev/null || true
  fi
  if [[ -n $TMP ]]; then
    rm -rf "$TMP"
  fi
  if ((LEFT_BEHIND)); then
    say "the TPU $NAME may still be there, and cost money. To delete it:" \
      "launch/tpu_pod.sh delete $(place_flags)"
  fi
  exit "$status"
}

detach() {
  say "no longer following; a run that was started goes on, and the same" \
    "command follows it again. To end it:" \
    "launch/tpu_pod.sh stop $(place_flags)"
  exit 130
}

parse "$@"
check
if ((DRY_RUN)); then
  case $ACTION in
  run) dry_run ;;
  status) status_of_run ;;
  logs) on_hosts "bash $WORKER_SH tail $LINES_OF_LOG" ;;
  stop) stop_run ;;
  delete) delete_tpu ;;
  esac
  exit 0
fi
if ! command -v gcloud >/dev/null; then
  mistake "gcloud is not on PATH: https://cloud.google.com/sdk/docs/install"
fi
TMP=$(mktemp -d)
trap finish EXIT
trap detach INT TERM HUP
case $ACTION in
run)
  LEFT_BEHIND=1
  run
  ;;
status) status_of_run ;;
logs) on_hosts "bash $WORKER_SH tail $LINES_OF_LOG" ;;
stop) stop_run ;;
delete) delete_tpu ;;
esac
