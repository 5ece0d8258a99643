"""The caches of a run, held to its data and to the networks that made them."""

import shlex

from lavit_jax.core import agreement, errors, hosts
from lavit_jax.core.storage import fingerprints
from lavit_jax.data import image_bytes
from lavit_jax.data.caches import codes as codes_lib
from lavit_jax.data.caches import latents as latents_lib
from lavit_jax.data.sources import kinds
from lavit_jax.train.objectives.frozen import latent_parts


def codes(
  config, images, prints
) -> tuple[codes_lib.CodeCache, codes_lib.CodeCache]:
  """The caches of training and held-out images.

  Args:
    config: of a run of stage pretrain; `accept` may name train_cache.source,
      .tokenizer and .pictures, and likewise of held_out_cache.
    images: its (train, held-out) sources.
    prints: their `examples.fingerprint`s.

  Raises:
    errors.DataError: there is none, or it is of other images, or by another
      tokenizer than model_dir's: its codes would be those of something else.
  """
  data = config.data
  # Of the tokenizer the first process alone reads all: one that fails is
  # enough.
  words = fingerprints.of_words(config.model_dir) if hosts.is_lead() else None
  found = []
  for split, folder, source, print_ in zip(
    ("train", "held_out"),
    (data.cache_dir, data.held_out_cache_dir),
    images,
    prints,
    strict=True,
  ):
    made = codes_lib.CodeCache.load(folder)
    told = {
      "source": (print_, kinds.describe(data, split, source)),
      "tokenizer": (words, str(config.model_dir)),
    }
    if made.meta.pictures and (seen := _seen(source)):
      told["pictures"] = seen, ""
    _check(config, f"{split}_cache", made, told, folder, split)
    found.append(made)
  return tuple(found)


def latents(data, training: bool, source, fingerprint: str, vae, read):
  """The latent cache of training or held-out images; None without one.

  Args:
    data: config.data of a run of stage latents.
    training: of which of them.
    source: these images.
    fingerprint: their `examples.fingerprint`.
    vae: the VaeConfig of the autoencoder.
    read: gives its weights; called where there is a cache.

  Raises:
    errors.DataError: there is none where config.data says, or it is of other
      images, another autoencoder or other buckets.
  """
  folder = data.latents_dir if training else data.held_out_latents_dir
  if not folder:
    return None
  return latents_lib.LatentCache.load(
    folder,
    source=fingerprint,
    images=_seen(source),
    vae=latent_parts.fingerprint(read(), vae),
    buckets=data.buckets,
  )


def made_of_latents(data) -> dict[str, str]:
  """Fingerprints of the latent caches that config.data names."""
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
  """What writes the cache of some images of config.data."""
  if data.kind == "tfds":
    return "infer.tokenize_data.write_cache with the run's config.data"
  words = ["lavit", "tokenize", "--model", model, "--out", folder]
  words += ["--split", split]
  words += ["--data", data.path if data.kind == "jsonl" else data.kind]
  if data.kind == "jsonl" and data.held_out_path:
    words += ["--held-out", data.held_out_path]
  return shlex.join(words)


def _seen(source) -> str:
  """`image_bytes.of` a source; "" but on the first process."""
  return image_bytes.of(source) if hosts.is_lead() else ""


def _check(config, name, made, told, folder, split):
  """Compares what a cache was made of with (fingerprint, words) of a run's."""
  theirs = {
    "source": (made.meta.source, made.meta.data),
    "tokenizer": (made.meta.tokenizer, made.meta.model),
    "pictures": (made.meta.pictures, ""),
  }
  command = _command(config.data, config.model_dir, folder, split)
  way_out = f"write it again for this run, once it is deleted: {command}"
  differ = [
    agreement.Difference(
      f"{name}.{kind}",
      codes_lib.known_as(*theirs[kind]),
      codes_lib.known_as(*ours),
      way_out,
    )
    for kind, ours in told.items()
    if ours[0] is not None and ours[0] != theirs[kind][0]
  ]
  agreement.settle(
    differ,
    agreement.accepted(config),
    what=f"The code cache {folder}",
    error=errors.DataError,
  )
