"""Our side of the U-Net benchmark, and the memory of VAE decoding."""

import contextlib
import functools
import importlib.metadata
import json
import pathlib
import resource

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lavit_jax.diffusion import schedules, stable_diffusion
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.tables import names, pixel_names
from side_by_side import ours, unet_cases

_SCHEDULE = schedules.STABLE_DIFFUSION


def config(sizes: unet_cases.Sizes) -> unet.UNetConfig:
  """That of the U-Net: the last level has no transformer, as in SD 1.5."""
  levels = len(sizes.channels)
  return unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=sizes.channels,
    layers_per_block=sizes.layers_per_block,
    attention=(True,) * (levels - 1) + (False,),
    transformer_layers=(1,) * levels,
    num_heads=(sizes.heads,) * levels,
    cross_dim=sizes.cross_dim,
    groups=sizes.groups,
    details=unet.DiffusersQuirks(mask_bias=unet.MASK_BIAS),
  )


def make(folder, sizes: unet_cases.Sizes) -> dict[str, int]:
  """Writes a random U-Net as diffusers has it; its number of parameters."""
  folder = pathlib.Path(folder) / "unet"
  folder.mkdir(parents=True, exist_ok=True)
  made = config(sizes)
  shapes = config_lib.abstract_unet(made)
  rng = np.random.default_rng(0)
  params = jax.tree_util.tree_map_with_path(
    functools.partial(_random, rng), shapes
  )
  table = pixel_names.unet(made)
  tensors = {
    name: np.ascontiguousarray(value)
    for name, value in names.to_official(table, params).items()
  }
  path = folder / "diffusion_pytorch_model.safetensors"
  safetensors.numpy.save_file(tensors, path)
  content = config_lib.unet_fields(made)
  (folder / "config.json").write_text(json.dumps(content))
  return {"unet": sum(x.size for x in jax.tree.leaves(params))}


def _random(rng, path, leaf):
  """Kernels that keep the spread of what they are given; scales near 1."""
  name = path[-1].key
  if name == "kernel":
    fan_in = np.prod(leaf.shape[:-1])
    return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)
  base = 1.0 if name == "scale" else 0.0
  return (base + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)


class Side:
  """Sampling as class LaVIT does it, from noise that is given."""

  def __init__(self, folder, sizes: unet_cases.Sizes, threads: int):
    """Threads are the cores' that the process may use."""
    self._folder, self._sizes = pathlib.Path(folder) / "unet", sizes

  def versions(self) -> dict[str, str]:
    """Of the libraries that compute."""
    return {x: importlib.metadata.version(x) for x in ("jax", "jaxlib")}

  @functools.cached_property
  def _net(self):
    made = config(self._sizes)
    tensors = safetensors.numpy.load_file(
      self._folder / "diffusion_pytorch_model.safetensors"
    )
    params = names.to_flax(pixel_names.unet(made), tensors)
    return unet.UNet(made), jax.tree.map(jnp.asarray, params)

  def work(self, case: unet_cases.Case, batch: int):
    """What is timed: a function of no arguments that gives numpy arrays."""
    net, params = self._net
    side = 8 * self._sizes.latent
    given = unet_cases.inputs(self._sizes, batch)
    settings = stable_diffusion.Settings(height=side, width=side)

    @jax.jit
    def draw(params, noise, tokens, uncond):
      return stable_diffusion.lowres(
        lambda z, t, told: net.apply({"params": params}, z, t, **told),
        _SCHEDULE,
        settings,
        tokens,
        uncond,
        steps=case.steps,
        seeds=jnp.zeros(len(noise), jnp.int32),
        guidance=jnp.float32(unet_cases.GUIDANCE),
        noise=noise,
      )

    return lambda: {"latents": np.asarray(draw(params, **given))}

  def judged(self, case, batch):
    """None: the work itself is compared."""

  def convolutions(self, shapes) -> list[float]:
    """GFLOP/s of single 3 x 3 convolutions, NHWC."""
    rates = []
    for side, into, out in shapes:
      x = jnp.ones((2, side, side, into))
      kernel = jnp.ones((3, 3, into, out))
      run = jax.jit(
        lambda x, kernel: jax.lax.conv_general_dilated(
          x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
      )
      seconds = unet_cases.fastest(
        lambda run=run, x=x, kernel=kernel: run(x, kernel).block_until_ready()
      )
      rates.append(unet_cases.gflop((side, into, out)) / seconds)
    return rates

  def peak(self) -> float:
    """Most memory that the process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a trace and a summary, see `ours.Side`."""
    with ours.Side.profile(self, directory):
      yield


def vae_memory(_folder, sizes: unet_cases.Sizes) -> list[dict]:
  """Temporary memory of decoding an image, by its compiled program.

  Returns:
    A dict for decoding whole and for each size of tiles: `tile` (None:
    whole), `temporary_mb`, and `compile_s`.
  """
  import time

  groups = min(sizes.groups, 32)
  net = vae.AutoencoderKL(
    vae.VaeConfig(
      channels=sizes.vae_channels, layers_per_block=2, groups=groups
    )
  )
  side = net.config.scale
  params = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
  )["params"]
  variables = {"params": nn.meta.unbox(params)}
  places = sizes.image // side
  z = jax.ShapeDtypeStruct((1, places, places, 4), jnp.float32)
  rows = []
  for tile in (None, *sizes.tiles):
    decode = jax.jit(functools.partial(_decode, net, tile))
    start = time.perf_counter()
    compiled = decode.lower(variables, z).compile()
    seconds = time.perf_counter() - start
    used = compiled.memory_analysis().temp_size_in_bytes / 1e6
    rows.append({"tile": tile, "temporary_mb": used, "compile_s": seconds})
  return rows


def _decode(net, tile, variables, z):
  if tile is None:
    return net.apply(variables, z, method="decode")
  return vae.decode_tiled(net, variables, z, tile=tile)
