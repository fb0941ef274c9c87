"""Train a classifier of paintings, a ResNet-50 read by an LSTM, on ArtGAN's WikiArt data set.

    python train_model.py           learn the styles; the same command goes on after a stop
    python train_model.py --help    every setting of this file as a flag

Reads   DATA_DIR/<Style>/<artist>_<title>.jpg, and ArtGAN's lists in LISTS_DIR where they are there.
Writes  small copies into SMALL_DIR; into OUTPUT_DIR bad_files.txt (pictures that cannot be used,
        with reasons) and, after each epoch, model_last.pth, model_best.pth (highest validation
        accuracy so far), history.csv and class_names.txt, which test_model.py goes on from.

The file follows the data: paintings, labels, split, model, training.

Measured: 18.4 paintings/s in training at 224 pixels, and whole epochs 3.3 times as fast as a plain
script's, on two cores of a Xeon with bf16 (torch 2.13, 2026-11-23, tests/benchmark.py --batch-size
32 --pictures 320 --rounds 2 --skip-start). No figure on ArtGAN is measured yet.
"""

import argparse
import ast
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import io
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from datetime import timedelta
from multiprocessing.connection import Listener
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None
try:
    import torchvision
except RuntimeError as error:  # A CPU build of torch beside a CUDA build of torchvision, whose C++
    if "torchvision::" not in str(error):  # operators cannot load. Nothing here uses them.
        raise
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
    import torchvision
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2

# ---------------------------------------------------------------------------------------- settings
# Edit them here, or give any of them as a flag for one run: EPOCHS as --epochs, and so on.

EPOCHS = 20  # passes over the training paintings; 0 checks and prepares the data only
ATTRIBUTE = "style"  # what to learn: style, artist, genre, or another that LISTS_DIR has lists of
DATA_DIR = "wikiart"  # the unzipped originals, one folder per style; never written to
LISTS_DIR = "wikiart_csv"  # ArtGAN's lists, used when they are there
SMALL_DIR = "wikiart_small"  # the small copies, and nothing else
OUTPUT_DIR = "."  # checkpoints, and all else that training and testing write
GROUP_BY = "painting"  # "artist" keeps all paintings of an artist in one part of the split
MIN_PAINTINGS = 100  # fewest paintings of an artist that make a class, where there are no lists
WEIGHTS = "imagenet"  # where the ResNet starts: "imagenet" (a 98 MB download), "none", or a file
BATCH_SIZE = 64  # paintings per step, of all processes; a smaller number needs less memory
IMAGE_SIZE = 224  # height and width of what the model sees, in pixels, 64 to 280
LEARNING_RATE = 1e-3  # peak rate of the LSTM and the linear layer
BACKBONE_RATE = 0.1  # the ResNet's rate as a share of that, where it starts pretrained
FROZEN_EPOCHS = 1  # epochs at the start that leave a pretrained ResNet as it is
WARMUP_EPOCHS = 0.5  # linear warm-up at the start, and again where the ResNet thaws, in epochs
WEIGHT_DECAY = 0.05  # of AdamW, on matrices and convolutions
DROPOUT = 0.3  # share of the LSTM's averaged outputs that training zeroes
WORKERS = -1  # processes that load pictures; 0 loads in the main process, -1 chooses
SEED = 0  # of the split, the order, the crops and the first weights

SETTINGS = {name: value for name, value in list(globals().items()) if name.isupper()}

# ------------------------------------------------------------------------------------------- facts

NUMBERS = {  # the settings that are numbers: (type, least, most); the others are text
    "EPOCHS": (int, 0, 10**6), "BATCH_SIZE": (int, 1, 10**6), "MIN_PAINTINGS": (int, 1, 10**9),
    "IMAGE_SIZE": (int, 64, 280),  # 280 of a small copy's 320 pixels are what evaluation sees
    "LEARNING_RATE": (float, 1e-9, 10), "BACKBONE_RATE": (float, 0, 10),
    "FROZEN_EPOCHS": (int, 0, 10**6), "WARMUP_EPOCHS": (float, 0, 10**6),
    "WEIGHT_DECAY": (float, 0, 10), "DROPOUT": (float, 0, 0.99),
    "WORKERS": (int, -1, 1024), "SEED": (int, 0, 2**32),
}
LOCAL = ("WORKERS", "DATA_DIR", "LISTS_DIR", "SMALL_DIR", "OUTPUT_DIR")  # may differ by machine
CHANGEABLE = ("EPOCHS", *LOCAL)  # in a run
RUN_FILES = ("model_last.pth", "model_best.pth", "history.csv", "class_names.txt",
             "predictions.csv", "outliers.csv", "report.html")
PARTS = ("train", "validation", "test")
ARTGAN = "https://github.com/cs-chan/ArtGAN, folder 'WikiArt Dataset'"

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start Ghostscript
SMALL_SIDE = 320  # short side of a small copy in pixels
MARGIN = 1 / 16  # share of a picture that evaluation leaves out at each edge
MAX_PIXELS = 64_000_000  # of a picture, at up to 9 bytes a pixel; baseline JPEGs may be larger
MAX_WEBP = 32_000_000  # of a WebP, whose decoder takes 16 bytes a pixel
BIG_PIXELS = 4_000_000  # larger ones are decoded one at a time, to bound memory
BIG_PICTURE = threading.Lock()
CLOCK_STEP = 2 * 10**9  # ns; times of files closer than this are the same (FAT counts in 2 s)

CHANNELS, LSTM_UNITS = 2048, 256  # of ResNet-50's last feature map; of each direction
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in 0..1
CLIP_NORM = 1.0  # largest norm of the gradient
READ_EVERY = 20  # batches; reading losses more often would hold up the device
CHECKPOINT_FORMAT = 1  # model_best.pth holds at least TESTED, and model_last.pth RESUMED:
TESTED = {"settings": dict, "class_names": list, "epoch": int, "validation_accuracy": float,
          "history": list, "sizes": dict, "test": dict, "artists": dict, "versions": dict,
          "split_from": str, "model": dict}
RESUMED = TESTED | {"split": dict, "optimizer": dict, "scaler": dict}
ROW = re.compile(r"(.+?),+\s*([0-9]+)")  # of ArtGAN's lists: path,label or path,,label
CLASS = re.compile(r"([0-9]+)\s+(.+)")  # of its class files
EXAMPLE = {ROW: "Cubism/juan-gris_violin-1916.jpg,7", CLASS: "7 Cubism"}

# --------------------------------------------------------------------------------------- processes
# One, or as many as torchrun starts. The first prepares and writes; all draw the same split.


