"""Measures a visual tokenizer: reconstruction, selection, use of codes.

`recon_gain` = (cos - cos_mean) / (1 - cos_mean), where cos_mean is the cosine
of the features with the mean training feature of their position: on raw
features a constant prediction has a high cosine.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.infer.loading import visual as visual_lib
from lavit_jax.models.tokenizer import selector

_BATCH = 50


def quality(
  visual: visual_lib.VisualTokenizer,
  images: np.ndarray,
  object_shares: np.ndarray | None = None,
  *,
  seed: int = 0,
) -> dict[str, float]:
  """Measures a tokenizer on images.

  Args:
    visual: the tokenizer.
    images: uint8[n, H, W, 3], n a multiple of 50.
    object_shares: float[n, N], the share of object pixels in each patch, for
      the metrics on objects; None leaves them out.
    seed: of the sampled and the random masks.

  Returns:
    `recon_gain`, `recon_gain_objects` (patches with >= 5 % object pixels),
    `kept_share`, `object_lift`, `codes_used_share`, `perplexity`; the first two
    also with suffixes `_sampled`, `_random` (a random mask of as many patches)
    and `_no_codes`.
  """
  sums = _Sums(visual.feature_mean)
  counts = np.zeros(visual.num_codes)
  kept: list[np.ndarray] = []
  for start in range(0, len(images), _BATCH):
    batch = images[start : start + _BATCH]
    objects = None
    if object_shares is not None:
      objects = object_shares[start : start + _BATCH] >= 0.05
    features = visual.features(batch)
    sums.add_mean(features, objects)
    keep = visual.keep_mask(features)
    kept.append(np.asarray(keep))
    for suffix, mask in _masks(visual, features, keep, seed + start):
      ids, valid = visual.encode(features, mask)
      x_rec = visual.decode(ids, valid)
      sums.add(suffix, features, x_rec)
      if not suffix:
        np.add.at(counts, np.asarray(ids)[np.asarray(valid)], 1)
    x_rec = visual.reconstruct_without_codes(features, keep)
    sums.add("_no_codes", features, x_rec)
  metrics = sums.gains() | _code_use(counts)
  all_kept = np.concatenate(kept)
  metrics["kept_share"] = float(all_kept.mean())
  if object_shares is not None:
    on = object_shares >= 0.05
    elsewhere = max(float(all_kept[~on].mean()), 1e-9)
    metrics["object_lift"] = float(all_kept[on].mean()) / elsewhere
  return metrics


def _masks(visual, features, keep, seed):
  """Yields the masks to compare, each as (suffix, bool[B, N])."""
  yield "", keep
  yield "_sampled", visual.keep_mask(features, seed=seed)
  share = np.asarray(keep).mean(1)
  key = jax.random.key(seed + 1)
  yield "_random", selector.random_mask(key, keep.shape, jnp.asarray(share))


class _Sums:
  """Collects cosines of patches, and which patches are on objects."""

  def __init__(self, mean):
    self._mean = np.asarray(mean)
    self._rows: dict[str, list[np.ndarray]] = {}
    self._objects: list[np.ndarray] = []

  def add_mean(self, features, objects):
    self.add("mean", features, np.broadcast_to(self._mean, features.shape))
    if objects is not None:
      self._objects.append(objects)

  def add(self, name, features, x_rec):
    a, b = np.asarray(features), np.asarray(x_rec)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(norms, 1e-12)
    self._rows.setdefault(name, []).append(cosine)

  def gains(self):
    """Returns the gain of every suffix, over all patches and over objects."""
    rows = {suffix: np.concatenate(r) for suffix, r in self._rows.items()}
    base = rows.pop("mean")
    gains = {}
    for suffix, row in rows.items():
      gains[f"recon_gain{suffix}"] = _gain(row.mean(), base.mean())
      if self._objects:
        on = np.concatenate(self._objects)
        gain = _gain(row[on].mean(), base[on].mean())
        gains[f"recon_gain_objects{suffix}"] = gain
    return gains


def _gain(cosine, base):
  return float((cosine - base) / (1.0 - base))


def _code_use(counts):
  """Returns the share of codes in use, and the perplexity of their use."""
  p = counts / max(counts.sum(), 1)
  entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
  return {
    "codes": float(len(counts)),
    "codes_used_share": float((counts > 0).mean()),
    "perplexity": float(np.exp(entropy)),
  }
