"""Train a classifier of paintings, a ResNet-50 read by an LSTM, on ArtGAN's WikiArt data set.

    python train_model.py           learn the styles; the same command goes on after a stop
    python train_model.py --help    every setting of this file as a flag

Reads   DATA_DIR/<Style>/<artist>_<title>.jpg, and ArtGAN's lists in LISTS_DIR where they are there.
Writes  small copies into SMALL_DIR; into OUTPUT_DIR bad_files.txt (pictures that cannot be used,
        with reasons), crops.jpg (what the model sees) and, after each epoch, history.csv,
        class_names.txt, model_best.pth (highest validation accuracy so far, for test_model.py)
        and model_last.pth (to go on from).

The file follows the data: paintings, labels, split, model, training, checkpoints; `learn`, at the
end, calls `set_up`, `prepare` and `train`.
"""

import argparse
import contextlib
import csv
import ctypes
import difflib
import errno
import functools
import hashlib
import io
import math
import multiprocessing
import os
import platform
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- settings
# Edit them here, or give any of them as a flag for one run: EPOCHS as --epochs, and so on.

EPOCHS = 20  # passes over the training paintings; 0 checks and prepares the data only
ATTRIBUTE = "style"  # what to learn: style, artist, genre, or another that LISTS_DIR has lists of
DATA_DIR = "wikiart"  # the unzipped originals, one folder per style; never written to
LISTS_DIR = "wikiart_csv"  # ArtGAN's lists, used when they are there; "none" goes without
SMALL_DIR = "wikiart_small"  # the small copies, and nothing else
OUTPUT_DIR = "."  # checkpoints, and all else that training and testing write
GROUP_BY = "painting"  # "artist" keeps all paintings of an artist in one part of the split
MIN_PAINTINGS = 30  # fewest paintings of an artist that make a class, where there are no lists
WEIGHTS = "imagenet"  # where the ResNet starts: "imagenet" (a 98 MB download), "none", or a file
BATCH_SIZE = 64  # paintings per step, of all processes; README.md: what fits into which GPU
IMAGE_SIZE = 224  # height and width of what the model sees, in pixels, 64 to 512
LEARNING_RATE = 1e-3  # peak rate of the LSTM and the linear layer
BACKBONE_RATE = 0.1  # the ResNet's rate as a share of that, where it starts pretrained
FROZEN_EPOCHS = 1  # epochs at the start that leave a pretrained ResNet as it is
BATCH_NORMS = "fixed"  # keep a pretrained ResNet's statistics; "trained" takes those of batches
WARMUP_EPOCHS = 0.5  # linear warm-up at the start, and again where the ResNet thaws, in epochs
WEIGHT_DECAY = 0.05  # of AdamW, on matrices and convolutions
DROPOUT = 0.3  # share of the LSTM's averaged outputs that training zeroes
WORKERS = -1  # processes that load pictures; 0 loads in the main process, -1 chooses
SEED = 0  # of the split, the order, the crops and the first weights

SETTINGS = {name: value for name, value in list(globals().items()) if name.isupper()}

# ------------------------------------------------------------------------------------------- facts

PARTS = ("train", "validation", "test")
SHARED = ("DATA_DIR", "SMALL_DIR", "OUTPUT_DIR", "BATCH_SIZE", "WORKERS")  # with test_model.py
ARTGAN = "https://github.com/cs-chan/ArtGAN, folder 'WikiArt Dataset'"
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start Ghostscript
MAX_PIXELS = 40_000_000  # of a picture, at up to 16 bytes a pixel; baseline JPEGs may be larger
MARGIN = 1 / 16  # share of a picture that evaluation leaves out at each edge
CHANNELS, LSTM_UNITS = 2048, 256  # of ResNet-50's last feature map; of each direction
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in 0..1

FORMAT = 3  # of the checkpoints
RANK, WORLD_SIZE = (  # the number of this process, from 0, and how many torchrun has started
    int(os.environ.get(name, alone)) if "LOCAL_RANK" in os.environ else alone
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))

# --------------------------------------------------------------------------------------- paintings


def printable(text):
    """Return a path or a message as one line that any terminal shows."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def report(items, what):
    """Print what the items are, how many, and the first three; nothing where there are none."""
    if items:
        dots = ", ..." if len(items) > 3 else ""
        print(f"{what}: {len(items):,} ({', '.join(map(printable, items[:3]))}{dots})")


def is_picture(name):
    """Return whether a file's name has the ending of a picture."""
    return name.lower().endswith(ENDINGS)


def reason_of(error, path):
    """Return why a picture or folder cannot be used; raise OSError where the system is to blame.

    Its errors have a number, Pillow's have none; a few numbers are of the one file alone.
    """
    of_one = (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM,
              errno.ENAMETOOLONG)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) not in of_one:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise OSError(f"cannot read {path}: {reason}") from error
    return printable(error) or type(error).__name__


def find_paintings(data_dir):
    """Return the originals, "Style/name.jpg" each, sorted; report what is passed over."""
    found, passed_over = [], []
    walk = os.walk(data_dir, followlinks=True,
                   onerror=lambda error: passed_over.append(reason_of(error, error.filename)))
    for folder, inner, names in walk:
        place = Path(folder).relative_to(data_dir).parts  # (), (style,), or (style, inner folder)
        inner[:] = [name for name in inner if name[0] != "." and len(place) < 2]
        paths = ["/".join((*place, name)) for name in names if name[0] != "."]
        pictures = list(filter(is_picture, paths)) if len(place) == 1 else []
        found += pictures
        passed_over += set(paths) - set(pictures)
        if len(place) == 1 and not pictures:
            passed_over.append(f"{place[0]}/")
    report(sorted(passed_over), "passed over, being no picture right in a style's folder")
    if not found:
        deeper = [f", but {path} is there" for path in passed_over if is_picture(path)][:1]
        raise ValueError(f"there is no picture in a folder of {data_dir}{''.join(deeper)}: unzip "
                         f"ArtGAN's WikiArt ({ARTGAN}) so that its folders are there, or tell "
                         "where they are by --data-dir; python tests/demo.py goes without")
    print(f"{len(found):,} paintings in {printable(data_dir)}")
    return sorted(found)


def shrink(size, short_side):
    """Return the size of a picture, (width, height), with its short side at most `short_side`."""
    scale = max(1, min(size) / short_side)
    return tuple(round(side / scale) for side in size)


