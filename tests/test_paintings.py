"""Finding, resizing, labelling and splitting the paintings."""

import contextlib
import csv
import hashlib
import io
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import train_model as tm
from tests.conftest import QUICK, ROOT, copies_in, folders
from tests.paintings import paint, paint_artgan, write_lists


def jpeg(path, size=(400, 360), colour=(200, 30, 60), **options):
    """Write a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def match(paths, found):
    """Return {path: path on disk} of the listed paths that `tm.match_paths` finds."""
    spelt, there = tm.match_paths({"test": dict.fromkeys(paths, 0)}, found)["test"], set(found)
    return {path: place for path, place in zip(paths, spelt, strict=True) if place in there}


def resize(folder):
    """Make the copies of folder/wikiart that are missing; return {path: copy}, {path: reason}."""
    data = folder / "wikiart"
    return tm.resize_paintings(tm.find_paintings(data), data, folder / "cache", 224)


def made(capsys):
    """Return how many resized copies were made, and how many were there, as printed last."""
    counts = re.findall(r"([\d,]+) made, ([\d,]+) were there", capsys.readouterr().out)
    return tuple(int(count.replace(",", "")) for count in counts[-1])


def files(folder):
    """Return all files of a folder."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def digest(folder):
    """Return what a folder holds, file by file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files(folder)}


# ----------------------------------------------------------------------------- finding and resizing


def test_only_pictures_are_found(tmp_path, capsys):
    wanted = ["A/x.jpg", "A/y.JPEG", "A/z.jfif", "B/w.png", "B/v.webp", "B/u é'  ü.jpg",
              "B/t.avif", "B/s.TIFF"]
    skipped = ["A/Thumbs.db", "A/notes.txt", "top.jpg", "A/.anna_1.jpg.icloud"]
    hidden = ["A/._x.jpg", "A/.DS_Store", ".cache/q.jpg", "A/.ipynb_checkpoints/x.jpg"]
    for name in wanted + skipped + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert tm.find_paintings(tmp_path) == sorted(wanted)
    out = capsys.readouterr().out
    assert f": {len(skipped)} (A/.anna_1.jpg.icloud, A/Thumbs.db, A/notes.txt" in out
    (tmp_path / "A" / "circle").symlink_to(tmp_path)
    assert tm.find_paintings(tmp_path) == sorted(wanted)
    for empty in ("B", "C"):  # pictures, but in no folder; no folder at all
        with pytest.raises(tm.InputError, match=f"no .* {tmp_path / empty}.*--data-dir"):
            tm.find_paintings(tmp_path / empty)


def test_class_folders_without_a_picture_are_named(tmp_path, capsys):
    """In a line of their own, however many other files are skipped."""
    for name in ("A/x.jpg", *(f"A/{number}.txt" for number in range(9)), "Cubism/x.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "Rococo").mkdir()
    tm.find_paintings(tmp_path)
    line, = (line for line in capsys.readouterr().out.splitlines() if "Rococo" in line)
    assert ": 2 (Cubism, Rococo)" in line and ".heic" not in line


def test_resized_copies_follow_the_originals(tmp_path, capsys):
    data = tmp_path / "wikiart"
    jpeg(data / "A/large.jpg", (800, 640))
    jpeg(data / "A/upright.jpg", (500, 1000))
    jpeg(data / "B/tiny.jpg", (50, 40))
    jpeg(data / "B/other.png", (640, 640))
    before = digest(data)
    copies, bad = resize(tmp_path)
    assert bad == {} and made(capsys) == (4, 0)
    assert {path: Image.open(copy).size for path, copy in copies.items()} == {
        "A/large.jpg": (400, 320), "A/upright.jpg": (320, 640), "B/tiny.jpg": (50, 40),
        "B/other.png": (320, 320)}
    first = digest(tmp_path / "cache")
    assert resize(tmp_path) == (copies, {}) and made(capsys) == (0, 4)
    assert digest(tmp_path / "cache") == first and digest(data) == before

    jpeg(data / "B/new.jpg")
    jpeg(data / "A/large.jpg", (800, 640), (0, 0, 255))
    os.utime(data / "A/large.jpg", (1, 1))
    (data / "B/tiny.jpg").unlink()
    copies, bad = resize(tmp_path)
    assert bad == {} and made(capsys) == (2, 2)
    assert Image.open(copies["A/large.jpg"]).getpixel((9, 9))[2] > 240
    assert copies.keys() == {"A/large.jpg", "A/upright.jpg", "B/new.jpg", "B/other.png"}


@pytest.mark.parametrize("seconds", [0, 1, 10**9, 2**33])
def test_originals_of_any_age_are_copied_once(tmp_path, capsys, seconds):
    """Twice, since another original may have the name and the age of the one before."""
    for size in ((400, 360), (500, 360)):
        jpeg(tmp_path / "wikiart/A/old.jpg", size)
        os.utime(tmp_path / "wikiart/A/old.jpg", (seconds, seconds))
        for count in (1, 0):
            copies, bad = resize(tmp_path)
            assert bad == {} and made(capsys) == (count, 1 - count)
        width, height = Image.open(copies["A/old.jpg"]).size
        assert height == 320 and width == round(size[0] * 320 / size[1])


def test_the_cache_may_be_moved_and_lose_copies(tmp_path, capsys):
    """The times and the place of copies mean nothing; one made again is the same."""
    for number in range(4):
        jpeg(tmp_path / f"wikiart/A/{number}.jpg", comment=b"of its own")
    copies, _ = resize(tmp_path)
    right = digest(tmp_path / "cache")
    assert all(b"of its own" not in Path(copy).read_bytes() for copy in copies.values())
    os.utime(copies["A/0.jpg"], (9, 9))
    Path(copies["A/1.jpg"]).unlink()
    made(capsys)
    assert resize(tmp_path)[0] == copies and made(capsys) == (1, 3)
    (tmp_path / "cache").rename(tmp_path / "moved")
    data = tmp_path / "wikiart"
    copies, bad = tm.resize_paintings(sorted(copies), data, tmp_path / "moved", 224)
    assert bad == {} and made(capsys) == (0, 4) and digest(tmp_path / "moved") == right
    assert all(Path(copy).is_relative_to(tmp_path / "moved") for copy in copies.values())
    assert not (tmp_path / "cache").exists()


def test_copies_for_several_image_sizes_live_side_by_side(tmp_path, capsys):
    """A copy's short side is 10/7 of IMAGE_SIZE, and no copy is enlarged."""
    painted = paint_artgan(tmp_path / "wikiart", each=4, size=(640, 400))
    path, sizes = next(iter(painted)), []
    for image_size, size, count in ((224, (512, 320), 20), (64, (147, 92), 20),
                                    (512, (640, 400), 20), (224, (512, 320), 0)):
        assert tm.main([*folders(tmp_path), "--epochs", "0", "--image-size", str(image_size)]) == 0
        assert made(capsys) == (count, 20 - count)
        sizes.append(size)
        for former, expected in zip((224, 64, 512), sizes):  # those made before are still there
            assert Image.open(copies_in(tmp_path, former)[path]).size == expected
        assert made(capsys) == (0, 20)
    assert len(files(tmp_path / "cache")) == 60


