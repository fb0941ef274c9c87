"""Checkpoints: written whole, loaded safely, and gone on from exactly."""

import contextlib
import csv
import itertools
import os
import pickle
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import test_model
import train_model as tm
from tests.paintings import paint_artgan

TIMES = ("seconds", "paintings_per_second")


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of the finished run's OUTPUT_DIR and the flags that use it."""
    shutil.copytree(finished.out, tmp_path / "out")
    return tmp_path / "out", [*finished.flags, "--output-dir", str(tmp_path / "out")]


def same(one, other, path=""):
    """Fail unless two nested values are equal, tensors bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for place, pair in enumerate(zip(one, other)):
            same(*pair, f"{path}/{place}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), path
    else:
        assert one == other or path.rpartition("/")[2] in TIMES, path


def check_same_runs(one, other):
    """Fail unless two OUTPUT_DIRs hold the same run, times aside."""
    for name in ("model_last.pth", "model_best.pth"):
        same(tm.load_checkpoint(one / name), tm.load_checkpoint(other / name), name)
    assert (one / "class_names.txt").read_bytes() == (other / "class_names.txt").read_bytes()
    same(read_history(one), read_history(other), "history.csv")


def read_history(out):
    with open(out / "history.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------- going on


@contextlib.contextmanager
def ctrl_c(module, name, number):
    """Stop what runs inside as Ctrl-C does, at the call of module.name of this number, from 1."""
    real, calls = getattr(module, name), itertools.count(1)

    def stop(*given):
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, stop)
        patch.setattr(tm.signal, "signal", lambda *_: None)  # a real Ctrl-C still ends the tests
        yield


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_a_continued_run_is_the_run_never_stopped(finished, tmp_path, workers):
    """Stopped in the middle of epoch 2; continued with as many workers or others: bit for bit."""
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "2"]
    with ctrl_c(torch.nn.utils, "clip_grad_norm_", 6):  # 4 steps are an epoch
        assert tm.main([*flags, "--workers", "1"]) == 130
    assert len(tm.load_checkpoint(tmp_path / "model_last.pth")["history"]) == 1
    assert tm.main([*flags, "--workers", workers]) == 0
    check_same_runs(finished.out, tmp_path)


def test_a_stop_between_the_two_checkpoints_is_made_good(finished, tmp_path, monkeypatch):
    """Of the first epoch, and of the second, which is the better one, so that it writes both."""
    def evaluate(model, *_):
        right = int(model.features.resnet.bn1.num_batches_tracked) // 4  # 4 steps are an epoch
        return torch.eye(5)[[*range(right), *[0] * (5 - right)]]

    def run(out):
        return tm.main([*finished.flags, "--output-dir", str(out), "--epochs", "2"])

    monkeypatch.setattr(tm, "evaluate", evaluate)
    with monkeypatch.context() as patch:
        real, written = os.replace, []
        patch.setattr(os, "replace", lambda *given: written.append(given[1].name) or real(*given))
        assert run(tmp_path / "whole") == 0
    best = tm.load_checkpoint(tmp_path / "whole/model_best.pth")["history"]
    assert [row["validation_accuracy"] for row in best] == [0.2, 0.4]
    checkpoints = [name for name in written if name.endswith(".pth")]
    assert checkpoints == ["model_best.pth", "model_last.pth"] * 2
    for number in [place for place, name in enumerate(written, 1) if name == "model_last.pth"]:
        out = tmp_path / str(number)
        with ctrl_c(os, "replace", number):
            assert run(out) == 130
        assert run(out) == 0
        check_same_runs(tmp_path / "whole", out)
        assert {name for name in contents(out) if name[0] != "."} == set(written)


def test_other_settings_are_refused_by_name(copied, capsys):
    out, flags = copied
    before = contents(out)
    assert tm.main([*flags, "--epochs", "3", "--seed", "5", "--learning-rate", "0.5"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {out}/model_last.pth is of another run (")
    assert "SEED: then 0, now 5" in error and "LEARNING_RATE: then 0.001, now 0.5" in error
    assert "EPOCHS" not in error and "WORKERS" not in error and "DIR:" not in error
    for advice in ("undo that", "another OUTPUT_DIR", "move model_last.pth and model_best.pth"):
        assert advice in error
    assert before == contents(out)


def test_settings_of_a_run_must_stay(copied, capsys):
    """All but EPOCHS, WORKERS and the folders."""
    out, flags = copied
    others = {"ATTRIBUTE": "artist", "GROUP_BY": "artist", "MIN_PAINTINGS": 2,
              "WEIGHTS": "imagenet", "BATCH_SIZE": 4, "IMAGE_SIZE": 65, "LEARNING_RATE": 0.1,
              "BACKBONE_RATE": 1.0, "FROZEN_EPOCHS": 2, "WARMUP_EPOCHS": 1.0, "WEIGHT_DECAY": 0.0,
              "DROPOUT": 0.0, "SEED": 1, "BATCH_NORMS": "trained"}
    free = {"EPOCHS", "WORKERS", *(name for name in tm.SETTINGS if name.endswith("_DIR"))}
    assert others.keys() == tm.SETTINGS.keys() - free
    for name, value in others.items():
        flag = "--" + name.lower().replace("_", "-")
        assert tm.main([*flags, "--epochs", "9", flag, str(value)]) == 1
        assert re.search(rf"another run \({name}: then .*, now {value}\)", capsys.readouterr().err)


def test_new_and_gone_paintings_are_said(copied, capsys, finished, tmp_path):
    """The classes stay, too: a folder that is new since is none."""
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    shutil.copytree(tmp_path / "wikiart/Pointillism", tmp_path / "wikiart/Realism")
    split = tm.load_checkpoint(out / "model_last.pth")["split"]
    gone = next(iter(split["train"]))
    (tmp_path / "wikiart" / gone).rename(tmp_path / "wikiart/Cubism/new_one.jpg")
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--small-dir", str(tmp_path / "small")]
    assert tm.main([*flags, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"paintings of the run not on disk: 1 ({gone})" in printed
    assert "paintings that are not of the run: 9 (Cubism/new_one.jpg, Realism/" in printed
    assert "split: 29 train, 5 validation, 5 test paintings in 5 classes" in printed
    assert tm.load_checkpoint(out / "model_last.pth")["split"] == split


def test_a_painting_spelt_otherwise_since_goes_on(copied, capsys, finished, tmp_path):
    """As on another disk, where odd characters are written in another form of Unicode."""
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    path = next(iter(tm.load_checkpoint(out / "model_last.pth")["split"]["train"]))
    there = tmp_path / "wikiart" / path
    there.rename(there.with_name(there.name.replace("_", "_\u0301")))
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--small-dir", str(tmp_path / "small")]
    assert tm.main([*flags, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "of the run" not in printed and "split: 30 train, 5 validation, 5 test" in printed


def test_the_wrong_folder_loses_nothing(copied, capsys, tmp_path):
    """The same styles, other paintings: an error; and the right folder goes on as if never left."""
    out, flags = copied
    before = contents(out)
    paint_artgan(tmp_path / "wrong", each=3, size=(60, 50), seed=5)
    for path in list((tmp_path / "wrong").rglob("*.jpg")):
        path.rename(path.with_name(f"other-{path.name}"))
    wrong = [*flags, "--data-dir", str(tmp_path / "wrong"), "--small-dir", str(tmp_path / "small")]
    assert tm.main([*wrong, "--epochs", "3"]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: 40 paintings .* none of them is in \S+/wrong, .*", error)
    assert before == contents(out)
    assert not (tmp_path / "small").exists()
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert "split: 30 train, 5 validation, 5 test" in capsys.readouterr().out


def test_a_finished_run_says_so_and_stays(copied, capsys):
    """Also with a smaller EPOCHS."""
    out, flags = copied
    before = contents(out)
    for epochs in ("2", "1"):
        assert tm.main([*flags, "--epochs", epochs]) == 0
        assert "all 2 epochs are trained; a larger EPOCHS trains further" in capsys.readouterr().out
        assert before == contents(out)


def test_of_equally_good_epochs_the_first_is_the_best(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tm, "evaluate", lambda *_: torch.eye(5))  # all right
    assert tm.main([*finished.flags, "--output-dir", str(tmp_path), "--epochs", "2"]) == 0
    assert len(tm.load_checkpoint(tmp_path / "model_last.pth")["history"]) == 2
    best = tm.load_checkpoint(tmp_path / "model_best.pth")["history"]
    assert [row["validation_accuracy"] for row in best] == [1]


def test_a_run_goes_on_where_another_precision_pays(copied, monkeypatch):
    """As from a GPU with bf16 to one that has fp16 alone, which takes a scaler, and back."""
    out, flags = copied
    real = tm.move_to_fastest

    def with_fp16(model):
        device = real(model)
        model.precision = torch.float16
        return device

    assert not tm.load_checkpoint(out / "model_last.pth")["scaler"]
    with monkeypatch.context() as patch:
        patch.setattr(tm, "move_to_fastest", with_fp16)
        assert tm.main([*flags, "--epochs", "3"]) == 0
    assert tm.load_checkpoint(out / "model_last.pth")["scaler"]
    assert tm.main([*flags, "--epochs", "4"]) == 0


def test_a_best_checkpoint_alone_is_not_overwritten(copied, capsys):
    """Unless it is that of a first epoch, which is as soon repeated."""
    out, flags = copied
    best = tm.load_checkpoint(out / "model_best.pth")
    best["history"] = best["history"][:1] * 2
    torch.save(best, out / "model_best.pth")
    (out / "model_last.pth").unlink()
    before = contents(out)
    assert tm.main([*flags, "--epochs", "3"]) == 1
    assert "model_last.pth, which going on takes, is not there" in capsys.readouterr().err
    assert contents(out) == before


# --------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    tm.write_whole(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
            tm.write_whole(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_keeps_the_older_checkpoint(copied, finished, tmp_path, capsys):
    """A limit on the size of files stops the next checkpoint; without it, the run goes on."""
    out, flags = copied
    before = contents(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model_last.pth"]) * 9 // 10, hard))
    try:
        assert tm.main([*flags, "--epochs", "3"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: cannot write {out}/model_last.pth: File too large")
    after = contents(out)
    assert after.keys() == before.keys()
    assert after["model_last.pth"] == before["model_last.pth"]
    assert tm.main([*flags, "--epochs", "3"]) == 0
    shutil.copytree(finished.out, tmp_path / "never full")
    assert tm.main([*flags, "--epochs", "3", "--output-dir", str(tmp_path / "never full")]) == 0
    check_same_runs(out, tmp_path / "never full")


# --------------------------------------------------------------------------------------- reading


class Hostile:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def damage(path, kind):
    """Make a checkpoint one that must be refused."""
    content = path.read_bytes()
    checkpoint = tm.load_checkpoint(path)
    weights = checkpoint["model"]
    if kind == "cut":
        path.write_bytes(content[: len(content) * 6 // 10])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no checkpoint")
    elif kind == "flipped":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        place = largest.header_offset + largest.file_size // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind == "hostile":
        torch.save({**checkpoint, "extra": Hostile(path.with_name("ran"))}, path)
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(path.with_name("ran"))))
    elif kind == "whole model":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "plain tensors":
        torch.save(weights, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "later format":
        torch.save({**checkpoint, "format": 99}, path)
    elif kind == "former format":  # which had other keys
        torch.save({"format": 1, "epoch": 1, "model": weights, "test": {}, "artists": {}}, path)
    elif kind == "missing tensor":
        weights.pop("linear.bias")
    elif kind == "extra tensor":
        weights["linear.more"] = torch.zeros(1)
    elif kind == "shape":
        weights["linear.bias"] = torch.zeros(99)
    if path.read_bytes() == content:
        torch.save(checkpoint, path)


REASONS = {
    "cut": "cut off", "empty": "cut off", "text": "cut off, no PyTorch file",
    "flipped": "damaged .the checksum", "hostile": "could run code", "hostile pickle": "refused",
    "whole model": "could run code", "plain tensors": "did not write it",
    "list": "did not write it", "later format": "did not write it",
    "former format": "did not write it; test it with the version that did, or move it away",
    "missing tensor": "linear.bias", "extra tensor": "linear.more", "shape": "linear.bias",
}


@pytest.mark.parametrize("kind", REASONS)
def test_foreign_checkpoints_are_refused(copied, capsys, kind):
    out, flags = copied
    places = [*flags[:2], *flags[4:6], "--output-dir", str(out)]
    for name, script, given in (("model_last.pth", tm, [*flags, "--epochs", "3"]),
                                ("model_best.pth", test_model, places)):
        damage(out / name, kind)
        before = contents(out)
        assert script.main(given) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {out}/{name} is refused") and "\n" not in error
        assert re.search(REASONS[kind], error), error
        assert "weights_only" not in error
        assert contents(out) == before
    assert not (out / "ran").exists()
