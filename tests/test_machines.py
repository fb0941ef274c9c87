"""Other people's disks, folders and systems: their errors are injected where no such disk is."""

import builtins
import csv
import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from multiprocessing import get_start_method, set_start_method
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, copies_in, folders, folders_to_test
from tests.paintings import paint_artgan, write_lists
from tests.test_checkpoints import check_same_runs


def flat(path, grey=90, size=(90, 70)):
    """Write a picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path, "JPEG")


def plant_error(monkeypatch, module, name, pattern, number):
    """Let a function of a module fail, as on a bad disk, for paths that hold the pattern."""
    real = getattr(module, name)

    def failing(path, *given, **options):
        if re.search(pattern, str(path)):
            raise MemoryError if number == "memory" else OSError(number, os.strerror(number), path)
        return real(path, *given, **options)

    monkeypatch.setattr(module, name, failing)


def start(*flags, code="", **options):
    """Start a training in a process of its own, after some code."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{TINY}{code}\nsys.exit(tm.main(sys.argv[1:]))", *flags], cwd=ROOT,
        text=True, **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE,
                      "stderr": subprocess.PIPE} | options)


def one_line(capsys):
    """Return what is on stderr, which must be one line, without its "error: "."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error.removeprefix("error: ")


@pytest.fixture
def painted(tmp_path):
    """Return a folder with 20 paintings of five styles, and the flags of a check of them."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    return tmp_path, [*folders(tmp_path), "--epochs", "0"]


# ----------------------------------------------------------------------------- errors of the system


@pytest.mark.parametrize("module,name,number", [
    *((builtins, "open", number) for number in (5, 107, 116, 110, 24, 12, "memory")),
    *((os, "stat", number) for number in (5, 107, 116, 110))])
def test_an_error_of_the_system_is_no_bad_picture(
        painted, capsys, monkeypatch, module, name, number):
    """It stops the run; once the disk is well, the same command uses every picture."""
    (folder, flags), wrong = painted, "anna-ruiz_study-no-2"
    with monkeypatch.context() as patch:
        plant_error(patch, module, name, f"wikiart/.*{wrong}", number)
        assert tm.main(flags) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    reason = "not enough memory" if number == "memory" else os.strerror(number)
    assert re.fullmatch(rf"error: cannot read {folder}/wikiart/\w+/{wrong}.*: {reason}", last)
    assert not (folder / "out/bad_files.txt").exists()
    assert tm.main(flags) == 0
    assert "cannot be used" not in capsys.readouterr().out
    assert (folder / "out/bad_files.txt").read_text() == ""


@pytest.mark.parametrize("module,name", [(builtins, "open"), (os, "stat")])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_one_picture_that_may_not_be_read_is_listed(
        painted, capsys, monkeypatch, module, name, number):
    (folder, flags), wrong = painted, "anna-ruiz_study-no-2"
    with monkeypatch.context() as patch:
        plant_error(patch, module, name, f"wikiart/.*{wrong}", number)
        assert tm.main(flags) == 0
    bad = (folder / "out/bad_files.txt").read_text().splitlines()
    assert bad and all(wrong in line and os.strerror(number) in line for line in bad)


def test_a_folder_that_fails_stops_the_listing(painted, capsys, monkeypatch):
    folder, flags = painted
    plant_error(monkeypatch, os, "scandir", "Cubism$", errno.EIO)
    assert tm.main(flags) == 1
    assert f"error: cannot read {folder}/wikiart/Cubism: Input/output" in capsys.readouterr().err


# ----------------------------------------------------------------------------- what is not used


def test_what_is_skipped_is_reported(painted, capsys):
    folder, flags = painted
    data = folder / "wikiart"
    first = next((data / "Cubism").iterdir())
    for place in ("loose.jpg", "Cubism/deeper/x.jpg", "Realism/a.heic", "Realism/b.jpg!Large",
                  "Baroque.zip", "Cubism/x.jpg!Large"):
        (data / place).parent.mkdir(exist_ok=True)
        shutil.copy(first, data / place)
    (data / "Rococo").mkdir()
    assert tm.main(flags) == 0
    out = capsys.readouterr().out
    assert "20 paintings in" in out and "2 (Realism, Rococo)" in out
    assert "6 (Baroque.zip, Cubism/deeper/x.jpg, Cubism/x.jpg!Large, ..." in out