def test_copies_of_different_originals_never_meet(tmp_path):
    names = ["A/x.jpg", "A/x.JPG", "A/X.jpg", "A/x.png", "A/x.png.jpg", "A/x.png.jpg.jpg",
             "A/x.jpg.jpg", "A/x.jpeg", "A/x.jpeg.jpg", "A/x.1890.jpg", "A/x..jpg", "A/é.jpg",
             unicodedata.normalize("NFD", "A/é.jpg"), "B/x.jpg", "AB/x.jpg", "A/Bx.jpg"]
    for number, name in enumerate(names):
        jpeg(tmp_path / "wikiart" / name, (40, 30), (15 * number,) * 3,
             format="PNG" if name.endswith("png") else "JPEG")
        os.utime(tmp_path / "wikiart" / name, (9, 9))
    copies, bad = resize(tmp_path)
    assert bad == {} and copies.keys() == set(names)
    assert len({copy.lower() for copy in copies.values()}) == len(names)
    for number, name in enumerate(names):
        assert abs(Image.open(copies[name]).getpixel((9, 9))[0] - 15 * number) < 3


def test_two_data_sets_of_the_same_names_share_a_cache(tmp_path, capsys):
    """The times are the same too, as zips have them; one in use keeps its pictures."""
    names, sets = ["A/x_1.jpg", "B/x_2.jpg"], ((250, 9, 9), (9, 9, 250))
    copies = []
    for number, colour in enumerate(sets):
        data = tmp_path / str(number)
        for name in names:
            jpeg(data / name, (90, 70), colour, comment=bytes(number))  # of another size
            os.utime(data / name, (315532800, 315532800))
        copies.append(tm.resize_paintings(names, data, tmp_path / "cache", 64)[0])
        assert made(capsys) == (2, 0)
    for number in (0, 1):
        assert tm.resize_paintings(
            names, tmp_path / str(number), tmp_path / "cache", 64)[0] == copies[number]
        assert made(capsys) == (0, 2)
        for name in names:
            pixel = np.array(Image.open(copies[number][name]).getpixel((9, 9)), int)
            assert np.abs(pixel - sets[number]).max() < 9


