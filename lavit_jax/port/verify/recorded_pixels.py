"""Checks of recorded U-Nets, autoencoders, schedules and images.

See `verify.py`. Each check takes the arrays of one file and the parts of the
model, and returns `results.Results` for the file's `out_*` arrays.
"""

import pathlib
from collections.abc import Mapping

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
from lavit_jax.port.verify import results

_PARTS = {"sd": "lowres_pixels", "sdxl": "highres_pixels"}
_STEPS = 5  # of recorded images without info_steps
# Options of recorded images that no array shows, by decoder and size.
_OPTIONS = {
  ("highres", "1"): {"original_size": (768, 512), "crop": (16, 8)},
}
_DETOKENIZE = ("highres", {"decoder_guidance_scale": 5.0})


def _kinds(arrays):
  """Returns {"sd": part, "sdxl": part} of those with results."""
  ends = {n.rpartition("_")[2] for n in arrays if n.startswith("out_")}
  return {name: part for name, part in _PARTS.items() if name in ends}


def _unet(arrays, parts, part):
  """Returns a function from further inputs to all recorded outputs."""
  stored = parts.part(part)
  config = unet.UNetConfig(**stored.meta["unet"])
  net, blocks = unet.UNet(config), _blocks(config)
  captured = ("time_embedding", "add_embedding", "conv_in", *blocks)

  @jax.jit
  def apply(params, *args, **kwargs):
    out, state = net.apply(
      {"params": params},
      *args,
      capture_intermediates=lambda module, _: module.name in captured,
      **kwargs,
    )
    inner = {k: v["__call__"][0] for k, v in state["intermediates"].items()}
    outputs = {"eps": out, "conv_in": inner["conv_in"]}
    for i, name in enumerate(blocks):  # levels also return skips
      block = inner[name]
      outputs[f"block_{i}"] = block[0] if isinstance(block, tuple) else block
    vectors = {"time_emb": inner["time_embedding"]}
    if "add_embedding" in inner:
      vectors["add_emb"] = inner["add_embedding"]
    return outputs, vectors

  params = stored.params["unet"]
  sample = results.nhwc(arrays["in_sample"])
  t = jnp.full(len(sample), int(arrays["in_t"]))
  args = params, sample, t, jnp.asarray(arrays["in_encoder"])

  def run(*more, **added):
    outputs, vectors = apply(*args, *more, **added)
    return {k: results.nchw(v) for k, v in outputs.items()} | vectors

  return run


def _blocks(config):
  """Returns the names of the blocks in the order of the results."""
  levels = range(len(config.channels))
  down = [f"down_blocks_{i}" for i in levels]
  return (*down, "mid_block", *(f"up_blocks_{i}" for i in levels))


def _unet_sd(arrays, parts):
  run = _unet(arrays, parts, _PARTS["sd"])
  mask = jnp.asarray(arrays["in_mask"], bool)
  masked, unmasked = run(mask), run(jnp.ones_like(mask))
  return results.floats(**masked, eps_nomask=unmasked["eps"])


def _unet_sdxl(arrays, parts):
  run = _unet(arrays, parts, _PARTS["sdxl"])
  pooled, sizes = jnp.asarray(arrays["in_text_embeds"]), arrays["in_time_ids"]
  return results.floats(**run(pooled=pooled, sizes=jnp.asarray(sizes)))


def _autoencoded(arrays, config, params):
  """Returns mean, logvar and decoded of the recorded inputs."""
  net = vae.AutoencoderKL(config)

  @jax.jit
  def run(params, image, latents):
    variables = {"params": params}
    mean, logvar = net.apply(variables, image, method="encode")
    decoded = net.apply(variables, latents, method="decode")
    return {"mean": mean, "logvar": logvar, "decoded": decoded}

  inputs = (results.nhwc(arrays[f"in_{name}"]) for name in ("image", "latents"))
  return {k: results.nchw(v) for k, v in run(params, *inputs).items()}


def _vae(arrays, parts):
  checked = {}
  for name, part in _kinds(arrays).items():
    stored = parts.part(part)
    config = vae.VaeConfig(**stored.meta["vae"])
    values = _autoencoded(arrays, config, stored.params["vae"])
    checked |= {f"{k}_{name}": v for k, v in values.items()}
  return results.floats(**checked)


def deprecated_names(
  arrays: Mapping[str, np.ndarray], folder: pathlib.Path
) -> results.Results:
  """Checks vae.npz with an autoencoder whose names may be deprecated.

  Args:
    arrays: of vae.npz.
    folder: with config.json and weights, the same values as in
      pixel_decoding/vae.
  """
  network = pixel_folders.open_network(folder, "vae", folder.name)
  tensors = {name: tensor.read() for name, tensor in network.tensors.items()}
  params = names.to_flax(network.table, tensors)
  values = _autoencoded(arrays, network.config, params)
  return results.floats(**{f"{k}_sd": v for k, v in values.items()})


