"""`lavit port verify`: compares a model with recordings of the official code.

A directory of recordings has one file a module (`encoder.npz`, ...), with
inputs in arrays `in_*`, outputs of the official module in `out_*`, and remarks
in `info_*`; strings are in the `.json` of the same name. Every `out_*` array
gives one row, compared with the tolerance of its kind. A file or array that is
not known here is a failure, and one that is missing is not: lengths, numbers of
beams and the decoders follow from the arrays. The folder `extra` has the
weights of `pixel_decoding/vae` once more, under older names.

The modules `recorded_*.py` compute the numbers.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer import pipeline
from lavit_jax.infer.pixels import decoders
from lavit_jax.infer.presets import official
from lavit_jax.models import llama
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.port.verify import (
  recorded_networks,
  recorded_pixels,
  recorded_search,
  recorded_text,
  results,
)

# By kind of result: max|a - b| / max|b| over an array, 0 for equality. For
# "image" (in [0, 1]) and "levels" (of 255) it is max|a - b|.
TOLERANCES = {
  "float": 1e-4,
  "score": 2e-4,
  "exact": 0.0,
  "image": 2 / 255,
  "levels": 2.0,
}
_ABSOLUTE = ("image", "levels")
_CHECKS = (
  recorded_networks.CHECKS | recorded_search.CHECKS | recorded_pixels.CHECKS
)
_UNCHECKED = ("README.md", "variant_config.json", "checkpoint", "preprocess")
_EXTRA = "extra"
_DEPRECATED = "vae_deprecated_names"  # a folder in `extra`
_CHECK_ERRORS = (errors.LavitError, KeyError, OSError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Row:
  """The comparison of one array, or of one list of strings.

  Attributes:
    file: that holds it.
    array: its name, or "*" for the file.
    max_abs: largest error; None where nothing could be compared.
    max_rel: largest error over the largest recorded value; None likewise.
    tolerance: of its kind; None where nothing could be compared.
    status: "pass" or "fail".
    note: a remark, such as the reason of a failure.
  """

  file: str
  array: str
  max_abs: float | None
  max_rel: float | None
  tolerance: float | None
  status: str
  note: str = ""


def run(model: str | os.PathLike, golden: str | os.PathLike) -> list[Row]:
  """Compares an imported checkpoint with every recording of a directory.

  Args:
    model: a model directory that `lavit port import` made.
    golden: the directory of recordings, of a checkpoint of any size.

  Raises:
    errors.UsageError: `golden` is no such directory.
    errors.CheckpointError: `model` is no model.
  """
  golden = pathlib.Path(golden)
  if not golden.is_dir() or not any(golden.glob("*.npz")):
    raise errors.UsageError(
      f"{golden} is no directory of recordings: expected .npz files such as"
      " encoder.npz in it."
    )
  parts = Parts(pipeline.resolve(model))
  rows = []
  for path in sorted(golden.iterdir()):
    if path.suffix == ".npz":
      rows += _compare_file(path, parts)
    elif path.suffix == ".json" and path.stem in recorded_text.CHECKS:
      rows += _compare_strings(path, parts)
    elif path.name == _EXTRA:
      rows += _compare_extra(path)
    elif path.name not in _UNCHECKED:
      rows.append(_failure(path.name, "*", "this file is unknown"))
  return rows


class Parts:
  """The parts of a model directory, each read when it is first needed."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._loaded: dict[str, Any] = {}

  def part(self, name: str) -> checkpoints.Part:
    """Returns a part; CheckpointError if the model has none of that name."""
    if name not in self._loaded:
      self._loaded[name] = checkpoints.load_part(self._directory, name)
    return self._loaded[name]

  def pixel_decoder(self, kind: str) -> Any:
    """Returns a pixel decoder; CheckpointError if the model has none.

    Args:
      kind: of `decoders.NEEDS`.
    """
    key = f"pixel decoder {kind}"
    if key not in self._loaded:
      self._loaded[key] = decoders.load(self._directory, kind)
    return self._loaded[key]

  @property
  def text(self) -> vocabulary.TextTokenizer:
    """The SentencePiece model."""
    return vocabulary.TextTokenizer.load(self._directory / "tokenizer.model")

  @property
  def model(self) -> official.Model:
    """The networks that read and write tokens, joined as officially."""
    if "model" not in self._loaded:
      stage1, llm = self.part("tokenizer"), self.part("llm")
      self._loaded["model"] = official.Model(
        config=tokenizer.config_from_dict(stage1.meta["tokenizer"]),
        llama_config=llama.LlamaConfig(**llm.meta["llama"]),
        vocab=vocabulary.Vocabulary(**llm.meta["vocabulary"]),
        encoder=self.part("encoder").params,
        visual=stage1.params,
        language=llm.params,
        text=self.text,
      )
    return self._loaded["model"]


