"""Files of PyTorch tensors, read one tensor at a time.

`open_file` maps a `.bin`, `.pt`, `.pth` or `.safetensors` file into memory,
`open_shards` the one or several files of a Hugging Face folder, and
`open_index` the shards that an index names. Values are read by `Tensor.read`
alone, from the pages of the file and not into anonymous memory. Pickles are
opened with `weights_only=True`, so that they cannot run code. `position_ids`,
buffers that count from 0, are left out.
"""

import collections
import dataclasses
import importlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lavit_jax.core import errors
from lavit_jax.port.formats import pickles

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_FLOATS = {**DTYPES, "float64": np.dtype(np.float64)}
_WRAPPERS = ("model", "module", "state_dict")
# Prefixes that PyTorch's wrappers add: inside names, or before all of them.
_INSIDE = re.compile(
  r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_BEFORE = ("module.", "_forward_module.")
_POSITION_IDS = ".position_ids"  # integers from 0 on, of older transformers


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file, not read yet.

  Attributes:
    name: its official name.
    file: the file that holds it, as messages name it.
    shape: of the tensor.
    dtype: numpy's, or ml_dtypes' bfloat16.
    read: returns the array, mapped from the file where possible.
  """

  name: str
  file: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def require(module: str, purpose: str) -> Any:
  """Imports an optional package.

  Args:
    module: its name.
    purpose: the beginning of the error's sentence, "... needs the package".

  Raises:
    errors.UsageError: the package is not installed.
  """
  try:
    return importlib.import_module(module)  # optional extra
  except ImportError as e:
    raise errors.UsageError(
      f"{purpose} needs the package {module.split('.')[0]}, which is not"
      " installed. Install it: pip install 'lavit_jax[torch]'."
    ) from e


def open_file(
  path: str | os.PathLike,
  label: str | None = None,
  unwrap: bool = False,
  bare: bool = False,
) -> Tensors:
  """Opens one file and returns its tensors by name.

  Args:
    path: a file with one of SUFFIXES.
    label: how messages name the file; its name by default.
    unwrap: whether to take the dict under "model", "module" or "state_dict"
      where the file has one, and to ignore the rest (a step, an optimizer).
    bare: whether the file is a pickle of one tensor and not of a dict. The
      tensor then has the name "".

  Raises:
    errors.CheckpointError: the file is missing or truncated, or holds other
      values than float tensors.
  """
  path = pathlib.Path(path)
  label = label or path.name
  if not path.is_file():
    raise errors.CheckpointError(
      f"{label} is missing: expected a file at {path}. Give the complete folder"
      " as it was published, or choose the parts that you have with --only."
    )
  if path.suffix == ".safetensors":
    by_name = _open_safetensors(path, label)
  else:
    by_name = _open_pickle(path, label, unwrap, bare)
  return _unwrapped(by_name, label)


def bare_names(names: Collection[str]) -> dict[str, str]:
  """Removes the prefixes of PyTorch's wrappers from names.

  torch.compile and FSDP add a prefix to the modules that they wrap, anywhere
  in a name; DistributedDataParallel and DeepSpeed add one to all names.

  Returns:
    The new name by the old one.
  """
  bare = {name: _INSIDE.sub("", name) for name in names}
  for prefix in _BEFORE:
    while bare and all(name.startswith(prefix) for name in bare.values()):
      bare = {old: name.removeprefix(prefix) for old, name in bare.items()}
  return bare


def _unwrapped(by_name, label):
  """Returns the tensors under their names without wrappers' prefixes."""
  renamed = bare_names(by_name)
  twice = [n for n, c in collections.Counter(renamed.values()).items() if c > 1]
  if twice:
    raise errors.CheckpointError(
      f"{label} has tensors both with and without a wrapper's prefix:"
      f" {', '.join(twice)}. It is ambiguous which to use; save the"
      " state_dict() of the model inside the wrapper."
    )
  return {
    name: dataclasses.replace(by_name[old], name=name)
    for old, name in renamed.items()
  }


def _open_safetensors(path, label):
  safetensors = require("safetensors", f"Reading {label}")
  torch = require("torch", f"Reading {label}")
  try:
    file = safetensors.safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, ValueError) as e:
    raise errors.CheckpointError(
      f"{label} cannot be read as safetensors ({pickles.one_line(e)}):"
      f" {pickles.diagnose(path)}"
    ) from e
  by_name = {}
  for name, part in slices.items():
    if name.endswith(_POSITION_IDS):
      continue
    dtype = _SAFE_DTYPES.get(part.get_dtype())
    if dtype is None:
      raise _not_float(label, name, part.get_dtype())
    read = lambda name=name: _numpy(torch, file.get_tensor(name))
    shape = tuple(part.get_shape())
    by_name[name] = Tensor(name, label, shape, dtype, read)
  return by_name