def test_data_unzipped_twice_is_found_by_its_error(painted, capsys):
    folder, flags = painted
    (folder / "twice").mkdir()
    (folder / "wikiart").rename(folder / "twice/wikiart")
    assert tm.main([*flags, "--data-dir", f"{folder}/twice"]) == 1
    captured = capsys.readouterr()
    assert re.search(r": 20 \(wikiart/\w+/.*jpg", captured.out)
    assert re.search(rf"error: .*no picture .*{folder}/twice.*--data-dir", captured.err)


def test_lists_that_are_not_found_are_an_error(painted, capsys):
    folder, flags = painted
    write_lists(folder / "lists/genre", "genre", ["a"], [], [])
    for name, there in (("misspelt", "nothing"), ("lists", "genre/genre_train.csv")):
        assert tm.main([*flags, "--lists-dir", f"{folder}/{name}"]) == 1
        error = one_line(capsys)
        assert f"{folder}/{name} must hold style_class" in error
        assert there in error and "--lists-dir none" in error
    assert not (folder / "cache").exists() and not list((folder / "out").glob("[!.]*"))


@pytest.mark.parametrize("kind", ["ok", "nested", "upper"])
def test_lists_are_used_where_people_put_them(finished, shared, tmp_path, capsys, kind):
    """A folder too deep, or in capitals: never a split without them, unsaid."""
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "0"]
    assert tm.main([*flags, "--lists-dir", f"{shared}/cases/lists/{kind}"]) == 0
    assert "split: 25 train, 5 validation, 10 test" in capsys.readouterr().out


def test_only_the_default_lists_may_be_missing(painted, monkeypatch, capsys):
    folder, flags = painted
    monkeypatch.chdir(folder)
    places = [flag for flag in flags if flag not in ("--lists-dir", "none")]
    assert tm.main(places) == 0
    (folder / "wikiart_csv").mkdir()
    assert tm.main(places) == 1
    assert "has nothing" in capsys.readouterr().err


def test_test_paintings_missing_from_the_start_are_counted(tmp_path, capsys):
    """Half of the listed test paintings are not on disk when the training begins."""
    rows = [(path, int(name > "D")) for path, name in sorted(
        paint_artgan(tmp_path / "wikiart", each=8, size=(60, 50)).items())]
    test, train = rows[::4], [row for place, row in enumerate(rows) if place % 4]
    write_lists(tmp_path / "lists", "style", ["early", "late"], train, test)
    for path, _ in test[::2]:
        (tmp_path / "wikiart" / path).unlink()
    flags = [*folders(tmp_path), *QUICK, "--lists-dir", f"{tmp_path}/lists"]
    assert tm.main([*flags, "--epochs", "1"]) == 0
    assert f": 5 ({test[0][0]}" in capsys.readouterr().out
    assert test_model.main([*folders_to_test(tmp_path), "--workers", "0"]) == 0
    assert "5 of 10 test paintings are missing" in capsys.readouterr().out


