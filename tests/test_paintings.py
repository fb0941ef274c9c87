"""Finding, preparing, labelling and splitting the paintings."""

import csv
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_model as tm
from tests.conftest import QUICK, ROOT, folders
from tests.paintings import paint, paint_artgan, write_lists


def jpeg(path, size=(400, 360), colour=(200, 30, 60), **options):
    """Write a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def locate(paths, found):
    """Return {path: path on disk} of the paths that `tm.locate` finds."""
    spelt = tm.locate({"test": dict.fromkeys(paths, 0)}, found)["test"]
    return {path: place for path, place in zip(paths, spelt, strict=True) if place in found}


def prepare(folder):
    """Bring folder/small/320 up to date with folder/wikiart; return {path: reason} of the bad."""
    data = folder / "wikiart"
    return tm.prepare_copies(tm.find_paintings(data), data, folder / "small/320")


def copies(folder):
    """Return the small copies of 320 pixels, as "Style/name.jpg", without what is hidden."""
    small = folder / "small/320"
    return {path.relative_to(small).as_posix() for path in small.glob("*/[!.]*")}


def digest(folder):
    """Return what a folder holds, file by file."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------- finding and preparing


def test_only_pictures_are_found(tmp_path):
    wanted = ["A/x.jpg", "A/y.JPEG", "A/z.jfif", "B/w.png", "B/v.webp", "B/u é'  ü.jpg"]
    passed_over = ["A/._x.jpg", "A/.DS_Store", "A/Thumbs.db", "A/notes.txt", ".cache/q.jpg",
                   "A/.ipynb_checkpoints/x.jpg", "top.jpg"]
    for name in wanted + passed_over:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "A" / "circle").symlink_to(tmp_path)
    assert tm.find_paintings(tmp_path) == sorted(wanted)
    for empty in ("B", "C"):  # pictures, but in no folder; no folder at all
        with pytest.raises(ValueError, match=f"no picture in a folder of {tmp_path / empty}"):
            tm.find_paintings(tmp_path / empty)


def test_small_copies_follow_the_originals(tmp_path, capsys):
    data, small = tmp_path / "wikiart", tmp_path / "small/320"
    jpeg(data / "A/large.jpg", (800, 640))
    jpeg(data / "A/upright.jpg", (500, 1000))
    jpeg(data / "B/tiny.jpg", (50, 40))
    jpeg(data / "B/other.png", (640, 640))
    before = digest(data)
    assert prepare(tmp_path) == {}
    sizes = {path: Image.open(small / path).size for path in copies(tmp_path)}
    assert sizes == {"A/large.jpg": (400, 320), "A/upright.jpg": (320, 640), "B/tiny.jpg": (50, 40),
                     "B/other.png.jpg": (320, 320)}
    assert "4 written, 0 were there" in capsys.readouterr().out
    first = digest(small)
    prepare(tmp_path)
    assert "0 written, 4 were there" in capsys.readouterr().out
    assert digest(small) == first and digest(data) == before

    jpeg(data / "B/new.jpg")
    jpeg(data / "A/large.jpg", (800, 640), (0, 0, 255))
    os.utime(data / "A/large.jpg", (1, 1))
    (data / "B/tiny.jpg").unlink()
    prepare(tmp_path)
    assert "2 written, 2 were there" in capsys.readouterr().out
    assert Image.open(small / "A/large.jpg").getpixel((9, 9))[2] > 240
    assert "B/tiny.jpg" not in tm.find_paintings(data)


@pytest.mark.parametrize("seconds", [0, 1, 10**9, 2**33])
def test_originals_of_any_age_are_copied_once(tmp_path, capsys, seconds):
    """Twice, since another original may have the name and the age of the one before."""
    for size in ((400, 360), (500, 360)):
        jpeg(tmp_path / "wikiart/A/old.jpg", size)
        os.utime(tmp_path / "wikiart/A/old.jpg", (seconds, seconds))
        for written in (1, 0):
            assert prepare(tmp_path) == {}
            assert f"{written} written" in capsys.readouterr().out
        width, height = Image.open(tmp_path / "small/320/A/old.jpg").size
        assert height == 320 and width == round(size[0] * 320 / size[1])
    assert copies(tmp_path) == {"A/old.jpg"}


