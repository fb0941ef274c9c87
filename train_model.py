"""Train a painting classifier, a ResNet-50 whose feature map an LSTM reads, on ArtGAN's WikiArt.

    python train_model.py           train on the styles; run it again to resume
    python train_model.py --help    every setting below as a flag

Reads DATA_DIR/<Style>/<artist>_<title>.jpg and, if they exist, ArtGAN's lists in LISTS_DIR. Writes
resized copies to CACHE_DIR and everything else to OUTPUT_DIR. The calls of a run in their order,
which is nearly that of the file, though the baseline comes first:

    main                      settings: the constants below, and flags
      run_training
        set_up_run            a new run, or the one to resume:
          find_paintings        "Style/name.jpg" of each
          read_lists            {path: label}; without lists, label_by_folder_or_artist
          split_paintings       {"train": {path: label}, "validation": ..., "test": ...}
        prepare_paintings     {path: resized copy}; bad_files.txt, crops.jpg
        train                 in each epoch:
          train_epoch           batch -> ArtClassifier -> loss -> AdamW
          evaluate              logits of the validation paintings
          save_epoch            model_last.pth, model_best.pth, history.csv, class_names.txt
"""

import argparse
import contextlib
import csv
import ctypes
import errno
import functools
import hashlib
import io
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- settings
# Edit them here, or give any of them as a flag for one run: EPOCHS as --epochs, and so on.

EPOCHS = 20  # passes over the training paintings; 0 checks and prepares the data only
ATTRIBUTE = "style"  # what to classify: style, artist, genre, or any name with lists in LISTS_DIR
DATA_DIR = "wikiart"  # the unzipped originals, one folder per style; never written to
LISTS_DIR = "wikiart_csv"  # ArtGAN's lists, used if the folder exists; "none" goes without
CORRECTIONS = "corrections.csv"  # CSV, path and class: relabels a new run, if the file exists
CACHE_DIR = "wikiart_cache"  # resized copies of the paintings, and nothing else
OUTPUT_DIR = "."  # checkpoints, tables, the page: all that the two scripts write
GROUP_BY = "painting"  # "artist" keeps all paintings of an artist in one part of the split
MIN_PAINTINGS = 30  # fewest paintings for an artist to be a class, without lists
WEIGHTS = "imagenet"  # initial weights of the ResNet: "imagenet" (98 MB download), "none", a file
BATCH_SIZE = 64  # paintings per step, over all processes
IMAGE_SIZE = 224  # height and width of the model's input in pixels, 64 to 512
LEARNING_RATE = 1e-3  # peak rate of the LSTM and the linear layer
BACKBONE_RATE = 0.1  # the ResNet's rate as a share of it, if the ResNet is pretrained
FROZEN_EPOCHS = 1  # epochs before a pretrained ResNet is unfrozen
WARMUP_EPOCHS = 0.5  # linear warm-up at the start, and again where the ResNet is unfrozen
WEIGHT_DECAY = 0.05  # of AdamW, on matrices and convolutions
DROPOUT = 0.3  # of the LSTM's averaged outputs
WORKERS = -1  # processes that load pictures; 0 loads in the main process, -1 chooses
SEED = 0  # of the split, the order, the crops and the initial weights

SETTINGS = [name for name in globals() if name.isupper()]

# ------------------------------------------------------------------------------------------- model

CHANNELS, LSTM_UNITS = 2048, 256  # of ResNet-50's feature map; of the LSTM in each direction
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in 0..1


class FeatureExtractor(nn.Module):
    """ResNet-50 (He et al. 2016, arXiv 1512.03385) without its pooling and its classifier."""

    def __init__(self):
        super().__init__()
        *layers, _, _ = resnet50().named_children()  # all but avgpool and fc
        self.resnet = nn.Sequential(OrderedDict(layers))
        fuse_fixed_norms(self.resnet)
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
        self.precision = None  # of the ResNet: bfloat16 or float16, or None for float32

    def forward(self, images):
        """Turn images (B, 3, H, W) of 0..255 into logits (B, classes)."""
        with torch.autocast(images.device.type, self.precision, self.precision is not None):
            feature_map = self.features(images)  # (B, 2048, H/32, W/32)
        return self.read_rows(feature_map.to(self.lstm.weight_ih_l0.dtype))  # (B, classes)

    def read_rows(self, feature_map):
        """Turn a feature map (B, 2048, rows, columns) into logits (B, classes)."""
        rows = feature_map.mean(3).transpose(1, 2)  # (B, rows, 2048), the top row first
        outputs, _ = self.lstm(rows)  # (B, rows, 512), read downwards and upwards
        return self.linear(self.dropout(outputs.mean(1)))  # (B, classes)

    def start_training(self, pretrained, frozen):
        """Set training mode: pretrained batch norms stay fixed, a frozen ResNet does as a whole."""
        self.train()
        self.features.train(not pretrained)
        self.features.requires_grad_(not frozen)


def fuse_fixed_norms(network):
    """Let each convolution of a ResNet do the work of its batch norm, by `convolve`."""
    layers = [layer for layer in network.modules() if type(layer) in (nn.Conv2d, nn.BatchNorm2d)]
    for conv, norm in zip(layers[::2], layers[1::2]):  # they stand in turn
        conv.forward = functools.partial(convolve, conv, norm)
        norm.forward = nn.Identity().forward


def convolve(conv, norm, images):
    """Return the output of a convolution and its batch norm, in one step if the norm is fixed."""
    if norm.training:
        return nn.BatchNorm2d.forward(norm, nn.Conv2d.forward(conv, images))
    # Without the map between the two, backward needs half the memory (arXiv 2305.11624).
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    return conv._conv_forward(images, conv.weight * scale.view(-1, 1, 1, 1), bias)


# ---------------------------------------------------------------------------------------- training

PARTS = ("train", "validation", "test")


def run_training(settings):
    """Set up a run or resume one, prepare its paintings, and train."""
    with lock_folder(settings.output_dir) if RANK == 0 else contextlib.nullcontext():
        run, model, found = broadcast_from_first(set_up_run, settings)
        split, copies = broadcast_from_first(prepare_paintings, run, found, settings)
        if len(run["history"]) < settings.epochs:
            train(run, model, split, copies, settings)
        if settings.epochs:
            print_end(run["history"], settings)
        else:
            print(f"ready: look at {printable(settings.output_dir / 'crops.jpg')}, then train")


