import dataclasses
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from lavit_jax.configs.tiny import pretrain

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import examples, sequences
from lavit_jax.data.batching import packing, pieces, pipeline
from lavit_jax.data.sources import shapes
from tests.data import fakes

_WORDS = fakes.Words()
_VOCABULARY = vocabulary.Vocabulary(_WORDS.size, fakes.CODES)
_SENTENCE = "a b c d e f g h"


def _documents(seed, count=30):
  """Random documents of random parts; some empty, some with no weight."""
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(count):
    parts = []
    for _ in range(rng.integers(0, 5)):
      weight = float(rng.integers(0, 2))
      if rng.random() < 0.5:
        words = " ".join(_SENTENCE.split()[: rng.integers(1, 8)])
        parts.append(examples.TextPart(words, weight))
      else:
        image, write = int(rng.integers(0, 20)), bool(rng.integers(0, 2))
        parts.append(examples.ImagePart(image, write, weight))
    out.append(tuple(parts))
  return out


def _long(count):
  return (examples.TextPart(" ".join(f"word{i}" for i in range(count))),)


def _cache(seed=0):
  return fakes.Cache(np.random.default_rng(seed).integers(1, 6, 20))


def _packed(source, cache, **changes):
  settings = dict(
    mixture={task: 1 for task in source.tasks()},
    length=32,
    slots=2,
    batch_size=4,
    seed=7,
    window=16,
    limit_share=1.0,
  )
  return pipeline.packed_rows(
    source, cache, _WORDS, _VOCABULARY, **(settings | changes)
  )


def _usable(source, cache, task, length, slots):
  """The Sequences of every example that can be used."""
  out = []
  for i in range(source.num_examples(task)):
    example = source.example(task, i)
    try:
      spans = sequences.spans(example, cache, _WORDS)
      made, _ = pieces.divide(spans, task, (length, slots))
    except sequences.Unusable:
      continue
    out += [sequences.assemble(p, cache, _VOCABULARY) for p in made]
  return out


def _split(batch, row):
  """The documents of one packed row as tuples that can be compared."""
  out = []
  for segment in range(1, batch["segments"][row].max() + 1):
    at = batch["segments"][row] == segment
    slot = batch["image_index"][row][at]
    images = [tuple(batch["pixels"][row, s, 0, 0]) for s in slot if s >= 0]
    keeps = [batch["keep"][row, s].sum() for s in slot if s >= 0]
    fields = ("tokens", "targets", "weights", "token_index", "positions")
    values = tuple(tuple(batch[f][row][at].tolist()) for f in fields)
    out.append((*values, tuple(images), tuple(keeps)))
  return out


def _expected(sequence, cache):
  at = [sequence.images[s] for s in sequence.image_index if s >= 0]
  fields = ("tokens", "targets", "weights", "token_index")
  values = tuple(tuple(getattr(sequence, f).tolist()) for f in fields)
  positions = tuple(range(len(sequence)))
  images = tuple((i, i, i) for i in at)
  return (*values, positions, images, tuple(cache.counts[i] for i in at))


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 10_000))
def test_packed_rows_hold_each_document_exactly_and_nothing_else(seed):
  documents = [*_documents(seed, 28), _long(50), _long(99)]
  source, cache = fakes.Source({"document": documents}), _cache(seed)
  usable = _usable(source, cache, "document", 32, 2)
  hypothesis.assume(usable)
  batches = _packed(source, cache, window=30)  # a window is an epoch
  found, k = [], 0
  while len(found) < 2 * len(usable):
    batch = batches[k]
    k += 1
    for row in range(4):
      found += _split(batch, row)
  expected = sorted(_expected(s, cache) for s in usable)
  assert sorted(found[: len(usable)]) == expected
  assert sorted(found[len(usable) : 2 * len(usable)]) == expected


