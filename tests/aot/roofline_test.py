"""Collectives read from real programs, and the roofline they lead to."""

import types

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.aot import collectives, executed, hlo, roofline, topology
from lavit_jax.core import sharding
from lavit_jax.cost import chips

_LAYERS, _WIDTH, _ROWS = 6, 64, 32


@pytest.fixture(scope="module")
def program():
  """Optimized HLO of a scan over layers whose weights are split 4 ways."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
  spec = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))

  def loss(weights, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(layer, x, weights)[0].sum()

  weights = jax.ShapeDtypeStruct(
    (_LAYERS, _WIDTH, _WIDTH), jnp.float32, sharding=spec(None, "fsdp", None)
  )
  x = jax.ShapeDtypeStruct(
    (_ROWS, _WIDTH), jnp.float32, sharding=spec(("data", "fsdp"))
  )
  with jax.set_mesh(mesh):
    compiled = jax.jit(loss).lower(weights, x).compile()
  return compiled.as_text()


def _found(text):
  return collectives.of_program(hlo.read(text))


def test_an_all_gather_in_a_scan_counts_once_a_layer(program):
  found = _found(program)
  gathers = [one for one in found if one.kind == "all-gather"]
  assert gathers == [
    collectives.Collective(
      "all-gather", "f32", 4 * _WIDTH * _WIDTH, 4, times=_LAYERS
    )
  ]
  (total,) = [one for one in found if one.kind == "all-reduce"]
  assert (total.bytes, total.group_size, total.times) == (4, 8, 1)


def test_without_a_known_trip_count_the_condition_is_read(program):
  assert "known_trip_count" in program
  hidden = program.replace("known_trip_count", "unknown")
  assert _found(hidden) == _found(program)


# Lines as libtpu writes them for v5e, shortened.
_TPU = """\
HloModule jit_f, num_partitions=8

