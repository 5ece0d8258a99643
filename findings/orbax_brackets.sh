#!/usr/bin/env bash
# Orbax 0.12.8: a checkpoint saved into a folder with [ in its name is lost
# without an error.
#
# StandardCheckpointer.save() returns normally and leaves a finished folder,
# but nothing can be restored: after a save, what the processes have written
# (ocdbt.process_*) is found by `directory.glob(...)`, and etils' epath pastes
# the folder's name into the pattern unescaped. Nothing matches, so nothing is
# merged; only a warning is logged. Renaming the folder does not bring it back.
# Seen: "out[1]" cannot be restored, "out1" can (and can when it is renamed to
# "out[1]" afterwards). Exit status 1 once this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 etils==1.15.0 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import logging
import pathlib
import sys

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)
root, tree = pathlib.Path.cwd(), {"w": np.arange(3.0)}


def readable(path):
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      found = checkpointer.restore(path, tree)
    return bool((found["w"] == tree["w"]).all())
  except Exception as error:
    print(f"  {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return False


for name in ("out1", "out[1]"):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(root / name, tree)
  print(f"saved into {name!r} without an error")
plain, brackets = readable(root / "out1"), readable(root / "out[1]")
(root / "out[1]").rename(root / "lost")
(root / "out1").rename(root / "out[1]")
moved = readable(root / "out[1]")
print(f"out1: {plain}; out[1]: {brackets}; out1 renamed to out[1]: {moved}")
sys.exit(not (plain and not brackets and moved))
PYTHON
