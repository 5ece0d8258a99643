"""A step of stage `tokenizer`, side by side with plain PyTorch.

  python benchmarks/tokenizer_step.py [--out times.json]
  python benchmarks/tokenizer_step.py --profile DIR

Images of 224 px, a frozen ViT of 12 layers and width 384 (196 patches), four
layers each of merger and decoder, 4096 codes; the phase "codes": the frozen
selector's kept patches are merged, quantized and decoded, codes move by
exponential means. Forward, backward, clipping, AdamW; float32, as many threads
(2), a process for each side, the same parameters and images. First the
losses of four steps in a row must agree to 1e-4; then the sides run in turn,
A B A B, and medians are printed.

PyTorch's side, `side_by_side/torch_training.py`, gathers kept patches as ours
does, and has SDPA everywhere.

Needs the extra `test`, 4 GB of memory and no one else on the machine.
"""

import sys

from side_by_side import step_runner, steps

SMALL = steps.Tokenizer(
  image_size=32,
  patch_size=8,
  width=32,
  num_heads=2,
  vit_depth=2,
  merger_depth=2,
  decoder_depth=2,
  num_codes=16,
  code_dim=8,
  capacity=12,
)

if __name__ == "__main__":
  sys.exit(
    step_runner.main(__doc__, steps.Tokenizer(), SMALL, batch=8, apart=1e-4)
  )