def _ddim(arrays, parts):
  checked, counts = {}, {}
  for name, part in _kinds(arrays).items():
    schedule = schedules.NoiseSchedule(**parts.part(part).meta["schedule"])
    prefix = "out_timesteps_"
    for array in [n for n in arrays if n.startswith(prefix)]:
      count, kind = array.removeprefix(prefix).split("_")
      if kind == name:
        steps = schedules.timesteps(schedule, int(count))
        counts[f"timesteps_{count}_{name}"] = steps
    table = schedules.alphas_cumprod(schedule)
    trajectory, x0 = _walk(schedule, arrays["in_latents"], arrays["in_eps"])
    checked |= {
      f"trajectory_{name}": trajectory,
      f"x0_{name}": x0,
      f"alphas_cumprod_{name}": table,
    }
  return results.floats(**checked) | results.exact(**counts)


def _walk(schedule, z, outputs):
  """Returns latents after each step of the official solver, and predictions."""
  _, numbers = solvers.OFFICIAL.plan(schedule, len(outputs))
  steps = []
  for i, output in enumerate(outputs):
    now = {k: v[i] for k, v in numbers.items()}
    z, x0 = solvers.OFFICIAL.step(schedule, output, z, None, now)
    steps.append((z, x0))
  return (np.stack(values) for values in zip(*steps, strict=True))


def _vectors(parts, rows):
  """Returns float[B, N, d] vectors of the codes in rows, and bool[B, N] valid.

  Args:
    parts: of the model.
    rows: of ids; those that are no code are ignored.
  """
  model = parts.model
  first, capacity = model.vocab.code_offset, model.config.num_patches
  codes = np.asarray(parts.part("tokenizer").params["codebook"]["codes"])
  ids = [row[(row >= first) & (row < first + len(codes))] for row in rows]
  if not all(map(len, ids)):
    raise errors.UsageError("a recorded row of tokens has no code")
  counts = np.array([len(row) for row in ids])
  valid = np.arange(capacity) < counts[:, None]
  vectors = np.zeros((*valid.shape, codes.shape[1]), np.float32)
  vectors[valid] = codes[np.concatenate(ids) - first]
  return vectors, valid


def _draw(arrays, parts, kind, vectors, latents, settings):
  """Draws images of vectors from recorded noise, as floats and as uint8."""
  decoder = parts.pixel_decoder(kind)
  noise = results.nhwc(latents)
  height, width = (side * decoder.factor for side in noise.shape[1:3])
  steps = int(arrays.get("info_steps", _STEPS))
  how = options.PixelOptions(steps=steps, size=(height, width), **settings)
  seeds = np.zeros(len(noise), np.int32)
  image = decoder.draw(*vectors, seeds, how, noise=noise)
  return image, (np.asarray(image) * 255).round().astype(np.uint8)


def _images(kind, condition_names):
  """Returns the check of a pixel decoder.

  Args:
    kind: "lowres" or "highres".
    condition_names: recorded names of the semantic decoder's outputs.
  """

  def check(arrays, parts):
    vectors = _vectors(parts, arrays["in_tokens"])
    condition = parts.pixel_decoder(kind).condition(*vectors)
    condition = condition if isinstance(condition, tuple) else (condition,)
    checked = results.floats(
      **dict(zip(condition_names, condition, strict=True))
    )
    prefix = "in_latents_"
    for size in [
      n.removeprefix(prefix) for n in arrays if n.startswith(prefix)
    ]:
      settings = _OPTIONS.get((kind, size), {})
      noise = arrays[f"{prefix}{size}"]
      image, levels = _draw(arrays, parts, kind, vectors, noise, settings)
      checked[f"out_image_{size}"] = (image, "image")
      checked[f"out_uint8_{size}"] = (levels, "levels")
    return checked

  return check


def _detokenize(arrays, parts):
  model = parts.model
  images = np.moveaxis(arrays["in_image"], 1, -1)
  pixels = official_pixels.clip_pixels(images, model.config.vit.image_size)
  ids, valid = model.codes(pixels, arrays["in_gumbel"])
  rows = [row[used] for row, used in zip(ids, valid, strict=True)]
  vectors = _vectors(parts, rows)
  kind, settings = _DETOKENIZE
  latents = arrays["in_latents"]
  image, levels = _draw(arrays, parts, kind, vectors, latents, settings)
  return results.floats(clip=results.nchw(pixels)) | {
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
