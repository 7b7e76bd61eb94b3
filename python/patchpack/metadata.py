"""Integers about packed images, and about text with images in it, that follow from their sizes.

Attention segments, rows and columns, windows, and the positions of M-RoPE: what a model needs
before its first layer. Names and results are those of ``transformers.vision_utils`` and, for
``get_mrope_position_ids``, of the ``get_rope_index`` of its models.

The same closed forms serve every device, with no loop over images. They read no value back, so a
CUDA device is not waited for: where values decide how long a result is, a caller whose tensors are
on a device says that length, which ``PackedGrid`` knows. Tensors on the CPU need none, and then
their sizes are checked. A length that is given is trusted; what it says beyond the sizes is empty
or past the last image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from patchpack import _check, _dispatch
from patchpack.packing import _grid

# Vision encoder ----------------------------------------------------------------------------------


def get_vision_cu_seqlens(
    grid_thw: Tensor, merge_temporal: bool = False, *, num_segments: int | None = None
) -> Tensor:
    """Where attention segments begin and end.

    Args:
        grid_thw: Frames, rows and columns of each image or clip, in patches, int64 or int32
            ``[G, 3]``.
        merge_temporal: One segment a clip if true, one a frame otherwise.
        num_segments: ``S``, the number of frames; needed unless ``grid_thw`` is on the CPU or
            ``merge_temporal`` is true.

    Returns:
        int32 ``[S + 1]``, in tokens, on the device of ``grid_thw``. Not differentiable.

    Raises:
        ValueError: A shape does not fit, a length is needed, or a size on the CPU cannot be.
        TypeError: A dtype does not fit, or a number or flag is none.
    """
    _check_grids(grid_thw)
    _check.flags(merge_temporal=merge_temporal)
    num_segments = None if merge_temporal else _given("num_segments", num_segments)
    native = _dispatch.native("vision_cu_seqlens", grid_thw, merge_temporal, num_segments)
    if native is not None:
        return native
    grid_thw = grid_thw.long()
    if merge_temporal:
        return _grid.geometry_of(grid_thw)[:, 0].int()
    num_segments = _length("num_segments", num_segments, grid_thw, 1, lambda t, h, w: t.sum())
    return _grid.cu_seqlens_of(_grid.geometry_of(grid_thw), grid_thw[:, 0], num_segments)


def get_vision_position_ids(
    grid_thw: Tensor,
    spatial_merge_size: int | Tensor,
    include_temporal: bool = False,
    *,
    num_tokens: int | None = None,
) -> Tensor:
    """Row and column of every token.

    Args:
        grid_thw: Frames, rows and columns of each image or clip, in patches, int64 or int32
            ``[G, 3]``.
        spatial_merge_size: ``m``, the side of the blocks of patches that are contiguous, as in
            ``PackedGrid``; or one for each image, int64 or int32 ``[G]``.
        include_temporal: Whether the frame comes first.
        num_tokens: ``T``, the number of patches; needed unless ``grid_thw`` is on the CPU.

    Returns:
        int64 ``[T, 2]``: row and column; or ``[T, 3]``: frame, row and column, in patches, on the
        device of ``grid_thw``. Not differentiable.

    Raises:
        ValueError: A shape or device does not fit, a length is needed, or a size on the CPU cannot
            be or does not divide by ``spatial_merge_size``.
        TypeError: A dtype does not fit, or a number or flag is none.
    """
    _check_grids(grid_thw)
    _check.flags(include_temporal=include_temporal)
    m = spatial_merge_size
    if isinstance(m, Tensor):
        _check.shape("spatial_merge_size", m, grid_thw.shape[0])
        _check.dtype("spatial_merge_size", m, torch.int64, torch.int32)
        _check.same_device(grid_thw=grid_thw, spatial_merge_size=m)
    else:
        (m,) = _check.whole(spatial_merge_size=m)
    num_tokens = _given("num_tokens", num_tokens)
    one, each = (1, m) if isinstance(m, Tensor) else (m, None)
    native = _dispatch.native(
        "vision_position_ids", grid_thw, one, each, include_temporal, num_tokens
    )
    if native is not None:
        return native
    grid_thw = grid_thw.long()
    num_tokens = _length("num_tokens", num_tokens, grid_thw, m, lambda t, h, w: (t * h * w).sum())
    if isinstance(m, Tensor):
        m = torch.nn.functional.pad(m, (0, 1), value=1)  # of what is past the last image
    return _grid.position_ids_of(_grid.geometry_of(grid_thw), m, num_tokens, include_temporal)


def get_vision_window_index(
    grid_thw: Tensor,
    spatial_merge_size: int,
    window_size: int,
    patch_size: int,
    *,
    num_tokens: int | None = None,
    num_windows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The order of windowed attention, and where its windows begin and end.

    Every frame is cut into windows of ``W x W`` merged tokens, ``W = window_size //
    spatial_merge_size // patch_size``; those at the right and bottom are what remains. Windows are
    in raster order, and so are the merged tokens in a window.

    Args:
        grid_thw: Frames, rows and columns of each image or clip, in patches, int64 or int32
            ``[G, 3]``.
        spatial_merge_size: ``m``, the side of the block of patches that is one merged token.
        window_size: Side of a window, in pixels.
        patch_size: Side of a patch, in pixels.
        num_tokens: ``T``, the number of patches; needed unless ``grid_thw`` is on the CPU.
        num_windows: The number of windows, of each image ``t * ceil(h / m / W) * ceil(w / m / W)``;
            needed likewise.

    Returns:
        Which merged token is at each place, int64 ``[T / m**2]``: blocks of ``m**2`` tokens ``x``
        go into windows as ``x.unflatten(0, (-1, m**2))[window_index]``, merged ones return by
        ``window_index.argsort()``. And the bounds of windows in tokens, int32
        ``[num_windows + 1]``, as ``varlen_attention`` takes them: the empty windows that the
        original makes and then removes are not made. Both on the device of ``grid_thw``, not
        differentiable.

    Raises:
        ValueError: A shape does not fit, a length is needed, a window is smaller than a merged
            token, or a size on the CPU cannot be or does not divide by ``spatial_merge_size``.
        TypeError: A dtype does not fit, or a number is none.
    """
    _check_grids(grid_thw)
    m, window_size, patch_size = _check.whole(
        spatial_merge_size=spatial_merge_size, window_size=window_size, patch_size=patch_size
    )
    side = min(window_size // m // patch_size, 2**31)  # no image is larger
    if side < 1:
        raise ValueError(
            f"window_size must be at least the {m * patch_size} pixels of a merged token,"
            f" got {window_size}"
        )
    num_tokens = _given("num_tokens", num_tokens)
    num_windows = _given("num_windows", num_windows)
    native = _dispatch.native("vision_window_index", grid_thw, m, side, num_tokens, num_windows)
    if native is not None:
        return native
    grid_thw = grid_thw.long()

    def windows(frames: Tensor, rows: Tensor, cols: Tensor) -> Tensor:  # in patches
        return frames * _ceil_div(rows // m, side) * _ceil_div(cols // m, side)

    num_tokens = _length("num_tokens", num_tokens, grid_thw, m, lambda t, h, w: (t * h * w).sum())
    num_windows = _length("num_windows", num_windows, grid_thw, m, lambda *thw: windows(*thw).sum())

    frames, rows, cols = grid_thw.unbind(dim=1)
    bounds = _grid.bounds_of(windows(frames, rows, cols))
    geometry = _grid.geometry_of(torch.stack([frames, rows // m, cols // m], dim=1))

    # which merged token is at each place; a frame is bands, a band is windows of one height
    grid, place = _grid.place_of(geometry[:, 0].contiguous(), num_tokens // m**2)
    first, rows, cols = geometry.index_select(0, grid).unbind(dim=1)  # [T / m^2] each
    frame, place = place // (rows * cols), place % (rows * cols)
    band, place = place // (side * cols), place % (side * cols)
    height = (rows - side * band).clamp(max=side)
    window, place = place // (side * height), place % (side * height)
    width = (cols - side * window).clamp(max=side)
    row, col = side * band + place // width, side * window + place % width
    window_index = first + (frame * rows + row) * cols + col

    # how many are before each window
    grid, window = _grid.place_of(bounds, num_windows + 1)
    first, rows, cols = geometry.index_select(0, grid).unbind(dim=1)  # [num_windows + 1] each
    down, across = _ceil_div(rows, side), _ceil_div(cols, side)
    frame, band, window = window // (down * across), window // across % down, window % across
    height = (rows - side * band).clamp(max=side)
    before = first + (frame * rows + side * band) * cols + height * side * window
    return window_index, (m**2 * before.clamp(max=geometry[-1, 0])).int()


def _ceil_div(x: Tensor, n: int) -> Tensor:
    return (x + (n - 1)) // n


def _check_grids(grid_thw: Tensor) -> None:
    _check.shape("grid_thw", grid_thw, None, 3)
    _check.dtype("grid_thw", grid_thw, torch.int64, torch.int32)


def _given(name: str, length: int | None) -> int | None:
    """``length`` as a Python integer, if it is given and not traced."""
    if length is None or isinstance(length, torch.SymInt) or torch.compiler.is_compiling():
        return length
    return _check.whole(0, **{name: length})[0]


def _length(
    name: str,
    length: int | None,
    grid_thw: Tensor,
    spatial_merge_size: int | Tensor,
    count: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> int:
    """``length`` as given, or what ``count`` makes of the sizes, once they are checked."""
    if length is not None:
        return length
    if grid_thw.device.type != "cpu":
        raise ValueError(
            f"{name} must be given for grid_thw on {grid_thw.device}: counting would wait for it"
        )
    m = spatial_merge_size
    _grid.check_sizes(grid_thw.numpy(), m.numpy() if isinstance(m, Tensor) else m)
    return int(count(*grid_thw.unbind(dim=1)))


# Multimodal rotary position embedding ------------------------------------------------------------


def get_mrope_position_ids(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    vision_start_token_id: int | None,
    image_token_id: int,
    video_token_id: int,
    cu_seqlens: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    tokens_per_second: float = 1,
    split_frames: bool = False,
    frames_advance: bool = True,
    merge_size: int = 2,
) -> tuple[Tensor, Tensor]:
    """Position of every token on the axes time, height and width.

    Text advances all three axes together, one a token. The tokens of an image or video share a
    start and count frames, rows and columns from it; what follows starts after the largest of its
    counts. This is the rule of transformers 4.45 to 4.57; with ``frames_advance=False`` it is that
    of transformers 5, where frames do not count in what follows a video.

    Three models differ in what a frame ``a`` of a video counts in time:

    * Qwen2-VL: ``a``, the default;
    * Qwen2.5-VL: ``a * second_per_grid_ts * tokens_per_second``, in this order and in the dtype of
      ``second_per_grid_ts``, rounded toward zero. So did transformers 4.49; 4.57.1 made an integer
      of the seconds first, so that 0.5 became 0, which is not done here; 5 multiplies the two
      numbers first, which rounds differently where the product is near an integer;
    * Qwen3-VL: nothing. Text between the frames tells the time, and each is a run of its own
      (``split_frames``).

    No loop over images, and no value is read back, so a CUDA device is not waited for. Values that
    do not fit, of tokens, grids or ``cu_seqlens``, are therefore not seen, and leave the positions
    unspecified: ``validate_vision_tokens`` finds them.

    Args:
        input_ids: Token ids, int64 or int32: a batch ``[B, L]``, or one sequence ``[L]``. Each
            image or video is a run of ``image_token_id`` or ``video_token_id`` right after a
            ``vision_start_token_id``, of the length its grid says. The ``mm_token_type_ids`` of
            transformers will do, with 1 and 2 for the tokens of images and videos.
        image_grid_thw: Frames, rows and columns of each image, in patches, int64 or int32
            ``[images, 3]`` on the device of ``input_ids``, in the order of their tokens.
        video_grid_thw: The same of each video, ``[videos, 3]``.
        attention_mask: Shape of ``input_ids``, bool, int64 or int32; zero marks padding, on either
            side.
        vision_start_token_id: The token before an image or video; ``None`` where none is marked:
            one then begins wherever its tokens follow others, so that two of a kind need something
            between them.
        image_token_id: The token of an image.
        video_token_id: The token of a video.
        cu_seqlens: Where packed samples of a sequence ``[L]`` begin and end, int32 ``[S + 1]``, in
            tokens. Positions restart in each; tokens after the last are padding.
        second_per_grid_ts: Seconds from one frame of each video's grid to the next, float32 or
            float64 ``[videos]`` on the device of ``input_ids``; by default one.
        tokens_per_second: Positions that a second takes.
        split_frames: Whether each frame of a video, with rows and columns of its grid, is a run of
            its own, after its own ``vision_start_token_id``.
        frames_advance: Whether what follows a video starts after the count of its frames too, or
            after those of its rows and columns alone.
        merge_size: Side of the block of patches that is one token.

    Returns:
        Position ids, int64 ``[3, B, L]`` or ``[3, L]``, 1 where padding is; and for each sample
        the next position minus its length with padding, int64 ``[B, 1]`` or ``[S, 1]``, which a
        decoder adds to its count of tokens. Not differentiable.

    Raises:
        ValueError: A shape, a device or a number does not fit.
        TypeError: A dtype does not fit, or a number is none.
    """
    m, vision_start, image_id, video_id = _check_vision_tokens(
        input_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        cu_seqlens,
        second_per_grid_ts,
        split_frames,
        merge_size=merge_size,
        vision_start_token_id=vision_start_token_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    (tokens_per_second,) = _check.numbers(tokens_per_second=tokens_per_second)
    _check.flags(frames_advance=frames_advance)
    native = _dispatch.native(
        "mrope_position_ids",
        input_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        cu_seqlens,
        second_per_grid_ts,
        vision_start,
        image_id,
        video_id,
        float(tokens_per_second),
        split_frames,
        frames_advance,
        m,
    )
    if native is not None:
        return native
    ids, valid, bounds = _flat_samples(input_ids, attention_mask, cu_seqlens)
    bounds = bounds.clamp(0, ids.numel())
    token = torch.arange(ids.numel(), device=ids.device)
    sample = torch.searchsorted(bounds[1:], token, right=True)  # S behind the last

    # a run begins right after a vision start, or where its kind does; padding left out
    count = valid.cumsum(0)
    is_image, is_video = valid & (ids == image_id), valid & (ids == video_id)
    is_vision = is_image | is_video
    if vision_start is None:
        before = torch.where(valid, token, -1).cummax(0).values.roll(1)  # the last that is no pad
        alone = (before < bounds[sample]) | (token == 0)
        kind = torch.where(is_vision, ids, -1)
        is_start = is_vision & (alone | (kind != kind[before]))
        start = torch.where(is_start, count - 1, -1).cummax(0).values
    else:
        start = torch.where(valid & (ids == vision_start), count, -1).cummax(0).values
    in_run = count - 1 - start
    is_first = is_vision & (in_run == 0)

    # which image or video each token is of
    image = (is_first & is_image).cumsum(0) - 1
    video = (is_first & is_video).cumsum(0) - 1
    if split_frames and video_grid_thw is not None:  # so far these are frames
        video = torch.searchsorted(video_grid_thw[:, 0].cumsum(0), video, right=True)

    # text has the extra last grid
    grids = [grid for grid in (image_grid_thw, video_grid_thw) if grid is not None]
    grids = torch.cat([*grids, torch.full((1, 3), m, device=ids.device)])
    num_images = 0 if image_grid_thw is None else image_grid_thw.shape[0]
    num_vision = grids.shape[0] - 1
    grid = torch.where(is_image, image, torch.where(is_video, video + num_images, num_vision))
    grid = grid.clamp(max=num_vision)
    frames, rows, cols = grids[grid].unbind(1)  # [T] each
    rows, cols = (rows // m).clamp(min=1), (cols // m).clamp(min=1)
    if split_frames:
        frames = torch.where(is_video, 1, frames)
    seconds = second_per_grid_ts
    if seconds is None and tokens_per_second != 1:
        seconds = torch.ones(num_vision - num_images, dtype=torch.float32, device=ids.device)
    if seconds is not None:
        seconds = torch.nn.functional.pad(seconds, (num_images, 1))[grid]  # [T]

    def time_of(frame: Tensor) -> Tensor:
        if seconds is None:
            return frame
        scaled = frame * seconds * tokens_per_second
        return torch.where(is_video, scaled.long(), frame)

    # the first token of a run advances the position for all of it
    step = torch.maximum(rows, cols)
    if frames_advance:
        step = torch.maximum(time_of(frames - 1) + 1, step)
    step = torch.where(is_vision, step, 1)
    after = torch.where(valid & (is_first | ~is_vision), step, 0).cumsum(0)
    at_bounds = torch.nn.functional.pad(after, (1, 0))[bounds]  # [S + 1]
    base = after - step - at_bounds[sample]
    thw = [time_of(in_run // (rows * cols)), in_run // cols % rows, in_run % cols]
    position_ids = torch.where(valid, base + torch.where(is_vision, torch.stack(thw), 0), 1)
    deltas = at_bounds.diff() - bounds.diff()
    return position_ids.view(3, *input_ids.shape), deltas[:, None]


def validate_vision_tokens(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    vision_start_token_id: int | None,
    image_token_id: int,
    video_token_id: int,
    cu_seqlens: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    split_frames: bool = False,
    merge_size: int = 2,
) -> None:
    """Check the values that ``get_mrope_position_ids`` does not read. Waits for the device.

    Args:
        input_ids: As ``get_mrope_position_ids`` takes it.
        image_grid_thw: Likewise.
        video_grid_thw: Likewise.
        attention_mask: Likewise.
        vision_start_token_id: Likewise.
        image_token_id: Likewise.
        video_token_id: Likewise.
        cu_seqlens: Likewise.
        second_per_grid_ts: Likewise.
        split_frames: Likewise.
        merge_size: Likewise.

    Raises:
        ValueError: The runs of image or video tokens are not, in number and lengths, those of the
            grids, or one does not follow a ``vision_start_token_id`` of its own sample; a grid does
            not divide into tokens; seconds are not positive numbers; ``cu_seqlens`` does not rise
            from 0 within the sequence; or an argument does not fit.
        TypeError: A dtype does not fit, or a number is not an integer.
    """
    m, vision_start, image_id, video_id = _check_vision_tokens(
        input_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        cu_seqlens,
        second_per_grid_ts,
        split_frames,
        merge_size=merge_size,
        vision_start_token_id=vision_start_token_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    ids, valid, bounds = _flat_samples(input_ids, attention_mask, cu_seqlens)
    bounds = bounds.tolist()
    if bounds[0] != 0 or bounds[-1] > ids.numel() or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most {ids.numel()}, the length of input_ids,"
            f" got {bounds}"
        )
    for i, seconds in enumerate([] if second_per_grid_ts is None else second_per_grid_ts.tolist()):
        _check.positive(f"second_per_grid_ts[{i}]", seconds)
    # a token of no kind before every sample, so that no run follows from the sample before
    samples = [ids[a:b][valid[a:b]] for a, b in itertools.pairwise(bounds)]
    pad = torch.nn.functional.pad
    ids = torch.cat([ids[:0], *(pad(sample, (1, 0), value=-1) for sample in samples)])
    kinds = torch.where((ids == image_id) | (ids == video_id), ids, -1)
    kinds, lengths = kinds.unique_consecutive(return_counts=True)
    for name, grid_thw, token_id in (
        ("image", image_grid_thw, image_id),
        ("video", video_grid_thw, video_id),
    ):
        want = []
        for i, (t, h, w) in enumerate([] if grid_thw is None else grid_thw.tolist()):
            if min(t, h, w) < 1 or h % m or w % m:
                raise ValueError(
                    f"{name}_grid_thw[{i}] must be at least 1 on every axis, with rows and columns"
                    f" that divide by merge_size={m}, got {[t, h, w]}"
                )
            runs = (t, 1) if split_frames and name == "video" else (1, t)
            want += [runs[1] * h * w // m**2] * runs[0]
        runs = kinds == token_id
        got = lengths[runs].tolist()
        if got != want:
            raise ValueError(
                f"input_ids must have runs of {name} tokens of the lengths that {name}_grid_thw"
                f" says, {want}, got {got}"
            )
        before = (lengths.cumsum(0) - lengths)[runs] - 1
        for token in ids[before].tolist():
            if vision_start is not None and token != vision_start:
                raise ValueError(
                    f"input_ids must have {vision_start} before a run of {name} tokens,"
                    f" got {'none' if token == -1 else token}"
                )


def _flat_samples(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens in one row ``[T]``, which of them are no padding, and the bounds of samples."""
    ids = input_ids.flatten()
    if cu_seqlens is None:
        batch, length = (1, *input_ids.shape)[-2:]
        bounds = torch.arange(batch + 1, device=ids.device) * length
    else:
        bounds = cu_seqlens.long()
    valid = torch.arange(ids.numel(), device=ids.device) < bounds[-1]
    if attention_mask is not None:
        valid = valid & (attention_mask.flatten() != 0)
    return ids, valid, bounds


def _check_vision_tokens(
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    second_per_grid_ts: Tensor | None,
    split_frames: bool,
    *,
    merge_size: int,
    vision_start_token_id: int | None,
    **token_ids: int,
) -> tuple[int, int | None, int, int]:
    """``merge_size`` and the token ids as Python integers; nothing is read from a device."""
    (m,) = _check.whole(merge_size=merge_size)
    start = _given("vision_start_token_id", vision_start_token_id)
    image_id, video_id = _check.whole(0, **token_ids)
    _check.flags(split_frames=split_frames)
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must have shape [L] or [B, L], got {list(input_ids.shape)}")
    _check.dtype("input_ids", input_ids, torch.int64, torch.int32)
    grids = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
    for name, grid_thw in grids.items():
        if grid_thw is not None:
            _check.shape(name, grid_thw, None, 3)
            _check.dtype(name, grid_thw, torch.int64, torch.int32)
            _check.same_device(input_ids=input_ids, **{name: grid_thw})
    if second_per_grid_ts is not None:
        num_videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
        _check.shape("second_per_grid_ts", second_per_grid_ts, num_videos)
        _check.dtype("second_per_grid_ts", second_per_grid_ts, torch.float32, torch.float64)
        _check.same_device(input_ids=input_ids, second_per_grid_ts=second_per_grid_ts)
    if attention_mask is not None:
        _check.shape("attention_mask", attention_mask, *input_ids.shape)
        _check.dtype("attention_mask", attention_mask, torch.bool, torch.int64, torch.int32)
        _check.same_device(input_ids=input_ids, attention_mask=attention_mask)
    if cu_seqlens is not None:
        _check.shape("input_ids", input_ids, None)
        _check.shape("cu_seqlens", cu_seqlens, None)
        _check.dtype("cu_seqlens", cu_seqlens, torch.int32)
        _check.same_device(input_ids=input_ids, cu_seqlens=cu_seqlens)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens must have at least one bound, got []")
    return m, start, image_id, video_id
