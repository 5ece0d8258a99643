"""What a pixel decoder in latents is trained with, from model directories.

The frozen chain (encoder, tokenizer, semantic decoder, autoencoder) and the
weights to start from. The parts are those of imported official models:
`lowres` and `lowres_pixels`, or `highres` and `highres_pixels`. A tokenizer
that was trained here brings its semantic decoder itself, and the projections
then start from nothing.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lavit_jax import checkpoints, errors, files
from lavit_jax.infer import latents
from lavit_jax.models import decoder, tokenizer, unet, vae

KINDS = ("lowres", "highres")
_SIZE_NUMBERS = 6  # of SDXL


@dataclasses.dataclass(frozen=True)
class Words:
  """Encoder and tokenizer: pictures to words, and words to vectors.

  `frozen` has "encoder" and "tokenizer".
  """

  model: tokenizer.DynamicVisualTokenizer
  frozen: dict[str, Any]


def load_words(directory, dtype: str) -> Words:
  """The frozen encoder in a dtype, the tokenizer in float32.

  Codes are told apart by small differences: the tokenizer keeps them.

  Args:
    directory: a model directory with `encoder` and `tokenizer`.
    dtype: of the encoder and its computation.
  """
  stored = checkpoints.load_part(directory, "tokenizer")
  config = tokenizer.config_from_dict(stored.meta["tokenizer"])
  model = words_model(config, dtype)
  encoder = checkpoints.load_part(directory, "encoder", dtype=dtype)
  variables = used_words(stored.params)
  return Words(model, {"encoder": encoder.params, "tokenizer": variables})


def words_model(config: tokenizer.TokenizerConfig, dtype: str):
  """The tokenizer in float32, its encoder in a dtype."""
  config = tokenizer.with_dtype(config, "float32")
  vit = dataclasses.replace(config.vit, dtype=dtype)
  config = dataclasses.replace(config, vit=vit)
  return tokenizer.DynamicVisualTokenizer(config)


def used_words(variables):
  """Of a tokenizer's variables, those that make words."""
  needed = ("selector", "merger", "quantizer")
  params = {name: variables["params"][name] for name in needed}
  return {"params": params, "codebook": variables["codebook"]}


@dataclasses.dataclass(frozen=True)
class Conditioner:
  """Vectors of words to what a U-Net is told.

  Attributes:
    model: a `decoder.LowresDecoder` or `decoder.HighresDecoder`.
    semantic: its frozen semantic decoder's parameters, float32.
    projection: the parameters after it; None: they start from nothing.
    meta: of the part, None if there is none yet.
  """

  model: Any
  semantic: Any
  projection: Any
  meta: dict[str, Any] | None


def load_conditioner(directory, kind: str, sizes, dtype: str) -> Conditioner:
  """The part `kind`, or the tokenizer's own decoder with new projections.

  Args:
    directory: a model directory.
    kind: one of `KINDS`.
    sizes: `dims`, the widths of the projections, and `pooled`, that of the
      pooled vector (0 for lowres).
    dtype: of the computation.

  Raises:
    errors.ConfigError: sizes that are not those of the part.
    errors.CheckpointError: neither is there.
  """
  if kind in checkpoints.parts_in(directory):
    meta = checkpoints.read_meta(directory, kind)
    _check_sizes(directory, kind, meta, sizes)
    config = meta["decoder"]
    semantic = read_tree(directory, kind, "decoder")
    names = ("unet_proj", "unet_proj_1", "unet_proj_2", "unet_attnpool")
    found = {name: read_tree(directory, kind, name) for name in names}
    projection = {k: v for k, v in found.items() if v is not None}
  else:
    meta, projection = None, None
    own = checkpoints.read_meta(directory, "tokenizer")["tokenizer"]
    config = own["decoder"]
    semantic = read_tree(directory, "tokenizer", "params/decoder")
  if semantic is None:
    raise errors.CheckpointError(
      f"{directory} has no part {kind!r}, and its tokenizer no semantic"
      f" decoder of its own. Import the {kind} decoder of an official model,"
      " or train a tokenizer."
    )
  config = decoder.DecoderConfig(**config | {"dtype": dtype})
  model = make_conditioner(kind, config, sizes)
  return Conditioner(model, semantic, projection, meta)