def test_changed_times_are_reported_once(tmp_path, capsys):
    """As after copying DATA_DIR; not where nothing or only a part is new."""
    def noted():
        assert resize(tmp_path)[1] == {}
        return "note:" in capsys.readouterr().out

    for number in range(4):
        jpeg(tmp_path / f"wikiart/A/{number}.jpg", (40, 30))
    assert not noted() and not noted()
    jpeg(tmp_path / "wikiart/A/new.jpg", (40, 30))
    os.utime(tmp_path / "wikiart/A/0.jpg", (9, 9))
    assert not noted()
    for path in (tmp_path / "wikiart/A").iterdir():
        os.utime(path, (99, 99))
    assert noted() and not noted()


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
    copies, bad = resize(tmp_path)
    assert copies.keys() == {"A/good.jpg"} == set(tm.find_paintings(data)) - bad.keys()
    assert len(bad) >= 9 and all(reason and "\n" not in reason for reason in bad.values())
    assert [str(path) for path in files(tmp_path / "cache")] == [copies["A/good.jpg"]]
    assert resize(tmp_path) == (copies, bad)


RED, WHITE = (230, 20, 20), (255, 255, 255)


def kinds():
    """Yield (name, bytes of a picture, colour that its copy must show, or None if refused)."""
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
        ("avif", red, "AVIF", {"quality": 100}, RED),
        ("clear avif", clear, "AVIF", {}, WHITE),
        ("tiff", red, "TIFF", {}, RED),
        ("compressed tiff", red, "TIFF", {"compression": "tiff_lzw"}, RED),
        ("cmyk tiff", red.convert("CMYK"), "TIFF", {}, RED),
        ("palette tiff", palette, "TIFF", {}, RED),
        ("cmyk", red.convert("CMYK"), "JPEG", {}, RED),
        ("grey", red.convert("L"), "JPEG", {}, (83, 83, 83)),
        ("grey alpha", Image.new("LA", (64, 48), (0, 0)), "PNG", {}, WHITE),
        ("clear", clear, "PNG", {}, WHITE),
        ("palette", palette, "PNG", {}, RED),
        ("clear palette", palette, "PNG", {"transparency": 1}, WHITE),
        ("one bit", Image.new("1", (64, 48), 1), "PNG", {}, WHITE),
        ("one bit tiff", Image.new("1", (64, 48), 1), "TIFF", {}, WHITE),
        ("16 bit", wide, "PNG", {}, (156, 156, 156)),
        ("clear 16 bit", wide, "PNG", {"transparency": 40_000}, WHITE),
        ("16 bit tiff", wide, "TIFF", {}, None),
        ("16 bit tiff where zero is white", wide, "TIFF", {"tiffinfo": {262: 0}}, None),
        ("32 bit tiff", Image.new("I", (64, 48), 40_000), "TIFF", {}, None),
        ("float tiff", Image.new("F", (64, 48), 0.5), "TIFF", {}, None),
    ):
        if kind == "AVIF" and not features.check("avif"):
            continue
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield name, file.getvalue(), colour


