"""Orbax on disk or in gs://: model directories for use.

A *model directory* is what inference loads: one folder a part (`encoder`,
`tokenizer`, `pixels`, `lowres`, `highres`, `llm`), each with its parameters
and a `part.json` that describes it. `lowres` and `highres` are the official
release's two decoders. A run's own checkpoints: `train/run_checkpoints.py`.

`part.json` names the folder of the parameters that belong to it: a part is
written anew beside the old one, and is there once that file is.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from lavit_jax.core import errors, hosts
from lavit_jax.core.storage import files, mapped_arrays

PARTS = (
  "encoder",
  "tokenizer",
  "pixels",
  "lowres",
  "highres",
  "lowres_pixels",
  "highres_pixels",
  "safety",
  "llm",
)
FORMAT = 1
_PART_FILE = "part.json"
_WEIGHTS = ("weights", "weights-1")  # one of them is in use
_FIELD = "weights"  # of part.json: which; the first one if it is missing


@contextlib.contextmanager
def writing(directory):
  """Names the disk when a write fails: full, over quota, not writable."""
  try:
    yield
  except errors.LavitError:  # a ValueError too, which says what to do itself
    raise
  except (OSError, ValueError) as e:  # Orbax reports a full disk as ValueError
    raise errors.CheckpointError(
      f"A checkpoint could not be written under {directory}:"
      f" {str(e).splitlines()[0][:400]} Make room, then give the same command"
      " again: training goes on from the newest checkpoint that is complete."
    ) from e


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a model directory: its parameters and its description."""

  params: Any
  meta: dict[str, Any]


def save_part(
  directory, name: str, params, meta: Mapping[str, Any], dtype=None
) -> epath.Path:
  """Writes one part of a model directory, whole or not at all.

  Of a run of several processes all call it, and each writes its share.

  Args:
    directory: the model directory; made if missing.
    name: one of `PARTS`.
    params: tree of arrays. Where any is mapped from a file (np.memmap) all
      must be numpy arrays, and they are stored a few at a time: memory holds
      about one and a half of the largest.
    meta: JSON-able description (model config, provenance, metrics).
    dtype: cast floating arrays to this dtype first (e.g. jnp.float16).

  Raises:
    errors.UsageError: `name` is no part of a model.
    errors.CheckpointError: the disk is full, or the directory has a name that
      Orbax cannot keep arrays under; what was there before stays.
  """
  if name not in PARTS:
    raise errors.UsageError(f"A model has parts {PARTS}; {name!r} is none.")
  files.check_arrays_folder(directory, write=True)
  folder = files.absolute(directory) / name
  if dtype is not None:
    params = jax.tree.map(lambda x: _cast(x, dtype), params)
  with writing(folder.parent):
    used = _intact_place(folder)
    place = _WEIGHTS[hosts.broadcast_from_lead(int(used == _WEIGHTS[0]))]
    if hosts.is_lead():
      folder.mkdir(parents=True, exist_ok=True)
      _remove_weights(folder, besides=used)
    hosts.barrier(f"lavit_part_{name}_begun")
    if any(isinstance(x, np.memmap) for x in jax.tree.leaves(params)):
      mapped_arrays.save(folder / place, params)
    else:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / place, hosts.storable(params))
    if hosts.is_lead():
      described = {"format": FORMAT, "part": name, **meta}
      if place != _WEIGHTS[0]:  # so that earlier versions read what they can
        described[_FIELD] = place
      text = json.dumps(described, indent=1) + "\n"
      files.write_whole(folder / _PART_FILE, text.encode())
  if hosts.is_lead():
    _remove_weights(folder, besides=place)
  hosts.barrier(f"lavit_part_{name}_done")
  return folder


def _place(folder) -> str | None:
  """The name of the parameters that a part is of; None if it is no part yet.

  Raises:
    errors.CheckpointError: part.json is damaged.
  """
  path = folder / _PART_FILE
  if not path.exists():
    return None
  place = _described(path).get(_FIELD, _WEIGHTS[0])
  if place not in _WEIGHTS:
    raise errors.CheckpointError(
      f"{path} says that its {_FIELD} are {place!r}; expected one of"
      f" {', '.join(_WEIGHTS)}. It is damaged; make the part again."
    )
  return place


