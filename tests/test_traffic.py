"""``patchpack.testing.traffic`` counts what kernels move and sees what they must not do."""

import contextlib
import functools

import pytest
import torch
import triton
import triton.language as tl
from marks import slow
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import patchpack
from patchpack import PackedGrid, TokenLayout, _interpreter
from patchpack.layout import FeatureMap
from patchpack.testing import traffic
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, views

# ------------------------------------------------------------------ small kernels, exact numbers


@triton.jit
def _copy_kernel(
    x_ptr, out_ptr, stride_x, stride_out, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows < num_rows) & (cols < num_cols)
    x = tl.load(x_ptr + rows * stride_x + cols, mask=mask)
    tl.store(out_ptr + rows * stride_out + cols, x, mask=mask)


def copy(x, out, *, programs=None, **changes):
    """Copy rows, two a program; ``changes`` are faults."""
    arguments = {
        "stride_x": x.stride(0),
        "stride_out": out.stride(0),
        "num_rows": len(x),
        "num_cols": x.shape[1],
    }
    programs = triton.cdiv(len(x), 2) if programs is None else programs
    _copy_kernel[(programs,)](x, out, **{**arguments, **changes}, ROWS=2, COLS=16)


def copied(x, out, **changes):
    """The launch of a ``copy``."""
    with traffic.session() as launches:
        copy(x, out, **changes)
    [launch] = launches
    return launch


CLEAN = {"out_of_bounds": 0, "uninitialised": 0, "races": 0, "unwritten": 0}


def faults(launch):
    """What a launch must not do, by name, without zeros."""
    return {name: n for name in CLEAN if (n := getattr(launch, name))}


def test_a_copy():
    x, out = torch.randn(8, 16), torch.zeros(8, 16)
    launch = copied(x, out)
    assert torch.equal(out, x)
    assert launch == traffic.Launch(
        kernel="_copy_kernel",
        grid=(4, 1, 1),
        idle=0,
        requested=2 * 512,
        sectors=2 * 512,
        read=512,
        written=512,
        arguments={
            "x_ptr": traffic.Traffic(requested=512, read=512, written=0, **CLEAN),
            "out_ptr": traffic.Traffic(requested=512, read=0, written=512, **CLEAN),
        },
        **CLEAN,
    )
    assert launch.programs == 4
    assert launch.unique == 1024


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 8), (torch.bfloat16, 2), (torch.int8, 1), (torch.bool, 1)],
    ids=str,
)
def test_elements_of_other_sizes(dtype, size):
    x, out = torch.ones(8, 16, dtype=dtype), torch.zeros(8, 16, dtype=dtype)
    launch = copied(x, out)
    assert torch.equal(out, x)
    assert (launch.read, launch.written, launch.requested) == (128 * size, 128 * size, 256 * size)
    assert faults(launch) == {}


def test_a_view_of_a_buffer():
    qkv = torch.randn(8, 3, 16).unbind(1)
    out = torch.zeros(8, 16)
    launch = copied(qkv[1], out)
    assert torch.equal(out, qkv[1])
    assert (launch.read, launch.written, launch.requested) == (512, 512, 1024)
    assert faults(launch) == {}


def test_sectors_that_an_access_touches_count_in_full():
    x = torch.randn(8, 32)[:, 7:17]  # 10 elements in 3 sectors of 8
    launch = copied(x, torch.zeros(8, 16)[:, :10])  # 10 elements in 2 sectors
    assert launch.requested == 2 * 8 * 10 * 4
    assert launch.sectors == 8 * (3 + 2) * 32


def test_a_broadcast_is_read_once_and_requested_often():
    x = torch.randn(1, 16).expand(8, 16)
    launch = copied(x, torch.zeros(8, 16))
    assert (launch.read, launch.written, launch.requested) == (64, 512, 1024)
    # two rows of a program are loaded at once
    assert launch.sectors == 4 * 64 + 512


def test_masked_lanes_do_not_count():
    x, out = torch.randn(7, 5), torch.zeros(7, 5)
    launch = copied(x, out)
    assert torch.equal(out, x)
    assert (launch.read, launch.written, launch.requested) == (140, 140, 280)
    assert launch.grid == (4, 1, 1)
    assert faults(launch) == {}


