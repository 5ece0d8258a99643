"""A step of pretraining, side by side with transformers and PyTorch.

  python benchmarks/pretrain_step.py [--out times.json]
  python benchmarks/pretrain_step.py --profile DIR

A LLaMA of 101 M parameters at random, the same on both sides, and the same
rows: 2 of 256 tokens. Forward, backward, gradients clipped to norm 1, AdamW;
float32, as many threads (2), a process for each side. First the losses of four
steps in a row must agree to 1e-4; then the sides run in turn, A B A B, and
medians are printed.

Ours is the step that `lavit train` compiles, on as many CPU devices as it
takes; PyTorch's is transformers' `LlamaForCausalLM` with SDPA, and fused AdamW.

Needs the extra `test`, 4 GB of memory and no one else on the machine.
"""

import sys

from side_by_side import step_runner, steps

SMALL = steps.Llama(
  width=32, depth=2, num_heads=2, mlp_dim=64, vocab_size=128, length=16
)

if __name__ == "__main__":
  sys.exit(step_runner.main(__doc__, steps.Llama(), SMALL, batch=2, apart=1e-4))
