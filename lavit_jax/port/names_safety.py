"""The table of `names.py` for Stable Diffusion's safety checker.

SAFETY   params of `safety.SafetyChecker`
"""

from lavit_jax.port import names

_TOWER = "vision_model.vision_model."
_LAYER = _TOWER + "encoder.layers.{i}."


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


SAFETY: names.Table = (
  names.Row(_TOWER + "embeddings.class_embedding", "class_embedding"),
  names.Row(
    _TOWER + "embeddings.patch_embedding.weight", "patch_embed/kernel", "patch"
  ),
  names.Row(_TOWER + "embeddings.position_embedding.weight", "pos_embed"),
  *_norm(_TOWER + "pre_layrnorm", "pre_norm"),
  *(
    row
    for theirs, ours in (
      ("q_proj", "query"),
      ("k_proj", "key"),
      ("v_proj", "value"),
      ("out_proj", "proj"),
    )
    for row in _dense(f"{_LAYER}self_attn.{theirs}", f"blocks/self_attn/{ours}")
  ),
  *_norm(_LAYER + "layer_norm1", "blocks/layer_norm1"),
  *_dense(_LAYER + "mlp.fc1", "blocks/fc1"),
  *_dense(_LAYER + "mlp.fc2", "blocks/fc2"),
  *_norm(_LAYER + "layer_norm2", "blocks/layer_norm2"),
  *_norm(_TOWER + "post_layernorm", "post_norm"),
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
