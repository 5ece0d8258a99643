"""What the runs at full size share: data, optimizer, logging."""

import dataclasses

import ml_collections
from ml_collections import config_dict

from lavit_jax.models.tokenizer import tokenizer


def get_config(stage: str) -> ml_collections.ConfigDict:
  """The fields every stage has; each file adds its own."""
  cfg = ml_collections.ConfigDict()
  cfg.stage = stage
  cfg.seed = 0
  cfg.steps = 0  # 0: as the phases say; else they are scaled to this total
  # Encoder, tokenizer and semantic decoders are read from here, and what is
  # trained is written to here.
  cfg.model_dir = "models/lavit_7b"
  cfg.start_from = config_dict.placeholder(str)  # has to be given
  cfg.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)  # -1: the rest
  cfg.data = dict(
    # Or another kind: see lavit_jax/data/sources/kinds.py.
    kind="jsonl",
    image_size=224,  # what the encoder sees
    seed=0,
    path="data/pictures.jsonl",
    held_out_path="",  # "": a tenth of path
    allow_absolute=False,  # images outside the folder of path
    limit_share=0.05,  # of bad lines, images or documents: more is an error
    filters=dict(),  # of images and texts: see data/records/filters.py
    name="",
    train_split="train",
    held_out_split="validation",
    data_dir="",
    image_feature="image",
    text_feature="caption",
    threads=16,  # of each process, that read images and make rows
    workers=0,  # processes that decode images; 0: the threads do
    decoding="exact",  # or "fast": see data/images/decoding.py
  )
  cfg.optimizer = dict(
    b1=0.9,
    b2=0.999,
    weight_decay=0.01,
    decay_embeddings=False,  # whether rows of look-up tables decay too
    decay_lora=False,  # and low-rank changes, towards the model they change
    clip_norm=1.0,
    groups=dict(base=1.0),
  )
  # What `lavit compile` goes by where model_dir and data are not there: the
  # official model's parts.
  cfg.assumed = dict(
    tokenizer=dataclasses.asdict(tokenizer.LAVIT_7B),
    text_size=32_000,
    capacity=192,  # the most words of an image in the data
  )
  cfg.compiler_options = {}  # of XLA, beside those of core/compiler_options.py
  cfg.accept = ""  # differences that are meant: see lavit_jax/core/agreement.py
  cfg.accumulate = 1  # parts in which a batch is run, one after the other
  cfg.nonfinite = dict(policy="skip", limit=20)  # see train/nonfinite.py
  cfg.log = dict(every=50, profile=())  # profile: first and last step to trace
  cfg.eval = dict(every=1000, batches=8)
  cfg.checkpoint = dict(every=1000, keep=2)
  return cfg
