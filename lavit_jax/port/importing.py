"""Checkpoints of others become a model directory: `lavit port import`.

A source is recognised by what it is: a directory in the official layout
(`official.py`), a Hugging Face LLaMA folder, an EVA-CLIP file or a folder of
Stable Diffusion (`starts.py`), or the id of a model on the Hugging Face hub
(`hub.py`). All of it is checked before anything is written. Then each tensor
is read from its mapped file and put into a mapped file of the stacked array,
and Orbax stores these: anonymous memory holds about one array at a time
(`benchmarks/import_memory.py`).
"""

import collections
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.port.formats import folder, tensor_files, tensors
from lavit_jax.port.reading import (
  hub,
  looks,
  official,
  pixel_folders,
  plan,
  starts,
)
from lavit_jax.port.tables import names

DTYPES = ("keep", *tensors.DTYPES)
_ARRAYS = ".arrays"  # scratch, inside the folder that is being built
DEFAULT_CODES = 16384
# What parts of one checkpoint were trained with: part.json says so.
_WORDS = ("encoder", "tokenizer")
_TRAINED_WITH = {
  "tokenizer": ("encoder",),
  "llm": ("text_tokenizer", *_WORDS),
  **dict.fromkeys(("lowres", "highres", *pixel_folders.FOLDERS), _WORDS),
}


