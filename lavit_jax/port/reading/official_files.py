"""Opened files of the official layout, and what is known about all of them."""

import pathlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from lavit_jax.port.formats import official_layout, tensors
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import rows, sizes

SOURCE = "lavit"
_Size = TypeVar("_Size")


class OfficialFiles:
  """The .bin files that an import needs, by key of `official_layout.FILES`.

  Attributes:
    folder: the checkpoint.
    allow: official names that may be missing.
    problems: receives everything that does not fit.
    notes: sentences for the user.
    kept: by part, tensors that only an export needs.
    small: small files, by path in the model directory.
    tensors: by file, then by official name.
    heads: attention heads of the visual networks.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    parts: Collection[str],
    heads: int | None,
    allow: Collection[str],
    problems: plan.Problems,
  ):
    """Opens the files.

    Args:
      folder: the checkpoint, without missing files.
      parts: that are imported.
      heads: attention heads as the user gave them, or None.
      allow: official names that may be missing.
      problems: receives everything that does not fit.

    Raises:
      errors.CheckpointError: a file cannot be read.
      errors.UsageError: the heads do not divide a width.
    """
    self.folder, self.allow, self.problems = folder, allow, problems
    self.notes: list[str] = []
    self.kept: dict[str, dict[str, tensors.Tensor]] = {}
    self.small: dict[str, bytes] = {}
    self.tensors = _open(folder, parts)
    self.heads, origin = sizes.head_count(folder, heads)
    if self.tensors:
      self.notes.append(f"{self.heads} attention heads: {origin}")
    self._check_heads(origin)

  def _check_heads(self, origin):
    for by_name in self.tensors.values():
      for name, tensor in by_name.items():
        is_norm = name.endswith(("norm1.weight", "norm0.weight"))
        if is_norm and len(tensor.shape) == 1:
          sizes.check_heads(tensor.shape[0], self.heads, origin)
          break

  def size(
    self, file: str, infer: Callable[[sizes.Shapes], _Size]
  ) -> _Size | None:
    """Returns what `infer` makes of a file's shapes; None if it cannot."""
    if file not in self.tensors:
      return None
    try:
      return infer({n: t.shape for n, t in self.tensors[file].items()})
    except sizes.UnknownSize as e:
      label = official_layout.FILES[file]
      self.problems.add("size that no tensor shows", f"{label}: {e}")
      return None

  def arrays(
    self, file: str, table: rows.Table, tree: dict[str, Any] | None
  ) -> list[plan.Array]:
    """Plans the arrays of one file, see `plan.arrays_of`."""
    return plan.arrays_of(
      table,
      self.tensors[file],
      tree,
      self.problems,
      label=official_layout.FILES[file],
      allow=self.allow,
    )

  def keep(self, part: str, file: str, tensor: tensors.Tensor) -> None:
    """Keeps a tensor of a file for an export of the part."""
    self.kept.setdefault(part, {})[f"{file}:{tensor.name}"] = tensor

  def encoder_copies(self, file: str, part: str) -> list[str]:
    """Returns the names of a file's copies of the encoder's tensors.

    Copies of another dtype are kept for an export.

    Args:
      file: a key of `official_layout.FILES`.
      part: that the file belongs to.
    """
    label, prefix = official_layout.FILES[file], official_layout.ENCODER_COPY
    copies = [n for n in self.tensors[file] if n.startswith(prefix)]
    for name in copies:
      copy = self.tensors[file][name]
      original = self.tensors["encoder"].get(name.removeprefix(prefix))
      if original is None:
        self.problems.add("not used", f"{label}: {name}")
      elif not tensors.same(copy, original):
        self.problems.add(
          f"differs from {official_layout.FILES['encoder']}", f"{label}: {name}"
        )
      elif copy.dtype != original.dtype:
        self.keep(part, label, copy)
    return copies


def _open(folder, parts) -> dict[str, tensors.Tensors]:
  needed = {f for p in parts for f in official_layout.FILES_OF_PART.get(p, ())}
  if "tokenizer" in parts:  # a decoder shows its own sizes, if it is there
    needed |= {"lowres", "highres"}
  return {
    file: tensors.open_file(folder / path, path)
    for file, path in official_layout.FILES.items()
    if file in needed and (folder / path).is_file()
  }


def part_of(
  name: str,
  arrays: Iterable[plan.Array],
  meta: dict[str, Any] | None,
  **port: Any,
) -> plan.Part | None:
  """Returns a part with its origin in the meta; None where meta is None.

  Args:
    name: of the part.
    arrays: all of its arrays.
    meta: without the origin; None where a size is unknown, which is one of the
      problems already.
    **port: fields of `meta["port"]`, for an export.
  """
  if meta is None:
    return None
  port = {"source": SOURCE, **meta.get("port", {}), **port}
  return plan.Part(name, tuple(arrays), meta | {"port": port})