class Recorded(dict):
  """The arrays of one file; records which of them were used.

  Attributes:
    folder: of the file.
    used: names of the arrays that were read with [].
  """

  def __init__(self, path: pathlib.Path):
    with np.load(path) as file:  # allow_pickle is False
      super().__init__(file)
    self.folder = path.parent
    self.used: set[str] = set()

  def __getitem__(self, name: str) -> np.ndarray:
    self.used.add(name)
    return super().__getitem__(name)


def _compare_file(path, parts) -> list[Row]:
  """Returns the rows of one .npz file."""
  if path.stem not in _CHECKS:
    return [_failure(path.name, "*", "this file is unknown")]
  recorded = Recorded(path)
  return _compare_arrays(
    path.name, recorded, lambda: _CHECKS[path.stem](recorded, parts)
  )


def _compare_arrays(
  file: str, recorded: Recorded, check: Callable[[], results.Results]
) -> list[Row]:
  """Returns the rows of the arrays of a file.

  Args:
    file: its name.
    recorded: its arrays.
    check: computes the same arrays.
  """
  try:
    computed = check()
  except _CHECK_ERRORS as e:
    return [_cannot_run(file, e)]
  rows = []
  for array, values in recorded.items():
    if array.startswith("out_"):
      if array in computed:
        rows.append(_compare(file, array, *computed[array], values))
      else:
        rows.append(_failure(file, array, "no check computes this array"))
    elif array.startswith("in_") and array not in recorded.used:
      rows.append(_failure(file, array, "no check uses this input"))
    elif not array.startswith(("in_", "info_")):
      rows.append(_failure(file, array, "neither in_, out_ nor info_"))
  return rows


def _compare_extra(folder) -> list[Row]:
  """Returns the rows of `extra`: vae.npz, computed with its weights."""
  rows = []
  for subfolder in sorted(folder.iterdir()):
    name = f"{folder.name}/{subfolder.name}"
    if subfolder.name != _DEPRECATED:
      rows.append(_failure(name, "*", "this folder is unknown"))
      continue
    path = folder.parent / "vae.npz"
    if not path.is_file():
      rows.append(_failure(name, "*", "its images are missing: vae.npz"))
      continue
    recorded = Recorded(path)
    for array in [n for n in recorded if n.endswith("_sdxl")]:
      del recorded[array]
    check = functools.partial(
      recorded_pixels.deprecated_names, recorded, subfolder
    )
    rows += _compare_arrays(name, recorded, check)
  return rows


def _compare_strings(path, parts) -> list[Row]:
  """Returns the rows of one .json file, one a list of strings or of ids."""
  recorded = json.loads(path.read_text("utf-8"))
  try:
    lists = recorded_text.CHECKS[path.stem](recorded, path.parent, parts)
  except _CHECK_ERRORS as e:
    return [_cannot_run(path.name, e)]
  return [_compare_lists(path.name, n, *pair) for n, pair in lists.items()]


def _compare_lists(file, name, computed, recorded) -> Row:
  different = [
    i
    for i, (a, b) in enumerate(zip(computed, recorded, strict=False))
    if a != b
  ]
  if not different and len(computed) == len(recorded):
    note = f"{len(recorded)} equal"
    return Row(file, name, None, None, 0.0, "pass", note)
  i = different[0] if different else min(len(computed), len(recorded))
  note = f"entry {i} of {len(recorded)} differs"
  return Row(file, name, None, None, 0.0, "fail", note)


def _compare(file, array, computed, kind, recorded) -> Row:
  """Compares two arrays; non-finite numbers must be at the same positions."""
  computed, tolerance = np.asarray(jax.device_get(computed)), TOLERANCES[kind]
  if computed.shape != recorded.shape:
    note = f"shape {list(computed.shape)}, recorded {list(recorded.shape)}"
    return Row(file, array, None, None, tolerance, "fail", note)
  computed, recorded = computed.astype(np.float64), recorded.astype(np.float64)
  finite = np.isfinite(recorded)
  same = np.array_equal(computed[~finite], recorded[~finite], equal_nan=True)
  difference = np.abs(computed[finite] - recorded[finite])
  largest = float(difference.max(initial=0.0))
  scale = float(np.abs(recorded[finite]).max(initial=0.0)) or 1.0
  error = largest if kind in _ABSOLUTE else largest / scale
  passed = same and error <= tolerance  # False for NaN
  note = "" if same else "infinite at other positions"
  if kind == "exact" and not passed:
    note = f"{int((difference > 0).sum())} of {recorded.size} differ"
  status = "pass" if passed else "fail"
  return Row(file, array, largest, largest / scale, tolerance, status, note)


def _failure(file, array, note) -> Row:
  return Row(file, array, None, None, None, "fail", note)


def _cannot_run(file, error) -> Row:
  text = str(error).splitlines()[0][:300]
  return _failure(file, "*", f"cannot be run: {text}")