def join_processes():
    """Join the processes that torchrun started, if it did, and take a GPU of one's own.

    Raises ValueError if this machine has fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend, gpus = "cpu:gloo,cuda:nccl", torch.cuda.device_count()
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= gpus:
            raise ValueError(f"torchrun started more processes than the {gpus} GPUs here: lower "
                             "--nproc-per-node")
        torch.cuda.set_device(local_rank)
    # the others wait while the first prepares the small copies, which may take hours
    distributed.init_process_group(backend, timeout=timedelta(days=1))


def processes():
    """Return (number of this process, number of processes)."""
    together = distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def gather(value):
    """Return the values of all processes, in their order."""
    values = [value] * processes()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def by_the_first(function, *given):
    """Return what the first process's function returns, to all processes."""
    return gather(function(*given) if processes()[0] == 0 else None)[0]


def seed_of(*parts):
    """Return a seed of 32 bits that follows from the parts alone, on every machine."""
    return zlib.crc32(" ".join(map(str, parts)).encode("utf-8", "surrogateescape"))


def check_alike(*parts):
    """Raise ValueError unless the parts are the same in all processes."""
    if len(set(gather(seed_of(*parts)))) > 1:
        raise ValueError("the processes see different settings, paintings or checkpoints: the "
                         "settings and what is in their folders must be the same on all machines")


# --------------------------------------------------------------------------------------- paintings


def shown(text):
    """Return a path or a message as one printable line; `run_script` does that to all errors."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def report(items, what):
    """Print what the items are, how many, and the first three; nothing where there are none."""
    if items:
        dots = ", ..." if len(items) > 3 else ""
        print(f"{what}: {len(items):,} ({', '.join(map(shown, items[:3]))}{dots})")


def is_picture(name):
    """Return whether a file's name is a picture's: not hidden, with a picture's ending."""
    return not name.startswith(".") and name.lower().endswith(ENDINGS)


def list_pictures(folder):
    """Return {"Style/name.jpg": modification time in ns}, sorted, of the pictures one folder down.

    The time of what bears a picture's name but is no regular file is None. Hidden files and
    folders are passed over, and so is everything without a picture's ending.
    """
    pictures = {}
    for style in os.scandir(folder):
        if style.is_dir() and not style.name.startswith("."):
            for entry in os.scandir(style):
                if is_picture(entry.name):
                    changed = entry.stat().st_mtime_ns if entry.is_file() else None
                    pictures[f"{style.name}/{entry.name}"] = changed
    return dict(sorted(pictures.items()))


def find_paintings(data_dir):
    """Return `list_pictures(data_dir)`. Raises FileNotFoundError or ValueError if there is none."""
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"there is no folder {data_dir}: unzip ArtGAN's WikiArt ({ARTGAN}) there, or tell "
            "where it is by --data-dir; python tests/demo.py goes without it")
    found = list_pictures(data_dir)
    if not found:
        raise ValueError(f"{data_dir} has no picture in its folders: it must hold a folder per "
                         "style, with the pictures in them, as ArtGAN's wikiart.zip does")
    print(f"{len(found):,} paintings in {shown(data_dir)}")
    return found


def shrink(size, short_side):
    """Return the size of a picture, (width, height), with its short side at most `short_side`."""
    scale = max(1, min(size) / short_side)
    return tuple(max(1, round(side / scale)) for side in size)


def to_rgb(image, size):
    """Return an image in RGB and the given size: transparency on white, 16-bit grey as 8-bit."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of no known range")
    if image.mode.startswith("I;16"):  # grey, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    return image


def decode(source, short_side):
    """Return a picture, upright, as RGB whose short side is at most `short_side` pixels.

    Nothing is enlarged. Raises nearly any exception on a broken picture, as Pillow does, and
    ValueError if it has too many pixels: baseline JPEGs, decoded at a reduced scale, never do.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit does not know of draft(); ours does
    with Image.open(source, formats=PICTURE_FORMATS) as image:
        width, height = image.size
        baseline = image.format in ("JPEG", "MPO") and "progressive" not in image.info
        most = MAX_WEBP if image.format == "WEBP" else MAX_PIXELS
    if width * height > most and not baseline:
        raise ValueError(f"{width} x {height} is more than {most:,} pixels")
    big = width * height > BIG_PIXELS and not baseline
    with BIG_PICTURE if big else contextlib.nullcontext():
        return decode_now(source, short_side)  # on return, all but the result is out of memory


def decode_now(source, short_side):
    """Do what `decode` does, whatever memory it takes."""
    with Image.open(source, formats=PICTURE_FORMATS) as image:
        image.draft(image.mode, shrink(image.size, short_side))
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image, shrink(image.size, short_side))


def encode_small(source):
    """Return the small copy of a picture, as JPEG. Raises what `decode` raises."""
    jpeg = io.BytesIO()
    decode(source, SMALL_SIDE).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def small_name(path):
    """Return a painting's name in SMALL_DIR: x.jpg stays, x.png becomes x.png.jpg.

    No two paintings share one: x.png.jpg becomes x.png.jpg.jpg.
    """
    unambiguous = path.endswith(".jpg") and not path[:-4].lower().endswith(ENDINGS)
    return path if unambiguous else path + ".jpg"


