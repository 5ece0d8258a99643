"""Unified pretraining: one LLM reads and writes words and images.

lavit tokenize --model runs/tiny/model --data shapes --out runs/tiny/codes
lavit train --config configs/tiny/pretrain.py --workdir runs/tiny/pretrain
"""

from lavit_jax.configs.tiny import common


def get_config():
  """About 1.2M parameters, rows of 128 tokens."""
  cfg = common.get_config("pretrain")
  cfg.batch_size = 24
  cfg.model = dict(
    llm=dict(
      width=128,
      depth=4,
      num_heads=4,
      num_kv_heads=4,
      mlp_dim=384,
      max_len=512,
      unroll=4,
      matmul="",  # or "int8", "fp8": see lavit_jax/models/low_precision.py
    ),
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="float32", remat="none", unroll=4),
      merger=dict(dtype="float32", remat="none", unroll=2),
    ),
  )
  cfg.start_from = ""  # a model directory with an LLM to go on from
  cfg.data.cache_dir = "runs/tiny/codes/train"
  cfg.data.held_out_cache_dir = "runs/tiny/codes/held_out"
  cfg.data.length = 128  # tokens a row: attention costs little, fill is 98 %
  cfg.data.slots = 3  # images read a row
  cfg.data.window = 512  # documents packed together
  cfg.data.mixture = dict(
    image_text=1.0, text_image=1.0, vqa=0.6, edit=0.7, document=0.2, text=0.3
  )
  # Several sources in place of one, {name: fields of data, and weight}: see
  # docs/data.md. Weights are shares of the documents, or of the "tokens", and
  # may change: {"2000000": {"web": 0.5}} from that document on.
  cfg.data.sources = dict()
  cfg.data.weight_by = "documents"
  cfg.data.reweighted = dict()
  cfg.optimizer.groups = dict(llm=1.0, visual=1.0)
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=800,
      lr=3e-3,
      warmup=50,
      word_dropout=0.0,  # share of written visual words hidden from the LLM
      train={"llm": "llm", "merger": "visual", "projection": "visual"},
    )
  )
  return cfg
