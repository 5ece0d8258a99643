"""Files of PyTorch tensors, read one tensor at a time.

`open_file` maps a `.bin`, `.pt`, `.pth` or `.safetensors` file into memory;
`open_shards` does so with a Hugging Face folder of one or several of them,
`open_index` with the shards that an index names.
Nothing is read before `Tensor.read`, and what is read comes from the file's
pages, not from anonymous memory. Pickles are opened with `weights_only=True`:
they can name no code to run. Buffers that only count positions are left out.
"""

import collections
import dataclasses
import json
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
# What wrappers of PyTorch put into names: anywhere, or before all of them.
_INSIDE = re.compile(
  r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_BEFORE = ("module.", "_forward_module.")
_COUNTS = ".position_ids"  # integers from 0 on, of older transformers


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file: what it is, and how to get it.

  Attributes:
    name: its official name.
    file: the file it lies in, as messages name it.
    dtype: numpy's; bfloat16 is ml_dtypes'.
    read: gives the array, mapped from the file where that is possible.
  """

  name: str
  file: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def require(module: str, purpose: str) -> Any:
  """Imports an optional package, or says which extra brings it.

  Raises:
    errors.UsageError: the package is not installed.
  """
  try:
    return __import__(module, fromlist=["_"])
  except ImportError as e:
    raise errors.UsageError(
      f"{purpose} needs the package {module.split('.')[0]}, which is not"
      " installed. Install it: pip install 'lavit_jax[torch]'."
    ) from e


def open_file(
  path,
  label: str | None = None,
  unwrap: bool = False,
  bare: bool = False,
) -> Tensors:
  """The tensors of one file, by name.

  Args:
    path: a file that ends in one of SUFFIXES.
    label: how messages name the file; its name by default.
    unwrap: take the dict under "model", "module" or "state_dict" where the
      file has one; what lies beside it (a step, an optimizer) is left.
    bare: the file is a pickle of one tensor, not of a dict; its name is "".

  Raises:
    errors.CheckpointError: missing, truncated, or not only float tensors.
  """
  path = pathlib.Path(path)
  label = label or path.name
  if not path.is_file():
    raise errors.CheckpointError(
      f"{label} is missing: expected a file at {path}. Give the whole folder"
      " as it was published, or choose the parts you have with --only."
    )
  if path.suffix == ".safetensors":
    found = _open_safetensors(path, label)
  else:
    found = _open_pickle(path, label, unwrap, bare)
  return _unwrapped(found, label)


def bare_names(names: Collection[str]) -> dict[str, str]:
  """{name: the same without what PyTorch's wrappers have put into it}.

  torch.compile and FSDP put a word of their own before the names of what they
  wrap, anywhere; DistributedDataParallel and DeepSpeed one before all names.
  """
  made = {name: _INSIDE.sub("", name) for name in names}
  for prefix in _BEFORE:
    while made and all(name.startswith(prefix) for name in made.values()):
      made = {old: name.removeprefix(prefix) for old, name in made.items()}
  return made


def _unwrapped(found, label):
  """The tensors under their names without wrappers."""
  renamed = bare_names(found)
  twice = [n for n, c in collections.Counter(renamed.values()).items() if c > 1]
  if twice:
    raise errors.CheckpointError(
      f"{label} has names with and without a wrapper's prefix: the same twice"
      f" are {', '.join(twice)}. Which is meant cannot be told; save the"
      " state_dict() of the model inside the wrapper."
    )
  return {
    name: dataclasses.replace(found[old], name=name)
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
      f"{label} cannot be read as safetensors ({pickles.line(e)}):"
      f" {pickles.what_it_is(path)}"
    ) from e
  found = {}
  for name, part in slices.items():
    if name.endswith(_COUNTS):
      continue
    dtype = _SAFE_DTYPES.get(part.get_dtype())
    if dtype is None:
      raise _not_float(label, name, part.get_dtype())
    read = lambda name=name: _numpy(torch, file.get_tensor(name))
    shape = tuple(part.get_shape())
    found[name] = Tensor(name, label, shape, dtype, read)
  return found


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
  found = {}
  for name, value in content.items():
    if not isinstance(value, torch.Tensor) or not isinstance(name, str):
      raise errors.CheckpointError(
        f"{label} is not only tensors: {name!r} is a {type(value).__name__}."
        " Expected a dict of tensors by name; save the model's state_dict()"
        " alone."
      )
    if name.endswith(_COUNTS):
      continue
    if value.layout != torch.strided or value.is_quantized:
      raise _not_float(label, name, f"{value.dtype}, {value.layout}")
    dtype = _FLOATS.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
      raise _not_float(label, name, value.dtype)
    read = lambda value=value: _numpy(torch, value)
    found[name] = Tensor(name, label, tuple(value.shape), dtype, read)
  return found


def _not_float(label, name, dtype):
  return errors.CheckpointError(
    f"{label} holds {name} as {dtype}; expected a dense tensor of float32,"
    " float16 or bfloat16. Quantized checkpoints must be dequantized first."
  )


def _numpy(torch, tensor) -> np.ndarray:
  """The tensor's memory as an array, bfloat16 too."""
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def open_shards(folder, label: str = "") -> Tensors:
  """The tensors of a Hugging Face folder, of one file or of several.

  The order of preference is transformers': model.safetensors, its index,
  pytorch_model.bin, its index.

  Args:
    folder: a directory.
    label: how messages name it.

  Raises:
    errors.CheckpointError: no weights, a shard that is missing, a name that
      is in no shard or in two that differ, an index that leaves the folder.
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
      files = _complete([s.name for s in shards], label)
      return _merge(folder, label, files)
  raise errors.CheckpointError(
    f"{label} has no weights: expected model.safetensors or pytorch_model.bin,"
    f" or shards with their .index.json, in {folder}."
  )


def _complete(files, label):
  """The files, if all of the -00001-of-0000N that they count are there."""
  total = re.search(r"-of-(\d+)\.", files[0])
  pattern = re.sub(r"-\d+-of-\d+", "-{:0{w}d}-of-" + total[1], files[0])
  wanted = [
    pattern.format(i + 1, w=len(total[1])) for i in range(int(total[1]))
  ]
  if missing := sorted(set(wanted) - set(files)):
    raise errors.CheckpointError(
      f"{label} lacks {', '.join(missing)} of its {len(wanted)} shards. Copy"
      " or download them."
    )
  return wanted


def open_index(path, label: str) -> Tensors:
  """The tensors of the shards that an index names.

  Args:
    path: of the index; the shards lie beside it.
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
        f" {' or '.join(SUFFIXES)} files that lie beside it. The index was"
        " tampered with or is of another tool."
      )
  if missing := [f for f in files if not (folder / f).is_file()]:
    raise errors.CheckpointError(
      f"{label} lacks {', '.join(missing)}, of {len(files)} shards that"
      f" {path.name} names. Copy or download them."
    )
  found = _merge(folder, label, files)
  absent = sorted(set(bare_names(weight_map).values()) - set(found))
  if absent:
    raise errors.CheckpointError(
      f"{label}/{path.name} names tensors that no shard has:"
      f" {', '.join(absent)}. A shard is from another checkpoint."
    )
  return found


def read_index(path, label: str) -> dict[str, str]:
  """The weight_map of an index, the file of every tensor; no name twice.

  Raises:
    errors.CheckpointError: it is no index of shards.
  """
  repeated = []

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
      f"{label} is no index of shards ({pickles.line(e)}): expected JSON with a"
      ' "weight_map" of tensor names to file names.'
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
  """Tensors of several files; equal copies of a name are one."""
  found, conflicts = {}, []
  for file in files:
    for name, tensor in open_file(folder / file, f"{label}/{file}").items():
      if name in found and not same(found[name], tensor):
        conflicts.append(f"{name} ({found[name].file}, {tensor.file})")
      found.setdefault(name, tensor)
  if conflicts:
    raise errors.CheckpointError(
      f"{label} has tensors twice, with different values:"
      f" {', '.join(conflicts)}. Which is meant cannot be told; remove the"
      " shards of the other checkpoint."
    )
  return found


def same(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors have one shape and, in the coarser dtype, values."""
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