@triton.jit
def _count_kernel(values_ptr, counts_ptr, total_ptr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    values = tl.load(values_ptr + offs)
    tl.atomic_add(counts_ptr + values, 1)
    tl.atomic_add(total_ptr, tl.sum(values))


def count(counts, total):
    values = torch.arange(32, dtype=torch.int32) % 4
    with traffic.session() as launches:
        _count_kernel[(4,)](values, counts, total, N=8)
    return launches[0]


def test_atomics_of_many_programs_do_not_race():
    counts, total = torch.zeros(2, 4, dtype=torch.int32)
    launch = count(counts, total)
    assert counts.tolist() == [8] * 4
    assert total.tolist() == [48, 0, 0, 0]
    assert (launch.read, launch.written) == (128 + 16 + 4, 16 + 4)
    assert launch.requested == 128 + 2 * 4 * (8 * 4 + 4)
    assert faults(launch) == {}


def test_atomics_out_of_bounds_are_left_out():
    counts, total = torch.zeros(2, 4, dtype=torch.int32)
    launch = count(counts[:3], total)
    assert counts.tolist() == [8, 8, 8, 0]
    assert faults(launch) == {"out_of_bounds": 8}
    assert launch.arguments["counts_ptr"].out_of_bounds == 8


@triton.jit
def _swap_kernel(flags_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    expected = tl.zeros((N,), tl.int32)
    tl.atomic_cas(flags_ptr + pid * N + tl.arange(0, N), expected, expected + pid + 1)


def test_compare_and_swap():
    flags = torch.tensor([0, 7, 0, 0, 0, 0, 7, 0], dtype=torch.int32)
    with traffic.session() as launches:
        _swap_kernel[(2,)](flags[:7], N=4)
    assert flags.tolist() == [1, 7, 1, 1, 2, 2, 7, 0]
    assert (launches[0].read, launches[0].written) == (28, 28)
    assert faults(launches[0]) == {"out_of_bounds": 1}


@triton.jit
def _copy_tile_kernel(x, out_ptr, rows, COLS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    out = tl.make_tensor_descriptor(out_ptr, [rows, COLS], [COLS, 1], [ROWS, COLS])
    out.store([row, 0], x.load([row, 0]))


def copy_tiles(x, out, rows):
    """By a descriptor of the host, and one of the device that says it has ``rows``."""
    with traffic.session() as launches:
        source = TensorDescriptor.from_tensor(x, [4, 16])
        _copy_tile_kernel[(triton.cdiv(rows, 4),)](source, out, rows, COLS=16, ROWS=4)
    return launches[0]


def test_descriptors():
    x, out = torch.randn(10, 16), torch.zeros(10, 16)
    launch = copy_tiles(x, out, rows=10)
    assert torch.equal(out, x)
    assert (launch.read, launch.written, launch.requested) == (640, 640, 1280)
    assert list(launch.arguments) == ["x", "out_ptr"]
    assert faults(launch) == {}


def test_a_descriptor_of_too_many_rows_is_seen():
    assert faults(copy_tiles(torch.randn(10, 16), torch.zeros(8, 16), 10)) == {"out_of_bounds": 32}


@triton.jit
def _gather_kernel(table_ptr, out_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, N)
    x_ptr = tl.load(table_ptr + pid).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + pid * N + offs, tl.load(x_ptr + offs))


def gather(rows, out, addressed):
    table = torch.tensor([row.data_ptr() for row in rows])
    with traffic.session(*addressed) as launches:
        _gather_kernel[(len(rows),)](table, out, N=8)
    return launches[0]


def test_addresses_in_memory():
    rows, out = torch.randn(4, 12)[:, :8], torch.zeros(4, 8)
    launch = gather(rows, out, rows)
    assert torch.equal(out, rows)
    assert launch.arguments["addressed[0]"].read == 128
    assert faults(launch) == {}


def test_addresses_that_lead_elsewhere_are_seen():
    rows, out = torch.randn(4, 12)[:, :8], torch.zeros(4, 8)
    assert faults(gather(rows, out, [])) == {"out_of_bounds": 32}
    assert faults(gather(rows, out, rows[:3])) == {"out_of_bounds": 8}
    assert faults(gather([row[1:] for row in rows], out, rows)) == {"out_of_bounds": 4}


# ------------------------------------------------------------------------------- planted faults


def test_an_overrun_is_seen_and_touches_nothing():
    x, out = torch.randn(16, 16), torch.zeros(16, 16)
    launch = copied(x[:8], out[:8], num_rows=9, programs=5)
    assert faults(launch) == {"out_of_bounds": 2 * 16}
    assert {name: x.out_of_bounds for name, x in launch.arguments.items()} == {
        "x_ptr": 16,
        "out_ptr": 16,
    }
    assert not out[8].any()


def test_an_overrun_into_another_argument_is_seen():
    both = torch.randn(16, 16)
    launch = copied(both[8:], both[:8], num_rows=9, programs=5, stride_x=0)
    assert launch.arguments["out_ptr"].out_of_bounds == 16


@pytest.mark.parametrize("offset", [-(2**40), 2**44, 2**55, -(2**59)])
def test_wild_pointers_are_seen(offset):
    out = torch.zeros(8, 16)
    launch = copied(torch.randn(8, 16), out, stride_x=offset)
    assert faults(launch)["out_of_bounds"] == 7 * 16  # the first row has no offset
    assert not out[1:].any()


def test_a_read_between_the_rows_of_a_view_is_seen():
    q, _, v = torch.randn(8, 3, 16).unbind(1)
    assert faults(copied(q, torch.zeros(8, 16))) == {}
    launch = copied(q, torch.zeros(8, 16), stride_x=q.stride(0) // 3)  # every third row is of q
    assert faults(launch) == {"out_of_bounds": 5 * 16}
    assert faults(copied(v, torch.zeros(8, 16), stride_x=48)) == {}


@triton.jit
def _misaligned_kernel(x_ptr, out_ptr):
    inside = (x_ptr.to(tl.int64) + 2).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(inside))


def test_a_lane_across_elements_is_seen():
    with traffic.session() as launches:
        _misaligned_kernel[(1,)](torch.zeros(8), torch.zeros(1))
    assert faults(launches[0]) == {"out_of_bounds": 1}


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(8, 16),
        lambda x: torch.empty_like(x),
        lambda x: torch.empty_strided((8, 16), (16, 1)),
        lambda x: x.new_empty(8, 16),
        lambda x: x.new_empty_strided((8, 16), (16, 1)),
    ],
)
def test_scratch_that_nothing_wrote_is_seen(allocate):
    x = torch.zeros(8, 16)
    with traffic.session() as launches:
        copy(allocate(x), x)
        copy(x, allocate(x))
    assert faults(launches[0]) == {"uninitialised": 512, "unwritten": 512}
    assert faults(launches[1]) == {}


