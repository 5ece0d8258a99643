"""Where a stage finds its data and the weights of earlier stages.

`Artifacts` reads them. `AbstractArtifacts` knows their shapes alone, from
`config.assumed`, so that a run can be compiled where there are neither
weights nor data.
"""

import dataclasses
import logging

from lavit_jax.core import errors, hosts
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.sources import kinds
from lavit_jax.models.pixels import vae
from lavit_jax.models.tokenizer import decoder, tokenizer
from lavit_jax.train.objectives.frozen import branches, latent_parts

_LOG = logging.getLogger(__name__)


class Artifacts:
  """Model directories and datasets on disk."""

  outline = False
  meta = staticmethod(checkpoints.read_meta)
  words = staticmethod(latent_parts.read_words)
  conditioner = staticmethod(latent_parts.read_conditioner)
  autoencoder = staticmethod(latent_parts.read_vae)
  load = staticmethod(branches.load)
  check_start = staticmethod(latent_parts.check_start)

  def sources(self, config):
    """The (train, held-out) sources of config.data."""
    return kinds.pair(config.data.to_dict())

  def check_assumed(self, config, **real):
    """Warns where `lavit compile` measures another step than this run's.

    Args:
      config: of the run.
      **real: what config.assumed should say, by its fields.
    """
    for name, value in real.items():
      told = config.get("assumed", real).get(name)
      if told != value and hosts.is_lead():
        _LOG.warning(
          "config.assumed.%s=%s, but it is %s here: where this model_dir is"
          " not, lavit compile measures another step than this run's. Give it"
          " --config.assumed.%s=%s.",
          *(name, told, value, name, value),
        )


class AbstractArtifacts:
  """The same, by shape: arrays are `jax.ShapeDtypeStruct`, sources None.

  `config.assumed` says what is not in the rest of a config: `tokenizer`, a
  `tokenizer.TokenizerConfig` as a dict with its encoder; `text_size`, pieces
  of text in the vocabulary; `capacity`, the most words of an image; `decoder`
  and `vae`, a pixel decoder's semantic decoder and autoencoder as dicts, by
  default the official ones.
  """

  outline = True

  def __init__(self, config):
    if "assumed" not in config:
      raise errors.ConfigError(
        f"{config.model_dir} lacks parts that stage {config.stage!r} reads,"
        " and the config has no `assumed` that tells their sizes. Train the"
        " stages before, give another --config.model_dir, or add"
        " config.assumed as configs/lavit_7b/common.py does."
      )
    self.assumed = config.assumed
    self.tokenizer = tokenizer.config_from_dict(
      config.assumed.tokenizer.to_dict()
    )

  def sources(self, config):
    """None, None."""
    del config
    return None, None

  def meta(self, directory, name):
    """Of the part `encoder`."""
    del directory
    if name != "encoder":
      raise ValueError(f"{name!r} is no part that an outline knows.")
    return {"vit": dataclasses.asdict(self.tokenizer.vit)}

  def words(self, directory) -> tokenizer.TokenizerConfig:
    """Encoder and tokenizer."""
    del directory
    return self.tokenizer

  def conditioner(self, directory, kind, sizes):
    """The semantic decoder of one kind, projections as imported."""
    del directory
    config = decoder.LAVIT_7B
    if "decoder" in self.assumed:
      config = decoder.DecoderConfig(**self.assumed.decoder)
    model = latent_parts.make_conditioner(kind, config, sizes)
    return latent_parts.Conditioner(model, None, {}, {})

  def autoencoder(self, directory, kind) -> vae.VaeConfig:
    """The autoencoder of one kind."""
    del directory
    if "vae" in self.assumed:
      return vae.VaeConfig(**self.assumed.vae)
    return vae.SD15_VAE if kind == "lowres" else vae.SDXL_VAE

  def load(self, found, wanted, layout=None):
    """What is wanted, by shape."""
    del found, layout
    return wanted

  def check_start(self, run, config, schedule):
    """Nothing to check."""
    del run, config, schedule

  def check_assumed(self, config, **real):
    """Nothing to check: it is what is assumed."""
    del config, real
