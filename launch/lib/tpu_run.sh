# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # shared with those who source it
# What launch/tpu_pod.sh does on the hosts of a TPU that is READY, through
# lib/worker.sh over there: look, install, start, follow, and decide.
#
# Reads what lib/tpu.sh reads, and KEY REVISION INSTALLED JOB CONFIG WORKDIR
# VARIABLES[] OVERRIDES[] DELETE_AT_END.
# The commands for the hosts; each is one string for the shell over there.
WORKER_PATH=launch/lib/worker.sh
WORKER_SH=lavit/code/$WORKER_PATH
STATE_COMMAND="if [ -f $WORKER_SH ]; then bash $WORKER_SH state; else\
 echo \"LAVIT_STATE host=\$(hostname) run=none key=- status=- code=-\"; fi"
ARCHIVE=""

archive_command() {
  CMD=(git -C "$root" archive --format=tar.gz "--output=$ARCHIVE" "$REVISION")
}

setup_command() {
  printf '%s' "rm -rf lavit/new && mkdir -p lavit/new &&\
 tar -xzf lavit-code.tar.gz -C lavit/new &&\
 bash lavit/new/$WORKER_PATH setup $(quote "$INSTALLED" "$WORKDIR")"
}

# Each attempt has a number of its own, so that its start can be repeated.
ATTEMPT=""
new_attempt() { ATTEMPT=$(date +%s).$$.$RANDOM; }

start_command() {
  local words=(bash "$WORKER_SH" start "$KEY" "$ATTEMPT" "${VARIABLES[@]}" --)
  case $JOB in
  train) words+=(lavit train --config "$CONFIG" --workdir "$WORKDIR") ;;
  latents) words+=(lavit latents --config "$CONFIG" --out "$WORKDIR") ;;
  tokenize) words+=(lavit tokenize --out "$WORKDIR") ;;
  esac
  words+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
  quote "${words[@]}"
}

# survey: what every host says. Sets HOSTS, RUNNING (this run), OTHER (another
# run), READY (hosts that have this code and the versions of this workdir),
# STOPPED (on request) and, if no host is running, STATUS_OF_ALL, the one that
# decides.
survey() {
  local line field how key status code
  HOSTS=0 RUNNING=0 OTHER=0 READY=0 STATUS_OF_ALL=0 STOPPED=0
  if ! persist 8 "asking the hosts" on_all "$TMP/states" "$STATE_COMMAND"; then
    return 1
  fi
  while IFS= read -r line; do
    if [[ $line != LAVIT_STATE\ * ]]; then
      continue
    fi
    how=none key=- status=- code=-
    for field in $line; do
      case $field in
      run=*) how=${field#*=} ;;
      key=*) key=${field#*=} ;;
      status=*) status=${field#*=} ;;
      code=*) code=${field#*=} ;;
      esac
    done
    HOSTS=$((HOSTS + 1))
    if [[ $code == "$INSTALLED" ]]; then
      READY=$((READY + 1))
    fi
    case $how in
    running) if [[ $key == "$KEY" ]]; then
      RUNNING=$((RUNNING + 1))
    else
      OTHER=$((OTHER + 1))
    fi ;;
    stopped) STOPPED=1 ;;
    esac
    if [[ ! $status =~ ^[0-9]+$ ]]; then
      status=1 # killed, or its machine was started anew: a crash
    fi
    STATUS_OF_ALL=$(worse "$STATUS_OF_ALL" "$status")
  done <"$TMP/states"
  if ((!HOSTS)); then
    say "no host of $NAME answered as expected:"
    cat "$TMP/states" >&2
    exit 1
  fi
}

install() {
  local line
  say "copying commit ${REVISION:0:12} to $HOSTS host(s) and installing it"
  if [[ -z $ARCHIVE ]]; then
    ARCHIVE=$TMP/lavit-code.tar.gz
    archive_command
    "${CMD[@]}"
  fi
  persist 8 "copying the code" copy_all "$ARCHIVE" &&
    persist 3 "installing" on_all "$TMP/out" "$(setup_command)" || return 1
  sed -n "s/^LAVIT_VERSIONS //p" "$TMP/out" | sort -u |
    while IFS= read -r line; do
      say "versions: $line"
    done
}

