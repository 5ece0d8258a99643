"""What a pixel decoder in latents is trained with, from model directories.

The frozen chain (encoder, tokenizer, semantic decoder, autoencoder) and the
weights to start from. The parts are those of imported official models:
`lowres` and `lowres_pixels`, or `highres` and `highres_pixels`. A tokenizer
that was trained here brings its semantic decoder itself, and the projections
then start from nothing.
"""

import dataclasses
import hashlib
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lavit_jax.core import agreement, errors
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.diffusion import schedules, stable_diffusion
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.train.objectives.frozen import branches

KINDS = ("lowres", "highres")
_LOG = logging.getLogger(__name__)
_SIZE_NUMBERS = 6  # of SDXL
_GROUPS = 32
# Fields of a schedule that a network does not learn by.
_SAMPLING = ("spacing", "steps_offset", "alpha_to_one", "clip")


def read_words(directory) -> tokenizer.TokenizerConfig:
  """What encoder and tokenizer of a model directory are.

  Raises:
    errors.CheckpointError: one of them is missing.
  """
  encoder = checkpoints.read_meta(directory, "encoder")
  meta = checkpoints.read_meta(directory, "tokenizer")
  config = tokenizer.config_from_dict(meta["tokenizer"])
  tokenizer.check_encoder(config, encoder["vit"], directory)
  return config


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
    semantic: where its frozen semantic decoder's parameters lie.
    projection: where each of those after it; None: they start from nothing.
    meta: of the part, None if there is none yet.
  """

  model: Any
  semantic: branches.Branch | None
  projection: dict[str, branches.Branch] | None
  meta: dict[str, Any] | None


def read_conditioner(directory, kind: str, sizes) -> Conditioner:
  """The part `kind`, or the tokenizer's own decoder with new projections.

  Args:
    directory: a model directory.
    kind: one of `KINDS`.
    sizes: `dims`, the widths of the projections, and `pooled`, that of the
      pooled vector (0 for lowres).

  Raises:
    errors.ConfigError: sizes that are not those of the part.
    errors.CheckpointError: neither is there.
  """
  if kind in checkpoints.parts_in(directory):
    meta = checkpoints.read_meta(directory, kind)
    _check_sizes(directory, kind, meta, sizes)
    config = meta["decoder"]
    semantic = branches.Branch(directory, kind, "decoder")
    names = ("unet_proj", "unet_proj_1", "unet_proj_2", "unet_attnpool")
    found = {name: branches.Branch(directory, kind, name) for name in names}
    projection = {k: v for k, v in found.items() if branches.is_there(v)}
  else:
    meta, projection = None, None
    own = checkpoints.read_meta(directory, "tokenizer")["tokenizer"]
    config = own["decoder"]
    semantic = branches.Branch(directory, "tokenizer", "params/decoder")
  if not branches.is_there(semantic):
    raise errors.CheckpointError(
      f"{directory} has no part {kind!r}, and its tokenizer no semantic"
      f" decoder of its own. Import the {kind} decoder of an official model,"
      " or train a tokenizer."
    )
  config = decoder.DecoderConfig(**config)
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


def check_start(
  run, config: unet.UNetConfig, schedule: schedules.NoiseSchedule
) -> None:
  """Whether the model directory that a run starts from has its U-Net.

  Args:
    run: its config; `accept` names differences that are meant, say a change
      to velocities without a signal at the last step (arXiv 2305.08891).
    config: of its U-Net.
    schedule: of the run; what the U-Net was trained to predict, and at which
      levels of noise, must be the same. How it is sampled need not.

  Raises:
    errors.ConfigError: none is given, or there is none, or it is another.
  """
  folder, part = run.start_from, f"{run.model.kind}_pixels"
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
  what = f"The U-Net of start_from={folder}"
  theirs = unet.UNetConfig(**fields)
  differ = agreement.fields(theirs, config, "model.unet.")
  told = checkpoints.read_meta(folder, part).get("schedule")
  if told is not None:
    differ += _of_schedule(schedules.NoiseSchedule(**told), schedule)
  else:
    _LOG.warning("%s does not say its noise schedule", what)
  agreement.settle(differ, agreement.accepted(run), what=what)


def _of_schedule(theirs, ours):
  """Differences of two schedules in what a network learns by them."""
  found = agreement.fields(theirs, ours, "model.schedule.", _SAMPLING)
  tables = [schedules.alphas_cumprod(s) for s in (theirs, ours)]
  if len(tables[0]) == len(tables[1]) and np.allclose(*tables, rtol=1e-5):
    # The same levels of noise, told in other words.
    found = [d for d in found if d.name == "model.schedule.prediction"]
  return found


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
    rest, seen = stable_diffusion.pad_uncond(uncond, tokens)
    return {
      "condition": jnp.where(drop[:, None, None], rest, tokens),
      "condition_mask": keep[:, None] | seen,
    }
  return {
    "condition": jnp.where(keep[:, None, None], tokens, 0),
    "pooled": jnp.where(keep[:, None], told["pooled"], 0),
    "sizes": told["sizes"],
  }


def read_tree(branch: branches.Branch):
  """A branch as numpy arrays, floats float32; None if the part has none.

  Read array by array, so that a U-Net is never held where an autoencoder is
  wanted.
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