def make_conditioner(kind, config, sizes):
  """The semantic decoder of one kind with projections of these sizes."""
  dims = tuple(sizes["dims"])
  if kind == "lowres":
    return decoder.LowresDecoder(config, *dims)
  return decoder.HighresDecoder(config, dims, sizes["pooled"])


def _check_sizes(directory, kind, meta, sizes):
  theirs = meta.get("condition_dims", [meta.get("condition_dim")])
  found = [*theirs, meta.get("pooled_dim", 0)]
  ours = [*sizes["dims"], sizes["pooled"]]
  if found != ours:
    raise errors.ConfigError(
      f"model.condition has widths {ours[:-1]} and pooled={ours[-1]}, but the"
      f" part {kind} of {directory} has {found[:-1]} and {found[-1]}. Set"
      f" model.condition to these, and model.unet to fit."
    )


def conditioner_meta(kind: str, model) -> dict[str, Any]:
  """The meta of a part `lowres` or `highres` that was made here."""
  meta = {"decoder": dataclasses.asdict(model.config)}
  if kind == "lowres":
    return meta | {"condition_dim": model.condition_dim}
  return meta | {
    "condition_dims": list(model.condition_dims),
    "pooled_dim": model.pooled_dim,
  }


def check_unet(kind: str, config: unet.UNetConfig, sizes) -> None:
  """Raises ConfigError unless the U-Net takes what the conditioner gives."""
  details, pooled = config.details, sizes["pooled"]
  added = pooled + _SIZE_NUMBERS * details.added_time_dim if pooled else 0
  good = {
    f"model.kind={kind!r} is none of {KINDS}": kind in KINDS,
    f"lowres has one width, highres two; model.condition.dims is"
    f" {tuple(sizes['dims'])}": len(sizes["dims"]) == 1 + (kind == "highres"),
    f"model.condition.pooled={pooled}: only highres has a pooled vector": bool(
      pooled
    )
    == (kind == "highres"),
    f"model.unet.cross_dim={config.cross_dim}, but the condition is"
    f" {sum(sizes['dims'])} wide": config.cross_dim == sum(sizes["dims"]),
    f"model.unet.details.added_dim={details.added_dim}, but pooled vector and"
    f" sizes are {added} wide": details.added_dim == added,
  }
  for wrong, fine in good.items():
    if not fine:
      raise errors.ConfigError(f"{wrong}. Change config.model to agree.")


def check_buckets(buckets, config: vae.VaeConfig) -> None:
  """Raises ConfigError for sides that the autoencoder cannot halve."""
  for pair in buckets:
    if any(side % config.scale for side in pair):
      raise errors.ConfigError(
        f"data.buckets has {tuple(pair)}, but a place of the latents is"
        f" {config.scale} pixels a side: heights and widths must be multiples"
        " of it. Change data.buckets."
      )


def check_start(folder, part: str, config: unet.UNetConfig) -> None:
  """Whether a model directory has a U-Net of a config to start from.

  Raises:
    errors.ConfigError: none is given, or there is none, or it is another.
  """
  if folder is None:
    raise errors.ConfigError(
      "start_from is not set. This run starts from Stable Diffusion's weights:"
      f" import them (lavit port import), and give the model directory with"
      f" the part {part} as --config.start_from=DIR. An empty"
      " --config.start_from= trains from nothing."
    )
  if not folder:
    return
  if part not in checkpoints.parts_in(folder):
    raise errors.ConfigError(
      f"start_from={folder} has no part {part}; it has"
      f" {', '.join(checkpoints.parts_in(folder)) or 'none'}. Give the model"
      " directory that Stable Diffusion's U-Net was imported into."
    )
  fields = checkpoints.read_meta(folder, part).get("unet")
  if fields is None:
    raise errors.ConfigError(
      f"The part {part} of start_from={folder} has an autoencoder, but no"
      " U-Net to start from. Give another, or leave start_from empty and set"
      f" vae_from={folder}."
    )
  theirs = dataclasses.asdict(unet.UNetConfig(**fields))
  ours = dataclasses.asdict(config)
  theirs |= {name: ours[name] for name in ("dtype", "remat", "scan")}
  if wrong := [name for name in ours if ours[name] != theirs[name]]:
    name = wrong[0]
    raise errors.ConfigError(
      f"The U-Net of start_from={folder} has {name}={theirs[name]}, but"
      f" model.unet.{name}={ours[name]}: weights of one are not those of the"
      f" other. Set model.unet to what {part}/part.json says."
    )


