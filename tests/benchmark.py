"""Measure preparing, training, evaluation and the start, beside a plain script and a ceiling.

    python tests/benchmark.py                    painted pictures of 800 x 640 pixels
    python tests/benchmark.py --folder wikiart   pictures of one's own, FOLDER/<Style>/<name>.jpg

Three rows, each in a process of its own, take turns for several rounds; medians are shown.

plain script   the same model, trained as one would first write it: originals decoded anew in
               every epoch, float32
this project   the passes of train_model.py once the ResNet is no longer frozen
ceiling        the same passes over one batch that is on the device already: nothing is loaded

The column "epochs" is computed, not measured: an epoch trains on 320 pictures (or --pictures, where
that is more), validates on an eighth as many and saves both checkpoints, at the speed of each
round; the ceiling saves nothing. Peaks are those of a row's process without its loaders.
With --folder too, the pictures of 1600 x 1280 pixels and the 81,446 files are painted ones.

It takes some minutes on two cores, needs Linux and leaves nothing behind. It measures CUDA where it
is there, and the CPU with CUDA_VISIBLE_DEVICES= before the command.
"""

import argparse
import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_model

CLASSES, WIKIART = 27, 81_446  # WikiArt's styles and paintings
EPOCH = 320  # pictures of the epochs that are computed, at the least
quietly = functools.partial(contextlib.redirect_stdout, io.StringIO())
new_process = functools.partial(  # spawned, since CUDA does not outlive a fork
    ProcessPoolExecutor, max_workers=1, mp_context=multiprocessing.get_context("spawn"))
passes = {}  # in the process of a row: {(row, kind): function}


def paint(path, size):
    """Write a JPEG of gradients, shapes and grain, about as large as one of a painting."""
    rng = np.random.default_rng(int(path.stem))
    hues = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(hues).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for shape in [draw.ellipse, draw.rectangle, draw.line] * 5:
        corners = np.sort(rng.integers(0, size, (2, 2)), axis=0).ravel().tolist()
        shape(corners, fill=tuple(rng.integers(0, 256, 3).tolist()), width=3)
    grain = 11 * rng.standard_normal((*size[::-1], 3), dtype=np.float32)
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def find(folder):
    """Return the pictures, "Style/name.jpg", in a folder."""
    with quietly():
        return train_model.find_paintings(folder)


