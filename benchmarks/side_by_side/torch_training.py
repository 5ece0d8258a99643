"""Stage `tokenizer` with codes on, in plain PyTorch, the gathered form.

The same work as ours: a frozen encoder without gradient, the frozen selector's
kept patches gathered to a fixed capacity, merger and decoder by PyTorch's
fused attention with masks, codes moved by exponential means. Modules carry
the names of our parameters, by which `load` fills them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lavit_jax.core import image_io
from side_by_side import steps, torch_tokenizer

_UNDECAYED = ("embed", "norm", "bias")


def decays(name: str) -> bool:
  """Whether a matrix decays, as by `lavit_jax.train.optimizer.decays`."""
  return not any(word in name for word in _UNDECAYED)


def load(sizes: steps.Tokenizer, tree) -> "Stage":
  """The stage with our parameters, ready to train."""
  model = Stage(sizes)
  params = tree["params"]
  for name, child in model.named_children():
    part = tree["frozen"]["encoder"] if name == "encoder" else params[name]
    _fill(child, part)
  for name, value in tree["extra"]["codebook"].items():
    getattr(model, name).copy_(torch.tensor(value))
  for frozen in (model.encoder, model.selector):
    frozen.requires_grad_(False)
  return model


def _fill(module, tree):
  """Copies parameters by their names; stacked layers are taken apart."""
  for name, child in module.named_children():
    part = tree[name]
    if isinstance(child, nn.ModuleList):
      for i, layer in enumerate(child):
        _fill(layer, _layer(part, i))
    elif isinstance(child, nn.Linear):
      _copy(child.weight, part["kernel"].T)
      if child.bias is not None:
        _copy(child.bias, part["bias"])
    elif isinstance(child, nn.LayerNorm):
      _copy(child.weight, part["scale"])
      _copy(child.bias, part["bias"])
    else:
      _fill(child, part)
  for name, parameter in module.named_parameters(recurse=False):
    value = tree[name]
    if name == "qkv_kernel":  # [D, 3, D] -> [3 * D, D]
      value = value.reshape(len(value), -1).T
    _copy(parameter, value.reshape(parameter.shape))


def _layer(tree, i):
  if isinstance(tree, dict):
    return {name: _layer(value, i) for name, value in tree.items()}
  return tree[i]


def _copy(parameter, value):
  with torch.no_grad():
    parameter.copy_(torch.tensor(value))


class SelfAttention(nn.Module):
  """Fused q, k, v; keys without a bias where `key_bias` is False."""

  def __init__(self, width, heads, key_bias=True):
    super().__init__()
    self.heads = heads
    self.qkv_kernel = nn.Parameter(torch.zeros(3 * width, width))
    if key_bias:
      self.qkv_bias = nn.Parameter(torch.zeros(3 * width))
    else:
      self.q_bias = nn.Parameter(torch.zeros(width))
      self.v_bias = nn.Parameter(torch.zeros(width))
    self.proj = nn.Linear(width, width)

  def forward(self, x, mask=None):
    """Maps float[B, L, D] to the same; mask bool[B, 1, L, L]."""
    if hasattr(self, "qkv_bias"):
      bias = self.qkv_bias
    else:
      none = torch.zeros_like(self.q_bias)
      bias = torch.cat((self.q_bias, none, self.v_bias))
    qkv = F.linear(x, self.qkv_kernel, bias)
    q, k, v = torch_tokenizer._heads(qkv, self.heads, 3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.proj(torch_tokenizer._joined(out))


class CrossAttention(nn.Module):
  """Queries from one sequence, keys and values from another."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.query = nn.Linear(width, width)
    self.key = nn.Linear(width, width)
    self.value = nn.Linear(width, width)
    self.proj = nn.Linear(width, width)

  def forward(self, x, context, mask):
    """Maps float[B, L, D] to the same; mask bool[B, 1, 1, M]."""
    (q,) = torch_tokenizer._heads(self.query(x), self.heads, 1)
    (k,) = torch_tokenizer._heads(self.key(context), self.heads, 1)
    (v,) = torch_tokenizer._heads(self.value(context), self.heads, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.proj(torch_tokenizer._joined(out))


class VitBlock(nn.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, sizes):
    super().__init__()
    width = sizes.width
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = SelfAttention(width, sizes.num_heads, key_bias=False)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = torch_tokenizer.Mlp(width, sizes.mlp_dim)

  def forward(self, x):
    """Maps float[B, L, D] to the same."""
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
  """The vision transformer: the last block's output, no final norm."""

  def __init__(self, sizes):
    super().__init__()
    width, self.patch = sizes.width, sizes.patch_size
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.num_patches, width))
    self.patch_embed = nn.Linear(3 * self.patch**2, width)
    self.blocks = nn.ModuleList(VitBlock(sizes) for _ in range(sizes.vit_depth))

  def forward(self, pixels):
    """Maps float[B, H, W, 3] to float[B, N, D]."""
    batch, side, p = len(pixels), pixels.shape[1] // self.patch, self.patch
    x = pixels.view(batch, side, p, side, p, 3).permute(0, 1, 3, 2, 4, 5)
    x = self.patch_embed(x.reshape(batch, side**2, -1))
    x = torch.cat((self.cls_token.expand(batch, -1, -1), x), 1)
    x = x + self.pos_embed
    for block in self.blocks:
      x = block(x)
    return x[:, 1:]