def load_vae(directory, kind: str):
  """(AutoencoderKL, float32 numpy parameters) of the part `kind`_pixels.

  Raises:
    errors.CheckpointError: there is none.
  """
  net = vae.AutoencoderKL(read_vae(directory, kind))
  return net, read_tree(branches.Branch(directory, f"{kind}_pixels", "vae"))


def read_vae(directory, kind: str) -> vae.VaeConfig:
  """What the autoencoder of the part `kind`_pixels is.

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


def fingerprint(params, config: vae.VaeConfig) -> str:
  """Hex digest of what makes latents: the encoder's weights and its sizes."""
  digest = hashlib.sha256(repr(config.channels).encode())
  if config.groups != _GROUPS:  # as every published one; told by no weight
    digest.update(f"{config.groups} groups".encode())
  made_by = {name: params[name] for name in ("encoder", "quant_conv")}
  for path, leaf in jax.tree_util.tree_leaves_with_path(made_by):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:32]


def made_of(config, semantic_is_part: bool) -> dict[str, str]:
  """Fingerprints of what stage latents takes frozen, words apart.

  Args:
    config: of a run.
    semantic_is_part: whether the semantic decoder is a part of model_dir; else
      it is the tokenizer's own.
  """
  kind, of = config.model.kind, fingerprints.of_part
  part = f"{kind}_pixels"
  folder = config.vae_from or config.start_from or config.model_dir
  branch = ("tokenizer", "params/decoder")
  if semantic_is_part:
    branch = (kind, "decoder")
  found = {
    "semantic_decoder": of(config.model_dir, *branch),
    "autoencoder": of(folder, part, "vae"),
  }
  if config.model.lora.rank:
    found["unet"] = of(config.start_from, part, "unet")
  return found


def with_port(meta, folder, part: str) -> dict[str, Any]:
  """A meta with the port's notes on the part it started from, if they fit.

  Args:
    meta: of the part with a U-Net.
    folder: the model directory that training started from, or nothing.
    part: its name.
  """
  if not folder:
    return meta
  theirs = checkpoints.read_meta(folder, part)
  same = json.loads(json.dumps(meta["schedule"]))
  if "port" in theirs and theirs.get("schedule") == same:
    return meta | {"port": theirs["port"]}
  return meta


def check_directories(config, *, starts: bool) -> None:
  """Whether a run writes elsewhere than it starts, and a LoRA has a start.

  Args:
    config: of the run.
    starts: whether there is a U-Net to start from.

  Raises:
    errors.ConfigError: not so.
  """
  if files.same(config.start_from, config.model_dir):
    raise errors.ConfigError(
      f"start_from and model_dir are both {config.model_dir}: the result"
      " would take the place of the weights it starts from. Give another"
      " model_dir with encoder, tokenizer and semantic decoder."
    )
  low = config.model.lora
  if low.rank and (low.alpha <= 0 or not starts):
    raise errors.ConfigError(
      f"model.lora={low.to_dict()} changes a trained U-Net: it needs an"
      " alpha above 0, and start_from, that U-Net's model directory. Set"
      " model.lora.rank=0 to train the whole."
    )
