"""The official pixel decoders, folders in diffusers' format, as parts.

  lowres_pixels    pixel_decoding/
  highres_pixels   highres_pixel_decoding/

Each folder has unet/ and vae/ (config.json and weights) and
scheduler/scheduler_config.json, as a plain Stable Diffusion has; that of
lowres uncond_embeddings.bin besides.
Weights are diffusion_pytorch_model.bin or .safetensors, whole or in shards
with their index, or where neither is there those of the variant `fp16`. Where
there are several, the official classes' choice is taken: the .bin of a U-Net,
the .safetensors of an autoencoder.

The params of a part are {"unet", "vae"} and for lowres {"uncond"} too; its
meta has the configs of both networks and the schedule.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from lavit_jax.core import errors
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.diffusers import scheduler_config
from lavit_jax.port.formats import llama_folder, tensors
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import names, pixel_names

FOLDERS = {
  "lowres_pixels": "pixel_decoding",
  "highres_pixels": "highres_pixel_decoding",
}
UNCOND = "uncond_embeddings.bin"
CONFIG = "config.json"
SCHEDULER = f"scheduler/{scheduler_config.FILE}"
STEM = "diffusion_pytorch_model"
_SUFFIXES = {"unet": (".bin", ".safetensors"), "vae": (".safetensors", ".bin")}
VARIANT = "fp16"
_SIZE_NUMBERS = 6  # that SDXL is told


def present(folder: pathlib.Path) -> list[str]:
  """The parts whose folders are there."""
  return [part for part, name in FOLDERS.items() if (folder / name).is_dir()]


def official_places(parts: Collection[str]) -> list[tuple[str, bool, str]]:
  """(folder, whether it has unconditional embeddings, part) of pixel parts."""
  return [
    (name, part == "lowres_pixels", part)
    for part, name in FOLDERS.items()
    if part in parts
  ]


def weight_files(kind: str) -> list[str]:
  """Names of weights, or of their index, in order of preference.

  Args:
    kind: "unet" or "vae".
  """
  found = []
  for variant in ("", f".{VARIANT}"):
    for suffix in _SUFFIXES[kind]:
      found += [
        f"{STEM}{variant}{suffix}",
        f"{STEM}{suffix}.index{variant}.json",
      ]
  return found


def is_index(file: str) -> bool:
  """Whether a file name is that of an index of shards."""
  return ".index." in file and file.endswith(".json")


def other_weights(files: Collection[str], folder: str, kind: str) -> list[str]:
  """Weights in a folder that are not read, as another choice is preferred.

  Args:
    files: paths of all files there are.
    folder: path of a network's folder.
    kind: "unet" or "vae".
  """
  here = [f for f in files if f.rpartition("/")[0] == folder]
  chosen = [n for n in weight_files(kind) if f"{folder}/{n}" in here][:1]
  if not chosen:
    return []
  sharded, half = is_index(chosen[0]), VARIANT in chosen[0]
  suffix = next(end for end in _SUFFIXES[kind] if end in chosen[0])

  def is_read(name):
    if not sharded:
      return name == chosen[0]
    same = (VARIANT in name) == half and name.endswith(suffix)
    return name.startswith(STEM) and "-of-" in name and same

  return [
    path
    for path in here
    if path.endswith(tensors.SUFFIXES) and not is_read(path.rpartition("/")[2])
  ]


def missing(folder: pathlib.Path, label: str, uncond: bool) -> list[str]:
  """Files of a pixel decoder that are not there, as messages name them.

  Args:
    folder: with unet/, vae/ and scheduler/.
    label: how messages name it.
    uncond: whether unconditional embeddings belong to it.
  """
  wanted = [f"{kind}/{CONFIG}" for kind in _SUFFIXES] + [SCHEDULER]
  if uncond:
    wanted.append(UNCOND)
  found = [file for file in wanted if not (folder / file).is_file()]
  for kind in _SUFFIXES:
    files = weight_files(kind)
    if not any((folder / kind / file).is_file() for file in files):
      found.append(f"{kind}/{files[0]}")
  return [f"{label}/{file}" for file in found]


@dataclasses.dataclass(frozen=True)
class Network:
  """A U-Net or autoencoder in a folder: its config and opened weights.

  Attributes:
    kind: "unet" or "vae".
    label: how messages name the folder.
    file: the name of the weights, or of their index.
    left: names of other weights in the folder, which are not read.
    found: the tensors.
    generation: of names, see `names_pixels.GENERATIONS`.
  """

  kind: str
  label: str
  file: str
  left: tuple[str, ...]
  config: unet.UNetConfig | vae.VaeConfig
  found: tensors.Tensors
  generation: str

  @functools.cached_property
  def table(self) -> names.Table:
    """Official names and paths in the network's params."""
    return table_of(self.config, self.generation)

  @functools.cached_property
  def tree(self) -> dict[str, Any]:
    """Abstract params."""
    if self.kind == "unet":
      return config_lib.abstract_unet(self.config)
    return config_lib.abstract_vae(self.config)

  def arrays(
    self, problems: plan.Problems, allow: Collection[str] = (), root: str = ""
  ) -> list[plan.Array]:
    """Its arrays; what does not fit goes to `problems`.

    Args:
      problems: takes all of it.
      allow: official names that may be missing.
      root: put before every path, such as "unet/".
    """
    return plan.arrays_of(
      self.table,
      self.found,
      self.tree,
      problems,
      label=f"{self.label}/{self.file}",
      allow=allow,
      ours=lambda path: root + path,
    )


