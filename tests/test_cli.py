"""``python -m patchpack``: what each command prints and writes, and its exit status."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

import patchpack
from patchpack import _dispatch
from patchpack.__main__ import main
from patchpack.cli import _demo_model, _demo_systems, _media, to_json, verify
from patchpack.testing import machine
from patchpack.testing.catalogue import SPECS


def _photo(path, height, width, mode="RGB"):
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    Image.fromarray((127 * (waves + 1)).astype(np.uint8)).convert(mode).save(path)
    return str(path)


def _clip(path, frames=9, height=48, width=80):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = height, width
        for i in range(frames):
            frame = np.full((height, width, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture
def photos(tmp_path):
    return [_photo(tmp_path / "wide.png", 40, 90), _photo(tmp_path / "tall.jpg", 80, 50, "L")]


def _one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_info_needs_nothing_but_the_package():
    code = (
        "import sys\n"
        "for name in ('rich', 'PIL', 'matplotlib', 'skimage'): sys.modules[name] = None\n"
        "from patchpack.__main__ import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    for word in (patchpack.__version__, torch.__version__, *SPECS):
        assert word in done.stdout
    for impl in _dispatch.IMPLS:
        reason = patchpack.available("rope", impl)
        lines = [x for x in done.stdout.splitlines() if x.startswith(f"{impl} is not available")]
        assert bool(lines) == any(patchpack.available(op, impl) for op in SPECS)
        assert reason is None or any(line.endswith(f": {reason}") for line in lines)
    assert "pip install 'patchpack[demo]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert {"demo", "info", "plan", "verify"} <= set(capsys.readouterr().out.split())


# plan --------------------------------------------------------------------------------------------


def test_plan_of_a_square_of_224_pixels(tmp_path, capsys):
    path = _photo(tmp_path / "square.png", 224, 224)
    assert main(["plan", "--system", "qwen2_vl", path]) == 0
    words = capsys.readouterr().out.split()
    assert {"224x224", "1x16x16", "256", "64", "2"} <= set(words)

    assert main(["plan", path, "--json", "--min-pixels", "200704"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "square",
            "height": 224,
            "width": 224,
            "frames": None,
            "grids": [[1, 32, 32]],
            "vit_tokens": 1024,
            "llm_tokens": 256,
            "markup_tokens": 2,
        }
    ]


@pytest.mark.parametrize("system", _media.SYSTEMS)
def test_plan_knows_every_system(system, photos, capsys):
    assert main(["plan", "--system", system, "--json", *photos]) == 0
    documents = json.loads(capsys.readouterr().out)
    module = _media.system(system)
    for document in documents:
        plan = module.plan(document["height"], document["width"])
        assert document["grids"] == [list(grid) for grid in plan.grids]
        assert document["vit_tokens"] == sum(math.prod(grid) for grid in plan.grids)
        assert document["llm_tokens"] == plan.llm_tokens > 0


def test_plan_shows_all_systems_and_clips(photos, tmp_path, capsys):
    paths = [*photos, _clip(tmp_path / "clip.mp4")]
    assert main(["plan", "--system", "all", "--json", *paths]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert {"internvl", "llava_onevision", "oryx", "qwen2_vl"} <= documents.keys()
    assert "pixtral" not in documents  # it has no rules for video
    for of in documents.values():
        assert [x["frames"] is None for x in of] == [True, True, False]
        assert 1 <= of[2]["frames"] <= 32

    assert main(["plan", "--system", "all", *paths]) == 0
    printed, left_out = capsys.readouterr()
    assert "Pixtral cannot use" in left_out
    assert all(_media.SYSTEMS[name] in printed for name in documents)
    assert "of 9" in printed


def test_plan_refuses_what_a_system_does_not_have(photos, tmp_path, capsys):
    assert main(["plan", "--system", "internvl", "--max-pixels", "9", *photos]) == 2
    assert _one_line(capsys) == "patchpack: InternVL 1.5 has no --max-pixels"
    assert main(["plan", "--system", "pixtral", _clip(tmp_path / "clip.mp4")]) == 2
    line = _one_line(capsys)
    assert line.startswith("patchpack: Pixtral cannot use ")
    assert line.endswith("clip.mp4: it has no rules for video")
    (tmp_path / "broken.mp4").write_text("not a clip")
    assert main(["plan", str(tmp_path / "broken.mp4")]) == 2
    assert _one_line(capsys).startswith(f"patchpack: cannot use {tmp_path / 'broken.mp4'}: ")


def test_plan_turns_a_photo_as_its_camera_was_held(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (280, 140)).save(tmp_path / "held.jpg", exif=exif)
    assert main(["plan", "--json", str(tmp_path / "held.jpg")]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert (plan["height"], plan["width"]) == (280, 140)


@pytest.mark.parametrize("command", [["plan"], ["demo", "--images"]])
def test_an_image_that_cannot_be_used_is_one_line(command, tmp_path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    for path, reason in (
        (tmp_path / "missing.png", "No such file"),
        (tmp_path, "directory"),
        (text, "cannot identify image"),
    ):
        assert main([*command, str(path)]) == 2
        line = _one_line(capsys)
        assert line.startswith(f"patchpack: cannot use {path}: ")
        assert reason in line


@pytest.mark.parametrize(
    ("command", "system"), [(["plan"], "Qwen2-VL"), (["demo", "--images"], "Oryx")]
)
def test_an_image_that_a_system_refuses_is_one_line(command, system, tmp_path, capsys):
    thin = _photo(tmp_path / "thin.png", 2, 900)
    assert main([*command, thin]) == 2
    line = _one_line(capsys)
    assert line.startswith(f"patchpack: {system} cannot use {thin}: ")
    assert "got 2 x 900" in line


def test_what_no_system_can_use_is_said(photos, monkeypatch, capsys):
    monkeypatch.setattr(_media, "SYSTEMS", {"internvl": "InternVL 1.5"})
    assert main(["plan", "--system", "all", "--max-pixels", "9", *photos]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "patchpack: InternVL 1.5 has no --max-pixels",
        "patchpack: no system can use all of them",
    ]


def test_an_image_of_16_bits_is_one_line(tmp_path, capsys):
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "xray.png")
    assert main(["plan", str(tmp_path / "xray.png")]) == 2
    line = _one_line(capsys)
    assert line.startswith("patchpack: cannot use ")
    assert "xray.png: image must have 8 bits a channel" in line


def test_a_file_may_have_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["[red]a[/]", "a_photo_whose_name_is_longer_than_the_room_of_a_narrow_terminal"]
    paths = [_photo(tmp_path / f"{name}.png".replace("/", "|"), 400, 600) for name in names]
    assert main(["plan", *paths]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(row[1].strip() for row in rows) == "".join(names).replace("/", "|")
    assert {"400x600", "1x28x42"} <= {cell.strip() for row in rows for cell in row}


# verify ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """One small case of one op, and the checks that take no time."""
    spec = dataclasses.replace(SPECS["rope"], cases={"small": {"sizes": [(1, 2, 3)]}})
    monkeypatch.setitem(SPECS, "rope", spec)
    checks = ("accuracy", "strided inputs", "empty input", "opcheck")
    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in checks})
    return spec


def _verdicts(capsys):
    report = json.loads(capsys.readouterr().out)
    return report, {result["check"]: result for result in report["results"]}


@pytest.mark.usefixtures("quick")
def test_verify_reports_every_check(capsys):
    assert main(["verify", "--op", "rope", "--impl", "triton", "--json"]) == 0
    report, verdicts = _verdicts(capsys)
    assert (report["impl"], report["device"]) == ("triton", "cpu")
    assert all(verdict["passed"] for verdict in verdicts.values())
    assert verdicts["accuracy"]["cases"] == 3  # one a dtype
    assert 0 < verdicts["accuracy"]["error"] < 1e-2
    assert 0 < verdicts["accuracy"]["eager_error"] < 1e-2


@pytest.mark.usefixtures("quick")
def test_verify_skips_what_the_reference_does_not_owe(capsys):
    assert main(["verify", "--op", "rope", "--impl", "reference", "--json"]) == 0
    _, verdicts = _verdicts(capsys)
    assert {name: verdict["passed"] for name, verdict in verdicts.items()} == {
        "accuracy": None,
        "strided inputs": True,
        "empty input": True,
        "opcheck": None,
    }
    assert verdicts["opcheck"]["message"] == "the reference is not a registered op"

    assert main(["verify", "--op", "rope", "--impl", "reference"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("reference on cpu")
    assert "--impl triton" in printed
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert ["strided inputs", "ok"] in cells
    assert ["opcheck", "skipped"] in cells


def test_verify_fails_where_an_op_is_wrong(quick, monkeypatch, capsys):
    monkeypatch.delitem(verify.CHECKS, "opcheck")

    def wrong(q, k, cos, sin, **options):
        return patchpack.rope(q, k, cos, 1.001 * sin, **options)

    monkeypatch.setitem(SPECS, "rope", dataclasses.replace(quick, op=wrong))
    assert main(["verify", "--op", "rope", "--impl", "triton", "--json"]) == 1
    _, verdicts = _verdicts(capsys)
    assert verdicts["accuracy"]["passed"] is False
    assert "small, torch.float32: output 0: error" in verdicts["accuracy"]["message"]
    assert verdicts["strided inputs"]["passed"] is True

    assert main(["verify", "--op", "rope", "--impl", "triton"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_keeps_a_failure_though_memory_ran_out(quick, monkeypatch, capsys):
    monkeypatch.setitem(
        SPECS, "rope", dataclasses.replace(quick, cases=quick.cases | {"large": {}})
    )

    def check(subject):
        if subject.case == "large":
            raise torch.OutOfMemoryError("no memory")
        if not fine:
            raise AssertionError("it is wrong")

    monkeypatch.setattr(verify, "CHECKS", {"strided inputs": check})
    for fine, status, passed in ((True, 0, None), (False, 1, False)):
        assert main(["verify", "--op", "rope", "--impl", "triton", "--json"]) == status
        _, verdicts = _verdicts(capsys)
        assert verdicts["strided inputs"]["passed"] is passed
        message = verdicts["strided inputs"]["message"]
        assert message == ("large: no memory" if fine else "small: AssertionError: it is wrong")


def test_verify_takes_the_ops_that_an_implementation_has(monkeypatch, capsys):
    monkeypatch.setattr(verify, "CHECKS", {"strided inputs": lambda subject: None})
    monkeypatch.setattr(
        patchpack, "available", lambda op, impl: None if "rope" in op else "it has none"
    )
    assert main(["verify", "--impl", "triton", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["op"] for result in found["results"]] == ["rope", "rope_2d", "mrope"]
    assert found["left_out"]["assemble"] == "it has none"
    assert main(["verify", "--impl", "triton"]) == 0
    assert "assemble is left out: it has none" in capsys.readouterr().out


def test_verify_says_why_it_cannot(monkeypatch, capsys):
    monkeypatch.setattr(patchpack, "available", lambda op, impl: "it is not here.")
    assert main(["verify", "--op", "rope", "--impl", "native"]) == 2
    assert _one_line(capsys).endswith("impl='native' of rope: it is not here.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "--device", "cuda"]) == 2
    assert _one_line(capsys).endswith(f"cannot verify on cuda: {machine.no_gpu()}")


# demo --------------------------------------------------------------------------------------------


def _demo(photos, out, *options):
    limits = ("--steps", "2", "--max-pixels", "3136", "--device", "cpu")
    return main(["demo", "--images", *photos, "--out", str(out), *limits, *options])


@pytest.fixture
def one_system(monkeypatch):
    """The demo with the quickest of its systems."""
    small = {"qwen2_vl": _demo_systems.SMALL["qwen2_vl"]}
    monkeypatch.setattr(_demo_systems, "SMALL", small)


def test_demo_writes_what_it_found(photos, tmp_path, capsys):
    photos.append(_clip(tmp_path / "clip.mp4"))
    assert _demo(photos, tmp_path / "out") == 0
    document = json.loads((tmp_path / "out/demo.json").read_text())
    assert document.keys() == {"systems", "checks", "loss", "seconds"}
    assert document["systems"].keys() == _demo_systems.SMALL.keys()
    for system in document["systems"].values():
        assert [image["name"] for image in system["images"]] == ["wide", "tall", "clip"]
        assert all(image["llm_tokens"] > 0 for image in system["run"])
        assert all(check["passed"] is True for check in system["checks"])
        assert {"tokens", "grad vit.patch_embed.proj.weight"} <= {
            check["name"] for check in system["checks"]
        }
        assert system["seconds"].keys() == {"fused", "reference"}
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["loss curve"].keys() == {"name", "error", "eager_error", "passed"}
    assert all(check["passed"] is True for check in checks.values())
    model = _demo_model.Restorer("reference")
    assert {f"grad {name}" for name, _ in model.named_parameters()} <= checks.keys()
    assert {"vision tokens", "half-resolution tokens", "language-model layer"} <= checks.keys()
    assert document["loss"].keys() == {"fused", "reference"}
    for losses in document["loss"].values():
        assert len(losses) == 2
        assert losses[1] < losses[0]
    assert document["seconds"] > 0

    for name in ("demo.png", "training.png"):
        image = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        assert min(image.shape[:2]) > 500
        colours = np.unique(image.reshape(-1, 3), axis=0)
        assert len(colours) > 1000

    printed = capsys.readouterr().out
    for words in ("wide", "tall", "Oryx", "grad head.weight", "loss curve"):
        assert words in printed
    native = patchpack.available("varlen_attention", "native") is None
    assert ("interpreter" in printed) is not native


@pytest.mark.usefixtures("one_system")
def test_demo_of_the_kernels_in_the_interpreter(photos, tmp_path, capsys):
    assert _demo(photos, tmp_path / "out", "--impl", "triton", "--steps", "1") == 0
    assert "interpreter" in capsys.readouterr().out


@pytest.mark.usefixtures("one_system")
def test_demo_fails_where_the_fused_path_is_wrong(photos, tmp_path, monkeypatch, capsys):
    def wrong(q, k, position_ids, *, impl, **options):
        base = 1e6 if impl == "reference" else 1.001e6
        return patchpack.mrope(q, k, position_ids, base=base, impl=impl, **options)

    monkeypatch.setattr(_demo_model, "mrope", wrong)
    assert _demo(photos, tmp_path, "--steps", "1") == 1
    checks = json.loads((tmp_path / "demo.json").read_text())["checks"]
    passed = {check["name"]: check["passed"] for check in checks}
    assert passed["vision tokens"] is True
    assert passed["language-model layer"] is False
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("one_system")
def test_demo_reports_a_fused_path_that_gives_nan(photos, tmp_path, monkeypatch):
    def wrong(q, k, position_ids, *, impl, **options):
        q, k = patchpack.mrope(q, k, position_ids, impl=impl, **options)
        return (q if impl == "reference" else q * math.nan), k

    monkeypatch.setattr(_demo_model, "mrope", wrong)
    assert _demo(photos, tmp_path) == 1
    document = json.loads((tmp_path / "demo.json").read_text())
    assert document["loss"]["fused"] == [None, None]
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--max-pixels", "0"], "max_pixels must be above 0, got 0"),
    ],
)
def test_demo_refuses_options_that_make_no_sense(options, message, photos, tmp_path, capsys):
    assert _demo(photos, tmp_path, *options) == 2
    assert message in _one_line(capsys)


def test_demo_refuses_a_seed_that_torch_cannot_take(photos, tmp_path, capsys):
    for seed in ("-1", str(2**64)):
        assert _demo(photos, tmp_path, "--seed", seed) == 2
        assert _one_line(capsys).endswith(f"--seed must be in 0..2**64 - 1, got {seed}")


def test_demo_finds_out_first_that_it_cannot_write(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "out/demo.png").mkdir(parents=True)
    for out in ("file", "out"):
        assert _demo(photos, tmp_path / out) == 2
        assert _one_line(capsys).startswith(f"patchpack: cannot write to {tmp_path / out}: ")


def test_demo_needs_a_fused_path(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patchpack, "available", lambda op, impl: "Triton is not installed.")
    assert _demo(photos, tmp_path) == 2
    assert _one_line(capsys) == "patchpack: cannot run the fused path: Triton is not installed."


def test_demo_hides_half_of_every_photo(photos, tmp_path):
    media = _media.read([*photos, _photo(tmp_path / "tiny.png", 28, 28)])
    plans = _media.plan(media, "qwen2_vl", max_pixels=3136)
    photos = [
        _demo_model.Photo(m.name, m.image, plan) for m, plan in zip(media, plans, strict=True)
    ]
    for seed in range(20):
        batch = _demo_model.pack(photos, seed, "cpu", torch.float32)
        lengths = batch.merged.grid_thw.prod(dim=1).tolist()
        hidden = [int(x.sum()) for x in batch.hidden.split(lengths)]
        assert hidden == [max(1, n // 2) for n in lengths]


@pytest.mark.usefixtures("one_system")
def test_demo_draws_any_photo(tmp_path):
    clear = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    clear.save(tmp_path / "costs_$x^$.png")
    assert _demo([str(tmp_path / "costs_$x^$.png")], tmp_path, "--steps", "1") == 0
    (photo,) = _media.read([tmp_path / "costs_$x^$.png"])
    assert photo.image.getpixel((0, 0)) == (255, 255, 255)  # as the encoder sees it


def test_names_hold_no_commands_for_a_terminal(tmp_path, capsys):
    path = _photo(tmp_path / "a\x1b[2Jb\nc\udcff.png", 56, 56)
    assert main(["plan", path]) == 0
    assert "\x1b" not in (printed := capsys.readouterr().out)
    assert "a\ufffd[2Jb\ufffdc\ufffd" in printed
    assert main(["plan", path + "\n\x1b[2J"]) == 2
    assert "\x1b" not in _one_line(capsys)


@pytest.mark.usefixtures("one_system")
def test_names_in_any_script(tmp_path, photos):
    path = _photo(tmp_path / "写真.png", 56, 56)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "patchpack", "plan", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "56x56" in done.stdout
    assert _demo([path], tmp_path, "--steps", "1") == 0  # warnings are errors


def test_json_is_strict():
    text = to_json({"a": [math.nan, 1.5], "b": {"c": -math.inf}, "d": [True, "NaN", None]})
    assert json.loads(text) == {"a": [None, 1.5], "b": {"c": None}, "d": [True, "NaN", None]}