def test_padding_has_no_segment_no_weight_and_no_image():
  source, cache = fakes.Source({"document": _documents(1)}), _cache()
  batch = _packed(source, cache)[0]
  padding = batch["segments"] == 0
  assert padding.any()
  assert not batch["weights"][padding].any()
  assert (batch["image_index"][padding] == -1).all()
  unused = np.arange(2) > batch["image_index"].max(axis=1, keepdims=True)
  assert not batch["keep"][unused].any()


def test_targets_stay_inside_their_segment():
  source, cache = fakes.Source({"document": _documents(2)}), _cache()
  for k in range(4):
    batch = _packed(source, cache)[k]
    segments = batch["segments"]
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    np.testing.assert_array_equal(
      batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside]
    )
    first = segments[:, 1:][~inside] > 0
    assert not batch["positions"][:, 1:][~inside][first].any()


def _mixed():
  texts = [*_documents(4), _long(75), _long(200)]
  source = fakes.Source({"document": _documents(3), "text": texts})
  return _packed(source, _cache(), mixture={"document": 2, "text": 1})


def _assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_restart_from_batch_k_continues_with_the_same_batches(threads):
  through = pipeline.iterate(_mixed(), num_threads=threads)
  batches = [next(through) for _ in range(9)]
  assert through.next_batch == 9
  again = pipeline.iterate(_mixed(), start_batch=5, num_threads=threads)
  for k in range(5, 9):
    _assert_same(next(again), batches[k])
  assert again.next_batch == 9


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_rows(count):
  whole, batches = _mixed(), _mixed()
  parts = [
    pipeline.iterate(batches, num_threads=0, rows=share)
    for share in np.split(np.arange(batches.batch_size), count)
  ]
  for k in range(3):
    shares = [next(part) for part in parts]
    joined = {
      name: np.concatenate([s[name] for s in shares]) for name in shares[0]
    }
    _assert_same(joined, whole[k])


def test_rows_of_a_process_need_not_be_adjacent():
  """Devices of a process need not hold neighbours."""
  part = pipeline.iterate(_mixed(), num_threads=0, rows=[0, 3])
  whole = _mixed()[0]
  _assert_same(next(part), {name: x[[0, 3]] for name, x in whole.items()})


def test_batches_without_rows_are_refused():
  batches = dataclasses.replace(_mixed(), batch_size=0)
  with pytest.raises(errors.ConfigError, match="batch_size=0"):
    pipeline.iterate(batches)


def test_rows_are_numbered_and_hashed():
  batches = _mixed()
  rows = np.concatenate([batches[k]["row"] for k in range(5)])
  np.testing.assert_array_equal(rows, np.arange(20))
  assert len({int(h) for k in range(5) for h in batches[k]["doc_hash"]}) == 20


def test_another_seed_gives_other_rows():
  source, cache = fakes.Source({"document": _documents(3)}), _cache()
  first, second = (_packed(source, cache, seed=s)[0] for s in (1, 2))
  assert (first["tokens"] != second["tokens"]).any()


def _read_images(count):
  parts = [
    (examples.ImagePart(i, write=False), examples.TextPart("a b"))
    for i in range(count)
  ]
  return fakes.Source({"image_text": parts}), fakes.Cache([3] * 20)


def test_a_bad_image_takes_its_weights_and_shifts_nothing():
  source, cache = _read_images(10)
  whole = [_packed(source, cache)[k] for k in range(5)]
  source.bad = (4,)
  batches = _packed(source, cache)
  for k in range(5):
    hit = (whole[k]["pixels"][..., 0, 0, 0] == 4) & whole[k]["keep"].any(-1)
    batch = batches[k]
    bad = np.zeros_like(batch["weights"], bool)
    for row, slot in zip(*np.nonzero(hit), strict=True):
      segment = batch["segments"][row][batch["image_index"][row] == slot][0]
      bad[row] |= batch["segments"][row] == segment
      assert not batch["pixels"][row, slot].any()
    np.testing.assert_array_equal(
      batch["weights"], np.where(bad, 0, whole[k]["weights"])
    )
    for name in set(batch) - {"weights", "pixels"}:
      np.testing.assert_array_equal(batch[name], whole[k][name])
  assert list(batches.faults[1].names) == ["image4"]


