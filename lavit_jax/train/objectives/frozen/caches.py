"""A run's caches, checked against its data and the networks that made them."""

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from lavit_jax.core import agreement, errors, hosts
from lavit_jax.core.storage import fingerprints
from lavit_jax.data import examples
from lavit_jax.data.caches import codes as codes_lib
from lavit_jax.data.caches import latents as latents_lib
from lavit_jax.data.caches import shards
from lavit_jax.data.images import image_bytes
from lavit_jax.data.records import columns
from lavit_jax.data.sources import kinds, mixed
from lavit_jax.models.pixels import vae as vae_lib
from lavit_jax.train.objectives.frozen import latent_parts

# Of a mixture a cache of each source, by name; None for one without images.
Caches = codes_lib.CodeCache | dict[str, codes_lib.CodeCache | None]


def codes(
  config: ml_collections.ConfigDict,
  sources: Sequence[examples.Source],
) -> list[Caches]:
  """Opens the code caches of training and held-out images.

  Args:
    config: of a run of stage pretrain; `accept` may name train_cache.source,
      .tokenizer and .pictures, and likewise of held_out_cache; of a source of
      a mixture train_cache.NAME.source and so on.
    sources: its (training, held-out) examples.

  Raises:
    errors.DataError: a cache is missing, is of other images, or was made by
      another tokenizer than model_dir's, whose codes mean something else.
  """
  # The lead process alone hashes the tokenizer: if it fails, all do.
  tokenizer = ""
  if hosts.is_lead():
    tokenizer = fingerprints.of_tokenizer(config.model_dir)
  caches: list[Caches] = []
  parts = kinds.parts_of(config.data)
  for split, source in zip(("train", "held_out"), sources, strict=True):
    open_one = functools.partial(_open, config, tokenizer, split)
    if isinstance(source, mixed.MixedSource):
      caches.append(
        {
          part.name: open_one(parts[part.name], part.source, f".{part.name}")
          for part in source.parts
        }
      )
      continue
    cache = open_one(config.data, source, "")
    assert cache is not None
    caches.append(cache)
  return caches


def _open(config, tokenizer, split, data, source, suffix):
  """Opens and checks the code cache of a source; None if it has no images."""
  field = "cache_dir" if split == "train" else "held_out_cache_dir"
  if suffix and not source.num_images:
    return None
  folder = data.get(field)
  if not folder:
    where = f"sources{suffix}.{field}" if suffix else field
    raise errors.ConfigError(
      f"config.data.{where} is empty, but {source.name} has images. Give the"
      " folder of its code cache, made by `lavit tokenize`."
    )
  cache = codes_lib.CodeCache.load(folder)
  expected: dict[str, tuple[str, str]] = {
    "source": (
      examples.fingerprint(source),
      kinds.describe(data, split, source),
    ),
    "tokenizer": (tokenizer, str(config.model_dir)),
  }
  if cache.meta.pictures and (images := _image_bytes(source)):
    expected["pictures"] = images, ""
  _check(config, data, f"{split}_cache{suffix}", cache, expected, folder, split)
  return cache


def each(caches: Caches) -> dict[str, codes_lib.CodeCache]:
  """Returns the caches of a mixture by name; of one source {"": its cache}."""
  if isinstance(caches, dict):
    return {name: cache for name, cache in caches.items() if cache is not None}
  return {"": caches}


def latents(
  data: ml_collections.ConfigDict,
  training: bool,
  source: examples.Source,
  vae: vae_lib.VaeConfig,
  read_vae: Callable[[], Any],
) -> latents_lib.LatentCache | None:
  """Opens the latent cache of training or held-out images, if there is one.

  Args:
    data: config.data of a run of stage latents.
    training: whether it is that of the training images.
    source: these images.
    vae: config of the autoencoder.
    read_vae: reads the autoencoder's weights; called if there is a cache.

  Raises:
    errors.DataError: the cache that config.data names is missing, or is of
      other images, another autoencoder or other buckets.
  """
  folder = data.latents_dir if training else data.held_out_latents_dir
  if not folder:
    return None
  return latents_lib.LatentCache.load(
    folder,
    source=examples.fingerprint(source),
    images=_image_bytes(source),
    vae=latent_parts.fingerprint(read_vae(), vae),
    buckets=data.buckets,
  )


def latents_provenance(data: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the fingerprints of the latent caches that config.data names."""
  folders = {
    "train_cache": data.latents_dir,
    "held_out_cache": data.held_out_latents_dir,
  }
  return {
    name: latents_lib.LatentCache.load(folder).fingerprint()
    for name, folder in folders.items()
    if folder
  }


def _command(data, model, folder, split) -> str:
  """Returns the command that writes the cache of a split of config.data."""
  kind = data["kind"]
  if kind == "tfds":
    return "lavit_jax.jobs.tokenize.write_cache with the run's config.data"
  words = ["lavit", "tokenize", "--model", model, "--out", folder]
  words += ["--split", split]
  words += ["--data", data["path"] if kind != "shapes" else kind]
  if kind != "shapes" and data["held_out_path"]:
    words += ["--held-out", data["held_out_path"]]
  if data.get("allow_absolute"):
    words += ["--allow-absolute"]
  if kind in ("jsonl", "parquet", "hf"):
    for field, usual in (
      ("image_feature", columns.IMAGE),
      ("text_feature", columns.TEXT),
    ):
      if (name := data.get(field, usual)) != usual:
        words += [f"--{field.replace('_', '-')}", name]
  return shlex.join(words)


def _image_bytes(source: examples.Source) -> str:
  """Returns `image_bytes.of` a source; "" but on the lead process."""
  return image_bytes.of(source) if hosts.is_lead() else ""


def _check(
  config: ml_collections.ConfigDict,
  data: Mapping[str, Any],
  name: str,
  cache: codes_lib.CodeCache,
  expected: Mapping[str, tuple[str, str]],
  folder: str,
  split: str,
) -> None:
  """Checks a cache's inputs, each a (fingerprint, description), with a run's.

  An empty fingerprint is not compared.

  Raises:
    errors.DataError: they differ, and config.accept does not name them.
  """
  stored = {
    "source": (cache.meta.source, cache.meta.data),
    "tokenizer": (cache.meta.tokenizer, cache.meta.model),
    "pictures": (cache.meta.pictures, ""),
  }
  command = _command(data, config.model_dir, folder, split)
  way_out = f"delete it and write it again for this run: {command}"
  differences = [
    agreement.Difference(
      f"{name}.{kind}",
      shards.described(*stored[kind]),
      shards.described(*value),
      way_out,
    )
    for kind, value in expected.items()
    if value[0] and value[0] != stored[kind][0]
  ]
  agreement.settle(
    differences,
    agreement.accepted(config),
    what=f"The code cache {folder}",
    error=errors.DataError,
  )
