"""Weights that training starts from: LLaMA, EVA-CLIP, Stable Diffusion.

A LLaMA folder becomes the part `llm` without a reading branch. Its text rows
are kept, and the vocabulary grows to text | [IMG] [/IMG] | codes: "new visual
rows of embedding and head start at random". They are drawn here from a normal
distribution of mean 0 and the standard deviation of the text rows of the same
array, so that a new word is as loud as an old one, whatever the model's size.

A folder of Stable Diffusion becomes the part with the pixels of lowres, or of
highres if its U-Net has SDXL's additional embedding. Its text encoders are not
needed, and unconditional embeddings are for training to make.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence

import numpy as np

from lavit_jax.core import errors, vocabulary
from lavit_jax.models import llama
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.formats import llama_config, llama_folder, tensors
from lavit_jax.port.reading import official, pixel_folders, plan
from lavit_jax.port.tables import names, sizes

_EMBEDDING = llama_folder.EMBEDDING
_CHUNK = 4096  # rows drawn or measured at a time
_UNUSED_BY_LAVIT = ("norm.", "fc_norm.", "head.")
_PREFIX = "visual."


def require_only(
  only: Sequence[str] | None, part: str, source: pathlib.Path
) -> None:
  """UsageError unless `only` asks for nothing but the part there is."""
  if only is not None and set(only) != {part}:
    raise errors.UsageError(
      f"--only {','.join(only)}: {source} gives the part {part} alone. Leave"
      " --only out."
    )


def llama_plan(
  folder: pathlib.Path,
  *,
  codes: int,
  seed: int = 0,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """A Hugging Face LLaMA folder as the part `llm`.

  Args:
    folder: config.json, tokenizer.model and weights.
    codes: K, visual codes of the tokenizer it will be trained with.
    seed: of the new rows; embedding and head have streams of their own.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: another network, a tensor missing, not used or of
      a wrong shape, fewer rows than text pieces.
  """
  plan.check_allowed(allow, [names.LLM])
  if seed < 0:
    raise errors.UsageError(f"--seed {seed}: expected 0 or a larger number.")
  label = folder.name
  told = llama_config.read(folder / "config.json", f"{label}/config.json")
  path = folder / official.WORDS
  if not path.is_file():
    raise errors.CheckpointError(
      f"{path} is missing: lavit_jax reads text by a SentencePiece model."
      " Llama 1 and 2 have one; tokenizers of another kind cannot be used."
    )
  text = vocabulary.TextTokenizer.load(path)
  words = vocabulary.Vocabulary(text.size, codes)
  config = llama.LlamaConfig(vocab_size=words.size, **told.fields)
  found = tensors.open_shards(folder, label)
  if told.tied:
    llama_folder.tie(found, label)
  rows = _rows(found, text.size, label)
  problems = plan.Problems(label)
  arrays = plan.arrays_of(
    names.LLM,
    found,
    sizes.abstract_llama(dataclasses.replace(config, vocab_size=rows)),
    problems,
    label=label,
    rows=rows,
    allow=allow,
    ours=lambda path: f"llm/{path}",
  )
  problems.check()
  meta = {
    "llama": dataclasses.asdict(config),
    "vocabulary": dataclasses.asdict(words),
    "port": {"source": "llama", "codes": codes, "seed": seed},
  }
  notes = [
    f"rows {text.size} to {words.size - 1} of embedding and head are new,"
    f" drawn with seed {seed}",
    *told.notes,
  ]
  if rows > text.size:
    notes.append(f"{rows - text.size} rows beyond tokenizer.model were left")
  return plan.ImportPlan(
    source="llama",
    parts=(plan.Part("llm", _grown(arrays, config, words, seed), meta),),
    files={official.WORDS: path.read_bytes()},
    notes=tuple(notes),
  )


def _rows(found, text_size, label):
  """Rows of the vocabulary in the file."""
  shape = found[_EMBEDDING].shape if _EMBEDDING in found else ()
  if len(shape) == 2 and shape[0] < text_size:
    raise errors.CheckpointError(
      f"{label} has {shape[0]} rows of embeddings for the {text_size} pieces"
      " of its tokenizer.model. They are of different models."
    )
  return shape[0] if len(shape) == 2 else text_size


def _grown(arrays, config, words, seed):
  """The arrays, those of the vocabulary grown by random rows."""
  grown = []
  for array in arrays:
    if array.transform != "rows":
      grown.append(array)
      continue
    stream = (seed, array.path.endswith("head"))
    grown.append(
      dataclasses.replace(
        array,
        shape=(config.padded_vocab, *array.shape[1:]),
        finish=lambda out, s=stream: _draw_rows(
          out, words.text_size, words.size, s
        ),
      )
    )
  return tuple(grown)


def _draw_rows(out, start, stop, seed):
  """Fills rows start … stop-1 as the module's docstring says, 0 after."""
  count, total, squares = 0, 0.0, 0.0
  for i in range(0, start, _CHUNK):
    rows = out[i : min(i + _CHUNK, start)].astype(np.float64)
    count += rows.size
    total += rows.sum()
    squares += np.square(rows).sum()
  std = float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
  rng = np.random.default_rng(seed)
  for i in range(start, stop, _CHUNK):
    rows = out[i : min(i + _CHUNK, stop)]
    rows[...] = std * rng.standard_normal(rows.shape, np.float32)
  out[stop:] = 0


