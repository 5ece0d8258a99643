"""The table of `names.py` for Stable Diffusion's safety checker.

table   params of `safety.SafetyChecker`, under either generation of names
"""

from collections.abc import Iterable

from lavit_jax.port.tables import names

# What the names of the vision tower begin with: transformers up to 4 wrote the
# first kind, Stable Diffusion 1.5's own file among others.
GENERATIONS = ("vision_model.vision_model.", "vision_model.")


def _norm(official: str, ours: str) -> names.Table:
  return (
    names.Row(f"{official}.weight", f"{ours}/scale"),
    names.Row(f"{official}.bias", f"{ours}/bias"),
  )


def _dense(official: str, ours: str) -> names.Table:
  return (
    names.Row(f"{official}.weight", f"{ours}/kernel", "linear"),
    names.Row(f"{official}.bias", f"{ours}/bias"),
  )


def generation(found: Iterable[str]) -> str:
  """Of GENERATIONS, the one that these names are of."""
  old = any(name.startswith(GENERATIONS[0]) for name in found)
  return GENERATIONS[0] if old else GENERATIONS[1]


def table(tower: str = GENERATIONS[0]) -> names.Table:
  """The table, for a tower of one of GENERATIONS."""
  layer = tower + "encoder.layers.{i}."
  return (
    names.Row(tower + "embeddings.class_embedding", "class_embedding"),
    names.Row(
      tower + "embeddings.patch_embedding.weight", "patch_embed/kernel", "patch"
    ),
    names.Row(tower + "embeddings.position_embedding.weight", "pos_embed"),
    *_norm(tower + "pre_layrnorm", "pre_norm"),
    *(
      row
      for theirs, ours in (
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "proj"),
      )
      for row in _dense(
        f"{layer}self_attn.{theirs}", f"blocks/self_attn/{ours}"
      )
    ),
    *_norm(layer + "layer_norm1", "blocks/layer_norm1"),
    *_dense(layer + "mlp.fc1", "blocks/fc1"),
    *_dense(layer + "mlp.fc2", "blocks/fc2"),
    *_norm(layer + "layer_norm2", "blocks/layer_norm2"),
    *_norm(tower + "post_layernorm", "post_norm"),
    names.Row("visual_projection.weight", "projection/kernel", "linear"),
    *(
      names.Row(name, name)
      for name in (
        "concept_embeds",
        "special_care_embeds",
        "concept_embeds_weights",
        "special_care_embeds_weights",
      )
    ),
  )
