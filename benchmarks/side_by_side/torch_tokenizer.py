"""The dynamic visual tokenizer in plain PyTorch, in the official form.

Modules carry the official names, so that `load` takes them strictly from the
file that `lavit port export --format huggingface` writes. Selection is the
deterministic one of `lavit_jax` (the official code samples). Beyond the
official code: the encoder's attention is PyTorch's fused one. The merger's
cannot be, as its softmax with a policy has an eps.
"""

import json
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from lavit_jax.core import image_io

_EPS = 1e-6  # of the softmax with a policy
_KEEP = 0


def load(folder) -> "Tokenizer":
  """The exported visual tokenizer of a folder, in evaluation mode."""
  folder = pathlib.Path(folder)
  sizes = json.loads((folder / "visual_tokenizer.json").read_text())
  state = safetensors.torch.load_file(folder / "visual_tokenizer.safetensors")
  model = Tokenizer(sizes["encoder"]["vit"], sizes["tokenizer"]["tokenizer"])
  # What is the encoder's stands under "encoder.", the rest at the root.
  state = {name.removeprefix("tokenizer."): x for name, x in state.items()}
  model.load_state_dict(state)
  return model.eval()


class Mlp(nn.Module):
  """Linear, exact GELU, linear."""

  def __init__(self, width, hidden):
    super().__init__()
    self.fc1 = nn.Linear(width, hidden)
    self.fc2 = nn.Linear(hidden, width)

  def forward(self, x):
    """Maps float[B, L, D] to the same."""
    return self.fc2(F.gelu(self.fc1(x)))


class EvaAttention(nn.Module):
  """Self-attention whose keys have no bias."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.q_bias = nn.Parameter(torch.zeros(width))
    self.v_bias = nn.Parameter(torch.zeros(width))
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    """Maps float[B, L, D] to the same."""
    none = torch.zeros_like(self.q_bias)
    bias = torch.cat((self.q_bias, none, self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias)
    q, k, v = _heads(qkv, self.heads, 3)
    out = F.scaled_dot_product_attention(q, k, v)
    return self.proj(_joined(out))


class EvaBlock(nn.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, width, heads, hidden):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = EvaAttention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width, hidden)

  def forward(self, x):
    """Maps float[B, L, D] to the same."""
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  """Patches of an image, each a vector."""

  def __init__(self, patch, width):
    super().__init__()
    self.proj = nn.Conv2d(3, width, patch, stride=patch)

  def forward(self, pixels):
    """Maps float[B, 3, H, W] to float[B, N, D]."""
    return self.proj(pixels).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
  """EVA's vision transformer: the last block's output, no final norm."""

  def __init__(self, vit):
    super().__init__()
    width = vit["width"]
    patches = (vit["image_size"] // vit["patch_size"]) ** 2
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
    self.patch_embed = PatchEmbed(vit["patch_size"], width)
    sizes = (width, vit["num_heads"], vit["mlp_dim"])
    self.blocks = nn.ModuleList(EvaBlock(*sizes) for _ in range(vit["depth"]))

  def forward(self, pixels):
    """Maps float[B, 3, H, W] to float[B, N, D], the CLS token left out."""
    x = self.patch_embed(pixels)
    x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
    x = x + self.pos_embed
    for block in self.blocks:
      x = block(x)
    return x[:, 1:]


class Selector(nn.Module):
  """Log-probabilities of keep and drop."""

  def __init__(self, width):
    super().__init__()
    self.in_conv = nn.Sequential(
      nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()
    )
    self.out_conv = nn.Sequential(
      nn.Linear(width, width // 2),
      nn.GELU(),
      nn.Linear(width // 2, width // 4),
      nn.GELU(),
      nn.Linear(width // 4, 2),
      nn.LogSoftmax(-1),
    )

  def forward(self, x):
    """Maps float[B, N, D] to float[B, N, 2]."""
    local, globe = self.in_conv(x).chunk(2, -1)
    globe = globe.mean(1, keepdim=True).expand_as(local)
    return self.out_conv(torch.cat((local, globe), -1))


class CausalAttention(nn.Module):
  """Self-attention among kept patches; a dropped one sees itself as well."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x, mask):
    """Maps float[B, N, D] to the same; mask float[B, N], 1 where kept."""
    q, k, v = _heads(self.qkv(x), self.heads, 3)
    kept = mask[:, None, None]
    eye = torch.eye(mask.shape[1], dtype=mask.dtype)
    policy = torch.tril(kept + (1.0 - kept) * eye)  # [B, 1, N, N]
    return self.proj(_joined(_with_policy(q, k, v, policy)))