%start (p: bf16[128,1024]) -> (bf16[128,1024], u32[]) {
  %ag.1 = bf16[128,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.1 = (bf16[128,1024]{1,0}, u32[]{:S(2)}) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[128,1024]) -> bf16[128,1024] {
  %ag.2 = bf16[128,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.2 = bf16[128,1024]{1,0} custom-call(%ag.2), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.clone (input: bf16[1024,1024]) -> bf16[256,1024] {
  %ar = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=6, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = bf16[256,1024]{1,0} dynamic-slice(%ar, %z), \
dynamic_slice_sizes={256,1024}
}

%body (t: (s32[], bf16[32,1024])) -> (s32[], bf16[32,1024]) {
  %s = (bf16[128,1024]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, \
calls=%start
  %d = bf16[128,1024]{1,0} fusion(%s), kind=kCustom, calls=%done
  %rs = bf16[256,1024]{1,0} fusion(%y), kind=kCustom, \
calls=%all-reduce-scatter.clone
  %a = f32[1,256]{1,0:T(8,128)S(1)} all-reduce(%b), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  ROOT %t = (s32[], bf16[32,1024]) tuple(%i, %q)
}

%cond (t: (s32[], bf16[32,1024])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main.1 (p: bf16[32,1024]) -> bf16[32,1024] {
  %p0 = (f32[8]{0}, f32[32]{0}, f32[64]{0}, f32[256]{0}) \
all-gather-start(%x, %y), channel_id=1, replica_groups={{0,1,2,3}}
  %p1 = (f32[64]{0}, f32[256]{0}) all-gather-done(%p0)
  %q0 = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), \
channel_id=2, source_target_pairs={{0,1},{1,0}}
  %q1 = f32[8]{0} collective-permute-done(%q0)
  %m = f32[4,2]{1,0} all-to-all(%x), channel_id=3, replica_groups=\
mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b':(1)2}
  %w = (s32[], bf16[32,1024]) while(%t0), condition=%cond, body=%body
  ROOT %r = bf16[32,1024] get-tuple-element(%w), index=1
}
"""


def test_what_runs_beside_computation_counts_once():
  assert _found(_TPU) == [
    collectives.Collective("all-gather", "f32", 4 * (64 + 256), 4),
    collectives.Collective("collective-permute", "f32", 32, 2),
    collectives.Collective("all-to-all", "f32", 32, 4),
    collectives.Collective("all-gather", "bf16", 2 * 128 * 1024, 4, 7),
    collectives.Collective("reduce-scatter", "bf16", 2 * 1024 * 1024, 4, 7),
    collectives.Collective("all-reduce", "f32", 4 * 256, 2, 7),
  ]


def test_a_step_bound_by_compute_by_memory_or_by_the_network():
  v5e = chips.CHIPS["v5e"]
  one = roofline.estimate(197e12, 819e7, [], v5e, model_flops=150e12)
  assert (one.compute_s, one.hbm_s, one.step_s) == (1.0, 0.01, 1.0)
  assert one.mfu == pytest.approx(150 / 197)
  one = roofline.estimate(197e12, 819e9 * 2, [], v5e, model_flops=197e12)
  assert (one.step_s, one.mfu) == (2.0, 0.5)
  # Three quarters of 120 GB over two links of 45 GB/s: one second.
  gather = collectives.Collective("all-gather", "bf16", 60e9, 4, times=2)
  one = roofline.estimate(197e12 / 2, 0, [gather], v5e, model_flops=197e12 / 2)
  assert one.ici_s == pytest.approx(1.0)
  assert one.step_s == pytest.approx(1.0)
  assert one.step_s_no_overlap == pytest.approx(1.5)
  assert one.mfu_no_overlap == pytest.approx(1 / 3)
  # 80 % of it in int8, which is twice as fast but for v4.
  one = roofline.estimate(
    197e12, 0, [], v5e, model_flops=197e12, int8_flops=0.8 * 197e12
  )
  assert (one.compute_s, one.mfu) == pytest.approx((0.6, 1 / 0.6))
  v4 = chips.CHIPS["v4"]
  one = roofline.estimate(v4.flops, 0, [], v4, model_flops=1, int8_flops=1e14)
  assert one.compute_s == pytest.approx(1.0)
  wide = {4: topology.Route(links=4)}
  both = roofline.estimate(1, 0, [gather], v5e, model_flops=1, routes=wide)
  assert both.ici_s == pytest.approx(0.5)  # both axes of the torus


def test_an_all_reduce_sends_twice_what_a_reduce_scatter_sends():
  v5p = chips.CHIPS["v5p"]
  time = lambda kind, group=8: roofline.seconds(
    collectives.Collective(kind, "f32", 1e9, group), v5p
  )
  assert time("all-reduce") == pytest.approx(2 * time("reduce-scatter"))
  assert time("reduce-scatter") == time("all-gather")
  assert time("all-gather", 1) == 0.0
  with pytest.raises(ValueError, match="broadcast"):
    time("broadcast")


def test_between_slices_each_chip_sends_its_share_over_the_network():
  v5e = chips.CHIPS["v5e"]
  one = collectives.Collective("all-gather", "f32", 8e9, 8)
  within = collectives.Collective("all-gather", "f32", 8e9, 4)
  network = v5e.dcn_bandwidth
  assert network == 2 * 100e9 / 8 / 8  # two cards of 100 Gbit/s, 8 chips
  assert roofline.seconds(one, v5e, topology.Route(2, slices=2)) == (
    pytest.approx(roofline.seconds(within, v5e) + 0.5 * 8e9 / 4 / network)
  )


# A loop of XLA's collective products, unrolled twice: its counter grows by 2.
_UNROLLED = """\
HloModule jit_f

%body (t: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %t = (u32[], f32[8,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %two..sunk = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two..sunk), metadata={op_name="a(b)/c"}
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  %z = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  ROOT %r = (u32[], f32[8,8]{1,0}) tuple(%next, %z)
}

%cond (t: (u32[], f32[8,8])) -> pred[] {
  %t = (u32[], f32[8,8]{1,0}) parameter(0)
  %n = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %s = (u32[], f32[8,8]{1,0}) tuple(%zero, %p)
  %w = (u32[], f32[8,8]{1,0}) while(%s), condition=%cond, body=%body
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_runs_its_bound_over_the_step_of_its_counter():
  program = hlo.read(_UNROLLED)
  assert program.runs() == {"main": 1, "body": 4, "cond": 4}
  assert executed.flops(program) == 4 * 2 * (2 * 8 * 8 * 8)


# As libtpu writes a product of fp8 arrays.
_FP8 = """\
HloModule jit_f

ENTRY %main (x: f8e4m3fn[8,16], y: f8e5m2[16,4]) -> f32[8,4] {
  %x = f8e4m3fn[8,16]{1,0:T(8,128)(4,1)} parameter(0)
  %y = f8e5m2[16,4]{1,0} parameter(1)
  %g = f8e4m3fn[32,16]{1,0} all-gather(%x), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %r = f32[8,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}
"""


def test_fp8_products_are_counted_and_their_arrays_sent():
  program = hlo.read(_FP8)
  assert (
    executed.flops(program) == executed.fp8_flops(program) == 2 * 8 * 4 * 16
  )
  assert executed.int8_flops(program) == 0
  (one,) = collectives.of_program(program)
  assert (one.dtype, one.bytes) == ("f8e4m3fn", 32 * 16)
  tpu7x = chips.CHIPS["tpu7x"]
  line = roofline.estimate(1e15, 0, [], tpu7x, model_flops=1, fp8_flops=1e15)
  assert line.compute_s == pytest.approx(1e15 / (4614e12 / 2))


def test_a_chip_of_two_devices_is_known_by_its_device():
  """Both together have what Google's page gives for a TPU7x chip."""
  one = chips.of_device(types.SimpleNamespace(device_kind="TPU7x"))
  both = one.devices_per_chip
  assert both * one.flops == 2307e12
  assert both * one.hbm_bytes == 192 * 2**30
  assert both * one.hbm_bandwidth == pytest.approx(7380e9)
  assert both * one.dcn_bandwidth == 100e9 / 8
  # Six links of a chip, both ways: 1,200 GB/s, of which nine tenths are used.
  assert 6 * 2 * one.link_bandwidth == pytest.approx(0.9 * 1200e9)
  # Alone in its group, it shares a ring's two links with the other device.
  gather = collectives.Collective("all-gather", "bf16", 4e9, 4)
  assert roofline.seconds(gather, one) == pytest.approx(3e9 / 90e9)


def test_the_figures_are_those_of_jax():
  """Where JAX's kernels have a figure, within 3 %: HBM is given roughly."""
  pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
  names = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "7x": 1}
  for version, cores in names.items():
    of_jax = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), cores)
    chip = chips.CHIPS["tpu7x" if version == "7x" else version]
    wide = of_jax.bf16_ops_per_second * cores
    assert chip.flops == pytest.approx(wide, rel=0.03)
    assert chip.hbm_bytes == pytest.approx(
      of_jax.hbm_capacity_bytes * cores, rel=0.03
    )
    if of_jax.int8_ops_per_second:
      narrow = of_jax.int8_ops_per_second * cores / wide
      assert chip.int8 == pytest.approx(narrow, rel=0.03)
    if of_jax.fp8_ops_per_second:
      narrow = of_jax.fp8_ops_per_second * cores / wide
      assert chip.fp8 == pytest.approx(narrow, rel=0.03)


def test_chips_are_known_by_what_jax_calls_them():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert chips.of_device(device("TPU v5 lite")).name == "v5e"
  assert chips.of_device(device("TPU v5")).name == "v5p"
  assert chips.of_device(device("TPU v6 lite")).name == "v6e"
  assert chips.of_device(device("NVIDIA H100 80GB HBM3")).flops == 989e12
  assert chips.of_device(jax.devices("cpu")[0]) is None
  kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))