def train(run, model, split, copies, settings):
    """Train {part: {path: label}} from the epoch that the run has reached on, and save each."""
    history, pretrained = run["history"], run["settings"]["WEIGHTS"] != "none"
    frozen_epochs = settings.frozen_epochs if pretrained else 0
    device = place_on_device(model)
    run["device"] = f"{device}, {model.precision or torch.float32}"
    optimizer = make_optimizer(model, settings.learning_rate,
                               settings.backbone_rate if pretrained else 1, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision is torch.float16)
    loader = make_loader(split["train"], copies, settings, device, settings.seed)
    validation_loader = make_loader(split["validation"], copies, settings, device)
    iter(validation_loader)  # starts its workers while there is little memory to share with them
    if history:
        print(f"resuming after epoch {len(history)}")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": run.pop("optimizer")})
        scaler.load_state_dict(run.pop("scaler") or scaler.state_dict())
    first, steps = len(history) * len(loader) + 0.5, len(loader)  # the middle of a step
    rate = functools.partial(rate_at, epochs=settings.epochs, frozen_epochs=frozen_epochs,
                             warmup_epochs=settings.warmup_epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate((first + step) / steps))
    labels = torch.tensor(list(split["validation"].values()))
    print(f"device {run['device']}, loader processes: {loader.num_workers}")
    print("   epoch  training loss  validation loss  accuracy  paintings/s  left (*: best)")
    for epoch in range(len(history) + 1, settings.epochs + 1):
        title, begun = f"epoch {epoch}/{settings.epochs}", time.perf_counter()
        torch.manual_seed(zlib.crc32(f"{settings.seed} {epoch} {RANK}".encode()))  # of dropout
        loader.batch_sampler.epoch = epoch
        model.start_training(pretrained, frozen=epoch <= frozen_epochs)
        joint = model if WORLD_SIZE == 1 else nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True)
        joint.broadcast_buffers = False  # as an argument it warns
        loss, margins = train_epoch(joint, loader, optimizer, schedule, scaler, title)
        speed = len(split["train"]) / (time.perf_counter() - begun)
        logits = evaluate(model, validation_loader, f"{title}, validation")
        history.append({
            "epoch": epoch, "training_loss": loss,
            "validation_loss": nn.functional.cross_entropy(logits, labels).item(),
            "validation_accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "learning_rate": settings.learning_rate * rate(epoch - 0.5 / steps),
            "paintings_per_second": speed, "seconds": time.perf_counter() - begun})
        if epoch <= max(2, run["planned_epochs"] // 2):  # labels are memorised later (2001.10528)
            update_margins(run["margins"], split["train"], margins, restart=epoch <= 2)
        if best_epoch(history) == epoch:
            update_margins(run["margins"], split["validation"], label_margins(logits, labels), True)
        broadcast_from_first(save_epoch, run, model, optimizer, scaler, settings.output_dir)
        print_epoch(history, settings.epochs)


def train_epoch(model, loader, optimizer, schedule, scaler, title):
    """Train on each batch once; return the mean loss and `label_margins` (N, 3) of each."""
    device = next(model.parameters()).device
    loss_sum, seen, margins = torch.zeros((), device=device), 0, []
    with progress_bar(title, len(loader.dataset)) as bar:
        for step, ((pixels, labels), size) in enumerate(zip(loader, loader.batch_sampler.sizes), 1):
            labels = labels.to(device, non_blocking=labels.is_pinned())
            logits = model(to_images(pixels, device))
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            optimizer.zero_grad()
            scaler.scale(loss * (WORLD_SIZE / size)).backward()  # processes average gradients
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            margins.append(label_margins(logits.detach(), labels))
            loss_sum += loss.detach()
            seen += size
            if step % 20 == 0 or step == len(loader):  # each time it waits for the device
                mean = loss_sum.item() * WORLD_SIZE / seen
                if not math.isfinite(mean) or scaler.get_scale() < 1:  # fp16 skips every step
                    raise InputError(f"{title}, batch {step}: the loss or its gradient is not "
                                     "finite, so nothing is saved: lower LEARNING_RATE")
                bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            bar.update(size)
    if WORLD_SIZE > 1:
        distributed.all_reduce(loss_sum)
        for buffer in model.buffers():  # the batch norms of the first process are saved
            distributed.broadcast(buffer, 0)
    return loss_sum.item() / seen, gather(margins, loader)


@torch.inference_mode()
def evaluate(model, loader, title):
    """Return the logits (N, classes) of a loader's paintings, on the CPU, in their order."""
    device, logits = next(model.parameters()).device, []
    loader.batch_sampler.epoch = 0
    model.eval()
    with progress_bar(title, len(loader.dataset)) as bar:
        for (pixels, _), size in zip(loader, loader.batch_sampler.sizes):
            logits.append(model(to_images(pixels, device)))
            bar.update(size)
    logits = gather(logits, loader)
    if not logits.isfinite().all():
        raise InputError(f"{title}: outputs are not finite: lower LEARNING_RATE")
    return logits


def label_margins(logits, labels):
    """Return (N, 3): log probabilities of the label and of the best other class, and that class."""
    labels, logs = labels[:, None], logits.log_softmax(1)
    others = logs.scatter(1, labels, -torch.inf).argmax(1, keepdim=True)
    return torch.cat([logs.gather(1, labels), logs.gather(1, others), others], 1)


def update_margins(means, paths, margins, restart):
    """Update {path: [mean log probabilities of label and other, other label, epochs]}."""
    for path, (*values, other) in zip(paths, margins.tolist()):
        *former, _, epochs = (None if restart else means.get(path)) or (0.0, 0.0, 0, 0)
        new = [mean + (value - mean) / (epochs + 1) for mean, value in zip(former, values)]
        means[path] = [*new, int(other), epochs + 1]


def best_epoch(history):
    """Return the epoch, from 1, of the highest validation accuracy, the first of equals."""
    return max(history, key=lambda row: row["validation_accuracy"])["epoch"]


def make_optimizer(model, learning_rate, backbone_rate, weight_decay):
    """Return AdamW with a smaller rate for the ResNet, and no decay of norms and biases."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[name.startswith("features."), parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW([
        {"params": parameters, "lr": learning_rate * (backbone_rate if backbone else 1),
         "weight_decay": weight_decay if matrix else 0.0}
        for (backbone, matrix), parameters in groups.items()],
        fused=next(model.parameters()).is_cuda or None)  # else it waits for the device in fp16


def rate_at(progress, epochs, frozen_epochs, warmup_epochs):
    """Return the share of the peak rate after `progress` epochs: warm-ups, cosine (1608.03983)."""
    since = progress - (frozen_epochs if progress >= frozen_epochs else 0)
    warm = min(1, since / warmup_epochs) if warmup_epochs else 1
    return warm * (1 + math.cos(math.pi * progress / epochs)) / 2


def place_on_device(model):
    """Move a model to CUDA, MPS or the CPU, the first there is, in its fastest precision."""
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # gloo knows no MPS
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        model.precision = torch.bfloat16 if bf16 else torch.float16
    elif device.type == "cpu":
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            # Keep freed memory for the next step: 1.4 times as many paintings/s on two cores.
            mallopt, m_mmap_max, m_trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
        if shutil.which("nvidia-smi"):
            print(f"note: torch {torch.__version__} or the driver cannot use the NVIDIA GPU here, "
                  "and a CPU is slow: see README.md, GPUs")
        instructions = torch.cpu.get_capabilities()
        if any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            model.precision = torch.bfloat16
    model.to(device, memory_format=torch.channels_last)
    return device


def progress_bar(title, total):
    """Return a bar that counts paintings; outside a terminal it prints a line a minute."""
    wait = 0.1 if sys.stderr.isatty() else 60  # seconds
    return tqdm(desc=title, total=total, unit=" paintings", leave=False, mininterval=wait,
                miniters=1, delay=max(wait, 1), disable=RANK > 0)


def print_epoch(history, epochs):
    """Print the row of the latest epoch."""
    row, mark = history[-1], "*" if best_epoch(history) == len(history) else " "
    number, left = f"{row['epoch']}/{epochs}", row["seconds"] * (epochs - row["epoch"])
    print(f"{number:>8} {row['training_loss']:14.3f} {row['validation_loss']:16.3f} "
          f"{row['validation_accuracy']:9.2%}{mark} {row['paintings_per_second']:11,.1f}  "
          f"{tqdm.format_interval(left)}")


# ----------------------------------------------------------------------- data set, sampler, loader

LOADER_TIMEOUT = 900  # seconds without a batch after which loading has failed


class PaintingDataset(Dataset):
    """Resized copies as pixels: `dataset[index, epoch]` is (pixels (S, S, 3) uint8, label)."""

    def __init__(self, labels, copies, image_size, seed=None, place=0.5):
        self.image_size, self.seed, self.place = image_size, seed, place
        # One array each, since lists of 81,446 objects would grow in every worker.
        self.copies = np.array([os.fsencode(copies[path]) for path in labels])
        self.seeds = np.array([zlib.crc32(os.fsencode(path)) for path in labels])
        self.labels = np.array(list(labels.values()), dtype=np.int64)
        crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1))
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, epoch = key
        file = os.fsdecode(self.copies[index])
        try:
            with Image.open(file) as image:
                image.load()
        except OSError as error:
            raise OSError(f"cannot read {file} ({error}): delete it, then start again") from error
        if self.seed is None:  # else a crop and flip that depend on seed, epoch and painting alone
            image = center_crop(image, self.image_size, self.place)
        pixels = torch.from_numpy(np.array(image))
        if self.seed is not None:  # on a tensor, since Pillow crops more slowly
            seed = zlib.crc32(f"{self.seed} {epoch} {self.seeds[index]}".encode())
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                pixels = self.augment(pixels.permute(2, 0, 1)).permute(1, 2, 0).contiguous()
        return pixels, self.labels[index]


def center_crop(image, image_size, place=0.5):
    """Return a square of 7/8 of the short side, resized; place: 0..1 along the long side."""
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR,
                        bleed=1 / 16, centering=(place, place))


class EpochBatchSampler:
    """Batches of keys (index, epoch), each process its share; none before `epoch` is set."""

    def __init__(self, paintings, batch_size, seed=None):
        self.order, self.seed, self.epoch = np.arange(paintings), seed, None
        steps = math.ceil(paintings / batch_size)
        self.sizes = [len(batch) for batch in np.array_split(self.order, steps)]  # of all shares
        if self.sizes[-1] < WORLD_SIZE:
            raise InputError(f"{WORLD_SIZE} processes cannot share a batch of {self.sizes[-1]}")

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        if self.epoch is None:
            return
        order = self.order
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for batch in np.array_split(order, len(self)):
            yield [(index, self.epoch) for index in batch[RANK::WORLD_SIZE].tolist()]


def make_loader(labels, copies, settings, device, seed=None, place=0.5):
    """Return a loader of (pixels (B, S, S, 3) uint8, labels (B)); see `PaintingDataset`."""
    workers = settings.workers if settings.workers >= 0 else count_workers(settings)
    dataset = PaintingDataset(labels, copies, settings.image_size, seed, place)
    return DataLoader(
        dataset, batch_sampler=EpochBatchSampler(len(labels), settings.batch_size, seed),
        num_workers=workers, persistent_workers=workers > 0, worker_init_fn=init_worker,
        timeout=LOADER_TIMEOUT if workers else 0, pin_memory=device.type == "cuda",
        generator=torch.Generator())  # not the global one, which dropout draws from


def count_workers(settings):
    """Return how many loader processes the cores and the shared memory allow."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    workers = min(max(1, cores() // processes), 16 if sys.platform == "linux" else 3)
    if os.path.exists("/dev/shm"):  # where two batches of each worker wait
        batch = settings.batch_size // WORLD_SIZE * settings.image_size**2 * 3  # bytes
        workers = min(workers, shutil.disk_usage("/dev/shm").free // (3 * batch * processes))
    return workers


def cores():
    """Return how many cores this process may use, within the quota of its container."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        usable = min(usable, math.ceil(quota / period))
    return usable


def init_worker(_):
    """Leave signals, which may go to all processes, to the main one, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # errors in batches that nobody needs
    parent = multiprocessing.parent_process()  # torch watches the forkserver instead
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def to_images(pixels, device):
    """Move pixels (B, S, S, 3) uint8 to the device as images (B, 3, S, S), still uint8."""
    return pixels.to(device, non_blocking=pixels.is_pinned()).permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------- setting up a run


def set_up_run(settings):
    """Find, label and split the paintings and load weights; return run, model, paintings found."""
    found = find_paintings(settings.data_dir)
    chosen = {name: getattr(settings, name.lower()) for name in SETTINGS
              if name != "WORKERS" and not name.endswith("_DIR")}
    run = find_run(settings.output_dir, chosen) if settings.epochs else None
    if run is None:
        class_names, labels, test_list = (
            read_lists(settings.lists_dir, settings.attribute) if settings.lists_dir else
            label_by_folder_or_artist(found, settings.attribute, settings.min_paintings))
        split, source = split_paintings(labels, test_list, settings.group_by, settings.seed)
        split = match_paths(split, found)
        corrected = correct_labels(split, class_names, settings.corrections)
        run = {"format": FORMAT, "class_names": class_names, "settings": chosen, "split": split,
               "split_source": source, "planned_epochs": settings.epochs, "history": [],
               "margins": {}, "corrected": corrected}
    else:
        locate_paintings(run, found)
        if os.path.exists(settings.corrections):
            print(f"note: a resumed run keeps its labels, and does not read {settings.corrections}")
    run["torch"] = str(torch.__version__)
    listed = {path for labels in run["split"].values() for path in labels}
    print_examples("paintings in this run missing from disk", sorted(listed.difference(found)))
    print_examples("paintings on disk not used in this run", sorted(set(found) - listed))
    filter_split(run["split"], set(found))
    torch.manual_seed(settings.seed)
    model = ArtClassifier(len(run["class_names"]), settings.dropout)
    if run["history"]:
        load_weights(model, run.pop("model"), settings.output_dir / "model_last.pth")
    elif settings.epochs and settings.weights != "none":
        load_resnet(model.features.resnet, settings.weights)
    return run, model, found


def find_run(output_dir, chosen):
    """Return the run to resume, or None; raise InputError where it does not fit what is chosen."""
    last, best = output_dir / "model_last.pth", output_dir / "model_best.pth"
    away = f"use another OUTPUT_DIR, or move what is in {output_dir} away"
    run = load_checkpoint(last) if last.exists() else None
    older = run and (not best.exists() or best.stat().st_mtime < last.stat().st_mtime)
    if older and best_epoch(run["history"]) == len(run["history"]):  # a kill came between the two
        save_checkpoint(best, {key: run[key] for key in run if key not in ("optimizer", "scaler")})
    if last.exists() != best.exists():
        raise InputError(f"{best if run else last} is missing: bring it back, {away}")
    if run:
        former, run["settings"] = run["settings"], chosen
        chosen["WEIGHTS"] = former["WEIGHTS"]  # which were loaded at its start
        changes = {name: f"{name} was {former[name]}, is {value}" for name, value in chosen.items()
                   if value != former[name]}
        may_change = ("EPOCHS", "BATCH_SIZE", "LEARNING_RATE")
        if wrong := [change for name, change in changes.items() if name not in may_change]:
            raise InputError(f"{last} has other settings: {'; '.join(wrong)}: undo that, {away}")
        print_examples("settings that change from here on", list(changes.values()))
    return run


def prepare_paintings(run, found, settings):
    """Resize the paintings of a run; return the usable split and {path: resized copy}."""
    class_names, output_dir = run["class_names"], settings.output_dir
    listed = [path for part in PARTS for path in run["split"][part]]
    copies, bad = resize_paintings(sorted(set(listed).intersection(found)), settings.data_dir,
                                   settings.cache_dir, settings.image_size)
    reasons = [f"{printable(path)}\t{bad[path]}\n" for path in sorted(bad)]
    write_extra(output_dir / "bad_files.txt", "".join(reasons))
    print_examples("pictures that cannot be used, all in bad_files.txt",
                   [reason.strip().replace("\t", ": ") for reason in reasons])
    split = filter_split(run["split"], copies)
    sizes = ", ".join(f"{len(split[part]):,} {part}" for part in PARTS)
    print(f"split: {sizes} paintings in {len(class_names)} classes ({run['split_source']})")
    for part in PARTS:
        used = set(split[part].values())
        missing = [name for label, name in enumerate(class_names) if label not in used]
        print_examples(f"classes with no {part.replace('train', 'training')} painting", missing)
    if run["history"]:
        write_history(run, output_dir)  # which a stop or a spreadsheet may have prevented
    else:
        dataset = PaintingDataset(split["train"], copies, settings.image_size, settings.seed)
        write_extra(output_dir / "crops.jpg", draw_crops(dataset, class_names))
    return split, copies


def draw_crops(dataset, class_names):
    """Return 32 training crops as the model sees them in epoch 1, with their labels, as a JPEG."""
    tiles = []
    for index in np.random.default_rng((dataset.seed, 1)).permutation(len(dataset))[:32]:
        pixels, label = dataset[index, 1]
        tile = Image.new("RGB", (max(144, len(pixels)), len(pixels) + 16), "white")
        tile.paste(Image.fromarray(pixels.numpy()))
        ImageDraw.Draw(tile).text((2, len(pixels) + 2), printable(class_names[label]), "black")
        tiles.append(v2.functional.pil_to_tensor(tile))
    sheet = v2.functional.to_pil_image(make_grid(tiles, pad_value=255))
    sheet.save(jpeg := io.BytesIO(), "JPEG", quality=90)
    return jpeg.getvalue()


def print_end(history, settings):
    """Print how the training went, and the command that tests the best epoch."""
    best = history[best_epoch(history) - 1]
    print(f"best: epoch {best['epoch']} of {len(history)}, validation accuracy "
          f"{100 * best['validation_accuracy']:.2f} % (a larger EPOCHS trains further)")
    script = Path(__file__).with_name("test_model.py")
    command = ["python", script.name if script.parent == Path.cwd() else str(script)]
    for name in SHARED:
        value, default = str(getattr(settings, name.lower())), str(globals()[name])
        if value not in (default, os.path.abspath(default)):
            command += ["--" + name.lower().replace("_", "-"), value]
    print(f"next: {printable(shlex.join(command))}")


# -------------------------------------------------------------------------------- labels and split

ARTGAN = "https://github.com/cs-chan/ArtGAN, folder 'WikiArt Dataset'"
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
CAMERAS = r"(img|dsc\w?|dcim|pxl|gopr|mvimg|scan|image|photo|screenshot)"  # are not artists


def find_paintings(data_dir):
    """Return the paintings of a folder, "Style/name.jpg" each, sorted; print what is skipped."""
    if not data_dir.is_dir():
        raise InputError(f"there is no folder {data_dir}: unzip ArtGAN's WikiArt ({ARTGAN}) there, "
                         "or give --data-dir; python tests/demo.py needs none")
    found, skipped, empty, errors = [], [], [], []
    for folder, inner, names in os.walk(data_dir, followlinks=True, onerror=errors.append):
        place = Path(folder).relative_to(data_dir).parts  # (), (style,), or (style, inner folder)
        inner[:] = [name for name in inner if name[0] != "." and len(place) < 2]
        paths = ["/".join((*place, name)) for name in names
                 if name[0] != "." or name.endswith(".icloud")]  # not downloaded yet
        pictures = [path for path in paths if path.lower().endswith(ENDINGS) and len(place) == 1]
        found += pictures
        skipped += set(paths).difference(pictures)
        if len(place) == 1 and not pictures:
            empty.append(place[0])
    skipped += [reason_of(error, error.filename) for error in errors]
    print_examples("skipped (not a picture in a class folder)", sorted(skipped))
    print_examples("class folders without a picture", sorted(empty), most=9)
    if not found:
        raise InputError(f"there is no picture in a class folder of {data_dir}, such as {data_dir}/"
                         "Cubism/juan-gris_violin-1916.jpg: is that the right --data-dir?")
    print(f"{len(found):,} paintings in {printable(data_dir)}")
    return sorted(found)


def file_name(path):
    """Return a painting's file name, the same in every folder and every form of Unicode."""
    return unicodedata.normalize("NFC", path.rpartition("/")[2])


def style(path):
    """Return the name of a painting's folder, the same in every form of Unicode."""
    return unicodedata.normalize("NFC", path.partition("/")[0])


def artist(path):
    """Return the artist given by the file name, before its first _, or ""."""
    name, underscore, _ = file_name(path).partition("_")
    told = underscore and re.search(r"[^\W\d]", name) and not re.fullmatch(CAMERAS, name.lower())
    return name if told else ""


def read_rows(path, pattern, example):
    """Return the groups of each line of a list that matches; print how many others there are."""
    text = path.read_text("utf-8-sig", errors="replace")
    rows = re.findall(rf"^[ \t]*{pattern}[ \t]*$", text, re.MULTILINE)
    lines = [line for line in text.split("\n") if line.strip()]
    if not rows:
        raise InputError(f"{path} has no row such as {example}, but {''.join(lines[:1])[:99]!r}")
    if len(rows) < len(lines):
        print(f"skipped in {printable(path)}: {len(lines) - len(rows):,} lines that are not rows")
    return rows


def read_lists(lists_dir, attribute):
    """Read ArtGAN's lists; return class names, {path: label}, and its val paths, to test on."""
    wanted = [f"{attribute}_{kind}" for kind in ("class", "val", "train")]
    there = sorted(path for path in lists_dir.rglob("*") if path.is_file())
    files = [path for name in wanted for path in there if path.stem.lower() == name.lower()]
    if [path.stem.lower() for path in files] != [name.lower() for name in wanted]:
        names = ", ".join(str(path.relative_to(lists_dir)) for path in there[:9])
        raise InputError(f"{lists_dir} must hold {', '.join(wanted)} once each, and has "
                         f"{names or 'nothing'}: see {ARTGAN}, or give --lists-dir none")
    class_file, test_file, train_file = files
    rows = read_rows(class_file, r"([0-9]+)[ \t]+(.+?)", "7 Cubism")
    names = {int(label): name for label, name in rows}
    if sorted(names) != list(range(len(rows))) or len(set(names.values())) < len(rows):
        raise InputError(f"{class_file} must number different classes from 0, one per line")
    row = r"(.+?),+[ \t]*([0-9]+)", "Cubism/juan-gris_violin-1916.jpg,7"
    test_rows = read_rows(test_file, *row)
    labels, repeated, folders = {}, [], defaultdict(set)
    for path, label in test_rows + read_rows(train_file, *row):
        if int(label) not in names:
            raise InputError(f"{path} is listed with label {label}, not named in {class_file}")
        if path in labels:
            repeated.append(path)
        labels.setdefault(path, int(label))
        folders[int(label)].add(style(path))
    print_examples("skipped rows, of paintings listed before", repeated)
    if attribute == "style":  # a style is named as its folder: Art_Nouveau_Modern, not Art_Nouveau
        renamed = names | {label: min(own) for label, own in folders.items() if len(own) == 1}
        if len(set(renamed.values())) == len(names):  # still different names
            names = renamed
    return [names[label] for label in range(len(names))], labels, {path for path, _ in test_rows}


def label_by_folder_or_artist(found, attribute, min_paintings):
    """Label as `read_lists` does, without lists: style by folder, artist by file name."""
    if attribute not in ("style", "artist"):
        raise InputError(f"ATTRIBUTE {attribute!r} needs {attribute}_train.csv, {attribute}_val.csv"
                         f" and {attribute}_class.txt in LISTS_DIR; ArtGAN's are at {ARTGAN}")
    folders = set(map(style, found))
    if {name.lower() for name in folders} <= {"train", "test", "val", "valid", "validation"}:
        raise InputError(f"{', '.join(sorted(folders))} are parts of a split: move the class "
                         "folders in them into one, and give that as --data-dir")
    name_of, least = (style, 1) if attribute == "style" else (artist, min_paintings)
    sizes = Counter(filter(None, map(name_of, found)))
    class_names = sorted(name for name, size in sizes.items() if size >= least)
    print_examples(f"{attribute}s with fewer than {least} paintings (MIN_PAINTINGS), no classes",
                   sorted(sizes.keys() - set(class_names)))
    if len(sizes) < len(folders):
        print(f"note: file names give {len(sizes)} artists; --attribute style classifies folders")
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = {path: label_of[name_of(path)] for path in found if name_of(path) in label_of}
    return class_names, labels, None


def correct_labels(split, class_names, table):
    """Relabel {part: {path: label}} by a CSV table; return the former {path: label} of changes."""
    if table == "none" or table == "corrections.csv" and not os.path.exists(table):
        return {}
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = [(row.get("path"), row.get("class")) for row in csv.DictReader(file)]
    names = {path.strip(): (name or "").strip() for path, name in rows if path and path.strip()}
    unknown = sorted(set(names.values()).difference(class_names))
    if unknown or not names:
        raise InputError(f"{table} must have columns path and class, separated by commas, and no "
                         f"class is {unknown[:3]}: correct it, or give --corrections none")
    labels = {path: label for part in split.values() for path, label in part.items()}
    names = match_paths({"": names}, labels)[""]
    former = {path: label for path, label in labels.items()
              if names.get(path, class_names[label]) != class_names[label]}
    for part in split.values():
        part |= {path: class_names.index(names[path]) for path in part.keys() & former.keys()}
    print(f"{len(former):,} labels changed by {printable(table)}; "
          f"{len(names.keys() - labels.keys()):,} of its paths not found")
    return former


def locate_paintings(run, found):
    """Spell the paths of a run as those that are found on this disk."""
    tables = match_paths(run["split"] | {key: run[key] for key in ("margins", "corrected")}, found)
    run |= {key: tables.pop(key) for key in ("margins", "corrected")} | {"split": tables}


def match_paths(tables, found):
    """Return {name: {path: value}} with the paths as spelt on disk, if they are there."""
    # 709 of ArtGAN's names are garbled; a disk has them so, repaired, or with _ for odd letters.
    # A path that is not there and a file of no list match if only they are alike in their folder.
    listed = {path for values in tables.values() for path in values}
    alike, places = defaultdict(set), {}
    for path in listed.symmetric_difference(found):
        alike[style(path), re.sub(r"([^\x00-\x7f]|_)+", "_", repaired(path))].add(path)
    for paths in alike.values():
        lost, files = list(paths & listed), list(paths - listed)
        if len(lost) == len(files) == 1:
            one, other = repaired(lost[0]), repaired(files[0])
            if one == other or one.isascii() != other.isascii():  # é is _, and not è
                places[lost[0]] = files[0]
    return {name: {places.get(path, path): value for path, value in values.items()}
            for name, values in tables.items()}


def repaired(path):
    """Return a file name without apostrophes, its garbled letters repaired: ã© (from Ã©) is é."""
    def letter(match):  # its two bytes of UTF-8 were read as Latin-1, and lowered
        return bytes([ord(match[1]) - 32, ord(match[2])]).decode("utf-8")

    return re.sub("([\xe2-\xe5])([\x80-\xbf])", letter, file_name(path)).replace("'", "")


def split_paintings(labels, test_list, group_by, seed):
    """Return {part: {path: label}}, with test_list as it is, and where the split came from."""
    shares, source, tested = {"train": 0.9, "validation": 0.1}, "from the lists", test_list
    name_of = artist if group_by == "artist" else file_name  # those of one name stay together
    if test_list is None or group_by == "artist":  # in ArtGAN's lists, most artists are in both
        source = f"drawn by {group_by}{'' if test_list else ', without lists'}"
        shares, tested = {"train": 0.7, "test": 0.15, "validation": 0.15}, ()
    if group_by == "artist" and len(set(map(name_of, labels)) - {""}) < len(shares):
        raise InputError("GROUP_BY artist needs file names of three artists, as juan-gris_vase.jpg")
    others = {path: label for path, label in labels.items() if path not in tested}
    split = {"test": {path: labels[path] for path in tested}}
    split |= draw_split(others, lambda path: name_of(path) or file_name(path), shares, seed)
    return {part: dict(sorted(split[part].items())) for part in PARTS}, source


def draw_split(labels, group_of, shares, seed):
    """Divide {path: label} into {part: {path: label}} by class, each group whole in one part."""
    groups, sizes = defaultdict(list), Counter(labels.values())
    for path in sorted(labels):
        groups[group_of(path)].append(path)
    split, filled = {part: {} for part in shares}, {part: Counter() for part in shares}

    for group in sorted(groups, key=lambda group: (  # the larger first, chance among equals
            -len(groups[group]),
            hashlib.blake2b(f"{seed} {group}".encode("utf-8", "surrogateescape")).digest())):
        counts, fullness = Counter(labels[path] for path in groups[group]), Counter()
        for part, share in shares.items():
            for label, count in counts.items():
                # What of a class of N is in the part, half of the group's included, relative to
                # the N * share that belong there; classes weigh by count / N.
                there = filled[part][label] + (count - (filled[part][label] == 0)) / 2
                fullness[part] += count / sizes[label] * there / (sizes[label] * share)
        part = min(shares, key=fullness.get)
        split[part] |= {path: labels[path] for path in groups[group]}
        filled[part].update(counts)
    return split


def filter_split(split, usable):
    """Return the split of the usable paintings alone; raise InputError if too few are left."""
    split = {part: {path: label for path, label in split[part].items() if path in usable}
             for part in PARTS}
    classes, sizes = len(set(split["train"].values())), [len(split[part]) for part in PARTS]
    if classes < 2 or not all(sizes):
        raise InputError(f"there are {classes} classes (2 are needed), and {sizes} paintings to "
                         "train, validate and test: check DATA_DIR, LISTS_DIR, MIN_PAINTINGS")
    return split


# ------------------------------------------------------------------------------ pictures and cache

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # EPS would start Ghostscript
MAX_PIXELS, MAX_JPEG_PIXELS = 40_000_000, 200_000_000  # JPEGs are reduced as they are decoded
MAX_SIDE = 65_500  # pixels, of a JPEG
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes of a profile, a text


def copy_side(image_size):
    """Return the short side of resized copies in pixels: evaluation looks at 7/8 of it."""
    return math.ceil(image_size * 10 / 7)


def resize_paintings(paths, data_dir, cache_dir, image_size):
    """Make the missing resized copies; return {path: copy}, and {path: reason} of bad pictures."""
    short_side = copy_side(image_size)
    folder, copies, bad = cache_dir / str(short_side), {}, {}
    for path in paths:
        try:
            status = os.stat(data_dir / path)
        except OSError as error:
            bad[path] = reason_of(error, data_dir / path)
            continue
        # The copy's name is a hash of these, so a changed original has another copy.
        original = os.fsencode(f"{path}\n{status.st_size}\n{status.st_mtime_ns}")
        name = hashlib.blake2b(original, digest_size=16).hexdigest()
        copies[path] = os.path.join(folder, name[:2], f"{name}.jpg")
    there = {str(file) for file in folder.glob("*/*.jpg")}
    missing = [path for path, copy in copies.items() if copy not in there]

    def make_copy(path):
        """Make the copy of a painting; return why that failed, or None."""
        try:
            jpeg = encode_copy(data_dir / path, short_side)
        except Exception as error:  # of nearly any kind, from Pillow
            return reason_of(error, data_dir / path)
        copy = Path(copies[path])
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, jpeg)

    if missing and len(missing) == len(copies) <= len(there):
        print("note: the copies there are of other paths, sizes or times (is DATA_DIR a copy?)")
    # Threads suffice, since Pillow releases the interpreter. An error or Ctrl-C waits for them.
    with ThreadPoolExecutor(cores()) as pool, progress_bar("resizing", len(missing)) as bar:
        for path, reason in zip(missing, pool.map(make_copy, missing)):
            if reason:
                bad[path] = reason
                del copies[path]
            bar.update()
    made = len(copies.keys() & set(missing))
    print(f"resized copies: {made:,} made, {len(copies) - made:,} were there")
    return copies, bad


def encode_copy(path, short_side):
    """Return the resized copy of a picture as JPEG, without its comments."""
    decode(path, short_side).save(jpeg := io.BytesIO(), "JPEG", quality=90, comment=b"")
    return jpeg.getvalue()


def decode(path, short_side):
    """Return a picture, upright, in RGB, with its short side at most so long."""
    if path.exists() and not path.is_file():
        raise InputError("not a regular file, or a folder without pictures")
    with open(path, "rb") as file:
        content = file.read()
    if content[:2] == b"\xff\xd8":  # not by Image.open, which has a limit of its own
        image, most = JpegImageFile(io.BytesIO(content)), MAX_JPEG_PIXELS
    else:
        image, most = open_other(content), MAX_PIXELS
    width, height = image.size
    if width * height > most:
        raise InputError(f"{width} x {height} is more than {most:,} pixels")
    image.draft(image.mode, reduced_size(image.size, short_side))
    image.load()
    with contextlib.suppress(Exception):  # ignore malformed metadata
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image, reduced_size(image.size, short_side))


