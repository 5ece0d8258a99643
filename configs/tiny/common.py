"""What the tiny runs share: data, optimizer, logging."""

import ml_collections


def get_config(stage: str) -> ml_collections.ConfigDict:
  """The fields every stage has; each file adds its own."""
  cfg = ml_collections.ConfigDict()
  cfg.stage = stage
  cfg.seed = 0
  cfg.steps = 0  # 0: as the phases say; else they are scaled to this total
  cfg.model_dir = "runs/tiny/model"  # parts are read from and written to here
  cfg.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)  # -1: the rest
  cfg.data = dict(
    # Or "jsonl", "webdataset", "tfds": see lavit_jax/data/sources/kinds.py.
    kind="shapes",
    image_size=48,
    seed=0,
    train_size=20_000,
    held_out_size=1_000,
    path="",
    held_out_path="",
    allow_absolute=False,  # images outside the folder of path
    limit_share=0.05,  # of bad lines, images or documents: more is an error
    filters=dict(),  # of images and texts: see data/records/filters.py
    name="",
    train_split="train",
    held_out_split="test",
    data_dir="",
    image_feature="image",
    text_feature="caption",
    text_vocab=512,
    text_length=48,
    threads=2,  # of each process, that read images and make rows
    workers=0,  # processes that decode images; 0: the threads do
    decoding="exact",  # or "fast": see data/images/decoding.py
  )
  cfg.optimizer = dict(
    b1=0.9,
    b2=0.98,
    weight_decay=0.02,
    decay_embeddings=False,  # whether rows of look-up tables decay too
    decay_lora=False,  # and low-rank changes, towards the model they change
    clip_norm=1.0,
    groups=dict(base=1.0),
  )
  cfg.accept = ""  # differences that are meant: see lavit_jax/core/agreement.py
  cfg.accumulate = 1  # parts in which a batch is run, one after the other
  cfg.nonfinite = dict(policy="stop", limit=0)  # see train/nonfinite.py
  cfg.log = dict(every=50, profile=())  # profile: first and last step to trace
  cfg.eval = dict(every=500, batches=8)
  cfg.checkpoint = dict(every=500, keep=2)
  return cfg
