"""Imports PyTorch checkpoints as a model directory: `lavit port import`.

The source is a directory in the official layout (`official.py`), a Hugging Face
LLaMA folder, an EVA-CLIP file or a folder of Stable Diffusion
(`pretrained.py`), or the id of a model on the Hugging Face hub (`hub.py`). All
of it is checked before anything is written. Then each tensor is copied from its
mapped file to a mapped file of the stacked array, and Orbax stores the arrays:
anonymous memory holds about one at a time (`benchmarks/import_memory.py`).
"""

import collections
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.port.formats import (
  folder,
  official_layout,
  tensor_files,
  tensors,
)
from lavit_jax.port.reading import (
  hub,
  official,
  plan,
  pretrained,
  unsupported,
)
from lavit_jax.port.tables import rows

DTYPES = ("keep", *tensors.DTYPES)
DEFAULT_CODES = 16384
_SCRATCH = ".arrays"  # folder inside the one that is being built
# The parts that parts of one checkpoint were trained with, for part.json.
_VISUAL = ("encoder", "tokenizer")
_TRAINED_WITH = {
  "tokenizer": ("encoder",),
  "llm": ("text_tokenizer", *_VISUAL),
  "lowres": _VISUAL,
  "highres": _VISUAL,
  "lowres_pixels": _VISUAL,
  "highres_pixels": _VISUAL,
}


def run(
  source: str | os.PathLike,
  destination: str | os.PathLike,
  *,
  only: Sequence[str] | None = None,
  dtype: str = "keep",
  heads: int | None = None,
  allow_missing: Sequence[str] = (),
  codes: int | None = None,
  seed: int = 0,
  quiet: bool = False,
) -> dict[str, Any]:
  """Imports a checkpoint into a model directory.

  Args:
    source: a path, or the id of a model on the hub ("owner/name").
    destination: a new directory, or a model directory without these parts.
    only: some of `official_layout.ALL_PARTS`; None for all in the source.
    dtype: "keep" for those of the files, or another of DTYPES to cast to.
    heads: attention heads of the visual networks, see `official.make_plan`.
    allow_missing: official names that may be missing; biases become 0 and
      scales of norms 1, other tensors are refused.
    codes: visual codes by which a plain LLaMA's vocabulary grows.
    seed: of the new rows of a plain LLaMA.
    quiet: whether to hide the progress.

  Returns:
    A JSON object: source, directory, parts (parameters, bytes, dtypes), notes.

  Raises:
    errors.UsageError: arguments are invalid, or `destination` has other
      content.
    errors.CheckpointError: the source cannot be imported; nothing was written.
  """
  if dtype not in DTYPES:
    raise errors.UsageError(
      f"--dtype {dtype}: expected one of {', '.join(DTYPES)}."
    )
  _check_only(only)
  files.require_local(destination, "an imported model")
  files.check_arrays_folder(destination, write=True)
  path = hub.resolve(source, only)
  import_plan = _plan(path, only, heads, allow_missing, codes, seed)
  text_model = import_plan.files.get(official_layout.TOKENIZER_MODEL)
  folder.require_free(
    destination, [p.name for p in import_plan.parts], text_model
  )
  return {
    "source": import_plan.source,
    "directory": str(destination),
    "parts": _write(import_plan, destination, dtype, quiet),
    "notes": list(import_plan.notes),
  }


def _check_only(only):
  known = official_layout.ALL_PARTS
  for part in [""] if only is not None and not only else only or ():
    if part not in known:
      raise errors.UsageError(
        f"--only {part}: expected parts among {', '.join(known)}, separated by"
        " commas."
      )


def _plan(path, only, heads, allow, codes, seed) -> plan.ImportPlan:
  """Returns the plan for a path, which depends on its content."""
  if path.is_dir() and official_layout.is_layout(path):
    if codes is not None:
      raise errors.UsageError(
        f"--codes is for a plain LLaMA; {path} has a visual tokenizer with a"
        " number of codes of its own. Omit the option."
      )
    return official.make_plan(path, only, heads=heads, allow=allow)
  if path.is_dir() and pretrained.is_diffusers(path):
    return pretrained.diffusers_plan(path, only, allow=allow)
  if path.is_dir() and (path / "config.json").is_file():
    pretrained.require_only(only, "llm", path)
    codes = DEFAULT_CODES if codes is None else codes
    return pretrained.llama_plan(path, codes=codes, seed=seed, allow=allow)
  if path.is_file() and path.suffix in tensors.SUFFIXES:
    pretrained.require_only(only, "encoder", path)
    return pretrained.encoder_plan(path, heads=heads, allow=allow)
  hint = ""
  if path.is_dir() and official_layout.is_layout(path / "checkpoint"):
    hint = f" Did you mean {path / 'checkpoint'}?"
  elif description := unsupported.describe_path(path):
    hint = f" It looks like {description}."
  raise errors.CheckpointError(
    f"{path} is no checkpoint that can be imported: expected a directory with"
    " visual_tokenizer/ and language_model/ (official layout), a Hugging Face"
    " LLaMA folder with config.json, a folder of Stable Diffusion with unet/"
    " and vae/ in diffusers' format, or an EVA-CLIP file"
    f" ({', '.join(tensors.SUFFIXES)}).{hint}"
  )