def test_scratch_that_an_earlier_launch_wrote_is_fine():
    x = torch.randn(8, 16)
    with traffic.session() as launches:
        scratch, out = x.new_empty(2, 8, 16)
        copy(x, scratch)
        copy(scratch, out)
    assert torch.equal(out, x)
    assert [faults(launch) for launch in launches] == [{}, {}]


def test_a_row_of_scratch_that_an_earlier_launch_left_out_is_seen():
    x = torch.randn(8, 16)
    with traffic.session() as launches:
        scratch, out = x.new_empty(2, 8, 16)
        copy(x, scratch, num_rows=7)
        copy(scratch, out)
    assert [faults(launch) for launch in launches] == [{"unwritten": 64}, {"uninitialised": 64}]


WRITES = {
    "fill_": lambda x: x.fill_(1),
    "set": lambda x: x.__setitem__(slice(None), 1),
    "copy_": lambda x: x.copy_(torch.ones(8, 16)),
    "out=": lambda x: torch.add(torch.ones(8, 16), 1, out=x),
    "foreach": lambda x: torch._foreach_zero_([x]),
}


@pytest.mark.parametrize("write", WRITES)
def test_operators_write_too(write):
    with traffic.session() as launches:
        x = torch.empty(8, 16)
        WRITES[write](x)
        copy(x, torch.zeros(8, 16))
        y = torch.empty(8, 16)
        WRITES["fill_"](y[:, 3:])
        copy(y, torch.zeros(8, 16))
    assert [faults(launch) for launch in launches] == [{}, {"uninitialised": 96, "unwritten": 96}]


def test_halves_of_a_value_are_told_apart():
    with traffic.session() as launches:
        x = torch.empty(8, 16, dtype=torch.int16)
        copy(torch.ones(8, 8, dtype=torch.int16), x[:, ::2].as_strided((8, 8), (16, 1)))
        copy(x.view(torch.int32), torch.zeros(8, 8, dtype=torch.int32))
    assert launches[1].uninitialised == 8 * 8 * 2


