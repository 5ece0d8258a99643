"""Stage `pretrain`: one next-token loss over text and visual words.

Paper section 3.2 (unified generative pretraining): an image that is read
enters as the merger's continuous tokens, an image that is written as code
ids; both are targets over the one vocabulary. The stage-1 tokenizer that made
the ids stays frozen; the merger and projection of the continuous branch start
from it and train with the LLM.

With `model.lora.rank` the LLM is frozen, in `model.frozen_dtype`, and low-rank
changes of its matrices train in its place: fine-tuning on a single host.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import (
  agreement,
  averages,
  errors,
  image_io,
  sharding,
  vocabulary,
)
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.data import faults
from lavit_jax.data.batching import pipeline
from lavit_jax.models import llama, lora, unified
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.train import losses, phases
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  caches,
  precision,
)


class PretrainObjective(base.Objective):
  """Trains the LLM with the merger and projection it reads images by."""

  part = "llm"
  best_metric = "loss"
  best_mode = "min"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    words = self.stored.words(config.model_dir)
    made = precision.applied(
      config,
      trained=("merger",) if phases.trains(config, "merger") else (),
      encoder=words.vit,
      merger=words.merger,
    )
    self.tokenizer_config = dataclasses.replace(
      words, vit=made["encoder"], merger=made["merger"]
    )
    self.text = None if self.stored.outline else self.text_tokenizer()
    self.vocabulary = vocabulary.Vocabulary(
      text_size=self.text.size if self.text else config.assumed.text_size,
      num_codes=self.tokenizer_config.quantizer.num_codes,
    )
    self.llama_config = llama.LlamaConfig(
      **config.model.llm.to_dict() | {"vocab_size": self.vocabulary.size}
    )
    self._check_start()
    self.capacity = self._use_caches()
    self.stored.check_assumed(
      config, capacity=self.capacity, text_size=self.vocabulary.text_size
    )
    self.model = unified.UnifiedModel(
      self.llama_config, self.tokenizer_config, self.capacity
    )
    self.lora = dict(config.model.get("lora", {"rank": 0, "alpha": 0.0}))
    self.lora_scale = self.lora["alpha"] / max(self.lora["rank"], 1)
    if self.lora["rank"]:
      self._check_llm()
    self.batch_examples = config.batch_size
    if not self.stored.outline:
      self._use_rows()

  def _use_caches(self) -> int:
    """The most words of an image: none is ever cut."""
    config = self.config
    if self.stored.outline:
      return config.assumed.capacity
    self._caches = caches.codes(
      config, (self.source, self.held_out), self.images_of
    )
    return int(max(c.counts.max() for c in self._caches))

  def made_of(self):
    """Data, caches, text tokenizer, encoder, tokenizer; under LoRA the LLM."""
    found = super().made_of() | self.words_made_of() | self.text_made_of()
    train, held_out = self._caches
    found |= {
      "train_cache": train.fingerprint(),
      "held_out_cache": held_out.fingerprint(),
    }
    if self.lora["rank"]:
      folder = self.config.start_from
      found["llm"] = fingerprints.of_part(folder, self.part, "llm")
    return found

  def _check_start(self):
    """Whether weights of config.start_from mean under this config what there.

    Raises:
      errors.ConfigError: a field of the network differs.
    """
    folder = self.config.start_from
    if self.stored.outline or not folder:
      return
    if self.part not in checkpoints.parts_in(folder):
      return  # said where it is read; a run that goes on need not have it
    meta = checkpoints.read_meta(folder, self.part)
    if "llama" not in meta:
      return  # shapes are all that can be compared
    theirs = llama.LlamaConfig(**meta["llama"])
    agreement.settle(
      # Rotary positions have no table: max_len is no property of weights.
      agreement.fields(
        theirs, self.llama_config, "model.llm.", ("max_len", "vocab_size")
      ),
      agreement.accepted(self.config),
      what=f"The {self.part} of start_from={folder}",
    )

  def _check_llm(self):
    """Whether config.start_from has the LLM that a LoRA is to change."""
    folder = self.config.start_from
    if self.stored.outline:
      return
    if not folder or self.lora["alpha"] <= 0:
      raise errors.ConfigError(
        f"model.lora={self.lora} changes a trained LLM: it needs an alpha above"
        " 0, and start_from, that LLM's model directory. Set model.lora.rank=0"
        " to train the whole."
      )
    self._check_same_words(folder)
    wanted = sharding.unbox(abstract_params.llm(self.llama_config))
    branches.check({"llm": self._stored_llm()}, {"llm": wanted})

  def _stored_llm(self):
    return branches.Branch(self.config.start_from, self.part, "llm")

  def frozen_shapes(self):
    """The encoder; under LoRA the LLM too."""
    dtype = self.config.model.get("frozen_dtype", "float32")
    made = {
      "encoder": abstract_params.encoder(self.tokenizer_config.vit, dtype)
    }
    if self.lora["rank"]:
      made["llm"] = abstract_params.llm(self.llama_config, dtype)
    return made

  def frozen_branches(self):
    """The encoder; under LoRA the LLM too. Ids come from the cache."""
    made = {"encoder": branches.Branch(self.config.model_dir, "encoder")}
    if self.lora["rank"]:
      made["llm"] = self._stored_llm()
    return made

  def batch_shapes(self):
    """Packed rows; see `pipeline.packed_mixture`."""
    data, count = self.config.data, self.config.batch_size
    row, slots = (count, data.length), (count, data.slots)
    side = data.image_size
    ids = ("tokens", "targets", "segments", "positions", "slot", "order")
    return base.abstract(
      {name: (row, np.int32) for name in ids}
      | {
        "weights": (row, np.float32),
        "pixels": ((*slots, side, side, 3), np.uint8),
        "keep": ((*slots, self.tokenizer_config.num_patches), bool),
        "row": ((count,), np.int64),
        "doc_hash": ((count,), np.int64),
      }
    )

  def _use_rows(self):
    data = self.config.data
    make = lambda source, codes: pipeline.packed_rows(
      source,
      codes,
      self.text,
      self.vocabulary,
      mixture=data.mixture.to_dict(),
      length=data.length,
      slots=data.slots,
      seed=self.config.seed,
      batch_size=self.config.batch_size,
      window=data.window,
      limit_share=faults.share_of(data),
    )
    self._train_data = make(self.source, self._caches[0])
    self._held_out_data = make(self.held_out, self._caches[1])

  def init(self, rng):
    """Boxed parameters `llm` or, in its place, `lora`; merger, projection."""
    config = self.tokenizer_config
    grid = config.num_patches
    variables = self.model.init(
      rng,
      jnp.zeros((1, 8), jnp.int32),
      features=jnp.zeros((1, 1, grid, config.width)),
      keep=jnp.ones((1, 1, grid), bool),
      slot=jnp.zeros((1, 8), jnp.int32),
      order=jnp.zeros((1, 8), jnp.int32),
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

  def begin_phase(self, phase, state):
    """Starts from the LLM of config.start_from, or stage 1's merger alone."""
    if phase.start:
      return state.params, state.extra
    where, folder = self.config.model_dir, self.config.start_from
    start = {"merger": branches.Branch(where, "tokenizer", "params/merger")}
    if folder:
      self._check_same_words(folder)
      # A plain LLaMA brings no merger: stage 1's stays.
      names = ("merger", "projection", "llm")[: 2 if self.lora["rank"] else 3]
      theirs = {n: branches.Branch(folder, self.part, n) for n in names}
      start |= {n: b for n, b in theirs.items() if branches.is_there(b)}
    found = self.load_start(start, state.params)
    return state.params | found, state.extra

  def _check_same_words(self, folder):
    """Raises CheckpointError unless its text ids mean what ours mean."""
    theirs = files.place(folder) / "tokenizer.model"
    ours = files.place(self.config.model_dir) / "tokenizer.model"
    if not theirs.exists() or theirs.read_bytes() != ours.read_bytes():
      raise errors.CheckpointError(
        f"{theirs} is missing or is not {ours}, byte for byte: ids of the LLM"
        " in config.start_from would be other words here. Copy that file to"
        " config.model_dir before the first stage is trained."
      )

  def draws(self, phase, batch, rng):
    """Which input words are hidden, and by what."""
    share = phase["word_dropout"]
    if not share:
      return {}
    return word_draws(self.vocabulary, batch["tokens"].shape, share, rng)

  def norms(self, phase, params, frozen, state, batch, draws):
    """Positions that teach, weighted."""
    del phase, params, frozen, state, draws
    return {"weights": batch["weights"].sum()}

  def sums(self, phase, params, frozen, state, batch, draws):
    """Next-token nll, weighted; that of text and visual targets apart."""
    del phase, state
    features = self._features(frozen["encoder"], batch["pixels"])
    tokens = batch["tokens"]
    if draws:
      tokens = drop_visual_tokens(self.vocabulary, tokens, draws)
    variables, head = self._variables(params, frozen)
    hidden = self.model.apply(
      variables,
      tokens,
      features=features,
      keep=batch["keep"],
      slot=batch["slot"],
      order=batch["order"],
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
    learnt = weights > 0
    visual = learnt & (batch["targets"] >= self.vocabulary.image_begin)
    text, used = learnt & ~visual, batch["segments"] > 0
    count = lambda mask: mask.sum().astype(jnp.float32)
    return {
      "nll": total,
      "weights": weights.sum(),
      "text": (nll * text).sum(),
      "text_targets": count(text),
      "visual": (nll * visual).sum(),
      "visual_targets": count(visual),
      "tokens": count(used),
      "places": jnp.float32(used.size),
    }, {}

  def combine(self, phase, sums):
    """Weighted mean nll; text and visual targets are reported apart."""
    del phase
    mean = averages.mean
    metrics = {
      "loss": mean(sums["nll"], sums["weights"]),
      "text_loss": mean(sums["text"], sums["text_targets"]),
      "visual_loss": mean(sums["visual"], sums["visual_targets"]),
      "tokens": averages.Sum(sums["tokens"]),
      "fill": mean(sums["tokens"], sums["places"]),
    }
    return averages.ratio(sums["nll"], sums["weights"]), metrics

  def _variables(self, params, frozen):
    """What the model is applied to, and the head float[V, D]."""
    if not self.lora["rank"]:
      return {"params": params}, params["llm"]["head"]
    low = lora.collection(params["lora"], self.lora_scale)
    params = {name: params[name] for name in ("merger", "projection")}
    whole = {"params": params | {"llm": frozen["llm"]}, "lora": {"llm": low}}
    return whole, frozen["llm"]["head"]

  def _features(self, encoder, pixels):
    """float[B, S, N, D] of uint8[B, S, H, W, 3]; no gradient."""
    batch, slots = pixels.shape[:2]
    flat = pixels.reshape(batch * slots, *pixels.shape[2:])
    features = tokenizer.encode_images(
      self.tokenizer_config, encoder, image_io.normalize(flat)
    )
    features = jax.lax.stop_gradient(features)
    return features.reshape(batch, slots, *features.shape[1:])

  def held_out_metrics(self, params, frozen, state, batch):
    """The training loss on held-out rows, no word dropped."""
    phase = dict(self.last_phase) | {"word_dropout": 0.0}
    _, (_, metrics) = self.loss(phase, params, frozen, state, batch, None)
    return {k: metrics[k] for k in ("loss", "text_loss", "visual_loss")}

  def export(self, params, state):
    """LLM, merger and projection, with what is needed to use them."""
    meta = {
      "llama": dataclasses.asdict(self.llama_config.served()),
      "vocabulary": dataclasses.asdict(self.vocabulary),
      "capacity": self.capacity,
    }
    params = nn.meta.unbox(params)
    if self.lora["rank"]:
      boxed, low = abstract_params.llm(self.llama_config), params.pop("lora")
      where = self._stored_llm()
      params["llm"] = self.with_lora(where, boxed, low, self.lora_scale)
    return params, meta


def word_draws(vocab, shape, share: float, rng) -> dict[str, jax.Array]:
  """What `drop_visual_tokens` asks of chance.

  Args:
    vocab: a vocabulary.Vocabulary.
    shape: (B, L).
    share: of the visual words, in [0, 1].
    rng: a key.

  Returns:
    {"chosen": bool[B, L], "words": int32[B, L]}.
  """
  chosen_rng, word_rng = jax.random.split(rng)
  first, end = vocab.code_offset, vocab.size
  return {
    "chosen": jax.random.bernoulli(chosen_rng, share, shape),
    "words": jax.random.randint(word_rng, shape, first, end, jnp.int32),
  }


def drop_visual_tokens(vocab, tokens, drawn):
  """Hides some of the visual words the LLM is given from it.

  Input words alone, targets stay: what an image is to show must then be read
  off the prompt, not guessed from the words before. (Word dropout of Bowman et
  al. 2016, arXiv 1511.06349, section 3.1, with random words for unk.)

  Args:
    vocab: a vocabulary.Vocabulary.
    tokens: int[B, L].
    drawn: of `word_draws`, of these rows.

  Returns:
    int[B, L]; text and image marks are as they were.
  """
  visual = (tokens >= vocab.code_offset) & (tokens < vocab.size)
  words = drawn["words"].astype(tokens.dtype)
  return jnp.where(drawn["chosen"] & visual, words, tokens)