def to_rgb(image, size):
    """Return an image in RGB and the given size: transparency on white, 16-bit grey as 8-bit."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of no known range")
    if image.mode.startswith("I;16"):  # grey, which convert() would clip
        wide, tags = np.asarray(image), getattr(image, "tag_v2", {})
        grey = (wide >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)  # BitsPerSample
        grey = 255 - grey if tags.get(262) == 0 else grey  # PhotometricInterpretation: WhiteIsZero
        grey[wide == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    return image


def without_extras(content):
    """Return a PNG without texts and profiles, for whose size or faults Pillow would refuse it."""
    pieces, start, kind = [content[:8]], 8, b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        piece, kind, start = content[start:end], content[start + 4 : start + 8], end
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf", b""):
            pieces.append(piece)
            if not piece or zlib.crc32(piece[4:-4]) != int.from_bytes(piece[-4:], "big"):
                raise ValueError("is damaged or cut off")
    return b"".join(pieces)


def describe(content):
    """Return what a file is that Pillow does not know."""
    for pattern, words in (
        (b"....ftypavi", "is an AVIF picture, which is not read here: save it as JPEG"),
        (b"....ftyp(he|mif|msf)", "is a HEIC picture, which is not read here: save it as JPEG"),
        (rb"\s*https?://", "is an address, and not the picture there"),
        (rb"\s*$", "is empty"),
        (rb"[\t-\r -~]{9}", "is text"),
        (b"", "is no picture of a known format, or damaged"),
    ):
        if re.match(pattern, content, re.DOTALL):
            return words


def is_drafted(content):
    """Return whether a JPEG is shrunk while it is read: by one scan, of all components."""
    jpeg = JpegImageFile(io.BytesIO(content))  # which has read the first scan's header now
    components = content[jpeg.fp.tell() - 4 - 2 * jpeg.layers]
    return "progressive" not in jpeg.info and components == jpeg.layers


def decode(path, short_side):
    """Return a picture, upright, as RGB whose short side is at most `short_side` pixels."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is for JPEGs too, which draft() shrinks
    with open(path, "rb") as file:
        content = file.read()
    content = without_extras(content) if content.startswith(b"\x89PNG") else content
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(describe(content)) from error
    width, height = image.size
    if width * height > MAX_PIXELS and not (content[:2] == b"\xff\xd8" and is_drafted(content)):
        raise ValueError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    image.draft(image.mode, shrink(image.size, short_side))
    image.load()
    with contextlib.suppress(Exception):  # odd metadata spoil no picture: it is turned before
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image, shrink(image.size, short_side))


def copies_folder(small_dir, image_size):
    """Return where the small copies for an image size are: 224 pixels need a short side of 320."""
    return small_dir / str(math.ceil(image_size * 10 / 7))


def encode_small(path, short_side, stamp=b""):
    """Return the small copy of a picture as JPEG, with a stamp in place of its own comments."""
    jpeg = io.BytesIO()
    decode(path, short_side).save(jpeg, "JPEG", quality=90, comment=stamp)
    return jpeg.getvalue()


def small_name(path):
    """Return a painting's own name in SMALL_DIR: x.jpg stays, x.png is x.png.jpg, and so on."""
    unambiguous = path.endswith(".jpg") and not path[:-4].lower().endswith(ENDINGS)
    return path if unambiguous else path + ".jpg"


def write_whole(path, content):
    """Write bytes into a file, whole or not at all: first beside its place, then into it."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder, taken, wait=False):
    """Hold the lock of a folder, if its disk has any, and clear away what a kill left there.

    Where another process has it, raise ValueError with `taken`, what it does there, or wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        with contextlib.suppress(OSError, ImportError):  # of such a disk; of Windows
            import fcntl
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    raise ValueError(taken) from error
                print(taken)
                fcntl.lockf(file, fcntl.LOCK_EX)
            for left in folder.glob(("*/" if wait else "") + f".{'[0-9a-f]' * 16}.tmp"):
                left.unlink()
        yield


def cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def duration(seconds):
    """Return a time in words: 45 s, 12 min, or 1 h 05 min."""
    minutes = round(seconds / 60)
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress(tqdm):
    """A bar that counts paintings on a terminal; elsewhere, as in a log, a line a minute."""

    def __init__(self, title, total):
        self.on_terminal = sys.stderr.isatty()
        wait = 0.1 if self.on_terminal else 60  # seconds
        line = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_noinv_fmt}{postfix}]"
        super().__init__(desc=title, total=total, unit=" paintings", leave=False, miniters=1,
                         mininterval=wait, delay=max(wait, 1), disable=RANK > 0, bar_format=line)

    def display(self, msg=None, pos=None):
        """Show the bar, or print its line; an empty message clears it."""
        if self.on_terminal:
            return super().display(msg, pos)
        if msg is None:
            rate = self.n / self.format_dict["elapsed"]
            said = [f"{self.desc}: {self.n:,} of {self.total:,} paintings", self.postfix,
                    f"{rate:,.1f} paintings/s", f"{duration((self.total - self.n) / rate)} left"]
            print(", ".join(filter(None, said)), file=sys.stderr)
        return False

    def say(self, line):
        """Print a line in the bar's place."""
        if self.on_terminal:
            self.clear()
        print(line)


def check_space(copies, left):
    """Return how much space the copies that are left will take, after these; refuse too much."""
    size = left * (sum(map(os.path.getsize, copies)) / len(copies) + 2048)  # in blocks of 4096
    free = shutil.disk_usage(copies[0].parent).free
    words = f"the small copies still take {size / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free"
    if size > free:
        raise OSError(f"{words}: choose a SMALL_DIR on another disk, or a smaller IMAGE_SIZE")
    return words


