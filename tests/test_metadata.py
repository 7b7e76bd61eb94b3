"""Metadata against transformers and plain loops, and that it leaves the device alone."""

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack import PackedGrid, _dispatch, metadata
from patchpack.metadata import (
    get_mrope_position_ids,
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
    validate_vision_tokens,
)
from patchpack.packing import _grid
from patchpack.testing import contract

pytestmark = pytest.mark.usefixtures("with_and_without_extension")

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


def golden(function):
    """All cases of ``function``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == function]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Vision encoder ----------------------------------------------------------------------------------


@golden("qwen2vl.cu_seqlens")
def test_segments_are_the_originals(inputs, outputs):
    cu_seqlens = get_vision_cu_seqlens(torch.tensor(inputs["grid_thw"]))
    assert cu_seqlens.tolist() == outputs["cu_seqlens"]
    assert str(cu_seqlens.dtype) == f"torch.{outputs['dtype']}"


@golden("qwen2vl.rot_pos_ids")
def test_rows_and_columns_are_the_originals(inputs, outputs):
    position_ids = get_vision_position_ids(torch.tensor(inputs["grid_thw"]), inputs["merge"])
    assert position_ids.tolist() == outputs["hw_ids"]


@golden("pixtral.position_ids")
def test_pixtral_numbers_the_cells_of_a_table(inputs, outputs):
    grid_thw = torch.tensor([[1, h, w] for h, w in inputs["grids"]])
    row, col = get_vision_position_ids(grid_thw, 1).unbind(1)
    assert (row * inputs["max_width"] + col).tolist() == outputs["ids"]


@golden("qwen25vl.window_index")
def test_windows_are_the_originals(inputs, outputs):
    window_index, cu_window_seqlens = get_vision_window_index(
        torch.tensor(inputs["grid_thw"]),
        inputs["merge"],
        inputs["window_size"],
        inputs["patch"],
    )
    assert window_index.tolist() == outputs["window_index"]
    assert cu_window_seqlens.tolist() == outputs["cu_window_seqlens"]
    assert cu_window_seqlens.dtype == torch.int32


def test_golden_windows_of_a_clip_and_an_image():
    _, cu_window_seqlens = get_vision_window_index(
        torch.tensor([[2, 10, 6], [1, 4, 4]]), 2, window_size=112, patch_size=14
    )
    assert cu_window_seqlens.tolist() == [0, 48, 60, 108, 120, 136]


M = st.integers(1, 3)
SIZES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5
)
INTEGERS = st.sampled_from([torch.int64, torch.int32])


def grid_of(sizes, m, dtype=torch.int64):
    return torch.tensor([(t, h * m, w * m) for t, h, w in sizes], dtype=dtype)


@settings(deadline=None)
@given(SIZES, st.lists(M, min_size=5, max_size=5), st.booleans(), INTEGERS)
def test_results_are_those_of_transformers(sizes, merges, flag, dtype):
    theirs = pytest.importorskip("transformers.vision_utils")
    m = merges[0]
    grid_thw = grid_of(sizes, m, dtype)

    def same(got, want):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype

    same(get_vision_cu_seqlens(grid_thw, flag), theirs.get_vision_cu_seqlens(grid_thw, flag))
    same(
        get_vision_position_ids(grid_thw, m, flag),
        theirs.get_vision_position_ids(grid_thw, m, flag),
    )
    merges = torch.tensor(merges[: len(sizes)], dtype=dtype)
    each = torch.cat([grid_thw[:, :1], grid_thw[:, 1:] * merges[:, None]], dim=1)
    same(
        get_vision_position_ids(each, merges, flag),
        theirs.get_vision_position_ids(each, merges, flag),
    )
    for side in (1, 2, 4):
        # the original rounds a window down to whole merged tokens
        arguments = (m, side * m * 14 + 13, 14)
        pairs = zip(
            get_vision_window_index(grid_thw, *arguments),
            theirs.get_vision_window_index(grid_thw, *arguments),
            strict=True,
        )
        for got, want in pairs:
            same(got, want)


@settings(deadline=None)
@given(SIZES, M, st.integers(1, 5))
def test_windows_are_those_of_the_loop(sizes, m, side):
    order, lengths, first = [], [], 0
    for t, h, w in sizes:
        for _ in range(t):
            for top, left in itertools.product(range(0, h, side), range(0, w, side)):
                rows, cols = range(top, min(top + side, h)), range(left, min(left + side, w))
                order += [first + row * w + col for row, col in itertools.product(rows, cols)]
                lengths.append(len(rows) * len(cols) * m * m)
            first += h * w
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_of(sizes, m), m, window_size=16 * m * side, patch_size=16
    )
    assert window_index.tolist() == order
    assert cu_window_seqlens.tolist() == [0, *itertools.accumulate(lengths)]


@given(SIZES, M, st.booleans())
def test_a_packed_grid_says_the_same(sizes, m, merge_temporal):
    grid = PackedGrid(grid_of(sizes, m), m, merge_temporal)
    assert torch.equal(get_vision_cu_seqlens(grid.grid_thw, merge_temporal), grid.cu_seqlens)
    assert torch.equal(get_vision_position_ids(grid.grid_thw, m), grid.position_ids)


def test_no_images_have_no_metadata():
    none = torch.empty(0, 3, dtype=torch.int64)
    for merge_temporal in (False, True):
        assert get_vision_cu_seqlens(none, merge_temporal).tolist() == [0]
    assert get_vision_position_ids(none, 2).shape == (0, 2)
    assert get_vision_position_ids(none, 2, include_temporal=True).shape == (0, 3)
    window_index, cu_window_seqlens = get_vision_window_index(none, 2, 112, 14)
    assert window_index.shape == (0,)
    assert cu_window_seqlens.tolist() == [0]


GRID_THW = torch.tensor([[2, 10, 6], [1, 4, 4]])
# each function with the lengths that a device needs
CALLS = {
    "cu_seqlens": (get_vision_cu_seqlens, (), {"num_segments": 3}),
    "clips": (get_vision_cu_seqlens, (True,), {}),
    "position_ids": (get_vision_position_ids, (2,), {"num_tokens": 136}),
    "with frames": (get_vision_position_ids, (2, True), {"num_tokens": 136}),
    "windows": (get_vision_window_index, (2, 112, 14), {"num_tokens": 136, "num_windows": 5}),
}


def listed(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("call", CALLS)
def test_the_device_is_not_waited_for(call):
    function, arguments, lengths = CALLS[call]
    want = listed(function(GRID_THW, *arguments))
    on_device = GRID_THW.clone().as_subclass(contract._OnDevice)
    got = listed(function(on_device, *arguments, **lengths))
    # meta tensors have no values to read, and refuse to meet a tensor of the CPU
    meta = listed(function(GRID_THW.to("meta"), *arguments, **lengths))
    for x, shape, y in zip(got, meta, want, strict=True):
        assert torch.equal(x.as_subclass(torch.Tensor), y)
        assert (shape.shape, shape.dtype, shape.device.type) == (y.shape, y.dtype, "meta")
    if lengths:
        with pytest.raises(AssertionError, match="the host waits for the device"):
            function(on_device, *arguments)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "clips"])
def test_a_device_needs_lengths(call):
    function, arguments, lengths = CALLS[call]
    for name in lengths:
        others = {other: n for other, n in lengths.items() if other != name}
        with pytest.raises(ValueError, match=f"{name} must be given for grid_thw on meta: count"):
            function(GRID_THW.to("meta"), *arguments, **others)


@pytest.mark.parametrize("call", CALLS)
def test_a_length_that_does_not_fit_stays_within_the_tokens(call):
    function, arguments, lengths = CALLS[call]
    want = listed(function(GRID_THW, *arguments))
    for change in (-1, 40) if lengths else ():
        changed = {name: n + change for name, n in lengths.items()}
        for got, right in zip(listed(function(GRID_THW, *arguments, **changed)), want, strict=True):
            common = min(len(got), len(right))
            assert torch.equal(got[:common], right[:common])
            if got.dtype == torch.int32:  # bounds: an attention kernel reads no further
                assert (got[common:] == right[-1]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
def test_a_gpu_says_what_the_host_says(call):
    function, arguments, lengths = CALLS[call]
    on_device = GRID_THW.cuda()
    with contract.no_sync():
        got = listed(function(on_device, *arguments, **lengths))
    for x, y in zip(got, listed(function(GRID_THW, *arguments)), strict=True):
        assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_does_not_matter(call):
    function, arguments, _ = CALLS[call]
    want = listed(function(GRID_THW, *arguments))
    with torch.device("meta"):
        got = listed(function(GRID_THW, *arguments))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (get_vision_cu_seqlens, ([[1, 2, 2]],), TypeError, "grid_thw must be a tensor, got list"),
        (
            get_vision_cu_seqlens,
            (GRID_THW[0],),
            ValueError,
            "grid_thw must have shape [*, 3], got [3]",
        ),
        (
            get_vision_cu_seqlens,
            (GRID_THW.float(),),
            TypeError,
            "grid_thw must be int64 or int32, got float32",
        ),
        (get_vision_cu_seqlens, (GRID_THW, 1), TypeError, "merge_temporal must be a bool, got 1"),
        (
            get_vision_cu_seqlens,
            (GRID_THW * 0,),
            ValueError,
            "grid_thw[0] must be at least 1 on every axis, got [0, 0, 0]",
        ),
        (
            get_vision_cu_seqlens,
            (GRID_THW * 2**11,),
            ValueError,
            "grid_thw must hold fewer than 2**31 tokens, got 1168231104512",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, 4),
            ValueError,
            "grid_thw[0] must have rows and columns that divide by spatial_merge_size=4,"
            " got [2, 10, 6]",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, torch.tensor([2, 3])),
            ValueError,
            "grid_thw[1] must have rows and columns that divide by spatial_merge_size=3,"
            " got [1, 4, 4]",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, torch.tensor([2, 0])),
            ValueError,
            "spatial_merge_size[1] must be at least 1, got 0",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, torch.tensor([2])),
            ValueError,
            "spatial_merge_size must have shape [2], got [1]",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, torch.tensor([2.0, 2.0])),
            TypeError,
            "spatial_merge_size must be int64 or int32, got float32",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, torch.tensor([2, 2], device="meta")),
            ValueError,
            "spatial_merge_size must be on the device of grid_thw, cpu, got meta",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, 0),
            ValueError,
            "spatial_merge_size must be at least 1, got 0",
        ),
        (
            get_vision_position_ids,
            (GRID_THW, 2, None),
            TypeError,
            "include_temporal must be a bool, got None",
        ),
        (
            get_vision_window_index,
            (GRID_THW, 2, 27, 14),
            ValueError,
            "window_size must be at least the 28 pixels of a merged token, got 27",
        ),
        (
            get_vision_window_index,
            (GRID_THW, 2, 112, 14.0),
            TypeError,
            "patch_size must be an integer, got 14.0",
        ),
        (
            get_vision_window_index,
            (GRID_THW, 4, 112, 14),
            ValueError,
            "grid_thw[0] must have rows and columns that divide by spatial_merge_size=4,"
            " got [2, 10, 6]",
        ),
    ],
)
def test_what_does_not_fit_is_named(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (-1, ValueError, "num_tokens must be at least 0, got -1"),
        (4.0, TypeError, "num_tokens must be an integer, got 4.0"),
    ],
)
def test_a_length_is_a_count(length, error, message):
    with pytest.raises(error) as raised:
        get_vision_position_ids(GRID_THW, 2, num_tokens=length)
    assert str(raised.value) == message


# Multimodal rotary position embedding ------------------------------------------------------------

START, END, IMAGE, VIDEO, TEXT = 1, 2, 3, 4, 10
TOKEN_IDS = {"vision_start_token_id": START, "image_token_id": IMAGE, "video_token_id": VIDEO}


def rows_of(grids):
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


@golden("qwen2vl.get_rope_index")
def test_positions_are_the_originals(inputs, outputs):
    ids = inputs["ids"]
    parts = [part for part in inputs["parts"] if isinstance(part, list)]
    grids = {
        name: rows_of([part[1] for part in parts if part[0] == kind])
        for name, kind in (("image_grid_thw", "I"), ("video_grid_thw", "V"))
    }
    position_ids, deltas = get_mrope_position_ids(
        torch.tensor(inputs["input_ids"]),
        **grids,
        vision_start_token_id=ids["vision_start"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
    )
    assert position_ids.tolist() == outputs["thw"]
    assert deltas.tolist() == [[outputs["delta"]]]


QWEN_IDS = {
    "vision_start_token_id": 151652,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


@golden("qwen2vl.get_rope_index_padded")
def test_positions_of_a_padded_batch_are_the_originals(inputs, outputs):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    position_ids, deltas = get_mrope_position_ids(**tensors, **QWEN_IDS)
    assert position_ids.tolist() == outputs["thw"]
    assert deltas.flatten().tolist() == outputs["delta"]


@golden("qwen25vl.get_rope_index_time")
def test_positions_that_count_seconds_are_the_originals(inputs, outputs):
    assert inputs["parts"] == "2 text + video(4,2,2) + 2 text"
    position_ids, _ = get_mrope_position_ids(
        torch.tensor([TEXT, TEXT, START, *[VIDEO] * 4, END, TEXT, TEXT]),
        video_grid_thw=torch.tensor([[4, 2, 2]]),
        second_per_grid_ts=torch.tensor([inputs["second_per_grid_t"]]),
        tokens_per_second=inputs["tokens_per_second"],
        **TOKEN_IDS,
    )
    assert position_ids.tolist() == outputs["v4_49"]


@golden("qwen3vl.get_rope_index_video")
def test_positions_of_frames_apart_are_the_originals(inputs, outputs):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    position_ids, deltas = get_mrope_position_ids(**tensors, **QWEN_IDS, split_frames=True)
    assert position_ids.tolist() == outputs["thw"]
    assert deltas.tolist() == [[outputs["delta"]]]


SECONDS = st.sampled_from([0.04, 0.1, 1 / 3, 0.5, 1.0, 1.5, 2.0, 7.77])


class Sample:
    """Text, images and videos of one sample: tokens, grids, and positions by a plain loop.

    A video is one run whose frames count seconds, or one run a frame.
    """

    def __init__(self, parts, m, tokens_per_second, split_frames):
        self.ids, self.positions, self.images, self.videos, self.seconds = [], [], [], [], []
        for kind, size, seconds in parts:
            if kind == "text":
                self.ids += [TEXT]
                self._advance([(0, 0, 0)])
                continue
            t, h, w = size if kind == "video" else (1, *size[1:])
            (self.videos if kind == "video" else self.images).append((t, h * m, w * m))
            self.seconds += [seconds] if kind == "video" else []
            runs = [range(1)] * t if kind == "video" and split_frames else [range(t)]
            for frames in runs:
                self.ids += [START, *[IMAGE if kind == "image" else VIDEO] * (len(frames) * h * w)]
                self._advance([(0, 0, 0)])
                # as the original: float32, multiplied one after the other, rounded toward zero
                times = (torch.tensor(frames) * seconds * tokens_per_second).long().tolist()
                times = times if kind == "video" else frames
                self._advance(list(itertools.product(times, range(h), range(w))))
                self.ids += [END]
                self._advance([(0, 0, 0)])

    def _advance(self, counts):
        start = 1 + max((max(position) for position in self.positions), default=-1)
        self.positions += [tuple(start + n for n in count) for count in counts]


PARTS = st.lists(
    st.tuples(
        st.sampled_from(["text", "image", "video"]), st.tuples(*[st.integers(1, 4)] * 3), SECONDS
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(
    st.lists(PARTS, min_size=1, max_size=3),
    M,
    st.sampled_from([1, 2, 4, 2.5]),
    st.sampled_from(["one", "seconds", "split"]),
    st.sampled_from(["left", "right", "packed"]),
)
def test_positions_are_those_of_the_loop(batch, m, tokens_per_second, time, layout):
    split_frames = time == "split"
    if time == "one":
        batch = [[(*part[:2], 1.0) for part in parts] for parts in batch]
    samples = [Sample(parts, m, tokens_per_second, split_frames) for parts in batch]
    lengths = [len(sample.ids) for sample in samples]

    call = {
        "image_grid_thw": rows_of([grid for s in samples for grid in s.images]),
        "video_grid_thw": rows_of([grid for s in samples for grid in s.videos]),
        "split_frames": split_frames,
        "merge_size": m,
        **TOKEN_IDS,
    }
    if time == "seconds":
        seconds = [second for s in samples for second in s.seconds]
        call["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
    positions = [torch.tensor(s.positions).T for s in samples]
    ends = [int(x.max()) + 1 for x in positions]
    if layout == "packed":
        ids = torch.tensor([token for s in samples for token in s.ids])
        bounds = [0, *itertools.accumulate(lengths)]
        call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        want = torch.cat(positions, dim=1)
        next_minus_length = [end - n for end, n in zip(ends, lengths, strict=True)]
    else:
        longest = max(lengths)
        ids = torch.full((len(samples), longest), VIDEO)
        want = torch.ones(3, len(samples), longest, dtype=torch.int64)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for i, (s, n) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(longest - n, longest) if layout == "left" else slice(0, n)
            ids[i, place], mask[i, place] = torch.tensor(s.ids), True
            want[:, i, place] = positions[i]
        call["attention_mask"] = mask
        next_minus_length = [end - longest for end in ends]

    validate_vision_tokens(ids, **call)
    position_ids, deltas = get_mrope_position_ids(ids, **call, tokens_per_second=tokens_per_second)
    assert position_ids.dtype == deltas.dtype == torch.int64
    assert torch.equal(position_ids, want)
    assert deltas.flatten().tolist() == next_minus_length


@settings(deadline=None, max_examples=30)
@given(PARTS)
def test_positions_of_frames_apart_are_those_of_transformers(parts):
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    theirs = modeling.Qwen3VLModel

    class Model:
        get_vision_position_ids = theirs.get_vision_position_ids

        class config:  # noqa: N801
            class vision_config:  # noqa: N801
                spatial_merge_size = 2

    sample = Sample(parts, 2, 1, split_frames=True)
    ids = torch.tensor([sample.ids])
    grids = {
        "image_grid_thw": rows_of(sample.images),
        "video_grid_thw": rows_of(sample.videos),
    }
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    want = theirs.get_rope_index(Model(), ids, kinds, **grids)
    got = get_mrope_position_ids(ids, **grids, **TOKEN_IDS, split_frames=True)
    assert all(map(torch.equal, got, want))


def test_half_a_second_is_not_none():
    """transformers 4.57.1 made an integer of it first."""
    position_ids, _ = get_mrope_position_ids(
        torch.tensor([START, *[VIDEO] * 3, END]),
        video_grid_thw=torch.tensor([[3, 2, 2]]),
        second_per_grid_ts=torch.tensor([0.5]),
        tokens_per_second=2,
        **TOKEN_IDS,
    )
    assert position_ids[0].tolist() == [0, 1, 2, 3, 4]


def test_seconds_are_multiplied_in_their_own_dtype():
    times = {}
    for dtype in (torch.float32, torch.float64):
        seconds = torch.tensor([0.7], dtype=dtype)
        position_ids, _ = get_mrope_position_ids(
            torch.tensor([START, *[VIDEO] * 200]),
            video_grid_thw=torch.tensor([[200, 1, 1]]),
            second_per_grid_ts=seconds,
            tokens_per_second=10,
            merge_size=1,
            **TOKEN_IDS,
        )
        times[dtype] = position_ids[0, 1:] - 1
        assert torch.equal(times[dtype], (torch.arange(200) * seconds * 10).long())
        # the order of the products shows
        assert not torch.equal(times[dtype], (torch.arange(200) * (seconds * 10)).long())
    assert not torch.equal(*times.values())


def mrope_call():
    video = [START, *[VIDEO] * 6, END]
    return {
        "input_ids": torch.tensor([TEXT, START, IMAGE, IMAGE, END, *video, TEXT, TEXT]),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "video_grid_thw": torch.tensor([[3, 2, 4]]),
        "second_per_grid_ts": torch.tensor([0.7]),
        "cu_seqlens": torch.tensor([0, 13, 15], dtype=torch.int32),
    }


@pytest.mark.parametrize("split_frames", [False, True])
def test_positions_never_wait_for_the_device(split_frames):
    call = mrope_call()
    options = {**TOKEN_IDS, "tokens_per_second": 2, "split_frames": split_frames}
    want = get_mrope_position_ids(**call, **options)
    guarded = {name: x.clone().as_subclass(contract._OnDevice) for name, x in call.items()}
    got = get_mrope_position_ids(**guarded, **options)
    meta = {name: x.to("meta") for name, x in call.items()}
    shapes = get_mrope_position_ids(**meta, **options)
    for x, shape, y in zip(got, shapes, want, strict=True):
        assert torch.equal(x.as_subclass(torch.Tensor), y)
        assert (shape.shape, shape.dtype, shape.device.type) == (y.shape, y.dtype, "meta")
    with pytest.raises(AssertionError, match="the host waits for the device"):
        validate_vision_tokens(**guarded, **TOKEN_IDS)


@pytest.mark.gpu
@pytest.mark.parametrize("split_frames", [False, True])
def test_positions_on_a_gpu_are_those_of_the_host(split_frames):
    call = mrope_call()
    options = {**TOKEN_IDS, "tokens_per_second": 2, "split_frames": split_frames}
    on_device = {name: x.cuda() for name, x in call.items()}
    with contract.no_sync():
        got = get_mrope_position_ids(**on_device, **options)
    for x, y in zip(got, get_mrope_position_ids(**call, **options), strict=True):
        assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"second_per_grid_ts": torch.tensor([0.7, 0.7])},
            ValueError,
            "second_per_grid_ts must have shape [1], got [2]",
        ),
        (
            {"second_per_grid_ts": torch.tensor([0.7]), "video_grid_thw": None},
            ValueError,
            "second_per_grid_ts must have shape [0], got [1]",
        ),
        ({"second_per_grid_ts": [0.7]}, TypeError, "second_per_grid_ts must be a tensor, got list"),
        (
            {"second_per_grid_ts": torch.tensor([1])},
            TypeError,
            "second_per_grid_ts must be float32 or float64, got int64",
        ),
        (
            {"second_per_grid_ts": torch.tensor([1.0], device="meta")},
            ValueError,
            "second_per_grid_ts must be on the device of input_ids, cpu, got meta",
        ),
        ({"tokens_per_second": 0}, ValueError, "tokens_per_second must be above 0, got 0"),
        ({"tokens_per_second": "2"}, TypeError, "tokens_per_second must be a number, got '2'"),
        ({"split_frames": 1}, TypeError, "split_frames must be a bool, got 1"),
    ],
)
def test_positions_name_what_they_refuse(change, error, message):
    with pytest.raises(error) as raised:
        get_mrope_position_ids(**{**mrope_call(), **TOKEN_IDS, **change})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"second_per_grid_ts": torch.tensor([-0.5])},
            "second_per_grid_ts[0] must be above 0, got -0.5",
        ),
        (
            {"second_per_grid_ts": torch.tensor([torch.nan])},
            "second_per_grid_ts[0] must be above 0, got nan",
        ),
        (
            {"split_frames": True},
            "input_ids must have runs of video tokens of the lengths that video_grid_thw says,"
            " [2, 2, 2], got [6]",
        ),
    ],
)
def test_validation_names_what_does_not_fit(change, message):
    validate_vision_tokens(**mrope_call(), **TOKEN_IDS)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        validate_vision_tokens(**{**mrope_call(), **TOKEN_IDS, **change})
    assert str(raised.value) == message


# With and without C++ ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(with_and_without_extension):
    if _dispatch._NOT_INSTALLED["native"]:
        pytest.skip("it compares C++ with torch")


def outcome(function, *arguments, **options):
    """What a function gives, or the error it raises, comparable."""
    try:
        result = function(*arguments, **options)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    if isinstance(result, PackedGrid):
        numbers = result.num_tokens, result.max_seqlen
        result = result.grid_thw, result.geometry, result.cu_seqlens, result.position_ids
        return *numbers, *map(outcome_of, result)
    return tuple(map(outcome_of, listed(result)))


def outcome_of(x):
    return x.dtype, x.tolist()


@contextlib.contextmanager
def without_extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_dispatch._NOT_INSTALLED, "native", "it is hidden")
        yield


# sizes of a grid, of which few can be
ANY = st.one_of(st.integers(1, 4), st.sampled_from([-(2**62), -1, 0, 6, 2**31, 2**62]))
MERGES = st.sampled_from([1, 2, 3, 2**31 - 1])


@pytest.mark.usefixtures("native")
@given(st.lists(st.tuples(ANY, ANY, ANY), max_size=4), MERGES, st.booleans())
def test_sizes_that_cannot_be_are_refused_alike(sizes, m, flag):
    grid_thw = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3)
    merges = torch.full((len(sizes),), m)
    calls = [
        (get_vision_cu_seqlens, grid_thw),
        (get_vision_position_ids, grid_thw, m, flag),
        (get_vision_position_ids, grid_thw, merges, flag),
        (get_vision_window_index, grid_thw, m, 2**60, 14),
        (get_vision_window_index, grid_thw, m, 2**62, 1),
        (PackedGrid, grid_thw, m, flag),
        (PackedGrid, sizes, m, flag),
        (PackedGrid([(2, 6, 6)] * len(sizes)).resized, grid_thw[:, 1:]),
        (PackedGrid([(2, 6, 6)]).merged, m),
    ]
    got = [outcome(*call) for call in calls]
    with without_extension():
        assert got == [outcome(*call) for call in calls]


@pytest.mark.usefixtures("native")
@settings(max_examples=30)
@given(SIZES, M, st.integers(0, 400), st.integers(0, 60))
def test_lengths_that_are_given_are_served_alike(sizes, m, num_tokens, more):
    grid_thw = grid_of(sizes, m)
    num_windows = more + sum(t * h * w for t, h, w in sizes)
    calls = [
        (get_vision_cu_seqlens, (grid_thw,), {"num_segments": num_tokens}),
        (get_vision_position_ids, (grid_thw, m), {"num_tokens": num_tokens}),
        (
            get_vision_window_index,
            (grid_thw, m, 14 * m, 14),
            {"num_tokens": int(grid_thw.prod(1).sum()), "num_windows": num_windows},
        ),
    ]
    got = [outcome(function, *arguments, **lengths) for function, arguments, lengths in calls]
    with without_extension():
        for (function, arguments, lengths), result in zip(calls, got, strict=True):
            assert outcome(function, *arguments, **lengths) == result


def test_views_and_narrow_integers_are_read_right():
    wide = torch.tensor([[9, 2, 10, 6], [9, 1, 4, 4]], dtype=torch.int32)
    grid_thw = wide.T.contiguous().T[:, 1:]
    assert not grid_thw.is_contiguous()
    for function, arguments, _ in CALLS.values():
        got, want = function(grid_thw, *arguments), function(GRID_THW, *arguments)
        assert all(map(torch.equal, listed(got), listed(want)))
    merges = torch.tensor([2, 0, 4], dtype=torch.int32)[::2]
    got = get_vision_position_ids(torch.tensor([[1, 2, 4], [1, 4, 8]]), merges)
    assert got[8:24].tolist() == [[row, col] for row in range(4) for col in range(4)]


def test_many_images_of_real_sizes_are_those_of_the_loop():
    sizes = [(1 + i % 2, 12 + 5 * i % 29, 12 + 7 * i % 23) for i in range(32)]
    grid_thw = grid_of(sizes, 2)
    want = [
        [2 * row + i, 2 * col + j]
        for t, h, w in sizes
        for _, row, col, i, j in itertools.product(*map(range, (t, h, w, 2, 2)))
    ]
    assert get_vision_position_ids(grid_thw, 2).tolist() == want


@pytest.fixture
def no_torch_code(monkeypatch, native):
    for name in ("bounds_of", "check_sizes"):
        monkeypatch.delattr(_grid, name)
    monkeypatch.delattr(metadata, "_flat_samples")


def test_plain_tensors_are_left_to_cpp(no_torch_code):
    for function, arguments, lengths in CALLS.values():
        function(GRID_THW, *arguments)
        function(GRID_THW, *arguments, **lengths)
    get_mrope_position_ids(**mrope_call(), **TOKEN_IDS)
    grid = PackedGrid([(2, 4, 4), (1, 2, 4)], 2)
    for each in (grid, grid.merged(), grid.resized((2, 2)), PackedGrid(GRID_THW)):
        assert each.position_ids.shape == (each.num_tokens, 2)
    assert grid.num_blocks(1) == 40


GARBAGE = st.one_of(st.integers(-3, 40), st.sampled_from([-(2**63), -(2**31), 2**31, 2**63 - 1]))


@pytest.mark.usefixtures("native")
@given(
    st.lists(st.sampled_from([START, END, IMAGE, VIDEO, TEXT]), max_size=40),
    st.lists(st.tuples(GARBAGE, GARBAGE, GARBAGE), max_size=3),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    st.sampled_from([0.0, -1.0, 1e30, float("nan"), float("inf")]),
    st.booleans(),
    M,
)
def test_positions_of_garbage_harm_nothing(ids, grids, bounds, seconds, split_frames, m):
    """They are unspecified, and only C++ could go astray: torch checks what it reads."""
    position_ids, deltas = get_mrope_position_ids(
        torch.tensor(ids, dtype=torch.int64),
        rows_of(grids),
        rows_of(grids),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        second_per_grid_ts=torch.full((len(grids),), seconds),
        split_frames=split_frames,
        merge_size=m,
        **TOKEN_IDS,
    )
    assert position_ids.shape == (3, len(ids))
    assert deltas.shape == (len(bounds) - 1, 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_a_mask_may_be_of_any_kind_and_a_view(dtype):
    ids = torch.tensor([[VIDEO, TEXT, START, IMAGE, IMAGE, END]] * 2).T.contiguous().T
    mask = (torch.tensor([[0, 5, 5, 5, 5, 5]] * 2).to(dtype)).T.contiguous().T
    arguments = {"image_grid_thw": torch.tensor([[1, 2, 4]] * 2), **TOKEN_IDS}
    for tokens in (ids, ids.int()):
        position_ids, deltas = get_mrope_position_ids(tokens, attention_mask=mask, **arguments)
        assert position_ids[2].tolist() == [[1, 0, 1, 2, 3, 4]] * 2
        assert deltas.tolist() == [[-1]] * 2
