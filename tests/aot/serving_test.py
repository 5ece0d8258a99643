"""Model FLOPs of the programs of inference."""

import jax
import pytest
from flax import traverse_util

from lavit_jax.aot import serving
from lavit_jax.core import errors, sharding
from lavit_jax.train.objectives.frozen import abstract_params
from tests import outlines

_CACHE = 2048  # positions before the next token


def _lower(what, objective):
  axes = dict.fromkeys(sharding.MESH_AXES, 1)
  mesh = sharding.make_mesh(axes, jax.devices()[:1])
  return serving.lower(what, objective, mesh)


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_the_llm_costs_two_flops_a_parameter_and_token(what):
  objective = outlines.objective("tiny.pretrain")
  config, rows = objective.llama_config, objective.config.batch_size
  _, flops = _lower(what, objective)
  flat = traverse_util.flatten_dict(
    sharding.unbox(abstract_params.llm(config)["layers"])
  )
  kernels = sum(x.size for path, x in flat.items() if path[-1] == "kernel")
  length = _CACHE if what == "prefill" else 1
  # A token of a prompt sees those before it, the next one the whole cache.
  keys = (_CACHE + 1) / 2 if what == "prefill" else _CACHE + 1
  pairs = 4 * config.width * config.depth * keys
  assert list(flops) == ["llm", "head"]
  assert flops["llm"] == pytest.approx(rows * length * (2 * kernels + pairs))
  head = 2 * rows * config.width * config.vocab_size  # of the last token
  assert flops["head"] == pytest.approx(head)


def test_a_step_of_the_unet_counts_both_streams_of_guidance():
  objective = outlines.objective("tiny.latents")
  _, flops = _lower("unet", objective)
  # By a formula from the config: 48 latents of 6 x 6.
  assert flops == {"unet": pytest.approx(11564384256)}


def test_a_program_of_another_stage_is_a_usage_error():
  objective = outlines.objective("tiny.pretrain")
  with pytest.raises(errors.UsageError, match="unet is not of stage 'pretra"):
    _lower("unet", objective)