def prepare_copies(found, data_dir, folder):
    """Bring the small copies of the found paintings up to date; return {path: reason} of the bad.

    folder: that of `copies_folder`. A copy is stamped with the size and time of its original: a
    changed one is copied anew. Threads suffice, for Pillow frees the interpreter while it works.
    """
    written, bad = [], {}

    def update(path):
        """Write the small copy of a painting, if it is not there yet."""
        copy = folder / small_name(path)
        try:
            status = os.stat(data_dir / path)
            stamp = b"original: %d bytes, %d ns" % (status.st_size, status.st_mtime_ns)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no regular file")
            with contextlib.suppress(FileNotFoundError), open(copy, "rb") as file:
                if stamp in file.read(100):
                    return
            jpeg = encode_small(data_dir / path, int(folder.name), stamp)
        except Exception as error:  # of nearly any kind, from Pillow
            bad[path] = reason_of(error, data_dir / path)
            return
        copy.parent.mkdir(exist_ok=True)
        write_whole(copy, jpeg)
        written.append(copy)

    taken = f"waiting for another process, which prepares {printable(folder)}"
    with locked(folder, taken, wait=True), ThreadPool(cores()) as pool:
        names = {small_name(path).casefold() for path in found}
        if len(names) < len(found) and (folder / ".LOCK").exists():
            raise ValueError(f"{folder} does not tell names apart that differ only in case, and "
                             f"{data_dir} has such: choose a SMALL_DIR on another disk")
        missing = len(found) - sum(1 for _ in folder.glob("*/*.jpg"))
        sample = found[:: len(found) // 100 + 1]  # of all of them, comes first
        work = pool.imap(update, dict.fromkeys(sample + found))
        try:
            with Progress("small copies", len(found)) as bar:
                for done, _ in enumerate(work, 1):
                    bar.update()
                    if done == len(sample) < len(found) and written:
                        bar.say(check_space(written, max(0, missing - len(written))))
        finally:  # after an error or Ctrl-C too, wait for the copies that are being written
            pool.terminate()
            pool.join()
    there = len(found) - len(written) - len(bad)
    print(f"small copies: {len(written):,} written, {there:,} were there already")
    report([f"{path} ({bad[path]})" for path in sorted(bad)], "pictures that cannot be used")
    return bad


# ------------------------------------------------------------------------------------------ labels


def file_name(path):
    """Return a painting's file name, the same in every folder and every form of Unicode."""
    return unicodedata.normalize("NFC", path.rpartition("/")[2])


def style(path):
    """Return a painting's folder."""
    return path.partition("/")[0]


def artist(path):
    """Return the artist that a painting's file name tells: what stands before its first _."""
    return file_name(path).partition("_")[0]


def near(word):
    """Return the question whether one of the words for settings was meant, or nothing."""
    known = ("style", "artist", "genre", "imagenet", "none")
    return "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(word, known, 1)
                   if match != word)


def read_rows(path, pattern, example):
    """Return the groups of each line of a file that matches; report the other lines."""
    rows, others = [], []
    for line in path.read_text("utf-8-sig", "replace").split("\n"):
        if match := re.fullmatch(pattern, line.strip()):
            rows.append(match.groups())
        elif line.strip():
            others.append(line[:99])
    if not rows:
        raise ValueError(f"{path} has no row such as {example}; its first line is "
                         f"{others[0] if others else 'missing'!r}")
    report(others, f"{printable(path)}: lines that are no rows, passed over")
    return rows


def read_lists(lists_dir, attribute):
    """Read ArtGAN's lists of an attribute, from lists_dir or its folder Style, Artist, Genre.

    Both forms are known, that of the zip and that of the repository, without endings. Returns the
    class names, {path: label}, and the set of paths to test on, which ArtGAN calls val. A path
    listed twice counts once, by its first row; the test list comes first and stays whole.
    """
    wanted = [f"{attribute}_{kind}" for kind in ("class", "val", "train")]
    inside = [*lists_dir.glob("*"), *(lists_dir / attribute.capitalize()).glob("*")]
    files = [path for name in wanted for path in inside if path.stem == name]
    if [path.stem for path in files] != wanted:
        there = sorted(str(path.relative_to(lists_dir)) for path in lists_dir.rglob("*"))
        raise ValueError(f"{lists_dir} must hold {', '.join(wanted)} (.txt, .csv) once each, and "
                         f"has {', '.join(there[:9]) or 'nothing'}: see {ARTGAN}, or go without by "
                         f"--lists-dir none{near(attribute)}")
    class_file, test_file, train_file = files
    rows = read_rows(class_file, r"([0-9]+)\s+(.+)", "7 Cubism")
    names = {int(label): name for label, name in rows}
    if sorted(names) != list(range(len(rows))) or len(set(names.values())) < len(rows):
        raise ValueError(f"{class_file} must number different classes from 0, one per line")
    row = r"(.+?),+\s*([0-9]+)", "Cubism/juan-gris_violin-1916.jpg,7"
    test_rows = read_rows(test_file, *row)
    labels, repeated, folders = {}, [], defaultdict(set)
    for path, label in test_rows + read_rows(train_file, *row):
        if int(label) not in names:
            raise ValueError(f"{path} has the label {label} in the lists of {lists_dir}, and "
                             f"{class_file} does not name it")
        if path in labels:
            repeated.append(path)
        labels.setdefault(path, int(label))
        folders[int(label)].add(style(path))
    report(repeated, "rows that repeat a painting, passed over")
    if attribute == "style":  # a style is named as its folder: Art_Nouveau_Modern, not Art_Nouveau
        renamed = names | {label: min(own) for label, own in folders.items() if len(own) == 1}
        if len(set(renamed.values())) == len(names):  # still different names
            names = renamed
    return [names[label] for label in range(len(names))], labels, {path for path, _ in test_rows}


def read_names(found, attribute, min_paintings):
    """Label as `read_lists` does, without lists: style by folder, artist by file name."""
    if attribute not in ("style", "artist"):
        raise ValueError(f"ATTRIBUTE {attribute!r} needs {attribute}_train.csv, {attribute}_val.csv"
                         f" and {attribute}_class.txt in LISTS_DIR; ArtGAN's are at {ARTGAN}"
                         f"{near(attribute)}")
    name_of, least = (style, 1) if attribute == "style" else (artist, min_paintings)
    sizes = Counter(map(name_of, found))
    class_names = sorted(name for name, size in sizes.items() if name and size >= least)
    report(sorted(sizes.keys() - set(class_names)), f"{attribute}s with fewer paintings than "
           f"MIN_PAINTINGS, {min_paintings}, which make no class")
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = {path: label_of[name_of(path)] for path in found if name_of(path) in label_of}
    return class_names, labels, None


def locate(split, found):
    """Return a split with its paths as they are spelt on disk, where they are there.

    Some of ArtGAN's names are garbled, and a disk may hold such a name as listed, repaired, or with
    _ for each odd character. Where one path that is not there and one file of no list share the
    folder and the ASCII letters and digits, most of the name, they are taken for the same.
    """
    listed = {path for labels in split.values() for path in labels}
    alike, places = defaultdict(set), {}
    for path in listed.symmetric_difference(found):
        alike[style(path), re.sub("[^A-Za-z0-9]", "", file_name(path))].add(path)
    for (_, letters), paths in alike.items():
        lost, files = paths & listed, paths - listed
        if len(lost) == len(files) == 1 and 2 * len(letters) > len(file_name(*lost)):
            places[lost.pop()] = files.pop()
    return {part: {places.get(path, path): label for path, label in labels.items()}
            for part, labels in split.items()}