def write_whole(path, content, changed=None):
    """Write a file whole or not at all: beside its place, to the disk, then into its place.

    content: bytes, or a function that writes into the open file; changed: its modification time
    in ns. What a kill leaves half-written is overwritten next time. Raises OSError with the path.
    """
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    temporary = path.with_name(f".{name}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if changed is not None:
            os.utime(temporary, ns=(changed, changed))
        os.replace(temporary, path)
        if changed is None and os.name == "posix":  # a new name lasts only once its folder does
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        for reason in (error, error.__context__):  # torch.save hides it behind a RuntimeError
            if isinstance(reason, OSError):
                raise OSError(f"cannot write {path}: {reason.strerror or reason}") from error
        raise


def cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def prepare(found, data_dir, small_dir):
    """Bring the small copies of the found paintings up to date; return {path: reason} of the bad.

    A copy bears its original's modification time: a changed original is copied anew. Threads do
    the work, since Pillow frees the interpreter while it decodes, resizes and encodes.

    Raises OSError if a copy cannot be written.
    """
    def make_copy(path):
        """Write the small copy of a painting; return None, or the reason why it is bad."""
        try:
            if found[path] is None:
                raise ValueError("no regular file")
            if len(os.fsencode(small_name(path).rpartition("/")[2])) > 255:
                raise ValueError("the name is too long for a small copy")
            jpeg = encode_small(data_dir / path)
        except Exception as error:  # of nearly any kind, from Pillow
            return shown(error) or type(error).__name__
        write_whole(small_dir / small_name(path), jpeg, found[path])
        return None

    small_dir.mkdir(parents=True, exist_ok=True)
    with open(small_dir / ".lock", "wb") as lock, ThreadPool(cores()) as pool:
        if fcntl:  # wait until no other process prepares the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        copied = list_pictures(small_dir)
        outdated = [path for path, changed in found.items()
                    if changed is None or small_name(path) not in copied
                    or abs(changed - copied[small_name(path)]) > CLOCK_STEP]
        for folder in {(small_dir / path).parent for path in outdated}:
            folder.mkdir(exist_ok=True)
        bar = tqdm(pool.imap(make_copy, outdated), "small copies", len(outdated), disable=None)
        try:
            bad = {path: reason for path, reason in zip(outdated, bar) if reason}
        finally:  # after an error or Ctrl-C too, wait for the copies that are being written
            pool.terminate()
            pool.join()
    print(f"small copies: {len(outdated) - len(bad):,} written, "
          f"{len(found) - len(outdated):,} were there already")
    report([f"{path} ({reason})" for path, reason in bad.items()], "pictures that cannot be used")
    return bad


def write_bad_files(bad, output_dir):
    """Write {path: reason} of the pictures that cannot be used into bad_files.txt."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{shown(path)}\t{reason}\n" for path, reason in bad.items())
    write_whole(output_dir / "bad_files.txt", lines.encode("utf-8"))


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


def read_table(path, row):
    """Return the groups of each line that is a row; print how many there are, and other lines.

    Raises ValueError if there is no row, or the file is no text.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    hits = [(line, row.fullmatch(line)) for line in map(str.strip, lines) if line]
    rows = [hit.groups() for _, hit in hits if hit]
    others = [line for line, hit in hits if not hit]
    if not rows:
        raise ValueError(f"{path} has no row such as {EXAMPLE[row]}; its first line is "
                         f"{others[0] if others else 'missing'!r}")
    print(f"{shown(path)}: {len(rows):,} rows")
    report(others, f"{shown(path)}: lines that are no rows, passed over")
    return rows


def read_lists(lists_dir, attribute):
    """Read ArtGAN's lists of an attribute, in the form of its zip or of its repository.

    They are in lists_dir, or in its folder Style, Artist, Genre. Returns the class names and
    {"test": {path: label}, "train": {path: label}}, where test is what ArtGAN calls val; or None
    where there are no lists. A path listed twice counts once, by its first row; the test list is
    read first, so that it stays whole.

    Raises ValueError if a list is missing, is no list, or has a label without a class.
    """
    stems = [f"{attribute}_class", f"{attribute}_val", f"{attribute}_train"]
    files = [file for name in stems for folder in (lists_dir, lists_dir / attribute.capitalize())
             for end in (".txt", ".csv", "") if (file := folder / (name + end)).is_file()]
    if not files:
        print(f"no {attribute} lists in {shown(lists_dir)}: classes and split are drawn without")
        return None
    if [file.stem for file in files] != stems:
        raise ValueError(f"{lists_dir} must hold each of {', '.join(stems)} once, and has "
                         f"{', '.join(file.name for file in files)}: see {ARTGAN}")
    class_file, test_file, train_file = files

    rows = read_table(class_file, CLASS)
    names = {int(index): name for index, name in rows}
    if sorted(names) != list(range(len(rows))) or len(set(names.values())) < len(rows):
        raise ValueError(f"{class_file} must number different classes from 0, one per line")
    listed, repeated, folders = {"test": {}, "train": {}}, [], defaultdict(set)
    for part, file in (("test", test_file), ("train", train_file)):
        for path, label in read_table(file, ROW):
            if int(label) not in names:
                raise ValueError(f"{file} gives {path} the label {label}, which {class_file} does "
                                 "not name")
            if path in listed["test"] or path in listed["train"]:
                repeated.append(path)
            else:
                listed[part][path] = int(label)
                folders[int(label)].add(style(path))
    report(repeated, "rows that repeat a painting, passed over")
    if attribute == "style":  # a style is named as its folder: Art_Nouveau_Modern, not Art_Nouveau
        renamed = names | {label: min(own) for label, own in folders.items() if len(own) == 1}
        if len(set(renamed.values())) == len(names):  # still different names
            names = renamed
    return [names[label] for label in range(len(names))], listed


def read_names(found, attribute, min_paintings):
    """Label paintings without lists: style by folder, artist by file name.

    Returns the class names, sorted, and {path: label}. Raises ValueError for other attributes.
    """
    if attribute not in ("style", "artist"):
        raise ValueError(
            f"ATTRIBUTE {attribute!r} needs {attribute}_train.csv, {attribute}_val.csv and "
            f"{attribute}_class.txt in LISTS_DIR; ArtGAN's lists of style, artist and genre are at "
            f"{ARTGAN}, and style and artist go without")
    name_of, least = (style, 1) if attribute == "style" else (artist, min_paintings)
    sizes = Counter(map(name_of, found))
    class_names = sorted(name for name, size in sizes.items() if size >= least)
    label = {name: number for number, name in enumerate(class_names)}
    return class_names, {path: label[name_of(path)] for path in found if name_of(path) in label}


def match(listed, found):
    """Return {listed path: path on disk} of the listed paintings that are on disk.

    Some of ArtGAN's names are garbled (mojibake), and a disk may hold such a name as listed,
    repaired, or with _ for each odd character. So a listed path that is not on disk exactly is
    looked for by a key, its folder and the ASCII letters and digits of its name, and is matched
    where one such path and one file that no list claims have that key, and not both are ASCII.
    """
    places = {path: path for path in listed if path in found}

    def by_key(paths):
        keys = defaultdict(list)
        for path in paths:
            keys[style(path), re.sub("[^A-Za-z0-9]", "", file_name(path))].append(path)
        return keys

    files = by_key(path for path in found if path not in places)
    for key, paths in by_key(path for path in listed if path not in places).items():
        if len(paths) == len(files[key]) == 1 and not (paths[0] + files[key][0]).isascii():
            places[paths[0]] = files[key][0]
    return places


def label_paintings(found, attribute, lists_dir, min_paintings):
    """Label the found paintings, by ArtGAN's lists where they are there.

    Returns the class names; {path: label} and {path: path on disk} of the paintings that are on
    disk, with paths as the lists spell them; and the set of paths that the lists keep for the
    test, None without lists.

    Raises ValueError if none of the listed is on disk, and what the readers raise.
    """
    lists, tested = read_lists(lists_dir, attribute), None
    if lists:
        class_names, listed = lists
        labels, tested = listed["test"] | listed["train"], set(listed["test"])
    else:
        class_names, labels = read_names(found, attribute, min_paintings)
    places = match(labels, found)
    report([path for path in labels if path not in places], "listed paintings that are not on disk")
    report(sorted(found.keys() - set(places.values())), "paintings without a class")
    if lists and not places:
        raise ValueError(
            f"the {attribute} lists in {lists_dir} name {len(labels):,} paintings, and none of "
            f"them is on disk, where the first is {min(found)}: do they belong together?")
    labels = {path: label for path, label in labels.items() if path in places}
    return class_names, labels, places, tested


# ------------------------------------------------------------------------------------------- split


def draw_split(labels, group_of, shares, seed):
    """Divide {path: label} by class into parts, each group of paintings whole in one of them.

    shares: {part: share}, the most needed part first: a class of 1 goes to the first, of 2 to the
    first two, and so on. Returns {part: [paths]}. The same seed gives the same split on every
    machine: neither the order of the labels nor Python's hash() matters.

    As in iterative stratification (Sechidis et al. 2011), groups with the rarest classes are
    placed first, larger ones before smaller, each in the part that then lacks most.
    """
    sizes, wanted, (first, *others) = Counter(labels.values()), {}, shares
    for label, size in sizes.items():  # wanted: {(part, label): number of paintings}
        for place, part in enumerate(others, 1):
            wanted[part, label] = max(1, int(size * shares[part] + 0.5)) if size > place else 0
        wanted[first, label] = size - sum(wanted[part, label] for part in others)
    members = defaultdict(list)
    for path in sorted(labels):
        members[group_of(path)].append(path)

    def rank(group):
        rarest = min(sizes[labels[path]] for path in members[group])
        draw = hashlib.blake2b(f"{seed} {group}".encode("utf-8", "surrogateescape")).digest()
        return rarest, -len(members[group]), draw

    def need(part, counts):
        """Return the share of what it wants that a part lacks, were half the group placed there.

        counts: {label: paintings in the group}; a class counts by how much of it the group holds.
        """
        return sum(count / sizes[label] * (missing[part, label] - count / 2)
                   / max(wanted[part, label], 0.5) for label, count in counts.items())

    split, missing = {part: [] for part in shares}, dict(wanted)
    for group in sorted(members, key=rank):
        counts = Counter(labels[path] for path in members[group])
        part = max(shares, key=functools.partial(need, counts=counts))
        split[part] += members[group]
        for label, count in counts.items():
            missing[part, label] -= count
    return {part: sorted(paths) for part, paths in split.items()}


def split_paintings(labels, tested, group_by, seed, kept=None):
    """Return {part: {path: label}} for the parts train, validation and test.

    The split of an earlier run, `kept`, stays, without the paintings that have no label now. Else
    the test is `tested`, what ArtGAN's lists keep for it, and validation a tenth of the rest; or,
    where that is None, the parts are 70, 15 and 15 %, and `group_by` "artist" keeps all of an
    artist in one of them. Files of one name in two folders stay together in what is drawn.

    Raises ValueError if a part is empty, or the training has a single class.
    """
    if kept:
        paths = {part: [path for path in kept[part] if path in labels] for part in PARTS}
    elif tested is None:
        shares = {"train": 0.7, "test": 0.15, "validation": 0.15}
        paths = draw_split(labels, artist if group_by == "artist" else file_name, shares, seed)
    else:
        drawn = {path: label for path, label in labels.items() if path not in tested}
        paths = {"test": sorted(tested & labels.keys())}
        paths |= draw_split(drawn, file_name, {"train": 0.9, "validation": 0.1}, seed)
    split = {part: {path: labels[path] for path in paths[part]} for part in PARTS}
    if (classes := len(set(split["train"].values()))) < 2:
        raise ValueError("a classifier needs two classes with enough paintings, and has "
                         f"{classes}: are DATA_DIR and MIN_PAINTINGS right?")
    if empty := [part for part in PARTS if not split[part]]:
        raise ValueError(f"{len(labels):,} paintings are too few: none is left for "
                         f"{', '.join(empty)}; is DATA_DIR right?")
    return split


def find_again(split, found, places):
    """Return {path: label} and {path: path on disk} of an earlier run's paintings that are there.

    places: those of all paintings that have a label now. Prints what is gone or new.
    """
    known = {path: label for part in PARTS for path, label in split[part].items()}
    again = match(known, found)
    report(sorted(known.keys() - again.keys()), "paintings of the run that are gone")
    report(sorted(set(places.values()) - set(again.values())),
           "paintings that are new since the run began, left out")
    return {path: known[path] for path in again}, again


def report_split(split, class_names):
    """Print the sizes of a split, and what is odd about it."""
    sizes = ", ".join(f"{len(split[part]):,} {part}" for part in PARTS)
    print(f"split: {sizes} paintings in {len(class_names)} classes")
    learned = {file_name(path) for part in ("train", "validation") for path in split[part]}
    twins = [path for path in split["test"] if file_name(path) in learned]
    report(twins, "test paintings with the file name of one to learn from")
    used = {label for part in PARTS for label in split[part].values()}
    report([name for label, name in enumerate(class_names) if label not in used],
           "classes without a painting")


def commonest_classes(split):
    """Return {artist: commonest label of the paintings outside the test}; "" is for all others."""
    counts = defaultdict(Counter)
    for part in ("train", "validation"):
        for path, label in sorted(split[part].items()):
            counts[artist(path)][label] += 1
            counts[""][label] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


# ------------------------------------------------------------------------------------------- model


class ResidualBlock(Bottleneck):
    """torchvision's block, but with sums and ReLUs in new memory, which is faster on CPUs.

    19.1 to 21.8 paintings/s in training, 71 to 108 in evaluation (batch 64, two cores).
    """

    def forward(self, x):
        """Turn a feature map (B, C, H, W) into the block's (B, D, H/stride, W/stride)."""
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        y = nn.functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nn.functional.relu(y + (self.downsample(x) if self.downsample else x))


class FeatureExtractor(nn.Module):
    """ResNet-50 (He et al. 2016, arXiv 1512.03385) without its pooling and its classifier."""

    def __init__(self):
        super().__init__()
        layers = OrderedDict(ResNet(ResidualBlock, [3, 4, 6, 3]).named_children())
        layers["relu"] = nn.ReLU()
        del layers["avgpool"], layers["fc"]
        self.resnet = nn.Sequential(layers)
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

    def start_training(self, frozen):
        """Set training mode; a frozen ResNet keeps weights and batch statistics."""
        self.train()
        self.features.train(not frozen)
        self.features.requires_grad_(not frozen)


def fold_norms(model):
    """Return a copy for evaluation, which is faster: batch norms are folded into convolutions.

    Jacob et al. 2018 (arXiv 1712.05877), section 3.2; the function computed is the same. Its ResNet
    is in the precision of autocast, which would convert the weights anew for every batch.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):  # each stands right after its convolution
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    folded.features.resnet.to(model.precision)
    folded.lstm.flatten_parameters()  # cuDNN wants the copied weights in one piece
    return folded


def load_tensors(path):
    """Load a file of torch.save that holds tensors and plain values alone.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path.open("rb").close()  # raises OSError where it cannot be read
    reason, broken = "it is cut off, or is no PyTorch file", None
    with contextlib.suppress(Exception):  # of many kinds; torch advises an unsafe load
        if zipfile.is_zipfile(path):  # files of before 2020 are none
            reason = "it is damaged, or holds more than tensors and values, which could run code"
            broken = zipfile.ZipFile(path).testzip()
        if not broken:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"it is damaged (the checksum of {broken} is wrong)"
    raise ValueError(f"{path} is refused: {reason}")


def load_state(module, tensors, path, unused=()):
    """Load tensors into a module, whose counts of batches may be missing, as in old files.

    Raises ValueError unless all other names, shapes and types fit, and all numbers are finite.
    """
    own = module.state_dict()
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path} is refused: it holds no weights")
    given = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    given |= {name: value for name, value in tensors.items() if name not in unused}

    def form(value):
        return value.shape, value.dtype, value.layout, value.device

    wrong = sorted(own.keys() ^ given.keys()) or [
        name for name in own
        if form(own[name]) != form(given[name]) or not given[name].isfinite().all()]
    if wrong:
        raise ValueError(f"{path} is refused: {len(wrong)} tensors are missing, unknown, of "
                         f"another shape or type or not finite; the first is {wrong[0]}")
    module.load_state_dict(given)


