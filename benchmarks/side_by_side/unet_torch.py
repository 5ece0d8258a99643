"""PyTorch's side of the U-Net benchmark: diffusers' U-Net and DDIM."""

import contextlib
import functools
import importlib.metadata
import pathlib
import resource

import diffusers
import numpy as np
import torch

from side_by_side import pytorch, unet_cases


class Side:
  """The official loop: both streams in a batch, DDIM, in inference mode."""

  def __init__(self, folder, sizes: unet_cases.Sizes, threads: int):
    """Nothing is loaded before a case needs it."""
    torch.set_num_threads(threads)
    diffusers.utils.logging.disable_progress_bar()
    self._folder, self._sizes = pathlib.Path(folder) / "unet", sizes

  def versions(self) -> dict[str, str]:
    """Of the libraries that compute."""
    return {x: importlib.metadata.version(x) for x in ("torch", "diffusers")}

  @functools.cached_property
  def _net(self):
    return diffusers.UNet2DConditionModel.from_pretrained(self._folder).eval()

  def work(self, case: unet_cases.Case, batch: int):
    """What is timed: a function of no arguments that gives numpy arrays."""
    net = self._net
    given = unet_cases.inputs(self._sizes, batch)
    tokens, uncond = given["tokens"], given["uncond"]
    rest = np.zeros_like(tokens)
    rest[:, : uncond.shape[1]] = uncond
    seen = np.ones(tokens.shape[:2], bool)
    some = seen & (np.arange(tokens.shape[1]) < uncond.shape[1])
    told = torch.from_numpy(np.concatenate([rest, tokens]))
    mask = torch.from_numpy(np.concatenate([some, seen]))
    noise = torch.from_numpy(given["noise"].transpose(0, 3, 1, 2).copy())
    scheduler = diffusers.DDIMScheduler(
      beta_start=0.00085,
      beta_end=0.012,
      beta_schedule="scaled_linear",
      clip_sample=False,
      set_alpha_to_one=False,
      steps_offset=1,
    )

    def run():
      scheduler.set_timesteps(case.steps)
      z = noise
      for t in scheduler.timesteps:
        both = net(
          torch.cat([z, z]),
          t,
          encoder_hidden_states=told,
          encoder_attention_mask=mask,
        ).sample
        without, with_it = both.chunk(2)
        eps = without + unet_cases.GUIDANCE * (with_it - without)
        z = scheduler.step(eps, t, z).prev_sample
      return {"latents": z.numpy().transpose(0, 2, 3, 1)}

    return torch.inference_mode()(run)

  def judged(self, case, batch):
    """None: the work itself is compared."""

  def convolutions(self, shapes) -> list[float]:
    """GFLOP/s of single 3 x 3 convolutions, NCHW."""
    rates = []
    for side, into, out in shapes:
      x = torch.ones(2, into, side, side)
      kernel = torch.ones(out, into, 3, 3)
      run = functools.partial(torch.nn.functional.conv2d, x, kernel, padding=1)
      with torch.inference_mode():
        seconds = unet_cases.fastest(run)
      rates.append(unet_cases.gflop((side, into, out)) / seconds)
    return rates

  def peak(self) -> float:
    """Most memory that the process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a summary, see `pytorch.Side`."""
    with pytorch.Side.profile(self, directory):
      yield
