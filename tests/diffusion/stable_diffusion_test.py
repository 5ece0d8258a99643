"""The official decoders' conditions, sizes and streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.diffusion import schedules, solvers, stable_diffusion

_SCHEDULE = schedules.STABLE_DIFFUSION
_SETTINGS = stable_diffusion.Settings(height=32, width=48)
_SEEDS = jnp.array([3, 4])
_TOKENS = jax.random.normal(jax.random.key(0), (2, 6, 5))
_UNCOND = jax.random.normal(jax.random.key(1), (1, 4, 5))
_POOLED = jax.random.normal(jax.random.key(2), (2, 3))


def _told(given):
  """float32[B], something of all that a condition says."""
  tokens = given["condition"].astype(jnp.float32).mean(-1)
  if "condition_mask" in given:
    seen = given["condition_mask"]
    return (tokens * seen).sum(1) / seen.sum(1)
  pooled = given["pooled"].astype(jnp.float32).mean(-1)
  place = given["sizes"] @ jnp.arange(1.0, 7.0) / 1000
  return tokens.mean(1) + pooled + place


def _denoise(z, t, given):
  told = _told(given) + 0.1 * jnp.sin(t.astype(jnp.float32))
  return 0.9 * z + told[:, None, None, None]


def _lowres(settings=_SETTINGS, denoise=_denoise, **kwargs):
  fields = {"tokens": _TOKENS, "uncond": _UNCOND, "seeds": _SEEDS, "steps": 4}
  fields |= kwargs
  return stable_diffusion.lowres(denoise, _SCHEDULE, settings, **fields)


def _highres(settings=_SETTINGS, denoise=_denoise, **kwargs):
  fields = {"tokens": _TOKENS, "pooled": _POOLED, "seeds": _SEEDS, "steps": 4}
  fields |= kwargs
  return stable_diffusion.highres(denoise, _SCHEDULE, settings, **fields)


@pytest.fixture
def watch():
  """A denoise that keeps the conditions it was given, and these."""
  kept = []

  def denoise(z, t, given):
    jax.debug.callback(lambda g: kept.append(g), given | {"z": z})
    return _denoise(z, t, given)

  return denoise, kept


@jax.jit
def _loop(condition, nothing, guidance):
  """The official loop of 4 steps, written out."""
  table = schedules.alphas_cumprod(_SCHEDULE)
  noise = [
    jax.random.normal(jax.random.fold_in(jax.random.key(s), 0), (4, 6, 4))
    for s in _SEEDS
  ]
  z = jnp.stack(noise)
  for t in (751, 501, 251, 1):
    a, b = table[t], table[max(t - 250, 0)]
    t = jnp.full(2, t)
    cond, un = _denoise(z, t, condition), _denoise(z, t, nothing)
    eps = un + guidance * (cond - un)
    x = (z - (1 - a) ** 0.5 * eps) / a**0.5
    z = b**0.5 * x + (1 - b) ** 0.5 * eps
  return z


def test_lowres_is_the_official_loop():
  given = {"condition": _TOKENS, "condition_mask": jnp.ones((2, 6), bool)}
  nothing = {
    "condition": jnp.pad(
      jnp.tile(_UNCOND, (2, 1, 1)), ((0, 0), (0, 2), (0, 0))
    ),
    "condition_mask": jnp.array([[True] * 4 + [False] * 2] * 2),
  }
  draw = jax.jit(lambda guidance: _lowres(guidance=guidance))
  for guidance in (5.0, 0.0):
    ours, theirs = draw(guidance), _loop(given, nothing, guidance)
    assert ours.shape == (2, 4, 6, 4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(_lowres(), draw(5.0), rtol=1e-5, atol=1e-5)


def test_highres_is_the_official_loop():
  sizes = jnp.array([[768, 512, 16, 8, 32, 48.0]] * 2)
  given = {"condition": _TOKENS, "pooled": _POOLED, "sizes": sizes}
  nothing = jax.tree.map(jnp.zeros_like, given) | {"sizes": sizes}
  place = {"original_size": (768, 512), "crop": (16, 8)}
  draw = jax.jit(lambda guidance: _highres(guidance=guidance, **place))
  for guidance in (7.0, 0.0):
    ours, theirs = draw(guidance), _loop(given, nothing, guidance)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(_highres(**place), draw(7.0), rtol=1e-5, atol=1e-5)


def test_lowres_pads_the_unconditional_stream_with_masked_zeros(watch):
  denoise, kept = watch
  mask = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
  jax.block_until_ready(_lowres(denoise=denoise, mask=mask))
  jax.effects_barrier()
  tokens, seen = kept[0]["condition"], kept[0]["condition_mask"]
  np.testing.assert_array_equal(tokens[:2], _TOKENS)
  np.testing.assert_array_equal(seen[:2], mask)
  np.testing.assert_array_equal(tokens[2:, :4], np.tile(_UNCOND, (2, 1, 1)))
  assert not tokens[2:, 4:].any()
  np.testing.assert_array_equal(seen[2:], [[True] * 4 + [False] * 2] * 2)


def test_highres_has_the_same_sizes_in_both_streams(watch):
  denoise, kept = watch
  jax.block_until_ready(_highres(denoise=denoise))
  jax.effects_barrier()
  row = [32, 48, 0, 0, 32, 48]
  np.testing.assert_array_equal(kept[0]["sizes"], [row] * 4)
  assert not kept[0]["condition"][2:].any()
  assert not kept[0]["pooled"][2:].any()


def test_a_plain_guidance_of_one_runs_one_stream(watch):
  denoise, kept = watch
  alone = _lowres(denoise=denoise, guidance=1)
  jax.effects_barrier()
  assert {len(given["condition"]) for given in kept} == {2}
  traced = _lowres(guidance=jnp.float32(1.0))
  np.testing.assert_allclose(alone, traced, atol=1e-4)


@pytest.mark.parametrize("draw", [_lowres, _highres])
def test_bfloat16_is_for_the_network_only(draw, watch):
  denoise, kept = watch
  settings = stable_diffusion.Settings(height=32, width=48, dtype="bfloat16")
  ours = draw(settings, denoise)
  jax.effects_barrier()
  assert ours.dtype == jnp.float32
  assert kept[0]["z"].dtype == kept[0]["condition"].dtype == jnp.bfloat16
  # 767 is no number of bfloat16.
  assert "sizes" not in kept[0] or kept[0]["sizes"].dtype == np.float32
  spread = np.abs(np.asarray(draw())).max()
  assert np.abs(ours - draw()).max() < 0.05 * spread


@pytest.mark.parametrize("solver", solvers.NAMES)
def test_latents_depend_on_their_seed_not_on_their_batch(solver):
  settings = stable_diffusion.Settings(
    height=32, width=48, solver=solvers.named(solver)
  )
  together = _highres(settings)
  alone = _highres(
    settings, tokens=_TOKENS[1:], pooled=_POOLED[1:], seeds=_SEEDS[1:]
  )
  np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", [_lowres, _highres])
def test_the_solver_is_that_of_the_settings(draw):
  fields = {"height": 32, "width": 48}
  dpm, noisy = solvers.named("dpm++"), solvers.named("ddim", eta=1.0)
  drawn = [
    draw(),
    draw(stable_diffusion.Settings(**fields, solver=dpm)),
    draw(stable_diffusion.Settings(**fields, solver=noisy)),
  ]
  for i in range(3):
    assert np.abs(drawn[i] - drawn[i - 1]).max() > 0.1


def test_settings_are_static_and_nothing_else_compiles_again():
  traces = []

  def draw(tokens, uncond, seeds, guidance):
    traces.append(1)
    return _lowres(tokens=tokens, uncond=uncond, seeds=seeds, guidance=guidance)

  draw = jax.jit(draw)
  first = draw(_TOKENS, _UNCOND, _SEEDS, 5.0)
  draw(_TOKENS + 1, _UNCOND - 1, _SEEDS + 1, 4.0)
  assert len(traces) == 1
  np.testing.assert_allclose(first, _lowres(), rtol=1e-4, atol=1e-4)
  assert hash(_SETTINGS) == hash(stable_diffusion.Settings(height=32, width=48))


def test_every_ratio_has_its_size_of_about_a_megapixel():
  assert len(stable_diffusion.RATIOS) == 6
  for name in stable_diffusion.RATIOS:
    height, width = stable_diffusion.size_of(name)
    across, down = map(int, name.split(":"))
    assert width / height == pytest.approx(across / down, rel=0.05)
    assert height * width == pytest.approx(1024**2, rel=0.05)
    settings = stable_diffusion.Settings(height=height, width=width)
    assert settings.shape == (height // 8, width // 8, 4)


def test_an_unknown_ratio_names_the_known_ones():
  with pytest.raises(ValueError, match=r"'5:4'.*1:1, 4:3, 3:2, 16:9, 2:3, 3:4"):
    stable_diffusion.size_of("5:4")


@pytest.mark.parametrize(
  ("size", "message"),
  [
    ({"height": 500, "width": 512}, "height=500.* of 8.* is 496"),
    ({"height": 512, "width": 1}, "width=1 .* is 8"),
    ({"height": 0, "width": 8}, "height=0 "),
  ],
)
def test_a_size_that_is_no_multiple_of_eight_is_refused(size, message):
  with pytest.raises(ValueError, match=message):
    stable_diffusion.Settings(**size)


def test_shapes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"7 tokens of width 5, but .* 6 of"):
    _lowres(uncond=jnp.zeros((1, 7, 5)))
  with pytest.raises(ValueError, match="width 4"):
    _lowres(uncond=jnp.zeros((4, 4)))
  with pytest.raises(ValueError, match="2 seeds, but 2 rows of tokens, 3 rows"):
    _highres(pooled=jnp.zeros((3, 3)))
  with pytest.raises(ValueError, match="1 seeds"):
    _lowres(seeds=_SEEDS[:1])
  with pytest.raises(ValueError, match=r"need \(2, 4, 6, 4\)"):
    _lowres(noise=jnp.zeros((2, 4, 4, 6)))
  with pytest.raises(ValueError, match="from 1 to 1000"):
    _lowres(steps=1001)


def test_progress_is_reported(watch):
  told = []
  settings = stable_diffusion.Settings(
    height=8, width=8, progress=lambda *at: told.append(at)
  )
  jax.block_until_ready(_lowres(settings, steps=3))
  jax.effects_barrier()
  assert told == [(1, 3), (2, 3), (3, 3)]