def test_two_programs_that_write_one_row_are_seen():
    out = torch.zeros(8, 16)
    launch = copied(torch.randn(8, 16), out, stride_out=16, programs=4, num_rows=7)
    assert faults(launch) == {}
    assert faults(copied(torch.ones(8, 16), out, stride_out=8))["races"] > 0
    # rows 0 and 1 of programs 0 to 3, all to one place; and in a program the rows differ
    assert faults(copied(torch.randn(8, 16), out, stride_out=0)) == {"races": 64}
    assert faults(copied(torch.randn(2, 16), out[:2], stride_out=0)) == {"races": 64}
    assert faults(copied(torch.ones(2, 16), out[:2], stride_out=0)) == {}


@pytest.mark.parametrize("shift", [2, -2])
def test_a_program_that_reads_what_another_writes_is_seen(shift):
    buffer = torch.randn(12, 16)
    x, out = buffer[2:10], buffer[2 + shift : 10 + shift]
    assert faults(copied(x, out)) == {"races": 6 * 64}  # of 8 rows, 6 are read and written
    assert faults(copied(x, x)) == {}


@triton.jit
def _reset_kernel(total_ptr):
    pid = tl.program_id(0)
    if pid == 1:
        tl.store(total_ptr, 0)
    else:
        tl.atomic_add(total_ptr, 1)


def test_an_atomic_and_a_store_race():
    with traffic.session() as launches:
        _reset_kernel[(2,)](torch.zeros(1, dtype=torch.int32))
    assert faults(launches[0]) == {"races": 4}


def test_idle_programs_are_counted():
    assert copied(torch.randn(8, 16), torch.zeros(8, 16), programs=7).idle == 3
    assert copied(torch.randn(8, 16), torch.zeros(8, 16), num_cols=0).idle == 4


def test_an_output_that_is_not_fully_written_is_seen():
    x = torch.randn(8, 16)
    with traffic.session() as launches:
        copy(x, torch.empty(8, 16), programs=3)
        copy(x, torch.empty(8, 24)[:, :16])  # what no launch gets, no launch owes
    assert [faults(launch) for launch in launches] == [{"unwritten": 128}, {}]
    assert launches[0].arguments["out_ptr"].unwritten == 128
    assert launches[0].arguments["x_ptr"].unwritten == 0


def test_what_is_written_later_is_written():
    x = torch.randn(8, 16)
    with traffic.session() as launches:
        out = torch.empty(8, 16)
        copy(x[:4], out)
        assert faults(launches[0]) == {"unwritten": 256}
        copy(x[4:6], out[4:])
        out[6:] = 0
    assert [faults(launch) for launch in launches] == [{}, {}]


# ------------------------------------------------------------------------------------ a session


def test_arguments_that_are_one_tensor_share_an_entry():
    x = torch.randn(8, 16)
    launch = copied(x, x)
    assert list(launch.arguments) == ["x_ptr+out_ptr"]
    assert (launch.read, launch.written) == (512, 512)


def test_views_of_one_buffer_are_counted_once():
    buffer = torch.randn(9, 16)
    launch = copied(buffer[:8], buffer[1:])
    assert (launch.read, launch.written) == (512, 512)
    # each sees what happens to its own elements
    assert launch.arguments["x_ptr"].written == launch.arguments["out_ptr"].read == 7 * 64


def test_all_is_as_before_after_a_session():
    builder, convert = interpreter.interpreter_builder, interpreter._implicit_cvt
    before = type(builder), convert, triton.JITFunction.run, _interpreter.interpreted
    with contextlib.suppress(KeyError), traffic.session():
        copy(torch.randn(8, 16), torch.zeros(8, 16))
        raise KeyError
    after = type(builder), interpreter._implicit_cvt, triton.JITFunction.run
    assert (*after, _interpreter.interpreted) == before
    with traffic.session() as launches, pytest.raises(interpreter.InterpreterError):
        copy(torch.randn(8, 16), torch.zeros(8, 16), num_rows="eight")
    assert type(builder) is before[0]
    assert launches == []


def test_one_session_at_a_time():
    with (
        traffic.session(),
        pytest.raises(RuntimeError, match="active already"),
        traffic.session(),
    ):
        pass


def test_a_report_has_a_line_for_each_launch():
    x = torch.randn(8, 16)
    with traffic.session() as launches:
        copy(x, torch.empty(8, 16), programs=3)
        copy(x, torch.empty(8, 16))
    header, first, second, legend = traffic.report(launches).splitlines()
    assert header.split()[:3] == ["kernel", "grid", "idle"]
    values = dict(zip(header.split(), first.split(), strict=True))
    assert (values["kernel"], values["grid"]) == ("_copy_kernel", "3x1x1")
    assert (values["requested"], values["read"], values["unwritten"]) == ("768", "384", "128")
    assert second.split()[-1] == "0"
    assert "bytes" in legend
    assert len(traffic.report([]).splitlines()) == 2