class Selector(nn.Module):
  """Log-probabilities of keep and drop."""

  def __init__(self, sizes):
    super().__init__()
    width = sizes.width
    self.norm = nn.LayerNorm(width)
    self.in_proj = nn.Linear(width, width)
    self.fc1 = nn.Linear(width, width // 2)
    self.fc2 = nn.Linear(width // 2, width // 4)
    self.fc3 = nn.Linear(width // 4, 2)

  def forward(self, x):
    """Maps float[B, N, D] to float[B, N, 2]."""
    local, globe = F.gelu(self.in_proj(self.norm(x))).chunk(2, -1)
    globe = globe.mean(1, keepdim=True).expand_as(local)
    x = F.gelu(self.fc1(torch.cat((local, globe), -1)))
    return F.log_softmax(self.fc3(F.gelu(self.fc2(x))), -1)


class Block(nn.Module):
  """Self-attention, cross-attention, MLP: of merger and decoder."""

  def __init__(self, sizes, own, cross):
    super().__init__()
    width, heads = sizes.width, sizes.num_heads
    self.own, self.cross = own, cross
    self.norm0 = nn.LayerNorm(width)
    self.add_module(own, SelfAttention(width, heads))
    self.norm1 = nn.LayerNorm(width)
    self.add_module(cross, CrossAttention(width, heads))
    self.norm2 = nn.LayerNorm(width)
    self.mlp = torch_tokenizer.Mlp(width, sizes.mlp_dim)

  def forward(self, x, own_mask, context, mask):
    """Maps float[B, L, D] to the same."""
    x = x + getattr(self, self.own)(self.norm0(x), own_mask)
    x = x + getattr(self, self.cross)(self.norm1(x), context, mask)
    return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
  """Kept patches, gathered, take up what the dropped ones hold."""

  def __init__(self, sizes):
    super().__init__()
    self.capacity = sizes.capacity
    names = ("token_causal_attn", "token_cross_attn")
    self.ln_vision = nn.LayerNorm(sizes.width)
    self.blocks = nn.ModuleList(
      Block(sizes, *names) for _ in range(sizes.merger_depth)
    )
    self.norm = nn.LayerNorm(sizes.width)

  def forward(self, features, keep):
    """float[B, N, D], bool[B, N] -> float[B, K, D], bool[B, K]."""
    order = torch.argsort(~keep, dim=1, stable=True)[:, : self.capacity]
    places = torch.arange(self.capacity)
    valid = places < keep.sum(1, keepdim=True)
    x = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    x = x * valid[..., None]
    seen = torch.tril(valid[:, None, None] & valid[:, None, :, None])
    seen = seen | torch.eye(self.capacity, dtype=torch.bool)  # padding: itself
    origin, dropped = self.ln_vision(features), ~keep[:, None, None]
    for block in self.blocks:
      x = block(x, seen, origin, dropped)
    return self.norm(x) * valid[..., None], valid


class Quantizer(nn.Module):
  """Linear, tanh, linear."""

  def __init__(self, sizes):
    super().__init__()
    self.fc1 = nn.Linear(sizes.width, sizes.width)
    self.fc2 = nn.Linear(sizes.width, sizes.code_dim)

  def forward(self, x):
    """Maps float[..., D] to unit vectors float[..., dim]."""
    return F.normalize(self.fc2(torch.tanh(self.fc1(x))), dim=-1)


class Decoder(nn.Module):
  """Codes to reconstructed features."""

  def __init__(self, sizes):
    super().__init__()
    width, shape = sizes.width, (1, sizes.num_patches, sizes.width)
    self.in_proj = nn.Linear(sizes.code_dim, width)
    self.pos_embed = nn.Parameter(torch.zeros(shape))
    self.query_embed = nn.Parameter(torch.zeros(shape))
    self.blocks = nn.ModuleList(
      Block(sizes, "self_attn", "cross_attn")
      for _ in range(sizes.decoder_depth)
    )
    self.norm = nn.LayerNorm(width)
    self.fc1 = nn.Linear(width, width)
    self.fc2 = nn.Linear(width, width)

  def forward(self, vectors, valid):
    """float[B, K, dim], bool[B, K] -> float[B, N, D]."""
    keys = self.in_proj(vectors) * valid[..., None]
    keys = keys + self.pos_embed[:, : vectors.shape[1]]
    x = self.query_embed.expand(len(vectors), -1, -1)
    for block in self.blocks:
      x = block(x, None, keys, valid[:, None, None])
    return self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Stage(nn.Module):
  """Images to the loss of the phase "codes"."""

  def __init__(self, sizes: steps.Tokenizer):
    super().__init__()
    self.sizes = sizes
    self.encoder = Encoder(sizes)
    self.selector = Selector(sizes)
    self.merger = Merger(sizes)
    self.quantizer = Quantizer(sizes)
    self.decoder = Decoder(sizes)
    codes = (sizes.num_codes, sizes.code_dim)
    for name, shape in {
      "codes": codes,
      "sums": codes,
      "counts": codes[:1],
    }.items():
      self.register_buffer(name, torch.zeros(shape))
    self.register_buffer("mean", torch.tensor(image_io.MEAN))
    self.register_buffer("std", torch.tensor(image_io.STD))

  def forward(self, images):
    """The loss of uint8[B, H, W, 3]; codes move."""
    sizes = self.sizes
    with torch.no_grad():
      pixels = (images.float() / 255.0 - self.mean) / self.std
      features = self.encoder(pixels)
      keep = torch_tokenizer.expected_count_mask(self.selector(features))
    tokens, valid = self.merger(features, keep)
    z = self.quantizer(tokens)
    ids, chosen = self._nearest(z)
    vectors = chosen + (z - z.detach())
    made = self.decoder(vectors, valid)
    cosine = F.cosine_similarity(features, made, dim=-1)
    usual = features.square().mean()  # the mean feature is zero here
    detail = (features - made).square().mean(-1) / usual
    loss = (1.0 - cosine + sizes.detail_weight * detail).mean()
    apart = (z - chosen).square().sum(-1) * valid
    commitment = apart.sum() / valid.sum().clamp(min=1)
    self._move(z.detach(), ids, valid)
    return loss + sizes.commitment * commitment

  @torch.no_grad()
  def _nearest(self, z):
    flat = z.flatten(0, 1)
    distance = self.codes.square().sum(1) - 2.0 * (flat @ self.codes.T)
    ids = distance.argmin(1).view(z.shape[:2])
    return ids, self.codes[ids]

  @torch.no_grad()
  def _move(self, z, ids, valid):
    """Exponential means of the vectors that chose each code."""
    decay, ids, z = self.sizes.decay, ids[valid], z[valid].float()
    counts = torch.bincount(ids, minlength=len(self.codes)).float()
    sums = torch.zeros_like(self.sums).index_add_(0, ids, z)
    self.sums.mul_(decay).add_(sums, alpha=1.0 - decay)
    self.counts.mul_(decay).add_(counts, alpha=1.0 - decay)
    used = counts > 0
    self.codes[used] = F.normalize(self.sums[used], dim=-1)