def test_what_own_folders_hold_beside_pictures_is_reported(finished, tmp_path, capsys):
    flat(tmp_path / "own/a.jpg")
    for name in ("b.heic", "c.svg", "notes.txt"):
        (tmp_path / "own" / name).write_bytes(b"\0\0\0\x18ftypheic")
    shutil.copy(finished.out / "model_best.pth", tmp_path)
    assert test_model.main(["--output-dir", str(tmp_path), str(tmp_path / "own")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"skipped.*: 3 \(.*b\.heic", out) and out.count("%\n") == 1


# -------------------------------------------------------------------------- what some disks refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks_is_used(painted, capsys, monkeypatch, number):
    """And nothing else that such disks refuse is needed; a note says what is missing."""
    fcntl = pytest.importorskip("fcntl")
    folder, flags = painted

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    for module, name in ((fcntl, "flock"), (fcntl, "lockf"), (os, "utime"), (os, "chmod"),
                         (os, "link"), (os, "symlink")):
        monkeypatch.setattr(module, name, refuse)
    for epochs, made in (("1", 20), ("2", 0)):
        assert tm.main([*flags, *QUICK, "--epochs", epochs]) == 0
        captured = capsys.readouterr()
        assert f"{made} made" in captured.out and "error" not in captured.err
        assert re.search(rf"note: .*{folder}/out.*{os.strerror(number)}", captured.out)
    assert len(tm.load_checkpoint(folder / "out/model_last.pth")["history"]) == 2


def test_nothing_else_than_the_file_is_synced(painted, monkeypatch):
    """The fsync of a folder, which some disks refuse, is not needed."""
    real = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    assert tm.main(painted[1]) == 0


def test_odd_entries_do_not_end_the_listing(painted, capsys, monkeypatch):
    """lost+found, which cannot be read, and links that lead to themselves."""
    folder, flags = painted
    data = folder / "wikiart"
    (data / "lost+found").mkdir()
    (data / "Loop").symlink_to("Loop")
    (data / "Cubism/loop.jpg").symlink_to("loop.jpg")
    (data / "Cubism/around").symlink_to(data)
    plant_error(monkeypatch, os, "scandir", "found$", errno.EACCES)
    assert tm.main(flags) == 0
    out = capsys.readouterr().out
    assert "Permission denied" in out and "Loop" in out and "21 paintings in" in out
    assert re.search(r"cannot be used.*: 1 \(Cubism/loop.jpg: .*\)", out)


@pytest.fixture
def read_only(monkeypatch):
    """Return a function that lets nothing be written to a folder any more."""
    real_open, real_handle, real_mkdir, real_access = builtins.open, os.open, os.mkdir, os.access
    folders = []

    def refuse(path):
        if any(str(path).startswith(f"{folder}") for folder in folders):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_file(path, mode="r", *given, **options):
        if mode[0] != "r" or "+" in mode:
            refuse(path)
        return real_open(path, mode, *given, **options)

    def open_handle(path, flags, *given, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_handle(path, flags, *given, **options)

    def access(path, mode, **options):
        inside = any(str(path).startswith(f"{folder}") for folder in folders)
        return not (inside and mode & os.W_OK) and real_access(path, mode, **options)

    monkeypatch.setattr(builtins, "open", open_file)
    monkeypatch.setattr(os, "open", open_handle)
    monkeypatch.setattr(os, "mkdir", lambda path, *given: refuse(path) or real_mkdir(path, *given))
    monkeypatch.setattr(os, "access", access)
    return folders.append


@pytest.mark.parametrize("missing", [0, 1])
def test_a_cache_that_may_only_be_read(painted, capsys, read_only, missing):
    """Of another user, or on a read-only disk: it serves where all copies are there."""
    folder, flags = painted
    (folder / "wikiart/Cubism/bad.jpg").write_text("no picture")  # is tried at each start
    assert tm.main(flags) == 0
    for copy in list(copies_in(folder, 224).values())[:missing]:
        Path(copy).unlink()
    read_only(folder / "cache")
    capsys.readouterr()
    assert tm.main([*flags, *QUICK, "--image-size", "224", "--epochs", "1"]) == missing
    captured = capsys.readouterr()
    if missing:
        assert re.search(rf"error: .*{folder}/cache.*{os.strerror(errno.EROFS)}", captured.err)
        assert not list((folder / "out").glob("*.pth"))
    else:
        assert "0 made, 20 were there" in captured.out
        assert test_model.main([*folders_to_test(folder), "--workers", "0"]) == 0


def test_an_output_folder_that_may_only_be_read(finished, painted, capsys, read_only):
    """It is an error before anything is prepared; testing and your pictures go on."""
    folder, flags = painted
    shutil.copytree(finished.out, folder / "out")
    read_only(folder / "out")
    assert tm.main([*flags, *QUICK, "--epochs", "3"]) == 1
    assert f"{folder}/out" in one_line(capsys) and not (folder / "cache").exists()
    flags = [*folders_to_test(finished.folder), "--output-dir", f"{folder}/out"]
    assert test_model.main([*flags, "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Test accuracy: ")
    assert test_model.main([*flags, f"{finished.folder}/wikiart/Cubism"]) == 0
    assert capsys.readouterr().out.count("%\n") == 8


# -------------------------------------------------------------------------------- two at one time

# Says where it is when it first comes to each of some functions, and waits there for a line.
HALTING = """
import os
waiting = dict.fromkeys(sys.argv.pop().split(","))
def halt(module, name):
    real = getattr(module, name)
    def halted(*given, **options):
        if name in waiting and (name != "fsync" or len(waiting) == 1):
            del waiting[name]
            print("AT", name, flush=True)
            sys.stdin.readline()
        return real(*given, **options)
    setattr(module, name, halted)
for name in waiting:
    halt(os if hasattr(os, name) else tm, name)
"""
STAGES = ("find_paintings", "encode_copy", "train_epoch", "evaluate", "save_checkpoint", "fsync")


def test_two_trainings_in_one_folder(painted, capsys):
    """The second ends at once, whatever the first does; one killed leaves nothing behind.

    It does not look at a former run before, which here would be another error.
    """
    pytest.importorskip("fcntl")
    folder, flags = painted
    flags += [*QUICK, "--epochs", "1"]
    first = start(*flags, ",".join(STAGES), code=f"tm.cores = lambda: 1\n{HALTING}")
    try:
        for stage in STAGES:
            while first.stdout.readline() != f"AT {stage}\n":
                assert first.poll() is None, first.stderr.read()
            before = sorted(folder.rglob("*"))
            for other in (["--seed", "5"], ["--epochs", "0"], ["--data-dir", f"{folder}/nowhere"]):
                assert tm.main([*flags, *other]) == 1
                error = one_line(capsys)
                assert f"{folder}/out" in error and "OUTPUT_DIR" in error
            assert sorted(folder.rglob("*")) == before and first.poll() is None
            if stage == "encode_copy":  # one in another folder is let in
                assert tm.main([*flags, "--output-dir", f"{folder}/other", "--epochs", "0"]) == 0
            if stage != STAGES[-1]:
                first.stdin.write("\n")
                first.stdin.flush()
        assert list((folder / "out").glob(".*.tmp"))
    finally:
        first.kill()
        first.communicate()
    assert tm.main(flags) == 0
    assert len(tm.load_checkpoint(folder / "out/model_last.pth")["history"]) == 1
    assert [path.name for path in (folder / "out").glob(".*")] == [".lock"]


def test_two_that_prepare_one_folder(painted, capsys):
    """Both make all copies, one in the middle of what the other does, and all copies are whole."""
    folder, flags = painted
    first = start(*flags, "encode_copy,fsync", code=f"tm.cores = lambda: 1\n{HALTING}")
    try:
        for stage in ("encode_copy", "fsync"):  # where its first copy is written, but not there
            while first.stdout.readline() != f"AT {stage}\n":
                assert first.poll() is None, first.stderr.read()
            if stage == "encode_copy":
                first.stdin.write("\n")
                first.stdin.flush()
        assert tm.main([*flags, "--output-dir", f"{folder}/second"]) == 0
        text, error = first.communicate("\n", timeout=100)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 0, error
    assert all("20 made, 0 were there" in out for out in (text, capsys.readouterr().out))
    there = {str(path) for path in (folder / "cache").rglob("*") if path.is_file()}
    assert there == set(copies_in(folder, 224).values()) and len(there) == 20
    for path in there:
        Image.open(path).load()


def test_the_paintings_of_a_training_stay_its_own(painted, tmp_path, capsys):
    """While it runs, another data set of the same names is prepared in the same CACHE_DIR."""
    folder, flags = painted
    flags += [*QUICK, "--epochs", "2"]
    names = [path.relative_to(folder / "wikiart") for path in (folder / "wikiart").rglob("*.jpg")]
    for name in names:
        Image.effect_noise((60, 50), 90).convert("RGB").resize((60, 50)).save(
            tmp_path / "noise.jpg", quality=99)
        (folder / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "noise.jpg", folder / "other" / name)
        for data in ("wikiart", "other"):
            os.utime(folder / data / name, (315532800, 315532800))  # 1980, as zips have it
    real, evaluations = tm.evaluate, []

    def evaluate(*given):
        if not evaluations:
            other = ["--data-dir", f"{folder}/other", "--output-dir", f"{folder}/second"]
            assert tm.main([*flags, *other, "--epochs", "0"]) == 0
        evaluations.append(given)
        return real(*given)

    assert tm.main([*flags, "--output-dir", f"{folder}/alone"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm, "evaluate", evaluate)
        assert tm.main(flags) == 0
    assert len(evaluations) == 2 and len(list((folder / "cache").rglob("*.jpg"))) == 40
    check_same_runs(folder / "alone", folder / "out")


# -------------------------------------------------------------------------- pictures and their data


@pytest.mark.parametrize("content,words", [
    (b"", "known format"), (b"\0" * 40, "known format"), (b"<!doctype html>", "known format"),
    (b"https://example.org/a.jpg\n", "known format"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*save it as JPEG"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC.*save it as JPEG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "known format"),
], ids=["empty", "zeros", "page", "address", "HEIC", "HEIF", "PostScript"])
def test_what_is_no_picture_has_a_reason(tmp_path, content, words):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(tm.InputError, match=words):
        tm.decode(tmp_path / "x.jpg", 32)


def test_odd_metadata_spoil_no_picture(shared):
    bad = {"jpg_no_eoi.jpg", "jpg_newline_before.jpg", "png_no_iend.png", "png_bad_idat_crc.png",
           "png_bad_text_crc.png"}
    files = sorted((shared / "cases/meta").iterdir())
    assert len(files) > 30
    for file in files:
        if file.name in bad:
            with pytest.raises((tm.InputError, OSError, SyntaxError)) as caught:
                tm.decode(file, 32)
            assert tm.reason_of(caught.value, file)
        else:
            image = tm.decode(file, 32)
            assert np.abs(np.asarray(image, float).mean((0, 1)) - (132, 136, 128)).max() < 3
    assert tm.decode(shared / "cases/meta/jpg_exif_width_as_text.jpg", 160).size == (120, 160)


@pytest.mark.parametrize("name,value", [
    ("tiff_12bit_187.tif", None), ("tiff_4bit_187.tif", 187), ("png_16_grey_trns_clear.png", 255),
    ("png_16_grey_alpha_clear.png", 255), ("png_8_grey_trns_clear.png", 255),
    ("tiff_8bit_white_is_zero_205.tif", 205),
    ("turn3/tiff_palette_8bit_map_200_120_40.tif", None),
    ("turn3/tiff_palette_16bit_map_200_120_40.tif", (200, 120, 40)),
    ("turn3/tiff_rgb16_planar_200_120_40.tif", None),
    ("turn3/tiff_rgb16_contig_200_120_40.tif", (200, 120, 40)),
    ("turn3/png_70000x40_200_120_40.png", (200, 120, 40))])
def test_pixels_of_every_kind_are_right_or_refused(shared, tmp_path, name, value):
    folder = shared / "cases" / ("turn3/images" if "/" in name else "images")
    (tmp_path / "Odd").mkdir()
    shutil.copy(folder / name.rpartition("/")[2], tmp_path / "Odd/x")
    copies, bad = tm.resize_paintings(["Odd/x"], tmp_path, tmp_path / "cache", 64)
    if value is None:
        assert copies == {} and "save it as PNG or JPEG" in bad["Odd/x"]
    else:
        assert bad == {}
        assert np.abs(np.asarray(Image.open(copies["Odd/x"]), int) - value).max() <= 2


@pytest.mark.parametrize("name", ["real.avif", "avif_named_jpg.jpg"])
def test_avif_is_read(shared, name):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = np.asarray(tm.decode(shared / "cases/images" / name, 32), float)
    assert image.shape[2] == 3 and np.abs(image.mean((0, 1)) - (200, 30, 40)).max() < 3


# ------------------------------------------------------------------------------ folders people have


def grow(shared, tree, data):
    """Put a picture, or a few bytes, at each path of a tree of ../shared."""
    lines = (shared / f"cases/turn3/trees/{tree}.txt").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        flat(data / line, 9 * number % 256, (60, 50))
        if line.endswith(".icloud"):
            (data / line).write_bytes(b"bplist00")
    return lines


def test_a_tree_of_numbers(shared, tmp_path):
    """Files 1.jpg to 8.jpg in each of four classes: numbers are neither titles nor artists."""
    grow(shared, "numbered_4_classes", tmp_path / "wikiart")
    assert tm.main([*folders(tmp_path), *QUICK, "--epochs", "1"]) == 0
    assert test_model.main([*folders_to_test(tmp_path), "--workers", "0"]) == 0
    with open(tmp_path / "out/outliers.csv", encoding="utf-8", newline="") as file:
        assert {row["prior"] for row in csv.DictReader(file)} == {""}


def test_a_tree_of_first_names(shared, tmp_path, capsys):
    """A word of warning, since First_Last_1.jpg gives only the first name."""
    lines = grow(shared, "first_names", tmp_path / "wikiart")
    flags = [*folders(tmp_path), "--attribute", "artist", "--min-paintings", "3", "--epochs", "0"]
    assert tm.main(flags) == 0
    assert re.search("note: .*--attribute style", capsys.readouterr().out)
    assert tm.main([*flags, "--attribute", "style"]) == 0
    out = capsys.readouterr().out
    assert f"in {len({line.split('/')[0] for line in lines})} classes" in out
    assert "note:" not in out


def test_a_tree_in_another_form_of_unicode(shared, tmp_path, capsys):
    """Class folders renamed, as on a Mac's disk, between training, resuming and testing."""
    lines = grow(shared, "accents_nfc", tmp_path / "wikiart")
    flags = [*folders(tmp_path), *QUICK]
    assert tm.main([*flags, "--epochs", "1"]) == 0
    split = re.search("split: .* classes", capsys.readouterr().out)[0]
    shutil.rmtree(tmp_path / "wikiart")
    others = grow(shared, "accents_nfd", tmp_path / "wikiart")
    assert len(set(lines) - set(others)) == 8
    assert tm.main([*flags, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert split in out and "disk: " not in out and "not used" not in out
    assert test_model.main([*folders_to_test(tmp_path), "--workers", "0"]) == 0
    with open(tmp_path / "out/classes.csv", encoding="utf-8", newline="") as file:
        assert all(int(row["paintings"]) > 0 for row in csv.DictReader(file))


def test_a_tree_that_icloud_has_not_downloaded(shared, tmp_path, capsys):
    lines = grow(shared, "icloud", tmp_path / "wikiart")
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 0
    assert ": 6 (Cubism/.anna-ruiz_3.jpg.icloud, " in capsys.readouterr().out
    assert len([line for line in lines if line.endswith(".icloud")]) == 6


def test_a_tree_with_a_long_name(shared, tmp_path):
    lines = grow(shared, "long_name", tmp_path / "wikiart")
    assert max(len(line.partition("/")[2].encode()) for line in lines) == 252
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 0
    assert (tmp_path / "out/bad_files.txt").read_text() == ""
    assert len(copies_in(tmp_path, 224)) == len([line for line in lines if line.endswith("jpg")])


def test_a_tree_of_the_parts_of_a_split(shared, tmp_path, capsys):
    grow(shared, "train_test_folders", tmp_path / "wikiart")
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 1
    assert "test, train" in one_line(capsys)


# --------------------------------------------------------------------------------- files of weights


@pytest.mark.parametrize("name", ["new_format.pth", "old_format.pth", "new_format_wrapped.pth.tar"])
def test_weights_of_every_age_are_read(shared, name):
    tensors = tm.load_tensors(shared / "cases/turn3/weights" / name)
    tensors = tensors.get("state_dict", tensors)
    assert tensors and all(torch.is_tensor(value) for value in tensors.values())


@pytest.mark.parametrize("name", ["new_format.pth", "old_format.pth", "new_format_wrapped.pth.tar"])
def test_weights_of_another_network_are_refused_in_one_line(shared, painted, capsys, name):
    folder, flags = painted
    path = shared / "cases/turn3/weights" / name
    assert tm.main([*flags, "--epochs", "1", "--weights", str(path)]) == 1
    error = one_line(capsys)
    assert error.startswith(f"{path} is refused") and len(error) < 500
    assert not (folder / "cache").exists() and not list((folder / "out").glob("[!.]*"))


# ----------------------------------------------------------------------------------- other systems


@pytest.mark.parametrize("method,precision", [("spawn", "float32"), ("forkserver", "bfloat16")],
                         indirect=["precision"])
def test_other_start_methods_give_the_same_run(finished_in, precision, tmp_path, method):
    """As on Windows and Macs, and with Python 3.14. Loaders start anew and import the script."""
    finished = finished_in(precision)
    before = get_start_method()
    set_start_method(method, force=True)
    try:
        flags = [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "2"]
        assert tm.main([*flags, "--workers", "1"]) == 0
    finally:
        set_start_method(before, force=True)
    check_same_runs(finished.out, tmp_path / "out")


def chosen_workers(workers=-1, batch_size=64, image_size=224):
    """Return how many loader processes there would be."""
    settings = SimpleNamespace(workers=workers, batch_size=batch_size, image_size=image_size)
    loader = tm.make_loader({"A/x.jpg": 0}, {"A/x.jpg": "x.jpg"}, settings, torch.device("cpu"))
    return loader.num_workers


@pytest.fixture
def large_machine(monkeypatch):
    """Make this a machine of 64 cores without a quota; return a function that sets others."""
    read, usage = Path.read_text, shutil.disk_usage

    def change(cores=64, quota="max 100000", shared_memory=2**40, processes=1):
        def read_text(path, *given, **options):
            return quota if str(path).endswith("/cpu.max") else read(path, *given, **options)

        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 1000)
        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage("/")._replace(
            free=shared_memory) if str(path) == "/dev/shm" else usage(path))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    change()
    return change


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_number_of_workers(large_machine, monkeypatch, method):
    """One a core, 16 at most, however they start; fewer where the shared memory is small."""
    before = get_start_method()
    set_start_method(method, force=True)
    try:
        assert chosen_workers() == 16 and chosen_workers(workers=40) == 40
        assert chosen_workers(workers=0) == 0
        large_machine(cores=5)
        assert chosen_workers() == 5
        large_machine(processes=8)
        assert chosen_workers() == 8
        large_machine(cores=2, processes=8)
        assert chosen_workers() == 1
        monkeypatch.setattr(sys, "platform", "darwin")  # each takes half a GB there
        large_machine()
        assert 0 < chosen_workers() <= 4
    finally:
        set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_quota_of_the_container_counts(large_machine):
    for quota, workers in (("400000 100000", 4), ("150000 100000", 2), ("20000 100000", 1),
                           ("9900000 100000", 16), ("max 100000", 16), ("", 16)):
        large_machine(quota=quota)
        assert chosen_workers() == workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_little_shared_memory_has_fewer_workers(large_machine):
    """64 MB, as in Docker, hold six batches of 64 crops of 224 pixels, or 600 of 8 of 64 pixels."""
    def fits(batch_size, image_size, megabytes=64, processes=1):
        large_machine(shared_memory=megabytes * 10**6, processes=processes)
        workers = chosen_workers(batch_size=batch_size, image_size=image_size)
        batch = batch_size * image_size**2 * 3
        assert workers * processes * 2 * batch <= megabytes * 10**6  # two of each worker's wait
        return workers

    assert fits(8, 64) == 16
    assert 1 <= fits(64, 224) <= 3
    assert fits(64, 224, megabytes=1) == 0
    assert fits(64, 224, megabytes=64, processes=4) < 1 + fits(64, 224)
    assert 1 < fits(64, 224, megabytes=256) < 16
    assert fits(64, 224, megabytes=8000) == 16


def test_a_gpu_that_cannot_be_used_is_reported(monkeypatch, capsys, tmp_path):
    tm.place_on_device(tm.ArtClassifier(2))
    before = "NVIDIA" in capsys.readouterr().out
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert tm.place_on_device(tm.ArtClassifier(2)).type == "cpu"
    out = capsys.readouterr().out
    assert re.search("note: .*NVIDIA GPU.*README.md", out) and out.count("\n") == 1
    assert before == bool(shutil.which("nvidia-smi", path=os.environ["PATH"].partition(":")[2]))


def test_no_stderr(finished, tmp_path):
    """As after 2>&-, for instance in a cron job: an error gives 1, and the next run is whole."""
    shutil.copytree(finished.out, tmp_path / "out")
    code = "code = tm.main([*sys.argv[1:], '--data-dir', 'nowhere'])\nprint('CODE', code)"
    script = start(*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "3",
                   code=code, stderr=None, preexec_fn=lambda: os.close(2))
    out, _ = script.communicate(timeout=100)
    assert "CODE 1\n" in out and script.returncode == 0 and "Traceback" not in out, out
    assert len(tm.load_checkpoint(tmp_path / "out/model_last.pth")["history"]) == 3


# ------------------------------------------------------------------------ what errors say to users


def worker_error(kind, text):
    """Return an error of a loader process as PyTorch passes it on."""
    return kind(f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback (most "
                f"recent call last):\n  File \"x.py\", line 1, in x\n{kind.__name__}: {text}")


@pytest.mark.parametrize("error,words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
     "^CUDA out of memory.*--batch-size 4"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "^MPS .*--batch-size 4"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 9 bytes."), "--batch-size 4"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "--batch-size 4"),
    (MemoryError(), "^out of memory.*--batch-size 4"),
    (worker_error(MemoryError, ""), "^out of memory.*--batch-size 4"),
    (worker_error(RuntimeError, "unable to write to file </torch_1>: No space left on device (28)"),
     "^unable to write to file </torch_1>.*--workers 0.*--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "--workers 0.*--shm-size"),
    (RuntimeError("DataLoader timed out after 900 seconds"), "--workers 0"),
    (worker_error(OSError, "cannot read the resized copy x.jpg"), "^cannot read the resized copy"),
    (RuntimeError("can't start new thread"), "^can't start new thread"),
    (RuntimeError("received 0 items of ancdata"), "^received 0 items of ancdata.*--workers 0"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
     "^CUDA error: no kernel image.*README.md"),
    (RuntimeError("Distributed package doesn't have NCCL built in"), "^Distributed.*README.md"),
    (RuntimeError("The NVIDIA driver version is insufficient for CUDA runtime version"),
     "driver version is insufficient.*README.md"),
    (RuntimeError("FIND was unable to find an engine to execute this computation"),
     "unable to find an engine.*README.md"),
    (RuntimeError("NCCL error in: x.cpp:1, system error\nLast error:\nsocket: no route to host"),
     "^socket: no route to host"),
    (RuntimeError("The server socket has failed to listen. EADDRINUSE, message: Address already in "
                  "use"), "--master-port"),
    (RuntimeError("[pair.cc:5] Connection closed by peer [1.2.3.4]"), "^another process stopped"),
    (RuntimeError("[pair.cc:5] Read error [1.2.3.4]: Connection reset by peer"), "^another proc"),
    (RuntimeError("CUDA error: invalid device ordinal\nmore"), "--nproc-per-node"),
    (tm.InputError("a sentence"), "^a sentence$"),
    (OSError(28, "No space left on device", "x"), "No space left on device.*x"),
])
def test_errors_of_machines_say_what_to_do(error, words):
    line = tm.explain(error, 8)
    assert re.search(words, line) and "\n" not in line and "Traceback" not in line


@pytest.mark.parametrize("error", [
    ValueError("x"), KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    worker_error(IndexError, "x")])
def test_what_is_no_error_of_machines_is_a_bug(error):
    """Whose traceback is shown, for a line would hide where it is."""
    assert tm.explain(error, 8) is None


def test_a_thread_that_cannot_start_is_one_line(painted, capsys, monkeypatch):
    """As where a user may have few processes."""
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert tm.main(painted[1]) == 1
    assert "can't start new thread" in capsys.readouterr().err.strip().splitlines()[-1]
