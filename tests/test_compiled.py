"""``patchpack.testing.compiled`` compiles what a launch asks for and reads what it became."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from patchpack._interpreter import interpreted
from patchpack.testing import compiled

OPTIONS = {"enable_fp_fusion": True}

# the first spills, the second is smaller than need be, the last has more stages than fit
CONFIGS = [
    triton.Config({"STEP": 64}, num_warps=4, num_stages=2, maxnreg=32),
    triton.Config({"STEP": 16}, num_warps=8, num_stages=2),
    triton.Config({"STEP": 64}, num_warps=4, num_stages=2),
    triton.Config({"STEP": 64}, num_warps=4, num_stages=16),
]


@triton.jit(do_not_specialize=["factor"])
def _scale_kernel(x_ptr, out_ptr, stride, factor, N: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, N)
    mask = tl.arange(0, N) < stride
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask) * factor, mask=mask)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, K: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    row, step = tl.arange(0, N), tl.arange(0, STEP)
    acc = tl.zeros((N, N), tl.float32)
    for start in range(0, K, STEP):
        a = tl.load(a_ptr + row[:, None] * K + start + step[None, :])
        b = tl.load(b_ptr + row[:, None] * K + start + step[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(out_ptr + row[:, None] * N + row[None, :], acc)


def scale(stride=1024, factor=2, offset=0, block=1024, **options):
    x = torch.arange(4096.0)
    out = torch.zeros(4096)
    _scale_kernel[(4,)](x[offset:], out[offset:], stride, factor, block, **OPTIONS, **options)
    return out


def matmul(size=64, depth=256, step=64, **options):
    a, b = torch.ones(2, size, depth, dtype=torch.bfloat16)
    out = torch.zeros(size, size)
    _matmul_kernel[(1,)](a, b, out, depth, size, step, **OPTIONS, **options)
    return out


@pytest.mark.parametrize("target", compiled.MULTIPROCESSORS)
def test_a_copy_loads_and_stores_wide(target):
    with compiled.session(target) as launches:
        scale(num_warps=4)
    [launch] = launches
    assert launch.kernel == "_scale_kernel"
    assert launch.target == target
    assert launch.grid == (4, 1, 1)
    assert launch.num_warps == 4
    # 1024 elements are 8 for each of 128 threads (AMD: 4 for each of 256), and a load takes 4
    per_thread = 1 if target.startswith("gfx") else 2
    assert launch.loads == launch.wide_loads == per_thread
    assert launch.stores == launch.wide_stores == per_thread
    assert launch.spills == launch.stack == launch.shared == 0
    assert launch.tensor_core == {}
    assert 0 < launch.registers <= 64
    assert 10 < launch.instructions < 200


@pytest.mark.parametrize("arguments", [{"stride": 1023}, {"offset": 1}], ids=str)
def test_arguments_that_are_not_divisible_cost_wide_accesses(arguments):
    with compiled.session("sm_90") as launches:
        scale(**arguments)
    assert launches[0].loads == 8
    assert launches[0].wide_loads == launches[0].wide_stores == 0


def test_launches_are_specialised_as_the_compiler_would():
    with compiled.session("sm_90") as launches:
        scale(factor=2)
        scale(factor=1)  # not to be specialised
        scale(factor=16)
        scale(stride=2048 // 4)
        scale(stride=1)
        scale(stride=1023)
    keys = [launch.key for launch in launches]
    assert len(set(keys[:4])) == 1
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        ("sm_120", "HMMA"),
        ("gfx942", "MFMA"),
    ],
)
def test_matrix_products_use_the_tensor_cores_of_the_target(target, kind):
    with compiled.session(target) as launches:
        matmul(num_stages=2)
    [launch] = launches
    assert list(launch.tensor_core) == [kind]
    assert launch.tensor_core[kind] > 0
    assert launch.shared > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_main_loop_is_found(target):
    with compiled.session(target) as launches:
        matmul(size=64, depth=8192, step=32)
        scale()
    product, copy = launches
    assert product.code.macs == 64 * 64 * 32  # one turn
    assert 0 < product.code.loop.total() < product.instructions
    assert product.loop["tensor"] > 0
    assert product.loop.total() == product.code.loop.total()
    assert product.constants == {"K": 8192, "N": 64, "STEP": 32}
    assert product.dtype == "bfloat16"
    assert copy.code.macs == copy.code.loop.total() == 0


def test_tensor_core_work_of_the_main_loop_is_what_its_instructions_do():
    with compiled.session("sm_80") as launches:
        matmul(size=64, depth=8192, step=32, num_warps=4)
    per_warp = 16 * 8 * 16  # of an HMMA
    assert launches[0].loop["tensor"] * per_warp * 4 == launches[0].code.macs


@pytest.mark.parametrize(
    ("target", "warps", "blocks"),
    [("sm_80", 4, 16), ("sm_120", 4, 12), ("sm_90", 8, 8), ("gfx942", 4, 8)],
)
def test_few_registers_leave_room_for_all_warps(target, warps, blocks):
    with compiled.session(target) as launches:
        scale(num_warps=warps)
    [launch] = launches
    assert launch.resident_blocks == blocks
    assert launch.occupancy == 1


def test_shared_memory_and_registers_limit_how_many_blocks_are_resident():
    with compiled.session("sm_86") as launches:
        matmul(size=64, depth=1024, step=128, num_stages=2)
        scale(block=4096, num_warps=1)
    product, copy = launches
    room = 100 * 1024
    assert product.resident_blocks == room // (product.shared + 1024)
    a_warp = -(-copy.registers * 32 // 256) * 256
    assert copy.resident_blocks == min(16, 2**16 // a_warp)


def test_matrix_instructions_are_counted():
    with compiled.session("sm_80") as launches:
        matmul(size=64, depth=64, step=64, num_warps=4)
    # 64 x 64 x 64 in products of 16 x 8 x 16, shared by 4 warps; one step, so no loop
    assert launches[0].tensor_core == {"HMMA": 64**3 // (16 * 8 * 16) // 4}


@pytest.mark.parametrize(
    ("target", "block", "limit"),
    [
        ("sm_80", 4096, {"maxnreg": 32}),
        ("sm_90", 4096, {"maxnreg": 32}),
        ("sm_100", 4096, {"maxnreg": 32}),
        ("gfx942", 8192, {"waves_per_eu": 8}),
    ],
)
def test_a_spill_is_seen(target, block, limit):
    with compiled.session(target) as launches:
        scale(block=block, num_warps=1)
        scale(block=block, num_warps=1, **limit)
    fitting, spilling = launches
    assert fitting.spills == fitting.stack == 0
    assert spilling.registers < fitting.registers
    assert spilling.stack > 0
    assert spilling.spills >= 2  # at least one store and one load


def test_too_much_shared_memory_is_an_error():
    large = {"size": 128, "step": 128, "depth": 512, "num_stages": 3}
    with compiled.session("sm_90") as launches:
        matmul(**large)
    small, large_ = (compiled.MULTIPROCESSORS[t].shared_a_block for t in ("sm_86", "sm_90"))
    assert small < launches[0].shared < large_
    with compiled.session("sm_86") as launches, pytest.raises(OutOfResources, match="shared"):
        matmul(**large)
    assert launches == []


def test_autotuning_takes_what_spills_least_and_then_what_has_least_to_do():
    tuned = triton.autotune(CONFIGS, key=["K"])(_matmul_kernel)
    a, b = torch.ones(2, 64, 1024, dtype=torch.bfloat16)
    out = torch.zeros(64, 64)
    with compiled.session("sm_90", run=True) as launches:
        tuned[(1,)](a, b, out, 1024, 64, **OPTIONS)
    [launch] = launches
    assert tuned.best_config is CONFIGS[2]
    assert (launch.constants["STEP"], launch.num_warps, launch.spills) == (64, 4, 0)
    assert (out == 1024).all()
    costs = [tuned.configs_timings[config] for config in CONFIGS]
    assert costs[0][0] > 0 == costs[1][0] == costs[2][0]
    assert costs[1][1] > costs[2][1]
    assert costs[3] == 3 * [float("inf")]


def test_launches_run_when_asked():
    with compiled.session("sm_90") as launches:
        assert not scale().any()
    with compiled.session("sm_90", run=True) as launches:
        assert torch.equal(scale(), 2 * torch.arange(4096.0))
        assert (matmul() == 256).all()
    assert [launch.kernel for launch in launches] == ["_scale_kernel", "_matmul_kernel"]


def test_an_op_that_interprets_is_compiled_in_a_session():
    with compiled.session("sm_90") as launches:
        with interpreted():
            scale()
        with interpreted():
            out = scale()
    assert len(launches) == 2
    assert not out.any()


def test_the_grid_may_be_a_function_of_the_arguments():
    x = torch.zeros(4096)
    with compiled.session("sm_90") as launches:
        _scale_kernel[lambda meta: (meta["stride"] // meta["N"], 2)](
            x, x, stride=2048, factor=1, N=1024, **OPTIONS
        )
    assert launches[0].grid == (2, 2, 1)


def test_the_driver_and_the_launches_are_as_before_after_a_session():
    active, run = driver._active, triton.JITFunction.run
    with contextlib.suppress(KeyError), compiled.session("sm_90"):
        assert driver._active is not active
        raise KeyError
    assert driver._active is active
    assert triton.JITFunction.run is run


def test_one_session_at_a_time():
    with (
        compiled.session("sm_90"),
        pytest.raises(RuntimeError, match="active already"),
        compiled.session("sm_80"),
    ):
        pass


def test_an_unknown_target_is_an_error():
    with pytest.raises(ValueError, match=r"target must be one of sm_80, .* got 'sm_20'"):
        compiled.session("sm_20").__enter__()


def test_interpreted_kernels_cannot_be_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled.session("sm_90").__enter__()


def test_a_report_has_a_line_for_each_launch():
    with compiled.session("sm_90") as launches:
        scale()
        matmul()
    header, first, second, legend = compiled.report(launches).splitlines()
    assert header.split()[:4] == ["kernel", "target", "grid", "warps"]
    assert first.split()[:4] == ["_scale_kernel", "sm_90", "4x1x1", "4"]
    assert f"{launches[1].tensor_core['HGMMA']} HGMMA" in second
    assert header.index("tensor-core") == second.index(f"{launches[1].tensor_core['HGMMA']} HGMMA")
    assert "128 bits" in legend
    assert len(compiled.report([]).splitlines()) == 2