def load_resnet(model, weights):
    """Start the ResNet from `weights`: "imagenet" (torchvision's IMAGENET1K_V2), "none", or a file.

    Raises OSError if they cannot be had, ValueError if they are not the weights of a ResNet-50.
    """
    if weights == "none":
        return
    path = Path(os.path.expanduser(weights))
    if weights == "imagenet":
        url = ResNet50_Weights.IMAGENET1K_V2.url
        path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, path, path.stem.rpartition("-")[2])
        except Exception as error:  # of many kinds, from the network
            raise OSError(f"cannot download {url} ({error}): put that file at {path}, or start "
                          "without it by --weights none") from error
    tensors = load_tensors(path)
    load_state(model.features.resnet, tensors, path, unused=("fc.weight", "fc.bias"))


# ---------------------------------------------------------------------------------------- training


def centre(image, image_size):
    """Return the central square, 7/8 of the short side, as image_size x image_size pixels."""
    size = (image_size, image_size)
    return ImageOps.fit(image, size, Image.Resampling.BILINEAR, bleed=MARGIN)


class Paintings(Dataset):
    """Small copies as pixels: `paintings[index, epoch]` is (pixels (S, S, 3) uint8, label).

    From epoch 1 on it is a random crop of 0.35 to 1 of the area, flipped or not, which follows
    from (seed, epoch, painting) alone; in epoch 0 the centre, as evaluation sees it.
    """

    def __init__(self, small_dir, paths, labels, image_size, seed=0):
        self.small_dir, self.image_size, self.seed = str(small_dir), image_size, seed
        # in one array each: lists of 81,446 objects would grow in every worker
        self.paths = np.array([os.fsencode(small_name(path)) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)
        crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1))
        self.vary = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, epoch = key
        path = os.fsdecode(self.paths[index])
        file = os.path.join(self.small_dir, path)
        try:
            with Image.open(file) as image:
                image.load()
        except OSError as error:
            raise OSError(f"cannot read the small copy {file} ({error}): delete it if it is there, "
                          "and it is made again") from error
        if epoch == 0:
            image = centre(image, self.image_size)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, path))
                image = self.vary(image)
        return torch.from_numpy(np.array(image)), self.labels[index]