_SAFE_DTYPES = {
  "F64": _FLOATS["float64"],
  "F32": DTYPES["float32"],
  "F16": DTYPES["float16"],
  "BF16": DTYPES["bfloat16"],
}


def _open_pickle(path, label, unwrap, bare):
  torch = require("torch", f"Reading {label}")
  content = pickles.load(torch, path, label)
  if bare:
    if not isinstance(content, torch.Tensor):
      raise errors.CheckpointError(
        f"{label} holds a {type(content).__name__}; expected one tensor alone."
      )
    content = {"": content}
  if unwrap and isinstance(content, Mapping):
    inner = [k for k in _WRAPPERS if isinstance(content.get(k), Mapping)]
    content = content[inner[0]] if inner else content
  if not isinstance(content, Mapping):
    raise errors.CheckpointError(
      f"{label} holds a {type(content).__name__}; expected a dict of tensors"
      " by name (a state_dict)."
    )
  by_name = {}
  for name, value in content.items():
    if not isinstance(value, torch.Tensor) or not isinstance(name, str):
      raise errors.CheckpointError(
        f"{label} holds more than tensors: {name!r} is a"
        f" {type(value).__name__}. Expected a dict of tensors by name; save the"
        " model's state_dict() alone."
      )
    if name.endswith(_POSITION_IDS):
      continue
    if value.layout != torch.strided or value.is_quantized:
      raise _not_float(label, name, f"{value.dtype}, {value.layout}")
    dtype = _FLOATS.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
      raise _not_float(label, name, value.dtype)
    read = lambda value=value: _numpy(torch, value)
    by_name[name] = Tensor(name, label, tuple(value.shape), dtype, read)
  return by_name


def _not_float(label, name, dtype):
  return errors.CheckpointError(
    f"{label} holds {name} as {dtype}; expected a dense tensor of float32,"
    " float16 or bfloat16. Dequantize a quantized checkpoint first."
  )


def _numpy(torch, tensor) -> np.ndarray:
  """Returns the tensor's memory as an array, also of bfloat16."""
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def open_shards(folder: str | os.PathLike, label: str = "") -> Tensors:
  """Opens the weights of a Hugging Face folder, in one file or in several.

  The order of preference is transformers': model.safetensors, its index,
  pytorch_model.bin, its index.

  Args:
    folder: a directory.
    label: how messages name it; its name by default.

  Raises:
    errors.CheckpointError: there are no weights, a shard is missing, a tensor
      is in no shard or differs between two, or the index names a file outside
      the folder.
  """
  folder = pathlib.Path(folder)
  label = label or folder.name
  for name in ("model.safetensors", "pytorch_model.bin"):
    if (folder / name).is_file():
      return open_file(folder / name, f"{label}/{name}")
    index = folder / f"{name}.index.json"
    if index.is_file():
      return open_index(index, label)
    stem, suffix = name.split(".")
    if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
      files = _all_shards([s.name for s in shards], label)
      return _merge(folder, label, files)
  raise errors.CheckpointError(
    f"{label} has no weights: expected model.safetensors or pytorch_model.bin,"
    f" or shards with their .index.json, in {folder}."
  )


def _all_shards(files, label):
  """Returns the files -00001-of-0000N to -0000N-of-0000N, all of them there."""
  total = re.search(r"-of-(\d+)\.", files[0])
  pattern = re.sub(r"-\d+-of-\d+", "-{:0{w}d}-of-" + total[1], files[0])
  expected = [
    pattern.format(i + 1, w=len(total[1])) for i in range(int(total[1]))
  ]
  if missing := sorted(set(expected) - set(files)):
    raise errors.CheckpointError(
      f"{label} lacks {', '.join(missing)} of its {len(expected)} shards. Copy"
      " or download them."
    )
  return expected


