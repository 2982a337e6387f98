"""What is read out of compiled programs, against figures worked out by hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from samjax.collectives import collectives
from samjax.hlo import Program
from samjax.traffic import largest_arrays, traffic

# Eight devices, 4 of `data` times 2 of `fsdp`; each has (16, 128) float32 of x: 8192 bytes.
_PROGRAM = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4, 2), ("data", "fsdp"))

def own(x):
    def turn(x, _):
        return jax.lax.psum(jnp.sin(x), "data"), None
    x, _ = jax.lax.scan(turn, x, length=5)
    gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
    scattered = jax.lax.psum_scatter(jnp.cos(x), "data", tiled=True)
    exchanged = jax.lax.all_to_all(jnp.tan(x), ("data", "fsdp"), 0, 1, tiled=True)
    moved = jax.lax.ppermute(jnp.exp(x), "fsdp", [(0, 1), (1, 0)])
    return gathered, scattered, exchanged, moved

spec = P(("data", "fsdp"))
step = jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
print(jax.jit(step).lower(x).compile().as_text())
"""


def test_collectives_by_hand():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = collectives(Program(done.stdout), {"data": 4, "fsdp": 2})
    assert {(c.kind, c.bytes, c.axes, c.group, c.times) for c in found} == {
        ("all-reduce", 8192, ("data",), 4, 5),
        ("all-gather", 2 * 8192, ("fsdp",), 2, 1),
        ("reduce-scatter", 8192, ("data",), 4, 1),
        ("all-to-all", 8192, ("data", "fsdp"), 8, 1),
        ("collective-permute", 8192, ("fsdp",), 2, 1),
    }
    assert found[0].total_bytes == 5 * 8192 and "psum" in found[0].source


# What XLA has for TPUs: tiles, memory on the chip (S), asynchronous copies, groups by axes.
_TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p0: bf16[6,8,128], p1: s32[], p2: bf16[1,8,128]) -> bf16[6,8,128] {
  %p0 = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %new = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p2, %p1, %zero, %zero)
}

%body (loop: (s32[], bf16[6,8,128])) -> (s32[], bf16[6,8,128]) {
  %loop = (s32[]{:T(128)}, bf16[6,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%loop), index=0
  %all = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %row = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%all, %i), dynamic_slice_sizes={1,8,128}
  %next = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} fusion(%all, %i, %row), kind=kLoop, calls=%fused
  ROOT %out = (s32[]{:T(128)}, bf16[6,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %next)
}

%condition (loop.1: (s32[], bf16[6,8,128])) -> pred[] {
  %loop.1 = (s32[]{:T(128)}, bf16[6,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%loop.1), index=0
  %turns = s32[]{:T(128)} constant(6)
  ROOT %goes = pred[]{:T(512)} compare(%i.1, %turns), direction=LT
}

ENTRY %main (x: f32[3,64], y: (s32[], bf16[6,8,128])) -> f32[3,64] {
  %x = f32[3,64]{1,0:T(4,128)} parameter(0)
  %y = (s32[]{:T(128)}, bf16[6,8,128]{2,1,0:T(8,128)(2,1)}) parameter(1)
  %loops = (s32[]{:T(128)}, bf16[6,8,128]{2,1,0:T(8,128)(2,1)}) while(%y), condition=%condition, body=%body
  %start = (f32[3,64]{1,0:T(4,128)S(1)}, f32[3,64]{1,0:T(4,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[3,64]{1,0:T(4,128)S(1)} copy-done(%start)
  ROOT %sum.1 = f32[3,64]{1,0:T(4,128)} all-reduce(%done), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add, metadata={op_name="jit(f)/sum"}
}
"""  # noqa: E501


def test_a_program_for_tpus():
    program = Program(_TPU)
    (found,) = collectives(program, {"data": 4, "fsdp": 2})
    assert (found.kind, found.axes, found.group, found.source) == (
        *("all-reduce", ("data",), 4),
        "jit(f)/sum",
    )
    assert found.bytes == 3 * 64 * 4
    # In six turns a row is read and written, and read and written again: 1 x 8 x 128 in bfloat16.
    # The copy reads x, whose three rows of 64 fill a tile of 4 x 128; the sum writes as much, and
    # takes what lies on the chip.
    row, tile = 8 * 128 * 2, 4 * 128 * 4
    assert traffic(program) == 6 * 4 * row + 2 * tile
    (largest,) = largest_arrays(program, 1)
    assert (str(largest.shape), largest.times) == ("bf16[6,8,128]", 6)


def test_attributes_over_several_lines():
    """As kernels of Pallas have them."""
    program = Program(
        """HloModule jit_f

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={of={
"metadata":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %s = f32[8]{0} add(%k, %p)
}
"""
    )
    found = {operation.name: operation for _, operation, _ in program.runs()}
    assert list(found) == ["p", "k", "s"] and found["k"].source == "jit(f)/kernel"


@pytest.mark.parametrize(
    ("text", "count", "padded"),
    [
        # Sides of 14 and 64 in tiles of 8 x 128.
        ("bf16[12,14,64]{2,1,0:T(8,128)(2,1)}", 12 * 14 * 64 * 2, 12 * 16 * 128 * 2),
        # The first axis is the minor one.
        ("f32[100,3]{0,1:T(4,128)}", 1200, 4 * 128 * 4),
        ("pred[7]{0}", 7, 7),
        ("f32[]", 4, 4),
    ],
)
def test_padding_of_tiles(text, count, padded):
    program = Program(f"ENTRY %main () -> {text} {{\n  ROOT %y = {text} rng()\n}}")
    (array,) = largest_arrays(program, 1)
    assert (array.shape.bytes, array.shape.padded_bytes) == (count, padded)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("fsdp",)),
        ("{{0,2,4,6},{1,3,5,7}}", ("data",)),
        ("[2,4]<=[4,2]T(1,0)", ("data",)),
        ("[4,2]<=[8]", ("fsdp",)),
        ("[1,8]<=[8]", ("data", "fsdp")),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ("fsdp",)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", ("data",)),
        ("{}", ("data", "fsdp")),
    ],
)
def test_groups_of_devices(groups, axes):
    text = (
        "ENTRY %main (x: f32[2]) -> f32[2] {\n  %x = f32[2]{0} parameter(0)\n"
        f"  ROOT %y = f32[2]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add\n}}"
    )
    (found,) = collectives(Program(text), {"data": 4, "fsdp": 2})
    assert found.axes == axes and found.group == (2 if axes == ("fsdp",) else len(axes) * 4)


def test_traffic_of_loops_on_this_device():
    """Seven products of side 256: each has three arrays of 256 KiB. On CPU a kernel is first copied
    out of the stack, and so is what goes from turn to turn: two arrays each, and two at first.
    """

    def turns(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    side = 256
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((side, side), (7, side, side))]
    moved = traffic(Program(jax.jit(turns).lower(*shapes).compile().as_text()))
    assert 7 * 3 <= moved / (4 * side * side) < 7 * 7 + 2.1


def test_what_is_no_program():
    with pytest.raises(ValueError, match="holds no compiled program"):
        Program("nothing")
