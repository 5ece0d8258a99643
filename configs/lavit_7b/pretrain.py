r"""Unified pretraining: Llama-2-7B learns to read and write images.

launch/tpu_pod.sh --name pretrain --zone us-west4-a --type v5litepod-256 \
  --config configs/lavit_7b/pretrain.py --workdir /mnt/shared/pretrain -- \
  --config.model_dir=/mnt/shared/lavit_7b \
  --config.start_from=/mnt/shared/llama2 \
  --config.data.path=/mnt/shared/documents.jsonl \
  --config.data.cache_dir=/mnt/shared/codes/train \
  --config.data.held_out_cache_dir=/mnt/shared/codes/held_out

On one machine of N chips, with the fields above and --config.mesh.fsdp=N:
lavit train --config configs/lavit_7b/pretrain.py --workdir DIR

Paper, section 3.2: one loss over words and images; learning rates 1e-5 for
the LLM and 1e-4 for the visual part, text : image-text = 2 : 1 in documents
(its authors' answers to users). Length of rows, batch and steps are ours.
`model_dir` has encoder, tokenizer and tokenizer.model; `start_from` has the
LLM, made of a LLaMA folder by `lavit port import`; caches are `lavit tokenize`.

Rows of 2048 tokens read at most 4 images; for captions alone, without text,
12 are better (--config.data.slots=12). Products of every layer are kept for
the backward pass (remat "dots"): 2.7 MB a token. With less memory than 16 GB a
chip, or fewer chips, take remat "full" or "offload" (on v5e:16x16 4.4 GB a chip
in place of 8.8, and 5.0 GB of the host's, by libtpu 0.0.52), or factored
moments. With fewer chips `accumulate` runs the batch in parts, each at least a
row a chip: on 64, --config.mesh.fsdp=64 --config.accumulate=4. On 256 it has
nothing to cut.
More rows a chip make better use of it (docs/compile.md): on v5e:16x16
--config.batch_size=512 with --config.model.llm.remat=most and
--config.optimizer.moments=bfloat16; twice to four times the rows on v5p, v6e
and TPU7x as they are.
--config.model.llm.matmul=int8 multiplies most of the LLM in int8, at twice the
peak of these chips, and sends its weights as int8
(lavit_jax/models/low_precision.py).
"""

import dataclasses

from lavit_jax.configs.lavit_7b import common

from lavit_jax.models import llama


def get_config():
  """Rows of 2048 tokens, one a chip on 256 chips."""
  cfg = common.get_config("pretrain")
  cfg.batch_size = 256
  cfg.mesh.fsdp = 128
  llm = dataclasses.asdict(llama.LLAMA2_7B) | {"remat": "dots"}
  del llm["vocab_size"]  # that of model_dir's tokenizer
  cfg.model = dict(
    frozen_dtype="bfloat16",  # in which the encoder's weights are kept
    compute=dict(  # of what is read from model_dir: see frozen/precision.py
      encoder=dict(dtype="bfloat16", remat="none", unroll=1),
      merger=dict(dtype="bfloat16", remat="full", unroll=1),  # it trains
    ),
    llm=llm,
    lora=dict(rank=0, alpha=0.0),  # see finetune.py
  )
  cfg.data.cache_dir = "data/codes/train"
  cfg.data.held_out_cache_dir = "data/codes/held_out"
  cfg.data.length = 2048
  cfg.data.slots = 4  # images read a row
  cfg.data.window = 8192  # documents packed together
  cfg.data.mixture = dict(
    image_text=1.0, text_image=1.0, vqa=0.0, edit=0.0, document=0.0, text=4.0
  )
  # Several sources in place of one, {name: fields of data, and weight}: see
  # docs/data.md. Weights are shares of the documents, or of the "tokens", and
  # may change: {"2000000": {"web": 0.5}} from that document on.
  cfg.data.sources = dict()
  cfg.data.weight_by = "documents"
  cfg.data.reweighted = dict()
  cfg.optimizer.b2 = 0.95
  cfg.optimizer.weight_decay = 0.1
  cfg.optimizer.moments = "float32"  # or "bfloat16", "factored"
  cfg.optimizer.groups = dict(llm=1.0, visual=10.0)
  cfg.schedule = ("train",)
  cfg.phases = dict(
    train=dict(
      steps=100_000,
      lr=1e-5,
      warmup=2000,
      word_dropout=0.0,  # share of written visual words hidden from the LLM
      train={"llm": "llm", "merger": "visual", "projection": "visual"},
    )
  )
  return cfg