# ------------------------------------------------------------------------------------------- split


def draw_split(labels, group_of, shares, seed):
    """Divide {path: label} by class into parts, each group of paintings whole in one of them.

    shares: {part: share}; a class of 1 goes to the first part, of 2 to the first two, and so on.
    Returns {part: {path: label}}, the same for the same seed on every machine: neither the order of
    the labels nor Python's hash() matters.
    """
    groups, sizes = defaultdict(list), Counter(labels.values())
    for path in sorted(labels):
        groups[group_of(path)].append(path)
    split, filled = {part: {} for part in shares}, {part: Counter() for part in shares}

    def turn(group):
        """Return what groups are sorted by: the larger first, chance among equals."""
        draw = hashlib.blake2b(f"{seed} {group}".encode("utf-8", "surrogateescape")).digest()
        return -len(groups[group]), draw

    def fullness(part, counts):
        """Return how full a part would be with half of a group, {label: paintings}, in it."""
        full = 0
        for label, count in counts.items():  # a class weighs by the share that the group holds
            half = (count - (filled[part][label] == 0)) / 2  # one painting finds any part empty
            full += count / sizes[label] ** 2 * (filled[part][label] + half)
        return full / shares[part]

    for group in sorted(groups, key=turn):
        counts = Counter(labels[path] for path in groups[group])
        part = min(shares, key=functools.partial(fullness, counts=counts))
        split[part] |= {path: labels[path] for path in groups[group]}
        filled[part].update(counts)
    return split


def split_paintings(labels, test_list, group_by, seed):
    """Return {part: {path: label}} for the parts train, validation and test, and where it is from.

    With `test_list`, the paths that ArtGAN's lists keep for the test, validation is a tenth of the
    rest. Without, or where all of an artist stay in one part, the parts are 70, 15 and 15 %. Files
    of one name in two folders stay together in what is drawn.
    """
    group_of, shares, source = file_name, {"train": 0.9, "validation": 0.1}, "that of the lists"
    if test_list is None or group_by == "artist":  # in ArtGAN's lists, most artists are in both
        shares, source = {"train": 0.7, "test": 0.15, "validation": 0.15}, f"drawn by {group_by}"
        group_of, test_list = (artist if group_by == "artist" else file_name), ()
    others = {path: label for path, label in labels.items() if path not in test_list}
    split = {"test": {path: labels[path] for path in test_list}}
    split |= draw_split(others, group_of, shares, seed)
    return {part: dict(sorted(split[part].items())) for part in PARTS}, source


def keep_usable(split, usable):
    """Return a split of the usable paintings alone."""
    split = {part: {path: label for path, label in split[part].items() if path in usable}
             for part in PARTS}
    classes, sizes = len(set(split["train"].values())), [len(split[part]) for part in PARTS]
    if classes < 2 or not all(sizes):
        raise ValueError("a classifier needs two classes, and paintings to train, validate and test"
                         f", and has {classes} and {sizes}: are DATA_DIR and MIN_PAINTINGS right?")
    return split


# ------------------------------------------------------------------------------------------- model


