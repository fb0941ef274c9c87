"""Measure preparing, training, evaluation and the start, beside a plain script and a ceiling.

    python tests/benchmark.py                    painted pictures of 800 x 640 pixels
    python tests/benchmark.py --folder wikiart   pictures of one's own, FOLDER/<Style>/<name>.jpg

Three rows, each in a process of its own, take turns for several rounds; medians are shown.

plain script   the same model, trained as one would first write it: originals decoded anew in
               every epoch, float32
this project   the passes of train_model.py once the ResNet is no longer frozen
ceiling        the same passes over one batch that is on the device already: nothing is loaded

The column "epochs" is computed, not measured: an epoch trains on 320 pictures (or --pictures, where
that is more), validates on an eighth as many and saves both checkpoints, at the rates of each
round; the ceiling saves nothing. Peaks are those of a row's process without its loaders.
With --folder too, the pictures of 1600 x 1280 pixels and the 81,446 files are painted ones.

By default it takes at most two minutes on two cores. It needs Linux and leaves nothing behind.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import math
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile
from torch import nn
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_model

CLASSES, WIKIART = 27, 81_446  # WikiArt's styles and paintings
EPOCH = 320  # pictures of the epochs that are computed, at the least
new_process = functools.partial(  # spawned, since CUDA does not outlive a fork
    ProcessPoolExecutor, max_workers=1, mp_context=multiprocessing.get_context("spawn"))
passes = {}  # in the process of a row: {kind: function of the number of steps}


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


def gather(folder, count, own=None, size=(800, 640)):
    """Fill a folder with painted originals, or with links to evenly chosen pictures of `own`.

    All names end in .jpg, for ImageFolder passes over other endings that train_model knows.
    """
    found = list(train_model.list_pictures(own)) if own else range(count)
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
    from torchvision import datasets, transforms  # train_model sees to it that this imports

    device, size = torch.device(options.device), options.image_size
    mean, std = train_model.IMAGENET_MEAN, train_model.IMAGENET_STD
    tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    central = [transforms.Resize(size), transforms.CenterCrop(size)]
    train_loader, test_loader = (
        DataLoader(Subset(datasets.ImageFolder(options.originals,
                                               transforms.Compose(steps + tensor)), range(count)),
                   options.batch_size, shuffle=steps is varied, num_workers=options.workers,
                   pin_memory=device.type == "cuda",
                   persistent_workers=options.workers > 0)  # to start them weighs in short epochs
        for steps, count in ((varied, options.pictures), (central, 2 * options.pictures)))
    model = train_model.ArtClassifier(CLASSES).to(device)
    model.features.mean.zero_()  # the transforms normalize
    model.features.std.fill_(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def train(steps):
        model.train()
        total = 0
        for images, labels in itertools.islice(train_loader, steps):
            images, labels = images.to(device), labels.to(device)
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    @torch.no_grad()
    def evaluate(steps):
        model.eval()
        right = 0
        for images, labels in itertools.islice(test_loader, steps):
            right += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()

    def save(_):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, options.originals.with_name("plain.pth"))

    return {"training": train, "evaluation": evaluate, "saving": save}


def as_torchvision(model):
    """Return a copy that evaluates as torchvision's ResNet does: eager, in place, norms apart."""
    plain = copy.deepcopy(model).eval()
    plain.features.resnet.relu.inplace = True
    for module in plain.modules():
        if isinstance(module, train_model.ResidualBlock):
            module.__class__ = train_model.Bottleneck
    return plain


