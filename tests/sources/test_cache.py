"""The image cache against the files it is made of, bit for bit; interrupted builds against one in a single run."""

import dataclasses
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FAMILIES, GOLDEN, ROOT, load, run_prepare
from PIL import Image

from data import ImageCache, ImageFolder
from plumbing import checkpoint
from plumbing.files import only_writer
from plumbing.pixels import normalise, preprocess
from sources import cache

MODEL = GOLDEN / "libra-7b" / "model"


def config(pad="black"):
    return dataclasses.replace(load("libra-7b").pixels, pad=pad)


def flags(folder, out, names):
    records = folder / f"{len(names)}.jsonl"
    records.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    return "cache", "--records", records, "--image-folder", folder, "--model", MODEL, "--out", out, "--workers", "2"


def build(folder, out, names, *more):
    return run_prepare(*flags(folder, out, names), *more)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def table(printed):
    """{row: figure} of the table that ends a build."""
    return dict(re.split("  +", row) for row in printed.splitlines()[-8:])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Grey and coloured images of odd shapes; the names of the coloured ones begin with Röntgen."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for number, shape in enumerate([(61, 97), (97, 61), (56, 56), (1, 3), (300, 7), (57, 56)]):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"g{number}.png")
        colour = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / "sub" / f"Röntgen {number}.png")
    Image.fromarray(draw.integers(0, 65536, (40, 50), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(draw.integers(0, 256, (40, 50), dtype=np.uint8)).convert("RGB").save(folder / "grey as rgb.jpg")
    return folder


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.[pj][np]g"))


@pytest.fixture
def made(pictures, tmp_path):
    build(pictures, tmp_path / "made", ["g0.png", "g1.png"])
    return tmp_path / "made"


@pytest.mark.parametrize("pad", ["black", "mean", "none"])
def test_pixels_from_the_cache_are_those_from_the_file_to_the_bit(pictures, tmp_path, capsys, pad):
    names = names_in(pictures)
    assert build(pictures, tmp_path, names[::-1], "--pad", pad) == 0
    built, folder = ImageCache(tmp_path, config(pad)), ImageFolder(pictures, config(pad))
    for name in names:
        assert built.frame(name).dtype == np.uint8 and (built.frame(name) == folder.frame(name)).all()
        image = Image.open(pictures / name)
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        pixels = preprocess(image.convert("RGB"), built.config)
        assert torch.equal(normalise(built.frame(name), built.config), pixels)
    grey = sum("Röntgen" not in name for name in names)
    assert table(capsys.readouterr().out)["of one channel"] == str(grey)
    assert (tmp_path / "frames.bin").stat().st_size == 56 * 56 * (grey + 3 * (len(names) - grey))


def test_a_cache_travels_to_another_process_without_its_frames(made):
    sent = pickle.dumps(ImageCache(made, config()))
    assert len(sent) < 2000 and pickle.loads(sent).frame("g0.png").any()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_settings_are_those_of_the_loaded_model(family):
    pixels = load(family).pixels
    assert cache.pixels_of(checkpoint.locate(GOLDEN / family / "model"), pixels.pad) == pixels


def test_an_encoder_with_the_image_processor_of_transformers_5_has_the_same_settings(tmp_path):
    settings = json.loads((GOLDEN / "libra-7b" / "encoder-dinov2" / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert cache.pixels_of(checkpoint.locate(tmp_path), "black") == config()


@pytest.mark.parametrize(
    ("fields", "word"),
    [(dict(mm_vision_tower=["a"]), "mm_vision_tower"), (dict(mm_vision_tower="a", mm_vision_tower_config=1), "_config"),
     (dict(mm_vision_tower="a", mm_vision_tower_config="config.json"), "vision_cfg"), ({}, "names no encoder")],
)  # fmt: skip
def test_a_checkpoint_that_names_no_encoder_is_refused(tmp_path, fields, word):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=word):
        cache.pixels_of(checkpoint.locate(tmp_path), "black")


def test_a_second_build_adds_what_is_missing_and_changes_nothing_else(pictures, tmp_path, capsys):
    names = names_in(pictures)
    build(pictures, tmp_path, names[:5])
    before, first = ImageCache(tmp_path, config()), content(tmp_path)
    build(pictures, tmp_path, names[:5])
    assert content(tmp_path) == first
    build(pictures, tmp_path, names)
    assert table(capsys.readouterr().out)["there before"] == "5"
    assert content(tmp_path)["frames.bin"].startswith(first["frames.bin"])
    after, folder = ImageCache(tmp_path, config()), ImageFolder(pictures, config())
    assert all((after.frame(name) == folder.frame(name)).all() for name in names)
    assert (before.frame(names[2]) == after.frame(names[2])).all()


def test_images_that_cannot_be_read_are_counted_and_named(pictures, tmp_path, capsys):
    (pictures / "cut.png").write_bytes((pictures / "g0.png").read_bytes()[:200])
    assert build(pictures, tmp_path, ["g0.png", "cut.png", "../escape.png", "none.png"]) == 0
    (pictures / "cut.png").unlink()
    printed = capsys.readouterr()
    counts = {"images": "1", "skipped, no file": "1", "skipped, other reasons": "2"}
    assert table(printed.out).items() >= counts.items()
    assert all(f"skipped {name}: " in printed.err for name in ("cut.png", "../escape.png", "none.png"))
    with pytest.raises(FileNotFoundError, match=r"cut\.png"):
        ImageCache(tmp_path, config()).find("cut.png")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of images that take some 30 ms each to decode and resize, all different."""
    folder = tmp_path_factory.mktemp("large")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    for number in range(60):
        noise.resize((1500 + number, 1200), Image.Resampling.BILINEAR).save(folder / f"{number}.jpg")
    return folder


def start_building(folder, out, until):
    """Start a build in a process group of its own. Returns when until() is true or the build has ended."""
    command = [sys.executable, ROOT / "prepare.py", *flags(folder, out, names_in(folder))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while not until() and process.poll() is None:
        time.sleep(0.005)
    return process


def wait_for_workers(process):
    """Returns when no process of the group is left; the workers end with the build, so this must not hang."""
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)


def test_a_killed_build_is_resumed_to_the_same_bytes(large, tmp_path):
    """The environment variable KILLS is the number of kills."""
    assert build(large, tmp_path / "whole", names_in(large)) == 0
    out, draw, kills = tmp_path / "killed", random.Random(0), 0
    growing = out / ".index.jsonl.growing"
    done = lambda: growing.read_bytes().count(b"\n") if growing.exists() else 0
    while kills < int(os.environ.get("KILLS", 3)):
        before = done()
        process = start_building(large, out, until=lambda: done() > max(before, 1))  # noqa: B023
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
        wait_for_workers(process)
        kills += process.returncode == -signal.SIGKILL
        if (out / "index.jsonl").exists():
            # it was finished before the kill: begin again
            assert content(out) == content(tmp_path / "whole")
            (out / "index.jsonl").unlink()
    assert build(large, out, names_in(large)) == 0
    assert content(out) == content(tmp_path / "whole")


def test_a_torn_line_and_frames_without_a_line_are_made_again(pictures, tmp_path):
    names, out = names_in(pictures), tmp_path / "torn"
    build(pictures, tmp_path / "whole", names)
    for length in (0, 30, 200, 333):
        build(pictures, out, names)
        (out / ".index.jsonl.growing").write_bytes((out / "index.jsonl").read_bytes()[:length])
        (out / "index.jsonl").unlink()
        with (out / "frames.bin").open("ab") as file:
            file.write(bytes(length))
        build(pictures, out, names)
        assert content(out) == content(tmp_path / "whole")


def test_an_interrupt_ends_the_workers_too(large, tmp_path):
    process = start_building(large, tmp_path, until=(tmp_path / ".index.jsonl.growing").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in error
    wait_for_workers(process)


def test_a_worker_that_dies_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "read_frame", _die)
    assert build(pictures, tmp_path, ["g0.png"]) == 2
    assert "worker" in capsys.readouterr().err


def _die(images, name):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("change", [
    {"pad": "mean"}, {"pad": "none"}, {"size": 60}, {"squash": True}, {"rounds": True}, {"dicom_display": "jpg"},
])  # fmt: skip
def test_a_cache_of_other_settings_is_refused_by_name(made, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"'{name}': {value!r}"):
        ImageCache(made, dataclasses.replace(config(), **change))


def test_the_mean_colour_is_a_setting_where_it_is_seen(pictures, made, tmp_path):
    other = {"mean": (0.5, 0.5, 0.5)}
    ImageCache(made, dataclasses.replace(config(), **other))
    build(pictures, tmp_path / "mean", ["g0.png"], "--pad", "mean")
    with pytest.raises(ValueError, match=r"'mean': \[0\.5, 0\.5, 0\.5\]"):
        ImageCache(tmp_path / "mean", dataclasses.replace(config("mean"), **other))


def test_damage_is_found_when_a_frame_is_read(made):
    data = bytearray((made / "frames.bin").read_bytes())
    data[56 * 56 + 100] ^= 1
    (made / "frames.bin").write_bytes(data)
    ImageCache(made, config()).frame("g0.png")
    with pytest.raises(ValueError, match=r"frames\.bin is damaged at g1\.png"):
        ImageCache(made, config()).frame("g1.png")


@pytest.mark.parametrize("name", ["frames.bin", "index.jsonl"])
def test_a_file_that_is_cut_or_missing_is_refused(made, name):
    os.truncate(made / name, (made / name).stat().st_size - 9)
    with pytest.raises(ValueError, match=name):
        ImageCache(made, config())
    (made / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        ImageCache(made, config())


def test_an_odd_record_costs_no_other_image(pictures, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    records.write_text('{"image": "g0.png"}\n{"image": 3}\nx\n{"image": ["g1.png", "g2.png"]}\n')
    assert build(pictures, tmp_path / "out", [], "--records", records) == 0
    printed = capsys.readouterr()
    assert table(printed.out)["images"] == "3"
    assert "2 of 4 records are left out; the first" in printed.err and "records.jsonl line 2 image" in printed.err


@pytest.mark.parametrize("name", ["index.jsonl", ".index.jsonl.growing", "frames.bin"])
def test_a_pipe_in_the_cache_is_refused_not_waited_for(pictures, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    assert build(pictures, tmp_path / "out", ["g0.png"]) == 2
    assert f"{name} is a pipe" in capsys.readouterr().err


def test_two_builds_do_not_write_one_cache(pictures, made, capsys):
    with open(made / "frames.bin", "ab") as file, only_writer(file, made):
        assert build(pictures, made, ["g2.png"]) == 2
    assert str(made) in capsys.readouterr().err
    assert build(pictures, made, ["g2.png"]) == 0


@pytest.mark.parametrize("flag, value", [
    ("--pad", "mean"),
    ("--model", "empty"),
    ("--image-folder", "none"),
    ("--records", "wrong.json"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_the_cache_as_it_was(made, monkeypatch, capsys, flag, value):
    folder, before = made.parent, content(made)
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text("{}")
    (folder / "wrong.json").write_text('[{"image": 3}, {"image": {}}]')
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert build(folder, made, ["g0.png"], flag, value) == 2
    error = capsys.readouterr().err
    assert value in error and error.count("\n") == 1
    assert content(made) == before