class FeatureExtractor(nn.Module):
    """ResNet-50 (He et al. 2016, arXiv 1512.03385) without its pooling and its classifier."""

    def __init__(self):
        super().__init__()
        *layers, _, _ = resnet50().named_children()  # without avgpool and fc
        self.resnet = nn.Sequential(OrderedDict(layers))
        self.mean = nn.Buffer(255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """Turn images (B, 3, H, W) of 0..255 into a feature map (B, 2048, H/32, W/32)."""
        return self.resnet((images - self.mean) / self.std)


class ArtClassifier(nn.Module):
    """ResNet-50 whose feature map an LSTM (Hochreiter & Schmidhuber 1997) reads row by row."""

    def __init__(self, classes, dropout=0.0):
        super().__init__()
        self.features = FeatureExtractor()
        self.lstm = nn.LSTM(CHANNELS, LSTM_UNITS, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * LSTM_UNITS, classes)
        self.precision = None  # the ResNet's type for mixed precision, bfloat16 or float16

    def forward(self, images):
        """Turn images (B, 3, H, W) of 0..255 into logits (B, classes)."""
        with torch.autocast(images.device.type, self.precision, self.precision is not None):
            feature_map = self.features(images)  # (B, 2048, H/32, W/32)
        return self.read_rows(feature_map.float())  # (B, classes); margins need float32

    def read_rows(self, feature_map):
        """Turn a feature map (B, 2048, rows, columns) into logits (B, classes)."""
        rows = feature_map.mean(3).transpose(1, 2)  # (B, rows, 2048), the top row first
        outputs, _ = self.lstm(rows)  # (B, rows, 512), rows read downwards and upwards
        return self.linear(self.dropout(outputs.mean(1)))  # (B, classes)

    def start_training(self, frozen, fixed_norms=False):
        """Set training mode; a frozen ResNet keeps its weights, fixed norms their statistics."""
        self.train()
        self.features.train(not (frozen or fixed_norms))
        self.features.requires_grad_(not frozen)


def load_tensors(path):
    """Load a file of torch.save; refuse one that is damaged or holds more than plain values."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}{near(path.name)}")
    content = io.BytesIO(path.read_bytes())  # an error of the disk is none of the file
    try:
        damaged = zipfile.ZipFile(content).testzip()  # torch does not look at the checksums
        content.seek(0)
        if not damaged:
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's words advise an unsafe load
        raise ValueError(f"{path} is refused: it is cut off, no PyTorch file, or holds more than "
                         "tensors and values, which could run code") from error
    raise ValueError(f"{path} is refused: it is damaged (the checksum of {damaged} is wrong)")


def load_weights(module, tensors, path):
    """Load the tensors of a file into a module, where all of them fit; a last layer `fc` aside."""
    try:
        module.load_state_dict({name: tensors[name] for name in tensors if name[:3] != "fc."})
    except Exception as error:  # RuntimeError, and of other kinds where they are no tensors
        words = " ".join(str(error).split())
        raise ValueError(f"{path} is refused: its weights do not fit: {words[:300]}") from error


def load_resnet(resnet, weights):
    """Start a ResNet from `weights`: "imagenet" (torchvision's IMAGENET1K_V2) or a file."""
    path = Path(os.path.abspath(os.path.expanduser(weights)))
    if weights == "imagenet":
        imagenet = ResNet50_Weights.IMAGENET1K_V2
        try:
            tensors = imagenet.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # of many kinds, from the network and from torch
            raise OSError(f"cannot load {imagenet.url} ({error}): put that file, whole, into "
                          f"{torch.hub.get_dir()}/checkpoints, or go without by --weights none"
                          ) from error
    else:
        tensors = load_tensors(path)
    load_weights(resnet, tensors, path)


# --------------------------------------------------------------------------------------- processes
# One, or as many as torchrun starts. The first finds, prepares and writes, and tells the others.


def join_processes():
    """Join the processes that torchrun started, if it did, and take a GPU of one's own."""
    if "LOCAL_RANK" in os.environ:
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if cuda else "gloo")
        if RANK > 0:
            sys.stdout = io.StringIO()  # the first process speaks for all


@functools.cache
def patient_group():
    """Return all processes as a group in which they wait, for preparing may take hours."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def from_first(function, *given):
    """Return what a function of the first process returns, to all processes."""
    values = [function(*given) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(values, group=patient_group())
    return values[0]


# ---------------------------------------------------------------------------------------- training


def square(image, image_size, place=0.5):
    """Return a square of 7/8 of the short side, at a place in 0..1 along the long side, resized."""
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR, MARGIN,
                        (place, place))


class Paintings(Dataset):
    """Small copies as pixels: `paintings[index, epoch]` is (pixels (S, S, 3) uint8, label).

    labels: {path on disk: label}. With a seed it is a random crop of 0.35 to 1 of the area, flipped
    or not, which follows from (seed, epoch, painting) alone; without, the `square` at `view`, by
    default the centre.
    """

    def __init__(self, folder, labels, image_size, seed=None, view=0.5):
        self.folder, self.image_size, self.seed, self.view = str(folder), image_size, seed, view
        # in one array each: lists of 81,446 objects would grow in every worker
        self.paths = np.array([small_name(path) for path in labels])
        self.labels = np.array(list(labels.values()), dtype=np.int64)
        crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1))
        self.vary = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, epoch = key
        path = str(self.paths[index])
        file = os.path.join(self.folder, path)
        try:
            with Image.open(file) as image:
                image.load()
        except OSError as error:
            raise OSError(f"cannot read the small copy {printable(file)} ({error}): delete it if "
                          "it is there, and it is made again") from error
        if self.seed is None:
            image = square(image, self.image_size, self.view)
        pixels = torch.from_numpy(np.array(image))
        if self.seed is not None:  # as tensors, which takes less time than by Pillow
            words = f"{self.seed} {epoch} {path}".encode("utf-8", "surrogateescape")
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(zlib.crc32(words))
                pixels = self.vary(pixels.permute(2, 0, 1)).permute(1, 2, 0).contiguous()
        return pixels, self.labels[index]


def write_crops(path, paintings, class_names):
    """Draw 32 paintings as the model sees them in its first epoch, each over its class name."""
    size = paintings.image_size
    wide = max(size, 144)  # has room for a name under a small crop
    order = np.random.default_rng((paintings.seed, 1)).permutation(len(paintings))[:32]
    sheet = Image.new("RGB", (8 * wide, math.ceil(len(order) / 8) * (size + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(order):
        left, top = place % 8 * wide, place // 8 * (size + 20)
        pixels, label = paintings[index, 1]
        sheet.paste(Image.fromarray(pixels.numpy()), (left, top))
        name = printable(class_names[label])
        while draw.textlength(name) > wide - 4:
            name = name[:-1]
        draw.text((left + 2, top + size + 2), name, "black")
    sheet.save(jpeg := io.BytesIO(), "JPEG", quality=90)
    write_whole(path, jpeg.getvalue())


class Batches:
    """Batches of nearly equal size, as lists of the keys (index, epoch) of `Paintings`.

    With a seed, the order follows from (seed, epoch); without, it is that of the paintings. Each
    process has its share of every batch; `sizes` are those of the whole batches.
    """

    def __init__(self, count, batch_size, seed=None):
        self.order, self.seed, self.epoch = np.arange(count), seed, 0
        steps = math.ceil(count / batch_size)
        self.sizes = [len(batch) for batch in np.array_split(self.order, steps)]
        if self.sizes[-1] < WORLD_SIZE:
            raise ValueError(f"{WORLD_SIZE} processes cannot share batches of {self.sizes[-1]} "
                             "paintings: raise BATCH_SIZE, or start fewer")

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        order = self.order
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for batch in np.array_split(order, len(self)):
            yield [(index, self.epoch) for index in batch[RANK::WORLD_SIZE].tolist()]


def begin_worker(_):
    """Leave Ctrl-C, which a terminal sends to workers too, to the main process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # a batch that nobody takes any more is no news
    parent = multiprocessing.parent_process()  # torch watches the forkserver in its place
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_loader(paintings, batch_size, workers, device):
    """Return a loader of (pixels (B, S, S, 3) uint8, labels (B)), in random order with a seed."""
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine's processes
    most = 16 if multiprocessing.get_start_method() == "fork" else 3  # others take much memory
    return DataLoader(
        paintings,
        batch_sampler=Batches(len(paintings), batch_size, paintings.seed),
        num_workers=workers if workers >= 0 else min(max(share, 1), most),
        pin_memory=device.type == "cuda",
        persistent_workers=workers != 0,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # not the common one, which dropout draws from
    )


def move_to_fastest(model):
    """Move a model to CUDA, MPS or the CPU, the first there is, and to the precision that pays."""
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # gloo knows no MPS
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        model.precision = torch.bfloat16 if bf16 else torch.float16
    elif device.type == "cpu":
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            # Keep freed memory for the next step: 2.9 to 4.1 paintings/s in training, two cores.
            mallopt, m_mmap_max, m_trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
        if shutil.which("nvidia-smi"):
            print(f"an NVIDIA GPU seems to be here, but torch {torch.__version__} or the driver "
                  "cannot use it, and the CPU is slow: see README.md, GPUs and Windows")
        instructions = torch.cpu.get_capabilities()
        if any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            model.precision = torch.bfloat16
    model.to(device, memory_format=torch.channels_last)
    return device


def to_images(pixels, device):
    """Move pixels (B, S, S, 3) uint8 to the device as images (B, 3, S, S), still uint8."""
    return pixels.to(device, non_blocking=pixels.is_pinned()).permute(0, 3, 1, 2)


def make_optimizer(model, learning_rate, backbone_rate, weight_decay):
    """Return AdamW with a rate of its own for the ResNet, and no decay of norms and biases."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[name.startswith("features."), parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW([
        {"params": parameters,
         "peak": learning_rate * (backbone_rate if backbone else 1),  # which `rate_at` scales
         "weight_decay": weight_decay if matrix else 0.0}
        for (backbone, matrix), parameters in groups.items()])


def rate_at(progress, epochs, frozen_epochs, warmup_epochs):
    """Return the learning rate as a share of its peak, `progress` epochs into the training.

    A linear warm-up, another where the ResNet thaws, and over both a cosine that ends at 0
    (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    since = progress - (frozen_epochs if progress >= frozen_epochs else 0)
    warm = min(1, since / warmup_epochs) if warmup_epochs else 1
    return warm * (1 + math.cos(math.pi * progress / epochs)) / 2


def compare(logits, labels):
    """Return what logits (N, C) say of the given labels (N), as (N, 3).

    The margin (the best other logit over that of the given class; positive where the model
    disagrees), the probability of the given class, and the label of the best other.
    """
    labels = labels[:, None]
    given, others = logits.gather(1, labels), logits.scatter(1, labels, -torch.inf).max(1)
    probability = logits.softmax(1).gather(1, labels)
    return torch.stack([others.values - given[:, 0], probability[:, 0], others.indices], 1)


def gather(outputs, loader):
    """Return the outputs for a loader's batches in the paintings' order, from all processes."""
    indices = [index for batch in loader.batch_sampler for index, _ in batch]
    shares = [(indices, torch.cat(outputs).cpu())] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(shares, shares[0], patient_group())
    indices, outputs = zip(*shares)
    return torch.cat(outputs)[np.argsort(np.concatenate(indices))]


def train_epoch(model, loader, optimizer, scaler, rates, title):
    """Train on each batch once, at its share of the peak rates.

    Returns a painting's mean loss, and `compare` of all paintings before their steps.
    """
    device, count = next(model.parameters()).device, WORLD_SIZE
    total, done = torch.zeros((), device=device), 0  # of the losses, of all paintings
    compared = []
    with Progress(title, len(loader.dataset)) as bar:
        steps = zip(loader, loader.batch_sampler.sizes, rates)
        for step, ((pixels, labels), size, rate) in enumerate(steps, 1):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            logits = model(to_images(pixels, device))
            labels = labels.to(device, non_blocking=labels.is_pinned())
            # The mean of the processes' gradients is then that of the whole batch.
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") * count / size
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            compared.append(compare(logits.detach(), labels))
            total += loss.detach() * size / count
            done += size
            if step % 20 == 0 or step == len(rates):  # each time it waits for the device
                mean = total.item() * count / done
                if not math.isfinite(mean) or scaler.get_scale() < 1:  # fp16 skips every step
                    raise ValueError(
                        f"{title}, batch {step}, at {rate:.3f} of the peak learning rate: the loss "
                        "or its gradient is not finite; nothing of this epoch is kept; try a "
                        "smaller LEARNING_RATE")
                bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            bar.update(size)
    if count > 1:  # the batch norms of the first process are those that are saved
        distributed.all_reduce(total)
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    return total.item() / done, gather(compared, loader)


@torch.inference_mode()
def evaluate(model, loader, title):
    """Return the logits (N, classes) of all paintings of a loader, on the CPU, in their order."""
    device, logits = next(model.parameters()).device, []
    model.eval()
    with Progress(title, len(loader.dataset)) as bar:
        for (pixels, _), size in zip(loader, loader.batch_sampler.sizes):
            logits.append(model(to_images(pixels, device)))
            bar.update(size)
    logits = gather(logits, loader)
    if not logits.isfinite().all():
        raise ValueError(f"{title}: the model's outputs are not finite")
    return logits


def note_margins(run, split, part, compared, fresh):
    """Add an epoch's `compare` of a part to the run's sums, a row a listed painting.

    Columns: margins, probabilities, the latest best other label, and the epochs that were counted;
    `fresh` begins with this one.
    """
    usable = torch.tensor([path in split[part] for path in run["split"][part]])
    if fresh:
        run["margins"][part] = torch.zeros(len(usable), 4)
    sums = run["margins"][part]
    sums[usable, 2] = 0
    sums[usable] += nn.functional.pad(compared, (0, 1), value=1)


def best_epoch(history):
    """Return the epoch, from 1, of the highest validation accuracy, the first of equals."""
    return max(history, key=lambda row: row["validation_accuracy"])["epoch"]


def train(run, model, split, settings):
    """Train from where the run stands to the last epoch, saving each before the next begins."""
    epochs, history = settings.epochs, run["history"]
    pretrained = settings.weights != "none"
    frozen_epochs = settings.frozen_epochs if pretrained else 0
    backbone_rate = settings.backbone_rate if pretrained else 1
    fixed_norms = pretrained and settings.batch_norms == "fixed"
    first = frozen_epochs + 1 if frozen_epochs < epochs else 1  # epoch whose margins count

    device = move_to_fastest(model)
    run["device"] = f"{device}, {model.precision or torch.float32}"
    optimizer = make_optimizer(model, settings.learning_rate, backbone_rate, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision is torch.float16)
    if history:
        print(f"going on after epoch {len(history)}")
        optimizer.load_state_dict(run.pop("optimizer"))
        if state := run.pop("scaler"):  # empty where the earlier device went without
            scaler.load_state_dict(state)
    folder = copies_folder(settings.small_dir, settings.image_size)
    loader, validation_loader = (
        make_loader(Paintings(folder, split[part], settings.image_size, seed),
                    settings.batch_size, settings.workers, device)
        for part, seed in (("train", settings.seed), ("validation", None)))
    iter(validation_loader)  # starts its workers while there is little memory to share with them
    labels = torch.tensor(list(split["validation"].values()))
    print(f"device {run['device']}, loader processes {loader.num_workers}")
    print("   epoch  training loss  validation loss  accuracy  paintings/s  left (*: best)")
    for epoch in range(len(history) + 1, epochs + 1):
        title, begun = f"epoch {epoch}/{epochs}", time.perf_counter()
        torch.manual_seed(zlib.crc32(f"{settings.seed} {epoch} {RANK}".encode()))  # of dropout
        loader.batch_sampler.epoch = epoch
        rates = [rate_at(epoch - 1 + (step + 0.5) / len(loader), epochs, frozen_epochs,
                         settings.warmup_epochs) for step in range(len(loader))]
        model.start_training(frozen=epoch <= frozen_epochs, fixed_norms=fixed_norms)
        joint = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
        loss, compared = train_epoch(joint, loader, optimizer, scaler, rates, title)
        speed = len(split["train"]) / (time.perf_counter() - begun)
        logits = evaluate(model, validation_loader, f"{title} validation")
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        validation_loss = nn.functional.cross_entropy(logits, labels).item()
        history.append({"epoch": epoch, "training_loss": loss, "validation_loss": validation_loss,
                        "validation_accuracy": accuracy, "paintings_per_second": speed,
                        "learning_rate": settings.learning_rate * rates[-1],
                        "seconds": time.perf_counter() - begun})
        if epoch <= max(epochs // 4, first):  # early: not learned by heart yet
            note_margins(run, split, "train", compared, fresh=epoch <= first)
        if best_epoch(history) == epoch:
            note_margins(run, split, "validation", compare(logits, labels), fresh=True)
        from_first(save_epoch, run, model, optimizer, scaler, settings.output_dir)
        print(f"{f'{epoch}/{epochs}':>8} {loss:14.3f} {validation_loss:16.3f} {accuracy:9.2%}"
              f"{'*' if best_epoch(history) == epoch else ' '} {speed:11,.1f}  "
              f"{'over ' * (epoch <= frozen_epochs < epochs)}"
              f"{duration(history[-1]['seconds'] * (epochs - epoch))}")


# ------------------------------------------------------------------------------------- checkpoints
# A checkpoint is the run: a dictionary with its settings, classes, split and history, and weights.


def find_run(output_dir, settings):
    """Return the run to go on with, which must have these settings, or None."""
    last, best = output_dir / "model_last.pth", output_dir / "model_best.pth"
    file = last if last.exists() else best
    if not file.exists():
        return None
    run = load_checkpoint(file)
    wrong = [f"{name}: then {run['settings'].get(name)}, now {value}"
             for name, value in settings.items()
             if name != "EPOCHS" and run["settings"].get(name) != value]
    if file == best and not wrong:
        if len(run["history"]) == 1:
            return None  # killed between the two files of the first epoch, which is repeated
        wrong = ["model_last.pth, which going on takes, is not there"]
    if wrong:
        raise ValueError(f"{file} is of another run ({'; '.join(wrong)}): undo that, use another "
                         "OUTPUT_DIR, or move model_last.pth and model_best.pth away")
    return run


def load_checkpoint(path):
    """Load a checkpoint of `save_epoch`."""
    run = load_tensors(path)
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{path} is refused: this version of train_model.py did not write it; "
                         "test it with the version that did, or move it away and train again")
    return run


def write_table(path, columns, rows):
    """Write these columns of rows, dictionaries, as CSV in UTF-8 with a header."""
    def cell(value):
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
            return f"'{value}"  # else a spreadsheet takes it for a formula
        return f"{value:.6g}" if isinstance(value, float) else value

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(cell, columns))
    table.writerows([cell(row[name]) for name in columns] for row in rows)
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))