class CrossAttention(nn.Module):
  """Attention to the dropped patches."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.query = nn.Linear(width, width)
    self.key = nn.Linear(width, width)
    self.value = nn.Linear(width, width)
    self.proj = nn.Linear(width, width)

  def forward(self, x, origin, mask):
    """Maps float[B, N, D] to the same; mask float[B, N], 1 where kept."""
    (q,) = _heads(self.query(x), self.heads, 1)
    (k,) = _heads(self.key(origin), self.heads, 1)
    (v,) = _heads(self.value(origin), self.heads, 1)
    dropped = 1.0 - mask[:, None, None]
    return self.proj(_joined(_with_policy(q, k, v, dropped)))


class MergerBlock(nn.Module):
  """Self-attention among kept, cross-attention to dropped, MLP."""

  def __init__(self, width, heads, hidden):
    super().__init__()
    self.norm0 = nn.LayerNorm(width)
    self.token_causal_attn = CausalAttention(width, heads)
    self.norm1 = nn.LayerNorm(width)
    self.token_cross_attn = CrossAttention(width, heads)
    self.norm2 = nn.LayerNorm(width)
    self.mlp = Mlp(width, hidden)

  def forward(self, x, origin, mask):
    """Maps float[B, N, D] to the same."""
    x = x + self.token_causal_attn(self.norm0(x), mask)
    x = x + self.token_cross_attn(self.norm1(x), origin, mask)
    return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
  """Kept patches take up what the dropped ones hold, at all positions."""

  def __init__(self, merger):
    super().__init__()
    width = merger["width"]
    sizes = (width, merger["num_heads"], merger["mlp_dim"])
    self.ln_vision = nn.LayerNorm(width)
    self.blocks = nn.ModuleList(
      MergerBlock(*sizes) for _ in range(merger["depth"])
    )
    self.norm = nn.LayerNorm(width)

  def forward(self, x, mask):
    """Maps float[B, N, D] and a mask float[B, N] to float[B, N, D]."""
    origin = self.ln_vision(x)
    for block in self.blocks:
      x = block(x, origin, mask)
    return self.norm(x)


class Quantizer(nn.Module):
  """The codes, as stored."""

  def __init__(self, num_codes, dim):
    super().__init__()
    self.embedding = nn.Embedding(num_codes, dim)

  def forward(self, z):
    """Ids int64[M] of the codes nearest to float[M, dim], made unit here."""
    z, codes = F.normalize(z, dim=-1), self.embedding.weight
    distance = (
      z.square().sum(1, keepdim=True)
      + codes.square().sum(1)
      - 2.0 * (z @ codes.T)
    )
    return distance.argmin(1)


class Tokenizer(nn.Module):
  """Images to codes."""

  def __init__(self, vit, tokenizer):
    super().__init__()
    quantizer = tokenizer["quantizer"]
    width, dim = quantizer["width"], quantizer["code_dim"]
    self.encoder = Encoder(vit)
    self.token_predictor = Selector(width)
    self.causal_encoder = Merger(tokenizer["merger"])
    self.encode_task_layer = nn.Sequential(
      nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim)
    )
    self.quantize = Quantizer(quantizer["num_codes"], dim)
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(image_io.MEAN), torch.tensor(image_io.STD)
    self.register_buffer("mean", mean.view(shape), persistent=False)
    self.register_buffer("std", std.view(shape), persistent=False)

  def forward(self, images):
    """Keep masks bool[B, N] and codes of uint8[B, H, W, 3].

    Returns:
      (keep bool[B, N], a list of int64[k], the codes of each image).
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    features = self.encoder((pixels - self.mean) / self.std)
    keep = expected_count_mask(self.token_predictor(features))
    merged = self.causal_encoder(features, keep.to(features.dtype))
    codes = self.quantize(self.encode_task_layer(merged[keep]))
    return keep, codes.split(keep.sum(1).tolist())


def expected_count_mask(log_probs):
  """The round(sum p(keep)) patches of highest p(keep): bool[B, N]."""
  count = log_probs[..., _KEEP].exp().sum(1, keepdim=True).round()
  count = count.clamp(1, log_probs.shape[1])
  score = log_probs[..., _KEEP] - log_probs[..., 1 - _KEEP]
  order = torch.argsort(-score, dim=1, stable=True)
  return torch.argsort(order, dim=1) < count


def _heads(x, heads, parts):
  """Of float[B, L, parts * D], each part as float[B, H, L, Dh]."""
  batch, length, _ = x.shape
  x = x.view(batch, length, parts, heads, -1)
  return x.permute(2, 0, 3, 1, 4).unbind(0)


def _joined(x):
  """float[B, H, L, Dh] as float[B, L, D]."""
  return x.transpose(1, 2).flatten(2)


def _with_policy(q, k, v, policy):
  """Attention whose weights have a policy as a factor, and the official eps."""
  weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
  weights = weights - weights.amax(-1, keepdim=True)
  weights = weights.exp_() * policy
  keys = weights.shape[-1]
  total = weights.sum(-1, keepdim=True)
  return ((weights + _EPS / keys) / (total + _EPS)) @ v
