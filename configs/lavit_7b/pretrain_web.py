r"""Unified pretraining on data of the web: tar archives as they are, and text.

launch/tpu_pod.sh --name web --zone us-west4-a --type v5litepod-256 \
  --config configs/lavit_7b/pretrain_web.py --workdir gs://bucket/web -- \
  --config.model_dir=gs://bucket/lavit_7b \
  --config.start_from=/mnt/shared/llama2 \
  --config.data.sources.cc3m.path='/mnt/shared/cc3m/{00000..00331}.tar'

On one machine of N chips, with the fields above and --config.mesh.fsdp=N:
lavit train --config configs/lavit_7b/pretrain_web.py --workdir DIR

As configs/lavit_7b/pretrain.py, but for the data, which the paper names
(section 4.1): CC3M, CC12M and SBU are learnt from image to text, LAION from
text to image, each half of the pairs; and text alone, two documents for each
pair. The archives are those of img2dataset; each source has a code cache, made
by `lavit tokenize --data 'cc3m/{00000..00331}.tar' --out codes/cc3m`. Shares
within a half go by the sizes of the data; filters of LAION and of lengths are
ours. A source is left out by --config.data.sources.NAME.weight=0.
"""

from lavit_jax.configs.lavit_7b import pretrain


def _archives(name, last, weight, task, **filters):
  """Returns a source of archives 00000.tar … of a data set."""
  return dict(
    kind="webdataset",
    path=f"data/{name}/{{00000..{last:05d}}}.tar",
    cache_dir=f"data/codes/{name}/train",
    held_out_cache_dir=f"data/codes/{name}/held_out",
    weight=weight,
    mixture={task: 1.0},
    filters=dict(max_aspect=3.0, min_chars=5, max_chars=1000, **filters),
  )


def get_config():
  """Rows of 2048 tokens, one a chip on 256 chips."""
  cfg = pretrain.get_config()
  # Text and image alternate in a row: captions are short, and images of the
  # half that is written take no slot.
  cfg.data.slots = 6
  cfg.data.threads, cfg.data.workers = 48, 32
  cfg.data.sources = dict(
    cc3m=_archives("cc3m", 331, 0.1, "image_text"),
    cc12m=_archives("cc12m", 1242, 0.36, "image_text"),
    sbu=_archives("sbu", 99, 0.04, "image_text"),
    laion=_archives(
      "laion",
      9999,
      0.5,
      "text_image",
      min_side=200,
      fields=dict(similarity=(0.28, None)),
    ),
    text=dict(
      kind="jsonl",
      path="data/text.jsonl.gz",
      weight=2.0,
      mixture=dict(text=1.0),
      filters=dict(min_chars=200),
    ),
  )
  return cfg
