#!/bin/bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist=loadgroup sends the tests of an
# `xdist_group` to any process, without a warning. Nothing fails: what a group
# shares (fixtures of a module, compiled programs) is made again in each
# process, and a suite takes up to as many times as long. With pytest 9.1.1 a
# group stays together. --dist=loadfile keeps a file together with both.
#
# Seen 2026-11-29, Python 3.11, pytest-xdist 3.8.0, processes of each group:
#   pytest 9.1.1, loadgroup: 1 1
#   pytest 9.2.0, loadgroup: 2 2
#   pytest 9.2.0, loadfile: 1 1
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mkdir "$place/tests"
for group in first second; do
  cat > "$place/tests/test_$group.py" <<PYTHON
import os
import pathlib
import time

import pytest

pytestmark = pytest.mark.xdist_group("$group")


@pytest.mark.parametrize("number", range(6))
def test_one(number):
  time.sleep(0.2)
  name = "$group." + os.environ["PYTEST_XDIST_WORKER"]
  (pathlib.Path(__file__).parent / name).touch()
PYTHON
done

processes() {
  "$place/venv/bin/pip" install -q "pytest==$1" pytest-xdist==3.8.0
  rm -f "$place"/tests/*.gw*
  "$place/venv/bin/python" -m pytest -q -n 2 --dist="$2" "$place/tests" \
    >/dev/null
  echo "pytest $1, $2:" "$(ls "$place"/tests/first.gw* | wc -l)" \
    "$(ls "$place"/tests/second.gw* | wc -l)"
}

{
  processes 9.1.1 loadgroup
  processes 9.2.0 loadgroup
  processes 9.2.0 loadfile
} | tee "$place/said"
diff "$place/said" - <<'SEEN'
pytest 9.1.1, loadgroup: 1 1
pytest 9.2.0, loadgroup: 2 2
pytest 9.2.0, loadfile: 1 1
SEEN