def _write(import_plan, destination, dtype, quiet) -> dict[str, Any]:
  """Writes everything; returns the report by part."""
  total = sum(len(a.sources) for p in import_plan.parts for a in p.arrays)
  stream = io.StringIO() if quiet else None
  text_model = import_plan.files.get(official_layout.TOKENIZER_MODEL)
  report = {}
  with folder.building(destination) as partial:
    with progress.Progress(total, label="import", stream=stream) as bar:
      writer = _Writer(partial, dtype, bar)
      for part in import_plan.parts:
        made_of = _made_of(partial, part.name, text_model)
        report[part.name] = writer.write(part, made_of)
    folder.write_files(partial, import_plan.files)
    _write_kept(partial, import_plan.kept)
  return report


def _made_of(partial, name: str, text_model: bytes | None) -> dict[str, str]:
  """Returns fingerprints of the imported parts that a part was trained with.

  Encoder and tokenizer come first and are read back for it: they are a small
  share of the import, and their files still in the page cache.
  """
  present = checkpoints.parts_in(partial)
  trained_with = _TRAINED_WITH.get(name, ())
  prints = {}
  if text_model is not None and "text_tokenizer" in trained_with:
    prints["text_tokenizer"] = fingerprints.of_bytes(text_model)
  if "encoder" in trained_with and "encoder" in present:
    prints["encoder"] = fingerprints.of_part(partial, "encoder")
  if "tokenizer" in trained_with and set(_VISUAL) <= set(present):
    prints["tokenizer"] = fingerprints.of_tokenizer(partial)
  return prints


def _write_kept(partial, kept):
  """Writes the tensors that only an export needs."""
  root = partial / official_layout.KEPT_FOLDER
  for part, by_name in kept.items():
    root.mkdir(parents=True, exist_ok=True)
    path = root / official_layout.KEPT_TENSORS.format(part)
    tensor_files.save_tensors(path, list(by_name.items()))


class _Writer:
  """Writes parts, array by array."""

  def __init__(self, partial: pathlib.Path, dtype: str, bar: progress.Progress):
    self._partial = partial
    self._cast = None if dtype == "keep" else tensors.DTYPES[dtype]
    self._bar = bar
    self._done = 0

  def write(
    self, part: plan.Part, made_of: Mapping[str, str]
  ) -> dict[str, Any]:
    """Writes one part and returns its entry of the report.

    Args:
      part: to write.
      made_of: fingerprints of the parts that it was trained with.
    """
    scratch = self._partial / _SCRATCH
    scratch.mkdir()
    flat: dict[str, np.ndarray] = {}
    exceptions: dict[str, str] = {}
    count = sum(_scalars(array, part.meta) for array in part.arrays)
    for number, array in enumerate(part.arrays):
      stored = self._stored_dtype(array)
      path = scratch / str(number)
      out = np.memmap(path, dtype=stored, mode="w+", shape=array.shape)
      self._fill(array, out)
      flat[array.path] = out
      if self._cast is None:
        exceptions |= {
          t.name: t.dtype.name for t in array.sources if t.dtype != stored
        }
    meta = _with_port(part.meta, dtypes=exceptions) | {"parameters": count}
    meta |= {"made_of": made_of} if made_of else {}
    params = traverse_util.unflatten_dict(flat, sep="/")
    checkpoints.save_part(self._partial, part.name, params, meta)
    report = _summary(flat, count)
    self._bar.print(f"import: {part.name} is written")
    flat.clear()
    tensor_files.remove_folder(scratch)
    return report

  def _stored_dtype(self, array):
    """Returns the dtype to store: that of the files, or float32 for several."""
    if self._cast is not None:
      return self._cast
    dtypes = {tensor.dtype for tensor in array.sources}
    if wrong := dtypes - set(tensors.DTYPES.values()):
      raise errors.CheckpointError(
        f"{array.sources[0].file} holds {array.sources[0].name} as"
        f" {', '.join(d.name for d in wrong)}, which JAX would not keep. Cast"
        " it with --dtype float32."
      )
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

  def _fill(self, array, out):
    for i, tensor in enumerate(array.sources):
      _copy(array, tensor, out[i] if array.stacked else out)
      self._done += 1
      self._bar.update(self._done)
    if array.finish is not None:
      array.finish(out)


def _copy(array, tensor, out):
  """Transforms a tensor and copies it to its part of the array."""
  values = tensor.read()
  if array.transform == "rows":  # rows of padding are zero already
    out, values = out[: len(values)], values[: len(out)]
  else:
    values = rows.TRANSFORMS[array.transform].forward(values)
  with np.errstate(over="ignore"):
    out[...] = values
  if out.dtype.itemsize < values.dtype.itemsize:
    lost = ~np.isfinite(out)
    if lost.any() and np.isfinite(values[lost]).any():
      raise errors.CheckpointError(
        f"{tensor.file}: {tensor.name} has numbers beyond the range of"
        f" {out.dtype.name}. Cast to bfloat16 or float32."
      )


def _scalars(array, meta) -> int:
  """Returns the numbers in an array without rows of padding."""
  shape = list(array.shape)
  if array.transform == "rows":
    shape[0] = meta["llama"]["vocab_size"]
  return int(np.prod(shape))


def _with_port(meta: Mapping[str, Any], **more) -> dict[str, Any]:
  """Returns meta with more fields in its `port`."""
  return dict(meta) | {"port": dict(meta["port"]) | more}


def _summary(flat, count):
  """Returns the report of a part from its flat arrays."""
  dtypes: collections.Counter[str] = collections.Counter()
  for array in flat.values():
    dtypes[array.dtype.name] += array.nbytes
  return {
    "parameters": count,
    "bytes": sum(dtypes.values()),
    "largest_array_bytes": max(a.nbytes for a in flat.values()),
    "dtypes": [name for name, _ in dtypes.most_common()],
  }