def save_epoch(run, model, optimizer, scaler, output_dir):
    """Write the files of a run after an epoch."""
    history = run["history"]
    write_table(output_dir / "history.csv", history[0], history)
    names = "".join(f"{printable(name)}\n" for name in run["class_names"])
    write_whole(output_dir / "class_names.txt", names.encode("utf-8"))
    best = run | {"model": model.state_dict()}
    last = best | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    checkpoints = {"model_best.pth": best} if best_epoch(history) == len(history) else {}
    checkpoints["model_last.pth"] = last  # comes last: a kill before it repeats the epoch, exactly
    for name, checkpoint in checkpoints.items():
        torch.save(checkpoint, content := io.BytesIO())
        write_whole(output_dir / name, content.getbuffer())


# -------------------------------------------------------------------------------------------- main


def make_parser(description, settings, *scripts):
    """Return a parser with a flag for each setting, explained by the comment beside it."""
    text = "".join(Path(script).read_text(encoding="utf-8") for script in scripts)
    notes = dict(re.findall(r"^([A-Z_]+) = .*?  # (.+)$", text, re.MULTILINE))
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False)
    for name, value in settings.items():
        parser.add_argument("--" + name.lower().replace("_", "-"), metavar="VALUE",
                            type=type(value), default=value,
                            help=f"{notes.get(name)} [{value}]".replace("%", "%%"))
    return parser