def test_documents_that_do_not_fit_are_logged_and_are_not_bad():
  long = (examples.TextPart(" ".join(["a"] * 40)),)
  many = (
    *(examples.ImagePart(i, write=False, weight=0.0) for i in range(3)),
    examples.TextPart("a"),
  )
  lost = (examples.ImagePart(5, write=False), examples.TextPart("a"))
  good = (examples.TextPart("a b"),)
  cache = fakes.Cache([2] * 5 + [-1] * 15)
  source = fakes.Source({"document": [long, many, lost, good]})
  batches = _packed(source, cache)
  assert (batches[0]["segments"].max(axis=1) > 0).all()
  bad, _, long = batches.faults
  assert set(bad.reasons) == {"document/2"}
  assert "could not be tokenised" in bad.reasons["document/2"]
  assert "40 positions, more than length=32" in long.reasons["document/0"]
  assert "split into 2" in long.reasons["document/0"]
  assert "3 images read, more than slots=2" in long.reasons["document/1"]
  assert "left out" in long.reasons["document/1"]


def test_all_of_a_long_text_is_learnt_and_none_is_bad():
  """Bad documents may be none at all, long ones are half of all."""
  texts = [_long(40 + i) if i % 2 else _long(5) for i in range(20)]
  source = fakes.Source({"text": texts})
  batches = _packed(source, None, window=20, limit_share=0.0)
  learnt, k = 0, 0
  wanted = sum(len(t[0].text.split()) for t in texts)  # all but the first, </s>
  while learnt < 15 * wanted:  # 300 documents, more than a share is judged by
    learnt += int((batches[k]["weights"] > 0).sum())
    k += 1
  assert batches.faults[2].seen > 100
  assert batches.faults[0].bad == 0


def test_rows_of_documents_that_fit_never_change():
  """A crc of every array, taken before documents were ever divided.

  Two arrays had other names then, by which the order of the crc goes.
  """
  former = {"image_index": "slot", "token_index": "order"}
  rng, documents = np.random.default_rng(3), []
  for _ in range(40):
    n, index = int(rng.integers(1, 20)), int(rng.integers(20))
    text = examples.TextPart(" ".join(["a", "b", "c"] * 7)[: 2 * n])
    image = examples.ImagePart(index, write=n % 2 == 0)
    documents.append((text,) if n % 3 else (image, text))
  source = fakes.Source({"document": documents})
  batches, check = _packed(source, _cache()), 0
  for k in range(6):
    batch = batches[k]
    for name in sorted(batch, key=lambda name: former.get(name, name)):
      array = batch[name]
      check = zlib.crc32(np.ascontiguousarray(array).tobytes(), check)
  assert check == 1672582019


def test_too_many_bad_documents_stop_the_run():
  bad = (examples.TextPart("a b", 0.0),)
  source = fakes.Source({"document": [bad, (examples.TextPart("a b"),)]})
  batches = _packed(source, _cache(), window=256, limit_share=0.2)
  with pytest.raises(errors.DataError, match="documents are unusable"):
    batches.rows[0]


def test_too_many_bad_images_stop_the_run_from_a_thread_too():
  source, cache = _read_images(20)
  source.bad = range(20)
  batches = _packed(source, cache, limit_share=0.1)
  with pytest.raises(errors.DataError, match="images are unusable"):
    for _ in pipeline.iterate(batches, num_threads=2):
      pass


