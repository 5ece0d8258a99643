"""Micro objectives that need no trained model: random weights and batches."""

import types
from unittest import mock

import jax
import numpy as np

from lavit_jax.core import sharding, vocabulary
from lavit_jax.train import objectives, phases
from lavit_jax.train.objectives.frozen import artifacts
from tests.train import drawn, sharding_test

_NOWHERE = "a folder that is not there"
TEXT = 300  # pieces of text


def tokenizer_fields():
  """The micro tokenizer, with its encoder, as a dict."""
  config = sharding_test.stage_config("tokenizer", _NOWHERE)
  vit = sharding_test.stage_config("encoder", _NOWHERE).model.vit
  return config.model.tokenizer.to_dict() | {"vit": vit.to_dict()}


def build(stage, **updates):
  """The objective of a stage at micro width; `updates` are dotted fields."""
  cfg = sharding_test.stage_config(stage, _NOWHERE)
  cfg.assumed = dict(tokenizer=tokenizer_fields(), text_size=TEXT, capacity=16)
  for path, value in updates.items():
    node = cfg
    *parents, last = path.split("__")
    for parent in parents:
      node = node[parent]
    node[last] = value
  pieces = lambda *unused: types.SimpleNamespace(size=TEXT)
  with mock.patch.object(artifacts.Artifacts, "text_tokenizer", pieces):
    return objectives.build(cfg, artifacts.AbstractArtifacts(cfg))


def phase_of(objective, name=None, **settings):
  """A phase by name, the last by default; `settings` differ."""
  found = phases.phases_of(objective.config)
  phase = next(p for p in found if name in (None, p.name))
  if name is None:
    phase = found[-1]
  return phase.with_settings(**settings)


class Case:
  """Random weights and a random batch of an objective.

  Attributes:
    boxed: shapes of the parameters with their axes.
    params, frozen, extra, batch: as a step takes them.
  """

  def __init__(self, objective, rows=8):
    self.objective = objective
    self.boxed, extra = jax.eval_shape(objective.init, jax.random.key(0))
    extra = sharding.unbox(extra)
    self.params = drawn.draw(self.boxed)
    self.frozen = drawn.draw(objective.load_frozen(), 1)
    self.extra = drawn.draw(extra, 2)
    if "codebook" in self.extra:
      self.extra["codebook"] = _codebook(self.extra["codebook"])
    if "ema" in self.extra:
      self.extra["ema"] = drawn.draw(self.boxed, 3)
    if "square" in self.extra:
      self.extra = {"mean": np.float32(0.1), "square": np.float32(1.0)}
    self.batch = batch_of(objective, rows)

  @property
  def args(self):
    """What follows the phase in most functions of an objective."""
    return self.params, self.frozen, self.extra, self.batch


def _codebook(stats):
  """Codes of unit norm; every third has not been chosen for long."""
  codes = stats["codes"] / np.linalg.norm(stats["codes"], axis=-1)[:, None]
  counts = np.where(np.arange(len(codes)) % 3, 1.0, 0.01).astype(np.float32)
  return {"codes": codes, "counts": counts, "sums": codes * counts[:, None]}


def batch_of(objective, rows):
  """Random rows; some images are not valid, some captions are not there."""
  rng = np.random.default_rng(7)
  shapes = objective.batch_shapes()

  def one(name, leaf):
    shape = (rows, *leaf.shape[1:])
    if name in ("image", "pixels", "target"):
      return rng.integers(0, 256, shape, dtype=np.uint8)
    if leaf.dtype == bool:
      return rng.random(shape) < 0.4
    return rng.random(shape).astype(leaf.dtype)

  batch = {name: one(name, leaf) for name, leaf in shapes.items()}
  if "valid" in batch:
    batch["valid"] = np.ones(rows, np.float32)
    batch["valid"][[1, 4]] = 0
  if "text" in batch:
    length = rng.integers(2, batch["text"].shape[1], rows)
    length[2] = 0
    batch["text"] = rng.integers(3, TEXT, batch["text"].shape, dtype=np.int32)
    batch["text_mask"] = np.arange(batch["text"].shape[1]) < length[:, None]
  if "segments" in batch:
    batch |= _packed(objective.vocabulary, batch, rng)
  return batch


def _packed(vocab: vocabulary.Vocabulary, batch, rng):
  """Rows of one document; each has twice the targets of the one before."""
  rows, length = batch["tokens"].shape
  ids = lambda: rng.integers(3, vocab.size, (rows, length), dtype=np.int32)
  position = np.arange(length)
  used = np.minimum(2 ** np.arange(rows), length)[:, None]
  segments = np.broadcast_to(
    position < length - np.arange(rows)[:, None], ids().shape
  )
  image_index = np.where(
    (position < 12) & (np.arange(rows)[:, None] % 2 == 0), 0, -1
  )
  return {
    "tokens": ids(),
    "targets": ids(),
    "weights": (rng.random((rows, length)) * (position < used)).astype(
      np.float32
    ),
    "segments": segments.astype(np.int32),
    "positions": np.broadcast_to(position, ids().shape).astype(np.int32),
    "image_index": image_index.astype(np.int32),
    "token_index": np.broadcast_to(position % 4, ids().shape).astype(np.int32),
  }
