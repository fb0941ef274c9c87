"""What several test files use: the real paintings if they are there, and one small finished run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import train_model
from tests.paintings import paint_artgan

SHARED = Path(__file__).resolve().parents[2] / "shared"
QUICK = ["--weights", "none", "--image-size", "64", "--batch-size", "8", "--workers", "0"]


@pytest.fixture(scope="session")
def shared():
    """Return the folder of the real paintings and lists; skip the test where it is not there."""
    if not (SHARED / "artgan_subset").is_dir():
        pytest.skip("the real paintings in ../shared are not here")
    return SHARED


def folders(folder):
    """Return the flags that keep a run inside a folder."""
    return ["--data-dir", f"{folder}/wikiart", "--lists-dir", f"{folder}/lists",
            "--small-dir", f"{folder}/small", "--output-dir", f"{folder}/out"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a run of 2 epochs on 40 painted pictures: its folder, flags, paintings and out."""
    folder = tmp_path_factory.mktemp("finished")
    painted = paint_artgan(folder / "wikiart", each=8, size=(120, 96))
    flags = [*folders(folder), *QUICK]
    assert train_model.main([*flags, "--epochs", "2"]) == 0
    return SimpleNamespace(folder=folder, flags=flags, painted=painted, out=folder / "out")