def test_compulsory_bytes():
    x = torch.zeros(8, 16)
    assert traffic.compulsory(x) == traffic.compulsory(x, x.T, [x[:4]], {"a": (x[2:],)}) == 512
    assert traffic.compulsory(x, torch.zeros(8, 16)) == 1024
    assert traffic.compulsory(x[:, ::2], x[0, :2]) == 256 + 4
    assert traffic.compulsory(x[:1].expand(8, 16)) == 64
    assert traffic.compulsory(x[:0], None, 3, "text", torch.zeros(())) == 4
    grid = PackedGrid([(4, 4), (2, 2)])
    assert traffic.compulsory(grid, {"grid": grid}) == 3 * 3 * 8
    assert traffic.compulsory(torch.zeros(8, 16, dtype=torch.bfloat16)) == 256


def rope_inputs():
    q, k = torch.randn(2, 16, 4, 8)
    return {"q": q, "k": k, "cos": torch.rand(16, 4), "sin": torch.rand(16, 4)}


def test_an_op_is_measured_against_its_definition():
    forward, backward = traffic.measure(
        patchpack.rope, rope_inputs(), grads=("q", "k"), needs=("cos", "sin")
    )
    assert forward.compulsory == backward.compulsory == 4 * 16 * 4 * 8 * 4 + 2 * 16 * 4 * 4
    for totals in (forward, backward):
        [launch] = totals.launches
        assert launch.kernel == "_rotate_kernel"
        assert totals.unique_ratio == launch.unique / totals.compulsory == 1
        assert totals.requested_ratio == launch.requested / totals.compulsory


def test_less_may_be_compulsory_than_all_arguments():
    inputs = rope_inputs()
    forward, backward = traffic.measure(patchpack.rope, inputs, reads=(inputs["q"], inputs["k"]))
    assert forward.compulsory == 4 * 16 * 4 * 8 * 4
    assert forward.unique_ratio > 1
    assert backward.launches == ()


# --------------------------------------------------------------------------------- the real ops


F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
SUBJECTS = [Subject(op, case, F32) for op, spec in SPECS.items() for case in spec.cases]
SUBJECTS += [Subject(op, case, BF16) for op, spec in SPECS.items() for case in list(spec.cases)[:2]]
# what has kernels of its own in half precision
SUBJECTS += [
    Subject("varlen_attention", case, BF16)
    for case in ("few queries, many keys", "rotated, short segments", "rotated, head size 128")
]
FIRST = {(x.op, x.dtype): x for x in reversed(SUBJECTS)}.values()


@pytest.mark.parametrize(
    "subject",
    [*FIRST, *slow(x for x in SUBJECTS if x not in FIRST)],
    ids=lambda x: f"{x.op}-{x.case}-{x.dtype}",
)
def test_ops_touch_what_is_theirs_alone(subject):
    """Inputs are views, so that there are gaps to run into."""
    inputs = views(subject.inputs())
    forward, backward = traffic.measure(subject.spec.op, inputs, grads=subject.spec.grads)
    launches = forward.launches + backward.launches
    assert launches
    found = [faults(launch) for launch in launches]
    for fault, reader in zip(found, launches[1:], strict=False):
        if reader.kernel == "_sum_chunks_kernel":  # parts of few queries do not fill their room
            fault.pop("unwritten", None)
    assert not any(found), traffic.report(launches)


SIZES = [(4, 16), (12, 8), (2, 18), (10, 6)]  # 256 patches


def heads(num_q_heads, num_k_heads, head_dim, dtype):
    q = torch.randn(64, num_q_heads, head_dim).to(dtype)
    return {"q": q, "k": torch.randn(64, num_k_heads, head_dim).to(dtype)}