def table_of(
  config: unet.UNetConfig | vae.VaeConfig, generation: str
) -> names.Table:
  """The table of a network; `generation` is for autoencoders alone."""
  if isinstance(config, vae.VaeConfig):
    return pixel_names.vae(config, generation)
  return pixel_names.unet(config)


def open_network(folder: pathlib.Path, kind: str, label: str) -> Network:
  """Opens a folder of config.json and weights.

  Args:
    folder: such as pixel_decoding/unet.
    kind: "unet" or "vae".
    label: how messages name it.

  Raises:
    errors.CheckpointError: a file is missing or damaged, or the config is of
      a network that cannot be made here.
  """
  fields = llama_folder.read_json(folder / CONFIG, f"{label}/{CONFIG}")
  read = {
    "unet": config_lib.unet_config,
    "vae": config_lib.vae_config,
  }
  config = read[kind](fields, f"{label}/{CONFIG}")
  files = weight_files(kind)
  have = [file for file in files if (folder / file).is_file()]
  if not have:
    raise errors.CheckpointError(
      f"{label} has no weights: expected one of {', '.join(files)} in it."
    )
  file = have[0]
  if is_index(file):
    found = tensors.open_index(folder / file, label)
  else:
    found = tensors.open_file(folder / file, f"{label}/{file}")
  generation = pixel_names.vae_generation(found)
  return Network(kind, label, file, tuple(have[1:]), config, found, generation)