def open_index(path: str | os.PathLike, label: str) -> Tensors:
  """Opens the shards that an index names and returns their tensors.

  Args:
    path: of the index, which is in the folder of the shards.
    label: how messages name the folder.

  Raises:
    errors.CheckpointError: as `open_shards`.
  """
  path = pathlib.Path(path)
  folder = path.parent
  weight_map = read_index(path, f"{label}/{path.name}")
  files = sorted(set(weight_map.values()))
  for file in files:
    if pathlib.PurePath(file).name != file or not file.endswith(SUFFIXES):
      raise errors.CheckpointError(
        f"{label}/{path.name} names the file {file!r}: expected plain names of"
        f" {' or '.join(SUFFIXES)} files in the same folder. The index was"
        " tampered with or was written by another tool."
      )
  if missing := [f for f in files if not (folder / f).is_file()]:
    raise errors.CheckpointError(
      f"{label} lacks {', '.join(missing)} of the {len(files)} shards that"
      f" {path.name} names. Copy or download them."
    )
  by_name = _merge(folder, label, files)
  absent = sorted(set(bare_names(weight_map).values()) - set(by_name))
  if absent:
    raise errors.CheckpointError(
      f"{label}/{path.name} names tensors that are in no shard:"
      f" {', '.join(absent)}. A shard belongs to another checkpoint."
    )
  return by_name


def read_index(path: pathlib.Path, label: str) -> dict[str, str]:
  """Reads the weight_map of an index: the file of every tensor.

  Args:
    path: of the index.
    label: how messages name it.

  Raises:
    errors.CheckpointError: it is no index of shards, or names a tensor twice.
  """
  repeated: list[str] = []

  def pairs(items):
    counts = collections.Counter(name for name, _ in items)
    repeated.extend(sorted(name for name in counts if counts[name] > 1))
    return dict(items)

  try:
    weight_map = json.loads(path.read_text(), object_pairs_hook=pairs)[
      "weight_map"
    ]
    strings = all(isinstance(v, str) for v in weight_map.values())
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise errors.CheckpointError(
      f"{label} is no index of shards ({pickles.one_line(e)}): expected JSON"
      ' with a "weight_map" of tensor names to file names.'
    ) from e
  if repeated or not strings or not weight_map:
    raise errors.CheckpointError(
      f"{label} is no index of shards: "
      + (f"it has {', '.join(repeated)} twice." if repeated else "")
      + (
        "" if repeated else "its weight_map must name a file for every tensor."
      )
    )
  return weight_map


def _merge(folder, label, files) -> Tensors:
  """Returns the tensors of several files; equal copies become one."""
  by_name: Tensors = {}
  conflicts = []
  for file in files:
    for name, tensor in open_file(folder / file, f"{label}/{file}").items():
      if name in by_name and not same(by_name[name], tensor):
        conflicts.append(f"{name} ({by_name[name].file}, {tensor.file})")
      by_name.setdefault(name, tensor)
  if conflicts:
    raise errors.CheckpointError(
      f"{label} has tensors twice, with different values:"
      f" {', '.join(conflicts)}. It is ambiguous which to use; remove the"
      " shards of the other checkpoint."
    )
  return by_name


def same(a: Tensor, b: Tensor) -> bool:
  """Returns whether two tensors are equal, compared in the coarser dtype."""
  if a.shape != b.shape:
    return False
  x, y = a.read(), b.read()
  if x.dtype == y.dtype:
    bits = np.dtype(f"u{x.dtype.itemsize}")
    return np.array_equal(
      np.ascontiguousarray(x).view(bits), np.ascontiguousarray(y).view(bits)
    )
  coarser = min(x.dtype, y.dtype, key=lambda d: (d.itemsize, str(d)))
  with np.errstate(over="ignore"):
    return np.array_equal(x.astype(coarser), y.astype(coarser))