def rope(dtype, num_heads=(28, 4), head_dim=128):
    cos, sin = torch.rand(2, 64, head_dim // 2)  # always in float32
    inputs = heads(*num_heads, head_dim, dtype) | {"cos": cos, "sin": sin}
    return {"inputs": inputs, "grads": ("q", "k"), "needs": ("cos", "sin")}


def rope_2d(dtype, head_dim=80, **options):
    inputs = heads(16, 16, head_dim, dtype) | {"grid": PackedGrid([(4, 10), (6, 4)], 2), **options}
    return {"inputs": inputs, "grads": ("q", "k"), "needs": ("grid",)}


def mrope(dtype):
    positions = torch.randint(1000, (3, 64))
    inputs = heads(28, 4, 128, dtype) | {"position_ids": positions, "mrope_section": (16, 24, 24)}
    return {"inputs": inputs, "grads": ("q", "k"), "needs": ("position_ids",)}


def merge_tokens(dtype, channels, merge, **options):
    inputs = {"x": torch.randn(256, channels).to(dtype), "grid": PackedGrid(SIZES, merge)}
    return {"inputs": inputs | options, "grads": ("x",), "needs": ("grid",)}


def patchify(dtype, pixel, temporal=1, frames=1, sizes=((16, 16), (8, 12))):
    images = [torch.rand(frames, 3, 14 * h, 14 * w).mul(255).to(pixel) for h, w in sizes]
    inputs = {"images": images, "grid": PackedGrid(sizes, 2), "patch_size": 14, "dtype": dtype}
    inputs |= {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    inputs["temporal_patch_size"] = temporal
    grads = ("images",) if pixel.is_floating_point else ()
    return {"inputs": inputs, "grads": grads, "needs": ("grid",)}


def scatter_tokens(dtype):
    embeds, tokens = torch.randn(1, 256, 1536).to(dtype), torch.randn(160, 1536).to(dtype)
    index = torch.randperm(256)[:160]
    kept = torch.ones(256, dtype=torch.bool).index_fill(0, index, False)
    return {
        "inputs": {"embeds": embeds, "tokens": tokens, "index": index},
        "grads": ("embeds", "tokens"),
        "needs": ("index",),
        "reads": (embeds[:, kept], tokens, index),
    }


def assemble(dtype):
    layout = TokenLayout([FeatureMap(128 * i, (8, 16)) for i in range(2)])
    inputs = {"tokens": torch.randn(256, 1152).to(dtype), "vectors": None, "layout": layout}
    return {"inputs": inputs, "grads": ("tokens",), "needs": ("layout",)}


ELEMENTWISE = {
    "rope, Qwen2.5, float32": lambda: rope(F32),
    "rope, Qwen2.5, bfloat16": lambda: rope(BF16),
    "rope, vision, bfloat16": lambda: rope(BF16, (16, 16), 80),
    "rope_2d, Qwen2-VL, float32": lambda: rope_2d(F32),
    "rope_2d, Qwen2-VL, bfloat16": lambda: rope_2d(BF16),
    "rope_2d, MoonViT, bfloat16": lambda: rope_2d(BF16, 72, axes="paired", interleaved=True),
    "mrope, Qwen2-VL, bfloat16": lambda: mrope(BF16),
    "merge_tokens, Qwen3-VL": lambda: merge_tokens(BF16, 1152, 2),
    "merge_tokens, InternVL": lambda: merge_tokens(BF16, 1024, 1, merge_size=2, order="column"),
    "patchify, bytes": lambda: patchify(BF16, U8),
    "patchify, a clip": lambda: patchify(BF16, U8, 2, 2),
    "patchify, a photo twice": lambda: patchify(BF16, U8, 2),
    "patchify, floating": lambda: patchify(F32, F32),
    "scatter_tokens": lambda: scatter_tokens(BF16),
    "assemble": lambda: assemble(BF16),
}
ONCE = {name.partition(",")[0]: name for name in reversed(ELEMENTWISE)}.values()  # an op each


@functools.cache
def measured(name):
    op = getattr(patchpack, name.partition(",")[0])
    return [totals for totals in traffic.measure(op, **ELEMENTWISE[name]()) if totals.launches]


@pytest.mark.parametrize("name", [*ONCE, *slow(name for name in ELEMENTWISE if name not in ONCE)])
def test_elementwise_ops_move_every_byte_once(name):
    for totals in measured(name):
        assert totals.unique_ratio == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ops_request_every_byte_once(name):
    for totals in measured(name):
        assert totals.requested_ratio <= 1.05


@pytest.mark.parametrize("case", ["Qwen2-VL", "causal, GQA", "empty segments", "rows past the end"])
def test_attention_has_few_idle_programs(case):
    spec = SPECS["varlen_attention"]
    inputs = spec.make_inputs(case, F32)
    most = len(inputs["cu_seqlens_q"])  # one a segment, and one for what follows the last
    for totals in traffic.measure(spec.op, inputs, grads=spec.grads):
        for launch in totals.launches:
            assert launch.idle <= most * inputs["q"].shape[1]