# follow: prints the log of the first host until the run ends there. Lines are
# numbered because gcloud repeats the command when its connection broke.
FOLLOWER=""
follow() {
  local line number ended=0 fails=0 seen=$1 before from
  while ((!ended)); do
    before=$seen
    from=$((seen < 0 ? seen : seen + 1))
    to_ssh "${NODES[0]}" 0 "bash $WORKER_SH follow $from"
    exec 3< <(exec "${CMD[@]}" 2>"$TMP/follow.err" </dev/null)
    if ((BASH_VERSINFO[0] >= 5)); then # older ones do not tell
      FOLLOWER=$!
    fi
    while IFS= read -r line <&3 || [[ -n $line ]]; do
      case $line in
      "L "[0-9]*)
        line=${line#L }
        number=${line%% *}
        if [[ $number =~ ^[0-9]+$ ]] && ((number > seen)); then
          printf '%s\n' "${line#* }"
          seen=$number
        fi
        ;;
      LAVIT_END) ended=1 ;;
      esac
    done
    exec 3<&-
    FOLLOWER=""
    if ((ended)); then
      return
    fi
    tpu_state
    case $STATE in
    PREEMPTED | TERMINATED | SUSPENDED | ABSENT | FAILED)
      say "$NAME is $STATE"
      return 1
      ;;
    esac
    fails=$((seen > before ? 1 : fails + 1))
    if ((fails >= 10)); then
      complaints "$TMP/follow.err"
      say "cannot reach $NAME, which is $STATE. The run may well go on: the" \
        "same command follows it again"
      exit "$EX_RESUME"
    fi
    say "lost the log of $NAME ($STATE)"
    backoff "$fails"
  done
}

# attempt: one life of the run. Sets OUTCOME: its status, or `gone`.
attempt() {
  local seen=0
  OUTCOME=gone
  ensure_tpu
  survey || return 0
  if ((OTHER)); then
    say "another run is in progress on $NAME. See it with 'status'; end it" \
      "with: launch/tpu_pod.sh stop $(place_flags)"
    exit "$EX_MISTAKE"
  fi
  if ((RUNNING == HOSTS)); then
    say "the run is in progress; following it"
    seen=-50
  else
    if ((RUNNING)); then # cannot go on without the others
      say "the run is alive on $RUNNING of $HOSTS hosts only; ending it first"
      end_everywhere || return 0
    fi
    if ((READY < HOSTS)); then
      install || return 0
    fi
    say "starting the run on $HOSTS host(s)"
    new_attempt
    persist 8 "starting the run" on_all "$TMP/out" "$(start_command)" ||
      return 0
  fi
  follow "$seen" || return 0
  await_end || return 0
  OUTCOME=$STATUS_OF_ALL
}

place_flags() {
  CMD=(--name "$NAME")
  place
  if ((SLICES > 1)); then
    CMD+=(--slices "$SLICES")
  fi
  quote "${CMD[@]}"
}

# The first host's run is over: the others have 3 minutes (time-outs of the
# coordination service included), then they are killed.
await_end() {
  local waited=0
  survey || return 1
  while ((RUNNING)); do
    if ((waited >= 180)); then
      say "the run ended on the first host, but not on $RUNNING other(s);" \
        "ending it there"
      end_everywhere || return 1
      survey
      return
    fi
    nap 15
    waited=$((waited + 15))
    survey || return 1
  done
}

end_everywhere() {
  persist 8 "ending the run" on_all "$TMP/out" "bash $WORKER_SH kill"
}

# The last lines of every host, where the reason of a crash often stands.
explain() {
  if on_all "$TMP/tails" "bash $WORKER_SH tail 5"; then
    say "the last lines on each host:"
    cat "$TMP/tails" >&2
  fi
}

run() {
  local status=0
  RESUME=1 STOPPING=0
  while :; do
    STARTED=$SECONDS
    attempt
    if [[ $OUTCOME == gone ]]; then
      say "the TPU was taken away; the run resumes on a new one"
      continue
    fi
    status=$OUTCOME
    if ((STOPPED)); then
      say "the run was stopped on request; the same command resumes it"
      STOPPING=1
    fi
    if ((status != 0 && status != EX_MISTAKE && status != EX_RESUME)); then
      explain
    fi
    again "$status" || break
  done
  case $status in
  0) say "the run is done: $WORKDIR" ;;
  "$EX_MISTAKE") say "the run refused its flags or config; see its log above" ;;
  esac
  if ((DELETE_AT_END && !STOPPED)); then
    say "deleting $NAME (--delete-at-end)"
    delete && LEFT_BEHIND=0
  fi
  exit "$status"
}
