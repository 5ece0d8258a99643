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


def test_the_tokenizers_fingerprint_is_that_in_earlier_caches(tmp_path):
  """Those hashed the trees that `load_part` gives, with JAX's paths."""
  _save(tmp_path, _tree(0), _tree(1, jnp.bfloat16))
  digest = hashlib.sha256()
  for name in ("encoder", "tokenizer"):
    params = checkpoints.load_part(tmp_path, name, dtype=None).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.asarray(leaf).tobytes())
  assert fingerprints.of_tokenizer(tmp_path) == digest.hexdigest()[:32]


def test_every_array_counts_and_a_rewritten_part_is_read_again(tmp_path):
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


def test_the_fingerprint_of_a_branch_is_that_of_its_arrays(tmp_path):
  checkpoints.save_part(tmp_path, "encoder", _tree(0), {})
  found = [fingerprints.of_part(tmp_path, "encoder", b) for b in ("", "a", "b")]
  assert len(set(found)) == 3
  tree = _tree(0) | {"b": np.float32(7)}
  checkpoints.save_part(tmp_path, "encoder", tree, {})
  assert fingerprints.of_part(tmp_path, "encoder", "a") == found[1]
  assert fingerprints.of_part(tmp_path, "encoder", "b") != found[2]


def test_the_fingerprint_of_a_branch_does_not_depend_on_its_path(tmp_path):
  """A tokenizer's own decoder becomes a part of its own."""
  checkpoints.save_part(tmp_path, "tokenizer", {"params": _tree(0)}, {})
  checkpoints.save_part(tmp_path, "lowres", _tree(0), {})
  own = fingerprints.of_part(tmp_path, "tokenizer", "params/a")
  assert own == fingerprints.of_part(tmp_path, "lowres", "a")


def test_a_missing_part_is_named(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no part 'encoder'"):
    fingerprints.of_part(tmp_path, "encoder")


def test_fingerprints_that_took_long_are_kept_between_processes(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(fingerprints, "_MIN_SECONDS", 0.0)
  model = tmp_path / "model"
  _save(model, _tree(0), _tree(1))
  first = fingerprints.of_tokenizer(model)
  read, stored = [], checkpoints.StoredPart

  def counted(directory, name):
    read.append(name)
    return stored(directory, name)

  monkeypatch.setattr(checkpoints, "StoredPart", counted)
  fingerprints._digested.cache_clear()  # as another process begins
  assert fingerprints.of_tokenizer(model) == first
  assert not read
  _save(model, _tree(0), _tree(2))
  assert fingerprints.of_tokenizer(model) != first
  assert read == ["encoder", "tokenizer"]
  # Weights that are exchanged under the same part.json.
  for path in (model / "tokenizer").glob("weights*/**/*"):
    path.touch()
  fingerprints.of_tokenizer(model)
  assert read.count("tokenizer") == 2
  # A file that was cut off is none.
  for path in (tmp_path / "cache").rglob("*"):
    if path.is_file():
      path.write_text("12")
  fingerprints._digested.cache_clear()
  assert len(fingerprints.of_tokenizer(model)) == 32
