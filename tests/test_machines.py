"""Other people's disks, folders and systems: their errors are injected where no such disk is."""

import builtins
import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from multiprocessing import get_start_method, set_start_method

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, folders
from tests.paintings import paint_artgan, write_lists
from tests.test_checkpoints import check_same_runs


def flat(path, grey=90, size=(90, 70)):
    """Write a picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def plant_error(monkeypatch, module, name, pattern, number):
    """Let a function of a module fail, as on a bad disk, for paths that hold the pattern."""
    real = getattr(module, name)

    def failing(path, *given, **options):
        if re.search(pattern, str(path)):
            raise MemoryError if number == "memory" else OSError(number, os.strerror(number), path)
        return real(path, *given, **options)

    monkeypatch.setattr(module, name, failing)


@pytest.fixture
def painted(tmp_path):
    """Return a folder with 20 paintings of five styles, and the flags of a check of them."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    return tmp_path, [*folders(tmp_path), "--epochs", "0"]


# ----------------------------------------------------------------------------- errors of the system


@pytest.mark.parametrize("number", [5, 107, 116, 110, 24, 12, "memory"])
def test_an_error_of_the_system_is_no_bad_picture(painted, capsys, monkeypatch, number):
    """It stops the run; once the disk is well, the same command uses every picture."""
    (folder, flags), wrong = painted, "anna-ruiz_study-no-2"
    plant_error(monkeypatch, builtins, "open", f"wikiart/.*{wrong}", number)
    assert tm.main(flags) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    reason = "not enough memory" if number == "memory" else os.strerror(number)
    assert re.fullmatch(rf"error: cannot read {folder}/wikiart/\w+/{wrong}.*: {reason}", last)
    assert not (folder / "out/bad_files.txt").exists()
    monkeypatch.undo()
    assert tm.main(flags) == 0
    assert "pictures that cannot be used" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_one_picture_that_may_not_be_read_is_listed(painted, capsys, monkeypatch, number):
    (folder, flags), wrong = painted, "anna-ruiz_study-no-2"
    plant_error(monkeypatch, builtins, "open", f"wikiart/.*{wrong}", number)
    assert tm.main(flags) == 0
    bad = (folder / "out/bad_files.txt").read_text().splitlines()
    assert bad and all(wrong in line and os.strerror(number) in line for line in bad)


def test_a_folder_that_fails_stops_the_listing(painted, capsys, monkeypatch):
    folder, flags = painted
    plant_error(monkeypatch, os, "scandir", "Cubism$", errno.EIO)
    assert tm.main(flags) == 1
    assert f"error: cannot read {folder}/wikiart/Cubism: Input/output" in capsys.readouterr().err


# --------------------------------------------------------------------------------- what is left out


def test_what_is_left_out_is_said(painted, capsys):
    folder, flags = painted
    data = folder / "wikiart"
    first = next((data / "Cubism").iterdir())
    for place in ("loose.jpg", "Cubism/deeper/x.jpg", "Realism/a.avif", "Realism/b.jpg!Large",
                  "Baroque.zip", "Cubism/x.jpg!Large"):
        (data / place).parent.mkdir(exist_ok=True)
        shutil.copy(first, data / place)
    (data / "Rococo").mkdir()
    assert tm.main(flags) == 0
    out = capsys.readouterr().out
    assert "20 paintings in" in out
    said = re.search(r"no picture right in a style's folder: (\d+) \((.*)\)", out)
    assert said[1] == "8" and said[2].count(",") == 3  # two folders without a picture, six files
    assert "Baroque.zip, Cubism/deeper/x.jpg, Cubism/x.jpg!Large, ..." in said[2]


