"""The official pixel decoders, folders in diffusers' format, as parts.

  lowres_pixels    pixel_decoding/
  highres_pixels   highres_pixel_decoding/

Each folder has unet/ and vae/ (config.json and weights, see `weight_files.py`)
and scheduler/scheduler_config.json, as a plain Stable Diffusion has; the folder
of lowres also has uncond_embeddings.bin.

The params of a part are {"unet", "vae"}, and for lowres also {"uncond"}. Its
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
from lavit_jax.port.diffusers import scheduler_config, weight_files
from lavit_jax.port.formats import official_layout, small_files, tensors
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import names, pixel_names, rows

CONFIG = "config.json"
SCHEDULER = f"scheduler/{scheduler_config.FILE}"
_SIZE_NUMBERS = 6  # numbers about sizes in the condition of SDXL


def present(folder: pathlib.Path) -> list[str]:
  """Returns the pixel parts whose folders are in a checkpoint."""
  folders = official_layout.PIXEL_FOLDERS
  return [part for part, name in folders.items() if (folder / name).is_dir()]


def missing(folder: pathlib.Path, label: str, with_uncond: bool) -> list[str]:
  """Returns the missing files of a pixel decoder, as messages name them.

  Args:
    folder: with unet/, vae/ and scheduler/.
    label: how messages name it.
    with_uncond: whether it must have unconditional embeddings.
  """
  expected = [f"{kind}/{CONFIG}" for kind in config_lib.KINDS] + [SCHEDULER]
  if with_uncond:
    expected.append(official_layout.UNCOND)
  absent = [file for file in expected if not (folder / file).is_file()]
  for kind in config_lib.KINDS:
    if not weight_files.present(folder / kind, kind):
      absent.append(f"{kind}/{weight_files.candidates(kind)[0]}")
  return [f"{label}/{file}" for file in absent]


@dataclasses.dataclass(frozen=True)
class Network:
  """A U-Net or autoencoder in a folder: its config and opened weights.

  Attributes:
    kind: "unet" or "vae".
    label: how messages name the folder.
    file: name of the weights, or of their index.
    not_read: names of other weights in the folder.
    config: its sizes.
    tensors: by official name.
    generation: of names, see `pixel_names.GENERATIONS`.
  """

  kind: str
  label: str
  file: str
  not_read: tuple[str, ...]
  config: unet.UNetConfig | vae.VaeConfig
  tensors: tensors.Tensors
  generation: str

  @functools.cached_property
  def table(self) -> rows.Table:
    """Official names, and paths in the network's params."""
    return pixel_names.table_of(self.config, self.generation)

  @functools.cached_property
  def tree(self) -> dict[str, Any]:
    """Abstract params."""
    return config_lib.KINDS[self.kind].abstract(self.config)

  def arrays(
    self, problems: plan.Problems, allow: Collection[str] = ()
  ) -> list[plan.Array]:
    """Plans its arrays, under its kind as the root.

    Args:
      problems: receives what does not fit.
      allow: official names that may be missing.
    """
    return plan.arrays_of(
      self.table,
      self.tensors,
      self.tree,
      problems,
      label=f"{self.label}/{self.file}",
      allow=allow,
      root=f"{self.kind}/",
    )


def open_network(folder: pathlib.Path, kind: str, label: str) -> Network:
  """Opens a folder of config.json and weights.

  Args:
    folder: such as pixel_decoding/unet.
    kind: "unet" or "vae".
    label: how messages name it.

  Raises:
    errors.CheckpointError: a file is missing or damaged, or the config
      describes a network that is not implemented here.
  """
  fields = small_files.read_json(folder / CONFIG, f"{label}/{CONFIG}")
  config = config_lib.KINDS[kind].read(fields, f"{label}/{CONFIG}")
  files = weight_files.present(folder, kind)
  if not files:
    raise errors.CheckpointError(
      f"{label} has no weights: expected one of"
      f" {', '.join(weight_files.candidates(kind))} in it."
    )
  file, *others = files
  if weight_files.is_index(file):
    opened = tensors.open_index(folder / file, label)
  else:
    opened = tensors.open_file(folder / file, f"{label}/{file}")
  generation = pixel_names.vae_generation(opened)
  return Network(kind, label, file, tuple(others), config, opened, generation)


