#!/usr/bin/env bash
# Three libraries offer the antialiased bicubic filter of Pillow ("catmull_rom"
# in cykooz_resizer, BICUBIC with antialias in torchvision) for 8-bit images,
# and give other pixels than Pillow from the same pixels: mostly by one level,
# at sharp edges by far more. A model whose preprocessing was Pillow's sees other
# images through either. Seen with pillow 13.0.0, cykooz_resizer 4.0.1, torch
# 2.14.1, torchvision 0.29.1 on a picture of sharp stripes and noise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 \
  cykooz_resizer==4.0.1 torch==2.14.1 torchvision==0.29.1
cat >"$work/run.py" <<'PY'
import cykooz_resizer as cr
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (256, 340, 3), np.uint8)
picture[:, ::7] = 255  # sharp edges, where the filter overshoots
picture[::5] = 0
side = 224
pillow = np.asarray(
  Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
).astype(int)

kind = cr.PixelType.U8x3
source = cr.ImageData(340, 256, kind, picture.tobytes())
target = cr.ImageData(side, side, kind)
bicubic = cr.ResizeAlg.convolution(cr.FilterType.catmull_rom)
cr.Resizer().resize(source, target, cr.ResizeOptions(resize_alg=bicubic))
cykooz = np.frombuffer(target.get_buffer(), np.uint8).reshape(side, side, 3)

tensor = torch.from_numpy(picture).permute(2, 0, 1)
resized = functional.resize(
  tensor, [side, side], interpolation=InterpolationMode.BICUBIC, antialias=True
)
vision = resized.permute(1, 2, 0).numpy()

for name, other in (("cykooz_resizer", cykooz), ("torchvision", vision)):
  far = np.abs(pillow - other)
  print(
    f"{name}: largest distance {far.max()}, mean {far.mean():.3f},"
    f" share of equal values {(far == 0).mean():.3f}"
  )
  assert far.max() > 1, f"{name} gives Pillow's pixels, but for rounding"
PY
"$work/env/bin/python" "$work/run.py"
