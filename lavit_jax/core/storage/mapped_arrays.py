"""Saves memory-mapped arrays with Orbax in bounded memory.

Orbax has no option for this: for NumPy arrays it ignores `save_concurrent_gb`
(0.12.8), and `MemoryOptions` of its newer interface. Therefore a type handler
for np.ndarray is registered, which passes on a few arrays at a time.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

CHUNK_BYTES = 1 << 25  # size of a stored chunk of an array


class _GroupedHandler(ocp.type_handlers.NumpyHandler):
  """Writes arrays in small groups, without copying them.

  Orbax's own handler copies all arrays first, and encodes them all at once.
  """

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(self, values, infos, args=None):
    for start, stop in _groups([value.nbytes for value in values]):
      group = (x[start:stop] for x in (values, infos, args))
      for future in await super().serialize(*group):
        future.result()
    return []


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Yields bounds of groups of up to CHUNK_BYTES, or of one larger array."""
  start, total = 0, 0
  for i, size in enumerate(sizes):
    if i > start and total + size > CHUNK_BYTES:
      yield start, i
      start, total = i, 0
    total += size
  yield start, len(sizes)


def save(path: str | os.PathLike[str], params: Any) -> None:
  """Saves a tree of NumPy arrays in bounded memory; `load_part` reads it."""
  params = jax.tree.map(np.asarray, params)  # memmap to a view of its pages
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _GroupedHandler()),
      (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
  )
  save_args = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params
  )
  with ocp.Checkpointer(handler) as checkpointer:
    args = ocp.args.PyTreeSave(params, save_args=save_args)
    checkpointer.save(path, args=args)
