"""Export for the Hugging Face libraries.

`llm/` loads with transformers.LlamaForCausalLM; its rows are text | [IMG]
[/IMG] | codes. `visual_tokenizer.safetensors` holds everything visual under
the official names, each network with a prefix:

  encoder.        the ViT (`encoder.mask_token` if it was trained here)
  tokenizer.      selector, merger, quantizer, codes
  decoder.        the decoder trained with the tokenizer, if it was here
  feature_mean    the mean feature of each patch, of tokenizers trained here
  understanding.  the merger and projection that the language model reads by
  lowres.         the two decoders of the official release, if there
  highres.

Its sizes are in `visual_tokenizer.json`. `lowres_pixels/` and
`highres_pixels/` have the folders unet, vae and scheduler, which diffusers
loads, and lowres the embeddings of its unconditional stream. A safety checker
lies where the import found it.
"""

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama
from lavit_jax.port.formats import llama_folder, tensor_files
from lavit_jax.port.reading import official, pixel_folders, safety_folder
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


def make(model) -> export.Export:
  """What to write for a model directory (pathlib.Path).

  Raises:
    errors.CheckpointError: it has nothing that these files could hold.
  """
  have = checkpoints.parts_in(model)
  parts = {name: checkpoints.StoredPart(model, name) for name in have}
  states, files, notes = [], {}, []
  if "llm" in parts:
    states.append(_language_model(parts["llm"]))
    files |= _llm_files(model, parts["llm"])
  visual = _visual(parts)
  if visual:
    states.append(export.StateFile(_VISUAL, ".safetensors", tuple(visual)))
    files[f"{_VISUAL}.json"] = llama_folder.to_json(_sizes(parts, visual))
  for name in [name for name in pixel_folders.FOLDERS if name in parts]:
    folder = pixel_files.diffusers_folder(model, parts[name])
    states += folder.states
    files |= folder.files
  if safety_folder.PART in parts:
    folder = safety_files.make(
      model, parts[safety_folder.PART], official.OFFICIAL
    )
    states += folder.states
    files |= folder.files
  if not states:
    raise errors.CheckpointError(
      f"{model} has only {', '.join(have)}: nothing that Hugging Face files"
      " could hold. Expected a language model, a visual tokenizer or a pixel"
      " decoder in latents."
    )
  if "pixels" in parts:
    notes.append("the part pixels was left: no Hugging Face class reads it")
  return export.Export(tuple(states), files, tuple(notes))


def _language_model(part) -> export.StateFile:
  rows = part.meta["llama"]["vocab_size"]
  found = export.entries(names.LLM, part, root="llm/", rows=rows)
  return export.StateFile("llm/model", ".safetensors", tuple(found), _SHARD)


def _llm_files(model, part) -> dict[str, bytes]:
  kept, folder = {}, model / official.OFFICIAL
  if folder.is_dir():
    kept = llama_folder.small_files(folder)
  config = llama.LlamaConfig(**part.meta["llama"])
  dtype = np.dtype(part.arrays["llm/head"].dtype).name
  files = llama_folder.default_files(config, dtype, kept)
  files[official.WORDS] = (model / official.WORDS).read_bytes()
  return {f"llm/{name}": data for name, data in files.items()}


def _visual(parts) -> list[export.Entry]:
  found = []
  if "encoder" in parts:
    found += _present(names.ENCODER, parts["encoder"], "encoder.")
    found += _extra(parts["encoder"], "mask_token", "encoder.mask_token")
  if "tokenizer" in parts:
    part = parts["tokenizer"]
    found += _present(names.TOKENIZER, part, "tokenizer.")
    root = "params/decoder/"
    found += _present(names.DECODER, part, "decoder.", root)
    found += _extra(part, "feature_mean", "feature_mean")
  if "llm" in parts:
    table = names.UNDERSTANDING + names.UNDERSTANDING_SELECTOR
    found += _present(table, parts["llm"], "understanding.")
  for name, table in (("lowres", names.LOWRES), ("highres", names.HIGHRES)):
    if name in parts:
      found += _present(table, parts[name], f"{name}.")
  return found


def _present(table, part, prefix, root=""):
  """Entries of the rows of a table that the part has."""
  rows = tuple(row for row in table if root + row.ours in part.arrays)
  return export.entries(rows, part, root=root, prefix=prefix)


def _extra(part, path, name):
  """An array that no official file has, as it is."""
  leaf = part.arrays.get(path)
  if leaf is None:
    return []
  spec = tensor_files.Spec(name, tuple(leaf.shape), np.dtype(leaf.dtype))
  return [export.Entry(spec, part, path)]


def _sizes(parts, visual):
  """The content of visual_tokenizer.json."""
  content = {"format": "lavit_jax.visual_tokenizer.1"}
  for name, part in parts.items():
    fields = ("vit", "tokenizer", "decoder", "condition_dim", "condition_dims")
    fields += ("pooled_dim", "vocabulary", "llama")
    meta = {key: part.meta[key] for key in fields if key in part.meta}
    if meta and name != "pixels":
      content[name] = meta
  used = {
    prefix: text
    for prefix, text in _NAMES.items()
    if any(entry.spec.name.startswith(prefix) for entry in visual)
  }
  return content | {"names": used}
