"""`lavit port verify`: a model held to recorded numbers of the official code.

A directory of recordings has a file a module (`encoder.npz`, ...), whose
arrays `in_*` are inputs, `out_*` what the official module made of them, and
`info_*` remarks; strings are in the `.json` of the same name. Every `out_*`
array gives one row, with the tolerances of TOLERANCES; whatever is in the
directory and is not known here is a failure. What is not there is not asked
for: lengths, numbers of beams and which decoders there are come from the
arrays. The folder `extra` has the weights of `pixel_decoding/vae` once more,
under older names.

The numbers themselves are made in `recordings.py`, `recorded_text.py` and
`recorded_pixels.py`.
"""

import dataclasses
import json
import pathlib

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
  recorded_pixels,
  recorded_text,
  recordings,
)

# max|a - b| / max|b| over an array; 0: equal. Of images max|a - b| alone:
# in [0, 1], and of 255 levels.
TOLERANCES = {
  "float": 1e-4,
  "score": 2e-4,
  "exact": 0.0,
  "image": 2 / 255,
  "levels": 2.0,
}
_ABSOLUTE = ("image", "levels")
_CHECKS = recordings.CHECKS | recorded_pixels.CHECKS
_OTHERS = ("README.md", "variant_config.json", "checkpoint", "preprocess")
_EXTRA = "extra"
_DEPRECATED = "vae_deprecated_names"  # a folder in it


@dataclasses.dataclass(frozen=True)
class Row:
  """One array, or one list of strings.

  Attributes:
    status: "pass" or "fail".
    max_abs, max_rel: largest error, and over the largest recorded value;
      None where nothing could be compared.
  """

  file: str
  array: str
  max_abs: float | None
  max_rel: float | None
  tolerance: float | None
  status: str
  note: str = ""


def run(model, golden) -> list[Row]:
  """Every recording of a directory against an imported checkpoint.

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
      rows += _arrays(path, parts)
    elif path.suffix == ".json" and path.stem in recorded_text.CHECKS:
      rows += _strings(path, parts)
    elif path.name == _EXTRA:
      rows += _extra(path)
    elif path.name not in _OTHERS:
      rows.append(_unknown(path.name, "*", "nothing here knows this file"))
  return rows


class Parts:
  """The parts of a model, each read when it is first needed."""

  def __init__(self, directory):
    self._directory = directory
    self._loaded = {}

  def part(self, name: str) -> checkpoints.Part:
    """One part; CheckpointError if the model has none of that name."""
    if name not in self._loaded:
      self._loaded[name] = checkpoints.load_part(self._directory, name)
    return self._loaded[name]

  def painter(self, kind: str):
    """A pixel decoder, of `painters.NEEDS`; CheckpointError as `part`."""
    key = f"painter {kind}"
    if key not in self._loaded:
      self._loaded[key] = decoders.load(self._directory, kind)
    return self._loaded[key]

  @property
  def text(self) -> vocabulary.TextTokenizer:
    """The SentencePiece model."""
    return vocabulary.TextTokenizer.load(self._directory / "tokenizer.model")

  @property
  def model(self) -> official.Model:
    """The networks that read and write, as the official classes join them."""
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
  """Arrays of one file; remembers which inputs were used."""

  def __init__(self, path: pathlib.Path):
    with np.load(path) as file:  # allow_pickle is False
      super().__init__(file)
    self.folder = path.parent
    self.used = set()

  def __getitem__(self, name):
    self.used.add(name)
    return super().__getitem__(name)


def _arrays(path, parts) -> list[Row]:
  """Rows of one .npz file."""
  if path.stem not in _CHECKS:
    return [_unknown(path.name, "*", "nothing here knows this file")]
  recorded = Recorded(path)
  return _compared(
    path.name, recorded, lambda: _CHECKS[path.stem](recorded, parts)
  )


def _compared(file, recorded, check) -> list[Row]:
  """Rows of arrays and what a check makes of them."""
  try:
    made = check()
  except (errors.LavitError, KeyError, OSError, TypeError, ValueError) as e:
    text = str(e).splitlines()[0][:300]
    return [_unknown(file, "*", f"cannot be run: {text}")]
  rows = []
  for array in recorded:
    if array.startswith("out_"):
      if array in made:
        value, kind = made[array]
        wanted = dict.__getitem__(recorded, array)
        rows.append(_compare(file, array, value, wanted, kind))
      else:
        rows.append(_unknown(file, array, "nothing here makes this"))
    elif array.startswith("in_") and array not in recorded.used:
      rows.append(_unknown(file, array, "no check took this input"))
    elif not array.startswith(("in_", "info_")):
      rows.append(_unknown(file, array, "neither in_, out_ nor info_"))
  return rows


def _extra(folder) -> list[Row]:
  """Rows of the folder `extra`: arrays of vae.npz by weights of other names."""
  rows = []
  for place in sorted(folder.iterdir()):
    name = f"{folder.name}/{place.name}"
    if place.name != _DEPRECATED:
      rows.append(_unknown(name, "*", "nothing here knows this"))
      continue
    path = folder.parent / "vae.npz"
    if not path.is_file():
      rows.append(_unknown(name, "*", "its images are in vae.npz: missing"))
      continue
    recorded = Recorded(path)
    for array in [n for n in recorded if n.endswith("_sdxl")]:
      del recorded[array]
    check = lambda a=recorded, p=place: recorded_pixels.deprecated_names(a, p)
    rows += _compared(name, recorded, check)
  return rows


def _strings(path, parts) -> list[Row]:
  """Rows of one .json file, a row a list of strings or of ids."""
  recorded = json.loads(path.read_text("utf-8"))
  try:
    made = recorded_text.CHECKS[path.stem](recorded, path.parent, parts)
  except (errors.LavitError, KeyError, OSError, TypeError, ValueError) as e:
    text = str(e).splitlines()[0][:300]
    return [_unknown(path.name, "*", f"cannot be run: {text}")]
  rows = []
  for name, (ours, theirs) in made.items():
    wrong = [
      i
      for i, pair in enumerate(zip(ours, theirs, strict=False))
      if pair[0] != pair[1]
    ]
    equal = not wrong and len(ours) == len(theirs)
    note = f"{len(theirs)} equal"
    if not equal:
      i = wrong[0] if wrong else min(len(ours), len(theirs))
      note = f"entry {i} of {len(theirs)} differs"
    status = "pass" if equal else "fail"
    rows.append(Row(path.name, name, None, None, 0.0, status, note))
  return rows


def _compare(file, array, ours, theirs, kind) -> Row:
  """One row; numbers that are not finite must be the same at the same place."""
  ours, tolerance = np.asarray(jax.device_get(ours)), TOLERANCES[kind]
  if ours.shape != theirs.shape:
    note = f"shape {list(ours.shape)}, recorded {list(theirs.shape)}"
    return Row(file, array, None, None, tolerance, "fail", note)
  ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
  finite = np.isfinite(theirs)
  same = np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
  apart = np.abs(ours[finite] - theirs[finite])
  largest = float(apart.max(initial=0.0))
  scale = float(np.abs(theirs[finite]).max(initial=0.0)) or 1.0
  error = largest if kind in _ABSOLUTE else largest / scale
  good = same and error <= tolerance  # False for NaN
  note = "" if same else "infinite at other places"
  if kind == "exact" and not good:
    note = f"{int((apart > 0).sum())} of {theirs.size} differ"
  status = "pass" if good else "fail"
  return Row(file, array, largest, largest / scale, tolerance, status, note)


def _unknown(file, array, note) -> Row:
  return Row(file, array, None, None, None, "fail", note)
