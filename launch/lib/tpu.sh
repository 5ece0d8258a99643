# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # shared with those who source it
# gcloud as launch/tpu_pod.sh needs it. Syntax: gcloud 528 (2025), groups
# `compute tpus tpu-vm` and `compute tpus queued-resources`.
#
# Reads NAME ZONE PROJECT TYPE VERSION SPOT RESERVED QUEUED SLICES NODES[]
# CREATE_FLAGS[] SSH_FLAGS[] READY_TIMEOUT CAPACITY_TRIES TMP.
# A builder (`to_...`) puts a command line into CMD; --dry-run prints CMD where
# a real run executes it, so that the two cannot differ.
CMD=()
STATE=""

VM=(gcloud compute tpus tpu-vm)
QUEUE=(gcloud compute tpus queued-resources)

place() {
  CMD+=("--zone=$ZONE")
  if [[ -n $PROJECT ]]; then
    CMD+=("--project=$PROJECT")
  fi
}

to_create() {
  if ((QUEUED)); then
    # Several slices in one request: the service tells every host of its
    # slice (MEGASCALE_* in the metadata), where libtpu and
    # jax.distributed.initialize() find it; nothing to set here.
    CMD=("${QUEUE[@]}" create "$NAME")
    if ((SLICES > 1)); then
      CMD+=("--node-count=$SLICES" "--node-prefix=$NAME")
    else
      CMD+=("--node-id=$NAME")
    fi
    CMD+=("--accelerator-type=$TYPE" "--runtime-version=$VERSION" --async)
  else
    CMD=("${VM[@]}" create "$NAME")
    CMD+=("--accelerator-type=$TYPE" "--version=$VERSION")
  fi
  if ((SPOT)); then
    CMD+=(--spot)
  fi
  if ((RESERVED)); then
    CMD+=(--reserved)
  fi
  place
  CMD+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} --quiet)
}

to_delete() {
  if ((QUEUED)); then # --force: its machines too
    CMD=("${QUEUE[@]}" delete "$NAME" --force)
  else
    CMD=("${VM[@]}" delete "$NAME")
  fi
  place
  CMD+=(--quiet)
}

to_start() {
  CMD=("${VM[@]}" start "$1")
  place
  CMD+=(--quiet)
}

to_describe() {
  CMD=("${VM[@]}" describe "$1")
  place
  CMD+=("--format=value(state)")
}

to_describe_queue() {
  CMD=("${QUEUE[@]}" describe "$NAME")
  place
  CMD+=("--format=value(state.state)")
}

# A dead host must end ssh within a minute, not hang it.
KEEPALIVE=(-oServerAliveInterval=15 -oServerAliveCountMax=4)

# to_ssh NODE WORKER COMMAND: WORKER is a number or `all`; COMMAND is one
# string, read by the shell over there.
to_ssh() {
  CMD=("${VM[@]}" ssh "$1" "--worker=$2" "--command=$3")
  place
  CMD+=(--strict-host-key-checking=no)
  CMD+=("--ssh-flag=${KEEPALIVE[0]}" "--ssh-flag=${KEEPALIVE[1]}")
  CMD+=(${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --quiet)
}

# to_scp FILE NODE: to the home directory of every worker.
to_scp() {
  CMD=("${VM[@]}" scp "$1" "$2:lavit-code.tar.gz" --worker=all)
  place
  CMD+=(--strict-host-key-checking=no)
  CMD+=(${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --quiet)
}

show() { printf '%s\n' "$(quote "${CMD[@]}")"; }

# describe: runs CMD, sets STATE; ABSENT: no such thing, UNKNOWN: no answer.
describe() {
  local text
  if STATE=$("${CMD[@]}" 2>"$TMP/describe.err"); then
    STATE=${STATE:-UNKNOWN}
    return
  fi
  text=$(cat "$TMP/describe.err")
  case $text in
  *NOT_FOUND* | *"not found"*) STATE=ABSENT ;;
  *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT* | \
    *"auth login"* | *"required property [project]"*)
    printf '%s\n' "$text" >&2
    say "gcloud refuses to look at $NAME; see the line above"
    exit 1
    ;;
  *)
    STATE=UNKNOWN
    printf '%s\n' "$text" >&2
    ;;
  esac
}

# tpu_state: STATE of the whole, of all slices. READY only if all are.
tpu_state() {
  local node whole=READY
  if ((QUEUED)); then
    to_describe_queue
    describe
    if [[ $STATE != ACTIVE ]]; then
      return
    fi
  fi
  for node in "${NODES[@]}"; do
    to_describe "$node"
    describe
    case $STATE in
    READY) ;;
    PREEMPTED | TERMINATED | SUSPENDED)
      whole=PREEMPTED
      break
      ;;
    ABSENT) # an active request whose machine somebody deleted is of no use
      whole=$STATE
      if ((QUEUED)); then
        whole=PREEMPTED
        break
      fi
      ;;
    *) whole=$STATE ;;
    esac
  done
  STATE=$whole
}