class Reader:
  """One opened folder of U-Net, autoencoder and scheduler."""

  def __init__(
    self, folder: pathlib.Path, label: str, part: str, with_uncond: bool
  ):
    """Opens the folder.

    Args:
      folder: without `missing` files.
      label: how messages name it.
      part: "lowres_pixels" or "highres_pixels".
      with_uncond: whether it has unconditional embeddings.

    Raises:
      errors.CheckpointError: as `open_network`, or a scheduler or an
        embedding that cannot be read.
    """
    self.part, self._label, self._folder = part, label, folder
    self._networks = {
      kind: open_network(folder / kind, kind, f"{label}/{kind}")
      for kind in config_lib.KINDS
    }
    self._schedule = scheduler_config.load(folder / SCHEDULER)
    self._uncond: tensors.Tensor | None = None
    if with_uncond:
      file = official_layout.UNCOND
      opened = tensors.open_file(folder / file, f"{label}/{file}", bare=True)
      (self._uncond,) = opened.values()

  @property
  def tables(self) -> list[rows.Table]:
    """The tables of both networks."""
    return [network.table for network in self._networks.values()]

  def read(
    self, problems: plan.Problems, allow: Collection[str] = ()
  ) -> plan.Part:
    """Returns the part.

    Args:
      problems: receives what does not fit.
      allow: official names that may be missing.
    """
    arrays: list[plan.Array] = []
    meta: dict[str, Any] = {}
    for kind, network in self._networks.items():
      arrays += network.arrays(problems, allow)
      meta[kind] = dataclasses.asdict(network.config)
    if self._uncond is not None:
      (row,) = names.UNCOND
      tensor = self._uncond
      arrays.append(
        plan.Array(row.path, "same", (tensor,), False, tensor.shape)
      )
    meta["schedule"] = dataclasses.asdict(self._schedule)
    files = {kind: network.file for kind, network in self._networks.items()}
    generation = self._networks["vae"].generation
    meta["port"] = {"weights": files, "vae_names": generation}
    self._check(problems)
    return plan.Part(self.part, tuple(arrays), meta)

  def _check(self, problems):
    """Checks that the networks of the folder belong together."""
    net, latent = (self._networks[kind].config for kind in ("unet", "vae"))
    channels = (net.in_channels, net.out_channels)
    if channels != (latent.latent_channels,) * 2:
      problems.add(
        "networks that do not fit",
        f"{self._label}/unet has {channels[0]} input and {channels[1]} output"
        f" channels, the latents of {self._label}/vae have"
        f" {latent.latent_channels}",
      )
    has_added = net.details.added_dim > 0
    if has_added != (self.part == "highres_pixels"):
      kind = "with" if has_added else "without"
      problems.add(
        "network of another kind",
        f"{self._label}/unet is a U-Net {kind} SDXL's additional embedding",
      )
    if self._uncond is None:
      return
    shape = self._uncond.shape
    if len(shape) != 3 or (shape[0], shape[2]) != (1, net.cross_dim):
      problems.add(
        "wrong shape",
        f"{self._label}/{official_layout.UNCOND} {list(shape)} instead of"
        f" [1, any, {net.cross_dim}]",
      )

  def small_files(self) -> dict[str, bytes]:
    """Returns what an export restores, by path in the folder."""
    contents: dict[str, bytes] = {}
    for subfolder in ("", *self._networks, "scheduler"):
      files = {
        name: data
        for name, data in small_files.read_all(self._folder / subfolder).items()
        if not weight_files.is_index(name)
      }
      network = self._networks.get(subfolder)
      if network is not None and weight_files.is_index(network.file):
        index = self._folder / subfolder / network.file
        files[network.file] = index.read_bytes()
      root = f"{subfolder}/" if subfolder else ""
      contents |= {f"{root}{name}": data for name, data in files.items()}
    return contents

  def notes(self) -> list[str]:
    """Returns sentences for the user."""
    sentences = []
    for network in self._networks.values():
      if network.not_read:
        others = ", ".join(network.not_read)
        sentences.append(
          f"{network.label}: {network.file} read, {others} ignored"
        )
      elif weight_files.VARIANT in network.file:
        sentences.append(
          f"{network.label}: {network.file}, as there is no other"
        )
    return sentences + scheduler_config.notes(self._folder / SCHEDULER)


def check_conditions(
  parts: Mapping[str, plan.Part], problems: plan.Problems
) -> None:
  """Checks that the semantic decoders fit the U-Nets that they condition.

  Args:
    parts: of the import, by name.
    problems: receives what does not fit.
  """
  for part, folder in official_layout.PIXEL_FOLDERS.items():
    semantic = parts.get(part.removesuffix("_pixels"))
    if part not in parts or semantic is None:
      continue
    net, meta = parts[part].meta["unet"], semantic.meta
    details = net["details"]
    width = sum(meta.get("condition_dims") or [meta["condition_dim"]])
    added = meta.get("pooled_dim", 0)
    if added:
      added += _SIZE_NUMBERS * details["added_time_dim"]
    if (width, added) != (net["cross_dim"], details["added_dim"]):
      problems.add(
        "decoders that do not fit",
        f"{semantic.name} makes conditions of width {width} and an additional"
        f" {added} numbers, {folder}/unet expects {net['cross_dim']} and"
        f" {details['added_dim']}",
      )
    uncond = next((a for a in parts[part].arrays if a.path == "uncond"), None)
    patches = meta["decoder"]["num_patches"]
    if uncond is not None and uncond.shape[-2:-1] > (patches,):
      problems.add(
        "decoders that do not fit",
        f"{folder}/{official_layout.UNCOND} has {uncond.shape[-2]} tokens, more"
        f" than the {patches} of {semantic.name}",
      )
