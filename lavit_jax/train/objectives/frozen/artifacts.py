"""Where a stage finds its data and the weights of earlier stages.

`Artifacts` reads them from disk. `AbstractArtifacts` has their shapes alone,
from `config.assumed`, so that a run can be compiled where there are neither
weights nor data.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from lavit_jax.core import agreement, errors, hosts, sharding, vocabulary
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.data import examples, faults
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from lavit_jax.diffusion import schedules
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.train.objectives.frozen import (
  branches,
  latent_checks,
  latent_parts,
)

_LOG = logging.getLogger(__name__)
_SENTENCES = 20_000  # that a new text tokenizer is trained on


class Artifacts:
  """Model directories and datasets on disk."""

  is_abstract = False

  def sources(self, config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Returns the (training, held-out) `examples.Source` of config.data."""
    return kinds.pair(config.data.to_dict())

  def image_batches(
    self,
    config: ml_collections.ConfigDict,
    sources: Sequence[Any],
    text: vocabulary.TextTokenizer | None = None,
    text_length: int | None = None,
  ) -> list[Any]:
    """Makes a Grain dataset of batches of images for each source.

    Args:
      config: of the run.
      sources: of examples.
      text: the tokenizer of captions; None for images alone.
      text_length: tokens of a caption.

    Raises:
      errors.ConfigError: weights are of tokens, or change on the way, which
        only packed rows know.
    """
    data = config.data
    if data.get("reweighted") or data.get("weight_by", "documents") == "tokens":
      raise errors.ConfigError(
        f"config.data.reweighted and weight_by are of stage pretrain alone:"
        f" stage {config.stage!r} draws single images, by weights that stay."
      )
    return [
      pipeline.image_batches(
        source,
        config.batch_size,
        seed=config.seed,
        tokenizer=text,
        text_length=text_length,
        limit_share=faults.share_of(config.data),
      )
      for source in sources
    ]

  def meta(self, directory: str, name: str) -> dict[str, Any]:
    """Returns part.json of a part of a model directory."""
    return checkpoints.read_meta(directory, name)

  def tokenizer_config(self, directory: str) -> tokenizer.TokenizerConfig:
    """Returns the config of a model directory's tokenizer and encoder."""
    return latent_parts.read_tokenizer_config(directory)

  def conditioner(
    self, directory: str, kind: str, sizes: Mapping[str, Any]
  ) -> latent_parts.Conditioner:
    """Returns the semantic decoder; see `latent_parts.read_conditioner`."""
    return latent_parts.read_conditioner(directory, kind, sizes)

  def autoencoder(self, directory: str, kind: str) -> vae.VaeConfig:
    """Returns the config of the autoencoder of the part `kind`_pixels."""
    return latent_parts.read_vae(directory, kind)

  def load(
    self, stored: Mapping[str, Any], shapes: Any, layout: Any = None
  ) -> Any:
    """Reads branches of parts; see `branches.load`."""
    return branches.load(stored, shapes, layout)

  def load_like(
    self, stored: Mapping[str, Any], params: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Reads some of a run's parameters, laid out as those that are there.

    Args:
      stored: where some trees of `params` are, as of `load`.
      params: the run's parameters.

    Returns:
      {name: tree} of the names in `stored`.
    """
    shapes = {name: params[name] for name in stored}
    layout = jax.tree.map(lambda x: getattr(x, "sharding", None), shapes)
    return self.load(stored, shapes, layout)

  def load_with_lora(
    self, branch: branches.Branch, boxed: Any, low: Any, scale: float
  ) -> Any:
    """Reads a frozen network and adds its LoRA to the weights.

    Everything stays in the shares of the mesh on which the LoRA lies.

    Args:
      branch: where the network is stored.
      boxed: its abstract parameters, float32.
      low: the LoRA, see `lora.init`, unboxed.
      scale: alpha / rank.

    Returns:
      The network's parameters, float32: it computes what it did with its LoRA.
    """
    layout = None
    mesh = getattr(jax.tree.leaves(low)[0].sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):
      layout = {"net": sharding.param_shardings(boxed, mesh)}
    shapes = {"net": sharding.unbox(boxed)}
    weights = self.load({"net": branch}, shapes, layout)["net"]
    return lora.merge(weights, low, scale)

  def text_tokenizer(
    self, config: ml_collections.ConfigDict, source: examples.Source
  ) -> vocabulary.TextTokenizer:
    """Returns config.model_dir's SentencePiece model; trains a missing one.

    Args:
      config: of the run.
      source: whose sentences a new tokenizer is trained on.

    Raises:
      errors.ConfigError: the tokenizer has not data.text_vocab pieces.
    """
    path = files.input_path(config.model_dir) / "tokenizer.model"
    if hosts.is_lead() and not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      sentences = kinds.sentences(source, limit=_SENTENCES)
      if not sentences:
        raise errors.DataError(
          f"{source.name} has {source.num_images} images and no words, and this"
          " stage learns from words, too: its text tokenizer is trained on"
          " them. `lavit data check` says which words of the data are read."
        )
      vocabulary.TextTokenizer.train(sentences, path, config.data.text_vocab)
    hosts.barrier("lavit_text_tokenizer")
    text = vocabulary.TextTokenizer.load(path)
    expected = config.data.get("text_vocab")
    if expected not in (None, text.size):
      raise errors.ConfigError(
        f"{path} has {text.size} pieces, but data.text_vocab is {expected}."
        " Other parts of this model may be trained on that tokenizer, so it is"
        f" not replaced: set data.text_vocab={text.size}, or start with another"
        " model_dir."
      )
    return text

  def text_provenance(
    self, config: ml_collections.ConfigDict
  ) -> dict[str, str]:
    """Returns the fingerprint of config.model_dir's text tokenizer."""
    path = files.input_path(config.model_dir) / "tokenizer.model"
    return {"text_tokenizer": fingerprints.of_file(path)}

  def tokenizer_provenance(
    self, config: ml_collections.ConfigDict
  ) -> dict[str, str]:
    """Returns the fingerprints of config.model_dir's encoder and tokenizer.

    Raises:
      errors.CheckpointError: the tokenizer was trained on another encoder.
    """
    folder = config.model_dir
    encoder = {"encoder": fingerprints.of_part(folder, "encoder")}
    stored = checkpoints.read_meta(folder, "tokenizer").get("made_of", {})
    agreement.settle(
      agreement.fingerprints(
        stored, encoder, "train the tokenizer again, or put its encoder back"
      ),
      agreement.accepted(config),
      what=f"What the tokenizer of {folder} was trained on",
      error=errors.CheckpointError,
    )
    return encoder | {"tokenizer": fingerprints.of_tokenizer(folder)}

  def check_start(
    self,
    config: ml_collections.ConfigDict,
    net: unet.UNetConfig,
    schedule: schedules.NoiseSchedule,
  ) -> None:
    """Checks config.start_from; see `latent_checks.check_start`."""
    latent_checks.check_start(config, net, schedule)

  def check_assumed(
    self, config: ml_collections.ConfigDict, **real: Any
  ) -> None:
    """Warns if `lavit compile` would measure another step than this run's.

    Args:
      config: of the run.
      **real: the true values of fields of config.assumed.
    """
    for name, value in real.items():
      assumed = config.get("assumed", real).get(name)
      if assumed != value and hosts.is_lead():
        _LOG.warning(
          "config.assumed.%s=%s, but it is %s here: where this model_dir is"
          " missing, lavit compile measures another step than this run's. Give"
          " it --config.assumed.%s=%s.",
          *(name, assumed, value, name, value),
        )


class AbstractArtifacts(Artifacts):
  """Shapes alone: arrays are `jax.ShapeDtypeStruct`, sources None.

  `config.assumed` has what the rest of a config does not: `tokenizer`, a
  `tokenizer.TokenizerConfig` as a dict with its encoder; `text_size`, the text
  pieces of the vocabulary; `capacity`, the most visual tokens of an image;
  `decoder` and `vae`, a pixel decoder's semantic decoder and autoencoder as
  dicts, by default the official ones.
  """

  is_abstract = True

  def __init__(self, config: ml_collections.ConfigDict):
    if "assumed" not in config:
      raise errors.ConfigError(
        f"{config.model_dir} lacks parts that stage {config.stage!r} reads,"
        " and the config has no `assumed` with their sizes. Train the earlier"
        " stages, give another --config.model_dir, or add config.assumed as"
        " configs/lavit_7b/common.py does."
      )
    self.assumed = config.assumed
    self.tokenizer = tokenizer.config_from_dict(
      config.assumed.tokenizer.to_dict()
    )

  def sources(self, config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Returns (None, None): there is no data."""
    del config
    return None, None

  def image_batches(
    self,
    config: ml_collections.ConfigDict,
    sources: Sequence[Any],
    text: vocabulary.TextTokenizer | None = None,
    text_length: int | None = None,
  ) -> list[Any]:
    """Returns None for each source: there is no data."""
    del config, text, text_length
    return [None for _ in sources]

  def meta(self, directory: str, name: str) -> dict[str, Any]:
    """Returns part.json of the part `encoder`."""
    del directory
    if name != "encoder":
      raise ValueError(f"config.assumed does not describe the part {name!r}.")
    return {"vit": dataclasses.asdict(self.tokenizer.vit)}

  def tokenizer_config(self, directory: str) -> tokenizer.TokenizerConfig:
    """Returns config.assumed.tokenizer."""
    del directory
    return self.tokenizer

  def conditioner(
    self, directory: str, kind: str, sizes: Mapping[str, Any]
  ) -> latent_parts.Conditioner:
    """Returns the semantic decoder of a kind, with projections as imported."""
    del directory
    config = decoder.LAVIT_7B
    if "decoder" in self.assumed:
      config = decoder.DecoderConfig(**self.assumed.decoder)
    model = latent_parts.make_conditioner(kind, config, sizes)
    return latent_parts.Conditioner(model, None, {}, {})

  def autoencoder(self, directory: str, kind: str) -> vae.VaeConfig:
    """Returns config.assumed.vae, or Stable Diffusion's of this kind."""
    del directory
    if "vae" in self.assumed:
      return vae.VaeConfig(**self.assumed.vae)
    return vae.SD15_VAE if kind == "lowres" else vae.SDXL_VAE

  def load(
    self, stored: Mapping[str, Any], shapes: Any, layout: Any = None
  ) -> Any:
    """Returns the shapes."""
    del stored, layout
    return shapes

  def check_start(
    self,
    config: ml_collections.ConfigDict,
    net: unet.UNetConfig,
    schedule: schedules.NoiseSchedule,
  ) -> None:
    """Checks nothing: there are no weights."""
    del config, net, schedule

  def check_assumed(
    self, config: ml_collections.ConfigDict, **real: Any
  ) -> None:
    """Checks nothing: all is as assumed."""
    del config, real
