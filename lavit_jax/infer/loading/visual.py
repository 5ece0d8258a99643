"""Images to visual tokens and back to features, compiled and batched."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.infer.loading import compute
from lavit_jax.models.tokenizer import selector, tokenizer

Array = jax.Array | np.ndarray
Codes = Sequence[np.ndarray]  # int[k] for each image, 1 <= k <= N

_FEW_PATCHES = 64


class VisualTokenizer:
  """The frozen encoder and the dynamic visual tokenizer, ready for use.

  Selection is deterministic (the K patches of highest p(keep), K the rounded
  sum of p(keep)) unless a call has a seed. The official code always samples,
  so that two runs differ.

  Attributes:
    config: of the tokenizer and its encoder.
    model: the tokenizer.
  """

  def __init__(
    self,
    encoder: checkpoints.Part,
    stage1: checkpoints.Part,
    dtype: str = "float32",
  ):
    """Joins the two parts.

    Args:
      encoder: the part `encoder`.
      stage1: the part `tokenizer`.
      dtype: of the computation.

    Raises:
      errors.ConfigError: the encoder is not the one of the tokenizer's config.
    """
    config = tokenizer.config_from_dict(stage1.meta["tokenizer"])
    if "vit" in encoder.meta:
      tokenizer.check_encoder(config, encoder.meta["vit"])
    self.config = compute.of_tokenizer(config, dtype)
    self.model = tokenizer.DynamicVisualTokenizer(self.config)
    self._encoder = encoder.params
    self._variables = {
      "params": stage1.params["params"],
      "codebook": stage1.params["codebook"],
    }
    self._feature_mean = stage1.params.get("feature_mean")

  @property
  def image_size(self) -> int:
    """Pixels a side of the input images."""
    return self.config.vit.image_size

  @property
  def num_patches(self) -> int:
    """N, the number of patches of an image."""
    return self.config.num_patches

  @property
  def num_codes(self) -> int:
    """The number of codes in the codebook."""
    return self.config.quantizer.num_codes

  @property
  def feature_mean(self) -> np.ndarray:
    """Mean features float[N, D] of the training images.

    Raises:
      errors.CheckpointError: the tokenizer was imported, and has none.
    """
    if self._feature_mean is None:
      raise errors.CheckpointError(
        "This tokenizer was imported and has no mean features, against which"
        " reconstruction is measured. Evaluate a model trained here."
      )
    return np.asarray(self._feature_mean)

  def encode_images(self, params: Any, images: Array) -> jax.Array:
    """Returns float32[B, N, D] of uint8[B, H, W, 3]: what `features` compiles.

    Args:
      params: of the encoder.
      images: of any number.
    """
    pixels = image_io.normalize(images)
    return tokenizer.encode_images(self.config, params, pixels)

  def expected_mask(self, variables: Any, features: Array) -> jax.Array:
    """Returns bool[B, N] of float[B, N, D]: what `keep_mask` compiles.

    Args:
      variables: of the tokenizer.
      features: of the encoder.
    """
    log_probs: Any = self.model.apply(variables, features, method="select")
    return selector.expected_count_mask(log_probs)

  def coded(
    self, variables: Any, features: Array, keep: Array, capacity: int
  ) -> tuple[jax.Array, ...]:
    """Returns (z, ids int32[B, K], valid bool[B, K]): what `encode` compiles.

    Args:
      variables: of the tokenizer.
      features: float[B, N, D].
      keep: bool[B, N].
      capacity: K, at least the most patches of an image that are kept.
    """
    found: Any = self.model.apply(
      variables, features, keep, capacity, method="encode"
    )
    return found

  @property
  def variables(self) -> tuple[Any, Any]:
    """The parameters of the encoder, and the variables of the tokenizer."""
    return self._encoder, self._variables

  @functools.cached_property
  def _encode(self):
    return jax.jit(self.encode_images)

  @functools.cached_property
  def _select(self):
    def select(variables, features):
      return self.model.apply(variables, features, method="select")

    return jax.jit(select)

  @functools.cached_property
  def _expected(self):
    return jax.jit(self.expected_mask)

  @functools.cached_property
  def _code(self):
    return jax.jit(self.coded, static_argnums=3)

  @functools.cached_property
  def _decode(self):
    def decode_codes(variables, ids, valid):
      return self.model.apply(variables, ids, valid, method="decode_codes")

    return jax.jit(decode_codes)

  def features(self, batch: Array) -> jax.Array:
    """Returns the encoder's float32[B, N, D] of images uint8[B, H, W, 3]."""
    return self._encode(self._encoder, batch)

  def log_probs(self, features: Array, params: Any = None) -> jax.Array:
    """Returns log-probabilities of keep and drop, float32[B, N, 2].

    Args:
      features: float[B, N, D].
      params: of another selector than the tokenizer's, or None.
    """
    return self._select(self._with_selector(params), features)

  def _with_selector(self, params):
    if params is None:
      return self._variables
    merged = self._variables["params"] | {"selector": params}
    return self._variables | {"params": merged}

  def keep_mask(
    self,
    features: Array,
    *,
    seed: int | np.ndarray | None = None,
    budget: int | None = None,
    params: Any = None,
  ) -> jax.Array:
    """Selects the patches that become visual tokens: bool[B, N].

    Args:
      features: float[B, N, D].
      seed: sample as training does, row i with the noise of seed + i, or of
        seed[i] if it is int[B]; None is deterministic.
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
    if budget is not None:
      return selector.budget_mask(self.log_probs(features, params), budget)
    if seed is None:
      return self._expected(self._with_selector(params), features)
    log_probs = self.log_probs(features, params)
    noise = gumbel_noise(seed, log_probs.shape)
    keep = selector.mask_from_noise(log_probs, noise) > 0.5
    best = selector.budget_mask(log_probs, 1)
    return jnp.where(keep.any(1, keepdims=True), keep, best)

  def select(
    self,
    batch: Array,
    params: Any = None,
    seed: int | np.ndarray | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (features float[B, N, D], keep bool[B, N]) of images.

    Args:
      batch: uint8[B, H, W, 3].
      params: see `log_probs`.
      seed: see `keep_mask`.
    """
    features = self.features(batch)
    return features, self.keep_mask(features, seed=seed, params=params)

  def encode(self, features: Array, keep: Array) -> tuple[Array, Array]:
    """Computes the codes of the kept patches.

    Args:
      features: float[B, N, D].
      keep: bool[B, N].

    Returns:
      (ids int32[B, K], valid bool[B, K]), K from `capacity_for`.
    """
    if len(keep) > 1 and self.is_one_by_one:
      return self._encode_one_by_one(features, keep)
    capacity = self.capacity_for(keep)
    _, ids, valid = self._code(self._variables, features, keep, capacity)
    return ids, valid

  @property
  def is_one_by_one(self) -> bool:
    """Whether images are encoded one after the other: on a CPU, large ones."""
    compact = self.config.merger_form == "compact"
    large = self.num_patches >= _FEW_PATCHES
    return compact and large and jax.default_backend() == "cpu"

  def _encode_one_by_one(self, features, keep):
    """Encodes image by image, each at its own capacity.

    A CPU is limited by arithmetic: in one batch every image would cost as much
    as the one with most kept patches.
    """
    largest = self.capacity_for(keep)
    rows = []
    for i in range(len(keep)):
      one = slice(i, i + 1)
      capacity = self.capacity_for(keep[one])
      _, *row = self._code(self._variables, features[one], keep[one], capacity)
      padding = ((0, 0), (0, largest - capacity))
      rows.append([np.pad(np.asarray(x), padding) for x in row])
    ids, valid = (np.concatenate(x) for x in zip(*rows, strict=True))
    return ids, valid

  def capacity_for(self, keep: Array) -> int:
    """Returns K, the padded number of kept patches of bool[B, N].

    K is N, or a multiple of N / 4 for large images, so that few shapes compile.
    """
    num = self.num_patches
    if num < _FEW_PATCHES:
      return num
    most = int(np.asarray(keep).sum(1).max())
    quarter = -(-num // 4)
    return min(num, max(1, -(-most // quarter)) * quarter)

  def decode(self, ids: Array, valid: Array) -> jax.Array:
    """Reconstructs features float[B, N, D] from codes.

    Args:
      ids: int[B, K].
      valid: bool[B, K], False for padding.

    Raises:
      errors.CheckpointError: the tokenizer was imported; its decoders belong
        to its two U-Nets.
    """
    if "decoder" not in self._variables["params"]:
      raise errors.CheckpointError(
        "This tokenizer was imported and has no decoder of features: its visual"
        " tokens are decoded by the pixel decoders lowres and highres."
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

  def reconstruct_without_codes(
    self, features: Array, keep: Array
  ) -> jax.Array:
    """Reconstructs float[B, N, D] from the unit vectors before quantization.

    Args:
      features: float[B, N, D].
      keep: bool[B, N].
    """
    return self._uncoded(self._variables, features, keep)

  def tokenize(
    self,
    batch: Array,
    *,
    seed: int | np.ndarray | None = None,
    budget: int | None = None,
    count: int | None = None,
  ) -> list[dict[str, np.ndarray]]:
    """Returns a dict for each image: `keep` bool[N], `codes` int32[k].

    Args:
      batch: uint8[B, H, W, 3].
      seed: see `keep_mask`.
      budget: see `keep_mask`.
      count: return only the first so many images.
    """
    features = self.features(batch)
    keep = self.keep_mask(features, seed=seed, budget=budget)
    ids, valid = (np.asarray(x) for x in self.encode(features, keep))
    kept = np.asarray(keep)
    rows = range(len(kept) if count is None else count)
    return [
      {"keep": kept[i], "codes": ids[i][valid[i]].astype(np.int32)}
      for i in rows
    ]

  def features_of(self, codes: Codes) -> jax.Array:
    """Reconstructs features float[B, N, D] from codes int[k] of each image.

    Raises:
      errors.UsageError: no code, more codes than patches, or no such code.
    """
    return self.decode(*self.padded(codes))

  def vectors_of(self, codes: Codes) -> tuple[jax.Array, np.ndarray]:
    """Looks up codes int[k] in the codebook, padded to N.

    Returns:
      (float32[B, N, code_dim], valid bool[B, N]).

    Raises:
      errors.UsageError: as `features_of`.
    """
    ids, valid = self.padded(codes)
    return jnp.take(self._variables["codebook"]["codes"], ids, axis=0), valid

  def padded(self, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32[B, N], valid bool[B, N]) of codes int[k].

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
          f"Image {i} has {len(row)} visual tokens; an image has between 1"
          f" and {num}, one for each patch that was kept."
        )
      if row.min() < 0 or row.max() >= self.num_codes:
        raise errors.UsageError(
          f"Image {i} has codes {row.min()} to {row.max()}; codes run from 0"
          f" to {self.num_codes - 1}. Are they of another tokenizer?"
        )
      ids[i, : len(row)] = row
      valid[i, : len(row)] = True
    return ids, valid


def gumbel_noise(seed: int | np.ndarray, shape: tuple[int, ...]) -> jax.Array:
  """Draws Gumbel noise float32[B, N, 2].

  Args:
    seed: row i has the noise of seed + i, or of seed[i] if it is int[B].
    shape: (B, N, 2).
  """
  seeds: np.ndarray = np.asarray(seed, np.uint32)
  if not seeds.ndim:
    seeds = seeds + np.arange(shape[0], dtype=np.uint32)
  keys = jax.vmap(jax.random.key)(seeds)
  draw = functools.partial(jax.random.gumbel, shape=shape[1:])
  return jax.vmap(draw)(keys)