def encoder_plan(
  path: pathlib.Path,
  *,
  heads: int | None = None,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """An EVA-CLIP vision transformer as the part `encoder`.

  Args:
    path: a file of `tensors.SUFFIXES` with the names of `names.ENCODER`,
      plain, under "visual." (then the text tower beside it is left), or in a
      dict under "model", "module" or "state_dict".
    heads: attention heads, 16 by default.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: a tensor missing, not used or of a wrong shape.
  """
  plan.check_allowed(allow, [names.ENCODER])
  opened = tensors.open_file(path, unwrap=True)
  found = _without_prefix(opened, path.name)
  whole = all(
    any(name.startswith(part) for name in found) for part in ("norm.", "head.")
  )
  table, notes = names.ENCODER, []
  if len(found) < len(opened):
    beside = len(opened) - len(found)
    notes.append(f"{beside} tensors beside {_PREFIX!r} were left")
  if not whole:  # LaVIT reads the last block; norm and head go together
    table = tuple(
      row for row in table if not row.official.startswith(_UNUSED_BY_LAVIT)
    )
    left = [n for n in found if n.startswith(_UNUSED_BY_LAVIT)]
    found = {n: t for n, t in found.items() if n not in left}
    notes += [f"{name} was left: LaVIT does not use it" for name in left]
  heads, source = sizes.head_count(path.parent, heads)
  problems = plan.Problems(path.name)
  try:
    shapes = {name: tensor.shape for name, tensor in found.items()}
    config = sizes.vit(shapes, 1, with_head=whole)
    sizes.heads_fit(config.width, heads, source)
    config = dataclasses.replace(config, num_heads=heads)
    tree = sizes.abstract_encoder(config)
  except sizes.Unknown as e:
    problems.add("size that no tensor shows", f"{path.name}: {e}")
    config = tree = None
  arrays = plan.arrays_of(
    table, found, tree, problems, label=path.name, allow=allow
  )
  problems.check()
  meta = {"vit": dataclasses.asdict(config), "port": {"source": "eva"}}
  return plan.ImportPlan(
    source="eva",
    parts=(plan.Part("encoder", tuple(arrays), meta),),
    files={},
    notes=(f"{heads} attention heads: {source}", *notes),
  )


def _without_prefix(found, label):
  """The tensors under "visual.", if there are any, else all."""
  under = {
    name.removeprefix(_PREFIX): tensor
    for name, tensor in found.items()
    if name.startswith(_PREFIX)
  }
  if twice := sorted(set(under) & set(found)):
    raise errors.CheckpointError(
      f"{label} has names with and without {_PREFIX!r}: {', '.join(twice)}."
      " Which encoder is meant cannot be told; save one of them alone."
    )
  return under or found


def is_diffusers(folder: pathlib.Path) -> bool:
  """Whether a folder looks like a pipeline of diffusers with a U-Net."""
  return (folder / "unet" / pixel_folders.CONFIG).is_file()


def diffusers_plan(
  folder: pathlib.Path,
  only: Sequence[str] | None = None,
  *,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """A folder of Stable Diffusion as `lowres_pixels` or `highres_pixels`.

  Args:
    folder: unet/, vae/ and scheduler/; of the rest only LaVIT's own
      unconditional embeddings are taken, if they are there.
    only: None, or the part that it gives.
    allow: official names that may be missing.

  Raises:
    errors.UsageError: another part is asked for.
    errors.CheckpointError: files or tensors missing, not used or of a wrong
      shape, a network or a scheduler of another kind.
  """
  label, problems = folder.name, plan.Problems(folder.name)
  for file in pixel_folders.missing(folder, label, uncond=False):
    problems.add("missing file", file)
  problems.check()
  file = f"unet/{pixel_folders.CONFIG}"
  fields = llama_folder.read_json(folder / file, f"{label}/{file}")
  told = config_lib.unet_config(fields, f"{label}/{file}").details
  part = "highres_pixels" if told.added_dim else "lowres_pixels"
  require_only(only, part, folder)
  uncond = not told.added_dim and (folder / pixel_folders.UNCOND).is_file()
  reader = pixel_folders.Reader(folder, label, part, uncond)
  plan.check_allowed(allow, reader.tables)
  made = reader.read(problems, allow)
  problems.check()
  meta = made.meta | {"port": {"source": "diffusers", **made.meta["port"]}}
  place = f"{official.OFFICIAL}/{pixel_folders.FOLDERS[part]}"
  files = {
    f"{place}/{path}": data
    for path, data in reader.small_files().items()
    if "/" in path  # those at the top are of the whole pipeline
  }
  return plan.ImportPlan(
    source="diffusers",
    parts=(dataclasses.replace(made, meta=meta),),
    files=files,
    notes=tuple(reader.notes()),
  )
