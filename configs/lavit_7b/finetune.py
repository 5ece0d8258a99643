r"""Fine-tuning on your own data with LoRA: one host of eight chips is enough.

launch/tpu_pod.sh --name finetune --zone us-west4-a --type v5litepod-8 \
  --config configs/lavit_7b/finetune.py --workdir /mnt/shared/finetune -- \
  --config.model_dir=/mnt/shared/finetuned \
  --config.start_from=/mnt/shared/lavit_7b \
  --config.data.path=/mnt/shared/mine.jsonl \
  --config.data.cache_dir=/mnt/shared/codes/train \
  --config.data.held_out_cache_dir=/mnt/shared/codes/held_out

On one machine: lavit train --config configs/lavit_7b/finetune.py --workdir DIR

The LLM is frozen in bfloat16, 13.5 GB over the devices of mesh.fsdp; 40 M
numbers of rank 16 change its matrices, and merger and projection train too.
What is written to `model_dir` is one LLM with the changes merged in, so it
exports as any other. `model_dir` has encoder, tokenizer and tokenizer.model,
`start_from` is the official model as imported. Rank, rates and steps are ours.
"""

import dataclasses

from lavit_jax.configs.lavit_7b import common

from lavit_jax.models import llama


def get_config():
  """Rows of 1024 tokens, two a device."""
  cfg = common.get_config("pretrain")
  cfg.batch_size = 16
  cfg.mesh.fsdp = 8
  cfg.mesh.data = -1
  llm = dataclasses.asdict(llama.LLAMA2_7B) | {"remat": "full"}
  del llm["vocab_size"]  # that of model_dir's tokenizer
  cfg.model = dict(
    frozen_dtype="bfloat16",  # in which encoder and LLM are kept
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="bfloat16", remat="none", unroll=1),
      merger=dict(dtype="bfloat16", remat="full", unroll=1),  # it trains
    ),
    llm=llm,
    lora=dict(rank=16, alpha=32.0),
  )
  cfg.data.cache_dir = "data/codes/train"
  cfg.data.held_out_cache_dir = "data/codes/held_out"
  cfg.data.length = 1024
  cfg.data.slots = 6  # images read a row
  cfg.data.window = 1024  # documents packed together
  cfg.data.mixture = dict(
    image_text=1.0, text_image=0.0, vqa=1.0, edit=0.0, document=0.0, text=0.0
  )
  # Several sources in place of one, {name: fields of data, and weight}: see
  # docs/data.md. Weights are shares of the documents, or of the "tokens", and
  # may change: {"2000000": {"web": 0.5}} from that document on.
  cfg.data.sources = dict()
  cfg.data.weight_by = "documents"
  cfg.data.reweighted = dict()
  cfg.optimizer.weight_decay = 0.0
  cfg.optimizer.moments = "float32"
  cfg.optimizer.groups = dict(lora=1.0, visual=0.1)
  cfg.eval.every = cfg.checkpoint.every = 500
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=2_000,
      lr=2e-4,
      warmup=100,
      word_dropout=0.0,  # share of written visual words hidden from the LLM
      train={"lora": "lora", "merger": "visual", "projection": "visual"},
    )
  )
  return cfg
