"""The plan of an export for the Hugging Face libraries.

`llm/` loads with transformers.LlamaForCausalLM; its rows are text | [IMG]
[/IMG] | codes. `visual_tokenizer.safetensors` holds everything visual under
the official names, each network with a prefix:

  encoder.        the ViT (`encoder.mask_token` if it was trained here)
  tokenizer.      selector, merger, quantizer, codes
  decoder.        the decoder trained with the tokenizer, if it was here
  feature_mean    the mean feature of each patch, of tokenizers trained here
  understanding.  merger and projection with which the language model reads
  lowres.         the two decoders of the official release, if there
  highres.

Its sizes are in `visual_tokenizer.json`. `lowres_pixels/` and
`highres_pixels/` have the folders unet, vae and scheduler, which diffusers
loads; lowres also has unconditional embeddings. The safety checker is in the
folder in which the import found it.
"""

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
)
from lavit_jax.port.tables import names
from lavit_jax.port.writing import export, pixel_files, safety_files

_SHARD = 5 * 10**9  # bytes, the usual size of shards
_VISUAL = "visual_tokenizer"
_NAMES = {
  "encoder.": "vision transformer; official names of eva_vitg_psz14.bin",
  "tokenizer.": "official names of tokenizer_encoder.bin",
  "decoder.": "semantic decoder; official names of tokenizer_decoder.bin",
  "feature_mean": "mean feature of each patch",
  "understanding.": "official names of visual_weight.bin",
  "lowres.": "official names of tokenizer_decoder.bin",
  "highres.": "official names of highres_tokenizer_decoder.bin",
}
_META = (  # fields of a part's meta in visual_tokenizer.json
  "vit",
  "tokenizer",
  "decoder",
  "condition_dim",
  "condition_dims",
  "pooled_dim",
  "vocabulary",
  "llama",
)


def make_plan(model: pathlib.Path) -> export.ExportPlan:
  """Plans the export of a model directory.

  Raises:
    errors.CheckpointError: it has nothing that these files could hold.
  """
  present = checkpoints.parts_in(model)
  parts = {name: checkpoints.StoredPart(model, name) for name in present}
  plans = []
  if "llm" in parts:
    plans.append(_language_model(model, parts["llm"]))
  if visual := _visual(parts):
    plans.append(_visual_plan(parts, visual))
  for name in [n for n in official_layout.PIXEL_FOLDERS if n in parts]:
    plans.append(pixel_files.diffusers_folder(model, parts[name]))
  if (safety := official_layout.SAFETY_PART) in parts:
    plans.append(safety_files.make_plan(model, parts[safety]))
  if not plans:
    raise errors.CheckpointError(
      f"{model} has only {', '.join(present)}, which no Hugging Face file can"
      " hold. Expected a language model, a visual tokenizer or a pixel decoder"
      " in latent space."
    )
  if "pixels" in parts:
    note = "the part pixels was omitted: no Hugging Face class reads it"
    plans.append(export.ExportPlan(notes=(note,)))
  return export.joined(plans)


def _language_model(model, part) -> export.ExportPlan:
  config = llama.LlamaConfig(**part.meta["llama"])
  entries = export.entries(
    names.LLM, part, root="llm/", vocab_size=config.vocab_size
  )
  state = export.StateFile("llm/model", ".safetensors", tuple(entries), _SHARD)
  folder = model / official_layout.KEPT_FOLDER
  kept = small_files.read_all(folder) if folder.is_dir() else {}
  dtype = np.dtype(part.arrays["llm/head"].dtype).name
  files = llama_folder.default_files(config, dtype, kept)
  text_model = official_layout.TOKENIZER_MODEL
  files[text_model] = (model / text_model).read_bytes()
  return export.ExportPlan((state,), {f"llm/{n}": d for n, d in files.items()})


def _visual(parts) -> list[export.Entry]:
  entries = []
  if "encoder" in parts:
    part = parts["encoder"]
    entries += export.present_entries(names.ENCODER, part, prefix="encoder.")
    entries += _as_stored(part, "mask_token", "encoder.mask_token")
  if "tokenizer" in parts:
    part = parts["tokenizer"]
    entries += export.present_entries(
      names.TOKENIZER, part, prefix="tokenizer."
    )
    entries += export.present_entries(
      names.DECODER, part, root="params/decoder/", prefix="decoder."
    )
    entries += _as_stored(part, "feature_mean", "feature_mean")
  if "llm" in parts:
    entries += export.present_entries(
      names.UNDERSTANDING + names.UNDERSTANDING_SELECTOR,
      parts["llm"],
      prefix="understanding.",
    )
  for name, table in names.SEMANTIC_DECODERS.items():
    if name in parts:
      entries += export.present_entries(table, parts[name], prefix=f"{name}.")
  return entries


def _as_stored(part, path, name):
  """Returns an array that no official file has, if the part has it."""
  leaf = part.arrays.get(path)
  if leaf is None:
    return []
  spec = tensor_files.Spec(name, tuple(leaf.shape), np.dtype(leaf.dtype))
  return [export.Entry(spec, part, path)]


def _visual_plan(parts, visual) -> export.ExportPlan:
  state = export.StateFile(_VISUAL, ".safetensors", tuple(visual))
  content = small_files.to_json(_description(parts, visual))
  return export.ExportPlan((state,), {f"{_VISUAL}.json": content})


def _description(parts, visual):
  """Returns the content of visual_tokenizer.json."""
  content = {"format": "lavit_jax.visual_tokenizer.1"}
  for name, part in parts.items():
    meta = {key: part.meta[key] for key in _META if key in part.meta}
    if meta and name != "pixels":
      content[name] = meta
  used = {
    prefix: text
    for prefix, text in _NAMES.items()
    if any(entry.spec.name.startswith(prefix) for entry in visual)
  }
  return content | {"names": used}
