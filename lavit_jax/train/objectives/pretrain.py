"""Stage `pretrain`: one next-token loss over text and visual tokens.

Paper section 3.2 (unified generative pretraining): an image that is read enters
as the merger's continuous tokens, an image that is written as code ids; both
are targets over the one vocabulary. The stage-1 tokenizer that made the ids
stays frozen; the merger and projection of the continuous branch start from it
and train with the LLM.

With `model.lora.rank` the LLM is frozen, in `model.frozen_dtype`, and low-rank
changes of its matrices train in its place: fine-tuning on a single host.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lavit_jax.core import averages, errors, image_io, vocabulary
from lavit_jax.core.storage import fingerprints
from lavit_jax.data import faults
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from lavit_jax.models import llama, lora, unified
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.train import losses, phases
from lavit_jax.train.objectives import base, token_dropout
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  caches,
  llm_start,
  precision,
)
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib


def _by_tokens(data: ml_collections.ConfigDict) -> bool:
  """Whether weights are shares of tokens, as config.data.weight_by says."""
  if (by := data.get("weight_by", "documents")) not in ("documents", "tokens"):
    raise errors.ConfigError(
      f"config.data.weight_by={by!r}: expected documents or tokens."
    )
  return by == "tokens"


def _changes(data: ml_collections.ConfigDict) -> dict[int, dict[str, float]]:
  """Returns config.data.reweighted: {document: {source: weight}}."""
  found = data.get("reweighted") or {}
  changes = dict(found.items()) if hasattr(found, "items") else {"": found}
  good = data.get("sources") or not changes
  for start, some in changes.items():
    digits = isinstance(start, str) and start.isascii() and start.isdigit()
    good = good and digits and str(int(start)) == start != "0"
    good = good and hasattr(some, "items")
    good = good and all(kinds.is_weight(w) for w in some.values())
  if not good:
    raise errors.ConfigError(
      f"config.data.reweighted={changes}: expected the numbers of documents, 1"
      " or more, with weights of sources of config.data.sources from there on:"
      ' {"2000000": {"web": 0.5}}.'
    )
  return {int(start): dict(some.items()) for start, some in changes.items()}


_INTS = (
  "tokens",
  "targets",
  "segments",
  "positions",
  "image_index",
  "token_index",
)


class PretrainObjective(base.Objective):
  """Trains the LLM with the merger and projection it reads images by.

  A phase has the setting `word_dropout`, the share of input visual tokens that
  are replaced; see `token_dropout`.
  """

  part = "llm"
  best_metric = "loss"
  best_mode = "min"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    is_abstract = self.artifacts.is_abstract
    self.tokenizer_config = self._tokenizer_config()
    self.text = (
      None
      if is_abstract
      else self.artifacts.text_tokenizer(config, self.source)
    )
    self.vocabulary = vocabulary.Vocabulary(
      text_size=self.text.size if self.text else config.assumed.text_size,
      num_codes=self.tokenizer_config.quantizer.num_codes,
    )
    self.llama_config = llama.LlamaConfig(
      **config.model.llm.to_dict() | {"vocab_size": self.vocabulary.size}
    )
    if not is_abstract:
      llm_start.check(config, self.llama_config)
    self.capacity = self._open_caches()
    self.artifacts.check_assumed(
      config, capacity=self.capacity, text_size=self.vocabulary.text_size
    )
    self.model = unified.UnifiedModel(
      self.llama_config, self.tokenizer_config, self.capacity
    )
    self.lora = dict(config.model.get("lora", {"rank": 0, "alpha": 0.0}))
    self.lora_scale = self.lora["alpha"] / max(self.lora["rank"], 1)
    if self.lora["rank"] and not is_abstract:
      llm_start.check_lora(config, self.llama_config, self.lora)
    if not is_abstract:
      self._use_rows()

  # Config and files.

  def _tokenizer_config(self) -> tokenizer.TokenizerConfig:
    """Returns the stored config, computed as the run says."""
    config = self.config
    stored = self.artifacts.tokenizer_config(config.model_dir)
    networks = precision.applied(
      config,
      trained=("merger",) if phases.trains(config, "merger") else (),
      encoder=stored.vit,
      merger=stored.merger,
    )
    return dataclasses.replace(
      stored, vit=networks["encoder"], merger=networks["merger"]
    )

  def _open_caches(self) -> int:
    """Opens the code caches; returns the most visual tokens of an image."""
    config = self.config
    if self.artifacts.is_abstract:
      return config.assumed.capacity
    self._caches = caches.codes(config, (self.source, self.held_out))
    counts = [
      int(cache.counts.max())
      for found in self._caches
      for cache in caches.each(found).values()
    ]
    return max(counts, default=1)  # none where there are texts alone

  def provenance(self) -> dict[str, str]:
    """Returns data, caches, text tokenizer, encoder, tokenizer; LoRA's LLM."""
    prints = (
      super().provenance()
      | self.artifacts.tokenizer_provenance(self.config)
      | self.artifacts.text_provenance(self.config)
    )
    for split, found in zip(("train", "held_out"), self._caches, strict=True):
      for name, cache in caches.each(found).items():
        key = f"{split}_cache.{name}".rstrip(".")
        prints[key] = cache.fingerprint()
    if self.lora["rank"]:
      folder = self.config.start_from
      prints["llm"] = fingerprints.of_part(folder, self.part, "llm")
    return prints

  def frozen_shapes(self) -> base.Frozen:
    """Returns the encoder; under LoRA the LLM too."""
    dtype = self.config.model.get("frozen_dtype", "float32")
    vit = self.tokenizer_config.vit
    shapes = {"encoder": abstract_params.encoder(vit, dtype)}
    if self.lora["rank"]:
      shapes["llm"] = abstract_params.llm(self.llama_config, dtype)
    return shapes

  def frozen_branches(self) -> dict[str, branches.Branch]:
    """Returns the encoder; under LoRA the LLM too. Ids are in the cache."""
    stored = {"encoder": branches.Branch(self.config.model_dir, "encoder")}
    if self.lora["rank"]:
      stored["llm"] = llm_start.branch(self.config)
    return stored

  # Data.

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns packed rows; see `pipeline.packed_rows`."""
    data, count = self.config.data, self.config.batch_size
    row, slots = (count, data.length), (count, data.slots)
    side = data.image_size
    return abstract_params.arrays(
      {name: (row, np.int32) for name in _INTS}
      | {
        "weights": (row, np.float32),
        "pixels": ((*slots, side, side, 3), np.uint8),
        "keep": ((*slots, self.tokenizer_config.num_patches), bool),
        "row": ((count,), np.int64),
        "doc_hash": ((count,), np.int64),
      }
    )

  def _use_rows(self) -> None:
    """Makes the datasets of packed rows."""
    data, text = self.config.data, self.text
    assert text is not None  # there is one wherever there are data
    make = lambda source, codes: pipeline.packed_rows(
      source,
      codes,
      text,
      self.vocabulary,
      mixture=data.mixture.to_dict(),
      changes=_changes(data),
      by_tokens=_by_tokens(data),
      length=data.length,
      slots=data.slots,
      seed=self.config.seed,
      batch_size=self.config.batch_size,
      window=data.window,
      limit_share=faults.share_of(data),
    )
    self._train_data = make(self.source, self._caches[0])
    self._held_out_data = make(self.held_out, self._caches[1])

  def data_meta(self, example: int) -> dict[str, Any]:
    """Returns which documents are decided on, and weights that change."""
    plan = self._train_data.plan
    return {
      "settled": plan.settled(example),
      "reweighted": {str(g): dict(some) for g, some in plan.changes.items()},
    }

  def check_data(self, stored: Mapping[str, Any]) -> None:
    """Checks that weights change only where no row was trained on yet.

    Args:
      stored: `data_meta` of the checkpoint.

    Raises:
      errors.DataError: the rows before the checkpoint would be others now.
    """
    if "settled" not in stored:  # by an earlier version
      return
    plan, settled = self._train_data.plan, stored["settled"]
    now = {str(g): dict(some) for g, some in plan.changes.items()}
    before = stored["reweighted"]
    for start in sorted({*now, *before}, key=int):
      if int(start) < settled and now.get(start) != before.get(start):
        raise errors.DataError(
          f"config.data.reweighted has {now.get(start)} from document {start}"
          f" on, this run had {before.get(start)}; but its rows hold documents"
          f" up to {settled - 1} already. Weights can change from document"
          f" {settled} on."
        )

  # Parameters.

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws `llm` or, in its place, `lora`; and merger and projection."""
    config = self.tokenizer_config
    grid = config.num_patches
    variables = self.model.init(
      rng,
      jnp.zeros((1, 8), jnp.int32),
      features=jnp.zeros((1, 1, grid, config.width)),
      keep=jnp.ones((1, 1, grid), bool),
      image_index=jnp.zeros((1, 8), jnp.int32),
      token_index=jnp.zeros((1, 8), jnp.int32),
      positions=jnp.zeros((1, 8), jnp.int32),
      segments=jnp.ones((1, 8), jnp.int32),
    )
    params = dict(variables["params"])
    if self.lora["rank"]:
      llm = params.pop("llm")
      rank, targets = self.lora["rank"], lora.LLAMA
      # A key of its own: the LLM's keys draw merger and projection.
      key = jax.random.fold_in(rng, 1)
      params["lora"] = lora.init(key, llm, rank, targets)
    return params, {}

  def begin_phase(
    self, phase: phases.Phase, state: Any
  ) -> tuple[base.Params, base.Extra]:
    """Reads stage 1's merger, and what config.start_from has."""
    if phase.start:
      return state.params, state.extra
    folder = self.config.model_dir
    start = {"merger": branches.Branch(folder, "tokenizer", "params/merger")}
    if self.config.start_from:
      llm_start.check_text_tokenizer(self.config)
      # A plain LLaMA brings no merger: stage 1's stays.
      names = ("merger", "projection", "llm")[: 2 if self.lora["rank"] else 3]
      start |= branches.present(
        {name: llm_start.branch(self.config, name) for name in names}
      )
    loaded = self.artifacts.load_like(start, state.params)
    return state.params | loaded, state.extra

  # The loss.

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws which visual tokens of the input are replaced, and by which."""
    share = phase["word_dropout"]
    if not share:
      return {}
    shape = batch["tokens"].shape
    return token_dropout.draws(self.vocabulary, shape, share, rng)

  def nonlinear_sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> base.Sums:
    """Sums the weights of targets."""
    del phase, params, frozen, extra, draws
    return {"weights": batch["weights"].sum()}

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Sums the weighted nll, and that of text and visual targets; no stats."""
    del phase, extra
    features = self._features(frozen["encoder"], batch["pixels"])
    tokens = batch["tokens"]
    if draws:
      tokens = token_dropout.apply(self.vocabulary, tokens, draws)
    variables, head = self._variables(params, frozen)
    hidden: Any = self.model.apply(
      variables,
      tokens,
      features=features,
      keep=batch["keep"],
      image_index=batch["image_index"],
      token_index=batch["token_index"],
      positions=batch["positions"],
      segments=batch["segments"],
    )
    weights = batch["weights"]
    total, nll = losses.next_token_blocked(
      hidden,
      head,
      batch["targets"],
      weights,
      vocab_size=self.vocabulary.size,
    )
    return {"nll": total, "weights": weights.sum()} | self._counts(
      batch, nll
    ), {}

  def _counts(self, batch: base.Batch, nll: jax.Array) -> base.Sums:
    """Sums what is reported beside the loss, of nll float32[B, L]."""
    is_target = batch["weights"] > 0
    is_code = batch["targets"] >= self.vocabulary.image_begin
    visual, text = is_target & is_code, is_target & ~is_code
    used = batch["segments"] > 0
    count = lambda mask: mask.sum().astype(jnp.float32)
    return {
      "text": (nll * text).sum(),
      "text_targets": count(text),
      "visual": (nll * visual).sum(),
      "visual_targets": count(visual),
      "tokens": count(used),
      "positions": jnp.float32(used.size),
    }

  def combine(
    self, phase: phases.Phase, sums: base.Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Takes the weighted mean nll; reports text and visual targets apart."""
    del phase
    mean = averages.mean
    metrics: averages.Metrics = {
      "loss": mean(sums["nll"], sums["weights"]),
      "text_loss": mean(sums["text"], sums["text_targets"]),
      "visual_loss": mean(sums["visual"], sums["visual_targets"]),
      "tokens": averages.Sum(sums["tokens"]),
      "fill": mean(sums["tokens"], sums["positions"]),
    }
    return averages.ratio(sums["nll"], sums["weights"]), metrics

  def _variables(
    self, params: base.Params, frozen: base.Frozen
  ) -> tuple[dict[str, Any], jax.Array]:
    """Returns the model's variables, and the head float[V, D]."""
    if not self.lora["rank"]:
      return {"params": params}, params["llm"]["head"]
    low = lora.collection(params["lora"], self.lora_scale)
    trained = {name: params[name] for name in ("merger", "projection")}
    weights = trained | {"llm": frozen["llm"]}
    return {"params": weights, "lora": {"llm": low}}, frozen["llm"]["head"]

  def _features(self, encoder: Any, pixels: jax.Array) -> jax.Array:
    """Encodes uint8[B, S, H, W, 3] to float[B, S, N, D]; no gradient."""
    batch, slots = pixels.shape[:2]
    flat = pixels.reshape(batch * slots, *pixels.shape[2:])
    features = tokenizer.encode_images(
      self.tokenizer_config, encoder, image_io.normalize(flat)
    )
    features = jax.lax.stop_gradient(features)
    return features.reshape(batch, slots, *features.shape[1:])

  # Evaluation and result.

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Computes the training loss with no token dropped."""
    phase = self.last_phase.with_settings(word_dropout=0.0)
    rng = jax.random.key(0)  # nothing is drawn
    _, (_, metrics) = self.loss(phase, params, frozen, extra, batch, rng)
    return {k: metrics[k] for k in ("loss", "text_loss", "visual_loss")}

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns LLM, merger and projection, with their configs."""
    meta = {
      "llama": dataclasses.asdict(self.llama_config.served()),
      "vocabulary": dataclasses.asdict(self.vocabulary),
      "capacity": self.capacity,
    }
    params = nn.meta.unbox(params)
    if self.lora["rank"]:
      boxed, low = abstract_params.llm(self.llama_config), params.pop("lora")
      params["llm"] = self.artifacts.load_with_lora(
        llm_start.branch(self.config), boxed, low, self.lora_scale
      )
    return {self.part: (params, meta)}
