#!/usr/bin/env bash
# The part of launch/tpu_pod.sh that runs on the TPU's hosts (Linux). ~/lavit:
#   code/  the copied checkout       venv/  its Python
#   run/   log, pid, status, key, attempt, boot, stopped: of the latest run
#
#   worker.sh setup INSTALLED WORKDIR     ~/lavit/new becomes code; install, in
#                                         the versions the run there began with
#   worker.sh start KEY ATTEMPT [NAME=VALUE...] -- COMMAND...
#   worker.sh state                       one line: LAVIT_STATE host=... run=...
#   worker.sh follow FROM                 the log from line FROM (-50: the last
#                                         50), numbered; LAVIT_END at its end
#   worker.sh tail LINES                  the end of the log, host in front
#   worker.sh stop SECONDS | kill         SIGTERM, and wait; SIGKILL
#
# gcloud repeats a command whose connection broke, so every verb may be
# repeated: `start` of a run in progress, or of an ATTEMPT that has been (and
# perhaps ended) already, does nothing.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

home=$HOME/lavit
run=$home/run
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown)

read_or() { cat "$run/$1" 2>/dev/null || printf '%s\n' "$2"; }

# Whether the supervisor of the latest run is alive; a pid of before a reboot
# belongs to somebody else by now.
alive() {
  local pid
  pid=$(read_or pid "")
  [[ -n $pid && $(read_or boot "") == "$boot" ]] &&
    kill -0 "$pid" 2>/dev/null &&
    grep -q worker.sh "/proc/$pid/cmdline" 2>/dev/null
}

# `kill -0` of a zombie succeeds, so status is what tells that a run ended.
running() { [[ ! -e $run/status ]] && alive; }

# For who started the launcher, on whose screen it ends.
tell() { echo "LAVIT_VERSIONS $*"; }

# fetch_versions WORKDIR: versions.txt of a run (train/versions.py), as
# constraints for pip in ~/lavit/versions.txt; no such file if the run has
# none, which is so at its first start. Fails where that cannot be told: a host
# that went on alone would compute with other versions than the rest.
fetch_versions() {
  local from=${1%/}/versions.txt raw=$home/versions.raw why=$home/versions.err
  rm -f "$raw" "$home/versions.txt"
  if [[ $from == gs://* ]]; then
    if ! gcloud storage cp "$from" "$raw" >"$why" 2>&1 </dev/null; then
      grep -q "matched no objects" "$why" && return
      cannot_read "$from" "$why"
      return 1
    fi
  elif [[ ! -e $from ]]; then
    return
  elif ! cp "$from" "$raw" 2>"$why"; then
    cannot_read "$from" "$why"
    return 1
  fi
  # Names and numbers only: who can write to the workdir gives pip no address.
  if ! head -c 1000000 "$raw" | tr -d '\r' | LC_ALL=C grep -E \
    "^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!_-]+$" >"$home/versions.txt"; then
    rm "$home/versions.txt"
    tell "$from names no version: the newest are taken"
  fi
}

cannot_read() {
  echo "$(hostname): $1 cannot be read: $(tail -n 1 "$2")" >&2
}

# install WORKDIR: the code and what it needs, as it was for that run.
install() {
  local pip=("$home/venv/bin/python" -m pip install --quiet)
  local code="$home/code[tpu,gcs]" why=$home/versions.err
  fetch_versions "$1"
  if [[ -e $home/versions.txt ]]; then
    if "${pip[@]}" -c "$home/versions.txt" -e "$code" 2>"$why"; then
      tell "as in $1/versions.txt, with which the run began"
      return
    fi
    # Without a network pip knows of no version at all. That is tried again as
    # it is, as anything else that may be so on this host alone.
    if grep -q "from versions: none" "$why" ||
      ! grep -q -e ResolutionImpossible -e "No matching distribution" "$why"; then
      cat "$why" >&2
      return 1
    fi
    tell "those of $1/versions.txt cannot be installed" \
      "($(grep ERROR "$why" | head -n 1)): the newest are, and the run will" \
      "tell which differ"
  fi
  "${pip[@]}" -e "$code"
}

setup() {
  local revision=$1 workdir=$2 python candidate
  rm -rf "$home/code"
  mv "$home/new" "$home/code"
  python=""
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 11))" \
      2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [[ ! -x $home/venv/bin/python ]]; then
    # TPU images bring Python 3.10 and often no venv module: uv fetches one.
    if [[ -z $python ]] || ! "$python" -m venv "$home/venv"; then
      rm -rf "$home/venv"
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 "$home/venv"
    fi
  fi
  install "$workdir"
  printf '%s\n' "$revision" >"$home/code/.lavit-revision"
  echo "LAVIT_READY $(hostname)"
}