def check_settings(settings):
    """Refuse settings that are of no use; make the folders absolute paths, None without lists."""
    least = {"epochs": 0, "batch_size": WORLD_SIZE, "image_size": 64, "min_paintings": 1, "seed": 0,
             "workers": -1, "frozen_epochs": 0, "views": 1, "outliers_per_class": 1, "dropout": 0.0,
             "learning_rate": 1e-9, "backbone_rate": 0.0, "warmup_epochs": 0.0, "weight_decay": 0.0}
    most = {"image_size": 512, "dropout": 0.99}
    choices = {"group_by": ("painting", "artist"), "batch_norms": ("fixed", "trained"),
               "views": (1, 3)}
    for name, value in vars(settings).items():
        low, high = least.get(name, ""), most.get(name, 10**9)
        if name in least and not (type(value) in (int, type(low)) and low <= value <= high):
            raise ValueError(f"{name.upper()} must be a {'whole ' * (type(low) is int)}number from "
                             f"{low} to {high:,}, not {value!r}")
        if name not in least and not isinstance(value, (str, list)):
            raise ValueError(f"{name.upper()} must be text, not {value!r}")
        if name == "lists_dir" and value in ("none", "wikiart_csv") and not os.path.exists(value):
            settings.lists_dir = None
        elif name.endswith("_dir"):
            setattr(settings, name, Path(os.path.abspath(os.path.expanduser(value))))
        if value not in choices.get(name, (value,)):
            raise ValueError(f"{name.upper()} must be one of {choices[name]}, not {value!r}")
    if "group_by" in settings and settings.group_by == settings.attribute:
        raise ValueError("GROUP_BY artist keeps artists apart, so they cannot be the ATTRIBUTE")


def check_folders(data_dir, small_dir, output_dir):
    """Refuse folders that lie in one another, or cannot be written into."""
    for inner, outer in ((small_dir, data_dir), (data_dir, small_dir),
                         (output_dir, data_dir), (output_dir, small_dir)):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise ValueError(f"{inner} lies in {outer}: DATA_DIR, SMALL_DIR and OUTPUT_DIR must be "
                             "folders apart")
    for folder in (small_dir, output_dir):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise OSError(f"cannot write into {folder}")


