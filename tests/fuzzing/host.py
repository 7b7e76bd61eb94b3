"""Drawn grids and sequences, and what the host computes of them."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import strategies as st

from fuzzing.options import MERGES, batches
from patchpack import PackedGrid, _dispatch, metadata


class _Torch:
    """Within this context the code in torch runs, not the C++."""

    def __enter__(self) -> None:
        self.missing = _dispatch._NOT_INSTALLED["native"]
        _dispatch._NOT_INSTALLED["native"] = "it is hidden"

    def __exit__(self, *exception) -> None:
        _dispatch._NOT_INSTALLED["native"] = self.missing


@st.composite
def drawn_grids(draw) -> dict:
    merge = draw(MERGES)
    sizes = [size for size in draw(batches(merge)) if all(size)]
    side = st.integers(1, 20).map(lambda n: n * merge)
    return {
        "grid_thw": sizes,
        "m": merge,
        "merge_temporal": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.int64, torch.int32])),
        "window": draw(st.integers(1, 9)),
        "target_hw": draw(st.tuples(side, side)),
        "merges": draw(st.lists(st.integers(1, merge), min_size=1, max_size=3)),
        "include_temporal": draw(st.booleans()),
    }


def _metadata_of(drawn: dict) -> list[torch.Tensor]:
    sizes, m = drawn["grid_thw"], drawn["m"]
    thw = torch.tensor(sizes, dtype=drawn["dtype"]).reshape(-1, 3)
    merges = torch.tensor([m // math.gcd(m, n) for n in drawn["merges"]] * (1 + len(sizes)))
    window = drawn["window"] * m * 14
    grids = [PackedGrid(thw, m, drawn["merge_temporal"])]
    grids += [grids[0].merged(), grids[0].resized(drawn["target_hw"])]
    results = [
        metadata.get_vision_cu_seqlens(thw, drawn["merge_temporal"]),
        metadata.get_vision_position_ids(thw, m, drawn["include_temporal"]),
        metadata.get_vision_position_ids(thw, merges[: len(sizes)], drawn["include_temporal"]),
        *metadata.get_vision_window_index(thw, m, window, 14),
    ]
    for grid in grids:
        grid.validate()
        results += [grid.grid_thw, grid.geometry, grid.cu_seqlens, grid.position_ids]
        results.append(torch.tensor([grid.num_tokens, grid.max_seqlen, grid.num_segments]))
    return results


def _positions(t: int, h: int, w: int, m: int) -> torch.Tensor:
    """Frame, row and column of the tokens of an image, block by block."""
    shape = (t, h // m, w // m, m, m)
    frame, row, col, down, right = (torch.arange(n) for n in shape)
    grid = torch.meshgrid(frame, row, col, down, right, indexing="ij")
    return torch.stack([grid[0], grid[1] * m + grid[3], grid[2] * m + grid[4]], -1).reshape(-1, 3)


def check_metadata(drawn: dict) -> None:
    """C++ and torch agree, and with what a loop over the images says."""
    found = _metadata_of(drawn)
    with _Torch():
        in_torch = _metadata_of(drawn)
    for i, (x, y) in enumerate(zip(found, in_torch, strict=True)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), f"result {i}"
    sizes, m = drawn["grid_thw"], drawn["m"]
    want = torch.cat([torch.empty(0, 3).long(), *(_positions(*size, m) for size in sizes)])
    assert torch.equal(found[1], want if drawn["include_temporal"] else want[:, 1:])
    order, bounds = found[3:5]
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    merged, first = _positions_merged(sizes, m), 0
    for begin, end in itertools.pairwise((bounds // m**2).tolist()):
        window = merged[order[begin:end]]  # image, frame, row, column
        assert end > begin == first
        assert (window[:, :2] == window[0, :2]).all()
        assert len((window[:, 2:] // drawn["window"]).unique(dim=0)) == 1
        first = end
    assert first == len(order)


def _positions_merged(sizes: list, m: int) -> torch.Tensor:
    """Image, frame, row and column of merged tokens in raster order."""
    parts = [torch.empty(0, 4).long()]
    for i, (t, h, w) in enumerate(sizes):
        thw = _positions(t, h // m, w // m, 1)
        parts.append(torch.cat([torch.full_like(thw[:, :1], i), thw], dim=1))
    return torch.cat(parts)


START, IMAGE, VIDEO, TEXT = 1, 3, 4, 10


@st.composite
def drawn_sequence(draw) -> dict:
    """Samples of text, images and videos, as a padded batch or packed."""
    m = draw(st.integers(1, 3))
    length = st.sampled_from([0, 1, 2, 30, 700])
    text = st.tuples(st.just("text"), length, st.just(1), st.just(1))
    vision = st.tuples(
        st.sampled_from(["image", "video"]), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)
    )
    sample = st.lists(text | vision, max_size=6)
    return {
        "samples": draw(st.lists(sample, min_size=1, max_size=4)),
        "many": draw(st.sampled_from([1, 1, 1, 50])),
        "m": m,
        "tokens_per_second": draw(st.sampled_from([1, 2, 2.5])),
        "seconds": draw(st.none() | st.floats(0.125, 5.0, width=32)),
        "split_frames": draw(st.booleans()),
        "layout": draw(st.sampled_from(["left", "right", "packed"])),
        "dtype": draw(st.sampled_from([torch.int64, torch.int32])),
    }


def _sequence_of(drawn: dict) -> tuple[tuple, dict]:
    """Arguments of ``get_mrope_position_ids``."""
    m, rows, grids = drawn["m"], [], {"image": [], "video": []}
    for sample in drawn["samples"] * drawn["many"]:
        ids = []
        for kind, t, h, w in sample:
            if kind == "text":
                ids += [TEXT] * t
                continue
            grids[kind].append([t, h * m, w * m])
            runs = t if kind == "video" and drawn["split_frames"] else 1
            ids += ([START] + [IMAGE if kind == "image" else VIDEO] * (t * h * w // runs)) * runs
        rows.append(ids)
    options = {
        f"{kind}_grid_thw": torch.tensor(thw, dtype=drawn["dtype"]).reshape(-1, 3)
        for kind, thw in grids.items()
    }
    options |= {"split_frames": drawn["split_frames"], "merge_size": m}
    options |= {"vision_start_token_id": START, "image_token_id": IMAGE, "video_token_id": VIDEO}
    if drawn["seconds"] is not None:
        options["second_per_grid_ts"] = torch.full((len(grids["video"]),), drawn["seconds"])
    longest = max(map(len, rows))
    if drawn["layout"] == "packed":
        bounds = [0, *itertools.accumulate(map(len, rows))]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        ids = torch.tensor([i for row in rows for i in row] + [TEXT] * 3, dtype=drawn["dtype"])
        return (ids,), options
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    ids = torch.full((len(rows), longest), IMAGE, dtype=drawn["dtype"])
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if drawn["layout"] == "left" else slice(len(row))
        mask[i, place], ids[i, place] = True, torch.tensor(row, dtype=drawn["dtype"])
    return (ids,), options | {"attention_mask": mask}


def check_sequence(drawn: dict) -> None:
    """C++ and torch agree on M-RoPE ids, and samples have those they have alone."""
    (ids,), options = _sequence_of(drawn)
    metadata.validate_vision_tokens(ids, **options)
    seconds = {"tokens_per_second": drawn["tokens_per_second"]}
    found = metadata.get_mrope_position_ids(ids, **options, **seconds)
    with _Torch():
        in_torch = metadata.get_mrope_position_ids(ids, **options, **seconds)
    for x, y in zip(found, in_torch, strict=True):
        assert torch.equal(x, y)
    if drawn["layout"] == "packed":
        (_, *bounds) = options["cu_seqlens"].tolist()
        parts = [
            metadata.get_mrope_position_ids(*arguments, **alone, **seconds)[0][:, :-3]
            for sample in drawn["samples"]
            for arguments, alone in [_sequence_of({**drawn, "samples": [sample], "many": 1})]
        ]
        want = torch.cat(parts * drawn["many"], dim=1)
        assert torch.equal(found[0][:, : bounds[-1]], want)
