"""Arrays mapped from files: saved a few at a time, and as they are."""

import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lavit_jax.core.storage import checkpoints, mapped_arrays


@pytest.fixture
def arrays(tmp_path):
  """Twelve mapped arrays of 4 KB, and one that is larger than a chunk."""
  found = {}
  for i, size in enumerate([1024] * 12 + [20_000]):
    path = tmp_path / f"{i}"
    found[f"a{i}"] = np.memmap(path, np.float32, "w+", shape=(size,))
    found[f"a{i}"][:] = np.random.default_rng(i).normal(size=size)
  return found


def test_no_more_than_a_chunk_is_encoded_at_once(arrays, tmp_path, monkeypatch):
  """Records arrays that Orbax has got and not yet reported as written."""
  monkeypatch.setattr(mapped_arrays, "CHUNK_BYTES", 16384)
  serialize, in_work, most = ocp.type_handlers.NumpyHandler.serialize, [0], [0]
  lock, copied = threading.Lock(), []

  async def counted(self, values, infos, args=None):
    size = sum(value.nbytes for value in values)
    copied.extend(self._deepcopy_host_arrays for _ in values)
    with lock:
      in_work[0] += size
      most[0] = max(most[0], in_work[0])
    futures = await serialize(self, values, infos, args)
    for future in futures:
      future.result()
    with lock:
      in_work[0] -= size
    return futures

  monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "serialize", counted)
  checkpoints.save_part(tmp_path / "model", "llm", arrays, {})
  assert most[0] == 80_000  # the largest, alone
  assert len(copied) == len(arrays)
  assert not any(copied)


def test_mapped_arrays_are_read_back_in_chunks(arrays, tmp_path, monkeypatch):
  monkeypatch.setattr(mapped_arrays, "CHUNK_BYTES", 16384)
  checkpoints.save_part(tmp_path / "model", "llm", arrays, {})
  stored = checkpoints.StoredPart(tmp_path / "model", "llm")
  for name, array in arrays.items():
    np.testing.assert_array_equal(stored.read(name), array)
  assert len(list(stored.blocks("a12", 0))) == 1
  found = checkpoints.load_part(tmp_path / "model", "llm").params
  np.testing.assert_array_equal(found["a12"], arrays["a12"])
