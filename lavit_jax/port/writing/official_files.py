"""The plan of an export in the official layout, which `official.py` reads.

File names, tensor names, shapes and dtypes are the official ones. What an
import found there is restored: dtypes, the tensors of visual_weight.bin, copies
of the encoder in the tokenizer's file, and the small files of language_model/.
`pixel_files.py` plans the folders of the pixel decoders.
"""

import dataclasses
import pathlib

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama
from lavit_jax.port.formats import (
  llama_folder,
  official_layout,
  small_files,
  tensor_files,
  tensors,
)
from lavit_jax.port.tables import names, sizes
from lavit_jax.port.writing import export, pixel_files, safety_files

_SHARD = 10 * 10**9  # bytes, the size of transformers 4.33's .bin shards
_NEEDED = ("encoder", "tokenizer", "llm")


def make_plan(model: pathlib.Path) -> export.ExportPlan:
  """Plans the export of a model directory.

  A model of nothing but pixel decoders becomes their files alone.

  Raises:
    errors.CheckpointError: a part is missing, or the layout cannot hold it.
  """
  present = checkpoints.parts_in(model)
  missing = [part for part in _NEEDED if part not in present]
  optional = (*official_layout.PIXEL_FOLDERS, official_layout.SAFETY_PART)
  has_optional = any(part in present for part in optional)
  only_optional = has_optional and len(missing) == len(_NEEDED)
  if missing and not only_optional:
    raise errors.CheckpointError(
      f"{model} has no {', '.join(missing)}: the official layout consists of"
      " encoder, tokenizer and language model. Use --format huggingface."
    )
  parts = {name: checkpoints.StoredPart(model, name) for name in present}
  if only_optional:
    parts_option = ",".join(
      p for p in present if p in official_layout.ALL_PARTS
    )
    note = (
      f"no {', '.join(missing)}: import it again with --only {parts_option}"
    )
    plans = [export.ExportPlan(notes=(note,))]
  else:
    plans = [_core_plan(model, parts)]
  return export.joined([*plans, *_decoder_plans(model, parts)])


def _core_plan(model, parts) -> export.ExportPlan:
  """Plans the files of encoder, tokenizer and language model."""
  _check_layout(parts["llm"])
  kept = _kept_tensors(model)
  encoder = _encoder(parts["encoder"])
  entries_of_file = {
    "encoder": encoder,
    "tokenizer": _tokenizer(parts, encoder, kept),
    "overlay": _overlay(parts["llm"], encoder, kept),
  }
  states = [_state(name, entries) for name, entries in entries_of_file.items()]
  states.append(_language_model(parts["llm"], kept))
  return export.ExportPlan(tuple(states), _small_files(model, parts["llm"]))


def _decoder_plans(model, parts) -> list[export.ExportPlan]:
  """Plans the files of the decoders, with notes on those that are missing."""
  plans, notes = [], []
  for name, table in names.SEMANTIC_DECODERS.items():
    if name in parts:
      state = _state(name, export.entries(table, parts[name]))
      plans.append(export.ExportPlan((state,)))
    else:
      file = official_layout.FILES[name]
      notes.append(f"no {file}: the model has no part {name}")
  for name, folder in official_layout.PIXEL_FOLDERS.items():
    if name in parts:
      plans.append(pixel_files.official_folder(model, parts[name]))
      if name == "lowres_pixels" and "uncond" not in parts[name].arrays:
        file = f"{folder}/{official_layout.UNCOND}"
        notes.append(f"no {file}: training makes these embeddings")
    else:
      notes.append(f"no {folder}/: the model has no part {name}")
  if (safety := official_layout.SAFETY_PART) in parts:
    plans.append(safety_files.make_plan(model, parts[safety]))
  if "pixels" in parts:
    notes.append("the part pixels has no file in the official layout")
  return [*plans, export.ExportPlan(notes=tuple(notes))]


def _state(name, entries) -> export.StateFile:
  stem = official_layout.FILES[name].removesuffix(".bin")
  return export.StateFile(stem, ".bin", tuple(entries))


def _check_layout(llm):
  text_size = llm.meta["vocabulary"]["text_size"]
  if text_size != official_layout.TEXT_SIZE:
    raise errors.CheckpointError(
      f"This model has {text_size} text pieces; the official layout always has"
      f" {official_layout.TEXT_SIZE}, so that [IMG] has the id"
      f" {official_layout.TEXT_SIZE}. Use --format huggingface."
    )
  if "projection/kernel" not in llm.arrays:
    raise errors.CheckpointError(
      "This language model has no branch that reads images (merger and"
      " projection), which the official visual_weight.bin holds. Train stage 2"
      " from it first, or use --format huggingface."
    )


