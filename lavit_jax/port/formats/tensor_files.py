"""Files of tensors, written through mapped memory.

`map_safetensors` lays out a safetensors file and returns arrays that are mapped
to it, to be filled one by one. So memory never holds the complete file.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lavit_jax.port.formats import tensors

_SAFE_DTYPES = {
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "float64": "F64",
}
_ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Spec:
  """Name, shape and dtype of a tensor to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return int(np.prod(self.shape)) * self.dtype.itemsize


def map_safetensors(
  path: str | os.PathLike,
  specs: Sequence[Spec],
  metadata: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
  """Makes a safetensors file of zeros.

  The format is the header's length as eight little-endian bytes, a JSON header
  of dtypes, shapes and offsets, and the tensors' bytes in that order.

  Args:
    path: of the new file.
    specs: of its tensors, in order.
    metadata: of the header; by default that of PyTorch's writer.

  Returns:
    Arrays mapped to the file, by name.
  """
  header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
  end = 0
  for spec in specs:
    start, end = end, end + spec.nbytes
    header[spec.name] = {
      "dtype": _SAFE_DTYPES[spec.dtype.name],
      "shape": list(spec.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGN)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(file.tell() + end)
  return _views(path, specs, 8 + len(text))


def map_scratch(
  path: str | os.PathLike, specs: Sequence[Spec]
) -> dict[str, np.ndarray]:
  """Makes a file of nothing but arrays, and returns these by name."""
  with open(path, "wb") as file:
    file.truncate(sum(spec.nbytes for spec in specs))
  return _views(path, specs, 0)


def _views(path, specs, offset):
  if not sum(spec.nbytes for spec in specs):
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
  memory, views = np.memmap(path, np.uint8, mode="r+", offset=offset), {}
  start = 0
  for spec in specs:
    part = memory[start : start + spec.nbytes]
    views[spec.name] = part.view(spec.dtype).reshape(spec.shape)
    start += spec.nbytes
  return views


def save_tensors(
  path: str | os.PathLike, items: Sequence[tuple[str, tensors.Tensor]]
) -> None:
  """Copies tensors of other files, under new names, to a safetensors file."""
  specs = [Spec(name, t.shape, t.dtype) for name, t in items]
  views = map_safetensors(path, specs)
  for name, tensor in items:
    views[name][...] = tensor.read()


def save_arrays(
  path: str | os.PathLike, arrays: Mapping[str, np.ndarray]
) -> None:
  """Writes arrays by name as a safetensors file."""
  specs = [Spec(name, x.shape, x.dtype) for name, x in arrays.items()]
  for name, view in map_safetensors(path, specs).items():
    view[...] = arrays[name]


def save_torch(
  path: str | os.PathLike, content: Mapping[str, np.ndarray] | np.ndarray
) -> None:
  """Writes a state_dict, or one bare array, by torch.save, without copies."""
  torch = tensors.require("torch", "Writing .bin files")
  if isinstance(content, np.ndarray):
    torch.save(_tensor(torch, content), path)
    return
  state = {name: _tensor(torch, array) for name, array in content.items()}
  torch.save(state, path)


def _tensor(torch, array):
  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(np.asarray(array))


def shards(
  specs: Sequence[Spec], limit: int, stem: str, suffix: str
) -> dict[str, list[Spec]]:
  """Splits tensors into files as Hugging Face does.

  Args:
    specs: in the order in which they are written.
    limit: bytes a file; a file with a single tensor may be larger.
    stem: of the file names, such as "pytorch_model".
    suffix: of the file names, such as ".bin".

  Returns:
    {"pytorch_model.bin": specs}; or "pytorch_model-00001-of-00002.bin" and so
    on, where one file would be larger than `limit`.
  """
  groups: list[list[Spec]] = [[]]
  size = 0
  for spec in specs:
    if groups[-1] and size + spec.nbytes > limit:
      groups.append([])
      size = 0
    groups[-1].append(spec)
    size += spec.nbytes
  if len(groups) == 1:
    return {f"{stem}{suffix}": groups[0]}
  total = len(groups)
  return {
    f"{stem}-{i + 1:05d}-of-{total:05d}{suffix}": group
    for i, group in enumerate(groups)
  }


def index_json(files: Mapping[str, Sequence[Spec]]) -> bytes:
  """Returns the content of the .index.json of shards."""
  specs = [spec for group in files.values() for spec in group]
  content = {
    "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
    "weight_map": {
      spec.name: file for file, group in files.items() for spec in group
    },
  }
  return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def remove_folder(path: pathlib.Path) -> None:
  """Removes a folder of scratch files."""
  shutil.rmtree(path)