def test_copies_may_be_moved_and_must_be_copies(tmp_path, capsys):
    """Their own times mean nothing; what is no copy of the original is replaced by one."""
    for number in range(4):
        jpeg(tmp_path / f"wikiart/A/{number}.jpg", comment=b"of its own")
    prepare(tmp_path)
    small, right = tmp_path / "small/320/A", digest(tmp_path / "small")
    os.utime(small / "0.jpg", (9, 9))
    (small / "1.jpg").write_bytes(b"")
    (small / "2.jpg").write_bytes((tmp_path / "wikiart/A/2.jpg").read_bytes())
    (small / "3.jpg").unlink()
    capsys.readouterr()
    prepare(tmp_path)
    assert "3 written, 1 were there" in capsys.readouterr().out
    assert digest(tmp_path / "small") == right
    assert all(b"of its own" not in (small / f"{number}.jpg").read_bytes() for number in range(4))


def test_copies_for_several_image_sizes_live_side_by_side(tmp_path, capsys):
    """A copy's short side is 10/7 of IMAGE_SIZE, and no copy is enlarged."""
    painted = paint_artgan(tmp_path / "wikiart", each=4, size=(640, 400))
    path = next(iter(painted))
    for image_size, side, size, written in ((224, 320, (512, 320), 20), (64, 92, (147, 92), 20),
                                            (512, 732, (640, 400), 20), (224, 320, (512, 320), 0)):
        assert tm.main([*folders(tmp_path), "--epochs", "0", "--image-size", str(image_size)]) == 0
        assert f"small copies: {written} written" in capsys.readouterr().out
        assert Image.open(tmp_path / f"small/{side}" / path).size == size


def test_a_disk_too_small_for_the_copies_is_noticed_early(tmp_path, monkeypatch):
    for number in range(300):
        jpeg(tmp_path / f"wikiart/A/{number}.jpg", (30, 20))
    usage = tm.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tm.shutil, "disk_usage", lambda _: usage._replace(free=9_999))
    with pytest.raises(OSError, match="0 MB are free: choose a SMALL_DIR on another disk"):
        prepare(tmp_path)
    assert 70 <= len(copies(tmp_path)) < 300
    monkeypatch.undo()
    assert prepare(tmp_path) == {} and len(copies(tmp_path)) == 300


