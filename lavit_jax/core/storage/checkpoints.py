"""Model directories: the parts of a trained model, on disk or in gs://.

Inference loads a *model directory*. It has one folder per part (`encoder`,
`tokenizer`, `pixels`, `lowres`, `highres`, `llm`, ...), with parameters stored
by Orbax and a `part.json` that describes them. `lowres` and `highres` are the
two decoders of the official release. Checkpoints of a training run are another
format: `train/resilience/run_checkpoints.py`.

`part.json` names the folder of its parameters. A new version of a part is
written beside the old one, and replaces it when that file is written.
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
_WEIGHTS = ("weights", "weights-1")  # folders, of which one is in use
_FIELD = "weights"  # of part.json, the folder in use; by default the first
_INDEX = 16 << 20  # bytes kept of the index of a part's arrays


@contextlib.contextmanager
def writing(directory: files.PathLike) -> Iterator[None]:
  """Raises CheckpointError with the directory when a write inside fails."""
  try:
    yield
  except errors.LavitError:  # also a ValueError, with a message of its own
    raise
  except (OSError, ValueError) as e:  # Orbax reports a full disk as ValueError
    raise errors.CheckpointError(
      f"A checkpoint could not be written under {directory}:"
      f" {str(e).splitlines()[0][:400]} Make room, then give the same command"
      " again: training continues from the newest complete checkpoint."
    ) from e


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a model: its parameters and the content of its part.json."""

  params: Any
  meta: dict[str, Any]


def save_part(
  directory: files.PathLike,
  name: str,
  params: Any,
  meta: Mapping[str, Any],
  dtype: Any = None,
) -> epath.Path:
  """Writes one part of a model directory, completely or not at all.

  All processes of a run call it; each writes its shards.

  Args:
    directory: the model directory; created if missing.
    name: one of `PARTS`.
    params: tree of arrays. If any is memory-mapped (np.memmap), all must be
      NumPy arrays; memory then holds about one and a half of the largest.
    meta: description to store as JSON (model config, provenance, metrics).
    dtype: floating arrays are cast to it first (e.g. jnp.float16).

  Returns:
    The folder of the part.

  Raises:
    errors.UsageError: `name` is not in `PARTS`.
    errors.CheckpointError: the disk is full, or Orbax cannot keep arrays in a
      directory of this name. The previous part then remains.
  """
  if name not in PARTS:
    raise errors.UsageError(
      f"{name!r} is not a part of a model: expected one of {PARTS}."
    )
  files.check_arrays_folder(directory, write=True)
  folder = files.absolute(directory) / name
  if dtype is not None:
    params = jax.tree.map(lambda x: _cast(x, dtype), params)
  with writing(folder.parent):
    old = _intact_weights_name(folder)
    new = _WEIGHTS[hosts.broadcast_from_lead(int(old == _WEIGHTS[0]))]
    if hosts.is_lead():
      folder.mkdir(parents=True, exist_ok=True)
      _remove_weights(folder, keep=old)
    hosts.barrier(f"lavit_part_{name}_begun")
    if any(isinstance(x, np.memmap) for x in jax.tree.leaves(params)):
      mapped_arrays.save(folder / new, params)
    else:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / new, hosts.storable(params))
    if hosts.is_lead():
      content = {"format": FORMAT, "part": name, **meta}
      if new != _WEIGHTS[0]:  # without it earlier versions can read the part
        content[_FIELD] = new
      text = json.dumps(content, indent=1) + "\n"
      files.write_whole(folder / _PART_FILE, text.encode())
  if hosts.is_lead():
    _remove_weights(folder, keep=new)
  hosts.barrier(f"lavit_part_{name}_done")
  return folder


def _weights_name(folder) -> str | None:
  """Returns the name of a part's weights folder, None without a part.json.

  Raises:
    errors.CheckpointError: part.json is damaged.
  """
  path = folder / _PART_FILE
  if not path.exists():
    return None
  name = _read_json(path).get(_FIELD, _WEIGHTS[0])
  if name not in _WEIGHTS:
    raise errors.CheckpointError(
      f"{path} has {_FIELD}={name!r}; expected one of {', '.join(_WEIGHTS)}. It"
      " is damaged; make the part again."
    )
  return name


