"""The safety checker against diffusers', and its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.pixels import safety
from lavit_jax.port.tables import names, safety_names

_CONFIG = safety.SafetyConfig(
  image_size=32,
  patch_size=8,
  width=32,
  depth=2,
  num_heads=4,
  mlp_dim=48,
  projection_dim=16,
)


_PIXELS = np.random.default_rng(0).normal(size=(48, 3, 32, 32))
_PIXELS = _PIXELS.astype(np.float32)


@pytest.fixture(scope="module")
def theirs():
  """diffusers' checker at these sizes, its concepts at random."""
  torch = pytest.importorskip("torch", reason="torch is a test extra")
  diffusers = pytest.importorskip(
    "diffusers.pipelines.stable_diffusion.safety_checker",
    reason="diffusers is a test extra",
  )
  import transformers

  tower = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
  }
  config = transformers.CLIPConfig(vision_config=tower, projection_dim=16)
  torch.manual_seed(0)
  model = diffusers.StableDiffusionSafetyChecker(config).eval()
  with torch.no_grad():
    for _, value in model.named_parameters():
      value += 0.3 * torch.randn(value.shape)
    seen = model.vision_model(torch.tensor(_PIXELS))[1]
    seen = torch.nn.functional.normalize(model.visual_projection(seen))
    # Thresholds that some of the images are above, and some are not.
    for name, share in (("concept", 0.96), ("special_care", 0.8)):
      vectors = getattr(model, f"{name}_embeds")
      scores = seen @ torch.nn.functional.normalize(vectors).T
      limits = torch.quantile(scores, share, dim=0)
      getattr(model, f"{name}_embeds_weights").copy_(limits)
  return model


@pytest.fixture(scope="module")
def params(theirs):
  """Theirs by the table."""
  found = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
  return names.to_flax(
    safety_names.table(safety_names.generation(found)), found
  )


def test_the_same_images_are_withheld_as_by_diffusers(theirs, params):
  import torch

  _, flags = theirs(
    clip_input=torch.tensor(_PIXELS), images=np.ones((48, 4, 4, 3))
  )
  net = safety.SafetyChecker(_CONFIG)
  scores = net.apply({"params": params}, _PIXELS.transpose(0, 2, 3, 1))
  ours = safety.withheld(*scores)
  assert 5 < sum(flags) < 43  # both kinds come up
  np.testing.assert_array_equal(ours, flags)


def test_every_parameter_has_an_entry_in_the_table(params):
  net = safety.SafetyChecker(_CONFIG)
  abstract = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )["params"]
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  import flax.linen as nn

  assert shapes(nn.meta.unbox(abstract)) == shapes(params)


def test_a_special_concept_makes_the_others_stricter():
  concepts = jnp.array([[-0.006], [-0.006], [0.0004], [0.0006]])
  special = jnp.array([[0.1], [-0.1], [-1.0], [-1.0]])
  np.testing.assert_array_equal(
    safety.withheld(concepts, special), [True, False, False, True]
  )
