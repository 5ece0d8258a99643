"""Finds a model directory and reads its tokenizers and its language part.

The pixel decoders are read by `pixels/decoders.py`.
"""

import importlib.resources
import os
import pathlib

import jax
import numpy as np
from etils import epath

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.infer import batches
from lavit_jax.infer.loading import compute, made_of, visual
from lavit_jax.infer.loading import quantize as int8
from lavit_jax.infer.presets import rules
from lavit_jax.models import llama, unified


def resolve(model: str | os.PathLike) -> pathlib.Path | epath.Path:
  """Returns the directory of a model.

  Args:
    model: a model directory, in gs:// too; a quickstart workdir; or "tiny",
      the model shipped with the package.

  Raises:
    errors.CheckpointError: there is no such model.
  """
  if str(model) == "tiny":
    path = importlib.resources.files("lavit_jax") / "weights" / "tiny"
    if not pathlib.Path(str(path)).is_dir():
      raise errors.CheckpointError(
        "The shipped model 'tiny' is missing from this installation"
        f" ({path}). Reinstall lavit_jax, or train one: lavit quickstart."
      )
    return pathlib.Path(str(path))
  if not str(model):  # pathlib takes it for the current folder
    raise errors.CheckpointError(
      "The name of the model is empty: give 'tiny', or a model directory."
    )
  path = files.input_path(model)
  if (path / "model").is_dir() and not checkpoints.parts_in(path):
    path = path / "model"  # a quickstart workdir
  if not checkpoints.parts_in(path):
    raise errors.CheckpointError(
      f"{model} is no model directory: it has none of the parts"
      f" {', '.join(checkpoints.PARTS)}. Give 'tiny', the model_dir of a"
      " training run, or the workdir of lavit quickstart."
    )
  return path


def text_tokenizer(
  directory: str | os.PathLike,
) -> vocabulary.TextTokenizer:
  """Reads the SentencePiece model of a model directory.

  Raises:
    errors.LavitError: there is none, or the LLM of the directory was trained
      with another, and would take its ids for other words.
  """
  path = files.input_path(directory) / "tokenizer.model"
  text = vocabulary.TextTokenizer.load(path)
  if "llm" not in checkpoints.parts_in(directory):
    return text
  meta = checkpoints.read_meta(directory, "llm")
  size = meta["vocabulary"]["text_size"]
  recorded = meta.get("made_of", {}).get("text_tokenizer")
  current = fingerprints.of_file(path)
  # An imported LLM may have ids without a piece of text.
  fits = text.size <= size if "port" in meta else text.size == size
  if not fits or recorded not in (None, current):
    raise errors.CheckpointError(
      f"{path} ({text.size} pieces, {current[:12]}) is not the text tokenizer"
      f" that the llm of {directory} was trained with ({size} pieces"
      f"{f', {recorded[:12]}' if recorded else ''}): its ids would be other"
      " words. Restore that file, or train the LLM again."
    )
  return text


def visual_tokenizer(
  directory: str | os.PathLike, dtype: str = "float32"
) -> visual.VisualTokenizer:
  """Reads encoder and visual tokenizer of a model directory.

  Args:
    directory: a model directory.
    dtype: of the encoder and of the computation. The weights of the tokenizer
      stay float32, because codes differ by small amounts.

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
  """The part `llm`: the language model and the branch that reads images.

  Attributes:
    model: the LLM, hashable.
    params: `llm`, `merger`, `projection`, and `selector` if the weights for
      understanding have one.
    vocabulary: the id layout.
    rules: the preset.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    tokenizer: visual.VisualTokenizer,
    dtype: str = "float32",
    quantize: str | None = None,
  ):
    """Reads the part of a model directory.

    Args:
      directory: a model directory.
      tokenizer: encoder and visual tokenizer of the same directory.
      dtype: of the computation and of weights that are not quantized.
      quantize: None, or a mode of `quantize.MODES`.

    Raises:
      errors.CheckpointError: the part is missing or damaged, or was trained
        with another visual tokenizer.
    """
    made_of.check_made_of(directory, "llm")
    if quantize is None:
      part = checkpoints.load_part(directory, "llm", dtype=dtype)
    else:
      part = int8.load_part(directory, mode=quantize, dtype=dtype)
    self.params = part.params
    self.vocabulary = vocabulary.Vocabulary(**part.meta["vocabulary"])
    self.rules = rules.rules_of(part.meta)
    config = llama.LlamaConfig(**part.meta["llama"])
    config = compute.of_network(config, dtype, one_loop=quantize is not None)
    self.model, self.params["llm"] = llama.for_decoding(
      llama.Llama(config), self.params["llm"]
    )
    self._visual = tokenizer
    self._read = jax.jit(self._read_tokens, static_argnums=3)

  def _read_tokens(self, params, features, keep, capacity):
    net = unified.UnifiedModel(self.model.config, self._visual.config, capacity)
    return net.apply({"params": params}, features, keep, method="read")

  def read(
    self,
    images: np.ndarray,
    seeds: np.ndarray | None = None,
    limit: int = batches.SIZES[-1],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads images as continuous tokens of the LLM.

    Args:
      images: uint8[n, H, W, 3].
      seeds: int[n], to sample the patches that are kept; None: deterministic.
      limit: images at once.

    Returns:
      (projected tokens float32[n, N, W], valid bool[n, N]).
    """
    outputs = []
    # Official weights may have a selector of their own for understanding.
    selector = self.params.get("selector")
    reader = {name: self.params[name] for name in ("merger", "projection")}
    for chunk, count, start in batches.chunks(images, limit):
      seed = None if seeds is None else batches.fill(seeds[start:], len(chunk))
      features, keep = self._visual.select(chunk, selector, seed)
      capacity = self._visual.capacity_for(keep)  # cuts no kept patch
      tokens, valid = self._read(reader, features, keep, capacity)
      padding = ((0, 0), (0, self._visual.num_patches - capacity))
      tokens = np.pad(np.asarray(tokens, np.float32), (*padding, (0, 0)))
      valid = np.pad(np.asarray(valid), padding)
      outputs.append((tokens[:count], valid[:count]))
    tokens, valid = zip(*outputs, strict=True)
    return np.concatenate(tokens), np.concatenate(valid)
