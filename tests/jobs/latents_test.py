"""Several processes and devices encode data: the bytes that one writes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.data.caches import latents
from tests import micro
from tests.jobs import latents_part
from tests.train import latent_micro, processes

pytestmark = pytest.mark.slow

_COUNT = 22  # images; eight shards, the last of one


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A model with an autoencoder, and images of two buckets."""
  root = tmp_path_factory.mktemp("latents")
  latent_micro.save_model(root / "model", ("lowres",), unets=False)
  (root / "images").mkdir()
  micro.images(root / "images", _COUNT)
  return root


@contextlib.contextmanager
def _running(root, out, count, devices=2):
  """Joined processes; none is left afterwards."""
  command = [sys.executable, "-m", "tests.jobs.latents_part", str(root), out]
  joined = {
    "LAVIT_COORDINATOR": f"127.0.0.1:{processes.free_port()}",
    "LAVIT_NUM_PROCESSES": str(count),
    "XLA_FLAGS": processes.flags_for(devices),
  }
  started = [
    subprocess.Popen(
      command, env=os.environ | joined | {"LAVIT_PROCESS_ID": str(number)}
    )
    for number in range(count)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.wait()


def _bytes_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _wait_for_seal(folder, started):
  end = time.monotonic() + 120
  while not list(folder.glob("sealed-*")):
    assert all(process.poll() is None for process in started)
    assert time.monotonic() < end
    time.sleep(0.02)


def _alone(root, out, monkeypatch, devices):
  some = jax.devices()[:devices]
  with monkeypatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda: some)
    summary = latents_part.write(root, out)
  assert (summary["images"], summary["bad"]) == (_COUNT, 0)
  return latents.LatentCache.load(out)


def test_two_joined_processes_write_what_one_does(root, tmp_path, monkeypatch):
  """They are killed in between, and begin again.

  As tests compile, a program for one device rounds otherwise than one for two;
  as users do, the bits are the same.
  """
  alone = _alone(root, tmp_path / "one", monkeypatch, 2)
  single = _alone(root, tmp_path / "single", monkeypatch, 1)
  for i in range(_COUNT):
    left, right = alone.latents(i), single.latents(i)
    np.testing.assert_allclose(left, right, rtol=2e-3, atol=2e-3)
  out = tmp_path / "two"
  with _running(root, str(out), 2) as started:
    _wait_for_seal(pathlib.Path(f"{out}.partial"), started)
    for process in started:
      process.send_signal(signal.SIGKILL)
  assert not out.exists()
  with _running(root, str(out), 2) as started:
    assert [process.wait(timeout=300) for process in started] == [0, 0]
  assert _bytes_of(out) == _bytes_of(tmp_path / "one")
  assert not pathlib.Path(f"{out}.partial").exists()


def test_parts_that_are_told_write_the_same(root, tmp_path):
  """In any order; the first completes the cache."""
  parts = [latents_part.write(root, tmp_path / "a", (n, 3)) for n in (2, 1, 0)]
  assert [part["images"] for part in parts] == [6, 7, _COUNT]
  latents_part.write(root, tmp_path / "b")
  assert _bytes_of(tmp_path / "a") == _bytes_of(tmp_path / "b")
  buckets = ((32, 32),)
  with pytest.raises(errors.DataError, match="made with another buckets"):
    latents_part.write(root, tmp_path / "a", (2, 3), buckets=buckets)
