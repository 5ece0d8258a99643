"""Export in the official layout: the files that `official.py` reads.

The same file names, tensor names, shapes and dtypes. What an import found
there is given back: dtypes, the tensors of visual_weight.bin, copies of the
encoder in the tokenizer's file, and the small files of language_model/. The
pixel decoders' folders are those of `pixel_files.py`.
"""

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama
from lavit_jax.port.formats import llama_folder, tensor_files, tensors
from lavit_jax.port.reading import official, pixel_folders, safety_folder
from lavit_jax.port.tables import names
from lavit_jax.port.writing import export, pixel_files, safety_files

_SHARD = 10 * 10**9  # bytes, as transformers 4.33 cuts .bin files
_HEAD = 1024  # classes of EVA's unused head in the official file
_COPY = "encoder."
_NEEDED = ("encoder", "tokenizer", "llm")


def make(model) -> export.Export:
  """What to write for a model directory (pathlib.Path).

  A model of nothing but pixel decoders gives their files alone.

  Raises:
    errors.CheckpointError: a part is missing, or the layout cannot hold it.
  """
  have = checkpoints.parts_in(model)
  missing = [part for part in _NEEDED if part not in have]
  kinds = (*pixel_folders.FOLDERS, safety_folder.PART)
  drawn = [part for part in kinds if part in have]
  alone = bool(drawn) and len(missing) == len(_NEEDED)
  if missing and not alone:
    raise errors.CheckpointError(
      f"{model} has no {', '.join(missing)}: the official layout is encoder,"
      " tokenizer and language model together. Use --format huggingface."
    )
  parts = {name: checkpoints.StoredPart(model, name) for name in have}
  states, files, notes = [], {}, []
  if alone:
    listed = ",".join(part for part in have if part in official.ALL_PARTS)
    notes.append(
      f"no {', '.join(missing)}: import it again with --only {listed}"
    )
  else:
    states, files = _understanding(model, parts)
  more, said = _decoders(model, parts)
  for one in more:
    states += one.states
    files |= one.files
  return export.Export(tuple(states), files, (*notes, *said))


def _understanding(model, parts):
  """Files of encoder, tokenizer and language model."""
  _check_layout(parts["llm"])
  kept = _kept(model)
  encoder = _encoder(parts["encoder"])
  found = {
    "encoder": encoder,
    "tokenizer": _tokenizer(parts, encoder, kept),
    "overlay": _overlay(parts, encoder, kept),
  }
  states = [_state(name, entries) for name, entries in found.items()]
  states.append(_language_model(parts["llm"], kept))
  return states, _small_files(model, parts["llm"])


def _decoders(model, parts):
  """Files of the decoders, and notes on those that are not there."""
  found, notes = [], []
  for name, table in (("lowres", names.LOWRES), ("highres", names.HIGHRES)):
    if name in parts:
      state = _state(name, export.entries(table, parts[name]))
      found.append(export.Export((state,), {}))
    else:
      notes.append(f"no {official.FILES[name]}: the model has no part {name}")
  for name, folder in pixel_folders.FOLDERS.items():
    if name in parts:
      found.append(pixel_files.official_folder(model, parts[name]))
      if name == "lowres_pixels" and "uncond" not in parts[name].arrays:
        notes.append(
          f"no {folder}/{pixel_folders.UNCOND}: training makes these embeddings"
        )
    else:
      notes.append(f"no {folder}/: the model has no part {name}")
  if safety_folder.PART in parts:
    part = parts[safety_folder.PART]
    found.append(safety_files.make(model, part, official.OFFICIAL))
  if "pixels" in parts:
    notes.append("the part pixels has no place in the official layout")
  return found, notes


def _state(name, entries) -> export.StateFile:
  stem = official.FILES[name].removesuffix(".bin")
  return export.StateFile(stem, ".bin", tuple(entries))


def _check_layout(llm):
  words = llm.meta["vocabulary"]
  if words["text_size"] != official.TEXT_SIZE:
    raise errors.CheckpointError(
      f"This model has {words['text_size']} text pieces; in the official"
      f" layout [IMG] is {official.TEXT_SIZE} always, after as many pieces."
      " Use --format huggingface."
    )
  if "projection/kernel" not in llm.arrays:
    raise errors.CheckpointError(
      "This language model has no branch that reads images (merger and"
      " projection), which the official visual_weight.bin holds. Train stage 2"
      " from it first, or use --format huggingface."
    )


