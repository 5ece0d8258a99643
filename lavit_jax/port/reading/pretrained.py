"""Weights from which training starts: LLaMA, EVA-CLIP, Stable Diffusion.

A LLaMA folder becomes the part `llm` without the branch that reads images. Its
text rows are kept, and the vocabulary grows to text | [IMG] [/IMG] | codes. The
new rows of embedding and head are drawn from a normal distribution with mean 0
and the standard deviation of the text rows of the same array, so that old and
new rows have the same scale, whatever the size of the model.

A folder of Stable Diffusion becomes `lowres_pixels`, or `highres_pixels` if its
U-Net has SDXL's additional embedding. Its text encoders are not needed, and
training makes the unconditional embeddings.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence

import numpy as np

from lavit_jax.core import errors, vocabulary
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.formats import (
  llama_config,
  llama_folder,
  official_layout,
  small_files,
  tensors,
)
from lavit_jax.port.reading import pixel_folders, plan
from lavit_jax.port.tables import names, rows, sizes

_CHUNK = 4096  # rows drawn or measured at a time
_UNUSED_BY_LAVIT = ("norm.", "fc_norm.", "head.")
_PREFIX = "visual."


def require_only(
  only: Sequence[str] | None, part: str, source: pathlib.Path
) -> None:
  """Raises UsageError if `only` asks for parts that the source lacks.

  Args:
    only: parts that the user asks for; None for all.
    part: the single part that the source has.
    source: its path, for the message.
  """
  if only is not None and set(only) != {part}:
    raise errors.UsageError(
      f"--only {','.join(only)}: {source} has nothing but the part {part}."
      " Omit --only."
    )


def llama_plan(
  folder: pathlib.Path,
  *,
  codes: int,
  seed: int = 0,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """Plans the import of a Hugging Face LLaMA folder as the part `llm`.

  Args:
    folder: with config.json, tokenizer.model and weights.
    codes: K, visual codes of the tokenizer it will be trained with.
    seed: of the new rows; embedding and head use different streams.
    allow: official names that may be missing.

  Raises:
    errors.UsageError: the seed is negative, or `allow` has wrong names.
    errors.CheckpointError: it is another network, a tensor is missing, not
      used or of a wrong shape, or there are fewer rows than text pieces.
  """
  plan.check_allowed(allow, [names.LLM])
  if seed < 0:
    raise errors.UsageError(f"--seed {seed}: expected 0 or a larger number.")
  label = folder.name
  read = llama_config.read(folder / "config.json", f"{label}/config.json")
  text_model, text_size = _text_model(folder)
  vocab = vocabulary.Vocabulary(text_size, codes)
  config = llama.LlamaConfig(vocab_size=vocab.size, **read.fields)
  by_name = tensors.open_shards(folder, label)
  if read.tied:
    llama_folder.tie(by_name, label)
  file_rows = _count_rows(by_name, text_size, label)
  arrays = _llama_arrays(config, by_name, file_rows, label, allow)
  meta = {
    "llama": dataclasses.asdict(config),
    "vocabulary": dataclasses.asdict(vocab),
    "port": {"source": "llama", "codes": codes, "seed": seed},
  }
  notes = [
    f"rows {text_size} to {vocab.size - 1} of embedding and head are new,"
    f" drawn with seed {seed}",
    *read.notes,
  ]
  if file_rows > text_size:
    extra = file_rows - text_size
    notes.append(f"{extra} rows beyond tokenizer.model were ignored")
  grown = tuple(_grown(array, config, vocab, seed) for array in arrays)
  return plan.ImportPlan(
    source="llama",
    parts=(plan.Part("llm", grown, meta),),
    files={official_layout.TOKENIZER_MODEL: text_model},
    notes=tuple(notes),
  )


def _text_model(folder) -> tuple[bytes, int]:
  """Returns the content of tokenizer.model and its number of pieces."""
  path = folder / official_layout.TOKENIZER_MODEL
  if not path.is_file():
    raise errors.CheckpointError(
      f"{path} is missing: lavit_jax reads text with a SentencePiece model."
      " Llama 1 and 2 have one; tokenizers of other kinds are not supported."
    )
  return path.read_bytes(), vocabulary.TextTokenizer.load(path).size


def _count_rows(by_name, text_size, label):
  """Returns the rows of the vocabulary in the file."""
  name = llama_folder.EMBEDDING
  shape = by_name[name].shape if name in by_name else ()
  if len(shape) == 2 and shape[0] < text_size:
    raise errors.CheckpointError(
      f"{label} has {shape[0]} rows of embeddings for the {text_size} pieces"
      " of its tokenizer.model. They belong to different models."
    )
  return shape[0] if len(shape) == 2 else text_size


def _llama_arrays(config, by_name, file_rows, label, allow):
  """Plans the arrays of the file, before the vocabulary grows."""
  problems = plan.Problems(label)
  in_file = dataclasses.replace(config, vocab_size=file_rows)
  arrays = plan.arrays_of(
    names.LLM,
    by_name,
    sizes.abstract_llama(in_file),
    problems,
    label=label,
    vocab_size=file_rows,
    allow=allow,
    root="llm/",
  )
  problems.check()
  return arrays


def _grown(array, config, vocab, seed) -> plan.Array:
  """Returns the array, with random rows added if it is of the vocabulary."""
  if array.transform != "rows":
    return array
  stream = (seed, int(array.path.endswith("head")))
  return dataclasses.replace(
    array,
    shape=(config.padded_vocab, *array.shape[1:]),
    finish=lambda out: _draw_rows(out, vocab.text_size, vocab.size, stream),
  )


def _draw_rows(out, start, stop, seed):
  """Fills rows start … stop-1 as the module's docstring says, later ones by 0.

  Args:
    out: float[rows, D], whose first `start` rows are text.
    start: first row to fill.
    stop: end of the rows to fill.
    seed: of numpy's generator.
  """
  count, total, squares = 0, 0.0, 0.0
  for i in range(0, start, _CHUNK):
    chunk = out[i : min(i + _CHUNK, start)].astype(np.float64)
    count += chunk.size
    total += chunk.sum()
    squares += np.square(chunk).sum()
  std = float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
  rng = np.random.default_rng(seed)
  for i in range(start, stop, _CHUNK):
    chunk = out[i : min(i + _CHUNK, stop)]
    chunk[...] = std * rng.standard_normal(chunk.shape, np.float32)
  out[stop:] = 0


def encoder_plan(
  path: pathlib.Path,
  *,
  heads: int | None = None,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """Plans the import of an EVA-CLIP vision transformer as the part `encoder`.

  Args:
    path: a file of `tensors.SUFFIXES` with the names of `names.ENCODER`:
      plain, or under "visual." (the text tower beside it is ignored), or in a
      dict under "model", "module" or "state_dict".
    heads: attention heads, 16 by default.
    allow: official names that may be missing.

  Raises:
    errors.UsageError: the heads do not divide the width, or `allow` has wrong
      names.
    errors.CheckpointError: a tensor is missing, not used or of a wrong shape.
  """
  plan.check_allowed(allow, [names.ENCODER])
  opened = tensors.open_file(path, unwrap=True)
  by_name = _without_prefix(opened, path.name)
  notes = []
  if len(by_name) < len(opened):
    others = len(opened) - len(by_name)
    notes.append(f"{others} tensors outside {_PREFIX!r} were ignored")
  table, by_name, ignored = _without_head(by_name)
  notes += [f"{name} was ignored: LaVIT does not use it" for name in ignored]
  heads, origin = sizes.head_count(path.parent, heads)
  problems = plan.Problems(path.name)
  with_head = table is names.ENCODER
  config, tree = _encoder_sizes(
    by_name, heads, origin, with_head, path.name, problems
  )
  arrays = plan.arrays_of(
    table, by_name, tree, problems, label=path.name, allow=allow
  )
  problems.check()
  assert config is not None  # else there was a problem
  meta = {"vit": dataclasses.asdict(config), "port": {"source": "eva"}}
  return plan.ImportPlan(
    source="eva",
    parts=(plan.Part("encoder", tuple(arrays), meta),),
    files={},
    notes=(f"{heads} attention heads: {origin}", *notes),
  )


def _without_prefix(by_name, label):
  """Returns the tensors under "visual." if there are any, else all."""
  visual = {
    name.removeprefix(_PREFIX): tensor
    for name, tensor in by_name.items()
    if name.startswith(_PREFIX)
  }
  if twice := sorted(set(visual) & set(by_name)):
    raise errors.CheckpointError(
      f"{label} has names with and without {_PREFIX!r}: {', '.join(twice)}."
      " It is ambiguous which encoder to use; save one of them alone."
    )
  return visual or by_name


def _without_head(
  by_name: tensors.Tensors,
) -> tuple[rows.Table, tensors.Tensors, list[str]]:
  """Removes an incomplete head: LaVIT reads the last block and needs none.

  Returns:
    The table and the tensors, without final norm and head unless both are
    there, and the names that were removed.
  """
  if all(any(n.startswith(p) for n in by_name) for p in ("norm.", "head.")):
    return names.ENCODER, by_name, []
  table = tuple(
    row
    for row in names.ENCODER
    if not row.official.startswith(_UNUSED_BY_LAVIT)
  )
  ignored = [n for n in by_name if n.startswith(_UNUSED_BY_LAVIT)]
  return table, {n: t for n, t in by_name.items() if n not in ignored}, ignored


def _encoder_sizes(
  by_name, heads, origin, with_head, label, problems
) -> tuple[vision.ViTConfig | None, dict | None]:
  """Returns config and abstract params; None twice where sizes are unknown."""
  shapes = {name: tensor.shape for name, tensor in by_name.items()}
  try:
    # The heads are checked apart, for a message that says where they are from.
    config = sizes.vit(shapes, 1, with_head=with_head)
    sizes.check_heads(config.width, heads, origin)
    config = dataclasses.replace(config, num_heads=heads)
    return config, sizes.abstract_encoder(config)
  except sizes.UnknownSize as e:
    problems.add("size that no tensor shows", f"{label}: {e}")
    return None, None


def is_diffusers(folder: pathlib.Path) -> bool:
  """Returns whether a folder looks like a diffusers pipeline with a U-Net."""
  return (folder / "unet" / pixel_folders.CONFIG).is_file()


def diffusers_plan(
  folder: pathlib.Path,
  only: Sequence[str] | None = None,
  *,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """Plans the import of a folder of Stable Diffusion as a pixel part.

  Args:
    folder: with unet/, vae/ and scheduler/; of the rest only LaVIT's own
      unconditional embeddings are read, if they are there.
    only: None, or the part that it becomes.
    allow: official names that may be missing.

  Raises:
    errors.UsageError: another part is asked for.
    errors.CheckpointError: files or tensors are missing, not used or of a
      wrong shape, or a network or scheduler is of another kind.
  """
  label, problems = folder.name, plan.Problems(folder.name)
  for file in pixel_folders.missing(folder, label, with_uncond=False):
    problems.add("missing file", file)
  problems.check()
  part = _pixel_part(folder, f"{label}/unet/{pixel_folders.CONFIG}")
  require_only(only, part, folder)
  has_uncond = (folder / official_layout.UNCOND).is_file()
  with_uncond = part == "lowres_pixels" and has_uncond
  reader = pixel_folders.Reader(folder, label, part, with_uncond)
  plan.check_allowed(allow, reader.tables)
  read = reader.read(problems, allow)
  problems.check()
  meta = read.meta | {"port": {"source": "diffusers", **read.meta["port"]}}
  root = f"{official_layout.KEPT_FOLDER}/{official_layout.PIXEL_FOLDERS[part]}"
  files = {
    f"{root}/{path}": data
    for path, data in reader.small_files().items()
    if "/" in path  # files at the top are of the complete pipeline
  }
  return plan.ImportPlan(
    source="diffusers",
    parts=(dataclasses.replace(read, meta=meta),),
    files=files,
    notes=tuple(reader.notes()),
  )


def _pixel_part(folder, label) -> str:
  """Returns the part that a pipeline becomes, which depends on its U-Net."""
  path = folder / "unet" / pixel_folders.CONFIG
  config = config_lib.unet_config(small_files.read_json(path, label), label)
  return "highres_pixels" if config.details.added_dim else "lowres_pixels"