class Batches(list):
    """The batches of the next pass over `Paintings`, as lists of its keys (index, epoch).

    Each process has its share of every batch; `sizes` are those of the whole batches.
    """

    def __init__(self, batch_size, seed=0):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def shuffle(self, indices, epoch):
        """Make the next pass one of training, in the order that follows from (seed, epoch)."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(len(indices), generator=generator).tolist()
        self.keep_order([indices[place] for place in order], epoch)

    def keep_order(self, indices, epoch=0):
        """Make the next pass take the indices as they come, in batches of nearly equal size."""
        steps = math.ceil(len(indices) / self.batch_size)
        cuts = [len(indices) * step // steps for step in range(steps + 1)]
        self.sizes, (rank, count) = np.diff(cuts).tolist(), processes()
        if min(self.sizes) < count:
            raise ValueError(f"{count} processes cannot share {min(self.sizes)} paintings: raise "
                             "BATCH_SIZE, or start fewer")
        self[:] = [[(index, epoch) for index in indices[start + rank : end : count]]
                   for start, end in zip(cuts, cuts[1:])]


def begin_worker(_):
    """Prepare a worker: Ctrl-C, which a terminal sends to it too, is for the main process.

    Raises OSError where no socket can be made, as on a full disk: batches go through sockets, and
    the main process would wait for them for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # after Ctrl-C, a batch that nobody takes is no news
    Listener().close()  # a socket, made and given up


def make_loader(paintings, batches, workers, device):
    """Return a loader of (pixels (B, S, S, 3) uint8, labels (B)), one for all passes of a run.

    It raises what its workers raise, with their tracebacks in the message.
    """
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine's processes
    return DataLoader(
        paintings,
        batch_sampler=batches,
        num_workers=workers if workers >= 0 else min(max(share, 1), 16),
        pin_memory=device.type == "cuda",
        persistent_workers=workers != 0,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # not the common one, which dropout draws from
    )


def keep_freed_memory():
    """Let a training step take the memory that the last one freed, instead of asking the system.

    On Linux, where the C library is glibc: 14.5 to 18.2 paintings/s in training on two cores.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt, m_mmap_max, m_trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def choose_device():
    """Return CUDA, MPS or the CPU, the first that is there, and its type for mixed precision.

    The type is None where mixed precision gains nothing, as on CPUs without bf16 instructions.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        device = torch.device("cuda", torch.cuda.current_device())
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if bf16 else torch.float16
    if torch.backends.mps.is_available() and processes()[1] == 1:  # gloo knows no MPS
        return torch.device("mps"), None
    keep_freed_memory()
    instructions = torch.cpu.get_capabilities()
    bf16 = any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.device("cpu"), torch.bfloat16 if bf16 else None


