"""Several processes and devices tokenize data: the bytes that one writes."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lavit_jax.commands import main
from lavit_jax.core import errors
from lavit_jax.data.caches import codes
from lavit_jax.jobs import tokenize, tokens_page
from tests.jobs import tokenize_part
from tests.train import processes

pytestmark = pytest.mark.slow

_SCENES = 35
_IMAGES = 2 * _SCENES  # six shards, the last of ten


def _start(model, out, number, devices=4):
  command = [sys.executable, "-m", "tests.jobs.tokenize_part"]
  command += [str(model), str(out), str(number), "2", str(_SCENES)]
  env = os.environ | {"XLA_FLAGS": processes.flags_for(devices)}
  return subprocess.Popen(command, env=env)


def _bytes_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _one(model, out, monkeypatch):
  with monkeypatch.context() as patch:
    first = jax.devices()[:1]
    patch.setattr(jax, "local_devices", lambda: first)
    return tokenize_part.write(model, out, (0, 1), _SCENES)


def _wait_for_seal(folder, process):
  end = time.monotonic() + 120
  while not list(folder.glob("codes-*.npy")):
    assert process.poll() is None
    assert time.monotonic() < end
    time.sleep(0.05)


def test_two_processes_of_four_devices_write_what_one_device_does(
  micro_codes, tmp_path, monkeypatch
):
  """One of them is killed in between, and begins again."""
  model = micro_codes / "model"
  summary = _one(model, tmp_path / "one", monkeypatch)
  assert summary["images"] == _IMAGES
  out, partial = tmp_path / "two", tmp_path / "two.partial"
  killed = _start(model, out, 1)
  _wait_for_seal(partial, killed)
  os.kill(killed.pid, signal.SIGKILL)
  killed.wait()
  sealed = {p: p.stat().st_mtime_ns for p in partial.glob("codes-*.npy")}
  both = [_start(model, out, number) for number in (0, 1)]
  assert [one.wait(timeout=300) for one in both] == [0, 0]
  assert _bytes_of(out) == _bytes_of(tmp_path / "one")
  assert not partial.exists()
  assert sealed
  assert len(codes.CodeCache.load(out)) == _IMAGES
  # Again, it is there.
  assert tokenize_part.write(model, out, (1, 2), _SCENES)["part"] == 2
  assert _one(model, out, monkeypatch) == summary | {"out": str(out)}


def test_a_cache_of_other_data_is_refused_by_each_part(
  micro_codes, tmp_path, monkeypatch
):
  model = micro_codes / "model"
  _one(model, tmp_path / "out", monkeypatch)
  for number in (0, 1):
    with pytest.raises(errors.DataError, match="made with another"):
      tokenize_part.write(model, tmp_path / "out", (number, 2), _SCENES + 1)


def test_a_page_shows_the_tokens(micro_codes, tmp_path, monkeypatch):
  model = micro_codes / "model"
  config = dict(
    kind="shapes", image_size=48, seed=0, train_size=20, held_out_size=4
  )
  page = tmp_path / "pages" / "tokens.html"
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "local_devices", lambda: first)
  tokenize.write_cache(model, config, tmp_path / "out", page=page, quiet=True)
  text = page.read_text()
  for words in ("mean tokens", "perplexity", "kept patches", "tokens: "):
    assert words in text
  assert text.count("data:image/png;base64,") >= 12
  assert tokens_page.perplexity(np.array([2, 2, 0, 2, 2])) == pytest.approx(4)


@pytest.mark.parametrize("part", ["3", "0/2", "3/2", "a/b"])
def test_parts_are_numbered_from_one(part, capsys):
  words = ["tokenize", "--data", "shapes", "--out", "x", "--part", part]
  with pytest.raises(SystemExit):
    main.main(words)
  assert "--part" in capsys.readouterr().err
