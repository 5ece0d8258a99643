"""The pretrain stage."""

import flax.linen as nn
import jax
import numpy as np

from lavit_jax import vocabulary
from lavit_jax.train import objectives
from lavit_jax.train.objectives import pretrain
from tests import micro

_VOCAB = vocabulary.Vocabulary(text_size=20, num_codes=30)


def test_word_dropout_hides_its_share_of_visual_words_and_nothing_else():
  tokens = jax.random.randint(jax.random.key(0), (64, 128), 0, _VOCAB.size)
  out = pretrain.drop_words(_VOCAB, tokens, 0.25, jax.random.key(1))
  visual = _VOCAB.is_code(tokens)
  np.testing.assert_array_equal(out[~visual], tokens[~visual])
  assert _VOCAB.is_code(out[visual]).all()
  changed = (out != tokens)[visual].mean()
  # One in num_codes random words is the word that was there.
  expected = 0.25 * (1 - 1 / _VOCAB.num_codes)
  np.testing.assert_allclose(changed, expected, atol=0.02)
  assert len(np.unique(out[(out != tokens)])) == _VOCAB.num_codes
  same = pretrain.drop_words(_VOCAB, tokens, 0.0, jax.random.key(1))
  np.testing.assert_array_equal(same, tokens)


def test_word_dropout_changes_the_training_loss_but_not_the_held_out_one(
  micro_runs,
):
  losses = {}
  for share in (0.0, 0.9):
    objective = objectives.build(
      micro.config("pretrain", micro_runs, phases__train__word_dropout=share)
    )
    boxed, extra = objective.init(jax.random.key(0))
    params = nn.meta.unbox(boxed)
    batch = next(objective.batches(0))
    loss, _ = objective.loss(
      objective.last_phase,
      params,
      objective.frozen,
      extra,
      batch,
      jax.random.key(1),
    )
    held_out = objective.held_out_metrics(
      params, objective.frozen, extra, batch
    )
    losses[share] = float(loss), float(held_out["loss"])
  assert losses[0.0][0] == losses[0.0][1] == losses[0.9][1]
  assert abs(losses[0.9][0] - losses[0.0][0]) > 1e-4
