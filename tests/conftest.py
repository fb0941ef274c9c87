"""What several test files use: a tiny network, precisions, the real paintings, finished runs."""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # for tests run side by side

import pytest
import torch
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import train_model as tm
from tests.paintings import paint_artgan

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QUICK = ["--weights", "none", "--image-size", "64", "--batch-size", "8", "--workers", "0"]
# What a script in a process of its own begins with: the network of `make_tiny`, the precision of
# this process, and SIGINT's default, which a suite started in the background does not have.
TINY = ("import signal, sys, train_model as tm, test_model\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.conftest import make_tiny; make_tiny()\n")
PRECISIONS = {"float32": {}, "bfloat16": {"avx512_bf16": True}}  # what the CPU claims to have
cuda_is_available = torch.cuda.is_available


def use_precision(name):
    """Let the scripts take the CPU for one with bf16 instructions or without, here and below."""
    os.environ["TESTS_PRECISION"] = name
    torch.cpu.get_capabilities = lambda: PRECISIONS[name]


def make_tiny():
    """Give the scripts a network of the same form that is a hundred times as quick."""
    tm.resnet50 = lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)
    tm.LSTM_UNITS = 16


make_tiny()
use_precision(os.environ.get("TESTS_PRECISION", "float32"))


def pytest_runtest_setup(item):
    """Hide CUDA from all tests but those that are about it, and from what they start."""
    if item.path.name == "test_gpu.py":
        torch.cuda.is_available = cuda_is_available
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        torch.cuda.is_available = lambda: False
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """Run a test in both precisions, on any CPU; return the name of the one."""
    use_precision(request.param)
    yield request.param
    use_precision("float32")


@pytest.fixture
def real_network(monkeypatch):
    """Give the scripts their own network again, for one test."""
    monkeypatch.setattr(tm, "resnet50", resnet50)
    monkeypatch.setattr(tm, "LSTM_UNITS", 256)


@pytest.fixture(scope="session")
def shared():
    """Return the folder of the real paintings and lists; skip the test where it is not there."""
    if not (SHARED / "artgan_subset").is_dir():
        pytest.skip("the real paintings in ../shared are not here")
    return SHARED


def folders(folder):
    """Return the flags that keep a run inside a folder, without lists."""
    return ["--data-dir", f"{folder}/wikiart", "--lists-dir", "none",
            "--cache-dir", f"{folder}/cache", "--output-dir", f"{folder}/out"]


def folders_to_test(folder):
    """Return those of `folders` that test_model.py knows too."""
    return [*folders(folder)[:2], *folders(folder)[4:]]


def copies_in(folder, image_size=64):
    """Return {path: resized copy} of the paintings in folder/wikiart, made if need be."""
    paths = sorted(path.relative_to(folder / "wikiart").as_posix()
                   for path in (folder / "wikiart").glob("*/*.jpg"))
    return tm.resize_paintings(paths, folder / "wikiart", folder / "cache", image_size)[0]


@pytest.fixture(scope="session")
def finished_in(tmp_path_factory):
    """Return a function of a precision that gives a run as `finished` in it."""
    runs = {}

    def finish(name):
        if name not in runs:
            former = os.environ["TESTS_PRECISION"]
            use_precision(name)
            folder = tmp_path_factory.mktemp(name)
            painted = paint_artgan(folder / "wikiart", each=8, size=(120, 96))
            flags = [*folders(folder), *QUICK]
            assert tm.main([*flags, "--epochs", "2"]) == 0
            runs[name] = SimpleNamespace(
                folder=folder, flags=flags, painted=painted, out=folder / "out")
            use_precision(former)
        return runs[name]

    return finish


@pytest.fixture(scope="session")
def finished(finished_in):
    """Return a run of 2 epochs on 40 painted pictures: its folder, flags, paintings and out."""
    return finished_in("float32")
