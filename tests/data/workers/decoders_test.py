"""Images are decoded by other processes as by this one, whatever happens."""

import concurrent.futures
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from lavit_jax.core import errors, image_io
from lavit_jax.data.images import decoding
from lavit_jax.data.workers import decoders
from tests.data.indexes import table_files, tars


@pytest.fixture
def made(request):
  pool = decoders.Decoders(2, getattr(request, "param", "exact"), timeout=20.0)
  yield pool
  pool.close()


@pytest.mark.parametrize("made", decoding.WAYS, indirect=True)
def test_threads_get_the_squares_of_their_images(made, tmp_path):
  way = decoding.fast if made._way == "fast" else decoding.exact
  path = tmp_path / "ä.png"
  path.write_bytes(table_files.encoded(7))
  sources = [tars.jpeg(i, size=(40, 64)) for i in range(20)]
  sources += [path, str(path), np.zeros((8, 9, 3), np.uint8)]
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    found = list(threads.map(lambda source: made(source, 16), sources))
  for source, square in zip(sources, found, strict=True):
    np.testing.assert_array_equal(square, way(source, 16))
  assert 1 <= len(made._all) <= 2


def test_bad_images_are_told_as_by_this_process(made, tmp_path):
  for source in (b"no image", tars.jpeg()[:-40], tmp_path / "none.png"):
    for name in (None, "shard.tar/7"):
      with pytest.raises(image_io.ImageError) as expected:
        decoding.exact(source, 16, name)
      with pytest.raises(image_io.ImageError) as said:
        made(source, 16, name)
      assert str(said.value) == str(expected.value)


def test_a_process_that_is_killed_is_replaced(made):
  data = tars.jpeg(3)
  before = made(data, 16)
  (worker,) = made._all
  os.kill(worker._process.pid, signal.SIGKILL)
  np.testing.assert_array_equal(made(data, 16), before)
  (other,) = made._all
  assert other is not worker


def test_a_process_that_hangs_is_replaced(made, caplog):
  data = tars.jpeg(3)
  before = made(data, 16)
  made._timeout = 1.0
  (worker,) = made._all
  os.kill(worker._process.pid, signal.SIGSTOP)
  begun = time.monotonic()
  with caplog.at_level("WARNING"):
    made._timeout = 3.0  # a new one has to start
    np.testing.assert_array_equal(made(data, 16), before)
  assert time.monotonic() - begun < 10
  assert "more than 3 seconds" in caplog.text


def test_an_image_that_ends_processes_is_a_bad_one(made, monkeypatch):
  real = decoders._Worker.decode

  def ends(worker, data, *args):
    if data == b"odd":
      worker._process.kill()
    return real(worker, data, *args)

  monkeypatch.setattr(decoders._Worker, "decode", ends)
  with pytest.raises(image_io.ImageError, match="x/7: 3 processes failed"):
    made(b"odd", 16, "x/7")
  assert made(tars.jpeg(1), 16).shape == (16, 16, 3)


def test_nothing_is_left_when_it_is_closed(made):
  made(tars.jpeg(1), 16)
  (worker,) = made._all
  pid = worker._process.pid
  made.close()
  assert not pathlib.Path(f"/proc/{pid}").exists()
  assert made(tars.jpeg(1), 16).shape == (16, 16, 3)


def test_other_ways_are_refused(monkeypatch):
  with pytest.raises(errors.ConfigError, match="'slow': expected one of exact"):
    decoders.Decoders(1, "slow")

  def missing():
    raise ModuleNotFoundError("no", name="simplejpeg")

  monkeypatch.setattr(decoding, "_libraries", missing)
  with pytest.raises(errors.DataError, match=r"simplejpeg.*lavit_jax\[fast\]"):
    decoders.Decoders(1, "fast")
