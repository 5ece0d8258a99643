"""Fingerprints of weights and files."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints, fingerprints


def _tree(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.asarray(rng.normal(size=shape), dtype)
  return {"a": {"kernel": draw(4, 3), "bias": draw(3)}, "b": draw()}


def _save(directory, encoder, tokenizer):
  checkpoints.save_part(directory, "encoder", encoder, {})
  checkpoints.save_part(directory, "tokenizer", tokenizer, {})


def test_words_are_known_as_caches_of_earlier_versions_know_them(tmp_path):
  """Those hashed the trees that `load_part` gives, with JAX's paths."""
  _save(tmp_path, _tree(0), _tree(1, jnp.bfloat16))
  digest = hashlib.sha256()
  for name in ("encoder", "tokenizer"):
    params = checkpoints.load_part(tmp_path, name, dtype=None).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.asarray(leaf).tobytes())
  assert fingerprints.of_words(tmp_path) == digest.hexdigest()[:32]


def test_every_array_counts_and_a_part_written_anew_is_read_anew(tmp_path):
  seen = set()
  for place in (None, ("a", "kernel"), ("a", "bias"), ("b",)):
    tree = _tree(0)
    if place:
      node = tree
      for key in place[:-1]:
        node = node[key]
      node[place[-1]] = node[place[-1]] + np.float32(1e-3)
    checkpoints.save_part(tmp_path, "encoder", tree, {})
    seen |= {fingerprints.of_part(tmp_path, "encoder")}
  assert len(seen) == 4
  checkpoints.save_part(tmp_path, "encoder", _tree(0), {"step": 3})
  assert fingerprints.of_part(tmp_path, "encoder") in seen


def test_a_branch_is_known_by_its_own_arrays(tmp_path):
  checkpoints.save_part(tmp_path, "encoder", _tree(0), {})
  found = [fingerprints.of_part(tmp_path, "encoder", b) for b in ("", "a", "b")]
  assert len(set(found)) == 3
  tree = _tree(0) | {"b": np.float32(7)}
  checkpoints.save_part(tmp_path, "encoder", tree, {})
  assert fingerprints.of_part(tmp_path, "encoder", "a") == found[1]
  assert fingerprints.of_part(tmp_path, "encoder", "b") != found[2]


def test_a_branch_is_the_same_wherever_it_is_kept(tmp_path):
  """A tokenizer's own decoder becomes a part of its own."""
  checkpoints.save_part(tmp_path, "tokenizer", {"params": _tree(0)}, {})
  checkpoints.save_part(tmp_path, "lowres", _tree(0), {})
  own = fingerprints.of_part(tmp_path, "tokenizer", "params/a")
  assert own == fingerprints.of_part(tmp_path, "lowres", "a")


def test_a_part_that_is_not_there_is_named(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no part 'encoder'"):
    fingerprints.of_part(tmp_path, "encoder")


def test_what_took_long_to_read_is_not_read_at_the_next_start(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(fingerprints, "_WORTH_KEEPING", 0.0)
  model = tmp_path / "model"
  _save(model, _tree(0), _tree(1))
  first = fingerprints.of_words(model)
  read, stored = [], checkpoints.StoredPart

  def counted(directory, name):
    read.append(name)
    return stored(directory, name)

  monkeypatch.setattr(checkpoints, "StoredPart", counted)
  fingerprints._digested.cache_clear()  # as another process begins
  assert fingerprints.of_words(model) == first
  assert not read
  _save(model, _tree(0), _tree(2))
  assert fingerprints.of_words(model) != first
  assert read == ["encoder", "tokenizer"]
  # Weights that are exchanged under the same part.json.
  for path in (model / "tokenizer").glob("weights*/**/*"):
    path.touch()
  fingerprints.of_words(model)
  assert read.count("tokenizer") == 2
  # A file that was cut off is none.
  for path in (tmp_path / "cache").rglob("*"):
    if path.is_file():
      path.write_text("12")
  fingerprints._digested.cache_clear()
  assert len(fingerprints.of_words(model)) == 32