def to_device(model, device, precision=None):
    """Move a model to the device, in the precision and memory format that are fastest there."""
    model.precision = precision
    fastest = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=fastest)


def to_images(pixels, device):
    """Move pixels (B, S, S, 3) uint8 to the device as images (B, 3, S, S), still uint8."""
    return pixels.to(device, non_blocking=pixels.is_pinned()).permute(0, 3, 1, 2)


def make_optimizer(model, learning_rate, backbone_rate, weight_decay):
    """Return AdamW with a rate of its own for the ResNet, and no decay of norms and biases.

    Each group's "peak" is the rate that the schedule scales.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[name.startswith("features."), parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters,
          "peak": learning_rate * (backbone_rate if backbone else 1),
          "weight_decay": weight_decay if matrix else 0.0}
         for (backbone, matrix), parameters in groups.items()],
        fused=True)


def rate_at(progress, epochs, frozen_epochs, warmup_epochs):
    """Return the learning rate as a share of its peak, `progress` epochs into the training.

    A linear warm-up, another where the ResNet thaws, and over both a cosine that ends at 0
    (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    since = progress - (frozen_epochs if progress >= frozen_epochs else 0)
    warm = min(1, since / warmup_epochs) if warmup_epochs else 1
    return warm * (1 + math.cos(math.pi * progress / epochs)) / 2


def in_bursts(loader):
    """Yield the batches of a loader, taken one of each worker at a time.

    Where the workers share the model's cores, they then load side by side, each beside one of the
    threads that wait for one another: 88 to 93 paintings/s in evaluation (batch 16, two cores).
    """
    batches = iter(loader)
    while burst := list(itertools.islice(batches, max(1, loader.num_workers))):
        yield from burst


def progress_bar(loader, title):
    """Return a bar that counts the paintings of a pass, those of other processes too."""
    count = sum(loader.batch_sampler.sizes)
    disable = True if processes()[0] else None  # None: where the output is no terminal
    return tqdm(desc=title, total=count, unit=" paintings", disable=disable, leave=False)


def check_finite(losses, shares, scaler, title):
    """Raise ValueError if a batch's loss is NaN, or fp16 skips every step for its gradient."""
    wrong = [batch for batch, loss in enumerate(losses) if math.isnan(loss)]
    if not wrong and scaler.is_enabled() and scaler.get_scale() < 1:
        wrong = [len(losses) - 1]
    if wrong:
        raise ValueError(f"{title}, batch {wrong[0] + 1}, at {shares[wrong[0]]:.3f} of the peak "
                         "learning rate: the loss or its gradient is not finite; nothing of this "
                         "epoch is kept; try a smaller LEARNING_RATE")


def train_epoch(model, loader, optimizer, scaler, shares, title):
    """Train on every batch of the loader once; return the mean loss of a painting.

    shares: for each batch, the learning rate as a share of its peak.

    Raises ValueError if a loss or a gradient is not finite.
    """
    device, sizes = next(model.parameters()).device, loader.batch_sampler.sizes
    count = processes()[1]
    parallel = DistributedDataParallel(model) if count > 1 else model
    losses = torch.zeros(len(loader), device=device)
    with progress_bar(loader, title) as bar:
        steps = zip(in_bursts(loader), shares, sizes)
        for batch, ((pixels, labels), share, size) in enumerate(steps, 1):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            images = to_images(pixels, device)
            labels = labels.to(device, non_blocking=labels.is_pinned())
            # Gradients are averaged over the processes. Weighted so, their average is that of the
            # whole batch, also where the processes' parts of it differ in size.
            loss = nn.functional.cross_entropy(parallel(images), labels)
            loss = loss * (len(labels) * count / size)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # A bad step is noted as NaN on the device, and read later. Where the scaler is on, a
            # gradient may overflow: it skips that step and lowers its scale.
            finite = loss.isfinite() & (norm.isfinite() | scaler.is_enabled())
            losses[batch - 1] = torch.where(finite, loss.detach(), torch.nan)
            if batch % READ_EVERY == 0 or batch == len(loader):
                read = losses[:batch].tolist()  # waits for the device
                check_finite(read, shares, scaler, title)
                bar.set_postfix(loss=f"{read[-1]:.3f}", refresh=False)
            bar.update(size)
    if count > 1:  # the batch norms of the first process are those that are saved
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    total = sum(loss * size / count for loss, size in zip(read, sizes))
    return sum(gather(total)) / sum(sizes)


@torch.inference_mode()
def evaluate(model, loader, title):
    """Return logits (N, classes) and labels (N), on the CPU, of a pass, in the order of indices.

    Raises ValueError if a logit is not finite.
    """
    device, logits, truth = next(model.parameters()).device, [], []
    model.eval()
    with progress_bar(loader, title) as bar:
        for (pixels, labels), size in zip(in_bursts(loader), loader.batch_sampler.sizes):
            logits.append(model(to_images(pixels, device)))
            truth.append(labels)
            bar.update(size)
    indices = torch.tensor([index for batch in loader.batch_sampler for index, _ in batch])
    parts = zip(*gather((indices, torch.cat(logits).cpu(), torch.cat(truth))))
    indices, logits, truth = map(torch.cat, parts)
    if not logits.isfinite().all():
        raise ValueError(f"{title}: the model's outputs are not finite")
    order = indices.argsort()
    return logits[order], truth[order]


# ------------------------------------------------------------------------------------- checkpoints


def write_table(path, columns, rows):
    """Write these columns of rows, dictionaries, as CSV in UTF-8 with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))


def load_checkpoint(path):
    """Load a checkpoint of `save_run`. Raises what `load_tensors` raises, ValueError for others."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} is refused: train_model.py did not write it")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is refused: its format is {checkpoint['format']}, and this "
                         f"version reads format {CHECKPOINT_FORMAT}")
    needed = RESUMED if path.name == "model_last.pth" else TESTED
    if wrong := [name for name, kind in needed.items()
                 if not isinstance(checkpoint.get(name), kind)]:
        raise ValueError(f"{path} is refused: it lacks {', '.join(wrong)}, or has another form")
    if (set(checkpoint["test"].values()) - set(range(len(checkpoint["class_names"])))
            or len(checkpoint["history"]) != checkpoint["epoch"]):
        raise ValueError(f"{path} is refused: its labels and classes, or epochs and history, do "
                         "not fit together")
    return checkpoint


def kept_settings(settings):
    """Return the settings that stay the same through a run, by their names."""
    return {name: getattr(settings, name.lower()) for name in SETTINGS if name not in CHANGEABLE}


