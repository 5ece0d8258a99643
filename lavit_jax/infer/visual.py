"""Images to visual words and back to features, compiled and batched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.models.tokenizer import selector, tokenizer

_FEW_PATCHES = 64


class VisualTokenizer:
  """The frozen encoder and the dynamic visual tokenizer, ready for use.

  Arrays are numpy at the outside. Selection is deterministic (the K patches
  of highest p(keep), K the rounded sum of p(keep)) unless a seed is given:
  the official code always samples, so that two runs differ.
  """

  def __init__(
    self,
    encoder: checkpoints.Part,
    stage1: checkpoints.Part,
    dtype: str = "float32",
  ):
    config = tokenizer.config_from_dict(stage1.meta["tokenizer"])
    if "vit" in encoder.meta:
      tokenizer.check_encoder(config, encoder.meta["vit"])
    self.config = tokenizer.with_dtype(config, dtype)
    self.model = tokenizer.DynamicVisualTokenizer(self.config)
    self._encoder = encoder.params
    self._variables = {
      "params": stage1.params["params"],
      "codebook": stage1.params["codebook"],
    }
    self._feature_mean = stage1.params.get("feature_mean")

  @property
  def image_size(self) -> int:
    """Pixels a side of the images it takes."""
    return self.config.vit.image_size

  @property
  def num_patches(self) -> int:
    """N, patches of an image."""
    return self.config.num_patches

  @property
  def num_codes(self) -> int:
    """Size of the visual language."""
    return self.config.quantizer.num_codes

  @property
  def feature_mean(self) -> np.ndarray:
    """Mean features float[N, D] of the images it was trained on.

    Raises:
      errors.CheckpointError: an imported tokenizer, which has none.
    """
    if self._feature_mean is None:
      raise errors.CheckpointError(
        "This tokenizer was imported and has no mean features, over which"
        " reconstruction is measured. Evaluate a model trained here."
      )
    return np.asarray(self._feature_mean)

  @functools.cached_property
  def _encode(self):
    def encode_images(params, images):
      pixels = image_io.normalize(images)
      return tokenizer.encode_images(self.config, params, pixels)

    return jax.jit(encode_images)

  @functools.cached_property
  def _select(self):
    def select(variables, features):
      return self.model.apply(variables, features, method="select")

    return jax.jit(select)

  @functools.cached_property
  def _expected(self):
    def expected_mask(variables, features):
      log_probs = self.model.apply(variables, features, method="select")
      return selector.expected_count_mask(log_probs)

    return jax.jit(expected_mask)

  @functools.cached_property
  def _code(self):
    def code(variables, features, keep, capacity):
      return self.model.apply(
        variables, features, keep, capacity, method="encode"
      )

    return jax.jit(code, static_argnums=3)

  @functools.cached_property
  def _decode(self):
    def decode_words(variables, ids, valid):
      return self.model.apply(variables, ids, valid, method="decode_codes")

    return jax.jit(decode_words)

  def features(self, batch) -> jax.Array:
    """float32[B, N, D] of uint8[B, H, W, 3] by the frozen encoder."""
    return self._encode(self._encoder, jnp.asarray(batch))

  def log_probs(self, features, params=None) -> jax.Array:
    """Log-probabilities of keep and drop, float32[B, N, 2].

    `params` are those of another selector than the tokenizer's own.
    """
    return self._select(self._with_selector(params), features)

  def _with_selector(self, params):
    if params is None:
      return self._variables
    own = self._variables["params"]
    return self._variables | {"params": own | {"selector": params}}

  def keep_mask(
    self, features, *, seed=None, budget=None, params=None
  ) -> jax.Array:
    """bool[B, N]: which patches become words.

    Args:
      features: float[B, N, D].
      seed: sample, as training does, row i with the noise of seed + i, or of
        seed[i] where it is int[B]; None is deterministic.
      budget: keep exactly so many patches.
      params: see `log_probs`.

    Raises:
      errors.UsageError: a budget outside 1 ... N, or with a seed.
    """
    if budget is not None and seed is not None:
      raise errors.UsageError(
        "A budget fixes the selection and a seed samples it: give one of them."
      )
    if budget is not None and not 1 <= budget <= self.num_patches:
      raise errors.UsageError(
        f"budget={budget}: an image of {self.num_patches} patches keeps"
        f" between 1 and {self.num_patches} of them."
      )
    if budget is None and seed is None:
      return self._expected(self._with_selector(params), features)
    log_probs = self.log_probs(features, params)
    if budget is not None:
      return selector.budget_mask(log_probs, budget)
    noise = gumbel_noise(seed, log_probs.shape)
    keep = selector.mask_from_noise(log_probs, noise) > 0.5
    best = selector.budget_mask(log_probs, 1)
    return jnp.where(keep.any(1, keepdims=True), keep, best)

  def select(self, batch, params=None, seed=None):
    """(features float[B, N, D], keep bool[B, N]) of uint8[B, H, W, 3]."""
    features = self.features(batch)
    return features, self.keep_mask(features, seed=seed, params=params)

  def encode(self, features, keep):
    """Ids of features and a keep mask.

    Returns:
      (ids int32[B, K], valid bool[B, K]), K from `capacity_for`.
    """
    compact = self.config.merger_form == "compact"
    large = len(keep) > 1 and self.num_patches >= _FEW_PATCHES
    if compact and large and jax.default_backend() == "cpu":
      return self._encode_apart(features, keep)
    capacity = self.capacity_for(keep)
    _, ids, valid = self._code(self._variables, features, keep, capacity)
    return ids, valid

  def _encode_apart(self, features, keep):
    """`encode` image by image, each at its own capacity.

    On a CPU time is arithmetic, and the fullest image would set it for all.
    """
    whole = self.capacity_for(keep)
    rows = []
    for i in range(len(keep)):
      one = slice(i, i + 1)
      capacity = self.capacity_for(keep[one])
      _, *row = self._code(self._variables, features[one], keep[one], capacity)
      rest = ((0, 0), (0, whole - capacity))
      rows.append([np.pad(np.asarray(x), rest) for x in row])
    ids, valid = (np.concatenate(x) for x in zip(*rows, strict=True))
    return ids, valid

  def capacity_for(self, keep) -> int:
    """Places that the kept patches of bool[B, N] need: a quarter of N, …, N.

    So that few shapes compile; small images always take N.
    """
    num = self.num_patches
    if num < _FEW_PATCHES:
      return num
    most = int(np.asarray(keep).sum(1).max())
    quarter = -(-num // 4)
    return min(num, max(1, -(-most // quarter)) * quarter)

  def decode(self, ids, valid) -> jax.Array:
    """float[B, N, D] of ids int[B, K] and which of them are words.

    Raises:
      errors.CheckpointError: an imported tokenizer, whose decoders belong to
        its two U-Nets.
    """
    if "decoder" not in self._variables["params"]:
      raise errors.CheckpointError(
        "This tokenizer was imported and has no decoder of its own: its words"
        " are drawn by the decoders lowres and highres."
      )
    return self._decode(self._variables, ids, valid)

  @functools.cached_property
  def _uncoded(self):
    def run(variables, features, keep):
      tokens, valid, _ = self.model.apply(
        variables, features, keep, self.num_patches, method="merge_compact"
      )
      z = self.model.apply(variables, tokens, method="project")
      return self.model.apply(variables, z, valid, method="decode")

    return jax.jit(run)

  def reconstruct_without_codes(self, features, keep) -> jax.Array:
    """float[B, N, D] from the unit vectors before quantization."""
    return self._uncoded(self._variables, features, keep)

  def tokenize(self, batch, *, seed=None, budget=None, count=None):
    """One dict an image: `keep` bool[N], `codes` int32[k].

    Args:
      batch: uint8[B, H, W, 3].
      seed: see `keep_mask`.
      budget: see `keep_mask`.
      count: only the first so many images are returned.
    """
    features = self.features(batch)
    keep = self.keep_mask(features, seed=seed, budget=budget)
    ids, valid = (np.asarray(x) for x in self.encode(features, keep))
    keep = np.asarray(keep)
    rows = range(len(keep) if count is None else count)
    return [
      {"keep": keep[i], "codes": ids[i][valid[i]].astype(np.int32)}
      for i in rows
    ]

  def features_of(self, codes) -> jax.Array:
    """Reconstructed features float[B, N, D] of lists of codes int[k].

    Raises:
      errors.UsageError: no code, more codes than patches, or no such code.
    """
    return self.decode(*self.padded(codes))

  def vectors_of(self, codes):
    """Vectors of the codebook, padded to as many as there are patches.

    Returns:
      (float32[B, N, code_dim], valid bool[B, N]).

    Raises:
      errors.UsageError: as `features_of`.
    """
    ids, valid = self.padded(codes)
    return jnp.take(self._variables["codebook"]["codes"], ids, axis=0), valid

  def padded(self, codes):
    """(ids int32[B, N], valid bool[B, N]) of lists of codes int[k].

    Raises:
      errors.UsageError: as `features_of`.
    """
    num = self.num_patches
    ids = np.zeros((len(codes), num), np.int32)
    valid = np.zeros((len(codes), num), bool)
    for i, row in enumerate(codes):
      row = np.asarray(row, np.int32)
      if not 1 <= len(row) <= num:
        raise errors.UsageError(
          f"Image {i} has {len(row)} visual words; an image has between 1"
          f" and {num}, one for each patch that was kept."
        )
      if row.min() < 0 or row.max() >= self.num_codes:
        raise errors.UsageError(
          f"Image {i} has code {row.min()} to {row.max()}; codes run from 0"
          f" to {self.num_codes - 1}. Were they made by another tokenizer?"
        )
      ids[i, : len(row)] = row
      valid[i, : len(row)] = True
    return ids, valid


def gumbel_noise(seed, shape) -> jax.Array:
  """Noise float32[B, N, 2], row i from seed + i, or seed[i] of int[B]."""
  seeds = np.asarray(seed, np.uint32)
  if not seeds.ndim:
    seeds = seeds + np.arange(shape[0], dtype=np.uint32)
  keys = jax.vmap(jax.random.key)(seeds)
  draw = functools.partial(jax.random.gumbel, shape=shape[1:])
  return jax.vmap(draw)(keys)