def _described(path) -> dict[str, Any]:
  """What a part.json holds; CheckpointError if it is damaged."""
  try:
    found = json.loads(path.read_text())
  except ValueError as e:
    raise errors.CheckpointError(
      f"{path} is not valid JSON: {e}. It is damaged; make the part again."
    ) from e
  if not isinstance(found, dict):
    raise errors.CheckpointError(
      f"{path} holds a {type(found).__name__}; expected the description of a"
      " part, a JSON object. It is damaged; make the part again."
    )
  return found


def _intact_place(folder) -> str | None:
  """`_place`; None of a damaged part too: it is written over."""
  try:
    return _place(folder)
  except errors.CheckpointError:
    return None


def _remove_weights(folder, besides: str | None) -> None:
  """Parameters that no part.json names, and those that were never finished."""
  for path in files.listing(folder):
    # Orbax adds .orbax-checkpoint-tmp to what is not finished.
    if path.name.partition(".")[0] in _WEIGHTS and path.name != besides:
      path.rmtree(missing_ok=True)


def _cast(x, dtype):
  return x.astype(cast_dtype(x.dtype, dtype))


def cast_dtype(stored, wanted):
  """`wanted` for floats, unless it is None; what is stored for the rest."""
  floating = jnp.issubdtype(stored, jnp.floating)
  return wanted if floating and wanted is not None else stored


def load_part(
  directory,
  name: str,
  *,
  dtype=jnp.float32,
  branches: Mapping[str, Any] | None = None,
  layout: Any = None,
) -> Part:
  """Reads one part of a model directory onto the default device, or a mesh.

  Args:
    directory: a model directory.
    name: of PARTS.
    dtype: to which floats are cast as they are read.
    branches: other dtypes for top branches of the params, by their names.
    layout: tree of shardings of (some of) its arrays: each is read straight
      to where it belongs, by every process its own share.

  Raises:
    errors.CheckpointError: the directory or the part is missing or damaged.
  """
  meta = read_meta(directory, name)
  weights = _weights(directory, name)
  with _reading(weights), ocp.StandardCheckpointer() as checkpointer:
    host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = dict(jax.tree_util.tree_leaves_with_path(layout))
    # Cast as they are read: a cast of arrays on one device would fail
    # within the mesh of a training run.
    target = jax.tree_util.tree_map_with_path(
      lambda path, m: jax.ShapeDtypeStruct(
        m.shape,
        cast_dtype(m.dtype, (branches or {}).get(_top(path), dtype)),
        sharding=places.get(path, host),
      ),
      _stored_tree(checkpointer, weights),
    )
    params = checkpointer.restore(weights, target)
  return Part(params, meta)


def load_arrays(directory, name: str, target):
  """Reads some arrays of a part, each straight to where it belongs.

  Every process reads its own share of them.

  Args:
    directory: a model directory.
    name: of PARTS.
    target: nested dicts of `jax.ShapeDtypeStruct` with shardings, by the
      part's own names, of the stored shapes. Floats are cast to their dtypes.

  Returns:
    The same tree of `jax.Array`.

  Raises:
    errors.CheckpointError: the part is missing or damaged.
  """
  read_meta(directory, name)
  path = _weights(directory, name)
  args = ocp.args.PyTreeRestore(
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=True,
  )
  handler = ocp.PyTreeCheckpointHandler()
  with _reading(path), ocp.Checkpointer(handler) as checkpointer:
    return checkpointer.restore(path, args=args)


def _top(path) -> str:
  """The first name of a path in a tree."""
  return jax.tree_util.keystr(path[:1], simple=True)