def checkpoint_of(run, model):
    """Return what testing takes, on this machine or another, as plain values and tensors."""
    return {
        "format": CHECKPOINT_FORMAT,
        "settings": run["settings"],
        "class_names": run["class_names"],
        "epoch": len(run["history"]),
        "validation_accuracy": run["history"][-1]["validation_accuracy"],
        "history": run["history"],
        "sizes": {part: len(paintings) for part, paintings in run["split"].items()},
        "test": run["split"]["test"],
        "split_from": run["split_from"],
        "artists": run["artists"],
        "versions": run["versions"],
        "model": model.state_dict(),
    }


def note_saved(run, settings):
    """Set what Ctrl-C or an error adds to its message: which epoch is saved, and how to go on."""
    if not run["history"]:
        settings.saved = "no epoch is saved yet; the same command starts again"
        return
    settings.saved = (f"epoch {len(run['history'])} of {settings.epochs} is saved in "
                      f"{shown(settings.output_dir / 'model_last.pth')}; the same command"
                      f"{' without --fresh' * settings.fresh} goes on from there")


def save_results(run, model, settings):
    """Write model_best.pth if the last epoch is the best, history.csv and class_names.txt.

    All of it follows from model_last.pth, so a run killed between the files can be mended.
    """
    note_saved(run, settings)
    folder, accuracies = settings.output_dir, [row["validation_accuracy"] for row in run["history"]]
    if accuracies[-1] > max(accuracies[:-1], default=-1):
        state = checkpoint_of(run, model)
        write_whole(folder / "model_best.pth", lambda file: torch.save(state, file))
    write_table(folder / "history.csv", run["history"][0], run["history"])
    names = "".join(f"{shown(name)}\n" for name in run["class_names"])
    write_whole(folder / "class_names.txt", names.encode("utf-8"))


def save_run(run, model, optimizer, scaler, settings):
    """Write model_last.pth, which holds all that going on takes, then the other files of a run."""
    state = checkpoint_of(run, model) | {
        "split": run["split"], "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    write_whole(settings.output_dir / "model_last.pth", lambda file: torch.save(state, file))
    save_results(run, model, settings)


def find_earlier_run(settings, class_names):
    """Return the checkpoint to go on from, or None. Raises ValueError if it is of another run."""
    last, best = settings.output_dir / "model_last.pth", settings.output_dir / "model_best.pth"
    if settings.fresh or not settings.epochs or not (last.exists() or best.exists()):
        return None
    if not last.exists():
        raise ValueError(f"{best} is there without model_last.pth, which going on takes; --fresh "
                         "moves it aside and starts a new run")
    run = load_checkpoint(last)

    def facts(kept, names):
        return kept | {f"class {number}": name for number, name in enumerate(names)}

    then = facts(run["settings"], run["class_names"])
    now = facts(kept_settings(settings), class_names)
    wrong = [f"{name}: then {then.get(name)}, now {now.get(name)}" for name in then | now
             if name not in CHANGEABLE and then.get(name) != now.get(name)]
    if wrong:
        wrong[3:] = ["..."] * (len(wrong) > 3)
        raise ValueError(f"{last} is of another run ({'; '.join(wrong)}): undo that, give the new "
                         "run an OUTPUT_DIR of its own, or move the earlier one aside by --fresh")
    return run


def restore(run, optimizer, scaler):
    """Move the states of the optimizer and the scaler out of a checkpoint, from any device."""
    optimizer.load_state_dict(run.pop("optimizer"))
    for parameter, moments in optimizer.state.items():  # a Mac's are in another memory format,
        for name in ("exp_avg", "exp_avg_sq"):  # which a CPU's fused AdamW would misread
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if state := run.pop("scaler"):  # empty where the earlier device went without
        scaler.load_state_dict(state)


def move_aside(folder):
    """Move the files of an earlier run into previous-1, or the first such folder that is free."""
    files = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if any(file.suffix == ".pth" for file in files):  # class_names.txt alone is no run
        number = 1
        while (aside := folder / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"the earlier run is now in {shown(aside)}")


# -------------------------------------------------------------------------------------------- main


def make_parser(description, settings, *scripts):
    """Return a parser with a flag for each setting, explained by the comment beside it."""
    text = "".join(Path(script).read_text(encoding="utf-8") for script in scripts)
    notes = dict(re.findall(r"^([A-Z_]+) = .*?  # (.+)$", text, re.MULTILINE))
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False)
    for name, value in settings.items():
        parser.add_argument("--" + name.lower().replace("_", "-"), metavar="VALUE",
                            type=literal if name in NUMBERS else str, default=argparse.SUPPRESS,
                            help=f"{notes.get(name)} [{value}]".replace("%", "%%"))
    return parser


def literal(text):
    """Return the number that a text spells, or else the text, which `check_setting` refuses."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_setting(name, value):
    """Return a setting's value, a folder as Path. Raises ValueError if it is of no use."""
    if name in NUMBERS:
        kind, least, most = NUMBERS[name]
        if type(value) not in (int, kind) or not least <= value <= most:
            raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number from {least:,} to "
                             f"{most:,}, not {value!r}")
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text, not {value!r}")
    return Path(os.path.expanduser(value)) if name.endswith("_DIR") else value