def _read_json(path) -> dict[str, Any]:
  """Returns the content of a part.json; CheckpointError if it is damaged."""
  try:
    content = json.loads(path.read_text())
  except ValueError as e:
    raise errors.CheckpointError(
      f"{path} is not valid JSON: {e}. It is damaged; make the part again."
    ) from e
  if not isinstance(content, dict):
    raise errors.CheckpointError(
      f"{path} holds a {type(content).__name__}; expected the description of a"
      " part, a JSON object. It is damaged; make the part again."
    )
  return content


def _intact_weights_name(folder) -> str | None:
  """Returns `_weights_name`, but None for a damaged part, to be replaced."""
  try:
    return _weights_name(folder)
  except errors.CheckpointError:
    return None


def _remove_weights(folder, keep: str | None) -> None:
  """Removes unfinished and replaced weights of a part."""
  for path in files.listing(folder):
    # Orbax adds .orbax-checkpoint-tmp to the names of unfinished folders.
    if path.name.partition(".")[0] in _WEIGHTS and path.name != keep:
      path.rmtree(missing_ok=True)


def _cast(x, dtype):
  return x.astype(cast_dtype(x.dtype, dtype))


def cast_dtype(stored: Any, target: Any) -> Any:
  """Returns the target dtype, if any, for floats, else the stored dtype."""
  floating = jnp.issubdtype(stored, jnp.floating)
  return target if floating and target is not None else stored


def load_part(
  directory: files.PathLike,
  name: str,
  *,
  dtype: Any = jnp.float32,
  branches: Mapping[str, Any] | None = None,
  layout: Any = None,
) -> Part:
  """Reads one part of a model directory onto the default device, or a mesh.

  Args:
    directory: a model directory.
    name: one of `PARTS`.
    dtype: floats are cast to it as they are read.
    branches: other dtypes for top branches of the parameters, by name.
    layout: tree of shardings for (some of) the arrays. Each process reads its
      shards directly to its devices.

  Raises:
    errors.CheckpointError: the directory or the part is missing or damaged.
  """
  meta = read_meta(directory, name)
  weights = _weights(directory, name)
  with _reading(weights), ocp.StandardCheckpointer() as checkpointer:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = dict(jax.tree_util.tree_leaves_with_path(layout))
    # Cast while reading: a later cast of arrays on one device would fail
    # within the mesh of a training run.
    target = jax.tree_util.tree_map_with_path(
      lambda path, m: jax.ShapeDtypeStruct(
        m.shape,
        cast_dtype(m.dtype, (branches or {}).get(_top(path), dtype)),
        sharding=shardings.get(path, default),
      ),
      _stored_tree(checkpointer, weights),
    )
    params = checkpointer.restore(weights, target)
  return Part(params, meta)