def test_preparing_waits_for_another_process(tmp_path):
    """Who holds the lock of SMALL_DIR prepares it; what it leaves to do is done after that."""
    pytest.importorskip("fcntl")
    jpeg(tmp_path / "wikiart/A/x.jpg")
    (tmp_path / "small/320").mkdir(parents=True)
    hold = ("import fcntl, sys\nlock = open(sys.argv[1], 'wb')\n"
            "fcntl.flock(lock, fcntl.LOCK_EX), fcntl.lockf(lock, fcntl.LOCK_EX)\n"
            "print('held', flush=True), sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "small/320/.lock"], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == "held\n"
        second = threading.Thread(target=prepare, args=(tmp_path,), daemon=True)
        second.start()
        time.sleep(1)
        assert second.is_alive() and not copies(tmp_path)
    second.join(30)
    assert not second.is_alive() and copies(tmp_path) == {"A/x.jpg"}


def test_names_of_small_copies_never_meet():
    names = ["A/x.jpg", "A/x.JPG", "A/x.png", "A/x.png.jpg", "A/x.png.jpg.jpg", "A/x.jpg.jpg",
             "A/x.jpeg", "A/x.jpeg.jpg", "A/x.1890.jpg", "A/x..jpg"]
    assert len({tm.small_name(name) for name in names}) == len(names)
    assert tm.small_name("A/x.1890.jpg") == "A/x.1890.jpg"


def test_bad_pictures_are_listed_with_reasons(tmp_path):
    data = tmp_path / "wikiart"
    jpeg(data / "A/good.jpg")
    whole = (data / "A/good.jpg").read_bytes()
    for share in (10, 50, 60, 90, 99):
        (data / f"A/cut{share}.jpg").write_bytes(whole[: len(whole) * share // 100])
    (data / "A/empty.jpg").write_bytes(b"")
    (data / "A/text.jpg").write_text("no picture")
    os.mkfifo(data / "A/pipe.jpg")
    (data / "A/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (data / "A/folder.jpg").mkdir()
    bad = prepare(tmp_path)
    assert set(tm.find_paintings(data)) - bad.keys() == {"A/good.jpg"} and len(bad) >= 9
    assert all(reason and "\n" not in reason for reason in bad.values())
    assert copies(tmp_path) == {"A/good.jpg"}
    assert prepare(tmp_path) == bad
    assert not list((tmp_path / "small").rglob("*.tmp"))


RED, WHITE = (230, 20, 20), (255, 255, 255)


def kinds():
    """Yield (name, bytes of a picture, colour that its small copy must show)."""
    red = Image.new("RGB", (64, 48), RED)
    clear = Image.new("RGBA", (64, 48), (230, 20, 20, 0))
    palette = Image.new("P", (64, 48), 1)
    palette.putpalette([*WHITE, *RED])
    wide = Image.fromarray(np.full((48, 64), 40_000, np.uint16))
    for name, image, kind, options, colour in (
        ("rgb", red, "JPEG", {}, RED),
        ("progressive", red, "JPEG", {"progressive": True}, RED),
        ("png", red, "PNG", {}, RED),
        ("webp", red, "WEBP", {"lossless": True}, RED),
        ("gif", red, "GIF", {}, RED),
        ("bmp", red, "BMP", {}, RED),
        ("cmyk", red.convert("CMYK"), "JPEG", {}, RED),
        ("grey", red.convert("L"), "JPEG", {}, (83, 83, 83)),
        ("grey alpha", Image.new("LA", (64, 48), (0, 0)), "PNG", {}, WHITE),
        ("clear", clear, "PNG", {}, WHITE),
        ("palette", palette, "PNG", {}, RED),
        ("clear palette", palette, "PNG", {"transparency": 1}, WHITE),
        ("one bit", Image.new("1", (64, 48), 1), "PNG", {}, WHITE),
        ("16 bit", wide, "PNG", {}, (156, 156, 156)),
        ("16 bit TIFF", wide, "TIFF", {}, (156, 156, 156)),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield name, file.getvalue(), colour


@pytest.mark.parametrize("name,content,colour", list(kinds()),
                         ids=[kind[0] for kind in kinds()])
def test_every_mode_becomes_the_right_rgb(tmp_path, name, content, colour):
    (tmp_path / name).write_bytes(content)
    image = tm.decode(tmp_path / name, 32)
    assert image.mode == "RGB" and image.size == (43, 32)
    assert np.abs(np.asarray(image, int) - colour).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation):
    upright = Image.new("RGB", (600, 400), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 300, 200))  # red where top and left meet
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif)
    image = tm.decode(tmp_path / "x.jpg", 200)
    assert image.size == (300, 200)
    assert image.getpixel((40, 30))[0] > 200 > 60 > image.getpixel((260, 170))[0]


def test_huge_pictures_need_little_memory(tmp_path):
    """A long scroll and a 300-megapixel JPEG are used, in 200 MB at most, at every size."""
    sizes = [(15_000, 1_100), (20_000, 15_000)]
    for number, size in enumerate(sizes):
        Image.new("L", size, 90).save(tmp_path / f"{number}.jpg")
    code = ("import train_model as tm\n"
            "rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "before = rss()\n"
            "for side in (320, 732):\n"
            "    for number in range(2):\n"
            f"        image = tm.decode({str(tmp_path)!r} + f'/{{number}}.jpg', side)\n"
            "        print(side, image.width, image.height, (rss() - before) // 1024)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for size, line in zip(2 * sizes, run.stdout.splitlines(), strict=True):
        side, width, height, megabytes = map(int, line.split())
        assert height == side and width == round(side * size[0] / size[1])
        assert megabytes <= 200


@pytest.mark.parametrize("kind,options,refused", [
    ("PNG", {}, True), ("WEBP", {}, True), ("GIF", {}, True), ("TIFF", {}, True),
    ("JPEG", {"progressive": True}, True), ("JPEG", {}, False)])
def test_pictures_over_the_limit_are_refused(tmp_path, monkeypatch, kind, options, refused):
    Image.new("RGB", (100, 100)).save(tmp_path / "x", kind, **options)
    monkeypatch.setattr(tm, "MAX_PIXELS", 10_000)
    assert tm.decode(tmp_path / "x", 32).size == (32, 32)
    monkeypatch.setattr(tm, "MAX_PIXELS", 9_999)
    if refused:
        with pytest.raises(ValueError, match="100 x 100 is more than 9,999 pixels"):
            tm.decode(tmp_path / "x", 32)
    else:
        assert tm.decode(tmp_path / "x", 32).size == (32, 32)


# -------------------------------------------------------------------------------------------- lists

NAMES = ["Cubism/a-b_one-1900.jpg", "Cubism/a-b_two(1).jpg", "Baroque/c_d-e-s-1890.jpg"]


def write_zip_form(folder):
    write_lists(folder, "genre", ["portrait", "still life"], [(NAMES[0], 0), (NAMES[1], 1)],
                [(NAMES[2], 1)])


def write_repository_form(folder):
    folder.mkdir()
    head = "(Path to image),, (Groundtruth class) \n\n"
    (folder / "genre_train").write_text(head + f"{NAMES[0]},,0\n{NAMES[1]},,1\n")
    (folder / "genre_val").write_text(head + f"{NAMES[2]},,1\n")
    (folder / "genre_class").write_text("0 portrait\n1 still life\n")


def write_repository_folders(folder):
    write_repository_form(folder)
    (folder / "Genre").mkdir()
    for path in folder.glob("genre_*"):
        path.rename(folder / "Genre" / path.name)


@pytest.mark.parametrize("write", [write_zip_form, write_repository_form,
                                   write_repository_folders])
def test_both_forms_of_lists_are_read(tmp_path, write):
    write(tmp_path / "lists")
    for path in (tmp_path / "lists").rglob("*_val*"):  # as some editors save it
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    class_names, labels, test_list = tm.read_lists(tmp_path / "lists", "genre")
    assert class_names == ["portrait", "still life"]
    assert labels == {NAMES[2]: 1, NAMES[0]: 0, NAMES[1]: 1} and test_list == {NAMES[2]}


def test_the_first_row_of_a_painting_counts(tmp_path, capsys):
    write_lists(tmp_path, "genre", ["a", "b"], [("X/1.jpg", 0), ("X/2.jpg", 1), ("X/1.jpg", 1)],
                [("X/3.jpg", 1), ("X/3.jpg", 0), ("X/2.jpg", 0)])
    _, labels, test_list = tm.read_lists(tmp_path, "genre")
    assert labels == {"X/3.jpg": 1, "X/2.jpg": 0, "X/1.jpg": 0}
    assert test_list == {"X/3.jpg", "X/2.jpg"}
    assert "rows that repeat a painting, passed over: 3 (" in capsys.readouterr().out


def test_classes_of_ones_own_keep_their_names(tmp_path):
    write_lists(tmp_path, "style", ["Modern", "Old"],
                [("Baroque/x.jpg", 1), ("Cubism/y.jpg", 0)], [("Baroque/z.jpg", 0)])
    assert tm.read_lists(tmp_path, "style")[0] == ["Modern", "Baroque"]
    rows = [("Baroque/x.jpg", 1)], [("Baroque/y.jpg", 0)]
    write_lists(tmp_path, "style", ["Modern", "Old"], *rows)
    assert tm.read_lists(tmp_path, "style")[0] == ["Modern", "Old"]
    (tmp_path / "style_class.txt").write_text("0 a\n0 b\n1 c\n")
    with pytest.raises(ValueError, match="must number different classes"):
        tm.read_lists(tmp_path, "style")


def test_styles_are_named_as_their_folders(tmp_path):
    write_lists(tmp_path, "style", ["Art_Nouveau", "Cubism"],
                [("Art_Nouveau_Modern/x.jpg", 0), ("Cubism/y.jpg", 1)], [("Cubism/z.jpg", 1)])
    assert tm.read_lists(tmp_path, "style")[0] == ["Art_Nouveau_Modern", "Cubism"]


def test_artists_without_lists_need_enough_paintings():
    found = dict.fromkeys([f"A/x-y_{n}.jpg" for n in range(3)] + [f"B/z_{n}.jpg" for n in range(2)]
                          + ["B/x-y_9.jpg", "B/nobody.jpg", "C/q_1.jpg"], 1)
    class_names, labels, test_list = tm.read_names(found, "artist", 2)
    assert class_names == ["x-y", "z"] and len(labels) == 6 and labels["B/x-y_9.jpg"] == 0
    assert test_list is None


MOJIBAKE = ["Realism/joaquã\xadn-sorolla_mar-1900.jpg", "Realism/ilya-repin_el\xa0cid-ã©tude.jpg"]


def decoded(name):
    """Return a mojibake name as it was meant: UTF-8 that was read as Latin-1, in lower case."""
    meant = "".join(c.upper() if c in "ãâ" else c for c in name)
    return meant.encode("latin-1", "ignore").decode("utf-8", "ignore")


def spellings(name):
    """Return the spellings in which disks hold a listed name."""
    folder, _, file = name.partition("/")
    underscored = "".join(c if c.isascii() else "_" for c in file)
    accented = folder + "/" + decoded(file)
    return {"listed": name, "underscored": f"{folder}/{underscored}", "decoded": accented,
            "NFD": unicodedata.normalize("NFD", accented)}


@pytest.mark.parametrize("spelling", ["listed", "underscored", "decoded", "NFD"])
def test_odd_names_are_found_in_every_spelling(spelling):
    found = {spellings(name)[spelling]: 1 for name in MOJIBAKE} | {"Realism/plain_x-1.jpg": 1}
    places = locate([*MOJIBAKE, "Realism/plain_x-1.jpg"], found)
    assert places == {name: spellings(name)[spelling] for name in MOJIBAKE} | {
        "Realism/plain_x-1.jpg": "Realism/plain_x-1.jpg"}


def test_names_without_their_apostrophes_are_found():
    listed = ["A/j_l'ete-d'avignon.jpg", "A/j_lete.jpg"]
    found = dict.fromkeys(["A/j_lete-davignon.jpg", "A/j_lete.jpg"])
    assert locate(listed, found) == dict(zip(listed, found))


def test_alike_names_are_never_confused():
    listed = ["A/a_b-11.jpg", "A/a_b-1-1.jpg", "A/a_é.jpg", "A/a_è.jpg"]
    assert locate(listed, {"A/a_b-11.jpg": b"", "A/a__.jpg": b""}) == {listed[0]: listed[0]}
    assert locate(listed, {"A/a_b_1_1.jpg": b""}) == {}  # which of two?
    assert locate(listed[1:2], {"A/a_b_11.jpg": b"", "A/a_b1_1.jpg": b""}) == {}
    assert locate(["A/a_é.jpg"], {"B/a_é.jpg": b""}) == {}
    assert locate(["A/a_é.jpg"], {"A/a_é.JPG": b""}) == {}


def test_artgans_own_lists(shared, capsys):
    rows = {"style": (57_025, 24_421, 27), "genre": (45_503, 19_491, 10),
            "artist": (13_346, 5_706, 23)}
    for attribute, (train, test, classes) in rows.items():
        names, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", attribute)
        assert (len(labels) - len(test_list), len(test_list), len(names)) == (train, test, classes)
    assert "Post_Impressionism/maurice-de-vlaminck_the-village.jpg" in capsys.readouterr().out
    assert tm.read_lists(shared / "artgan_lists/git", "artist") == tm.read_lists(
        shared / "artgan_lists/zip", "artist")


@pytest.mark.parametrize("spelling", ["listed", "underscored", "decoded", "NFD"])
def test_artgans_own_odd_names(shared, spelling):
    _, paths, _ = tm.read_lists(shared / "artgan_lists/zip", "style")
    odd = [path for path in paths if not path.isascii()]
    assert len(odd) == 709
    found = {spellings(path)[spelling] if path in odd else path: 1 for path in paths}
    places = locate(paths, found)
    lost = [path for path in paths if path not in places]
    wrong = [path for path in odd if path in places and places[path] != spellings(path)[spelling]]
    assert lost == [] and wrong == []


def test_the_shipped_class_names_are_artgans_folders(shared):
    names, _, _ = tm.read_lists(shared / "artgan_lists/zip", "style")
    assert (ROOT / "class_names.txt").read_text().split("\n") == [*names, ""]


# -------------------------------------------------------------------------------------------- split


SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def parts_of(split):
    """Return {path: part}, after a check that no path is in two parts."""
    parts = {path: part for part, paintings in split.items() for path in paintings}
    assert len(parts) == sum(map(len, split.values()))
    return parts


def many(sizes):
    """Return {path: label} with so many paintings of each label."""
    return {f"S{label}/artist-{n % 7}_no-{label}-{n}.jpg": label
            for label, size in enumerate(sizes) for n in range(size)}


def check_shares(split, labels, shares, most):
    """Fail where a part has over `most` paintings of a class more or less than its share."""
    for part, share in shares.items():
        counts = Counter(split[part].values())
        for label, size in Counter(labels.values()).items():
            assert abs(counts[label] - share * size) <= most, (part, label, size, counts[label])


@pytest.mark.parametrize("seed", range(3))
def test_a_split_is_disjoint_complete_and_by_class(seed):
    labels = many([100, 40, 1000, 20, 10, 7, 5, 4, 3])
    split, source = tm.split_paintings(labels, None, "painting", seed)
    assert parts_of(split).keys() == labels.keys() and source == "drawn by painting"
    assert all(labels[path] == label for part in tm.PARTS for path, label in split[part].items())
    check_shares(split, labels, SHARES, most=1.11)
    for part in tm.PARTS:
        assert set(split[part].values()) == set(labels.values())


@pytest.mark.parametrize("size,expected", [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)),
                                           (4, (2, 1, 1))])
def test_small_classes(size, expected):
    split, _ = tm.split_paintings(many([50, size]), None, "painting", 0)
    assert tuple(sum(split[part].values()) for part in tm.PARTS) == expected


@pytest.mark.parametrize("size,expected", [(1, (1, 0)), (2, (1, 1)), (3, (2, 1)), (20, (18, 2))])
def test_small_classes_beside_a_given_test(size, expected):
    labels = many([60, size])
    test_list = {path for path in labels if path.startswith("S0") and path.endswith("0.jpg")}
    split, source = tm.split_paintings(labels, test_list, "painting", 0)
    assert set(split["test"]) == test_list and source == "that of the lists"
    assert (sum(split["train"].values()), sum(split["validation"].values())) == expected


def test_twins_stay_together():
    labels = many([200, 100])
    twins = [f"S0/x_{n}.jpg" for n in range(40)]
    labels |= dict.fromkeys(twins, 0) | {path.replace("S0", "S1"): 1 for path in twins}
    split, _ = tm.split_paintings(labels, None, "painting", 3)
    parts = parts_of(split)
    assert all(parts[path] == parts[path.replace("S0", "S1")] for path in twins)
    assert len({parts[path] for path in twins}) == 3


def test_classes_without_a_painting_are_reported(tmp_path, capsys):
    painted = paint_artgan(tmp_path / "wikiart", each=4)
    rows = [(path, int(name > "D")) for path, name in painted.items()]
    write_lists(tmp_path / "lists", "genre", ["a", "b", "c"], rows[::2], rows[1::2])
    flags = [*folders(tmp_path), "--lists-dir", str(tmp_path / "lists"), "--attribute", "genre"]
    assert tm.main([*flags, "--epochs", "0"]) == 0
    out = capsys.readouterr().out
    assert all(f"classes without a {part} painting: 1 (c)" in out for part in tm.PARTS)


def test_artists_stay_together():
    labels = {f"S{n % 3}/artist-{n % 41}_{n}.jpg": n % 3 for n in range(900)}
    split, source = tm.split_paintings(labels, None, "artist", 0)
    assert source == "drawn by artist"
    artists = [set(map(tm.artist, split[part])) for part in tm.PARTS]
    assert not (artists[0] & artists[1] or artists[0] & artists[2] or artists[1] & artists[2])
    assert abs(len(split["train"]) / 900 - 0.7) < 0.08
    assert parts_of(split).keys() == labels.keys()


@pytest.mark.parametrize("group_by,source", [
    ("painting", "that of the lists"), ("artist", "drawn by artist")])
def test_lists_split_unless_artists_stay_together(tmp_path, group_by, source):
    painted = paint_artgan(tmp_path / "wikiart", each=8, size=(60, 50))
    rows = [(path, int(path[-5]) % 2) for path in painted]
    write_lists(tmp_path / "lists", "style", ["even", "odd"], rows[:30], rows[30:])
    flags = [*folders(tmp_path), *QUICK, "--lists-dir", str(tmp_path / "lists"), "--epochs", "1"]
    assert tm.main([*flags, "--group-by", group_by]) == 0
    run = tm.load_checkpoint(tmp_path / "out/model_best.pth")
    split = run["split"]
    tested, others = split["test"], split["train"] | split["validation"]
    assert run["split_source"] == source and tested | others == dict(rows)
    assert (tested == dict(rows[30:])) == (group_by == "painting")
    shared = set(map(tm.artist, tested)) & set(map(tm.artist, others))
    assert bool(shared) == (group_by == "painting")


@pytest.mark.parametrize("seed", range(4))
def test_groups_share_out_small_classes_too(seed):
    """40 artists paint up to 200 pictures of one class, and some a few of another."""
    chance, labels = random.Random(seed), {}
    for number in range(40):
        for label, (most, share) in enumerate(((200, 1), (5, 0.3))):
            for painting in range(chance.randint(1, most) if chance.random() < share else 0):
                labels[f"S{label}/artist-{number}_{label}-{painting}.jpg"] = label
    split, _ = tm.split_paintings(labels, None, "artist", 0)
    sizes = Counter(labels.values())
    for part, share in SHARES.items():
        counts = Counter(split[part].values())
        assert all(abs(counts[label] / sizes[label] - share) < 0.05 for label in sizes), part


def test_the_split_is_the_same_everywhere():
    """Another process, another hash seed, another order of the paintings: the same split."""
    labels = many([30, 20, 5])
    code = ("import train_model as tm, hashlib\n"
            f"labels = dict(reversed({list(labels.items())!r}))\n"
            "split = tm.split_paintings(labels, None, 'painting', 5)\n"
            "print(hashlib.sha256(repr(split).encode()).hexdigest())")
    here = repr(tm.split_paintings(labels, None, "painting", 5))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONHASHSEED": "1"})
    assert run.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()
    assert repr(tm.split_paintings(labels, None, "painting", 6)) != here


def test_the_split_of_artgans_styles(shared):
    """Validation is a tenth of ArtGAN's train in each class; its val is the test, whole."""
    _, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", "style")
    split, _ = tm.split_paintings(labels, test_list, "painting", 0)
    assert split["test"] == {path: labels[path] for path in sorted(test_list)}
    assert parts_of(split).keys() == labels.keys()
    listed = {path: label for path, label in labels.items() if path not in test_list}
    check_shares(split, listed, {"train": 0.9, "validation": 0.1}, most=1.5)
    artists, _ = tm.split_paintings(labels, None, "artist", 0)
    counts = [Counter(artists[part].values()) for part in tm.PARTS]
    assert all(count[label] for count in counts for label in range(27))


# ------------------------------------------------------------------------------------- exact counts


def test_the_counts_of_a_whole_check(tmp_path, capsys):
    painted = paint_artgan(tmp_path / "wikiart", each=10, size=(90, 70))
    paths = sorted(painted)
    rows = [(path, sorted(set(painted.values())).index(painted[path])) for path in paths]
    (tmp_path / "wikiart" / paths[0]).write_bytes(b"broken")
    (tmp_path / "wikiart" / paths[1]).unlink()
    write_lists(tmp_path / "lists", "style", sorted(set(painted.values())),
                [row for place, row in enumerate(rows) if place % 5],
                [row for place, row in enumerate(rows) if not place % 5])
    paint("Cubism", 1, (90, 70)).save(tmp_path / "wikiart/Cubism/unlisted_x.jpg")
    flags = [*folders(tmp_path), "--lists-dir", str(tmp_path / "lists"), "--epochs", "0"]
    assert tm.main(flags) == 0
    out = capsys.readouterr().out
    assert "50 paintings in" in out
    assert f"paintings of the run not on disk: 1 ({paths[1]})" in out
    assert "paintings that are not of the run: 1 (Cubism/unlisted_x.jpg)" in out
    assert "small copies: 49 written, 0 were there already" in out
    assert f"pictures that cannot be used: 1 ({paths[0]}" in out
    assert "split: 34 train, 5 validation, 9 test paintings in 5 classes" in out
    lines = (tmp_path / "out/bad_files.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{paths[0]}\t")
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {
        "bad_files.txt", "crops.jpg"}


def test_tables_are_utf8_csv(tmp_path):
    rows = [{"path": "A/x,\"y\"\n.jpg", "n": 1}, {"path": "A/\udce9é.jpg", "n": 2}]
    tm.write_table(tmp_path / "t.csv", ("path", "n"), rows)
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["path"] for row in read] == ["A/x,\"y\"\n.jpg", "A/\\udce9é.jpg"]