# create: 0 when asked for; 1 when it is worth another try; exits otherwise.
CREATE_TRIES=0
create() {
  local text
  to_create
  say "creating $NAME: $TYPE, $SLICES slice(s), runtime $VERSION"
  if "${CMD[@]}" >&2 2>"$TMP/create.err"; then
    cat "$TMP/create.err" >&2
    return
  fi
  text=$(cat "$TMP/create.err")
  printf '%s\n' "$text" >&2
  CREATE_TRIES=$((CREATE_TRIES + 1))
  case $text in
  *[Qq]uota*) # of a machine just deleted, perhaps: three tries only
    if ((CREATE_TRIES >= 3)); then
      say "the project's quota does not allow $TYPE in $ZONE; ask for more" \
        "under IAM > Quotas, or delete what uses it"
      exit 1
    fi
    ;;
  *ALREADY_EXISTS* | *"already exists"* | *capacity* | \
    *RESOURCE_EXHAUSTED* | *"enough resources"* | *UNAVAILABLE* | \
    *INTERNAL* | *DEADLINE_EXCEEDED* | *"timed out"* | *onnection*) ;;
  *)
    say "gcloud refuses to create $NAME; see the lines above"
    exit 1
    ;;
  esac
  if ((CREATE_TRIES >= CAPACITY_TRIES)); then
    say "no $TYPE in $ZONE after $CREATE_TRIES tries. Try another zone," \
      "--spot, or --queued, which waits in Google's queue instead"
    exit "$EX_RESUME"
  fi
  backoff "$CREATE_TRIES"
}

# delete: what is gone already counts as deleted.
delete() {
  local try
  for try in 1 2 3; do
    to_delete
    if "${CMD[@]}" >&2 2>"$TMP/delete.err"; then
      return
    fi
    case $(cat "$TMP/delete.err") in
    *NOT_FOUND* | *"not found"*) return ;;
    esac
    cat "$TMP/delete.err" >&2
    if ((try < 3)); then
      backoff "$try"
    fi
  done
  say "could not delete $NAME; it may still cost money"
  return 1
}

# ensure_tpu: there is a TPU and it is READY, or the launcher ends.
ensure_tpu() {
  local waited=0 unknown=0 dead=0 last=""
  while :; do
    tpu_state
    if [[ $STATE != "$last" ]]; then
      say "$NAME is $STATE"
      last=$STATE
    fi
    case $STATE in
    READY)
      CREATE_TRIES=0
      return
      ;;
    ABSENT) create ;;
    PREEMPTED | TERMINATED | SUSPENDED | FAILED)
      # Nothing runs there any more; a preempted TPU cannot be restarted and
      # keeps its name, so the name is freed.
      dead=$((dead + 1))
      if ((dead > 5)); then
        say "$NAME came back as $STATE five times in a row; giving up"
        exit "$EX_RESUME"
      fi
      if ((dead > 1)); then
        backoff "$dead"
      fi
      say "$NAME is $STATE: deleting it to create it anew"
      delete || exit 1
      ;;
    STOPPED)
      to_start "$NAME"
      "${CMD[@]}" >&2 || backoff 1
      ;;
    *)
      if [[ $STATE == UNKNOWN ]]; then
        unknown=$((unknown + 1))
        if ((unknown > 20)); then
          say "gcloud gives no answer about $NAME; is this machine online?"
          exit "$EX_RESUME"
        fi
      else
        unknown=0
      fi
      if ((waited >= READY_TIMEOUT)); then
        say "$NAME is still $STATE after $waited s (--ready-timeout)." \
          "The same command goes on waiting"
        exit "$EX_RESUME"
      fi
      nap 15
      waited=$((waited + 15))
      ;;
    esac
  done
}

# on_all OUT COMMAND: COMMAND on every worker of every slice, slices side by
# side; their output in OUT. Fails if it failed anywhere.
on_all() {
  local out=$1 command=$2 node pids=() pid failed=0
  : >"$out"
  for node in "${NODES[@]}"; do
    to_ssh "$node" all "$command"
    "${CMD[@]}" >"$TMP/out.$node" 2>"$TMP/err.$node" </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=$?
  done
  for node in "${NODES[@]}"; do
    cat "$TMP/out.$node" >>"$out"
    if ((failed)); then
      complaints "$TMP/err.$node"
    fi
  done
  return "$failed"
}

# The end of what gcloud said, without its reports of progress.
complaints() {
  grep -v -e "Attempting to connect to worker" -e "^##### Command" "$1" |
    tail -n 8 >&2 || true
}

copy_all() {
  local node pids=() pid failed=0
  for node in "${NODES[@]}"; do
    to_scp "$1" "$node"
    "${CMD[@]}" >"$TMP/err.$node" 2>&1 </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=$?
  done
  if ((failed)); then
    for node in "${NODES[@]}"; do
      complaints "$TMP/err.$node"
    done
  fi
  return "$failed"
}

# persist TRIES WHAT COMMAND...: tries again while the TPU is READY. Fails at
# once when the TPU is gone; ends the launcher when the tries are used up.
persist() {
  local tries=$1 what=$2 try=0
  shift 2
  while ! "$@"; do
    tpu_state
    case $STATE in
    PREEMPTED | TERMINATED | SUSPENDED | ABSENT | FAILED)
      say "$NAME is $STATE"
      return 1
      ;;
    esac
    try=$((try + 1))
    say "$what failed on $NAME ($STATE)"
    if ((try >= tries)); then
      say "giving up after $try tries; a run in progress goes on. If ssh is" \
        "the trouble: a firewall must let you in, and several hosts need your" \
        "key in the ssh agent: ssh-add ~/.ssh/google_compute_engine"
      exit 1
    fi
    backoff "$try"
  done
}