start() {
  local key=$1 attempt=$2 try
  shift 2
  mkdir -p "$run"
  exec 9>"$run/lock"
  flock 9
  if running || [[ $(read_or attempt "") == "$attempt" ]]; then
    echo "LAVIT_STARTED $(hostname) already"
    return
  fi
  rm -f "$run/status" "$run/pid" "$run/stopped"
  if [[ -e $run/log ]]; then
    mv "$run/log" "$run/log.$(date +%Y%m%d-%H%M%S)"
  fi
  printf '%s\n' "$key" >"$run/key"
  printf '%s\n' "$boot" >"$run/boot"
  printf '%s\n' "$attempt" >"$run/attempt"
  : >"$run/log"
  setsid nohup bash "${BASH_SOURCE[0]}" supervise "$@" \
    >>"$run/log" 2>&1 </dev/null 9>&- &
  for ((try = 0; try < 500; try++)); do
    if [[ -e $run/pid ]]; then
      echo "LAVIT_STARTED $(hostname)"
      return
    fi
    sleep 0.02
  done
  echo "LAVIT_FAILED $(hostname): the run did not start" >&2
  return 1
}

# Runs in a session of its own, away from ssh. On SIGTERM (`stop`, or the
# machine being taken away) the run is told, saves, and ends with 75.
supervise() {
  local child variables=()
  printf '%s\n' $$ >"$run/pid.new"
  mv "$run/pid.new" "$run/pid"
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  cd "$home/code"
  PATH=$home/venv/bin:$PATH env ${variables[@]+"${variables[@]}"} "$@" &
  child=$!
  trap 'SIGNALLED=1; kill -TERM "$child" 2>/dev/null || true' TERM
  wait_for "$child"
  printf '%s\n' "$STATUS" >"$run/status.new"
  mv "$run/status.new" "$run/status"
}

state() {
  local how=none
  if running; then
    how=running
  elif [[ -e $run/stopped ]]; then
    how=stopped
  elif [[ -e $run/status ]]; then
    how=exited
  elif [[ -e $run/key ]]; then
    how=lost # killed, or the machine was started anew
  fi
  echo "LAVIT_STATE host=$(hostname) run=$how key=$(read_or key -)" \
    "status=$(read_or status -)" \
    "code=$(cat "$home/code/.lavit-revision" 2>/dev/null || echo -)"
}

follow() {
  local from=$1 line total pid
  if [[ ! -e $run/log ]]; then
    echo "LAVIT_END"
    return
  fi
  pid=$(read_or pid "")
  if ((from < 0)); then
    total=$(wc -l <"$run/log")
    from=$((total + from + 1))
  fi
  if ((from < 1)); then
    from=1
  fi
  {
    if running; then
      # `-s`: how soon it notices that the run has ended.
      tail -n "+$from" -s 0.2 --pid="$pid" -F "$run/log" 2>/dev/null
    else
      tail -n "+$from" "$run/log" 2>/dev/null || true
    fi
  } | while IFS= read -r line || [[ -n $line ]]; do
    printf 'L %d %s\n' "$from" "$line"
    from=$((from + 1))
  done
  if ! running; then
    echo "LAVIT_END"
  fi
}

last_lines() {
  tail -n "$1" "$run/log" 2>/dev/null | sed "s/^/$(hostname): /"
}

stop() {
  local waited
  if ! running; then
    return
  fi
  : >"$run/stopped"
  kill -TERM "$(cat "$run/pid")"
  for ((waited = 0; waited < $1 * 5; waited++)); do
    if ! running; then
      return
    fi
    sleep 0.2
  done
  echo "$(hostname): still saving after $1 s" >&2
}

kill_run() {
  if running; then
    kill -KILL -- "-$(cat "$run/pid")" # the supervisor leads its group
  fi
}

verb=$1
shift
case $verb in
setup | start | supervise | state | follow | stop) "$verb" "$@" ;;
tail) last_lines "$@" ;;
kill) kill_run ;;
*)
  echo "worker.sh: unknown verb '$verb'" >&2
  exit 2
  ;;
esac
