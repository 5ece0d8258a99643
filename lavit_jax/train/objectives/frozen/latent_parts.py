"""Reads what a pixel decoder in latents is trained with.

These are the frozen networks (encoder, tokenizer, semantic decoder,
autoencoder) and the weights to start from. The parts are those of imported
official models: `lowres` and `lowres_pixels`, or `highres` and
`highres_pixels`. A tokenizer that was trained here brings its semantic decoder
itself, and the projections then start from random weights.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.diffusion import stable_diffusion
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.train.objectives.frozen import branches

SIZE_NUMBERS = 6  # SDXL: original size, crop corner, target size
_GROUPS = 32  # of every published autoencoder
_ENCODING = ("selector", "merger", "quantizer")  # parts that make codes


def read_tokenizer_config(directory: str) -> tokenizer.TokenizerConfig:
  """Reads the config of a model directory's tokenizer with its encoder.

  Raises:
    errors.CheckpointError: one of them is missing, or they do not fit.
  """
  encoder = checkpoints.read_meta(directory, "encoder")
  meta = checkpoints.read_meta(directory, "tokenizer")
  config = tokenizer.config_from_dict(meta["tokenizer"])
  tokenizer.check_encoder(config, encoder["vit"], directory)
  return config


def without_decoder(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tokenizer's variables without those of its semantic decoder."""
  params = {name: variables["params"][name] for name in _ENCODING}
  return {"params": params, "codebook": variables["codebook"]}


@dataclasses.dataclass(frozen=True)
class Conditioner:
  """Maps code vectors of an image to the conditions of a U-Net.

  Attributes:
    model: a `decoder.LowresDecoder` or `decoder.HighresDecoder`: a frozen
      semantic decoder, and projections of its features.
    semantic: where the semantic decoder's parameters are stored.
    projection: where each of the projections is; None: they start from random
      weights.
    meta: part.json of the part; None if there is none yet.
  """

  model: Any
  semantic: branches.Branch | None
  projection: dict[str, branches.Branch] | None
  meta: dict[str, Any] | None


def read_conditioner(
  directory: str, kind: str, sizes: Mapping[str, Any]
) -> Conditioner:
  """Reads the part `kind`, or the tokenizer's decoder with new projections.

  Args:
    directory: a model directory.
    kind: "lowres" or "highres".
    sizes: `dims`, the widths of the projections, and `pooled`, that of the
      pooled vector (0 for lowres).

  Raises:
    errors.ConfigError: the part has other sizes.
    errors.CheckpointError: neither is there.
  """
  meta = projection = None
  if kind in checkpoints.parts_in(directory):
    meta = checkpoints.read_meta(directory, kind)
    _check_sizes(directory, kind, meta, sizes)
    fields = meta["decoder"]
    names = ("unet_proj", "unet_proj_1", "unet_proj_2", "unet_attnpool")
    projection = branches.present(
      {n: branches.Branch(directory, kind, n) for n in ("decoder", *names)}
    )
    semantic = projection.pop("decoder", None)
  else:
    stored = checkpoints.read_meta(directory, "tokenizer")["tokenizer"]
    fields = stored["decoder"]
    branch = branches.Branch(directory, "tokenizer", "params/decoder")
    semantic = branch if branches.is_there(branch) else None
  if semantic is None:
    raise errors.CheckpointError(
      f"{directory} has no part {kind!r}, and its tokenizer has no semantic"
      f" decoder. Import the {kind} decoder of an official model, or train a"
      " tokenizer."
    )
  config = decoder.DecoderConfig(**fields)
  model = make_conditioner(kind, config, sizes)
  return Conditioner(model, semantic, projection, meta)


def make_conditioner(
  kind: str, config: decoder.DecoderConfig, sizes: Mapping[str, Any]
) -> decoder.LowresDecoder | decoder.HighresDecoder:
  """Makes the semantic decoder of a kind with projections of these sizes."""
  dims = tuple(sizes["dims"])
  if kind == "lowres":
    return decoder.LowresDecoder(config, *dims)
  return decoder.HighresDecoder(config, dims, sizes["pooled"])


