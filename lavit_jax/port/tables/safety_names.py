"""Name table of Stable Diffusion's safety checker.

The paths lead into the params of `safety.SafetyChecker`. Official names are of
one of two generations.
"""

from collections.abc import Iterable

from lavit_jax.port.tables import rows

# Prefixes of the vision tower. Transformers up to 4 wrote the first one, for
# example the file of Stable Diffusion 1.5.
GENERATIONS = ("vision_model.vision_model.", "vision_model.")


def generation(tensor_names: Iterable[str]) -> str:
  """Returns the entry of GENERATIONS that these names belong to."""
  old = any(name.startswith(GENERATIONS[0]) for name in tensor_names)
  return GENERATIONS[0] if old else GENERATIONS[1]


def table(tower: str = GENERATIONS[0]) -> rows.Table:
  """Returns the table.

  Args:
    tower: prefix of the vision tower, of GENERATIONS.
  """
  layer = tower + "encoder.layers.{i}."
  return (
    rows.Row(tower + "embeddings.class_embedding", "class_embedding"),
    rows.Row(
      tower + "embeddings.patch_embedding.weight", "patch_embed/kernel", "patch"
    ),
    rows.Row(tower + "embeddings.position_embedding.weight", "pos_embed"),
    *rows.norm(tower + "pre_layrnorm", "pre_norm"),
    *rows.layer(layer + "self_attn.q_proj", "blocks/self_attn/query"),
    *rows.layer(layer + "self_attn.k_proj", "blocks/self_attn/key"),
    *rows.layer(layer + "self_attn.v_proj", "blocks/self_attn/value"),
    *rows.layer(layer + "self_attn.out_proj", "blocks/self_attn/proj"),
    *rows.norm(layer + "layer_norm1", "blocks/layer_norm1"),
    *rows.layer(layer + "mlp.fc1", "blocks/fc1"),
    *rows.layer(layer + "mlp.fc2", "blocks/fc2"),
    *rows.norm(layer + "layer_norm2", "blocks/layer_norm2"),
    *rows.norm(tower + "post_layernorm", "post_norm"),
    rows.Row("visual_projection.weight", "projection/kernel", "linear"),
    *(
      rows.Row(name, name)
      for name in (
        "concept_embeds",
        "special_care_embeds",
        "concept_embeds_weights",
        "special_care_embeds_weights",
      )
    ),
  )