def explain(error, options):
    """Return what a user can do about an error, in one line, or None where it is a bug."""
    message = str(error).strip()
    if isinstance(error, (ValueError, OSError)):
        return re.sub(r"(?s)^Caught .*\n(\w+: )?", "", message)  # without a worker's traceback
    first_line = message.partition("\n")[0]
    if re.search("out of memory|ALLOC_FAILED|can't allocate", message):
        smaller = max(1, options.batch_size // 2)
        return f"{first_line}: try a smaller BATCH_SIZE, such as --batch-size {smaller}"
    if processes()[1] > 1 and re.search("(?i)gloo|nccl", first_line):
        return f"another process stopped; its own message says why ({first_line})"
    if re.search("DataLoader worker .pid|shared memory|Too many open files", message):
        return f"{first_line}: try --workers 0, which loads without worker processes"
    return None


def run_script(work, parser, settings, argv):
    """Run `work` on the settings, given as constants or flags; return the exit code."""
    options = parser.parse_args(argv)
    options.saved = ""  # what a run that is stopped now leaves behind
    for stream in (sys.stdout, sys.stderr):  # names of files may be beyond the terminal's letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        join_processes()
        if processes()[0]:
            sys.stdout = io.StringIO()  # the first process speaks for all
        for name, constant in settings.items():
            value = getattr(options, name.lower(), constant)  # the flag, where it is given
            setattr(options, name.lower(), check_setting(name, value))
        check_alike(sorted((name, str(value)) for name, value in vars(options).items()
                           if name.upper() not in LOCAL))
        work(options)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would disturb the end
        if processes()[0] == 0:
            kept = options.saved or "nothing is lost; run the same command again"
            print("stopped:", kept, file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        message = explain(error, options)
        if message is None:
            raise
        print(f"error: {shown(message)}{options.saved and f' ({options.saved})'}", file=sys.stderr)
        return 1


def check_folders(data_dir, small_dir, output_dir):
    """Raise ValueError if the folders overlap, OSError if nothing can be written into them."""
    small, originals, output = small_dir.resolve(), data_dir.resolve(), output_dir.resolve()
    if small.is_relative_to(originals) or originals.is_relative_to(small):
        raise ValueError(f"SMALL_DIR ({small}) and DATA_DIR ({originals}) must be two folders, "
                         "neither inside the other")
    if output.is_relative_to(originals) or output.is_relative_to(small):
        raise ValueError(f"OUTPUT_DIR ({output}) must be outside of DATA_DIR and SMALL_DIR")
    for folder in (small_dir, output_dir):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise OSError(f"cannot write into {folder}: {error.strerror}") from error


def fit(model, run, split, places, settings):
    """Train from where the run stands to the last epoch, saving each before the next begins."""
    epochs, history, train_count = settings.epochs, run["history"], len(split["train"])
    device, precision = choose_device()
    pretrained = settings.weights != "none"
    frozen_epochs = settings.frozen_epochs if pretrained else 0
    backbone_rate = settings.backbone_rate if pretrained else 1
    to_device(model, device, precision)
    optimizer = make_optimizer(model, settings.learning_rate, backbone_rate, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

    paintings = split["train"] | split["validation"]
    pixels = Paintings(settings.small_dir, [places[path] for path in paintings],
                       list(paintings.values()), settings.image_size, settings.seed)
    batches = Batches(settings.batch_size, settings.seed)
    loader = make_loader(pixels, batches, settings.workers, device)
    if history:
        restore(run, optimizer, scaler)
        by_the_first(save_results, run, model, settings)  # mends a run killed between its files
        print(f"going on after epoch {len(history)}" if len(history) < epochs else
              f"all {len(history)} epochs are trained; a larger EPOCHS trains further")
    # of the epochs from here on: what was mended above keeps those that it was trained with
    run["settings"] = {"EPOCHS": epochs} | kept_settings(settings)
    run["versions"] = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    print(f"device {device}, {precision or torch.float32}, loader processes {loader.num_workers}")
    for epoch in range(len(history) + 1, epochs + 1):
        note_saved(run, settings)
        title, begun = f"epoch {epoch}/{epochs}", time.perf_counter()
        torch.manual_seed(seed_of(settings.seed, epoch) + processes()[0])  # of dropout
        model.start_training(frozen=epoch <= frozen_epochs)
        batches.shuffle(range(train_count), epoch)
        progress = [epoch - 1 + (step + 0.5) / len(batches) for step in range(len(batches))]
        shares = [rate_at(now, epochs, frozen_epochs, settings.warmup_epochs) for now in progress]
        loss = train_epoch(model, loader, optimizer, scaler, shares, title)
        speed = train_count / (time.perf_counter() - begun)
        batches.keep_order(range(train_count, len(paintings)))
        logits, labels = evaluate(fold_norms(model), loader, f"{title} validation")
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        history.append({
            "epoch": epoch,
            "training_loss": loss,
            "validation_loss": nn.functional.cross_entropy(logits, labels).item(),
            "validation_accuracy": accuracy,
            "learning_rate": settings.learning_rate * shares[-1],
            "paintings_per_second": speed,
            "seconds": time.perf_counter() - begun,
        })
        by_the_first(save_run, run, model, optimizer, scaler, settings)
        print(f"{title}: training loss {loss:.3f}, validation loss "
              f"{history[-1]['validation_loss']:.3f}, validation accuracy {100 * accuracy:.2f} %, "
              f"{speed:,.1f} paintings/s, {history[-1]['seconds']:.0f} s")


def train(settings):
    """Find, label, prepare and split the paintings, then train.

    What can be wrong without decoding a picture is checked before anything is written.
    """
    data_dir, small_dir, output_dir = settings.data_dir, settings.small_dir, settings.output_dir
    if settings.group_by not in ("painting", "artist"):
        raise ValueError(f"GROUP_BY must be painting or artist, not {settings.group_by!r}")
    if settings.group_by == settings.attribute == "artist":
        raise ValueError("GROUP_BY artist keeps artists apart, so they cannot be the ATTRIBUTE")
    found = find_paintings(data_dir)
    check_folders(data_dir, small_dir, output_dir)
    class_names, labels, places, tested = label_paintings(
        found, settings.attribute, settings.lists_dir, settings.min_paintings)
    if settings.group_by == "artist":
        tested = None  # in ArtGAN's lists, most artists are in both parts
    run = find_earlier_run(settings, class_names)
    kept = run["split"] if run else None
    if run:
        labels, places = find_again(kept, found, places)
    split = split_paintings(labels, tested, settings.group_by, settings.seed, kept)
    if settings.epochs:
        torch.manual_seed(settings.seed)
        model = ArtClassifier(len(class_names), settings.dropout)
        if run:
            load_state(model, run.pop("model"), output_dir / "model_last.pth")
            note_saved(run, settings)
        else:
            load_resnet(model, settings.weights)

    bad = by_the_first(prepare, found, data_dir, small_dir)
    by_the_first(write_bad_files, bad, output_dir)
    gone = list_pictures(small_dir).keys() - set(map(small_name, found))
    report(sorted(gone), "small copies whose painting is gone")
    if bad:
        labels = {path: label for path, label in labels.items() if places[path] not in bad}
        split = split_paintings(labels, tested, settings.group_by, settings.seed, kept)
    report_split(split, class_names)
    if not run:
        source = f"drawn by {settings.group_by}" if tested is None else "that of the lists"
        run = {"class_names": class_names, "history": [], "split": split, "split_from": source,
               "artists": commonest_classes(split)}
    check_alike(split, run["history"])
    if settings.epochs:
        if settings.fresh:
            by_the_first(move_aside, output_dir)
        fit(model, run, split, places, settings)


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    parser = make_parser(__doc__, SETTINGS, __file__)
    parser.add_argument("--fresh", action="store_true",
                        help="start a new run; the files of the earlier one go into previous-1")
    return run_script(train, parser, SETTINGS, argv)


if __name__ == "__main__":
    sys.exit(main())
