import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FAMILIES, GOLDEN, ROOT, load
from PIL import Image

import prepare
from data import ImageCache, ImageFolder
from plumbing import checkpoint
from plumbing.pixels import normalise, preprocess

MODEL = GOLDEN / "libra-7b" / "model"
PADS = "black", "mean", "none"


def config(pad="black"):
    return dataclasses.replace(load("libra-7b").pixels, pad=pad)


def arguments(folder, out, names, *more):
    records = folder / f"{len(names)}.jsonl"
    records.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    flags = ("--records", records, "--image-folder", folder, "--model", MODEL, "--out", out, "--workers", 2, *more)
    return ["cache", *map(str, flags)]


def build(folder, out, names, *more):
    return prepare.main(prepare.parse(arguments(folder, out, names, *more)))


def content(out):
    """The hash of every file of a cache."""
    return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in out.iterdir()}


def counted(table):
    return dict(re.split("  +", row) for row in table.splitlines()[-8:])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Grey and coloured images of odd shapes; the names of the colour ones."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for number, shape in enumerate([(61, 97), (97, 61), (56, 56), (1, 3), (300, 7), (57, 56)]):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"g{number}.png")
        colour = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / "sub" / f"Röntgen {number}.png")
    deep = draw.integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(draw.integers(0, 256, (40, 50), dtype=np.uint8)).convert("RGB").save(folder / "grey as rgb.jpg")
    return folder


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.[pj][np]g"))


@pytest.mark.parametrize("pad", PADS)
def test_pixels_from_the_cache_are_those_from_the_file_to_the_bit(pictures, tmp_path, capsys, pad):
    names = names_in(pictures)
    assert build(pictures, tmp_path / "cache", names[::-1], "--pad", pad) == 0
    cache, folder = ImageCache(tmp_path / "cache", config(pad)), ImageFolder(pictures, config(pad))
    for name in names:
        frame = cache.frame(name)
        assert frame.dtype == np.uint8 and (frame == folder.frame(name)).all()
        image = Image.open(pictures / name)
        image = image if image.mode != "I;16" else Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        assert torch.equal(normalise(frame, cache.config), preprocess(image.convert("RGB"), cache.config))
    grey = sum("Röntgen" not in name for name in names)
    assert len(cache.frames) == 56 * 56 * (grey + 3 * (len(names) - grey))
    assert counted(capsys.readouterr().out)["of one channel"] == str(grey)


def test_a_cache_travels_to_another_process_without_its_frames(pictures, tmp_path):
    build(pictures, tmp_path, ["g0.png"])
    cache = ImageCache(tmp_path, config())
    sent = pickle.dumps(cache)
    assert len(sent) < 2000 and (pickle.loads(sent).frame("g0.png") == cache.frame("g0.png")).all()


def test_a_second_run_adds_what_is_missing_and_changes_nothing_else(pictures, tmp_path, capsys):
    names = names_in(pictures)
    build(pictures, tmp_path, names[:5])
    before, first = ImageCache(tmp_path, config()), content(tmp_path)
    build(pictures, tmp_path, names[:5])
    assert content(tmp_path) == first
    (pictures / names[0]).rename(pictures / "away")
    build(pictures, tmp_path, [*names, "none.png"])
    (pictures / "away").rename(pictures / names[0])
    printed = capsys.readouterr()
    assert counted(printed.out).items() >= {"there before": "5", "skipped, no file": "1"}.items()
    assert "skipped none.png: no image none.png in " in printed.err
    after, folder = ImageCache(tmp_path, config()), ImageFolder(pictures, config())
    assert all((after.frame(name) == folder.frame(name)).all() for name in names)
    assert (before.frame(names[2]) == after.frame(names[2])).all()  # a reader of the old index is not disturbed