def _check_sizes(directory, kind, meta, sizes) -> None:
  """Raises ConfigError unless model.condition has the sizes of the part."""
  dims = meta.get("condition_dims", [meta.get("condition_dim")])
  stored = [*dims, meta.get("pooled_dim", 0)]
  expected = [*sizes["dims"], sizes["pooled"]]
  if stored != expected:
    raise errors.ConfigError(
      f"model.condition has widths {expected[:-1]} and pooled={expected[-1]},"
      f" but the part {kind} of {directory} has {stored[:-1]} and {stored[-1]}."
      " Set model.condition to these, and model.unet to fit."
    )


def conditioner_meta(kind: str, model: Any) -> dict[str, Any]:
  """Returns the part.json entries of a new part `lowres` or `highres`.

  Args:
    kind: of the part.
    model: see `Conditioner.model`.
  """
  meta = {"decoder": dataclasses.asdict(model.config)}
  if kind == "lowres":
    return meta | {"condition_dim": model.condition_dim}
  return meta | {
    "condition_dims": list(model.condition_dims),
    "pooled_dim": model.pooled_dim,
  }


def init_unet(net: unet.UNet, rng: jax.Array) -> Any:
  """Draws the boxed parameters of a U-Net; the input's size has no effect."""
  config, details = net.config, net.config.details
  side = 2 ** (len(config.channels) - 1)
  conditions: dict[str, Any] = {
    "condition": jnp.zeros((1, 1, config.cross_dim))
  }
  if details.added_dim:
    width = details.added_dim - SIZE_NUMBERS * details.added_time_dim
    conditions |= {
      "pooled": jnp.zeros((1, width)),
      "sizes": jnp.zeros((1, SIZE_NUMBERS)),
    }
  z = jnp.zeros((1, side, side, config.in_channels))
  t = jnp.zeros((1,), jnp.int32)
  return net.init(rng, z, t, **conditions)["params"]


def unet_inputs(
  kind: str,
  conditions: Mapping[str, jax.Array],
  uncond: Any,
  drop: jax.Array,
) -> dict[str, jax.Array]:
  """Makes a U-Net's conditions; images where `drop` is True have none.

  As officially: dropped lowres images see the unconditional embeddings alone;
  dropped highres images see zeros in place of tokens and pooled vector, and
  their sizes.

  Args:
    kind: "lowres" or "highres".
    conditions: `tokens` float[B, N, D]; highres: `pooled`, `sizes` too.
    uncond: float[U, D]; highres has none.
    drop: bool[B].

  Returns:
    The keyword arguments of `unet.UNet`.
  """
  tokens, keep = conditions["tokens"], ~drop
  if kind == "lowres":
    padded, is_uncond = stable_diffusion.pad_uncond(uncond, tokens)
    return {
      "condition": jnp.where(drop[:, None, None], padded, tokens),
      "condition_mask": keep[:, None] | is_uncond,
    }
  return {
    "condition": jnp.where(keep[:, None, None], tokens, 0),
    "pooled": jnp.where(keep[:, None], conditions["pooled"], 0),
    "sizes": conditions["sizes"],
  }


def read_tree(branch: branches.Branch) -> Any:
  """Reads a branch as NumPy arrays, floats as float32; None if it is empty.

  It is read array by array, so that a U-Net is never in memory where an
  autoencoder is wanted.
  """
  stored = checkpoints.StoredPart(branch.directory, branch.part)
  flat, top = {}, branch.top
  for path in stored.arrays:
    if path == top:
      return _float32(stored.read(path))
    if path.startswith(f"{top}/"):
      flat[path.removeprefix(f"{top}/")] = _float32(stored.read(path))
  return traverse_util.unflatten_dict(flat, sep="/") if flat else None