def open_other(content):
    """Open a picture that is no JPEG; raise an error for one that Pillow would show wrongly."""
    try:
        Image.open(io.BytesIO(content), formats=FORMATS).verify()  # the checksums of a PNG
    except UnidentifiedImageError as error:
        hint = ": HEIC is not read, save it as JPEG" if content[4:8] == b"ftyp" else ", or damaged"
        raise InputError(f"not a picture in a known format{hint}") from error
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits a sample, 284 planes, 320 colour map
    deep = max(tags.get(258, (8,))) > 8 and (image.mode[:1] in "IF" or tags.get(284) == 2)
    clear = "transparency" in image.info and image.tile[0][3] in ("L;2", "L;4")  # is not scaled
    if deep or clear or image.mode in ("I", "F") or max(tags.get(320, (256,))) < 256:
        raise InputError("its kind of pixels is not read: save it as PNG or JPEG")
    return image


def reduced_size(size, short_side):
    """Return (width, height) with the short side at most `short_side`, the long one MAX_SIDE."""
    scale = max(1, min(size) / short_side, max(size) / MAX_SIDE)
    return tuple(max(1, round(side / scale)) for side in size)


def to_rgb(image, size):
    """Return an image in RGB and the given size: transparency on white, 16-bit grey as 8-bit."""
    if image.mode.startswith("I;16"):  # of a PNG; convert() would clip it
        wide = np.asarray(image)
        grey = (wide >> 8).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    return image


