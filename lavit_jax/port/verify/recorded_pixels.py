"""Recordings of U-Nets, autoencoders, schedulers and images; see `verify.py`.

Checks and what they give are as in `recordings.py`. Kinds are "float" and
"exact" as there, "image" for images in [0, 1] and "levels" for uint8 ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.diffusion import schedules, solvers
from lavit_jax.infer.pixels import options
from lavit_jax.infer.presets import official_pixels
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.reading import pixel_folders
from lavit_jax.port.tables import names
from lavit_jax.port.verify import recordings

_PARTS = {"sd": "lowres_pixels", "sdxl": "highres_pixels"}
_STEPS = 5  # of recorded images, where no info_steps says another number
# What the images were drawn with beside the defaults, by kind and by size;
# no array tells it.
_TOLD = {
  ("highres", "1"): {"original_size": (768, 512), "crop": (16, 8)},
}
_DETOKENIZE = ("highres", {"decoder_guidance_scale": 5.0})


def _kinds(a):
  """{"sd": its part, ...} of those of which there are recordings."""
  ends = {n.rpartition("_")[2] for n in a if n.startswith("out_")}
  return {name: part for name, part in _PARTS.items() if name in ends}


def _nchw(x):
  x = np.asarray(x)
  return np.moveaxis(x, -1, -3)


def _unet(a, parts, part):
  """A function of inputs beside the recorded ones to all recorded outputs."""
  stored = parts.part(part)
  config = unet.UNetConfig(**stored.meta["unet"])
  net, blocks = unet.UNet(config), _blocks(config)
  wanted = ("time_embedding", "add_embedding", "conv_in", *blocks)

  @jax.jit
  def apply(params, *args, **kwargs):
    out, seen = net.apply(
      {"params": params},
      *args,
      capture_intermediates=lambda module, _: module.name in wanted,
      **kwargs,
    )
    seen = {k: v["__call__"][0] for k, v in seen["intermediates"].items()}
    outputs = {"eps": out, "conv_in": seen["conv_in"]}
    for i, name in enumerate(blocks):  # those of levels give skips too
      block = seen[name]
      outputs[f"block_{i}"] = block[0] if isinstance(block, tuple) else block
    vectors = {"time_emb": seen["time_embedding"]}
    if "add_embedding" in seen:
      vectors["add_emb"] = seen["add_embedding"]
    return outputs, vectors

  params = stored.params["unet"]
  sample = recordings.nhwc(a["in_sample"])
  t = jnp.full(len(sample), int(a["in_t"]))
  args = params, sample, t, jnp.asarray(a["in_encoder"])

  def run(*more, **added):
    outputs, vectors = apply(*args, *more, **added)
    return {k: _nchw(v) for k, v in outputs.items()} | vectors

  return run


def _blocks(config):
  """Names of the blocks in the order of the recordings."""
  levels = range(len(config.channels))
  down = [f"down_blocks_{i}" for i in levels]
  return (*down, "mid_block", *(f"up_blocks_{i}" for i in levels))


def _unet_sd(a, parts):
  run = _unet(a, parts, _PARTS["sd"])
  mask = jnp.asarray(a["in_mask"], bool)
  made, plain = run(mask), run(jnp.ones_like(mask))
  return recordings.floats(**made, eps_nomask=plain["eps"])


def _unet_sdxl(a, parts):
  run = _unet(a, parts, _PARTS["sdxl"])
  pooled, sizes = jnp.asarray(a["in_text_embeds"]), a["in_time_ids"]
  return recordings.floats(**run(pooled=pooled, sizes=jnp.asarray(sizes)))


def _autoencoded(a, config, params):
  """mean, logvar and decoded of the recorded inputs."""
  net = vae.AutoencoderKL(config)

  @jax.jit
  def run(params, image, latents):
    variables = {"params": params}
    mean, logvar = net.apply(variables, image, method="encode")
    decoded = net.apply(variables, latents, method="decode")
    return {"mean": mean, "logvar": logvar, "decoded": decoded}

  inputs = (recordings.nhwc(a[f"in_{name}"]) for name in ("image", "latents"))
  return {k: _nchw(v) for k, v in run(params, *inputs).items()}


def _vae(a, parts):
  made = {}
  for name, part in _kinds(a).items():
    stored = parts.part(part)
    config = vae.VaeConfig(**stored.meta["vae"])
    found = _autoencoded(a, config, stored.params["vae"])
    made |= {f"{k}_{name}": v for k, v in found.items()}
  return recordings.floats(**made)


def deprecated_names(a, folder):
  """`vae.npz` by the autoencoder of a folder, of the names that it may have.

  Args:
    a: the arrays of vae.npz.
    folder: config.json and weights, the same numbers as pixel_decoding/vae.
  """
  network = pixel_folders.open_network(folder, "vae", folder.name)
  found = {name: tensor.read() for name, tensor in network.found.items()}
  params = names.to_ours(network.table, found)
  made = _autoencoded(a, network.config, params)
  return recordings.floats(**{f"{k}_sd": v for k, v in made.items()})


def _ddim(a, parts):
  made, counts = {}, {}
  for name, part in _kinds(a).items():
    schedule = schedules.NoiseSchedule(**parts.part(part).meta["schedule"])
    prefix = "out_timesteps_"
    for array in [n for n in a if n.startswith(prefix)]:
      count, kind = array.removeprefix(prefix).split("_")
      if kind == name:
        steps = schedules.timesteps(schedule, int(count))
        counts[f"timesteps_{count}_{name}"] = steps
    table = schedules.alphas_cumprod(schedule)
    trajectory, x0 = _walk(schedule, a["in_latents"], a["in_eps"])
    made |= {
      f"trajectory_{name}": trajectory,
      f"x0_{name}": x0,
      f"alphas_cumprod_{name}": table,
    }
  return recordings.floats(**made) | recordings.exact(**counts)


def _walk(schedule, z, outputs):
  """Latents after each step of the official solver, and images predicted."""
  _, numbers = solvers.OFFICIAL.plan(schedule, len(outputs))
  walked = []
  for i, output in enumerate(outputs):
    now = {k: v[i] for k, v in numbers.items()}
    z, x0 = solvers.OFFICIAL.step(schedule, output, z, None, now)
    walked.append((z, x0))
  return (np.stack(arrays) for arrays in zip(*walked, strict=True))


def _vectors(parts, rows):
  """float[B, N, d] of rows of ids, what is no code left out, and valid."""
  model = parts.model
  first, capacity = model.vocab.code_offset, model.config.num_patches
  codes = np.asarray(parts.part("tokenizer").params["codebook"]["codes"])
  found = [row[(row >= first) & (row < first + len(codes))] for row in rows]
  if not all(map(len, found)):
    raise errors.UsageError("a recorded row of tokens has no code")
  counts = np.array([len(row) for row in found])
  valid = np.arange(capacity) < counts[:, None]
  vectors = np.zeros((*valid.shape, codes.shape[1]), np.float32)
  vectors[valid] = codes[np.concatenate(found) - first]
  return vectors, valid


def _drawn(a, parts, kind, vectors, latents, told):
  """Images of vectors from recorded noise, as floats and as uint8."""
  painter = parts.painter(kind)
  noise = recordings.nhwc(latents)
  height, width = (side * painter.factor for side in noise.shape[1:3])
  steps = int(a.get("info_steps", _STEPS))
  how = options.PixelOptions(steps=steps, size=(height, width), **told)
  seeds = np.zeros(len(noise), np.int32)
  image = painter.draw(*vectors, seeds, how, noise=noise)
  return image, (np.asarray(image) * 255).round().astype(np.uint8)


def _images(kind, said):
  """The check of a decoder, whose semantic part gives the arrays `said`."""

  def check(a, parts):
    vectors = _vectors(parts, a["in_tokens"])
    told = parts.painter(kind).told(*vectors)
    told = told if isinstance(told, tuple) else (told,)
    made = recordings.floats(**dict(zip(said, told, strict=True)))
    prefix = "in_latents_"
    for size in [n.removeprefix(prefix) for n in a if n.startswith(prefix)]:
      numbers = _TOLD.get((kind, size), {})
      noise = a[f"{prefix}{size}"]
      image, levels = _drawn(a, parts, kind, vectors, noise, numbers)
      made[f"out_image_{size}"] = (image, "image")
      made[f"out_uint8_{size}"] = (levels, "levels")
    return made

  return check


def _detokenize(a, parts):
  model = parts.model
  images = np.moveaxis(a["in_image"], 1, -1)
  pixels = official_pixels.clip_pixels(images, model.config.vit.image_size)
  ids, valid = model.codes(pixels, a["in_gumbel"])
  rows = [row[seen] for row, seen in zip(ids, valid, strict=True)]
  vectors = _vectors(parts, rows)
  kind, told = _DETOKENIZE
  image, levels = _drawn(a, parts, kind, vectors, a["in_latents"], told)
  return recordings.floats(clip=_nchw(pixels)) | {
    "out_image": (image, "image"),
    "out_uint8": (levels, "levels"),
  }


CHECKS = {
  "unet_sd": _unet_sd,
  "unet_sdxl": _unet_sdxl,
  "vae": _vae,
  "ddim": _ddim,
  "pixels_lowres": _images("lowres", ("xrec",)),
  "pixels_highres": _images("highres", ("prompt_embeds", "pooled")),
  "detokenize": _detokenize,
}
