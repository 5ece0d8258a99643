"""The language model of the official layout, and its branch that reads images.

The branch is the tokenizer's merger and projection (and selector), with the
tensors of visual_weight.bin (the *overlay*) in place of those of the same name
in tokenizer_encoder.bin.
"""

import dataclasses
from typing import Any

from lavit_jax.core import errors, vocabulary
from lavit_jax.models import llama
from lavit_jax.port.formats import (
  llama_config,
  llama_folder,
  official_layout,
  small_files,
  tensors,
)
from lavit_jax.port.reading import official_files, official_visual, plan
from lavit_jax.port.tables import names, rows, sizes

_FOLDER = official_layout.LLM_FOLDER
_OVERLAY = official_layout.FILES["overlay"]
_TOKENIZER = official_layout.FILES["tokenizer"]


def read(
  files: official_files.OfficialFiles, visual: official_visual.VisualReader
) -> plan.Part | None:
  """Plans the part `llm`; None where a size of it is unknown.

  Args:
    files: opened; receives problems, notes, small files and kept tensors.
    visual: knows the sizes of encoder and tokenizer.

  Raises:
    errors.CheckpointError: weights or config are missing or damaged, or do not
      belong to the tokenizer.
  """
  weights = tensors.open_shards(files.folder / _FOLDER, _FOLDER)
  label = f"{_FOLDER}/config.json"
  described = llama_config.read(files.folder / label, label)
  files.notes += described.notes
  if described.tied:
    llama_folder.tie(weights, _FOLDER)
  codes = files.size("tokenizer", sizes.num_codes)
  config = _llama_config(files, described, weights, codes)
  arrays = _llama_arrays(files, weights, config)
  arrays += _branch_arrays(files, visual.tokenizer_tree, config)
  meta = None
  if config and codes and visual.vit:
    vocab = vocabulary.Vocabulary(official_layout.TEXT_SIZE, codes)
    meta = {
      "llama": dataclasses.asdict(config),
      "vocabulary": dataclasses.asdict(vocab),
      "capacity": visual.vit.num_patches,
    }
  _take_small_files(files)
  overlay = list(files.tensors["overlay"])
  return official_files.part_of("llm", arrays, meta, overlay=overlay)


def _llama_config(files, described, weights, codes) -> llama.LlamaConfig | None:
  """Returns the sizes of the LLaMA; None where any is unknown."""
  embedding = weights.get(llama_folder.EMBEDDING)
  if embedding is None or len(embedding.shape) != 2:
    files.problems.add(
      "size that no tensor shows", f"{_FOLDER}: rows of the vocabulary"
    )
    return None
  if not codes:
    return None
  file_rows, text_size = embedding.shape[0], official_layout.TEXT_SIZE
  needed = vocabulary.Vocabulary(text_size, codes).size
  needed = max(needed, described.vocab_size or 0)
  if file_rows < needed:
    raise errors.CheckpointError(
      f"{_FOLDER} has a vocabulary of {file_rows} rows; {text_size} text"
      f" pieces, two image marks, {codes} codes of {_TOKENIZER}, and vocab_size"
      f" in config.json ({described.vocab_size}) need at least {needed}. The"
      " language model and the tokenizer are not of one checkpoint."
    )
  return llama.LlamaConfig(vocab_size=file_rows, **described.fields)


def _llama_arrays(files, weights, config) -> list[plan.Array]:
  for name, tensor in weights.items():
    if names.is_unused(names.LLM, name):
      files.keep("llm", _FOLDER, tensor)
  return plan.arrays_of(
    names.LLM,
    weights,
    config and sizes.abstract_llama(config),
    files.problems,
    label=_FOLDER,
    vocab_size=config and config.vocab_size,
    allow=files.allow,
    root="llm/",
  )


def _branch_arrays(files, tree, config) -> list[plan.Array]:
  """Plans the branch: the tokenizer's tensors, replaced by the overlay's."""
  overlay, base = files.tensors["overlay"], files.tensors["tokenizer"]
  with_selector = any(name.startswith("token_predictor.") for name in overlay)
  table = names.UNDERSTANDING
  if with_selector:
    table = table + names.UNDERSTANDING_SELECTOR
  depth = rows.depth_of(names.TOKENIZER, base)
  official = {n for row in table for n in rows.official_names(row, depth)}
  joined = {n: t for n, t in {**base, **overlay}.items() if n in official}
  _check_rest(files, official, tree)
  _check_width(files, tree, config)
  return plan.arrays_of(
    table,
    joined,
    tree and sizes.reading_branch(tree, with_selector),
    files.problems,
    label=f"{_OVERLAY} over {_TOKENIZER}",
    allow=files.allow,
  )


def _check_rest(files, official, tree: dict[str, Any] | None):
  """Checks overlay tensors that reading does not need, and keeps them."""
  copies = files.encoder_copies("overlay", "llm")
  if tree is None:
    return
  shapes = {
    name: value.shape
    for name, value in names.to_official(names.TOKENIZER, tree).items()
  }
  for name, tensor in files.tensors["overlay"].items():
    if name in official or name in copies:
      continue
    if name not in shapes:
      files.problems.add("not used", f"{_OVERLAY}: {name}")
      continue
    if tensor.shape != shapes[name]:
      files.problems.add(
        "wrong shape",
        f"{_OVERLAY}: {name} {list(tensor.shape)} instead of"
        f" {list(shapes[name])}",
      )
    files.keep("llm", _OVERLAY, tensor)


def _check_width(files, tree, config):
  """Checks that the projection has the width of the language model."""
  if not tree or not config:
    return
  width = tree["params"]["llm_proj"]["kernel"].shape[-1]
  if width != config.width:
    files.problems.add(
      "wrong shape",
      f"vit_proj makes vectors of width {width}, the language model reads"
      f" width {config.width}",
    )


def _take_small_files(files):
  """Takes config and tokenizer, and checks the number of text pieces."""
  contents = small_files.read_all(files.folder / _FOLDER)
  file, text_size = official_layout.TOKENIZER_MODEL, official_layout.TEXT_SIZE
  text_model = contents.pop(file)
  pieces = vocabulary.TextTokenizer(text_model, f"{_FOLDER}/{file}").size
  if pieces > text_size:
    files.problems.add(
      "vocabulary that does not fit",
      f"{_FOLDER}/{file} has {pieces} pieces, but [IMG] has the id {text_size}",
    )
  files.small[file] = text_model
  kept = official_layout.KEPT_FOLDER
  files.small |= {f"{kept}/{name}": data for name, data in contents.items()}
