#!/usr/bin/env bash
# A Python of a TPU's host for tests: makes environments that hold the stub of
# `lavit`, installs nothing. $LAVIT_STUB/old_python: it is older than 3.11.
set -euo pipefail
here=$LAVIT_STUB/host_bin
echo "${0##*/} $*" >>"$LAVIT_STUB/python_calls"
case "$*" in
"-c "*) [[ ! -e $LAVIT_STUB/old_python ]] ;;
"-m venv "* | "-m uv venv "*)
  target=${*: -1}
  mkdir -p "$target/bin"
  cp "$0" "$target/bin/python"
  cp "$here/lavit_stub" "$target/bin/lavit"
  ;;
"-m pip install "*)
  if [[ -e $LAVIT_STUB/broken_pip ]]; then
    rm "$LAVIT_STUB/broken_pip"
    {
      echo "WARNING: Retrying after connection broken: Network is unreachable"
      echo "ERROR: Could not find a version that satisfies the requirement" \
        "jax==0.9.1 (from versions: none)"
      echo "ERROR: No matching distribution found for jax==0.9.1"
    } >&2
    exit 1
  fi
  if [[ -e $LAVIT_STUB/withdrawn && $* == *" -c "* ]]; then
    {
      echo "ERROR: Could not find a version that satisfies the requirement" \
        "jax==0.9.1 (from versions: 0.10.1, 0.10.2)"
      echo "ERROR: No matching distribution found for jax==0.9.1"
    } >&2
    exit 1
  fi
  ;;
*) exit 9 ;;
esac