def _kept_tensors(model) -> dict[str, tensors.Tensor]:
  """Returns the tensors that an import kept, by file and name."""
  kept: tensors.Tensors = {}
  for part in _NEEDED:
    file = official_layout.KEPT_TENSORS.format(part)
    path = model / official_layout.KEPT_FOLDER / file
    kept |= tensors.open_file(path) if path.is_file() else {}
  return kept


def _kept_entry(name, tensor) -> export.Entry:
  spec = tensor_files.Spec(name, tensor.shape, tensor.dtype)
  return export.Entry(spec, value=tensor.read, path=name)


def _encoder(part) -> list[export.Entry]:
  """Returns EVA's tensors, with placeholders for an absent norm and head."""
  entries = export.present_entries(names.ENCODER, part)
  width = part.meta["vit"]["width"]
  dtype = np.dtype(part.arrays["cls_token"].dtype)
  shapes = {
    "norm.weight": (width,),
    "norm.bias": (width,),
    "head.weight": (sizes.EVA_CLASSES, width),
    "head.bias": (sizes.EVA_CLASSES,),
  }
  present = {entry.spec.name for entry in entries}
  return entries + [
    _constant_entry(name, shape, dtype, float(name == "norm.weight"))
    for name, shape in shapes.items()
    if name not in present
  ]


def _constant_entry(name, shape, dtype, value) -> export.Entry:
  spec = tensor_files.Spec(name, shape, dtype)
  array = np.asarray(value, dtype)
  return export.Entry(spec, value=lambda: array, path=name)


def _tokenizer(parts, encoder, kept) -> list[export.Entry]:
  part = parts["tokenizer"]
  entries = export.present_entries(names.TOKENIZER, part)
  if not all(row.path in part.arrays for row in names.TOKENIZER):
    # A tokenizer that was trained here has no projection: the LLM has it.
    entries += export.entries(names.PROJECTION, parts["llm"])
  copies = part.meta.get("port", {}).get("encoder_copies", [])
  return entries + [_copy("tokenizer", name, encoder, kept) for name in copies]


def _copy(file, name, encoder, kept) -> export.Entry:
  """Returns a tensor `encoder.*` of another file than the encoder's."""
  if tensor := kept.get(f"{official_layout.FILES[file]}:{name}"):
    return _kept_entry(name, tensor)
  original = name.removeprefix(official_layout.ENCODER_COPY)
  entry = next(e for e in encoder if e.spec.name == original)
  return dataclasses.replace(
    entry, spec=dataclasses.replace(entry.spec, name=name)
  )


def _overlay(llm, encoder, kept) -> list[export.Entry]:
  """Returns the tensors of visual_weight.bin.

  They are those that an imported file had, else the complete branch.
  """
  table, file = names.UNDERSTANDING, official_layout.FILES["overlay"]
  if "selector/norm/scale" in llm.arrays:
    table = table + names.UNDERSTANDING_SELECTOR
  entries = export.entries(table, llm)
  imported = llm.meta.get("port", {}).get("overlay")
  if imported is None:
    return entries
  by_name = {entry.spec.name: entry for entry in entries}
  return [
    by_name[name]
    if name in by_name
    else _kept_entry(name, kept[f"{file}:{name}"])
    if f"{file}:{name}" in kept
    else _copy("overlay", name, encoder, kept)
    for name in imported
  ]


def _language_model(llm, kept) -> export.StateFile:
  entries = export.entries(
    names.LLM, llm, root="llm/", vocab_size=llm.meta["llama"]["vocab_size"]
  )
  prefix = f"{official_layout.LLM_FOLDER}:"
  entries += [
    _kept_entry(name.removeprefix(prefix), tensor)
    for name, tensor in kept.items()
    if name.startswith(prefix)
  ]
  stem = f"{official_layout.LLM_FOLDER}/pytorch_model"
  return export.StateFile(stem, ".bin", tuple(entries), _SHARD)


def _small_files(model, llm) -> dict[str, bytes]:
  """Returns the files beside the language model: kept ones, or else new."""
  folder = model / official_layout.KEPT_FOLDER
  files = small_files.read_all(folder) if folder.is_dir() else {}
  if not files:
    config = llama.LlamaConfig(**llm.meta["llama"])
    dtype = np.dtype(llm.arrays["llm/head"].dtype).name
    files = llama_folder.default_files(config, dtype, {})
  text_model = official_layout.TOKENIZER_MODEL
  files[text_model] = (model / text_model).read_bytes()
  root = official_layout.LLM_FOLDER
  return {f"{root}/{name}": data for name, data in files.items()}