def init_unet(net: unet.UNet, rng):
  """Boxed parameters of a U-Net; sizes of the input do not matter."""
  config, details = net.config, net.config.details
  side = 2 ** (len(config.channels) - 1)
  given = {"condition": jnp.zeros((1, 1, config.cross_dim))}
  if details.added_dim:
    width = details.added_dim - _SIZE_NUMBERS * details.added_time_dim
    given |= {
      "pooled": jnp.zeros((1, width)),
      "sizes": jnp.zeros((1, _SIZE_NUMBERS)),
    }
  z = jnp.zeros((1, side, side, config.in_channels))
  return net.init(rng, z, jnp.zeros((1,), jnp.int32), **given)["params"]


def tell(kind: str, told, uncond, drop):
  """The U-Net's conditions; nothing is told where `drop` is True.

  As officially: lowres sees the unconditional embeddings alone, highres zeros
  in place of tokens and pooled vector, and its sizes.

  Args:
    kind: "lowres" or "highres".
    told: `tokens` float[B, N, D]; highres: `pooled`, `sizes` too.
    uncond: float[U, D], of lowres.
    drop: bool[B].

  Returns:
    The keywords of `unet.UNet`.
  """
  tokens, keep = told["tokens"], ~drop
  if kind == "lowres":
    rest, seen = latents.pad_uncond(uncond, tokens)
    return {
      "condition": jnp.where(drop[:, None, None], rest, tokens),
      "condition_mask": keep[:, None] | seen,
    }
  return {
    "condition": jnp.where(keep[:, None, None], tokens, 0),
    "pooled": jnp.where(keep[:, None], told["pooled"], 0),
    "sizes": told["sizes"],
  }


def read_tree(directory, name: str, top: str, dtype="float32"):
  """One branch of a part, as numpy arrays; None if the part has none.

  Read array by array, so that a U-Net is never held where an autoencoder is
  wanted.

  Args:
    directory: a model directory.
    name: of the part.
    top: path of the branch, such as "unet" or "params/decoder".
    dtype: to which floats are cast.
  """
  stored, flat = checkpoints.StoredPart(directory, name), {}
  for path in stored.arrays:
    if path == top:
      return cast(stored.read(path), dtype)
    if path.startswith(f"{top}/"):
      rest = path.removeprefix(f"{top}/")
      flat[rest] = cast(stored.read(path), dtype)
  return traverse_util.unflatten_dict(flat, sep="/") if flat else None


def cast(tree, dtype):
  """A tree of numpy arrays, its floats in a dtype."""
  dtype = jnp.dtype(dtype)
  return jax.tree.map(
    lambda x: np.asarray(x).astype(checkpoints.cast_dtype(x.dtype, dtype)),
    tree,
  )


def load_vae(directory, kind: str):
  """(AutoencoderKL, float32 parameters) of the part `kind`_pixels.

  Raises:
    errors.CheckpointError: there is none.
  """
  part = f"{kind}_pixels"
  meta = checkpoints.read_meta(directory, part)
  params = read_tree(directory, part, "vae")
  if params is None or "vae" not in meta:
    raise errors.CheckpointError(
      f"The part {part} of {directory} has no autoencoder. Import it again, or"
      " train one: configs/tiny/autoencoder.py."
    )
  return vae.AutoencoderKL(vae.VaeConfig(**meta["vae"])), params


def fingerprint(params, config: vae.VaeConfig) -> str:
  """Hex digest of what makes latents: the encoder's weights and its sizes."""
  digest = hashlib.sha256(repr(config.channels).encode())
  made_by = {name: params[name] for name in ("encoder", "quant_conv")}
  for path, leaf in jax.tree_util.tree_leaves_with_path(made_by):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:32]


def same_directory(a, b) -> bool:
  """Whether two paths, not empty, mean one directory."""
  paths = [_resolved(p) if p else None for p in (a, b)]
  return None not in paths and paths[0] == paths[1]


def _resolved(path):
  """One form of all that mean the same."""
  if files.is_remote(path):
    return os.fspath(path).rstrip("/")
  return pathlib.Path(path).resolve()