def test_fill_of_a_mixture_like_the_embedded_one_is_95_percent():
  rng = np.random.default_rng(0)
  words = lambda: " ".join(["w"] * rng.integers(5, 40))
  read = lambda: examples.ImagePart(int(rng.integers(200)), False)
  write = lambda: examples.ImagePart(int(rng.integers(200)), True)
  text = lambda: examples.TextPart(words())
  source = fakes.Source(
    {
      "image_text": [(read(), text()) for _ in range(300)],
      "text_image": [(text(), write()) for _ in range(300)],
      "edit": [(read(), text(), write()) for _ in range(300)],
      "document": [(text(), read(), text(), read()) for _ in range(300)],
      "text": [(text(),) for _ in range(300)],
    },
    num_images=200,
  )
  cache = fakes.Cache(rng.integers(6, 10, 200))
  batches = _packed(
    source, cache, length=192, slots=8, window=512, batch_size=64
  )
  fill = np.mean([(batches[k]["segments"] > 0).mean() for k in range(4)])
  assert fill >= 0.95


def test_a_cache_of_other_data_is_refused():
  source = fakes.Source({"document": _documents(1)})
  with pytest.raises(errors.DataError, match=r"3 images.*has 20"):
    _packed(source, fakes.Cache([1, 1, 1]))


def test_a_cache_of_another_codebook_is_refused():
  cache = _cache()
  cache.meta = dataclasses.replace(cache.meta, num_codes=64)
  with pytest.raises(errors.DataError, match="codebook of 64"):
    _packed(fakes.Source({"document": _documents(1)}), cache)


def test_images_without_a_cache_point_at_lavit_tokenize():
  source, _ = _read_images(5)
  with pytest.raises(errors.DataError, match="lavit tokenize"):
    _packed(source, None).rows[0]


def test_text_needs_no_cache():
  source = fakes.Source({"text": [(examples.TextPart("a b"),)]})
  assert _packed(source, None)[0]["weights"].sum() > 0


def test_a_mixture_of_only_absent_tasks_is_refused():
  source = fakes.Source({"text": [(examples.TextPart("a b"),)]})
  with pytest.raises(errors.ConfigError, match=r"\['vqa'\].*\['text'\]"):
    _packed(source, None, mixture={"vqa": 1})


def test_sources_of_two_image_sizes_are_refused():
  other = fakes.Source({"text": [(examples.TextPart("a b"),)]})
  other.image_size = 8
  one = fakes.Source({"text": [(examples.TextPart("a b"),)]})
  parts = [packing.Component(s, "text") for s in (one, other)]
  with pytest.raises(errors.ConfigError, match=r"image_size.*\[4, 8\]"):
    pipeline.packed_mixture(
      parts, _WORDS, _VOCABULARY, length=32, slots=1, batch_size=2
    )


def test_two_sources_mix_in_exact_proportions():
  parts = [
    packing.Component(
      fakes.Source({"text": [(examples.TextPart(word),)]}), "text", weight
    )
    for word, weight in (("x", 3), ("y", 1))
  ]
  batches = pipeline.packed_mixture(
    parts, _WORDS, _VOCABULARY, length=2, slots=1, batch_size=16, window=16
  )
  x = _WORDS.encode("x")[0]
  for k in range(3):
    firsts = batches[k]["tokens"][batches[k]["segments"] > 0]
    assert ((firsts == x).sum(), len(firsts)) == (12 * 2, 16 * 2)


def test_fill_of_the_embedded_mixture_is_95_percent(tmp_path):
  config = pretrain.get_config().data
  source = shapes.ShapesSource("train", size=300, image_size=32, seed=0)
  lines = [source.sentences(i) for i in range(300)]
  lines += [source.captions(i)[0] for i in range(300)]
  proto = vocabulary.TextTokenizer.train(lines, tmp_path / "t.model", 400)
  kept = np.random.default_rng(0).integers(4, 21, source.num_images)
  cache = fakes.Cache(kept.clip(max=fakes.PATCHES))
  batches = pipeline.packed_rows(
    source,
    cache,
    proto,
    vocabulary.Vocabulary(proto.size, fakes.CODES),
    mixture=config.mixture.to_dict(),
    length=config.length,
    slots=config.slots,
    window=config.window,
    batch_size=64,
  )
  fill = np.mean([(batches[k]["segments"] > 0).mean() for k in range(3)])
  assert fill >= 0.95