class Reader:
  """One folder of U-Net, autoencoder and scheduler, opened."""

  def __init__(
    self, folder: pathlib.Path, label: str, part: str, uncond: bool = False
  ):
    """Opens it.

    Args:
      folder: none of whose files is `missing`.
      label: how messages name it.
      part: that it becomes, a key of FOLDERS.
      uncond: whether unconditional embeddings belong to it.

    Raises:
      errors.CheckpointError: as `open_network`, or a scheduler or an
        embedding that cannot be read.
    """
    self.part, self._name, self._folder = part, label, folder
    self.networks = {
      kind: open_network(folder / kind, kind, f"{label}/{kind}")
      for kind in _SUFFIXES
    }
    self._schedule = scheduler_config.load(folder / SCHEDULER)
    self.uncond = None
    if uncond:
      opened = tensors.open_file(
        folder / UNCOND, f"{label}/{UNCOND}", bare=True
      )
      (self.uncond,) = opened.values()

  @property
  def tables(self) -> list[names.Table]:
    """Of both networks."""
    return [network.table for network in self.networks.values()]

  def read(
    self, problems: plan.Problems, allow: Collection[str] = ()
  ) -> plan.Part:
    """The part; what does not fit goes to `problems`."""
    arrays = []
    for kind, network in self.networks.items():
      arrays += network.arrays(problems, allow, f"{kind}/")
    if self.uncond is not None:
      tensor, (row,) = self.uncond, names.UNCOND
      shape = tensor.shape
      arrays.append(plan.Array(row.ours, "same", (tensor,), False, shape))
    meta = {
      kind: dataclasses.asdict(network.config)
      for kind, network in self.networks.items()
    }
    meta["schedule"] = dataclasses.asdict(self._schedule)
    files = {kind: network.file for kind, network in self.networks.items()}
    generation = self.networks["vae"].generation
    meta["port"] = {"weights": files, "vae_names": generation}
    self._check(problems)
    return plan.Part(self.part, tuple(arrays), meta)

  def _check(self, problems):
    """Whether the networks of the folder belong together."""
    net, latent = self.networks["unet"].config, self.networks["vae"].config
    told = net.details.added_dim > 0
    channels = (net.in_channels, net.out_channels)
    if channels != (latent.latent_channels,) * 2:
      problems.add(
        "networks that do not fit",
        f"{self._name}/unet takes and gives {channels[0]} and {channels[1]}"
        f" channels, the latents of {self._name}/vae have"
        f" {latent.latent_channels}",
      )
    if told != (self.part == "highres_pixels"):
      kind = "with" if told else "without"
      problems.add(
        "network of another kind",
        f"{self._name}/unet is a U-Net {kind} SDXL's additional embedding",
      )
    if self.uncond is None:
      return
    shape = self.uncond.shape
    if len(shape) != 3 or (shape[0], shape[2]) != (1, net.cross_dim):
      problems.add(
        "wrong shape",
        f"{self._name}/{UNCOND} {list(shape)} instead of"
        f" [1, any, {net.cross_dim}]",
      )

  def small_files(self) -> dict[str, bytes]:
    """What export gives back, by path in the folder."""
    found = {}
    for place in ("", *self.networks, "scheduler"):
      kept = llama_folder.small_files(self._folder / place)
      kept = {name: kept[name] for name in kept if not is_index(name)}
      network = self.networks.get(place)
      if network is not None and is_index(network.file):
        kept[network.file] = (self._folder / place / network.file).read_bytes()
      found |= {
        f"{place}/{name}" if place else name: data
        for name, data in kept.items()
      }
    return found

  def notes(self) -> list[str]:
    """What the user should know."""
    found = []
    for network in self.networks.values():
      if network.left:
        left = ", ".join(network.left)
        found.append(f"{network.label}: {network.file} taken, {left} left")
      elif VARIANT in network.file:
        found.append(f"{network.label}: {network.file}, as no other is there")
    return found + scheduler_config.notes(self._folder / SCHEDULER)


def check_conditions(
  parts: Mapping[str, plan.Part], problems: plan.Problems
) -> None:
  """Whether semantic decoders give what the U-Nets beside them take."""
  for part, name in FOLDERS.items():
    semantic = parts.get(part.removesuffix("_pixels"))
    if part not in parts or semantic is None:
      continue
    net, meta = parts[part].meta["unet"], semantic.meta
    details = net["details"]
    width = sum(meta.get("condition_dims") or [meta.get("condition_dim")])
    added = meta.get("pooled_dim", 0)
    if added:
      added += _SIZE_NUMBERS * details["added_time_dim"]
    given, taken = (width, added), (net["cross_dim"], details["added_dim"])
    if given != taken:
      problems.add(
        "decoders that do not fit",
        f"{semantic.name} gives conditions {width} wide and {added} numbers"
        f" beside them, {name}/unet takes {taken[0]} and {taken[1]}",
      )
    uncond = next((a for a in parts[part].arrays if a.path == "uncond"), None)
    patches = meta["decoder"]["num_patches"]
    if uncond is not None and uncond.shape[-2:-1] > (patches,):
      problems.add(
        "decoders that do not fit",
        f"{name}/{UNCOND} has {uncond.shape[-2]} tokens, more than the"
        f" {patches} of {semantic.name}",
      )