def gather(folder, count, own=None, size=(800, 640)):
    """Fill a folder with painted originals, or with links to evenly chosen pictures of `own`.

    All names end in .jpg, since ImageFolder skips other endings that train_model knows.
    """
    found = list(find(own)) if own else range(count)
    files = [folder / f"style-{number % 4}" / f"{number}.jpg"
             for number in range(min(count, len(found)))]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        if own:
            file.symlink_to((own / found[number * len(found) // len(files)]).resolve())
    if not own:
        with ThreadPool(train_model.cores()) as pool:
            pool.map(functools.partial(paint, size=size), files)
    return len(files)


# -------------------------------------------------------------------------------------------- rows


def plain_script(options):
    """Return passes over the originals, as an ordinary script has them."""
    device, size = "cuda" if torch.cuda.is_available() else "cpu", options.image_size
    normal = transforms.Normalize(train_model.IMAGENET_MEAN, train_model.IMAGENET_STD)
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    central = [transforms.Resize(size), transforms.CenterCrop(size)]
    train_loader, test_loader = (
        DataLoader(Subset(datasets.ImageFolder(options.originals, transforms.Compose(
                       [*steps, transforms.ToTensor(), normal])), range(count)),
                   options.batch_size, shuffle=steps is varied, num_workers=options.workers,
                   pin_memory=device == "cuda",
                   persistent_workers=options.workers > 0)  # to start them weighs in short epochs
        for steps, count in ((varied, options.pictures), (central, 2 * options.pictures)))
    model = train_model.ArtClassifier(CLASSES).to(device)
    model.features.mean.zero_()  # the transforms normalize
    model.features.std.fill_(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def train():
        model.train()
        total = 0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    @torch.no_grad()
    def evaluate():
        model.eval()
        right = 0
        for images, labels in test_loader:
            right += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, options.originals.with_name("plain.pth"))

    return {"training": train, "evaluation": evaluate, "saving": save}


class InMemory:
    """A loader whose batches are one and the same, on the device already."""

    def __init__(self, loader, device):
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler
        self.batch = [part.to(device) for part in next(iter(loader))]

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        return itertools.repeat(self.batch, len(self))


def this_project(options, in_memory=False):
    """Return passes by train_model's functions, over resized copies or one batch in memory."""
    model = train_model.ArtClassifier(CLASSES, dropout=0.3)
    device = train_model.place_on_device(model)
    optimizer = train_model.make_optimizer(model, 1e-5, 1, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision is torch.float16)
    labels = {path: number % CLASSES for number, path in enumerate(find(options.originals))}
    with quietly():  # they are there
        copies, _ = train_model.resize_paintings(
            list(labels), options.originals, options.cache_dir, options.image_size)
    settings, loaders = argparse.Namespace(**vars(options)), []
    settings.workers = 0 if in_memory else options.workers
    for count, seed in ((options.pictures, 0), (2 * options.pictures, None)):
        chosen = {path: labels[path] for path in list(labels)[:count]}
        loader = train_model.make_loader(chosen, copies, settings, device, seed)
        loader.batch_sampler.epoch = 0
        loaders.append(InMemory(loader, device) if in_memory else loader)
    train_loader, test_loader = loaders

    def train():
        train_loader.batch_sampler.epoch += 1
        model.start_training(pretrained=True, frozen=False)
        train_model.train_epoch(model, train_loader, optimizer, schedule, scaler, "")

    def evaluate():
        train_model.evaluate(model, test_loader, "")

    def save():
        row = {"epoch": 1, "validation_accuracy": 0.0}  # the best so far
        run = {"class_names": [], "split": dict.fromkeys(train_model.PARTS, labels),
               "history": [row]}
        train_model.save_epoch(run, model, optimizer, scaler, options.originals.parent)

    kinds = {"training": train, "evaluation": evaluate}
    return kinds if in_memory else kinds | {"saving": save}


ROWS = {"plain script": plain_script, "this project": this_project,
        "ceiling": functools.partial(this_project, in_memory=True)}


def set_up(row, options):
    """Build the passes of a row in its process, warm them up, and return their kinds."""
    kinds = ROWS[row](options)
    passes.update({(row, kind): function for kind, function in kinds.items()})
    for kind in kinds:
        measure(row, kind)
    return list(kinds)


def measure(row, kind):
    """Return the seconds that a pass takes."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    os.sync()  # what other rows saved is not for this one to wait for
    begun = time.perf_counter()
    passes[row, kind]()
    wait()
    return time.perf_counter() - begun


def peaks():
    """Return the MB that this process, without its loaders, has held at most: RAM and GPU."""
    status = Path("/proc/self/status").read_text()  # getrusage() would count the parent's too
    ram = int(status.partition("VmHWM:")[2].split()[0])
    return ram / 1024, torch.cuda.max_memory_allocated() / 2**20


def end():
    """Return the peaks of a row, and end its loaders, which then clear up after themselves."""
    passes.clear()
    return peaks()


def take_turns(options):
    """Return {(row, kind): [seconds of a pass]}, one a round, and {row: peaks}."""
    with contextlib.ExitStack() as stack:
        pools = {row: stack.enter_context(new_process()) for row in ROWS}
        for pool in pools.values():
            pool.submit(int)  # they import what they need side by side
        seconds = {(row, kind): [] for row, pool in pools.items()
                   for kind in pool.submit(set_up, row, options).result()}
        turns = sorted(seconds, key=lambda turn: turn[1])  # the rows of a kind after one another
        for number in range(options.rounds):
            for turn in turns if number % 2 else reversed(turns):
                seconds[turn].append(pools[turn[0]].submit(measure, *turn).result())
        return seconds, {row: pool.submit(end).result() for row, pool in pools.items()}


# ----------------------------------------------------------------------------- preparing and start


def measure_preparing(folder, options):
    """Return the rates of preparing the originals, large ones, and these without draft.

    It leaves the resized copies of the originals in cache-0.
    """
    gather(folder / "large", 16 * train_model.cores(), size=(1600, 1280))
    draft, rates = JpegImageFile.draft, []
    ways = [("originals", draft), ("large", draft), ("large", lambda *_: None)]
    for name, JpegImageFile.draft in ways * 2 * options.rounds:
        found, cache_dir = find(folder / name), folder / f"cache-{len(rates)}"
        begun = time.perf_counter()
        with quietly():
            _, bad = train_model.resize_paintings(
                found, folder / name, cache_dir, options.image_size)
        if bad:
            raise ValueError(f"pictures cannot be used: {bad}")
        rates.append(len(found) / (time.perf_counter() - begun))
    JpegImageFile.draft = draft
    return [median(rates[way::len(ways)]) for way in range(len(ways))]


def make_wikiart(folder, options):
    """Fill folder/data and folder/cache with as many originals and resized copies as WikiArt has.

    They are links to one JPEG a style, which file systems allow some 65,000 of.
    """
    data, cache = folder / "data", folder / "cache"
    for style in range(CLASSES):
        (data / f"style-{style}").mkdir(parents=True)
        paint(folder / f"{style}.jpg", (320, 320))
    for number in range(WIKIART):
        style = number % CLASSES
        name = f"artist-{number % 1119}_title-{number}.jpg"
        os.link(folder / f"{style}.jpg", data / f"style-{style}" / name)

    def find_jpeg(original, _):
        return folder / f"{original.parent.name.removeprefix('style-')}.jpg"

    with quietly(), mock.patch.multiple(train_model, encode_copy=find_jpeg,
                                        write_atomically=lambda copy, jpeg: os.link(jpeg, copy)):
        copies, bad = train_model.resize_paintings(find(data), data, cache, options.image_size)
    if bad or len(copies) < WIKIART:
        raise ValueError(f"copies cannot be made: {bad}")


def measure_start(folder, options):
    """Return the seconds and MB that EPOCHS = 0 takes over the imports, after `make_wikiart`."""
    before = peaks()[0]
    begun = time.perf_counter()
    with mock.patch.object(train_model, "encode_copy", None), quietly():  # no copy is made
        code = train_model.main([
            "--epochs=0", "--lists-dir=none", f"--image-size={options.image_size}",
            f"--data-dir={folder / 'data'}", f"--cache-dir={folder / 'cache'}",
            f"--output-dir={folder / 'output'}"])
    if code or (folder / "output/bad_files.txt").read_text():
        raise RuntimeError("EPOCHS = 0 failed")
    return time.perf_counter() - begun, peaks()[0] - before


# -------------------------------------------------------------------------------------------- main


def read_flags():
    """Return the flags, with what depends on the device filled in."""
    pictures, batch_size = (4096, 128) if torch.cuda.is_available() else (32, 16)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="pictures of one's own, in folders")
    for name, default, words in (
        ("pictures", pictures, "in a pass of training; evaluation takes twice as many"),
        ("batch-size", batch_size, "pictures in a step"),
        ("image-size", 224, "in pixels"),
        ("rounds", 3, "turns of each row"),
        ("workers", train_model.cores(), "processes that load pictures, for each row"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} [{default}]")
    parser.add_argument("--skip-start", action="store_true",
                        help="do not measure the start with 81,446 files")
    return parser.parse_args()


def print_header(options):
    """Print what the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    probe = nn.Identity()
    train_model.place_on_device(probe)
    print(f"{date.today()}  python {shlex.join(sys.argv)}")
    print(f"{cpu.strip()[2:] or 'CPU'}, {train_model.cores()} cores, {gpu}; this project in "
          f"{getattr(probe, 'precision', torch.float32)}")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, Pillow {PIL.__version__}")
    print(f"{options.pictures} pictures in training, {2 * options.pictures} in evaluation, image "
          f"size {options.image_size}, batch size {options.batch_size}, {options.workers} loaders, "
          f"{options.rounds} rounds, load average {os.getloadavg()[0]:.1f} at the start\n")


def print_table(seconds, memory, preparing, pictures):
    """Print the rates of the rows, and as shares of one another."""
    rates, epoch = {}, max(pictures, EPOCH)
    for row in memory:
        rates[row, "training"] = [pictures / second for second in seconds[row, "training"]]
        rates[row, "evaluation"] = [2 * pictures / second for second in seconds[row, "evaluation"]]
        rates[row, "epochs"] = [
            epoch / (epoch / train + epoch / 8 / evaluate + save) for train, evaluate, save in zip(
                rates[row, "training"], rates[row, "evaluation"],
                seconds.get((row, "saving"), itertools.repeat(0)))]
    kinds = ("training", "evaluation", "epochs")
    print("paintings/s    preparing  training  evaluation  epochs   peak RAM   peak GPU")
    for row, (ram, gpu) in memory.items():
        train, evaluate, epochs = (median(rates[row, kind]) for kind in kinds)
        print(f"{row:12} {f'{preparing:.1f}' if row == 'this project' else '-':>11}{train:10.1f}"
              f"{evaluate:12.1f}{epochs:8.1f}{ram:8.0f} MB"
              + (f"{gpu:8.0f} MB" if gpu else f"{'-':>11}"))
    print("\nratios of the rates, round by round: median (lowest to highest)")
    for kind, row in itertools.product(kinds, ("plain script", "ceiling")):
        shares = [our / other for our, other in zip(rates["this project", kind], rates[row, kind])]
        print(f"{f'{kind}, this project / {row}:':42}{median(shares):.3f}  "
              f"({min(shares):.3f} to {max(shares):.3f})")
    print(f"\nsaving both checkpoints after an epoch: "
          f"{median(seconds['this project', 'saving']):.2f} s")


def main():
    """Measure, and print the table."""
    options = read_flags()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        options.originals, options.cache_dir = folder / "originals", folder / "cache-0"
        options.pictures = gather(options.originals, 2 * options.pictures, options.folder) // 2
        if not options.pictures:
            sys.exit(f"error: {options.folder} holds fewer than two pictures in its folders")
        options.batch_size = min(options.batch_size, options.pictures)
        options.pictures -= options.pictures % options.batch_size  # so that all steps are alike
        print_header(options)
        preparing, large, whole = measure_preparing(folder, options)
        print_table(*take_turns(options), preparing, options.pictures)
        print(f"preparing originals of 1600 x 1280: {large:.1f} paintings/s, and "
              f"{whole:.1f} where every pixel is decoded")
        if not options.skip_start:
            make_wikiart(folder, options)
            with new_process() as pool:
                seconds, megabytes = pool.submit(measure_start, folder, options).result()
            print(f"EPOCHS = 0 with {WIKIART:,} resized copies ready: {seconds:.2f} s and "
                  f"{megabytes:.0f} MB more than the imports")


if __name__ == "__main__":
    main()