def _kept(model) -> dict[str, tensors.Tensor]:
  """Tensors that an import kept for this, by file and name."""
  found = {}
  for part in _NEEDED:
    path = model / official.OFFICIAL / tensor_files.KEPT.format(part)
    found |= tensors.open_file(path) if path.is_file() else {}
  return found


def _kept_entry(name, tensor) -> export.Entry:
  spec = tensor_files.Spec(name, tensor.shape, tensor.dtype)
  return export.Entry(spec, value=tensor.read, path=name)


def _encoder(part) -> list[export.Entry]:
  """EVA's tensors; norm and head, which LaVIT skips, filled in if need be."""
  table = [r for r in names.ENCODER if r.ours in part.arrays]
  found = export.entries(tuple(table), part)
  width = part.meta["vit"]["width"]
  dtype = part.arrays["cls_token"].dtype
  shapes = {
    "norm.weight": (width,),
    "norm.bias": (width,),
    "head.weight": (_HEAD, width),
    "head.bias": (_HEAD,),
  }
  have = {entry.spec.name for entry in found}
  for name, shape in shapes.items():
    if name not in have:
      value = np.asarray(float(name == "norm.weight"), dtype)
      spec = tensor_files.Spec(name, shape, np.dtype(dtype))
      found.append(export.Entry(spec, value=lambda v=value: v, path=name))
  return found


def _tokenizer(parts, encoder, kept) -> list[export.Entry]:
  part = parts["tokenizer"]
  table = tuple(r for r in names.TOKENIZER if r.ours in part.arrays)
  found = export.entries(table, part)
  if len(table) < len(names.TOKENIZER):  # trained here: the LLM's projection
    projection = names.UNDERSTANDING[-2:]
    found += export.entries(projection, parts["llm"])
  copies = part.meta.get("port", {}).get("encoder_copies", [])
  file = official.FILES["tokenizer"]
  return found + [_copy(file, name, encoder, kept) for name in copies]


def _copy(file, name, encoder, kept) -> export.Entry:
  """A tensor `encoder.*` of another file than the encoder's."""
  if tensor := kept.get(f"{file}:{name}"):
    return _kept_entry(name, tensor)
  wanted = name.removeprefix(_COPY)
  entry = next(e for e in encoder if e.spec.name == wanted)
  spec = tensor_files.Spec(name, entry.spec.shape, entry.spec.dtype)
  return export.Entry(
    spec, entry.part, entry.path, entry.layer, entry.transform, entry.value
  )


def _overlay(parts, encoder, kept) -> list[export.Entry]:
  """The tensors of visual_weight.bin: those it had, else the whole branch."""
  llm, file = parts["llm"], official.FILES["overlay"]
  table = names.UNDERSTANDING
  if "selector/norm/scale" in llm.arrays:
    table = table + names.UNDERSTANDING_SELECTOR
  found = export.entries(table, llm)
  listed = llm.meta.get("port", {}).get("overlay")
  if listed is None:
    return found
  by_name = {entry.spec.name: entry for entry in found}
  return [
    by_name[name]
    if name in by_name
    else _kept_entry(name, kept[f"{file}:{name}"])
    if f"{file}:{name}" in kept
    else _copy(file, name, encoder, kept)
    for name in listed
  ]


def _language_model(llm, kept) -> export.StateFile:
  rows = llm.meta["llama"]["vocab_size"]
  found = export.entries(names.LLM, llm, root="llm/", rows=rows)
  prefix = f"{official.LLM_FOLDER}:"
  found += [
    _kept_entry(name.removeprefix(prefix), tensor)
    for name, tensor in kept.items()
    if name.startswith(prefix)
  ]
  stem = f"{official.LLM_FOLDER}/pytorch_model"
  return export.StateFile(stem, ".bin", tuple(found), _SHARD)


def _small_files(model, llm) -> dict[str, bytes]:
  """Files beside the language model: those of the import, else made."""
  kept = {}
  if (model / official.OFFICIAL).is_dir():
    kept = llama_folder.small_files(model / official.OFFICIAL)
  if not kept:
    config = llama.LlamaConfig(**llm.meta["llama"])
    dtype = llm.arrays["llm/head"].dtype
    kept = llama_folder.default_files(config, np.dtype(dtype).name, {})
  kept[official.WORDS] = (model / official.WORDS).read_bytes()
  return {f"{official.LLM_FOLDER}/{name}": data for name, data in kept.items()}