def reason_of(error, path):
    """Return why a picture or folder cannot be used; raise OSError if the system is to blame."""
    # Its errors have a number, Pillow's have none; these concern one file alone.
    of_one = (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM,
              errno.ENAMETOOLONG)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) not in of_one:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise OSError(f"cannot read {path}: {reason}") from error
    return printable(error) or type(error).__name__


# --------------------------------------------------------------------------- files and checkpoints
# A checkpoint is the run: a dictionary with its settings, classes, split and history, and weights.

FORMAT = 5  # of the checkpoints


def write_atomically(path, content):
    """Write bytes or text to a file, whole or not at all: first beside its place, then into it."""
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            text = isinstance(content, str)
            file.write(content.encode("utf-8", "backslashreplace") if text else content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except PermissionError:  # on Windows, while a virus scanner or a spreadsheet has it open
            time.sleep(5)
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_extra(path, content):
    """Write a file that is only to be looked at; where that fails, say so and go on."""
    try:
        write_atomically(path, content)
    except OSError as error:
        print(f"warning: {printable(error)}; continuing without it", file=sys.stderr)


def csv_table(columns, rows):
    """Return rows, dictionaries, as a CSV table with a header; floats have six digits."""
    table = csv.DictWriter(text := io.StringIO(), columns, "", "ignore", lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{value:.6g}" if isinstance(value, float) else value
                     for name, value in row.items()} for row in rows)
    return text.getvalue()


