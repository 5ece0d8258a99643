"""Model FLOPs of one global training step, counted in its traced loss.

The rule is that of `cost.jaxpr`: matrix products and convolutions, and their
gradients where parameters train. In addition:

  Causal attention counts the keys that a token sees, on average (s + 1) / 2 of
    a document of s tokens. Other masks hide data, not work: all keys count.
  The head counts every position, those that pad its last block too, and the
    ids in use: rows that pad the vocabulary are not counted.
  Metrics, codebook statistics and the optimizer are not counted.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lavit_jax.core import sharding
from lavit_jax.cost import jaxpr, scopes
from lavit_jax.train import optimizer

_ENCODER = {"encoder": "^EvaVit"}
# The scopes of each stage's networks. Products in no module are of the loss.
_NETWORKS = {
  "encoder": {
    "encoder": "^Contrastive/vit/",
    "text": "^Contrastive/text/",
    "head": r"captioner\.logits",
    "captioner": "/caption",
    "contrast": "",  # its heads and the loss
  },
  "tokenizer": _ENCODER
  | {
    "selector": "/selector/",
    "merger": "/merger",
    "decoder": "/decoder",
    "quantizer": "",  # its projection, and the codes in the loss
  },
  "pixels": _ENCODER
  | {
    "tokenizer": "^DynamicVisualTokenizer",
    "unet": "^PixelDecoder/unet/",
    "condition": "^PixelDecoder/",
  },
  "autoencoder": {
    "encoder": r"^AutoencoderKL\.encode/",
    "decoder": r"^AutoencoderKL\.decode/",
  },
  "latents": _ENCODER
  | {
    "tokenizer": "^DynamicVisualTokenizer",
    "decoder": "^(Low|High)resDecoder/decoder/",
    "projection": "^(Low|High)resDecoder/",
    "vae": "^AutoencoderKL",
    "unet": "^UNet",
  },
  "pretrain": _ENCODER
  | {
    "merger": "/merger",
    "projection": "/projection",
    "lora": r"/lora\b",
    "llm": "/llm/",
    "head": "",  # its products are those of the loss
  },
}


def of_step(
  objective: Any, phase: Any, *, segment: float | None = None
) -> dict[str, float]:
  """Counts the FLOPs of a step of a whole batch on all devices, by network.

  Args:
    objective: of any stage; shapes without weights or data are enough.
    phase: a phase of a run, or a mapping of its settings.
    segment: length of the packed document that a token is in, averaged over
      tokens; None: whole rows. Only stage `pretrain` packs.

  Returns:
    {"encoder": ..., "llm": ..., ...}, which add up to the whole step.
  """
  return by_network(objective, by_scope(objective, phase), segment=segment)


def by_scope(objective: Any, phase: Any) -> dict[str, float]:
  """Counts the FLOPs of a step by named scope; see `jaxpr.count`.

  Takes about a second of tracing, and five with a full-size U-Net.

  Args:
    objective: as in `of_step`.
    phase: as in `of_step`.

  Returns:
    {scope: FLOPs}, all keys of causal attention counted.
  """

  def loss(params, frozen, extra, batch):
    draws = objective.draws(phase, batch, jax.random.key(0))
    sums, _ = objective.sums(phase, params, frozen, extra, batch, draws)
    return objective.combine(phase, sums)[0]

  params, extra = sharding.unbox(objective.init_shapes)
  labels = objective.labels(phase, params)
  return jaxpr.count(
    loss,
    params,
    sharding.unbox(objective.frozen_shapes()),
    extra,
    objective.batch_shapes(),
    trained=jax.tree.map(lambda label: label != optimizer.FROZEN, labels),
  )


def by_network(
  objective: Any,
  counts: Mapping[str, float],
  *,
  segment: float | None = None,
) -> dict[str, float]:
  """Sums the FLOPs of a step by network.

  Args:
    objective: as in `of_step`.
    counts: of `by_scope`.
    segment: as in `of_step`.

  Returns:
    {network: FLOPs}.
  """
  stage = objective.config.stage
  total = scopes.by_network(counts, _NETWORKS[stage], segments={"llm": segment})
  if "head" in total:
    text = {
      "encoder": lambda: objective.model_config.captioner,
      "pretrain": lambda: objective.llama_config,
    }[stage]()
    total["head"] *= text.vocab_size / text.padded_vocab
  return total