def this_project(options, in_memory=False):
    """Return passes by train_model's functions, over small copies or one batch in memory."""
    device, precision = train_model.choose_device()
    model = train_model.to_device(
        train_model.ArtClassifier(CLASSES, dropout=0.3), device, precision)
    optimizer = train_model.make_optimizer(model, 1e-5, 1, 0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    paths = list(train_model.list_pictures(options.originals))
    labels = [number % CLASSES for number in range(len(paths))]
    paintings = train_model.Paintings(options.small_dir, paths, labels, options.image_size)
    batches, epochs = train_model.Batches(options.batch_size), itertools.count(1)
    workers = 0 if in_memory else options.workers
    loader = train_model.make_loader(paintings, batches, workers, device)
    if in_memory:
        batches.keep_order(range(options.batch_size))
        batch = [part.to(device) for part in next(iter(loader))]
        nothing = defaultdict(int)  # a data set without work; all keys of a batch become `batch`
        loader = DataLoader(nothing, batch_sampler=batches, collate_fn=lambda _: batch)

    def train(steps):
        batches.shuffle(range(steps * options.batch_size), next(epochs))
        model.start_training(frozen=False)
        train_model.train_epoch(model, loader, optimizer, scaler, [1.0] * steps, "")

    def evaluate(steps, fold=train_model.fold_norms):
        batches.keep_order(range(steps * options.batch_size))
        train_model.evaluate(fold(model), loader, "")

    def save(_):
        settings = argparse.Namespace(output_dir=options.originals.parent, epochs=1, fresh=False)
        split = {part: dict(zip(paths, labels)) for part in train_model.PARTS}
        run = {"class_names": [str(label) for label in range(CLASSES)], "split": split,
               "split_from": "", "artists": {}, "settings": {}, "versions": {},
               "history": [{"validation_accuracy": 0.0}]}  # the best so far
        train_model.save_run(run, model, optimizer, scaler, settings)

    if in_memory:
        other = functools.partial(evaluate, fold=as_torchvision)
        return {"training": train, "evaluation": evaluate, "torchvision": other}
    return {"training": train, "evaluation": evaluate, "saving": save}


ROWS = {"plain script": plain_script, "this project": this_project,
        "ceiling": functools.partial(this_project, in_memory=True)}


def set_up(row, options):
    """Build the passes of a row in its process, warm them up, and return their kinds."""
    passes.update(ROWS[row](options))
    for kind in passes:
        measure(kind, 1, options)
    return list(passes)


def measure(kind, steps, options):
    """Return the paintings per second of a pass of so many steps; evaluating, of twice as many."""
    steps *= 2 if kind in ("evaluation", "torchvision") else 1
    wait = torch.cuda.synchronize if options.device == "cuda" else int
    wait()
    os.sync()  # what other rows saved is not for this one to wait for
    begun = time.perf_counter()
    passes[kind](steps)
    wait()
    return steps * options.batch_size / (time.perf_counter() - begun)


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
    """Return {(row, kind): [paintings per second]}, a value a round, and {row: peaks}."""
    steps = options.pictures // options.batch_size
    with contextlib.ExitStack() as stack:
        pools = {row: stack.enter_context(new_process()) for row in ROWS}
        for pool in pools.values():
            pool.submit(int)  # they import what they need side by side
        rates = {(row, kind): [] for row, pool in pools.items()
                 for kind in pool.submit(set_up, row, options).result()}
        turns = sorted(rates, key=lambda turn: turn[1])  # the rows of a kind after one another
        for number in range(options.rounds):
            for row, kind in turns if number % 2 else reversed(turns):
                rates[row, kind].append(pools[row].submit(measure, kind, steps, options).result())
        return rates, {row: pool.submit(end).result() for row, pool in pools.items()}


# ----------------------------------------------------------------------------- preparing and start


def measure_preparing(folder, rounds):
    """Return the rates of prepare() on the originals, on large ones, and on those without draft.

    It leaves the small copies of the originals in small-0.
    """
    gather(folder / "large", 16 * train_model.cores(), size=(1600, 1280))
    draft, rates = JpegImageFile.draft, []
    ways = [("originals", draft), ("large", draft), ("large", lambda *_: None)]
    for name, JpegImageFile.draft in ways * 2 * rounds:
        found, small_dir = train_model.list_pictures(folder / name), folder / f"small-{len(rates)}"
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            if bad := train_model.prepare(found, folder / name, small_dir):
                raise ValueError(f"pictures cannot be used: {bad}")
        rates.append(len(found) / (time.perf_counter() - begun))
    return [median(rates[way::len(ways)]) for way in range(len(ways))]


def link_wikiart(folder):
    """Make as many originals and small copies as WikiArt has, all links to a file a style."""
    for style in range(CLASSES):  # file systems allow some 65,000 links to one file
        places = [folder / kind / f"style-{style}" for kind in ("data", "small")]
        for place in places:
            place.mkdir(parents=True)
        paint(folder / f"{style}.jpg", (320, 320))
        for number, place in itertools.product(range(style, WIKIART, CLASSES), places):
            os.link(folder / f"{style}.jpg", place / f"artist-{number % 1119}_title-{number}.jpg")


def measure_start(folder):
    """Return the seconds and MB that EPOCHS = 0 takes over the imports alone."""
    before, begun = peaks()[0], time.perf_counter()
    flags = [f"--{name}-dir={folder / name}" for name in ("data", "small", "output", "lists")]
    with contextlib.redirect_stdout(io.StringIO()):
        if train_model.main(["--epochs=0", *flags]):
            raise RuntimeError("EPOCHS = 0 failed")
    return time.perf_counter() - begun, peaks()[0] - before


# -------------------------------------------------------------------------------------------- main


def read_flags():
    """Return the flags, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[CUDA where it is there]")
    parser.add_argument("--folder", type=Path, help="pictures of one's own, in folders")
    parser.add_argument("--pictures", type=int,
                        help="in a pass of training; evaluation takes twice as many "
                        "[32 on a CPU, 4096 on CUDA]")
    parser.add_argument("--batch-size", type=int,
                        help="pictures in a step [16 on a CPU, 128 on CUDA]")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels [224]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each row [3]")
    parser.add_argument("--workers", type=int, default=train_model.cores(),
                        help="processes that load pictures, for each row [one per core]")
    parser.add_argument("--skip-start", action="store_true",
                        help="do not measure the start with 81,446 files")
    options = parser.parse_args()
    if options.folder and not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for choose_device(), in the rows too
    device, options.precision = train_model.choose_device()
    if options.device not in (None, device.type):
        parser.error("there is no CUDA here")
    options.device = device.type
    pictures, batch_size = (4096, 128) if device.type == "cuda" else (32, 16)
    options.pictures = options.pictures or pictures
    options.batch_size = options.batch_size or batch_size
    return options


def print_header(options):
    """Print what the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    print(f"{date.today()}  python {shlex.join(sys.argv)}")
    print(f"{cpu.strip()[2:] or 'CPU'}, {train_model.cores()} cores, {gpu}; this project in "
          f"{options.precision or torch.float32}")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision "
          f"{train_model.torchvision.__version__}, Pillow {PIL.__version__}")
    print(f"{options.pictures} pictures in training, {2 * options.pictures} in evaluation, image "
          f"size {options.image_size}, batch size {options.batch_size}, {options.workers} loaders, "
          f"{options.rounds} rounds, load average {os.getloadavg()[0]:.1f} at the start\n")


