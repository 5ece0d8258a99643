"""Where a model is, and its language part, loaded for use.

Encoder and visual tokenizer are `visual.VisualTokenizer`, the pixel decoders
`pixels/decoders.py`.
"""

import dataclasses
import importlib.resources
import pathlib

import jax
import numpy as np

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.infer import batches, visual
from lavit_jax.infer.loading import made_of
from lavit_jax.infer.loading import quantize as int8
from lavit_jax.infer.presets import rules
from lavit_jax.models import llama, unified


def resolve(model) -> pathlib.Path:
  """The directory of a model: a path, gs:// too, or "tiny", the shipped one.

  Raises:
    errors.CheckpointError: there is nothing of that name.
  """
  if str(model) == "tiny":
    path = importlib.resources.files("lavit_jax") / "weights" / "tiny"
    if not pathlib.Path(str(path)).is_dir():
      raise errors.CheckpointError(
        "The shipped model 'tiny' is missing from this installation"
        f" ({path}). Reinstall lavit_jax, or train one: lavit quickstart."
      )
    return pathlib.Path(str(path))
  path = files.place(model)
  if (path / "model").is_dir() and not checkpoints.parts_in(path):
    path = path / "model"  # a quickstart workdir
  if not checkpoints.parts_in(path):
    raise errors.CheckpointError(
      f"{model} is no model directory: none of the parts"
      f" {', '.join(checkpoints.PARTS)} is in it. Give 'tiny', the model_dir"
      " of a training run, or the workdir of lavit quickstart."
    )
  return path


def text_tokenizer(directory) -> vocabulary.TextTokenizer:
  """The SentencePiece model of a model directory, held to its LLM.

  Raises:
    errors.LavitError: there is none, or the LLM was trained on another: its
      ids would be other words.
  """
  path = files.place(directory) / "tokenizer.model"
  text = vocabulary.TextTokenizer.load(path)
  if "llm" not in checkpoints.parts_in(directory):
    return text
  meta = checkpoints.read_meta(directory, "llm")
  size = meta["vocabulary"]["text_size"]
  told = meta.get("made_of", {}).get("text_tokenizer")
  found = fingerprints.of_file(path)
  # What is imported may keep ids that no piece of text has.
  fits = text.size <= size if "port" in meta else text.size == size
  if not fits or told not in (None, found):
    raise errors.CheckpointError(
      f"{path} ({text.size} pieces, {found[:12]}) is not what the llm of"
      f" {directory} was trained with ({size} pieces"
      f"{f', {told[:12]}' if told else ''}): its ids would be other words. Put"
      " that file back, or train the LLM again."
    )
  return text


def visual_tokenizer(
  directory, dtype: str = "float32"
) -> visual.VisualTokenizer:
  """Encoder and visual tokenizer of a model directory, which fit together.

  Args:
    directory: a model directory.
    dtype: of the encoder and of computation. Codes are told apart by small
      differences: the tokenizer's weights stay float32.

  Raises:
    errors.CheckpointError: one is missing or damaged, or the tokenizer was
      trained on another encoder.
  """
  made_of.check_made_of(directory, "tokenizer")
  return visual.VisualTokenizer(
    checkpoints.load_part(directory, "encoder", dtype=dtype),
    checkpoints.load_part(directory, "tokenizer"),
    dtype,
  )


class Language:
  """The LLM part with its continuous branch.

  Attributes:
    model: the LLM, hashable.
    params: `llm`, `merger`, `projection`, and `selector` where the weights
      for reading bring their own.
    vocabulary: its id layout.
    rules: how it wants to write and draw.
  """

  def __init__(
    self,
    directory,
    tokenizer: visual.VisualTokenizer,
    dtype: str = "float32",
    quantize: str | None = None,
  ):
    """Reads the part; CheckpointError if it knows other visual words."""
    made_of.check_made_of(directory, "llm")
    if quantize is None:
      part = checkpoints.load_part(directory, "llm", dtype=dtype)
    else:
      part = int8.load_part(directory, mode=quantize, dtype=dtype)
    self.params = part.params
    self.vocabulary = vocabulary.Vocabulary(**part.meta["vocabulary"])
    self.rules = rules.rules_of(part.meta)
    config = llama.LlamaConfig(**part.meta["llama"] | {"dtype": dtype})
    if quantize is not None:  # layers unrolled would be cast back at once
      config = dataclasses.replace(config, unroll=1)
    self.model, self.params["llm"] = llama.for_decoding(
      llama.Llama(config), self.params["llm"]
    )
    self._visual = tokenizer
    self._read = jax.jit(self._read_tokens, static_argnums=3)

  def _read_tokens(self, params, features, keep, capacity):
    net = unified.UnifiedModel(self.model.config, self._visual.config, capacity)
    return net.apply({"params": params}, features, keep, method="read")

  def read(self, images, seeds=None, limit: int = batches.SIZES[-1]):
    """Projected tokens float32[n, N, W] and valid bool[n, N], numpy.

    Args:
      images: uint8[n, H, W, 3].
      seeds: int[n], to sample which patches are kept; None: deterministic.
      limit: images at once.
    """
    outs = []
    for chunk, count, start in batches.chunks(images, limit):
      # Official weights may bring a selector of their own for reading.
      own = self.params.get("selector")
      seed = None if seeds is None else batches.fill(seeds[start:], len(chunk))
      features, keep = self._visual.select(chunk, own, seed)
      capacity = self._visual.capacity_for(keep)  # all that are kept
      reader = {name: self.params[name] for name in ("merger", "projection")}
      tokens, valid = self._read(reader, features, keep, capacity)
      rest = ((0, 0), (0, self._visual.num_patches - capacity))
      tokens = np.pad(np.asarray(tokens, np.float32), (*rest, (0, 0)))
      outs.append((tokens[:count], np.pad(np.asarray(valid), rest)[:count]))
    return tuple(np.concatenate(x) for x in zip(*outs, strict=True))
