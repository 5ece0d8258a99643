"""Makes batches of sources, with Grain: random access, one integer of state.

  packed = packed_rows(source, cache, tokenizer, vocabulary, mixture=…, …)
  for batch in iterate(packed, start_batch=step): …

Batch k is a pure function of the arguments and k: a run that is resumed, or
divided among other processes, sees the same rows.
"""

import dataclasses
import fractions
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core import vocabulary as vocabulary_lib
from lavit_jax.data import examples, sequences
from lavit_jax.data import faults as faults_lib
from lavit_jax.data.batching import image_orders, packing
from lavit_jax.data.batching import rows as rows_lib
from lavit_jax.data.sources import mixed

_LOG = logging.getLogger(__name__)
_ENDLESS = 1 << 48  # rows of an endless dataset
_AHEAD = 4  # batches decoded ahead of the one in use


@dataclasses.dataclass(frozen=True)
class Plan:
  """What may change of the rows of a run, and from where on.

  Attributes:
    changes: weights that change: {number of a document: {name: weight}}.
    settled: gives the first document that no row before a row can hold.
  """

  changes: Mapping[int, Mapping[str, float]]
  settled: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Batches:
  """Rows by number, and the global batch size.

  Attributes:
    rows: a grain.MapDataset of dicts of arrays.
    batch_size: B, global number of rows.
    faults: FaultLogs and Tallies of the rows made so far.
    progress: gives metrics of the data before a row: how far it is, and how
      often each part of the data was gone through.
    plan: of packed rows.
  """

  rows: grain.MapDataset
  batch_size: int
  faults: tuple[Any, ...] = ()
  progress: Callable[[int], dict[str, float]] = lambda row: {}
  plan: Plan | None = None

  def __len__(self) -> int:
    """Returns the number of batches; the last one may be padded."""
    return -(-len(self.rows) // self.batch_size)

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    """Returns global batch k."""
    return next(iterate(self, start_batch=k, num_threads=0))


class Iterator:
  """Iterates over batches; `next_batch` is its whole state."""

  def __init__(self, dataset: Any, start: int) -> None:
    """Begins with batch `start`, the first of the dataset."""
    self._iterator, self.next_batch = iter(dataset), start

  def __iter__(self) -> "Iterator":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    self.next_batch += 1
    return batch


def iterate(
  batches: Batches,
  *,
  start_batch: int = 0,
  num_threads: int = 2,
  rows: Sequence[int] | np.ndarray | None = None,
  skip: int = 0,
) -> Iterator:
  """Iterates over some rows of every batch, a process's share.

  Args:
    batches: a Batches.
    start_batch: the batch to begin with, `next_batch` of an earlier iterator.
    num_threads: threads that decode ahead; 0 decodes when asked.
    rows: numbers, 0 ... B - 1, of the rows wanted of each batch of B; all by
      default. `sharding.rows_of_process` gives those of a process.
    skip: number of the first row of batch 0; only of endless rows. Not 0 if
      the run left out rows, or had another batch size before.

  Returns:
    Iterator of dicts of arrays [len(rows), ...]. A finite dataset ends; its
    last batch is filled up with zeros (weights and valid are zero there).

  Raises:
    errors.ConfigError: batches of no rows.
  """
  size, data = batches.batch_size, batches.rows
  if size < 1:
    raise errors.ConfigError(f"batch_size={size}: expected 1 or more.")
  wanted = np.arange(size) if rows is None else np.asarray(rows)
  share = len(wanted)

  def row(local):
    k, j = divmod(local, share)
    number = skip + k * size + int(wanted[j])
    if number < len(data):
      return data[number]
    return {name: np.zeros_like(value) for name, value in data[0].items()}

  stop = len(batches) * share
  local = grain.MapDataset.range(min(start_batch * share, stop), stop)
  # A thread makes a part of a batch, not all of it: Grain has at most as many
  # threads at work as elements are ahead.
  part = _part_of(share, num_threads)
  parts = share // part
  options = grain.ReadOptions(
    num_threads=num_threads,
    prefetch_buffer_size=max(_AHEAD * parts, num_threads) if num_threads else 0,
  )
  dataset = local.map(row).batch(part).to_iter_dataset(options).batch(parts)
  return Iterator(dataset.map(_joined), start_batch)


def _part_of(share, num_threads) -> int:
  """Returns how many of the rows of a batch a thread makes: a divisor."""
  most = max(1, share // max(num_threads, 1))
  return max(d for d in range(1, most + 1) if share % d == 0)


def _joined(parts):
  """Returns arrays [parts, rows, ...] as [rows, ...]."""
  return {name: x.reshape(-1, *x.shape[2:]) for name, x in parts.items()}


def image_batches(
  source: examples.Source,
  batch_size: int,
  *,
  seed: int | None = None,
  tokenizer: vocabulary_lib.TextTokenizer | None = None,
  text_length: int | None = None,
  limit_share: float = faults_lib.LIMIT_SHARE,
) -> Batches:
  """Returns batches of single images, with a caption each given a tokenizer.

  Args:
    source: an examples.Source.
    batch_size: B, global number of images.
    seed: of the endless shuffled order; None: each image once, in order.
    tokenizer: a vocabulary.TextTokenizer, or None for images alone.
    text_length: T, ids of a caption; longer ones are truncated.
    limit_share: share of bad images that stops the run.

  Returns:
    Batches of image uint8[B, H, W, 3], valid float32[B], index int64[B], and
    text int32[B, T], text_mask bool[B, T] (ids, then </s>, then padding).

  Raises:
    errors.DataError: the source holds no images.
  """
  log = faults_lib.FaultLog(f"images of {source.name}", limit_share)
  usable = examples.usable(source)
  if not len(usable):
    raise errors.DataError(f"{source.name} holds no images.")
  order: np.ndarray | image_orders.Order = usable
  length, progress = len(usable), lambda number: {"epoch": number / len(usable)}
  if seed is not None:
    endless = image_orders.of(source, seed)
    order, length, progress = endless, _ENDLESS, endless.epochs

  def row(number):
    i = int(order[number])
    pixels, valid = rows_lib.image(source, i, log)
    out = {"image": pixels, "valid": np.float32(valid), "index": np.int64(i)}
    if tokenizer is not None:
      captions = source.captions(i)
      text = captions[0] if captions else ""
      if len(captions) > 1:
        rng = np.random.default_rng([seed or 0, number])
        text = captions[rng.integers(len(captions))]
      try:
        ids = sequences.text_ids(tokenizer, text)
      except vocabulary_lib.BadText as error:
        log.fault(f"caption of {source.image_key(i)}", error)
        ids = []
      out["text"], out["text_mask"] = _text(ids, text_length)
    return out

  rows = grain.MapDataset.range(length).map(row)
  return Batches(rows, batch_size, (log,), progress)


def _text(ids, length):
  """Returns ids of a caption, truncated and ended by </s>, and their mask.

  Without a caption the mask is False everywhere.
  """
  ended = [*ids[: length - 1], vocabulary_lib.EOS_ID]
  out, mask = np.zeros(length, np.int32), np.arange(length) < len(ended)
  out[: len(ended)] = ended
  return out, mask & bool(ids)


def packed_rows(
  source: examples.Source,
  cache: sequences.Codes | Mapping[str, sequences.Codes | None] | None,
  tokenizer: vocabulary_lib.TextTokenizer,
  vocabulary: vocabulary_lib.Vocabulary,
  *,
  mixture: Mapping[str, float],
  changes: Mapping[int, Mapping[str, float]] | None = None,
  **kwargs: Any,
) -> Batches:
  """Returns packed rows of a source: `packed_mixture` of its tasks.

  Of a mixture of sources each has its own weight, and divides it among its
  tasks as its own `mixture` says.

  Args:
    source: an examples.Source.
    cache: its CodeCache; of a mixture that of each source, by its name.
    tokenizer: a vocabulary.TextTokenizer.
    vocabulary: a vocabulary.Vocabulary.
    mixture: weight of each task, counted in documents; one that is longer than
      a row counts once. 0 leaves a task out, and so does a source without
      examples of it.
    changes: other weights of some sources of a mixture, by the number of the
      document from which on they have them.
    **kwargs: as of `packed_mixture`.

  Raises:
    errors.ConfigError: an unknown task, or no task that the source has; and
      the errors of `packed_mixture`.
  """
  if not isinstance(source, mixed.MixedSource):
    assert not isinstance(cache, Mapping)
    parts = _of_tasks(source, cache, mixture)
    return packed_mixture(parts, tokenizer, vocabulary, **kwargs)
  assert isinstance(cache, Mapping)
  weights = _weights(source.parts, changes or {})
  components = []
  for part in source.parts:
    if not any(some[part.name] for some in weights.values()):
      continue
    parts = _of_tasks(part.source, cache[part.name], part.mixture)
    if not parts:
      raise errors.ConfigError(
        f"Source {part.name!r} has the weight {part.weight}, but its mixture"
        f" {dict(part.mixture)} gives none of its tasks"
        f" {list(part.source.tasks())} a weight. Give one, or its source the"
        " weight 0."
      )
    total = sum(fractions.Fraction(str(one.weight)) for one in parts)
    components += [
      dataclasses.replace(
        one,
        name=part.name,
        weight=fractions.Fraction(str(one.weight)) / total,
      )
      for one in parts
    ]
  return packed_mixture(
    components, tokenizer, vocabulary, weights=weights, **kwargs
  )


def _weights(parts, changes):
  """Returns the weights of all sources, by the document they begin with.

  Raises:
    errors.ConfigError: a change names no source.
  """
  now = {part.name: part.weight for part in parts}
  weights = {0: now}
  for start, changed in sorted(changes.items()):
    if unknown := sorted(set(changed) - set(now)):
      raise errors.ConfigError(
        f"config.data.reweighted at document {start} names {unknown}, but the"
        f" sources are {sorted(now)}."
      )
    now = now | dict(changed)
    weights[start] = now
  return weights


def _of_tasks(source, cache, mixture) -> list[packing.Component]:
  """Returns a component for each task of a source that has a weight."""
  if unknown := sorted(set(mixture) - set(examples.TASKS)):
    raise errors.ConfigError(
      f"mixture names {unknown}, which are not tasks. Expected some of"
      f" {sorted(examples.TASKS)}. Change config.data.mixture."
    )
  _warn_of_unused(source, mixture)
  if unknown := sorted(set(mixture) - set(source.tasks())):
    usable = sorted(set(source.tasks()) & set(mixture))
    if not any(mixture[t] for t in usable):
      raise errors.ConfigError(
        f"mixture names {unknown}, but {source.name} only has"
        f" {sorted(source.tasks())}; give one of these a weight."
      )
  return [
    packing.Component(source, task, weight, cache)
    for task, weight in mixture.items()
    if weight and task in source.tasks() and source.num_examples(task)
  ]


def _warn_of_unused(source, mixture):
  """Warns of examples whose task has no weight."""
  unused = {
    task: source.num_examples(task)
    for task in source.tasks()
    if not mixture.get(task) and source.num_examples(task)
  }
  if unused:
    counts = ", ".join(f"{count} {task}" for task, count in unused.items())
    _LOG.warning(
      "%s has examples that are left out, since config.data.mixture gives"
      " their tasks no weight: %s",
      source.name,
      counts,
    )


def packed_mixture(
  components: Sequence[packing.Component],
  tokenizer: vocabulary_lib.TextTokenizer,
  vocabulary: vocabulary_lib.Vocabulary,
  *,
  length: int,
  slots: int,
  batch_size: int,
  seed: int = 0,
  window: int = 1024,
  limit_share: float = faults_lib.LIMIT_SHARE,
  weights: Mapping[int, Mapping[str, float]] | None = None,
  by_tokens: bool = False,
) -> Batches:
  """Returns packed rows of several sources and tasks in exact proportions.

  Args:
    components: sources with task and weight.
    tokenizer: a vocabulary.TextTokenizer.
    vocabulary: a vocabulary.Vocabulary.
    length: L, positions a row; `pieces` divides longer documents.
    slots: S, images read a row; likewise.
    batch_size: B, rows of a global batch.
    seed: of mixture, order and packing.
    window: documents packed together.
    limit_share: share of bad documents, or of bad images, that stops the run;
      documents longer than a row are not bad, and are counted separately.
    weights: of the components' names, which those of the components divide:
      {0: …}, and others by the number of the document from which on they hold.
    by_tokens: weights are shares of the positions, not of the documents.

  Returns:
    Batches of tokens, targets, segments, positions, image_index, token_index
    int32[B, L]; weights float32[B, L]; pixels uint8[B, S, H, W, 3]; keep
    bool[B, S, N]; row, doc_hash int64[B]. Segments count from 1; 0 is padding.

  Raises:
    errors.ConfigError, errors.DataError: nothing to pack, sizes that differ
      between components, or a cache of another codebook.
  """
  _check_components(components, vocabulary)
  limits = (length, slots)
  documents = rows_lib.Documents(
    components,
    tokenizer,
    vocabulary,
    limits=limits,
    seed=seed,
    limit_share=limit_share,
    window=window,
    weights=_of_components(components, weights),
    by_tokens=by_tokens,
  )
  settings: dict[str, Any] = dict(limits=limits, seed=seed, window=window)
  memo = rows_lib.memo_path(
    components,
    tokenizer,
    **settings,
    weights=weights,
    by_tokens=by_tokens,
    lengths=documents.digest(),
  )
  plan = packing.PackingPlan(documents.sizes, memo=memo, **settings)
  rows = grain.MapDataset.range(_ENDLESS).map(rows_lib.Rows(plan, documents))

  def progress(row: int) -> dict[str, float]:
    before = plan.documents_before(row)
    names = [f"epoch/{c.name}/{c.task}".replace("//", "/") for c in components]
    epochs = documents.stream.epochs(before).tolist()
    return {"documents": float(before), **dict(zip(names, epochs, strict=True))}

  changes = {start: some for start, some in (weights or {}).items() if start}
  kept = Plan(changes, plan.settled)
  return Batches(rows, batch_size, documents.logs, progress, kept)


def _of_components(components, weights):
  """Returns the weight of each component, by the document they begin with."""
  weights = weights or {0: {c.name: 1 for c in components}}
  return {
    start: [
      fractions.Fraction(str(c.weight)) * fractions.Fraction(str(some[c.name]))
      for c in components
    ]
    for start, some in weights.items()
  }


def _check_components(components, vocabulary):
  """Raises every error that can be found before a batch is made."""
  if not components:
    raise errors.ConfigError(
      "The mixture has no component with a weight and with examples."
    )
  for c in components:
    cache, source = c.cache, c.source
    if cache is None:
      continue
    if len(cache) != source.num_images:
      raise errors.DataError(
        f"The code cache {cache.directory} has {len(cache)} images, but"
        f" {source.name} has {source.num_images}: it was made from other data."
        " Run `lavit tokenize` for this data."
      )
    if cache.meta.num_codes != vocabulary.num_codes:
      raise errors.DataError(
        f"The code cache {cache.directory} has codes of a codebook of"
        f" {cache.meta.num_codes}, the vocabulary one of"
        f" {vocabulary.num_codes}. Run `lavit tokenize` with this tokenizer."
      )
  for name, values in (
    ("image_size", {c.source.image_size for c in components}),
    ("num_patches", {c.cache.num_patches for c in components if c.cache}),
  ):
    if len(values) > 1:
      raise errors.ConfigError(
        f"The sources of a mixture must agree on {name}, got {sorted(values)}."
      )