def test_tasks_without_a_weight_are_warned_of(caplog):
  documents = _documents(0, 6)
  source = fakes.Source({"document": documents, "vqa": documents[:2]})
  _packed(source, _cache(0), mixture={"document": 1.0, "vqa": 0.0, "text": 1.0})
  assert "no weight: 2 vqa" in caplog.text
  caplog.clear()
  _packed(source, _cache(0), mixture={"document": 1.0, "vqa": 1.0})
  assert not caplog.text


def test_an_unknown_task_in_the_mixture_is_refused():
  source = fakes.Source({"document": _documents(0, 6)})
  with pytest.raises(
    errors.ConfigError, match=r"\['documents'\], which are no"
  ):
    _packed(source, _cache(0), mixture={"document": 1.0, "documents": 1.0})


class _Computed(fakes.Source):
  """A source whose examples are not stored, such as the scenes."""

  contents = None


@pytest.mark.parametrize("by_tokens", [False, True])
def test_computed_and_stored_examples_give_the_same_rows(by_tokens):
  texts = [_long(n) for n in (3, 40, 90, 5, 0, 17)] * 5
  documents = {"document": _documents(5), "text": texts}
  seen = []
  for kind in (fakes.Source, _Computed):
    packed = _packed(
      kind(documents),
      _cache(),
      mixture={"document": 1, "text": 0.7},
      by_tokens=by_tokens,
    )
    seen.append([packed[k] for k in range(6)])
    assert packed.faults[2].seen > 0
  for one, two in zip(*seen, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])


def test_shares_of_tokens_are_those_of_the_rows():
  """Of components whose documents differ in length, some too long for a row."""
  short = fakes.Source({"text": [_long(4)] * 50})
  long = fakes.Source({"text": [_long(19)] * 50})
  turns = lambda n: (
    examples.ImagePart(1, False, 0.0),
    examples.TextPart("word " * n),
  )
  some = [turns(10)] * 25 + [turns(90)] * 25  # these are left out
  captions = fakes.Source({"image_text": some})
  packed = pipeline.packed_mixture(
    [
      packing.Component(short, "text", name="a"),
      packing.Component(long, "text", name="b"),
      packing.Component(captions, "image_text", 1.0, _cache(), name="c"),
    ],
    _WORDS,
    _VOCABULARY,
    length=32,
    slots=2,
    batch_size=8,
    window=64,
    limit_share=1.0,
    weights={0: {"a": 1, "b": 1, "c": 2}},
    by_tokens=True,
  )
  tokens = dict.fromkeys("abc", 0)
  for k in range(12):
    batch = packed[k]
    for segments, index in zip(
      batch["segments"], batch["image_index"], strict=True
    ):
      for segment in range(1, segments.max() + 1):
        mine = segments == segment
        kind = "c" if (index[mine] >= 0).any() else "ab"[int(mine.sum()) > 9]
        tokens[kind] += int(mine.sum())
  total = sum(tokens.values())
  assert tokens["a"] / total == pytest.approx(0.25, abs=0.05)
  assert tokens["b"] / total == pytest.approx(0.25, abs=0.05)
  assert tokens["c"] / total == pytest.approx(0.5, abs=0.05)


def test_a_memo_of_other_lengths_is_not_used(tmp_path):
  """Even where the window that differs is not the one that is read."""
  cache = _cache()
  cache.directory = tmp_path
  texts = [_long(1 + i % 9) for i in range(2000)]
  make = lambda texts: _packed(
    fakes.Source({"text": texts}), cache, batch_size=1
  )
  make(texts).rows[300]
  assert list((tmp_path / "plans").iterdir())
  changed = list(texts)
  for g in range(1999):  # of all but the last documents
    changed[g] = _long(1 + (g + 3) % 9)
  cache.directory = tmp_path / "fresh"
  expected = make(changed)
  cache.directory = tmp_path
  found = make(changed)
  for row in (300, 310):
    np.testing.assert_array_equal(
      found.rows[row]["tokens"], expected.rows[row]["tokens"]
    )
