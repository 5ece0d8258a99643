"""The rows of a run are the same for any hosts, threads and batch sizes."""

import itertools
import zlib

import numpy as np
import pytest

from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from tests.data import five_sources


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return five_sources.write(tmp_path_factory.mktemp("data"))


def _rows(config, size, first, count, *, hosts=1, threads=0):
  """CRC-32 of each of the rows `first` … of `count` batches, by its number."""
  found = {}
  for host in range(hosts):
    mine = np.arange(size).reshape(hosts, -1)[host]
    batches = five_sources.batches(config, size)
    iterator = pipeline.iterate(
      batches, num_threads=threads, rows=mine, skip=first
    )
    for batch in itertools.islice(iterator, count):
      for j, number in enumerate(batch["row"].tolist()):
        crc = 0
        for name in sorted(batch):
          crc = zlib.crc32(batch[name][j].tobytes(), crc)
        assert number not in found
        found[number] = crc
  return found


def test_rows_do_not_depend_on_hosts_threads_and_batch_sizes(config):
  straight = _rows(config, 4, 0, 16)
  assert sorted(straight) == list(range(64))
  assert len(set(straight.values())) == 64
  # Batches of 8, then of 12, then of 8; each part by processes of its own.
  resumed = _rows(config, 8, 0, 2, hosts=2, threads=2)
  resumed |= _rows(config, 12, 16, 2, hosts=4)
  resumed |= _rows(config, 8, 40, 3, hosts=1, threads=4)
  assert resumed == straight


def test_every_part_of_the_mixture_is_there(config):
  """So that the test above says something of each."""
  batches = five_sources.batches(config, 8)
  epochs = batches.progress(64)
  assert all(value > 0 for value in epochs.values())
  assert len(epochs) == 1 + 4 + 2 + 1 + 1
  images = np.concatenate([batches[k]["keep"] for k in range(8)]).any(axis=-1)
  assert images.mean() > 0.3
  assert batches.plan.changes
  unfiltered = {"filters": {}}
  for name in ("captions", "web"):
    part = kinds.parts_of(config)[name]
    kept, whole = (
      kinds.build(part, "train"),
      kinds.build(part | unfiltered, "train"),
    )
    assert (
      0 < kept.num_examples("image_text") < whole.num_examples("image_text")
    )
