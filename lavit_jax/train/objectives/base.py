"""What every stage shares: its data, its held-out loop, its default hooks."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import (
  agreement,
  averages,
  errors,
  hosts,
  sharding,
  vocabulary,
)
from lavit_jax.core.storage import checkpoints, files, fingerprints
from lavit_jax.data import contents, examples, faults
from lavit_jax.data.batching import pipeline
from lavit_jax.data.sources import kinds
from lavit_jax.models import lora
from lavit_jax.train import boundaries, optimizer
from lavit_jax.train import phases as phases_lib
from lavit_jax.train.objectives.frozen import artifacts


class Objective:
  """A stage: what is learned, from which batches, and how it is judged.

  Subclasses set `part`, `best_metric`, `best_mode` and implement `init`,
  `norms`, `sums`, `combine`, `batch_shapes` (abstract arrays of a global batch;
  of the largest, if they differ), `held_out_metrics` (of `averages`) and
  `export`. What the step takes as an argument and never differentiates, they
  describe: `frozen_shapes` says what it looks like, `frozen_branches` where it
  lies. An objective itself holds no weights. Made of
  `AbstractArtifacts` it has no data either: enough to compile its step.
  """

  part: str
  best_metric: str = "loss"
  best_mode: str = "min"
  images: np.ndarray | None = None  # uint8[B, h, w, 3], of `evaluate`
  batch_size_may_change = (
    True  # rows do not depend on the size of the batch they are in
  )

  def __init__(self, config, where=None):
    self.config = config
    self.stored = where or artifacts.Artifacts()
    self.source, self.held_out = self.stored.sources(config)
    self.last_phase = config.phases[config.schedule[-1]].to_dict()

  def labels(self, phase, params):
    """Group of each parameter: the longest matching prefix of `phase.train`.

    `phase["train"]` maps the names with which a path begins ("merger",
    "selector/head", "" for everything) to a learning-rate group; what matches
    none is frozen. See `phases.begins`.
    """
    rules = sorted(dict(phase["train"]).items(), key=lambda kv: -len(kv[0]))
    used = set()

    def label(path, _):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      for prefix, group in rules:
        if phases_lib.begins(name, prefix):
          used.add(prefix)
          return group
      return optimizer.FROZEN

    labels = jax.tree_util.tree_map_with_path(label, params)
    if unused := sorted({prefix for prefix, _ in rules} - used):
      raise errors.ConfigError(
        f"Phase setting train={dict(phase['train'])} names {unused}, which no"
        f" parameter path starts with. Top-level names: {sorted(params)}."
      )
    return labels

  def frozen_shapes(self):
    """The frozen networks, abstract and boxed; nothing by default."""
    return {}

  def frozen_branches(self):
    """Where each is read from: `branches.Branch`es; nothing by default."""
    return {}

  def load_frozen(self, layout=None):
    """The frozen networks, each array read straight to where it belongs.

    Args:
      layout: shardings as of `frozen_shapes`; None: on one device.

    Returns:
      A tree as `frozen_shapes`, unboxed; abstract of a `AbstractArtifacts`.

    Raises:
      errors.CheckpointError: what is stored is damaged or does not fit.
    """
    wanted = sharding.unbox(self.frozen_shapes())
    return self.stored.load(self.frozen_branches(), wanted, layout)

  @functools.cached_property
  def frozen(self):
    """`load_frozen()` on one device and kept: for small models and tests."""
    return self.load_frozen()

  def load_start(self, branches, params):
    """Some of the parameters as stored, laid out as those that are there.

    Args:
      branches: where some of the trees of `params` lie.
      params: the run's parameters.
    """
    wanted = {name: params[name] for name in branches}
    layout = jax.tree.map(lambda x: getattr(x, "sharding", None), wanted)
    return self.stored.load(branches, wanted, layout)

  def with_lora(self, branch, boxed, low, scale):
    """A frozen network in float32 that does what it did with its LoRA.

    It is read, changed and given back in the shares of the mesh on which its
    LoRA lies.

    Args:
      branch: where the network lies.
      boxed: its abstract parameters.
      low: the LoRA, see `lora.init`, unboxed.
      scale: alpha / rank.
    """
    wanted, layout = sharding.unbox(boxed), None
    place = getattr(jax.tree.leaves(low)[0], "sharding", None)
    if isinstance(place, jax.sharding.NamedSharding):
      layout = {"net": sharding.param_shardings(boxed, place.mesh)}
    whole = self.stored.load({"net": branch}, {"net": wanted}, layout)["net"]
    return lora.merge(whole, low, scale)

  def image_shapes(self, text_length=None):
    """`batch_shapes` of the batches that `use_images` makes."""
    count, side = self.config.batch_size, self.config.data.image_size
    shapes = {
      "image": ((count, side, side, 3), np.uint8),
      "valid": ((count,), np.float32),
      "index": ((count,), np.int64),
    }
    if text_length is not None:
      shapes["text"] = ((count, text_length), np.int32)
      shapes["text_mask"] = ((count, text_length), bool)
    return abstract(shapes)

  def draws(self, phase, batch, rng):
    """What is random of a whole batch: {name: [B, ...]}, cut as its rows are.

    So the loss does not depend on `config.accumulate`. Nothing by default.
    """
    del phase, batch, rng
    return {}

  def norms(self, phase, params, frozen, state, batch, draws):
    """The sums that the loss is not linear in: {name: float[]}.

    Names are some of `sums`. Asked of each part of a batch before the sums,
    where a batch is run in parts; no gradient passes. See
    `train/accumulation.py`.
    """
    raise NotImplementedError

  def sums(self, phase, params, frozen, state, batch, draws):
    """Sums over rows, of which `combine` makes the loss.

    Args:
      phase: of the run, or a mapping of its settings.
      params: of the stage.
      frozen: as the attribute.
      state: what changes without a gradient.
      batch: of arrays [B, ...], a part of a batch too.
      draws: of these rows.

    Returns:
      ({name: float[]}, seen); `seen` is a tree for `update_extra`.
    """
    raise NotImplementedError

  def combine(self, phase, sums):
    """(loss float[], its metrics, "loss" among them) of a batch's sums."""
    raise NotImplementedError

  def merge_seen(self, a, b):
    """What two parts of a batch have seen; zeros are nothing seen."""
    return jax.tree.map(jnp.add, a, b)

  def update_extra(self, phase, state, seen, params):
    """(state after a step, metrics of it); `params` are the updated ones."""
    del phase, seen, params
    return state, {}

  def loss(self, phase, params, frozen, state, batch, rng):
    """(loss, (state, metrics)) of a whole batch, parameters as they are."""
    draws = self.draws(phase, batch, rng)
    sums, seen = self.sums(phase, params, frozen, state, batch, draws)
    loss, metrics = self.combine(phase, sums)
    state, more = self.update_extra(phase, state, seen, params)
    return loss, (state, metrics | more)

  def begin_phase(self, phase, state):
    """(params, extra) that a phase starts from, read from files.

    Those of the state by default. What is computed comes after: `folds`.
    """
    del phase
    return state.params, state.extra

  def folds(self, phase) -> tuple[boundaries.Fold, ...]:
    """What is computed of batches before a phase; nothing by default."""
    del phase
    return ()

  def exports(self, params, state):
    """What the stage writes when it ends: {part: (params, meta)}."""
    return {self.part: self.export(params, state)}

  def made_of(self) -> dict[str, str]:
    """{name: fingerprint} of all that this run takes; see `provenance.of`.

    Here its data; stages add the caches and the frozen weights they use.
    """
    return {
      "train_data": contents.of(self.source),
      "held_out_data": contents.of(self.held_out),
    }

  @functools.cached_property
  def images_of(self) -> tuple[str, str]:
    """What caches know the (train, held-out) images by."""
    found = examples.fingerprint(self.source)
    return found, examples.fingerprint(self.held_out)

  def words_made_of(self) -> dict[str, str]:
    """Fingerprints of model_dir's encoder and tokenizer, which fit together.

    Raises:
      errors.CheckpointError: the tokenizer was trained on another encoder.
    """
    folder = self.config.model_dir
    found = {"encoder": fingerprints.of_part(folder, "encoder")}
    told = checkpoints.read_meta(folder, "tokenizer").get("made_of", {})
    agreement.settle(
      agreement.prints(
        told, found, "train the tokenizer again, or put its encoder back"
      ),
      agreement.accepted(self.config),
      what=f"What the tokenizer of {folder} was trained on",
      error=errors.CheckpointError,
    )
    return found | {"tokenizer": fingerprints.of_words(folder)}

  def text_made_of(self) -> dict[str, str]:
    """The fingerprint of model_dir's text tokenizer."""
    path = files.place(self.config.model_dir) / "tokenizer.model"
    return {"text_tokenizer": fingerprints.of_file(path)}

  def text_tokenizer(self) -> vocabulary.TextTokenizer:
    """The model directory's SentencePiece model, trained if there is none."""
    path = files.place(self.config.model_dir) / "tokenizer.model"
    if hosts.is_lead() and not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      sentences = kinds.sentences(self.source, limit=20_000)
      vocabulary.TextTokenizer.train(
        sentences, path, self.config.data.text_vocab
      )
    hosts.barrier("lavit_text_tokenizer")
    tokenizer = vocabulary.TextTokenizer.load(path)
    wanted = self.config.data.get("text_vocab")
    if wanted not in (None, tokenizer.size):
      raise errors.ConfigError(
        f"{path} has {tokenizer.size} pieces, and data.text_vocab is"
        f" {wanted}. The model's other parts may know that tokenizer, so it is"
        f" not made anew: set data.text_vocab={tokenizer.size}, or begin with"
        " another model_dir."
      )
    return tokenizer

  def use_images(self, text=None, text_length=None):
    """Batches of images (and captions) from the sources of config.data."""
    self.batch_examples = self.config.batch_size
    if self.stored.outline:
      return
    make = lambda source: pipeline.image_batches(
      source,
      self.config.batch_size,
      seed=self.config.seed,
      tokenizer=text,
      text_length=text_length,
      limit_share=faults.share_of(self.config.data),
    )
    self._train_data = make(self.source)
    self._held_out_data = make(self.held_out)

  def batches(
    self, start: int, skip: int = 0, rows=None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Some rows (all by default) of every global batch from `start` on.

    Batch k begins at row `skip` + k times the batch size.
    """
    return pipeline.iterate(
      self._train_data,
      start_batch=start,
      num_threads=self.config.data.get("threads", 2),
      rows=rows,
      skip=skip,
    )

  def count_tokens(self, batch) -> int:
    """LLM tokens of a host batch, 0 for stages without them."""
    if "segments" not in batch:
      return 0
    return int((batch["segments"] > 0).sum())

  def held_out_batches(self, rows=None) -> Iterator[dict[str, np.ndarray]]:
    """The first config.eval.batches held-out batches, always the same."""
    data = pipeline.iterate(
      self._held_out_data, start_batch=0, num_threads=0, rows=rows
    )
    count = min(self.config.eval.batches, len(self._held_out_data))
    for _ in range(count):
      yield next(data)

  def _compiled_held_out(self, mesh):
    """The jitted (`held_out_metrics`, `valid` of the batch), made once."""
    made = vars(self).setdefault("_held_out_steps", {})
    if mesh in made:
      return made[mesh]

    def metrics(params, frozen, state, batch):
      found = self.held_out_metrics(params, frozen, state, batch)
      return found, batch.get("valid", jnp.ones(1))

    # Whole on every process, which reads them.
    out = None if mesh is None else sharding.replicated(mesh)
    made[mesh] = jax.jit(metrics, out_shardings=out)
    return made[mesh]

  def evaluate(self, params, frozen, state, mesh=None) -> dict[str, float]:
    """`held_out_metrics` over all held-out batches together.

    A metric of which they have nothing is left out; the best one is NaN then.
    What the metrics of the fullest batch hold as `images` is kept in
    `self.images`. With a mesh every process brings its share of each batch,
    and all get the same.
    """
    rows, most, mine = [], 0, None
    size = self.config.batch_size
    if mesh is not None:
      mine = sharding.rows_of_process(mesh, size)
    for batch in self.held_out_batches(mine):
      if mesh is not None:
        batch = sharding.put_batch(batch, mesh, size)
      row, valid = jax.device_get(
        self._compiled_held_out(mesh)(params, frozen, state, batch)
      )
      made = row.pop("images", None)
      if made is not None and valid.sum() > most:
        self.images, most = made[valid[: len(made)] > 0], valid.sum()
      rows.append(row)
    return {self.best_metric: math.nan} | averages.merged(rows)


def abstract(shapes) -> dict[str, jax.ShapeDtypeStruct]:
  """Abstract arrays as JAX gets them of {name: (shape, numpy dtype)}."""
  return {
    name: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
    for name, (shape, dtype) in shapes.items()
  }


def check_same(folder, ours, theirs, what: str) -> None:
  """Raises CheckpointError unless two trees have the same names and shapes.

  Args:
    folder: where `theirs` comes from, for the message.
    ours: tree of (abstract) arrays.
    theirs: likewise.
    what: name of the tree, for the message.
  """

  def shapes(tree):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  ours, theirs = shapes(ours), shapes(theirs)
  wrong = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
  if wrong:
    key = wrong[0]
    raise errors.CheckpointError(
      f"{len(wrong)} arrays of the {what} in {folder} do not fit this config,"
      f" such as {key}: {theirs.get(key)} there, {ours.get(key)} here. Use the"
      " config.model that they were trained with (see part.json), or train the"
      " stage again."
    )
