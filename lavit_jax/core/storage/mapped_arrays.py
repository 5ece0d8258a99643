"""Arrays mapped from files, saved by Orbax in bounded memory.

Orbax has no option for this: `save_concurrent_gb` is not looked at where it
writes numpy arrays (0.12.8), nor is `MemoryOptions` of its newer interface. So
a handler of the one type np.ndarray is registered, which is what Orbax's
`type_handlers` are for; it hands the arrays on a few at a time.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

CHUNK_BYTES = 1 << 25  # of an array, as it is stored


class _FewAtATime(ocp.type_handlers.NumpyHandler):
  """Writes arrays as they are, without a copy, a few after the others.

  Orbax by itself copies all of them first, and encodes all at once.
  """

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(self, values, infos, args=None):
    for start, stop in _groups([value.nbytes for value in values]):
      some = (given[start:stop] for given in (values, infos, args))
      for future in await super().serialize(*some):
        future.result()
    return []


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Bounds of neighbours of CHUNK_BYTES together, or one that has more."""
  start, total = 0, 0
  for i, size in enumerate(sizes):
    if i > start and total + size > CHUNK_BYTES:
      yield start, i
      start, total = i, 0
    total += size
  yield start, len(sizes)


def save(path, params) -> None:
  """Saves a tree of numpy arrays in bounded memory; `load_part` reads it."""
  params = jax.tree.map(np.asarray, params)  # memmap to a view of its pages
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _FewAtATime()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
  )
  save_args = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params
  )
  with ocp.Checkpointer(handler) as checkpointer:
    args = ocp.args.PyTreeSave(params, save_args=save_args)
    checkpointer.save(path, args=args)
