# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # shared with those who source it
# Processes of one run on this machine, as a group: output, signals, ending.
# For launch/local.sh and launch/gpu.sh, which define `one I`: it must `exec`
# process I. Reads GRACE, the seconds between SIGTERM and SIGKILL.
#
# SIGINT, SIGTERM and SIGHUP are passed on as SIGTERM: `lavit train` saves and
# ends with 75. (Processes in the background of a script ignore SIGINT.)
STOPPING=0
ALIVE=()
TMP=""

prepare_group() {
  TMP=$(mktemp -d)
  trap 'rm -rf "$TMP"' EXIT
  trap on_signal INT TERM HUP
}

on_signal() {
  SIGNALLED=1
  if ((STOPPING)); then
    say "killing it"
    signal_all KILL
    return
  fi
  STOPPING=1
  say "telling the run to save and end; once more kills it"
  signal_all TERM
}

signal_all() {
  local pid
  for pid in ${ALIVE[@]+"${ALIVE[@]}"}; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
}

# Puts `[I] ` in front of every line; lives until the process closes its end.
prefix() {
  local line
  trap '' INT TERM HUP
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# run_group COUNT: runs them all; the worst status in WORST. One that fails
# stops the others, which would wait for it.
run_group() {
  local i pid printers=() ended still deadline=""
  WORST=0
  ALIVE=()
  for ((i = 0; i < $1; i++)); do
    if (($1 > 1)); then
      rm -f "$TMP/out.$i"
      mkfifo "$TMP/out.$i"
      prefix "$i" <"$TMP/out.$i" &
      printers+=($!)
      one "$i" >"$TMP/out.$i" 2>&1 &
    else
      one "$i" &
    fi
    ALIVE+=($!)
  done
  while ((${#ALIVE[@]})); do
    ended=0 still=()
    for pid in "${ALIVE[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
        continue
      fi
      wait_for "$pid"
      ended=1
      WORST=$(worse "$WORST" "$STATUS")
      if ((STATUS != 0 && STATUS != EX_RESUME)) && [[ -z $deadline ]]; then
        say "a process ended with status $STATUS"
        deadline=$((SECONDS + GRACE))
      fi
    done
    ALIVE=(${still[@]+"${still[@]}"})
    if ((ended)) && [[ -n $deadline ]]; then
      signal_all TERM
    fi
    if [[ -z $deadline ]] && ((STOPPING)); then
      deadline=$((SECONDS + GRACE))
    fi
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
      signal_all KILL
    fi
    sleep 0.1 || true # a signal may end it
  done
  for pid in ${printers[@]+"${printers[@]}"}; do
    wait_for "$pid"
  done
}

# supervise COUNT: run_group again and again, as `again` of common.sh says; the
# worst status of the last one in WORST.
supervise() {
  prepare_group
  while :; do
    STARTED=$SECONDS
    if declare -F before_attempt >/dev/null; then
      before_attempt
    fi
    run_group "$1"
    again "$WORST" || break
    if ((STOPPING)); then # told to end while waiting
      break
    fi
  done
}
