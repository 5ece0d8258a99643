"""Files of tensors, written through mapped memory.

`map_safetensors` lays out a safetensors file and gives its tensors as arrays
over the file, to be filled one by one: nothing is gathered in memory.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from lavit_jax.port.formats import tensors

KEPT = "kept.{}.safetensors"  # of a part
_SAFE_NAMES = {
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
  path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
  """Makes a safetensors file of zeros; arrays over it, by name.

  The format: the header's length as eight little-endian bytes, a JSON header
  of dtype, shape and offsets, and the tensors' bytes in that order.
  """
  header = {"__metadata__": dict(metadata or {"format": "pt"})}
  end = 0
  for spec in specs:
    start, end = end, end + spec.nbytes
    header[spec.name] = {
      "dtype": _SAFE_NAMES[spec.dtype.name],
      "shape": list(spec.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGN)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(file.tell() + end)
  return _views(path, specs, 8 + len(text))


def map_scratch(path, specs: Sequence[Spec]) -> dict[str, np.ndarray]:
  """Arrays over a new file that holds nothing else, by name."""
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


def save_tensors(path, items: Sequence[tuple[str, tensors.Tensor]]) -> None:
  """Writes tensors of other files to a safetensors file."""
  specs = [Spec(name, t.shape, t.dtype) for name, t in items]
  views = map_safetensors(path, specs)
  for name, tensor in items:
    views[name][...] = tensor.read()


def save_arrays(path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a state_dict of these arrays as safetensors."""
  specs = [Spec(name, x.shape, x.dtype) for name, x in arrays.items()]
  for name, view in map_safetensors(path, specs).items():
    view[...] = arrays[name]


def save_torch(path, content: Mapping[str, np.ndarray] | np.ndarray) -> None:
  """Writes a state_dict, or one array alone, by torch.save, without copies."""
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
  """Tensors by file name, as Hugging Face cuts them.

  Args:
    specs: in the order in which they are written.
    limit: bytes a file; one tensor may be larger.
    stem: of the file names, such as "pytorch_model".
    suffix: of the file names, such as ".bin".

  Returns:
    {"pytorch_model.bin": specs}, or "pytorch_model-00001-of-00002.bin" and
    so on where one file would be larger than `limit`.
  """
  groups, size = [[]], 0
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
  """The .index.json of shards."""
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