@pytest.mark.parametrize("name,content,colour", list(kinds()),
                         ids=[kind[0] for kind in kinds()])
def test_every_mode_becomes_the_right_rgb(tmp_path, name, content, colour):
    """Or is refused with a reason: never wrong."""
    (tmp_path / name).write_bytes(content)
    if colour is None:
        with pytest.raises(tm.InputError, match="save it as PNG or JPEG"):
            tm.decode(tmp_path / name, 32)
        return
    image = tm.decode(tmp_path / name, 32)
    assert image.mode == "RGB" and image.size == (43, 32)
    assert np.abs(np.asarray(image, int) - colour).max() <= 8


def grey_png(bits, value, clear):
    """Return a PNG of one grey value, with another or the same that is transparent."""
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    row = b"\0" + int(f"{value:0{bits}b}" * 16, 2).to_bytes(2 * bits, "big")
    head = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", struct.pack(">H", clear)),
              (b"IDAT", zlib.compress(row * 16)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_or_refused(tmp_path, bits):
    """At every depth: it is the grey of the file, not that of 8 bits."""
    most, rare = 2**bits - 1, (tm.InputError,) if bits in (2, 4) else ()
    for value in {most, most * 2 // 3, 0}:
        for clear, shown in ((value, 255), (most - value, 255 * value / most)):
            (tmp_path / "x.png").write_bytes(grey_png(bits, value, clear))
            with contextlib.suppress(*rare):
                image = np.asarray(tm.decode(tmp_path / "x.png", 16), int)
                assert np.abs(image - shown).max() <= 1


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
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        stored.save(tmp_path / "x", kind, exif=exif)
        image = tm.decode(tmp_path / "x", 200)
        assert image.size == (300, 200)
        assert image.getpixel((40, 30))[0] > 200 > 60 > image.getpixel((260, 170))[0]


def test_huge_pictures_need_little_memory(tmp_path):
    """A long scroll and a 200-megapixel JPEG are used, in 200 MB at most, at every size.

    Pillow's own limit, which other code in the process may rely on, stays as it was.
    """
    sizes = [(15_000, 1_100), (20_000, 10_000)]
    for number, size in enumerate(sizes):
        Image.new("L", size, 90).save(tmp_path / f"{number}.jpg")
    code = ("from PIL import Image\n"
            "limit = Image.MAX_IMAGE_PIXELS\n"
            "from pathlib import Path\n"
            "import train_model as tm\n"
            "rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "before = rss()\n"
            "for side in (320, 732):\n"
            "    for number in range(2):\n"
            f"        image = tm.decode(Path({str(tmp_path)!r}, f'{{number}}.jpg'), side)\n"
            "        assert Image.MAX_IMAGE_PIXELS == limit\n"
            "        print(side, image.width, image.height, (rss() - before) // 1024)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for size, line in zip(2 * sizes, run.stdout.splitlines(), strict=True):
        side, width, height, megabytes = map(int, line.split())
        assert height == side and width == round(side * size[0] / size[1])
        assert megabytes <= 200


@pytest.mark.parametrize("kind,options,limit", [
    ("PNG", {}, "MAX_PIXELS"), ("WEBP", {}, "MAX_PIXELS"), ("GIF", {}, "MAX_PIXELS"),
    ("TIFF", {}, "MAX_PIXELS"), ("JPEG", {}, "MAX_JPEG_PIXELS"),
    ("JPEG", {"progressive": True}, "MAX_JPEG_PIXELS")])
def test_pictures_over_the_limit_are_refused(tmp_path, monkeypatch, kind, options, limit):
    """JPEGs have a higher limit than others, since they are reduced as they are decoded."""
    assert tm.MAX_JPEG_PIXELS > tm.MAX_PIXELS
    Image.new("RGB", (100, 100)).save(tmp_path / "x", kind, **options)
    monkeypatch.setattr(tm, "MAX_PIXELS", 0)
    monkeypatch.setattr(tm, "MAX_JPEG_PIXELS", 0)
    monkeypatch.setattr(tm, limit, 10_000)
    assert tm.decode(tmp_path / "x", 32).size == (32, 32)
    monkeypatch.setattr(tm, limit, 9_999)
    with pytest.raises(tm.InputError, match="100 x 100 .* 9,999 pixels"):
        tm.decode(tmp_path / "x", 32)


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
    assert ": 3 (X/3.jpg, X/2.jpg, X/1.jpg)" in capsys.readouterr().out


def test_classes_of_ones_own_keep_their_names(tmp_path):
    write_lists(tmp_path, "style", ["Modern", "Old"],
                [("Baroque/x.jpg", 1), ("Cubism/y.jpg", 0)], [("Baroque/z.jpg", 0)])
    assert tm.read_lists(tmp_path, "style")[0] == ["Modern", "Baroque"]
    rows = [("Baroque/x.jpg", 1)], [("Baroque/y.jpg", 0)]
    write_lists(tmp_path, "style", ["Modern", "Old"], *rows)
    assert tm.read_lists(tmp_path, "style")[0] == ["Modern", "Old"]
    (tmp_path / "style_class.txt").write_text("0 a\n0 b\n1 c\n")
    with pytest.raises(tm.InputError, match=f"{tmp_path}/style_class.txt must number"):
        tm.read_lists(tmp_path, "style")


def test_styles_are_named_as_their_folders(tmp_path):
    write_lists(tmp_path, "style", ["Art_Nouveau", "Cubism"],
                [("Art_Nouveau_Modern/x.jpg", 0), ("Cubism/y.jpg", 1)], [("Cubism/z.jpg", 1)])
    assert tm.read_lists(tmp_path, "style")[0] == ["Art_Nouveau_Modern", "Cubism"]


def test_lists_with_another_end_of_line(tmp_path):
    rows = [(f"S/{n}.jpg", n % 2) for n in range(9)]
    write_lists(tmp_path, "genre", ["a", "b"], rows[:6], rows[6:])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    assert tm.read_lists(tmp_path, "genre")[1] == dict(rows[6:]) | dict(rows[:6])


@pytest.mark.parametrize("kind", ["nested", "upper"])
def test_lists_are_found_a_folder_deeper_and_in_capitals(shared, kind):
    lists = shared / "cases/lists"
    assert tm.read_lists(lists / kind, "style") == tm.read_lists(lists / "ok", "style")


def test_lists_that_are_there_twice_are_an_error(tmp_path):
    for folder in ("one", "two"):
        write_zip_form(tmp_path / folder)
    with pytest.raises(tm.InputError, match=f"{tmp_path} .*genre_train.* once .*one/genre_"):
        tm.read_lists(tmp_path, "genre")


def test_artists_without_lists_need_enough_paintings():
    found = ([f"A/x-y_{n}.jpg" for n in range(3)] + [f"B/z_{n}.jpg" for n in range(2)]
             + ["B/x-y_9.jpg", "B/nobody.jpg", "C/q_1.jpg"])
    class_names, labels, test_list = tm.label_by_folder_or_artist(found, "artist", 2)
    assert class_names == ["x-y", "z"] and len(labels) == 6 and labels["B/x-y_9.jpg"] == 0
    assert test_list is None


@pytest.mark.parametrize("name,artist", [
    ("juan-gris_violin-1916.jpg", "juan-gris"), ("a.y.-jackson_x_y.jpg", "a.y.-jackson"),
    ("E\u0301lise_x.jpg", "\u00c9lise"), ("葛飾北斎_x.jpg", "葛飾北斎"), ("2-dada_x.jpg", "2-dada"),
    ("scanner-darkly_x.jpg", "scanner-darkly"),
    ("IMG_2031.jpg", ""), ("img_x.jpg", ""), ("DSC_0012.jpg", ""), ("DSCN_12.jpg", ""),
    ("dscf_12.jpg", ""), ("PXL_2020.jpg", ""), ("Scan_1.jpg", ""), ("Screenshot_2.png", ""),
    ("2019_x.jpg", ""), ("-_x.jpg", ""), ("_x.jpg", ""), ("violin.jpg", "")])
def test_the_artist_of_a_file_name(name, artist):
    """Cameras' names, and those without a letter, are no artists."""
    assert tm.artist(f"Cubism/{name}") == artist


def test_one_artist_in_two_forms_of_unicode_is_one_class():
    found = [f"{unicodedata.normalize(form, 'Été')}/{unicodedata.normalize(form, 'Élise')}_{n}.jpg"
             for n, form in enumerate(("NFC", "NFD") * 2)]
    for attribute, name in (("style", "Été"), ("artist", "Élise")):
        class_names, labels, _ = tm.label_by_folder_or_artist(
            [*found, "B/b_1.jpg"], attribute, 1)
        assert class_names == sorted(["B" if attribute == "style" else "b", name])
        assert len({labels[path] for path in found}) == 1


@pytest.mark.parametrize("attribute", ["style", "artist"])
@pytest.mark.parametrize("folders", [("test", "train"), ("Train", "VAL", "test"), ("train",)])
def test_the_parts_of_a_split_are_no_classes(attribute, folders):
    found = [f"{folder}/anna_{n}.jpg" for folder in folders for n in range(9)]
    with pytest.raises(tm.InputError, match=f"{folders[-1]}.*--data-dir"):
        tm.label_by_folder_or_artist(found, attribute, 1)
    tm.label_by_folder_or_artist([*found, "Cubism/anna_x.jpg"], attribute, 1)


# Two of ArtGAN's own: UTF-8 that was read as Latin-1 and made lower case.
GARBLED = ["Realism/joaquã\xadn-sorolla_mar-1900.jpg", "Realism/ilya-repin_ã\xa0-l'ã©tude.jpg"]


def decoded(name):
    """Return a garbled name as it was meant."""
    capitals = "".join(c.upper() if c in "ãâ" else c for c in name)
    return capitals.encode("latin-1").decode("utf-8")


SPELLINGS = {  # in which disks hold a listed file name
    "listed": lambda name: name,
    "underscored": lambda name: "".join(c if c.isascii() else "_" for c in name),
    "decoded": decoded,
    "NFD": lambda name: unicodedata.normalize("NFD", decoded(name)),
    "listed, NFD": lambda name: unicodedata.normalize("NFD", name),
    "decoded, underscored": lambda name: SPELLINGS["underscored"](decoded(name)),
    "decoded, no apostrophes": lambda name: decoded(name).replace("'", ""),
    "underscored, no apostrophes": lambda name: SPELLINGS["underscored"](name).replace("'", ""),
}


def spell(path, spelling):
    """Return a listed path as a disk of such spelling holds it."""
    folder, _, name = path.partition("/")
    return f"{folder}/{SPELLINGS[spelling](name)}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_odd_names_are_found_in_every_spelling(spelling):
    listed = [*GARBLED, "Realism/plain_x-1.jpg"]
    places = {path: spell(path, spelling) for path in listed}
    assert match(listed, list(places.values())) == places


def test_names_without_their_apostrophes_are_found():
    listed = ["A/j_l'ete-d'avignon.jpg", "A/j_lete.jpg"]
    found = ["A/j_lete-davignon.jpg", "A/j_lete.jpg"]
    assert match(listed, found) == dict(zip(listed, found))


def test_folders_in_another_form_of_unicode_are_found():
    listed = ["Néo-école/a_x.jpg", "Néo-école/a_é.jpg"]
    found = [unicodedata.normalize("NFD", path) for path in listed]
    assert match(listed, found) == dict(zip(listed, found))


@pytest.mark.parametrize("listed,found", [
    (["A/a_b-11.jpg", "A/a_b-1-1.jpg"], ["A/a_b_1_1.jpg"]),
    (["A/a_b-1-1.jpg"], ["A/a_b_11.jpg", "A/a_b1_1.jpg"]),
    (["A/a_b-11.jpg"], ["A/a_b-1-1.jpg"]), (["A/a_1-11.jpg"], ["A/a_11-1.jpg"]),
    (["A/a_é.jpg"], ["A/a_è.jpg"]), (["A/a_ã©.jpg"], ["A/a_è.jpg"]),
    (["A/a_é.jpg", "A/a_è.jpg"], ["A/a__.jpg"]),  # which of two?
    (["A/a_é.jpg"], ["A/a__.jpg", "A/a___.jpg"]),
    (["A/a_é.jpg"], ["B/a_é.jpg"]), (["A/a_é.jpg"], ["A/a_é.JPG"]), (["A/a_é.jpg"], ["A/a_é.png"]),
    (["A/a_b.jpg"], ["A/a__b.jpg"]), (["A/a_b.jpg"], ["A/a-b.jpg"]),
])
def test_alike_names_are_never_confused(listed, found):
    assert match(listed, found) == {}


def test_what_is_there_as_listed_stays():
    """And says which file the other of two alike is."""
    assert match(["A/a_é.jpg"], ["A/a__.jpg", "A/a_é.jpg"]) == {"A/a_é.jpg": "A/a_é.jpg"}
    listed = ["A/a_é.jpg", "A/a_è.jpg"]
    found = ["A/a_é.jpg", "A/a__.jpg"]
    assert match(listed, found) == dict(zip(listed, found))


def test_a_file_of_a_list_is_no_other_ones():
    listed = ["A/a_b-11.jpg", "A/a_b-1-1.jpg", "A/a_é.jpg", "A/a_è.jpg", "A/a__.jpg"]
    found = [listed[0], listed[2], listed[4]]
    assert match(listed, found) == dict(zip(found, found))
    split = {"train": {"A/a_é.jpg": 3}, "validation": {}, "test": {"A/a_b.jpg": 1}}
    assert tm.match_paths(split, ["A/a__.jpg", "A/a_b.jpg"]) == {
        "train": {"A/a__.jpg": 3}, "validation": {}, "test": {"A/a_b.jpg": 1}}


def test_artgans_own_lists(shared, capsys):
    rows = {"style": (57_025, 24_421, 27), "genre": (45_503, 19_491, 10),
            "artist": (13_346, 5_706, 23)}
    for attribute, (train, test, classes) in rows.items():
        names, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", attribute)
        assert (len(labels) - len(test_list), len(test_list), len(names)) == (train, test, classes)
    assert "Post_Impressionism/maurice-de-vlaminck_the-village.jpg" in capsys.readouterr().out
    assert tm.read_lists(shared / "artgan_lists/git", "artist") == tm.read_lists(
        shared / "artgan_lists/zip", "artist")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_artgans_own_odd_names(shared, spelling):
    """Each of 709 is found, as every other painting is, and none is taken for another."""
    _, paths, _ = tm.read_lists(shared / "artgan_lists/zip", "style")
    odd = [path for path in paths if not path.isascii()]
    assert len(odd) == 709
    if "apostrophes" in spelling:
        odd += [path for path in paths if path.isascii() and "'" in path]
        assert len(odd) > 750
    places = {path: path for path in paths} | {path: spell(path, spelling) for path in odd}
    found = match(list(paths), list(places.values()))
    lost = [path for path in paths if path not in found]
    wrong = [path for path in found if found[path] != places[path]]
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
    assert parts_of(split).keys() == labels.keys() and "drawn by painting" in source
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
    assert set(split["test"]) == test_list and source == "from the lists"
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
    assert all(re.search(rf"no {part}\w* painting: 1 \(c\)", out) for part in tm.PARTS)


def test_artists_stay_together():
    labels = {f"S{n % 3}/artist-{n % 41}_{n}.jpg": n % 3 for n in range(900)}
    split, source = tm.split_paintings(labels, None, "artist", 0)
    assert "drawn by artist" in source
    artists = [set(map(tm.artist, split[part])) for part in tm.PARTS]
    assert not (artists[0] & artists[1] or artists[0] & artists[2] or artists[1] & artists[2])
    assert abs(len(split["train"]) / 900 - 0.7) < 0.08
    assert parts_of(split).keys() == labels.keys()


@pytest.mark.parametrize("artists", [("a", "b"), ("IMG", "1", "2020", "dsc"), ("",)])
def test_too_few_artists_to_stay_together(artists):
    labels = {f"S{n % 2}/{artists[n % len(artists)]}_{n}.jpg": n % 2 for n in range(60)}
    for test_list in (None, set(list(labels)[::5])):
        with pytest.raises(tm.InputError, match="GROUP_BY artist .* three"):
            tm.split_paintings(labels, test_list, "artist", 0)
        assert tm.split_paintings(labels, test_list, "painting", 0)
    more = {f"S{n % 2}/c{n % 3}_{n}.jpg": n % 2 for n in range(9)}
    split, _ = tm.split_paintings(labels | more, None, "artist", 0)
    assert parts_of(split).keys() == labels.keys() | more.keys()


@pytest.mark.parametrize("group_by,source", [
    ("painting", "from the lists"), ("artist", "drawn by artist")])
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
    """Validation is a tenth of ArtGAN's train in each class; its val is the test, whole.

    A split of our own is as even as iterative stratification, measured on the same paintings.
    """
    _, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", "style")
    split, _ = tm.split_paintings(labels, test_list, "painting", 0)
    assert split["test"] == {path: labels[path] for path in sorted(test_list)}
    assert parts_of(split).keys() == labels.keys()
    listed = {path: label for path, label in labels.items() if path not in test_list}
    check_shares(split, listed, {"train": 0.9, "validation": 0.1}, most=1.5)
    for group_by, most in (("painting", 0.0062), ("artist", 0.27)):
        split, _ = tm.split_paintings(labels, None, group_by, 0)
        counts, sizes = {part: Counter(split[part].values()) for part in tm.PARTS}, Counter(
            labels.values())
        assert all(abs(counts[part][label] / sizes[label] - share) < most
                   for part, share in SHARES.items() for label in range(27))
        assert all(counts[part][label] for part in tm.PARTS for label in range(27))
        for part, share in SHARES.items():
            assert abs(len(split[part]) / len(labels) - share) < 0.002


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
    assert re.search(rf"disk: 1 \({paths[1]}\)", out)
    assert re.search(r"not used.*: 1 \(Cubism/unlisted_x.jpg\)", out)
    assert "48 made, 0 were there" in out
    assert re.search(rf"cannot be used.*: 1 \({paths[0]}: ", out)
    assert "split: 34 train, 5 validation, 9 test paintings in 5 classes" in out
    lines = (tmp_path / "out/bad_files.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{paths[0]}\t")
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {
        "bad_files.txt", "crops.jpg"}


def test_tables_are_utf8_csv(tmp_path):
    rows = [{"path": "A/x,\"y\"\n.jpg", "n": 1, "more": 2}, {"path": "A/\udce9é.jpg", "n": 0.25}]
    tm.write_atomically(tmp_path / "t.csv", tm.csv_table(("path", "n"), rows))
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{"path": "A/x,\"y\"\n.jpg", "n": "1"}, {"path": "A/\\udce9é.jpg", "n": "0.25"}]