def _float32(x):
  return x.astype(checkpoints.cast_dtype(x.dtype, np.float32))


def load_vae(directory: str, kind: str) -> tuple[vae.AutoencoderKL, Any]:
  """Reads the autoencoder of the part `kind`_pixels.

  Returns:
    (module, float32 NumPy parameters).

  Raises:
    errors.CheckpointError: there is none.
  """
  net = vae.AutoencoderKL(read_vae(directory, kind))
  return net, read_tree(branches.Branch(directory, f"{kind}_pixels", "vae"))


def read_vae(directory: str, kind: str) -> vae.VaeConfig:
  """Reads the config of the autoencoder of the part `kind`_pixels.

  Raises:
    errors.CheckpointError: there is none.
  """
  part = f"{kind}_pixels"
  meta = checkpoints.read_meta(directory, part)
  there = branches.is_there(branches.Branch(directory, part, "vae"))
  if not there or "vae" not in meta:
    raise errors.CheckpointError(
      f"The part {part} of {directory} has no autoencoder. Import it again, or"
      " train one: configs/tiny/autoencoder.py."
    )
  return vae.VaeConfig(**meta["vae"])


def check_buckets(buckets: Any, config: vae.VaeConfig) -> None:
  """Checks that latents of every bucket have whole sizes.

  Args:
    buckets: pairs (height, width), in pixels.
    config: of the autoencoder.

  Raises:
    errors.ConfigError: a side is not a multiple of `config.scale`.
  """
  for pair in buckets:
    if any(side % config.scale for side in pair):
      raise errors.ConfigError(
        f"data.buckets has {tuple(pair)}, but a position of the latents is"
        f" {config.scale} pixels a side: heights and widths must be multiples"
        " of it. Change data.buckets."
      )


def fingerprint(params: Mapping[str, Any], config: vae.VaeConfig) -> str:
  """Returns a hex digest of what makes latents: encoder weights and sizes."""
  digest = hashlib.sha256(repr(config.channels).encode())
  if config.groups != _GROUPS:  # no shape of the weights depends on it
    digest.update(f"{config.groups} groups".encode())
  used = {name: params[name] for name in ("encoder", "quant_conv")}
  for path, leaf in jax.tree_util.tree_leaves_with_path(used):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:32]


def provenance(
  config: ml_collections.ConfigDict, semantic_is_part: bool
) -> dict[str, str]:
  """Fingerprints the frozen networks of stage latents past the tokenizer.

  Args:
    config: of the run.
    semantic_is_part: whether the semantic decoder is a part of model_dir; else
      it is the tokenizer's.

  Returns:
    {name: fingerprint}; see `Objective.provenance`.
  """
  kind, of_part = config.model.kind, fingerprints.of_part
  part = f"{kind}_pixels"
  folder = config.vae_from or config.start_from or config.model_dir
  semantic = ("tokenizer", "params/decoder")
  if semantic_is_part:
    semantic = (kind, "decoder")
  prints = {
    "semantic_decoder": of_part(config.model_dir, *semantic),
    "autoencoder": of_part(folder, part, "vae"),
  }
  if config.model.lora.rank:
    prints["unet"] = of_part(config.start_from, part, "unet")
  return prints


def with_port(
  meta: dict[str, Any], folder: str | None, part: str
) -> dict[str, Any]:
  """Adds the importer's notes on the part that training started from.

  They are left out if the noise schedule has changed since.

  Args:
    meta: part.json entries of the new part with a U-Net.
    folder: the model directory that training started from, if any.
    part: its name.
  """
  if not folder:
    return meta
  start = checkpoints.read_meta(folder, part)
  schedule = json.loads(json.dumps(meta["schedule"]))
  if "port" in start and start.get("schedule") == schedule:
    return meta | {"port": start["port"]}
  return meta
