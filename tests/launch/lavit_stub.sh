#!/usr/bin/env bash
# A `lavit` for tests. $LAVIT_STUB/plan/ATTEMPT[.HOST] says how it ends: a
# status, or `hang` until $LAVIT_STUB/release exists. Counts its attempts.
set -euo pipefail
host=${LAVIT_STUB_HOST:-${LAVIT_PROCESS_ID:-0}}
runs=$LAVIT_STUB/runs
mkdir -p "$runs"
attempt=0
while ! mkdir "$runs/$host.$attempt" 2>/dev/null; do
  attempt=$((attempt + 1))
done
here=$runs/$host.$attempt
trap 'echo told to end; exit 75' TERM
printf '%s\0' "$@" >"$here/arguments"
env -0 >"$here/environment"
: >"$here/ready"
for step in 1 2 3; do
  echo "attempt $attempt step $step"
done
plan=0
for file in "$LAVIT_STUB/plan/$attempt" "$LAVIT_STUB/plan/$attempt.$host"; do
  if [[ -e $file ]]; then
    plan=$(cat "$file")
  fi
done
while [[ $plan == hang && ! -e $LAVIT_STUB/release ]]; do
  sleep 0.02
done
if [[ $plan == hang ]]; then
  plan=0
fi
exit "$plan"
