"""What several test files use: a tiny network, the real paintings, and one small finished run."""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # for tests run side by side

import pytest
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import train_model as tm
from tests.paintings import paint_artgan

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QUICK = ["--weights", "none", "--image-size", "64", "--batch-size", "8", "--workers", "0"]
# What a script in a process of its own begins with, to have the network of `make_tiny`.
TINY = ("import sys, train_model as tm, test_model\n"
        "from tests.conftest import make_tiny; make_tiny()\n")


def make_tiny():
    """Give the scripts a network of the same form that is a hundred times as quick."""
    tm.resnet50 = lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)
    tm.LSTM_UNITS = 16


make_tiny()


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
            "--small-dir", f"{folder}/small", "--output-dir", f"{folder}/out"]


def small_folder(folder):
    """Return where the small copies of a run's styles are."""
    return next((folder / "small").rglob("Cubism")).parent


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a run of 2 epochs on 40 painted pictures: its folder, flags, paintings and out."""
    folder = tmp_path_factory.mktemp("finished")
    painted = paint_artgan(folder / "wikiart", each=8, size=(120, 96))
    flags = [*folders(folder), *QUICK]
    assert tm.main([*flags, "--epochs", "2"]) == 0
    return SimpleNamespace(folder=folder, flags=flags, painted=painted, out=folder / "out")
