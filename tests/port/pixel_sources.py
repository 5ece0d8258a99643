"""Small pixel decoders in diffusers' format that fit `sources.py`."""

import json

import numpy as np
import torch
from safetensors import torch as safe

from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.diffusers import scheduler_config, weight_files
from lavit_jax.port.formats import official_layout
from lavit_jax.port.tables import names, pixel_names

FOLDERS = official_layout.PIXEL_FOLDERS
STEM = weight_files.STEM
SHAPE = {
  "in_channels": 4,
  "out_channels": 4,
  "channels": (8, 16),
  "layers_per_block": 1,
  "transformer_layers": (1, 1),
  "groups": 4,
}
UNETS = {  # what the decoders of `sources.py` give
  "lowres_pixels": unet.UNetConfig(
    **SHAPE,
    attention=(True, False),
    num_heads=(2, 2),
    cross_dim=10,
    details=unet.DiffusersQuirks(mask_bias=unet.MASK_BIAS),
  ),
  "highres_pixels": unet.UNetConfig(
    **SHAPE,
    attention=(False, True),
    num_heads=(1, 4),
    cross_dim=18,
    details=unet.DiffusersQuirks(
      linear_projection=True,
      mask_bias=unet.MASK_BIAS,
      added_dim=13 + 6 * 2,
      added_time_dim=2,
    ),
  ),
}
VAE = vae.VaeConfig(
  channels=(4, 8), layers_per_block=1, groups=2, sample_size=8
)
UNCOND = np.linspace(-1, 1, 30, dtype=np.float32).reshape(1, 3, 10)


def config(part, kind):
  """Returns the sizes of a network."""
  return UNETS[part] if kind == "unet" else VAE


def state(part, kind, generation="to_q", dtype=torch.float32):
  """Returns random tensors of a network by official name."""
  if kind == "unet":
    tree = config_lib.abstract_unet(UNETS[part])
  else:
    tree = config_lib.abstract_vae(VAE)
  rng = np.random.default_rng([len(part), len(kind)])
  table = pixel_names.table_of(config(part, kind), generation)
  return {
    name: torch.from_numpy(
      rng.normal(size=value.shape, scale=0.3).astype(np.float32)
    ).to(dtype)
    for name, value in names.to_official(table, tree).items()
  }


def save(path, tensors):
  """Writes a state_dict in the format of the suffix."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".bin":
    torch.save(tensors, path)
  else:
    safe.save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def load(path):
  """Returns the state_dict or bare tensor of a file."""
  if path.suffix == ".bin":
    return torch.load(path, weights_only=True)
  return safe.load_file(path)


def shard(path, count):
  """Splits a file of weights into shards and returns their index's path."""
  tensors, weight_map = load(path), {}
  path.unlink()
  for i in range(count):
    file = f"{STEM}-{i + 1:05d}-of-{count:05d}{path.suffix}"
    some = dict(list(tensors.items())[i::count])
    save(path.with_name(file), some)
    weight_map |= dict.fromkeys(some, file)
  index = path.with_name(f"{STEM}{path.suffix}.index.json")
  size = sum(t.numel() * t.element_size() for t in tensors.values())
  content = {"metadata": {"total_size": size}, "weight_map": weight_map}
  index.write_text(json.dumps(content))
  return index


def write(
  folder,
  part,
  *,
  generation="to_q",
  dtype=torch.float32,
  files=(f"{STEM}.bin", f"{STEM}.safetensors"),
  uncond=None,
):
  """Writes unet/, vae/, scheduler/ (and uncond) and returns the folder."""
  fields = {
    "unet": config_lib.unet_fields(UNETS[part]),
    "vae": config_lib.vae_fields(VAE),
  }
  for kind, file in zip(fields, files, strict=True):
    tensors = state(part, kind, generation, dtype)
    save(folder / kind / file, tensors)
    # Not as we would write it: an import must give these very bytes back.
    text = json.dumps(fields[kind] | {"_diffusers_version": "0.0"}, indent=3)
    (folder / kind / "config.json").write_text(text)
  scheduler = folder / "scheduler"
  scheduler.mkdir(exist_ok=True)
  content = scheduler_config.unparse(schedules.STABLE_DIFFUSION)
  content |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
  (scheduler / scheduler_config.FILE).write_text(json.dumps(content))
  if uncond is not None:
    torch.save(torch.from_numpy(uncond), folder / official_layout.UNCOND)
  return folder


def write_official(root, part="lowres_pixels", **kwargs):
  """Writes the folder of a part in the official layout; returns the root."""
  if part == "lowres_pixels":
    kwargs = {"uncond": UNCOND} | kwargs
  write(root / FOLDERS[part], part, **kwargs)
  return root