def test_damaged_images_are_counted_and_named(pictures, tmp_path, capsys):
    (pictures / "cut.png").write_bytes((pictures / "g0.png").read_bytes()[:200])
    assert build(pictures, tmp_path, ["g0.png", "cut.png", "../escape.png"]) == 0
    (pictures / "cut.png").unlink()
    printed = capsys.readouterr()
    assert counted(printed.out).items() >= {"images": "1", "skipped, other reasons": "2"}.items()
    assert "cut.png is a damaged" in printed.err and "../escape.png leads out" in printed.err
    with pytest.raises(FileNotFoundError, match=r"no image cut\.png in the cache .*: run prepare\.py cache again"):
        ImageCache(tmp_path, config()).find("cut.png")


# -------------------------------------------------------------------------------------------- interruption


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of images that take some 30 ms each to decode and resize, all different."""
    folder = tmp_path_factory.mktemp("large")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    for number in range(60):
        noise.resize((1500 + number, 1200), Image.Resampling.BILINEAR).save(folder / f"{number}.jpg")
    return folder


def start(folder, out, names, *more, **settings):
    command = [sys.executable, str(ROOT / "prepare.py"), *arguments(folder, out, names, *more)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **settings)  # fmt: skip


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def survivors(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_build_goes_on_to_the_same_bytes(large, tmp_path):
    """KILLS, where it is set, is the number of kills."""
    kills = int(os.environ.get("KILLS", 3))
    draw, names = random.Random(0), names_in(large)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    growing, index = killed / ".index.jsonl.growing", killed / "index.jsonl"
    written = lambda: growing.stat().st_ino if growing.exists() else None  # anew when a build begins its work
    process = start(large, whole, names)
    wait_until((whole / growing.name).exists)
    begin = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - begin  # of the work, without what is imported before it
    expected, done = content(whole), []
    while len(done) < kills:
        before, process = written(), start(large, killed, names)
        wait_until(lambda: written() != before or process.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 0.3 + seconds / kills))
        process.kill()
        process.wait()
        wait_until(lambda: not survivors(process.pid))  # noqa: B023
        if index.exists():  # it was faster: from the start again
            assert content(killed).items() >= expected.items()
            shutil.rmtree(killed)
        else:
            done.append(growing.read_bytes().count(b"\n") - 1 if growing.exists() else 0)
    print("images done at each kill:", *done)
    assert len(set(done)) > 1
    assert start(large, killed, names).wait() == 0
    assert content(killed) == expected


def test_a_torn_line_and_frames_without_a_line_are_made_again(pictures, tmp_path):
    names = names_in(pictures)
    build(pictures, tmp_path / "whole", names)
    build(pictures, tmp_path / "torn", names)
    index, frames = tmp_path / "torn" / "index.jsonl", tmp_path / "torn" / "frames.bin"
    for keep in (0, 30, 200, 333):
        (tmp_path / "torn" / ".index.jsonl.growing").write_bytes(index.read_bytes()[:keep])
        index.unlink()
        with frames.open("ab") as file:
            file.write(bytes(keep))
        build(pictures, tmp_path / "torn", names)
        assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(pictures, tmp_path):
    names = names_in(pictures)
    build(pictures, tmp_path / "whole", names)
    limit = 9 * 56 * 56
    process = start(pictures, tmp_path / "cache", names,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    _, error = process.communicate()
    assert process.returncode == 2
    out = tmp_path / "cache"
    assert error == f"prepare.py: {out}: File too large: make room and run this again, what is done is kept\n"
    build(pictures, out, names)
    assert content(out) == content(tmp_path / "whole")


def test_an_interrupt_ends_the_workers_too(large, tmp_path):
    process = start(large, tmp_path / "cache", names_in(large))
    wait_until((tmp_path / "cache" / ".index.jsonl.growing").exists)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in error
    assert not survivors(process.pid)


def test_a_killed_worker_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "_frame", _die)
    assert build(pictures, tmp_path, ["g0.png"]) == 2
    assert "a worker process was killed" in capsys.readouterr().err


def _die(images, name):
    os.kill(os.getpid(), signal.SIGKILL)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def made(pictures, tmp_path):
    build(pictures, tmp_path / "made", ["g0.png", "g1.png"])
    return tmp_path / "made"


def test_a_cache_of_other_settings_is_refused_by_name(pictures, made, capsys):
    before = content(made)
    for pad in PADS[1:]:
        with pytest.raises(ValueError, match=f"'crop': 56, 'pad': 'black'}}, not .*'pad': '{pad}'"):
            ImageCache(made, config(pad))
        assert build(pictures, made, ["g0.png", "g2.png"], "--pad", pad) == 2
        assert f"'pad': '{pad}'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"'size': 56, 'crop': 56, .* not .*'size': 60, 'crop': 56"):
        ImageCache(made, dataclasses.replace(config(), size=60))
    assert content(made) == before


def test_the_mean_colour_counts_where_it_is_seen(pictures, tmp_path):
    build(pictures, tmp_path, ["g0.png"], "--pad", "mean")
    ImageCache(tmp_path, config("mean"))
    with pytest.raises(ValueError, match=r"'mean': \[0\.5, 0\.5, 0\.5\]}: use another"):
        ImageCache(tmp_path, dataclasses.replace(config("mean"), mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize("name", ["squash", "rounds"])
def test_ways_to_crop_are_settings_too(made, name):
    with pytest.raises(ValueError, match=f"'{name}': True}}: use another"):
        ImageCache(made, dataclasses.replace(config(), **{name: True}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_s_settings_are_those_of_the_loaded_model(family):
    libra = load(family)
    found = prepare.pixels_of(checkpoint.locate(GOLDEN / family / "model"), libra.pixels.pad)
    assert found == libra.pixels


def test_damage_is_found_when_a_frame_is_read(made):
    frames = made / "frames.bin"
    data = bytearray(frames.read_bytes())
    data[56 * 56 + 100] ^= 1
    frames.write_bytes(data)
    cache = ImageCache(made, config())
    cache.frame("g0.png")
    with pytest.raises(ValueError, match=r"frames\.bin is damaged at g1\.png"):
        cache.frame("g1.png")


def test_a_cache_that_is_cut_or_lacks_a_file_is_refused(pictures, made, capsys):
    frames, index = made / "frames.bin", made / "index.jsonl"
    os.truncate(frames, 2 * 56 * 56 - 1)
    with pytest.raises(ValueError, match="shorter than"):
        ImageCache(made, config())
    assert build(pictures, made, ["g0.png", "g2.png"]) == 2
    assert "shorter than its index says: delete" in capsys.readouterr().err
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"index\.jsonl is damaged"):
        ImageCache(made, config())
    index.unlink()
    with pytest.raises(FileNotFoundError, match="no finished image cache"):
        ImageCache(made, config())


def test_two_builds_do_not_write_one_cache(pictures, made, capsys):
    code = "import fcntl, sys; fcntl.lockf(file := open(sys.argv[1], 'ab'), fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", code, made / "frames.bin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert build(pictures, made, ["g2.png"]) == 2
        other.stdin.close()
    assert "is being written by another process" in capsys.readouterr().err
    assert build(pictures, made, ["g2.png"]) == 0


def test_mistakes_are_one_line(pictures, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "records.json").write_text('[{"image": "g0.png"}, {"image": 3}]')
    for flags, words in {
        ("--model", tmp_path): "names no encoder",
        ("--model", tmp_path / "none"): "no model folder",
        ("--image-folder", tmp_path / "none"): "no image folder",
        ("--records", tmp_path / "none"): "No such file",
        ("--records", tmp_path / "records.json"): "records.json record 2: image 3 is neither",
    }.items():
        assert build(pictures, tmp_path / "cache", ["g0.png"], *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        prepare.parse(["cache", "--worker", "3"])
    assert ended.value.code == 2
    assert not (tmp_path / "cache").exists()