@contextlib.contextmanager
def lock_folder(folder):
    """Hold the lock of a folder, made if need be; raise InputError if another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            import fcntl  # not on Windows
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f".{'[0-9a-f]' * 16}.tmp"):  # left by a killed run
                left.unlink()
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by a training: use another OUTPUT_DIR") from error
        except (ImportError, OSError) as error:
            print(f"note: no lock in {printable(folder)} ({error}): start no second training there")
        yield


def save_epoch(run, model, optimizer, scaler, output_dir):
    """Save a run after an epoch: the checkpoints first, then what is only to be looked at."""
    best = run | {"model": model.state_dict()}
    save_checkpoint(output_dir / "model_last.pth", best | {
        "optimizer": optimizer.state_dict()["state"], "scaler": scaler.state_dict()})
    if best_epoch(run["history"]) == len(run["history"]):
        save_checkpoint(output_dir / "model_best.pth", best)
    write_history(run, output_dir)


def write_history(run, output_dir):
    """Write history.csv and, where it names other classes, class_names.txt."""
    write_extra(output_dir / "history.csv", csv_table(run["history"][0], run["history"]))
    names = "".join(f"{printable(name)}\n" for name in run["class_names"])
    file = output_dir / "class_names.txt"
    with contextlib.suppress(OSError):
        if file.read_text("utf-8", errors="replace") == names:
            return
        print(f"{printable(file)} named other classes: replaced")
    write_extra(file, names)


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, whole or not at all."""
    torch.save(checkpoint, content := io.BytesIO())  # for a full disk is no OSError to torch
    write_atomically(path, content.getbuffer())