def load_arrays(directory: files.PathLike, name: str, target: Any) -> Any:
  """Reads some arrays of a part to given shardings.

  Each process reads its shards directly to its devices.

  Args:
    directory: a model directory.
    name: one of `PARTS`.
    target: nested dicts of `jax.ShapeDtypeStruct` with shardings, by the
      part's own names and of the stored shapes. Floats are cast to its dtypes.

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
  """Returns the first name of a path in a tree."""
  return jax.tree_util.keystr(path[:1], simple=True)


class StoredPart:
  """A part on disk, whose arrays are read one by one on request.

  Attributes:
    meta: the content of part.json.
    arrays: {path with slashes: shape and dtype}.
  """

  def __init__(self, directory: files.PathLike, name: str):
    """Opens a part; raises CheckpointError if it is missing or damaged."""
    self.meta = read_meta(directory, name)
    self._path = _weights(directory, name)
    # Without it, each array would read the index of all of them again.
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": _INDEX}})
    with _reading(self._path):
      tree = _stored_tree(ocp.PyTreeCheckpointer(), self._path)
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      if not leaves:  # Orbax only logs that it cannot read them
        raise ValueError("There are no arrays in it.")
    self.arrays = {
      jax.tree_util.keystr(path, simple=True, separator="/"): (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      )
      for path, leaf in leaves
    }

  def read(self, path: str) -> np.ndarray:
    """Reads one array to the host."""
    with _reading(self._path):  # for small arrays faster than by Orbax
      return np.asarray(self._open(path).read().result())

  def blocks(self, path: str, whole: int) -> Iterator[tuple[tuple, np.ndarray]]:
    """Reads an array in the blocks in which it is stored, each once.

    Args:
      path: of the array.
      whole: the axis along which no block is split.

    Yields:
      (index, block), the block being the array at `index`.
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
        block = np.asarray(stored[index].read().result())
      yield index, block

  def _open(self, path):
    """Opens an array with TensorStore; Orbax itself cannot read blocks."""
    base = {"driver": "file", "path": f"{self._path}/"}
    if files.is_remote(self._path):
      bucket, _, key = str(self._path).removeprefix("gs://").partition("/")
      base = {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    name = path.replace("/", ".") + "/"
    store = {"driver": "ocdbt", "base": base, "path": name}
    spec = {"driver": "auto", "kvstore": store}
    array = ts.open(spec, read=True, context=self._context).result()
    # As in Orbax, missing data are an error, not zeros.
    spec = array.spec().to_json() | {"fill_missing_data_reads": False}
    return ts.open(spec, read=True, context=self._context).result()


def _stored_tree(checkpointer, path):
  """Returns the tree of array metadata of an Orbax checkpoint."""
  stored = checkpointer.metadata(path)
  tree = getattr(stored, "item_metadata", stored)
  return getattr(tree, "tree", tree)


@contextlib.contextmanager
def _reading(path):
  """Converts Orbax's errors to a CheckpointError that names the part."""
  try:
    yield
  except errors.LavitError:
    raise
  except Exception as e:
    # For a truncated or missing array Orbax raises a plain Exception.
    if type(e) is not Exception and not isinstance(
      e, (ValueError, KeyError, OSError)
    ):
      raise
    reason = " ".join(str(e.__cause__ or e).split())
    raise errors.CheckpointError(
      f"{path} cannot be read as an Orbax checkpoint:"
      f" {reason[:300]} It is damaged or incomplete; restore it from its"
      f" source, or make the {path.parent.name} part again."
    ) from e


def _weights(directory, name) -> epath.Path:
  """Returns the folder of a part's parameters."""
  files.check_arrays_folder(directory, write=False)
  folder = files.absolute(directory) / name
  return folder / (_weights_name(folder) or _WEIGHTS[0])


def read_meta(directory: files.PathLike, name: str) -> dict[str, Any]:
  """Reads the part.json of one part.

  Raises:
    errors.CheckpointError: the part is missing, damaged, or of another format.
  """
  path = files.path_of(directory) / name / _PART_FILE
  if not path.exists():
    existing = ", ".join(parts_in(directory))
    raise errors.CheckpointError(
      f"{directory} has no part {name!r}"
      + (f" (it has {existing})." if existing else ", nor any other part.")
      + f" Expected {path}. Train that stage with --config.model_dir="
      f"{directory}, or give a complete model directory."
    )
  meta = _read_json(path)
  if meta.get("format") != FORMAT:
    raise errors.CheckpointError(
      f"{path} has format {meta.get('format')!r}; this version of lavit_jax"
      f" reads format {FORMAT}. Install the version that wrote it."
    )
  return {key: value for key, value in meta.items() if key != _FIELD}


def parts_in(directory: files.PathLike) -> Sequence[str]:
  """Returns the names of a model directory's parts, in the order of `PARTS`."""
  folder = files.path_of(directory)
  return [p for p in PARTS if (folder / p / _PART_FILE).exists()]


def count_params(tree: Any) -> int:
  """Returns the number of scalars in a tree of arrays."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