def print_ratio(title, ours, others):
    """Print how one row's rates compare, round by round: median, least and most."""
    shares = [our / other for our, other in zip(ours, others)]
    print(f"{title:48}{median(shares):.3f}  ({min(shares):.3f} to {max(shares):.3f})")


def print_table(rates, memory, preparing, pictures):
    """Print the rows, and the rates as shares of one another."""
    for row in memory:
        trained, evaluated = rates[row, "training"], rates[row, "evaluation"]
        saved = rates.get((row, "saving"), [math.inf] * len(trained))
        share = pictures / max(pictures, EPOCH)  # of the time to save that falls on a pass
        rates[row, "epochs"] = [1 / (1 / train + 1 / 8 / evaluate + share / save)
                                for train, evaluate, save in zip(trained, evaluated, saved)]
    print("paintings/s    preparing  training  evaluation  epochs   peak RAM   peak GPU")
    for row, (ram, gpu) in memory.items():
        print(f"{row:12} {f'{preparing:.1f}' if row == 'this project' else '-':>11}"
              f"{median(rates[row, 'training']):10.1f}{median(rates[row, 'evaluation']):12.1f}"
              f"{median(rates[row, 'epochs']):8.1f}"
              f"{ram:8.0f} MB" + (f"{gpu:8.0f} MB" if gpu else f"{'-':>11}"))
    print("\nratios of the rates, round by round: median (lowest to highest)")
    for kind in ("training", "evaluation", "epochs"):
        for row in ("plain script", "ceiling"):
            print_ratio(f"{kind}, this project / {row}:",
                        rates["this project", kind], rates[row, kind])
    print_ratio("evaluation, ceiling / torchvision's ResNet:",
                rates["ceiling", "evaluation"], rates["ceiling", "torchvision"])
    seconds = pictures / median(rates["this project", "saving"])
    print(f"\nsaving both checkpoints after an epoch: {seconds:.2f} s")


def main():
    """Measure, and print the table."""
    options = read_flags()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        options.originals, options.small_dir = folder / "originals", folder / "small-0"
        options.pictures = gather(options.originals, 2 * options.pictures, options.folder) // 2
        if not options.pictures:
            sys.exit(f"error: {options.folder} holds fewer than two pictures in its folders")
        options.batch_size = min(options.batch_size, options.pictures)
        options.pictures -= options.pictures % options.batch_size  # so that all steps are alike
        print_header(options)
        with new_process() as pool:
            preparing, large, whole = pool.submit(
                measure_preparing, folder, options.rounds).result()
        print_table(*take_turns(options), preparing, options.pictures)
        print(f"preparing originals of 1600 x 1280: {large:.1f} paintings/s, and "
              f"{whole:.1f} where every pixel is decoded")
        if not options.skip_start:
            link_wikiart(folder)
            with new_process() as pool:
                seconds, megabytes = pool.submit(measure_start, folder).result()
            print(f"EPOCHS = 0 with {WIKIART:,} small copies ready: {seconds:.2f} s and "
                  f"{megabytes:.0f} MB more than the imports")


if __name__ == "__main__":
    main()