def load_checkpoint(path):
    """Load a checkpoint of `save_epoch`; raise InputError if it is none, or damaged."""
    run = load_tensors(path)
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise InputError(f"{path} is of another version of this script: use that, or move it away")
    return run


def load_tensors(path):
    """Load a file of torch.save; raise InputError if it is damaged or holds more than values."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    content = io.BytesIO(path.read_bytes())  # an error of the disk is none of the file
    try:
        # PyTorch does not look at the checksums; its format before 1.6 has none.
        damaged = zipfile.is_zipfile(content) and zipfile.ZipFile(content).testzip()
        content.seek(0)
        if not damaged:
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's message advises an unsafe load
        raise InputError(f"{path} is refused: cut off, no PyTorch file, or more than tensors and "
                         "plain values, which could run code") from error
    raise InputError(f"{path} is refused: damaged (the checksum of {damaged} is wrong)")


def load_weights(module, tensors, path):
    """Load tensors that fit a module, a last layer `fc` aside; raise InputError if they do not."""
    try:
        tensors = tensors.get("state_dict", tensors)  # as PyTorch's ImageNet example saves them
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        module.load_state_dict({name: tensors[name] for name in tensors if name[:3] != "fc."})
    except Exception as error:  # RuntimeError, and others where they are no tensors
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is refused: its weights do not fit: {reason}") from error


def load_resnet(resnet, weights):
    """Load the initial weights: "imagenet" (torchvision's IMAGENET1K_V2) or a file."""
    path = Path(os.path.abspath(os.path.expanduser(weights)))
    if weights != "imagenet":
        tensors = load_tensors(path)
    else:
        imagenet = ResNet50_Weights.IMAGENET1K_V2
        try:
            tensors = imagenet.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # of many kinds, from the network and from torch
            raise OSError(f"cannot load {imagenet.url} ({error}): put that file, whole, into "
                          f"{torch.hub.get_dir()}/checkpoints, or give --weights none") from error
    load_weights(resnet, tensors, path)


# --------------------------------------------------------------------------------------- processes
# One, or as many as torchrun starts. The first one finds, prepares and writes for all of them.

TORCHRUN = "LOCAL_RANK" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # the number of this process, from 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1


def join_processes():
    """Join the processes that torchrun has started, if it has, and take one GPU."""
    if TORCHRUN:
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, *_ = next(distributed.rendezvous("env://"))
        attempt = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        distributed.init_process_group("nccl" if cuda else "gloo", store=attempt, rank=RANK,
                                       world_size=WORLD_SIZE)  # old addresses are in the others
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no Linux
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with torchrun, if it is killed alone
        if RANK > 0:
            sys.stdout = io.StringIO()  # the first process prints for all


@functools.cache
def gloo_group():
    """Return all processes as a group that can wait for a day, since preparing may take hours."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def broadcast_from_first(function, *arguments):
    """Call a function in the first process alone; return what it returns in all."""
    values = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(values, group=gloo_group())
    return values[0]


def gather(outputs, loader):
    """Return the outputs for a loader's batches in the paintings' order, from all processes."""
    indices = [index for batch in loader.batch_sampler for index, _ in batch]
    shares = [(indices, torch.cat(outputs).cpu())] * WORLD_SIZE
    if WORLD_SIZE > 1:
        distributed.all_gather_object(shares, shares[0], gloo_group())
    indices, outputs = zip(*shares)
    return torch.cat(outputs)[np.argsort(np.concatenate(indices))]


# ------------------------------------------------------------------------- command line and errors

SHARED = ("DATA_DIR", "CACHE_DIR", "OUTPUT_DIR", "BATCH_SIZE", "WORKERS")  # with test_model.py
LIMITS = {  # the least and the most
    "epochs": (0, 10**6), "batch_size": (WORLD_SIZE, 10**6), "image_size": (64, 512),
    "learning_rate": (1e-9, 10), "backbone_rate": (0, 100), "frozen_epochs": (0, 10**6),
    "warmup_epochs": (0, 10**6), "weight_decay": (0, 10), "dropout": (0, 0.99),
    "workers": (-1, 1000), "seed": (0, 2**32), "neighbours": (0, 9)}


class InputError(Exception):
    """An error that the user can mend; its message says what is wrong, where, and what to do."""


def printable(text):
    """Return a path or a message as one line that any terminal shows."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def print_examples(what, items, most=3):
    """Print what the items are, how many, and the first few; nothing where there are none."""
    if items:
        dots = ", ..." if len(items) > most else ""
        print(f"{what}: {len(items):,} ({', '.join(map(printable, items[:most]))}{dots})")


def make_parser(description, settings, *scripts):
    """Return a parser with a flag for each of {setting: default}, explained by its comment."""
    text = "".join(Path(script).read_text(encoding="utf-8") for script in scripts)
    notes = dict(re.findall(r"^([A-Z_]+) = .*?  # (.+)$", text, re.MULTILINE))
    title, examples, *_ = description.split("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=examples, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in settings.items():
        path = name == "CORRECTIONS" or name.endswith("_DIR")
        kind = {int: "INT", float: "FLOAT"}.get(type(value), "PATH" if path else "TEXT")
        parser.add_argument("--" + name.lower().replace("_", "-"), metavar=kind, type=type(value),
                            default=value, help=f"{notes[name]} [{value}]".replace("%", "%%"))
    return parser


def check_settings(settings):
    """Return the settings with absolute folders; raise InputError if one is invalid."""
    for name, value in vars(settings).items():
        low, high = LIMITS.get(name, (value, value))
        if not low <= value <= high:
            raise InputError(f"{name.upper()} must be from {low} to {high:,}, not {value}")
        if name == "lists_dir" and value in ("none", "wikiart_csv") and not os.path.exists(value):
            settings.lists_dir = None
        elif name.endswith("_dir"):
            setattr(settings, name, Path(os.path.abspath(os.path.expanduser(value))))
    group_by = getattr(settings, "group_by", "painting")
    if group_by not in ("painting", "artist") or group_by == getattr(settings, "attribute", ""):
        raise InputError(f"GROUP_BY must be painting or artist, not the ATTRIBUTE: {group_by!r}")
    data_dir, cache_dir, output_dir = settings.data_dir, settings.cache_dir, settings.output_dir
    for inner, outer in ((cache_dir, data_dir), (data_dir, cache_dir),
                         (output_dir, data_dir), (output_dir, cache_dir)):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise InputError(f"{inner} lies in {outer}: DATA_DIR, CACHE_DIR, OUTPUT_DIR must not")
    return settings


def explain(error, batch_size):
    """Return what a user can do about an error, in one line, or None if it is a bug."""
    reason = re.sub(r"(?s)^Caught .*\n(\w+: )?", "", str(error).strip())  # a worker's traceback
    reason = "out of memory" if isinstance(error, MemoryError) else reason
    if isinstance(error, (InputError, OSError, csv.Error)):
        return reason
    if re.search("Connection (closed|reset)|Broken pipe|ncclRemoteError", reason):
        return "another process stopped; its own message says why"
    for pattern, advice in (
        ("out of memory|ALLOC_FAILED|can't alloc",
         f"try a smaller BATCH_SIZE, such as --batch-size {max(1, batch_size // 2)}"),
        ("invalid device ordinal", "start fewer processes, one for each GPU (--nproc-per-node)"),
        ("no kernel image|driver version|unable to find an engine|NCCL built in",
         "this torch does not fit the GPU or its driver: see README.md, Old GPUs"),
        ("Address already in use|EADDRINUSE", "give torchrun another --master-port"),
        ("shared memory|No space left|DataLoader|Too many open files|ancdata|new thread",
         "use fewer loaders, such as --workers 0, or give Docker a larger --shm-size"),
        ("NCCL|[Gg]loo", "the processes cannot reach one another"),
    ):
        if re.search(pattern, reason):
            return f"{reason.splitlines()[-1 if 'NCCL error' in reason else 0]}: {advice}"
    return None


def run_script(function, settings, stopped):
    """Call a function with the first process's settings; print how it ended; return exit code."""
    def stop(number, _):
        raise KeyboardInterrupt(number)

    others = multiprocessing.active_children()  # of a program that calls main()
    main_thread = threading.current_thread() is threading.main_thread()
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
              if main_thread and signal.getsignal(number) is not signal.SIG_IGN}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, name, stream)  # 2>&- leaves none
        if isinstance(stream, io.TextIOWrapper):  # file names may be beyond a terminal's letters
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        if os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > 60:
            tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"  # a socket's path has 108 bytes
        join_processes()
        function(broadcast_from_first(check_settings, settings))
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt as error:
        for number in former:
            signal.signal(number, signal.SIG_IGN)  # another one would disturb the end
        code, line = 128 + (error.args or (signal.SIGINT,))[0], stopped
    except Exception as error:
        reason = explain(error, settings.batch_size)
        code, line = 1, f"error: {printable(reason)}" if reason else traceback.format_exc()
        traceback.clear_frames(error.__traceback__)  # which would keep the loaders
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    for worker in set(multiprocessing.active_children()).difference(others):
        worker.kill()  # since it ignores SIGTERM, and may be stuck
    print(line, file=sys.stderr)
    if distributed.is_initialized():  # what the others do no longer matters
        os._exit(code)
    return code


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    settings = {name: globals()[name] for name in SETTINGS}
    return run_script(
        run_training, make_parser(__doc__, settings, __file__).parse_args(argv),
        "stopped; run the same command to resume after the last complete epoch")


if __name__ == "__main__":
    sys.exit(main())
