"""Frames of video files, by index: exact, streamed, upright. Needs PyAV, the extra ``video``.

``probe`` says what a plan asks for (``patchpack.systems``), ``read_frames`` reads the frames that
the plan chose. Frame ``i`` is the ``i``-th that decoding the whole file gives. Where a file says
when each of its frames is shown, reading starts at the keyframe before; elsewhere at the first
frame. Never is more than a few frames in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchpack.packing import is_integer

if TYPE_CHECKING:
    import av
    import PIL.Image

# containers that store when a frame is shown, and codecs that make one frame of one packet
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")

# frames that are rather decoded than jumped over: a decoder takes some time to start again
_FRAMES_A_SEEK = 16

_UNKNOWN = np.iinfo(np.int64).min
# when a frame is shown, for how long, and for a keyframe where to seek to
_SHOWN = np.dtype([("time", np.int64), ("duration", np.int64), ("seek", np.int64)])


@dataclass(frozen=True)
class VideoInfo:
    """What a plan asks of a video.

    Attributes:
        num_frames: Frames that decoding the file gives.
        fps: Frames per second, on average; 0 for a single frame of unknown duration.
        height: Height of a frame as it is shown, in pixels: after rotation, of square pixels.
        width: Width of a frame as it is shown, likewise.
        duration: Seconds from the first frame to the end of the last.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    duration: float


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Look a video over. Reads the file once; decodes it only where packets cannot be counted.

    Args:
        path: A file with a video stream; the best of several is taken.

    Returns:
        What ``plan_video`` of a system asks for, and the duration.

    Raises:
        ModuleNotFoundError: PyAV or Pillow is not installed.
        OSError: There is no such file, or it may not be read.
        ValueError: It has no video, or is damaged.
    """
    with _open(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError(f"{path} must have a frame, got none")
        time_base, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
        width, height = _upright(first).size

    shown = _timeline(path)
    if shown is None:
        with _open(path) as (container, stream):
            shown = np.fromiter((_when(f) for f in container.decode(stream)), _SHOWN)
    num_frames = len(shown)
    duration = 0.0
    if _UNKNOWN not in shown["time"]:
        last = shown[shown["time"].argmax()]
        duration = float(last["time"] + last["duration"] - shown["time"].min()) * time_base
    elif rate:
        duration = num_frames / rate
    # the container's own rate is exact, unless it is a guess
    if duration and abs(num_frames - rate * duration) > 1:
        rate = num_frames / duration
    return VideoInfo(num_frames, rate, height, width, duration)


def read_frames(path: str | os.PathLike[str], indices: Iterable[int]) -> Iterator[PIL.Image.Image]:
    """Read frames of a video, one after the other.

    The file is read once at the call, to find its keyframes, and is open again from the first
    frame that is asked for to the last, or until the iterator is closed.

    Args:
        path: A file with a video stream; the best of several is taken.
        indices: Which frames, in ascending order; equal ones give the same image again.

    Returns:
        An RGB image for each index, as it is shown: rotated as the file says, of square pixels.

    Raises:
        ModuleNotFoundError: PyAV or Pillow is not installed.
        OSError: There is no such file, or it may not be read.
        TypeError: An index is not an integer.
        ValueError: The file has no video or is damaged, or an index is negative, below the one
            before, or past the last frame; in a file whose frames must be decoded to be counted,
            the latter shows where the frames end.
    """
    wanted = _indices(indices)
    shown = _timeline(path)
    if shown is not None and wanted and wanted[-1] >= len(shown):
        raise _past_the_end(path, len(shown), wanted[-1])
    return _images(path, Counter(wanted), shown)


def _images(
    path: str | os.PathLike[str], wanted: Counter[int], shown: np.ndarray | None
) -> Iterator[PIL.Image.Image]:
    with contextlib.closing(_frames(path, list(wanted), shown)) as frames:
        for frame, repeats in zip(frames, wanted.values(), strict=True):
            yield from itertools.repeat(_upright(frame), repeats)


def _frames(
    path: str | os.PathLike[str], wanted: list[int], shown: np.ndarray | None
) -> Generator[av.VideoFrame]:
    done = 0
    if shown is not None:
        for frame in _sought(path, wanted, shown):
            yield frame
            done += 1
    if done < len(wanted):
        yield from _in_order(path, wanted[done:])


def _in_order(path: str | os.PathLike[str], wanted: list[int]) -> Iterator[av.VideoFrame]:
    """The frames ``wanted``, counted from the first: what an index means."""
    with _open(path) as (container, stream):
        frames = enumerate(container.decode(stream))
        count = 0
        for index in wanted:
            for i, frame in frames:
                count = i + 1
                if i == index:
                    yield frame
                    break
            else:
                raise _past_the_end(path, count, index)


def _sought(
    path: str | os.PathLike[str], wanted: list[int], shown: np.ndarray
) -> Iterator[av.VideoFrame]:
    """The frames ``wanted``, from keyframes on; ends early if other frames come than ``shown``."""
    keyframes = np.flatnonzero(shown["seek"] != _UNKNOWN)
    with _open(path) as (container, stream):
        frames = container.decode(stream)
        last = -1  # the frame that was decoded last
        for index in wanted:
            keyframe = int(keyframes[np.searchsorted(keyframes, index, side="right") - 1])
            if keyframe - last > _FRAMES_A_SEEK:
                container.seek(int(shown["seek"][keyframe]), stream=stream)
                frames = _decode_from(container, stream, int(shown["time"][keyframe]))
                last = keyframe - 1
            while last < index:
                last += 1
                frame = next(frames, None)
                if frame is None or frame.pts != shown["time"][last]:
                    return
            yield frame


def _decode_from(container: Any, stream: Any, time: int) -> Iterator[av.VideoFrame]:
    """The frames from ``time`` on, that of a keyframe which the container was sought to."""
    for packet in itertools.dropwhile(lambda p: not p.is_keyframe, container.demux(stream)):
        # before its time come frames that need what comes before the keyframe
        yield from (f for f in packet.decode() if f.pts is not None and f.pts >= time)


def _timeline(path: str | os.PathLike[str]) -> np.ndarray | None:
    """When frames are shown, in that order, if the packets of the file can be trusted to say so.

    Nothing is decoded.
    """
    with _open(path) as (container, stream):
        known = container.format.name in _CONTAINERS and stream.codec_context.name in _CODECS
        if not known:
            return None
        packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
        shown = np.fromiter((_when(p, p.is_keyframe) for p in packets), _SHOWN)
    times = shown["time"]
    if not len(times) or _UNKNOWN in times or len(np.unique(times)) < len(times):
        return None
    of_keyframes = times[shown["seek"] != _UNKNOWN]
    if shown["seek"][0] == _UNKNOWN or times[0] != times.min() or (np.diff(of_keyframes) < 0).any():
        return None  # it was cut or joined, and what a decoder makes of the ends is its own affair
    return shown[np.argsort(times)]


def _when(unit: av.Packet | av.VideoFrame, is_keyframe: bool = False) -> tuple[int, int, int]:
    """What ``_SHOWN`` holds of a packet or frame."""
    time = _UNKNOWN if unit.pts is None else unit.pts
    seek = time if unit.dts is None else unit.dts  # most containers seek by decoding time
    return time, unit.duration or 0, seek if is_keyframe else _UNKNOWN


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, with PyAV's errors as Python's."""
    try:
        import av.error  # here, because planning works without it
        import PIL.Image  # noqa: F401 frames become its images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "videos need PyAV and Pillow: pip install 'patchpack[video]'", name=error.name
        ) from None
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{path} must have a video stream, got none")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):  # no such file, and the like
            raise
        raise ValueError(f"{path} must be a video that can be decoded: {error.strerror}") from error


def _upright(frame: av.VideoFrame) -> PIL.Image.Image:
    import PIL.Image

    turns = {
        90: PIL.Image.Transpose.ROTATE_90,
        180: PIL.Image.Transpose.ROTATE_180,
        270: PIL.Image.Transpose.ROTATE_270,
    }
    turn = turns.get(frame.rotation % 360)  # counterclockwise, in both
    image = frame.to_image()
    return image if turn is None else image.transpose(turn)


def _past_the_end(path: str | os.PathLike[str], num_frames: int, index: int) -> ValueError:
    return ValueError(f"indices must be below {num_frames}, the frames of {path}, got {index}")


def _indices(indices: Iterable[int]) -> list[int]:
    if not isinstance(indices, Iterable):
        raise TypeError(f"indices must be integers in a sequence, got {indices!r}")
    wanted = []
    for i, index in enumerate(indices):
        if not is_integer(index):
            raise TypeError(f"indices[{i}] must be an integer, got {index!r}")
        if index < (least := wanted[-1] if wanted else 0):
            raise ValueError(f"indices[{i}] must be at least {least}, got {index}")
        wanted.append(int(index))
    return wanted