def explain(error, batch_size):
    """Return what a user can do about an error, in one line, or None where it is a bug."""
    words = re.sub(r"(?s)^Caught .*\n(\w+: )?", "", str(error).strip())  # a worker's traceback
    words = "out of memory" if isinstance(error, MemoryError) else words
    if isinstance(error, (ValueError, OSError)):
        return words
    for pattern, advice in (
        ("out of memory|ALLOC_FAILED|can't alloc",
         f"try a smaller BATCH_SIZE, such as --batch-size {max(1, batch_size // 2)}"),
        ("invalid device ordinal", "torchrun started more processes than there are GPUs: lower "
         "--nproc-per-node"),
        ("no kernel image", "this torch is too new for the GPU: see README.md, Old GPUs"),
        ("shared memory|No space left|DataLoader worker|Too many open files",
         "give Docker --shm-size=2g, or use fewer loaders, such as --workers 0"),
        ("(?i)gloo|nccl", "another process stopped; its own message says why"),
    ):
        if re.search(pattern, words):
            return f"{words.splitlines()[0]}: {advice}"
    return None


def run_script(work, settings):
    """Run `work` on the first process's settings; return the exit code."""
    for stream in (sys.stdout, sys.stderr):  # names of files may be beyond the terminal's letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        join_processes()
        settings = from_first(lambda: settings)
        check_settings(settings)
        work(settings)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would disturb the end
        code, line = 130, "stopped; the same command resumes a training after its last whole epoch"
    except Exception as error:
        reason = explain(error, settings.batch_size)
        code, line = 1, f"error: {printable(reason)}" if reason else traceback.format_exc()
    print(line, file=sys.stderr)
    if distributed.is_initialized():  # what the others do no longer matters
        os._exit(code)
    return code


def set_up(settings):
    """Find, label and split the paintings, and load the weights to start from; write nothing.

    Returns the run, its model, and the found paintings.
    """
    found = find_paintings(settings.data_dir)
    check_folders(settings.data_dir, settings.small_dir, settings.output_dir)
    lasting = {name: getattr(settings, name.lower()) for name in SETTINGS
               if name != "WORKERS" and not name.endswith("_DIR")}
    run = find_run(settings.output_dir, lasting) if settings.epochs else None
    if run is None:
        class_names, labels, test_list = (
            read_lists(settings.lists_dir, settings.attribute) if settings.lists_dir
            else read_names(found, settings.attribute, settings.min_paintings))
        split, source = split_paintings(labels, test_list, settings.group_by, settings.seed)
        run = {"format": FORMAT, "class_names": class_names, "split": split,
               "split_source": source, "history": [], "margins": {}}
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__,
                "Python": platform.python_version()}
    run |= {"settings": lasting, "versions": versions}
    run["split"] = locate(run["split"], found)
    listed, on_disk = {path for labels in run["split"].values() for path in labels}, set(found)
    report(sorted(listed - on_disk), "paintings of the run not on disk")
    report(sorted(on_disk - listed), "paintings that are not of the run")
    there, wanted = set(map(style, found)), set(map(style, listed))
    report(sorted(wanted - there), "folders of the run that are gone")
    report(sorted(there - wanted), "folders without a painting of the run")
    if listed and listed.isdisjoint(on_disk):
        raise ValueError(f"{len(listed):,} paintings are listed, and none of them is in "
                         f"{settings.data_dir}, where the first is {found[0]}: do they belong "
                         "together?")
    keep_usable(run["split"], on_disk)
    torch.manual_seed(settings.seed)
    model = ArtClassifier(len(run["class_names"]), settings.dropout)
    if run["history"]:
        load_weights(model, run.pop("model"), settings.output_dir / "model_last.pth")
    elif settings.epochs and settings.weights != "none":
        load_resnet(model.features.resnet, settings.weights)
    return run, model, found


def prepare(run, found, settings):
    """Prepare the small copies; return {part: {path: label}} of the paintings that can be used."""
    folder = copies_folder(settings.small_dir, settings.image_size)
    bad = prepare_copies(found, settings.data_dir, folder)
    lines = "".join(f"{printable(path)}\t{bad[path]}\n" for path in sorted(bad))
    write_whole(file := settings.output_dir / "bad_files.txt", lines.encode("utf-8"))
    if bad:
        print(f"all of them, with the reasons: {printable(file)}")
    split, class_names = keep_usable(run["split"], set(found).difference(bad)), run["class_names"]
    sizes = ", ".join(f"{len(split[part]):,} {part}" for part in PARTS)
    print(f"split: {sizes} paintings in {len(class_names)} classes")
    for part in PARTS:
        used = set(split[part].values())
        report([name for label, name in enumerate(class_names) if label not in used],
               f"classes without a {part} painting")
    counts = Counter(label for part in PARTS for label in split[part].values()).most_common()
    sizes = (f"{printable(class_names[label])} ({n:,})" for label, n in (counts[0], counts[-1]))
    print("the largest and the smallest class: " + ", ".join(sizes))
    if not run["history"]:
        crops = Paintings(folder, split["train"], settings.image_size, settings.seed)
        write_crops(settings.output_dir / "crops.jpg", crops, class_names)
    return split


def flags_of(values):
    """Return the flags, as text, of the settings {name: value} that are not the default."""
    flags, defaults = "", {name: str(value) for name, value in SETTINGS.items()}
    for name, value in values.items():
        if str(value) not in (defaults[name], os.path.abspath(defaults[name])):
            flags += f" --{name.lower().replace('_', '-')} "
            flags += f'"{value}"' if " " in str(value) else str(value)
    return flags


def print_end(history, settings):
    """Print what was trained, and what to do next."""
    best, seconds = history[best_epoch(history) - 1], sum(row["seconds"] for row in history)
    print(f"trained {len(history)} epoch{'s' * (len(history) > 1)} in {duration(seconds)}; best: "
          f"epoch {best['epoch']}, validation accuracy {100 * best['validation_accuracy']:.2f} %, "
          f"{printable(settings.output_dir / 'model_best.pth')}")
    flags = flags_of({name: getattr(settings, name.lower()) for name in SHARED})
    print(f"next: python test_model.py{printable(flags)}")


def learn(settings):
    """Set up a run, or take up an earlier one, prepare its paintings, and train."""
    run, model, found = from_first(set_up, settings)
    taken = (f"another training writes into {settings.output_dir}: wait for it, or give this one "
             "an OUTPUT_DIR of its own")
    with contextlib.nullcontext() if RANK else locked(settings.output_dir, taken):
        split = from_first(prepare, run, found, settings)
        if not settings.epochs:
            return
        if len(run["history"]) < settings.epochs:
            train(run, model, split, settings)
        else:
            print(f"all {len(run['history'])} epochs are trained; a larger EPOCHS trains further")
        print_end(run["history"], settings)


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    return run_script(learn, make_parser(__doc__, SETTINGS, __file__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