def run(
  source,
  destination,
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
    destination: the model directory; new, or without the parts imported.
    only: some of `official.ALL_PARTS`; None: all the source has.
    dtype: "keep" what the files hold, or one of DTYPES to cast to.
    heads: attention heads of the visual networks, see `official.make_plan`.
    allow_missing: official names that may be missing; biases become 0 and
      scales of norms 1, other tensors have no such value and are refused.
    codes: visual codes by which a plain LLaMA's vocabulary grows.
    seed: of the rows that a plain LLaMA grows.
    quiet: show no progress.

  Returns:
    JSON-able: source, destination, parts (parameters, bytes, dtypes), notes.

  Raises:
    errors.UsageError: arguments that do not fit, `destination` is taken.
    errors.CheckpointError: a source that does not fit; nothing was written.
  """
  if dtype not in DTYPES:
    raise errors.UsageError(
      f"--dtype {dtype}: expected one of {', '.join(DTYPES)}."
    )
  _check_only(only)
  files.require_local(destination, "an imported model")
  files.check_arrays_folder(destination, write=True)
  place = hub.resolve(source, only)
  made = _plan(place, only, heads, allow_missing, codes, seed)
  chosen = [part.name for part in made.parts]
  words = made.files.get(official.WORDS)
  folder.require_free(destination, chosen, words)
  total = sum(len(a.sources) for p in made.parts for a in p.arrays)
  stream = io.StringIO() if quiet else None
  report = {}
  with folder.building(destination) as partial:
    bar = progress.Progress(total, label="import", stream=stream)
    with bar:
      writer = _Writer(partial, dtype, bar)
      for part in made.parts:
        with_what = _made_of(partial, part.name, words)
        report[part.name] = writer.write(part, with_what)
    _write_files(partial, made)
  return {
    "source": made.source,
    "directory": str(destination),
    "parts": report,
    "notes": list(made.notes),
  }


def _check_only(only):
  known = official.ALL_PARTS
  for part in [""] if only is not None and not only else only or ():
    if part not in known:
      raise errors.UsageError(
        f"--only {part}: expected parts among {', '.join(known)}, with commas"
        " between them."
      )


def _plan(place, only, heads, allow, codes, seed) -> plan.ImportPlan:
  """The plan of import of a path, by what lies there."""
  if place.is_dir() and official.is_layout(place):
    if codes is not None:
      raise errors.UsageError(
        f"--codes is for a plain LLaMA; {place} has a visual tokenizer, which"
        " tells its own number. Leave it out."
      )
    return official.make_plan(place, only, heads=heads, allow=allow)
  if place.is_dir() and starts.is_diffusers(place):
    return starts.diffusers_plan(place, only, allow=allow)
  if place.is_dir() and (place / "config.json").is_file():
    starts.require_only(only, "llm", place)
    codes = DEFAULT_CODES if codes is None else codes
    return starts.llama_plan(place, codes=codes, seed=seed, allow=allow)
  if place.is_file() and place.suffix in tensors.SUFFIXES:
    starts.require_only(only, "encoder", place)
    return starts.encoder_plan(place, heads=heads, allow=allow)
  hint = ""
  if place.is_dir() and official.is_layout(place / "checkpoint"):
    hint = f" Did you mean {place / 'checkpoint'}?"
  elif said := looks.of_path(place):
    hint = f" It looks like {said}."
  raise errors.CheckpointError(
    f"{place} is no checkpoint that can be imported: expected a directory with"
    " visual_tokenizer/ and language_model/ (official layout), a Hugging Face"
    " LLaMA folder with config.json, a folder of Stable Diffusion with unet/"
    " and vae/ in diffusers' format, or an EVA-CLIP file"
    f" ({', '.join(tensors.SUFFIXES)}).{hint}"
  )


def _made_of(partial, name: str, words: bytes | None) -> dict[str, str]:
  """Fingerprints of what a part was trained with, of what is imported here.

  Encoder and tokenizer, which come first, are read back for it: a small part
  of what is imported, and in the computer's memory still.
  """
  there = checkpoints.parts_in(partial)
  found = {}
  if words is not None:
    found["text_tokenizer"] = fingerprints.of_bytes(words)
  wanted = _TRAINED_WITH.get(name, ())
  if "encoder" in wanted and "encoder" in there:
    found["encoder"] = fingerprints.of_part(partial, "encoder")
  if "tokenizer" in wanted and set(_WORDS) <= set(there):
    found["tokenizer"] = fingerprints.of_words(partial)
  return {n: print_ for n, print_ in found.items() if n in wanted}


def _write_files(partial, made):
  for name, data in made.files.items():
    path = partial / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  for part, kept in made.kept.items():
    path = partial / official.OFFICIAL / tensor_files.KEPT.format(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.save_tensors(path, list(kept.items()))


class _Writer:
  """Writes parts, array by array."""

  def __init__(self, partial: pathlib.Path, dtype: str, bar):
    self._partial = partial
    self._cast = None if dtype == "keep" else tensors.DTYPES[dtype]
    self._bar = bar
    self._done = 0

  def write(self, part: plan.Part, made_of) -> dict[str, Any]:
    """Writes one part; what it holds, for the report."""
    scratch = self._partial / _ARRAYS
    scratch.mkdir()
    flat, exceptions = {}, {}
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
    checkpoints.save_part(self._partial, part.name, names.unflatten(flat), meta)
    report = _summary(flat, count)
    self._bar.print(f"import: {part.name} is written")
    flat.clear()
    tensor_files.remove_folder(scratch)
    return report

  def _stored_dtype(self, array):
    """What an array is stored as: the files' own type, if it is one."""
    found = {tensor.dtype for tensor in array.sources}
    if self._cast is not None:
      return self._cast
    if wrong := found - set(tensors.DTYPES.values()):
      raise errors.CheckpointError(
        f"{array.sources[0].file} holds {array.sources[0].name} as"
        f" {', '.join(d.name for d in wrong)}, which JAX would not keep. Give"
        " --dtype float32 to cast it."
      )
    return found.pop() if len(found) == 1 else np.dtype(np.float32)

  def _fill(self, array, out):
    for i, tensor in enumerate(array.sources):
      _place(array, tensor, out[i] if array.stacked else out)
      self._done += 1
      self._bar.update(self._done)
    if array.finish is not None:
      array.finish(out)


def _place(array, tensor, out):
  """Puts one tensor into its place, as `names.TRANSFORMS` says."""
  values = tensor.read()
  if array.transform == "rows":  # rows of padding are zero already
    out, values = out[: len(values)], values[: len(out)]
  else:
    values = names.TRANSFORMS[array.transform].forward(values)
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
  """Numbers in an array, rows of padding not counted."""
  shape = list(array.shape)
  if array.transform == "rows":
    shape[0] = meta["llama"]["vocab_size"]
  return int(np.prod(shape))


def _with_port(meta: Mapping[str, Any], **more) -> dict[str, Any]:
  return dict(meta) | {"port": dict(meta["port"]) | more}


def _summary(flat, count):
  dtypes = collections.Counter()
  for array in flat.values():
    dtypes[array.dtype.name] += array.nbytes
  return {
    "parameters": count,
    "bytes": sum(dtypes.values()),
    "largest_array_bytes": max(a.nbytes for a in flat.values()),
    "dtypes": [name for name, _ in dtypes.most_common()],
  }