def test_data_unzipped_twice_is_found_by_its_error(painted, capsys):
    folder, flags = painted
    (folder / "twice").mkdir()
    (folder / "wikiart").rename(folder / "twice/wikiart")
    assert tm.main([*flags, "--data-dir", f"{folder}/twice"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"no picture in a folder of .*, but wikiart/\w+/.*jpg is there", captured.err)


@pytest.mark.parametrize("kind", ["nested", "upper", "misspelt"])
def test_lists_that_are_not_found_are_an_error(painted, shared, capsys, kind):
    folder, flags = painted
    assert tm.main([*flags, "--lists-dir", f"{shared}/cases/lists/{kind}"]) == 1
    error = capsys.readouterr().err.strip()
    there = {"nested": "wikiart_csv/style_train.csv", "upper": "Style_train.csv",
             "misspelt": "has nothing"}
    assert "\n" not in error and f"{shared}/cases/lists/{kind} must hold style_class" in error
    assert there[kind] in error and "--lists-dir none" in error


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
    flags = [*folders(tmp_path), *QUICK]
    flags[3] = f"{tmp_path}/lists"
    assert tm.main([*flags, "--epochs", "1"]) == 0
    assert f"not on disk: 5 ({test[0][0]}" in capsys.readouterr().out
    assert test_model.main([*flags[:2], *flags[4:8], "--workers", "0"]) == 0
    assert "5 of 10 test paintings are missing" in capsys.readouterr().out


CONTENTS = {
    b"": "is empty", b"\0" * 40: "is no picture of a known format",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "is a HEIC picture.*save it as JPEG",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "is a HEIC picture.*save it as JPEG",
    b"\0\0\0\x1cftypavif\0\0\0\0avifmif1": "is an AVIF picture.*save it as JPEG",
    b"https://example.org/a.jpg\n": "is an address", b"<!doctype html>": "is text",
}


@pytest.mark.parametrize("content,words", CONTENTS.items(), ids=CONTENTS.values())
def test_what_is_no_picture_is_named(tmp_path, content, words):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        tm.decode(tmp_path / "x.jpg", 32)


def test_what_own_folders_hold_beside_pictures_is_said(finished, tmp_path, capsys):
    flat(tmp_path / "own/a.jpg")
    for name in ("b.heic", "c.avif", "notes.txt"):
        (tmp_path / "own" / name).write_bytes(b"\0\0\0\x18ftypheic")
    shutil.copy(finished.out / "model_best.pth", tmp_path)
    assert test_model.main(["--output-dir", str(tmp_path), str(tmp_path / "own")]) == 0
    out = capsys.readouterr().out
    assert "passed over: 3 (" in out and "b.heic" in out and out.count("%\n") == 1


# -------------------------------------------------------------------------- what some disks refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks_is_used(painted, capsys, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    for written in (20, 0):
        assert tm.main(painted[1]) == 0
        assert f"small copies: {written} written" in capsys.readouterr().out


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
    assert "Permission denied" in out and "Cubism/loop.jpg ([Errno " in out
    assert "Loop" in out and "21 paintings in" in out


def start(*flags, code=""):
    return subprocess.Popen([sys.executable, "-c", f"{TINY}{code}\nsys.exit(tm.main(sys.argv[1:]))",
                             *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_two_trainings_in_one_folder(finished, tmp_path, capsys):
    """The second ends at once, the first goes on, and one killed leaves nothing behind."""
    pytest.importorskip("fcntl")
    shutil.copytree(finished.out, tmp_path / "out")
    flags = [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "9"]
    code = ("real = tm.write_whole\n"
            "def slow(path, content):\n"
            "    if path.name == 'model_last.pth':\n"
            "        (path.parent / f\".{'0' * 16}.tmp\").touch()\n"
            "        print('HERE', flush=True); import time; time.sleep(60)\n"
            "    real(path, content)\n"
            "tm.write_whole = slow")
    first = start(*flags, code=code)
    with contextlib.closing(first.stdout):
        assert any("HERE" in line for line in first.stdout)
    assert tm.main(flags) == 1
    error = capsys.readouterr().err.strip()
    assert error == (f"error: another training writes into {tmp_path}/out: wait for it, or give "
                     "this one an OUTPUT_DIR of its own")
    first.kill()
    first.communicate()
    assert list(tmp_path.rglob("*.tmp"))
    assert tm.main([*flags[:-1], "3"]) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_that_prepare_one_folder(painted, tmp_path):
    """One waits and says so; all copies are whole."""
    pytest.importorskip("fcntl")
    folder, flags = painted
    code = ("import time\nreal = tm.encode_small\n"
            "tm.encode_small = lambda *given: (time.sleep(0.5), real(*given))[1]")
    outputs = [["--output-dir", str(folder / name)] for name in "ab"]
    runs = [start(*flags, *output, code=code) for output in outputs]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("waiting for another process, which prepares" in text for text in texts) == 1
    assert sorted("20 written" in text for text in texts) == [False, True]
    for path in (folder / "small").rglob("*.jpg"):
        Image.open(path).load()


def test_another_data_set_of_the_same_names_and_times(painted, tmp_path, capsys):
    folder, flags = painted
    paint_artgan(folder / "other", each=4, size=(60, 50), seed=7)
    names = [path.relative_to(folder / "wikiart") for path in (folder / "wikiart").rglob("*.jpg")]
    others = sorted((folder / "other").rglob("*.jpg"))
    for name, other in zip(sorted(names), others):
        other.rename(other.with_name(f"renamed-{name.name}"))
    for name in names:
        source = folder / "other" / name.parent / f"renamed-{name.name}"
        source.rename(folder / "other" / name)
        for data in ("wikiart", "other"):
            os.utime(folder / data / name, (315532800, 315532800))  # 1980, as zips have it
    assert tm.main(flags) == 0
    assert tm.main([*flags, "--data-dir", f"{folder}/other"]) == 0
    assert "small copies: 20 written, 0 were there already\n" in capsys.readouterr().out[-400:]


def test_names_that_differ_in_case_alone(painted, monkeypatch, capsys):
    folder, flags = painted
    flat(folder / "wikiart/Cubism/A_b.jpg")
    flat(folder / "wikiart/Cubism/a_B.jpg")
    assert tm.main(flags) == 0  # on a disk that tells them apart
    (folder / "small/320/.LOCK").touch()  # as on one that does not
    assert tm.main(flags) == 1
    assert "does not tell names apart that differ only in case" in capsys.readouterr().err


# -------------------------------------------------------------------------- pictures and their data


def test_odd_metadata_spoil_no_picture(shared):
    bad = {"jpg_no_eoi.jpg", "jpg_newline_before.jpg", "png_no_iend.png", "png_bad_idat_crc.png"}
    files = sorted((shared / "cases/meta").iterdir())
    assert len(files) > 30
    for file in files:
        if file.name in bad:
            with pytest.raises((ValueError, OSError)):
                tm.decode(file, 32)
        else:
            image = tm.decode(file, 32)
            assert np.abs(np.asarray(image, float).mean((0, 1)) - (132, 136, 128)).max() < 3
    assert tm.decode(shared / "cases/meta/jpg_exif_width_as_text.jpg", 160).size == (120, 160)


@pytest.mark.parametrize("name,value", [
    ("tiff_12bit_187.tif", 187), ("tiff_4bit_187.tif", 187), ("png_16_grey_trns_clear.png", 255),
    ("png_16_grey_alpha_clear.png", 255), ("png_8_grey_trns_clear.png", 255),
    ("tiff_8bit_white_is_zero_205.tif", 205)])
def test_grey_of_every_depth_is_right(shared, name, value):
    image = tm.decode(shared / "cases/images" / name, 32)
    assert np.abs(np.asarray(image, int) - value).max() <= 2


def test_sixteen_bits_where_zero_is_white(tmp_path):
    wide = Image.fromarray(np.full((48, 64), 12_850, np.uint16))
    wide.save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert np.abs(np.asarray(tm.decode(tmp_path / "x.tif", 32), int) - 205).max() <= 1


def test_comments_do_not_travel(tmp_path):
    Image.new("RGB", (90, 70)).save(tmp_path / "x.jpg", comment=b"a secret")
    assert b"a secret" not in tm.encode_small(tmp_path / "x.jpg", 32, b"a stamp")


def test_a_jpeg_with_a_scan_for_each_component_counts_as_large(tmp_path, monkeypatch):
    """It is kept whole in memory, unlike one whose only scan holds all of them."""
    Image.effect_noise((96, 80), 50).convert("RGB").save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    place = whole.index(b"\xff\xda\x00\x0c\x03")
    apart = whole[:place] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + whole[place + 14 :]
    assert tm.is_drafted(whole) and not tm.is_drafted(apart)
    (tmp_path / "y.jpg").write_bytes(apart)
    monkeypatch.setattr(tm, "MAX_PIXELS", 5_000)
    assert tm.decode(tmp_path / "x.jpg", 32).size == (38, 32)
    with pytest.raises(ValueError, match="96 x 80 is more than 5,000 pixels"):
        tm.decode(tmp_path / "y.jpg", 32)


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    rows = [{"class": name, "margin": margin}
            for name, margin in (("=1+1", -0.5), ("@x", 2), ("a=b", 0))]
    tm.write_table(tmp_path / "x.csv", ("class", "margin"), rows)
    assert (tmp_path / "x.csv").read_text().split() == [
        "class,margin", "'=1+1,-0.5", "'@x,2", "a=b,0"]


def test_a_list_with_another_end_of_line(tmp_path):
    rows = [(f"S/{n}.jpg", n % 2) for n in range(9)]
    write_lists(tmp_path, "genre", ["a", "b"], rows[:6], rows[6:])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    assert tm.read_lists(tmp_path, "genre")[1] == dict(rows[6:]) | dict(rows[:6])


# ----------------------------------------------------------------------------------- other systems


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods_give_the_same_run(finished, tmp_path, method):
    """As on Windows and Macs, and with Python 3.14. Loaders start anew and import the script."""
    before = get_start_method()
    set_start_method(method, force=True)
    try:
        flags = [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "2"]
        assert tm.main([*flags, "--workers", "1"]) == 0
    finally:
        set_start_method(before, force=True)
    check_same_runs(finished.out, tmp_path / "out")


@pytest.mark.parametrize("method,most", [("fork", 16), ("spawn", 3)])
def test_the_number_of_loaders_is_bounded(monkeypatch, method, most):
    monkeypatch.setattr(tm.multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(tm, "cores", lambda: 64)
    monkeypatch.setattr(tm, "DataLoader", lambda *_, **options: options["num_workers"])
    paintings = tm.Paintings("", {"A/x.jpg": 0}, 64)
    assert tm.make_loader(paintings, 1, -1, tm.torch.device("cpu")) == most
    assert DataLoader is not tm.DataLoader


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch, capsys, tmp_path):
    if tm.torch.cuda.is_available():
        pytest.skip("the GPU here can be used")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tm.move_to_fastest(tm.ArtClassifier(2))
    assert "an NVIDIA GPU seems to be here, but torch" in capsys.readouterr().out


@pytest.mark.parametrize("error,words", [
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most "
                  "recent call last):\n  File x\nRuntimeError: unable to write to file </torch_1>: "
                  "No space left on device (28)"),
     "unable to write to file </torch_1>.*--shm-size=2g, or use fewer loaders"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
     "no kernel image.*this torch is too new for the GPU: see README.md"),
    (MemoryError(), "out of memory: try a smaller BATCH_SIZE, such as --batch-size 4"),
])
def test_errors_of_machines_say_what_to_do(error, words):
    assert re.match(rf".*{words}", tm.explain(error, 8)) and "\n" not in tm.explain(error, 8)
