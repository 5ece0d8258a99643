# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # shared with those who source it
# What the launchers share: messages, quoting, waiting, restarts.
#
# Written for bash 3.2 too (macOS): no associative arrays, no `wait -n`, and
# "${a[@]+"${a[@]}"}" for an array that may be empty.
#
# Exit statuses of `lavit train` that all launchers rely on:
#   0    the run is done
#   2    the user's mistake (flags, config): never tried again
#   75   EX_TEMPFAIL: told to end (SIGTERM), saved; the same command resumes
#   else a crash: tried again, at most --max-restarts times
EX_MISTAKE=2
EX_RESUME=75

PROGRAM=${PROGRAM:-launch}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# One clear line, then status 2.
mistake() {
  say "$* (--help explains)"
  exit "$EX_MISTAKE"
}

# quote WORD...: the words so that they can be pasted into any POSIX shell.
quote() {
  local word rest separator="" safe="^[A-Za-z0-9_./:=@%+,-]+$"
  for word in "$@"; do
    if [[ ! $word =~ $safe ]]; then
      rest=$word word="'"
      while [[ $rest == *"'"* ]]; do # ${a//b/c} differs between versions here
        word+="${rest%%"'"*}'\\''"
        rest=${rest#*"'"}
      done
      word+="$rest'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

# nap SECONDS. LAVIT_LAUNCH_SECOND_MS shortens the second, for tests.
nap() {
  local ms=$(($1 * ${LAVIT_LAUNCH_SECOND_MS:-1000}))
  sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
}

# backoff TRY: naps 10, 20, 40 ... 600 seconds for TRY = 1, 2, 3 ...
backoff() {
  local seconds=600
  if (($1 < 7)); then
    seconds=$((10 * (1 << ($1 - 1))))
  fi
  say "trying again in $seconds s"
  nap "$seconds"
}

# number FLAG VALUE [LEAST]: VALUE is a whole number of at least LEAST.
number() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < ${3:-0})); then
    mistake "$1 takes a whole number of at least ${3:-0}, not '$2'"
  fi
}

# value FLAG REST...: fails unless something follows FLAG.
value() {
  if (($# < 2)); then
    mistake "$1 needs a value"
  fi
}

# The name of a variable for the run: NAME=VALUE.
assignment() {
  if [[ ! $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
    mistake "--env takes NAME=VALUE, not '$1'"
  fi
}

# The command `lavit` of this machine: $LAVIT, the checkout's .venv, or PATH.
lavit_here() {
  local root=$1
  if [[ -n ${LAVIT:-} ]]; then
    printf '%s' "$LAVIT"
  elif [[ -x $root/.venv/bin/lavit ]]; then
    printf '%s' "$root/.venv/bin/lavit"
  else
    printf 'lavit'
  fi
}

# worse A B: the status that says more about a group of processes. 2 rules
# out another try, so it wins; then the first crash, then 75, then 0.
worse() {
  if (($1 == EX_MISTAKE || $2 == EX_MISTAKE)); then
    printf '%d' "$EX_MISTAKE"
  elif (($1 != 0 && $1 != EX_RESUME)); then
    printf '%d' "$1"
  elif (($2 != 0)); then
    printf '%d' "$2"
  else
    printf '%d' "$1"
  fi
}

# again STATUS: whether to start the run again; counts in RESTARTS and naps.
# Reads MAX_RESTARTS, RESUME (1: go on after 75), STOPPING (1: asked to end)
# and STARTED (SECONDS when the attempt began).
RESTARTS=0
QUICK=0
again() {
  if ((STOPPING || $1 == 0 || $1 == EX_MISTAKE)); then
    return 1
  fi
  if (($1 == EX_RESUME)); then
    if ((!RESUME)); then
      return 1
    fi
    say "the run was told to end and has saved; resuming"
  else
    if ((RESTARTS >= MAX_RESTARTS)); then
      say "the run crashed with status $1; restarts used: $RESTARTS of" \
        "$MAX_RESTARTS"
      return 1
    fi
    RESTARTS=$((RESTARTS + 1))
    say "the run crashed with status $1; restart $RESTARTS of $MAX_RESTARTS"
  fi
  # A run that ends within a minute, again and again, must not spin.
  if ((SECONDS - STARTED < 60)); then
    QUICK=$((QUICK + 1))
    backoff "$QUICK"
  else
    QUICK=0
  fi
}

# wait_for PID: its exit status in STATUS. A trapped signal ends `wait` early
# (the trap must set SIGNALLED=1): then the process is waited for again.
SIGNALLED=0
STATUS=0
wait_for() {
  local status before=0
  while :; do
    SIGNALLED=0
    status=0
    wait "$1" || status=$?
    if ((status == 127 && before)); then # had ended when the signal came
      status=$before
    fi
    if ((!SIGNALLED || status <= 128)); then
      STATUS=$status
      return
    fi
    before=$status
  done
}
