"""Rows of name tables: an official tensor, its path here, its transform.

A row such as

  Row("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "linear")

says which official tensor becomes which array of a Flax tree, and how. `{i}`
stands for the number of a layer: the tensors of all layers are stacked on a
first axis here.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

ROW_MULTIPLE = 128  # rows of embedding and head are padded to a multiple of it


class Row(NamedTuple):
  """One array: its official name, its path here, a key of TRANSFORMS."""

  official: str
  path: str
  transform: str = "same"


Table = tuple[Row, ...]


class Transform(NamedTuple):
  """Conversion of one tensor from the official form and back."""

  forward: Callable[[np.ndarray], np.ndarray]
  backward: Callable[[np.ndarray], np.ndarray]


def _unpatch(x):
  size = round((x.shape[0] // 3) ** 0.5)
  return x.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


def _pad_rows(x):
  missing = -x.shape[0] % ROW_MULTIPLE
  return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])


TRANSFORMS = {
  "same": Transform(lambda x: x, lambda x: x),
  # torch's Linear [out, in] to a kernel [in, out].
  "linear": Transform(lambda x: x.T, lambda x: x.T),
  # Fused [3 * D, D] to [D, 3, D], and its bias [3 * D] to [3, D].
  "qkv": Transform(
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
  ),
  "qkv_bias": Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1)),
  # A convolution [D, 3, P, P] to the kernel [P * P * 3, D] over patches.
  "patch": Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _unpatch
  ),
  # torch's Conv2d [out, in, h, w] to a kernel [h, w, in, out], and a 1 x 1
  # convolution to a kernel [in, out].
  "conv": Transform(
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
  ),
  "pointwise": Transform(
    lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
  ),
  # Rows of the vocabulary, padded here; `names.to_official` cuts them.
  "rows": Transform(_pad_rows, lambda x: x),
}


def norm(official: str, path: str) -> Table:
  """Returns the rows of a norm's weight and bias."""
  return (
    Row(f"{official}.weight", f"{path}/scale"),
    Row(f"{official}.bias", f"{path}/bias"),
  )


def layer(official: str, path: str, transform: str = "linear") -> Table:
  """Returns the rows of the weight and bias of a matrix or convolution."""
  return (
    Row(f"{official}.weight", f"{path}/kernel", transform),
    Row(f"{official}.bias", f"{path}/bias"),
  )


def kernel(official: str, path: str) -> Row:
  """Returns the row of a matrix without bias."""
  return Row(f"{official}.weight", f"{path}/kernel", "linear")


def joined(tables: Iterable[Table]) -> Table:
  """Returns the rows of several tables as one."""
  return tuple(row for table in tables for row in table)


def under(official: str, path: str, table: Table) -> Table:
  """Returns the table with a prefix before official names and before paths."""
  return tuple(
    Row(official + row.official, path + row.path, row.transform)
    for row in table
  )


def is_stacked(row: Row) -> bool:
  """Returns whether a row stands for one tensor a layer, stacked here."""
  return "{i}" in row.official


def official_names(row: Row, depth: int) -> list[str]:
  """Returns the official names of a row: one, or one a layer."""
  if not is_stacked(row):
    return [row.official]
  return [row.official.replace("{i}", str(i)) for i in range(depth)]


def depth_of(table: Table, names: Iterable[str]) -> int:
  """Returns the number of layers: 1 + the highest number in official names.

  It is 0 for a table without stacked rows, such as those of the U-Nets.
  """
  stacked = next((row.official for row in table if is_stacked(row)), None)
  if stacked is None:
    return 0
  pattern = re.escape(stacked.split("{i}")[0]) + r"(\d+)\."
  matches = [re.match(pattern, name) for name in names]
  return max((int(m[1]) + 1 for m in matches if m), default=0)