class StoredPart:
  """One part on disk, its arrays read one by one when they are asked for."""

  def __init__(self, directory, name: str):
    """Opens a part; CheckpointError if it is missing or damaged."""
    self.meta = read_meta(directory, name)
    self._path = _weights(directory, name)
    with _reading(self._path):
      tree = _stored_tree(ocp.PyTreeCheckpointer(), self._path)
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      if not leaves:  # Orbax only logs that it cannot read them
        raise ValueError("There are no arrays in it.")
    # By path, with slashes: what `read` takes, shapes and dtypes.
    self.arrays = {
      jax.tree_util.keystr(path, simple=True, separator="/"): (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      )
      for path, leaf in leaves
    }

  def read(self, path: str) -> np.ndarray:
    """One array, on the host."""
    with _reading(self._path):  # Orbax takes longer than a small array
      return np.asarray(self._open(path).read().result())

  def blocks(self, path: str, whole: int) -> Iterator[tuple[tuple, np.ndarray]]:
    """Pieces of one array as they lie on disk, each read once.

    Args:
      path: of the array.
      whole: the axis along which no piece is cut.

    Yields:
      (index, array), so that the whole array at `index` is the piece.
    """
    with _reading(self._path):
      stored = self._open(path)
    shape = stored.shape
    sizes = list(stored.chunk_layout.read_chunk.shape)
    sizes[whole] = shape[whole]
    starts = [range(0, n, size) for n, size in zip(shape, sizes, strict=True)]
    for start in itertools.product(*starts):
      index = tuple(
        slice(i, min(i + size, n))
        for i, size, n in zip(start, sizes, shape, strict=True)
      )
      with _reading(self._path):
        piece = np.asarray(stored[index].read().result())
      yield index, piece

  def _open(self, path):
    """The array as TensorStore has it; Orbax itself reads only whole ones."""
    base = {"driver": "file", "path": f"{self._path}/"}
    if files.is_remote(self._path):
      bucket, _, key = str(self._path).removeprefix("gs://").partition("/")
      base = {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    name = path.replace("/", ".") + "/"
    place = {"driver": "ocdbt", "base": base, "path": name}
    found = ts.open({"driver": "auto", "kvstore": place}, read=True).result()
    # As Orbax does: what is missing is an error, not zeros.
    spec = found.spec().to_json() | {"fill_missing_data_reads": False}
    return ts.open(spec, read=True).result()


def _stored_tree(checkpointer, path):
  """The tree of array metadata of an Orbax checkpoint."""
  stored = checkpointer.metadata(path)
  tree = getattr(stored, "item_metadata", stored)
  return getattr(tree, "tree", tree)


@contextlib.contextmanager
def _reading(path):
  """Says that a part is damaged where Orbax says it in its own words."""
  try:
    yield
  except errors.LavitError:
    raise
  except Exception as e:
    # Of an array that is cut or gone Orbax makes a plain Exception.
    if type(e) is not Exception and not isinstance(
      e, (ValueError, KeyError, OSError)
    ):
      raise
    said = " ".join(str(e.__cause__ or e).split())
    raise errors.CheckpointError(
      f"{path} cannot be read as an Orbax checkpoint:"
      f" {said[:300]} It is damaged or incomplete; restore"
      f" it from where it came, or make the {path.parent.name} part again."
    ) from e


def _weights(directory, name) -> epath.Path:
  """Where the parameters of a part lie."""
  files.check_arrays_folder(directory, write=False)
  folder = files.absolute(directory) / name
  return folder / (_place(folder) or _WEIGHTS[0])


def read_meta(directory, name: str) -> dict[str, Any]:
  """The description of one part, without its weights."""
  directory = files.path_of(directory)
  path = directory / name / _PART_FILE
  if not path.exists():
    have = parts_in(directory)
    raise errors.CheckpointError(
      f"{directory} has no part {name!r}"
      + (f" (it has {', '.join(have)})." if have else ", nor any other part.")
      + f" Expected {path}. Train that stage with --config.model_dir="
      f"{directory}, or give a complete model directory."
    )
  meta = _described(path)
  if meta.get("format") != FORMAT:
    raise errors.CheckpointError(
      f"{path} has format {meta.get('format')!r}; this version of lavit_jax"
      f" reads format {FORMAT}. Install the version that wrote it."
    )
  return {key: value for key, value in meta.items() if key != _FIELD}


def parts_in(directory) -> Sequence[str]:
  """Names of the parts that a model directory holds, in house order."""
  directory = files.path_of(directory)
  return [p for p in PARTS if (directory / p / _PART_FILE).exists()]


def count_params(tree) -> int:
  """Number of scalars in a tree of arrays."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
