"""Checkpoints: written whole or not at all, loaded safely, and resumed from exactly."""

import contextlib
import csv
import itertools
import math
import os
import pickle
import re
import resource
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

import test_model
import train_model as tm
from tests.conftest import folders_to_test
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


# --------------------------------------------------------------------------------------- resuming


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
def test_a_resumed_run_is_the_run_never_stopped(finished_in, precision, tmp_path, workers):
    """Stopped in the middle of epoch 2; resumed with as many workers or others: bit for bit."""
    finished = finished_in(precision)
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "2"]
    with ctrl_c(torch.nn.utils, "clip_grad_norm_", 6):  # 4 steps are an epoch
        assert tm.main([*flags, "--workers", "1"]) == 130
    last = tm.load_checkpoint(tmp_path / "model_last.pth")
    assert len(last["history"]) == 1 and precision in last["device"]
    assert tm.main([*flags, "--workers", workers]) == 0
    check_same_runs(finished.out, tmp_path)


def test_a_stop_between_the_two_checkpoints_is_made_good(finished, tmp_path, monkeypatch):
    """Of the first epoch, and of the second, which is the better one; and a stop before them."""
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
    checkpoints = [number for number, name in enumerate(written, 1) if name.endswith(".pth")]
    names = [written[number - 1] for number in checkpoints]
    assert names == ["model_last.pth", "model_best.pth"] * 2
    for number in checkpoints[1:]:
        out = tmp_path / str(number)
        with ctrl_c(os, "replace", number):
            assert run(out) == 130
        assert run(out) == 0
        check_same_runs(tmp_path / "whole", out)
        assert contents(out).keys() == {".lock", *written}


def test_other_settings_are_refused_by_name(copied, capsys):
    out, flags = copied
    before = contents(out)
    others = ["--epochs", "3", "--seed", "5", "--dropout", "0.5", "--learning-rate", "0.5"]
    assert tm.main([*flags, *others]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {out}/model_last.pth ") and "\n" not in error
    assert re.search(r"SEED\D+0\D+5\D.*DROPOUT|DROPOUT.*SEED\D+0\D+5\D", error)
    for name in ("EPOCHS", "LEARNING_RATE", "WORKERS", "DATA_DIR"):
        assert name not in error
    for advice in ("undo", "another OUTPUT_DIR", "move", str(out)):
        assert advice in error
    assert before == contents(out)


def test_settings_of_a_run_must_stay(copied, capsys):
    """All but EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHTS, WORKERS and the folders."""
    out, flags = copied
    others = {"ATTRIBUTE": "artist", "GROUP_BY": "artist", "MIN_PAINTINGS": 2, "IMAGE_SIZE": 65,
              "BACKBONE_RATE": 1.0, "FROZEN_EPOCHS": 2, "WARMUP_EPOCHS": 1.0, "WEIGHT_DECAY": 0.0,
              "DROPOUT": 0.0, "SEED": 1, "CORRECTIONS": "none"}
    free = {"EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "WEIGHTS", "WORKERS",
            *(name for name in tm.SETTINGS if name.endswith("_DIR"))}
    assert others.keys() == set(tm.SETTINGS) - free
    for name, value in others.items():
        flag = "--" + name.lower().replace("_", "-")
        assert tm.main([*flags, "--epochs", "9", flag, str(value)]) == 1
        error = capsys.readouterr().err
        assert re.search(rf"\b{name}\b.*\b{value}\b", error), error
        assert not any(re.search(rf"\b{other}\b", error) for other in others if other != name)


def test_another_learning_rate_is_used_from_there_on(copied, capsys):
    """As the error about numbers that are not finite advises; what was learned is kept."""
    out, flags = copied
    moved = {}
    for rate in ("0.001", "1e-9"):
        shutil.copytree(out, other := out.with_name(rate))
        before = tm.load_checkpoint(other / "model_last.pth")
        more = [*flags, "--output-dir", str(other), "--learning-rate", rate]
        assert tm.main([*more, "--epochs", "3"]) == 0
        printed = capsys.readouterr().out
        assert bool(re.search(r"LEARNING_RATE.*0\.001.*1e-09", printed)) == (rate == "1e-9")
        after = tm.load_checkpoint(other / "model_last.pth")
        moved[rate] = max((after["model"][name] - value).abs().max().item()
                          for name, value in before["model"].items() if "running" not in name
                          and value.is_floating_point())
        assert after["settings"]["LEARNING_RATE"] == float(rate)
        assert 0 < after["history"][2]["learning_rate"] < float(rate)
        assert [row["learning_rate"] for row in after["history"][:2]] == [
            row["learning_rate"] for row in before["history"]]
    assert moved["1e-9"] < 1e-7 and moved["0.001"] > 1e-4


def test_a_smaller_batch_is_used_from_there_on(copied, capsys):
    """As an error about memory advises; AdamW's averages and their count are kept."""
    out, flags = copied

    def steps():
        optimizer = tm.load_checkpoint(out / "model_last.pth")["optimizer"]
        return {int(state["step"]) for state in optimizer.values()}

    assert steps() == {2 * 4}
    flags += ["--batch-size", "4"]
    with ctrl_c(torch.nn.utils, "clip_grad_norm_", 8 + 3):  # of 8 an epoch
        assert tm.main([*flags, "--epochs", "4"]) == 130
    assert re.search(r"BATCH_SIZE\D+8\D+4", capsys.readouterr().out)
    assert steps() == {2 * 4 + 8}
    assert tm.main([*flags, "--epochs", "4"]) == 0
    assert "BATCH_SIZE" not in capsys.readouterr().out and steps() == {2 * 4 + 2 * 8}


def test_weights_are_those_that_the_run_began_with(copied, finished, tmp_path, monkeypatch):
    """Other ones, given later, are neither loaded nor trained as if they were pretrained."""
    out, flags = copied
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert tm.main([*flags, "--epochs", "3", "--weights", "imagenet"]) == 0
    shutil.copytree(finished.out, tmp_path / "same")
    assert tm.main([*flags, "--epochs", "3", "--output-dir", str(tmp_path / "same")]) == 0
    check_same_runs(tmp_path / "same", out)


def test_new_and_missing_paintings_are_reported(copied, capsys, finished, tmp_path):
    """The classes stay, too: a folder that is new since is none."""
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    shutil.copytree(tmp_path / "wikiart/Pointillism", tmp_path / "wikiart/Realism")
    split = tm.load_checkpoint(out / "model_last.pth")["split"]
    gone = next(iter(split["train"]))
    (tmp_path / "wikiart" / gone).rename(tmp_path / "wikiart/Cubism/new_one.jpg")
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--cache-dir", str(tmp_path / "cache")]
    assert tm.main([*flags, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"this run.*: 1 \({gone}\)", printed)
    assert re.search(r"this run.*: 9 \(Cubism/new_one.jpg, Realism/", printed)
    assert "split: 29 train, 5 validation, 5 test paintings in 5 classes" in printed
    assert tm.load_checkpoint(out / "model_last.pth")["split"] == split


def test_a_painting_spelt_otherwise_since_is_resumed_with(copied, capsys, finished, tmp_path):
    """As on another disk, where odd characters are written in another form of Unicode."""
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    path = next(iter(tm.load_checkpoint(out / "model_last.pth")["split"]["train"]))
    there = tmp_path / "wikiart" / path
    there.rename(there.with_name(there.name.replace("_", "_\u0301")))
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--cache-dir", str(tmp_path / "cache")]
    assert tm.main([*flags, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "this run" not in printed and "split: 30 train, 5 validation, 5 test" in printed


def test_the_wrong_folder_loses_nothing(copied, capsys, tmp_path):
    """The same styles, other paintings: an error; with the right folder the run is resumed."""
    out, flags = copied
    before = contents(out)
    paint_artgan(tmp_path / "wrong", each=3, size=(60, 50), seed=5)
    for path in list((tmp_path / "wrong").rglob("*.jpg")):
        path.rename(path.with_name(f"other-{path.name}"))
    wrong = [*flags, "--data-dir", str(tmp_path / "wrong"), "--cache-dir", str(tmp_path / "cache")]
    assert tm.main([*wrong, "--epochs", "3"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"this run.*: 40 \(", captured.out)
    assert re.fullmatch("error: .*DATA_DIR.*", captured.err.strip())
    assert before == contents(out)
    assert not (tmp_path / "cache").exists()
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert "split: 30 train, 5 validation, 5 test" in capsys.readouterr().out


@pytest.mark.parametrize("accuracies", [[0.4, 0.2], [0.2, 0.4]])
def test_a_finished_run_says_so_and_stays(copied, capsys, accuracies):
    """Also with a smaller EPOCHS; a checkpoint of 100 MB is not written for nothing."""
    out, flags = copied
    keep_epochs(out, 2, accuracies)
    assert tm.main([*flags, "--epochs", "2"]) == 0  # writes that history to history.csv
    capsys.readouterr()
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.pth")}
    for epochs in ("2", "1"):
        assert tm.main([*flags, "--epochs", epochs]) == 0
        printed = capsys.readouterr().out
        assert "a larger EPOCHS" in printed and "test_model.py" in printed
        assert before == contents(out)
        assert all(path.stat().st_mtime_ns == times[path] for path in times)


def test_of_equally_good_epochs_the_first_is_the_best(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tm, "evaluate", lambda *_: torch.eye(5))  # all right
    assert tm.main([*finished.flags, "--output-dir", str(tmp_path), "--epochs", "2"]) == 0
    assert len(tm.load_checkpoint(tmp_path / "model_last.pth")["history"]) == 2
    best = tm.load_checkpoint(tmp_path / "model_best.pth")["history"]
    assert [row["validation_accuracy"] for row in best] == [1]


def test_a_run_is_resumed_where_another_precision_pays(copied, monkeypatch):
    """As from a GPU with bf16 to one that has fp16 alone, which takes a scaler, and back."""
    out, flags = copied
    real = tm.place_on_device

    def with_fp16(model):
        device = real(model)
        model.precision = torch.float16
        return device

    assert not tm.load_checkpoint(out / "model_last.pth")["scaler"]
    with monkeypatch.context() as patch:
        patch.setattr(tm, "place_on_device", with_fp16)
        assert tm.main([*flags, "--epochs", "3"]) == 0
    assert tm.load_checkpoint(out / "model_last.pth")["scaler"]
    assert tm.main([*flags, "--epochs", "4"]) == 0


def keep_epochs(out, epochs, accuracies):
    """Let both checkpoints say that they are of so many epochs, with these accuracies."""
    for name in ("model_last.pth", "model_best.pth"):
        run = tm.load_checkpoint(out / name)
        row = run["history"][0]
        run["history"] = [row | {"epoch": epoch, "validation_accuracy": accuracy}
                          for epoch, accuracy in enumerate(accuracies[:epochs], 1)]
        torch.save(run, out / name)


@pytest.mark.parametrize("accuracies", [[0.4], [0.4, 0.2], [0.2, 0.4]])
def test_a_best_checkpoint_alone_is_not_overwritten(copied, capsys, accuracies):
    """Whichever epoch it is of, it may be all that is left of days."""
    out, flags = copied
    keep_epochs(out, len(accuracies), accuracies)
    (out / "model_last.pth").unlink()
    before = contents(out)
    assert tm.main([*flags, "--epochs", "3"]) == 1
    assert f"error: {out}/model_last.pth is missing" in capsys.readouterr().err
    assert contents(out) == before


def test_a_last_checkpoint_alone_is_an_error_or_is_the_best(copied, capsys):
    """The best one is made again where it is the last; where it is not, it is asked for."""
    out, flags = copied
    keep_epochs(out, 2, [0.4, 0.2])
    best = out / "model_best.pth"
    best.rename(out / "elsewhere")
    before = contents(out)
    for epochs in ("2", "3"):
        assert tm.main([*flags, "--epochs", epochs]) == 1
        assert f"error: {best} is missing" in capsys.readouterr().err
        assert contents(out) == before
    keep = tm.load_checkpoint(out / "model_last.pth")
    keep["history"][1]["validation_accuracy"] = 0.6
    torch.save(keep, out / "model_last.pth")
    assert tm.main([*flags, "--epochs", "2"]) == 0
    del keep["optimizer"], keep["scaler"]
    same(tm.load_checkpoint(best), keep)


# --------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    tm.write_atomically(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
            tm.write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def refuse(monkeypatch, name, times=math.inf):
    """Let no file of this name be replaced, as on Windows while a program has it open."""
    real, count = os.replace, itertools.count(1)

    def replace(source, target):
        if Path(target).name == name and next(count) <= times:
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.parametrize("name", ["history.csv", "class_names.txt", "bad_files.txt", "crops.jpg"])
def test_a_file_only_to_be_looked_at_may_be_refused(finished, tmp_path, capsys, monkeypatch, name):
    """As one that a spreadsheet has open: the run does not need it, says so, and goes on."""
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "2"]
    with monkeypatch.context() as patch:
        refuse(patch, name)
        assert tm.main(flags) == 0
    warnings = capsys.readouterr().err.strip().splitlines()
    assert warnings and all(re.match(rf"warning: .*{tmp_path}/{name}.*Permission denied", line)
                            for line in warnings)
    assert contents(tmp_path).keys() == contents(finished.out).keys() - {name}
    assert tm.main(flags) == 0
    if name != "crops.jpg":  # of the first epoch alone
        assert (tmp_path / name).exists()
        check_same_runs(finished.out, tmp_path)


def test_a_checkpoint_refused_for_a_moment_is_written(finished, copied, tmp_path, monkeypatch,
                                                      capsys):
    """As by a virus scanner; one that is refused for good is an error, and the older one stays."""
    out, flags = copied
    with monkeypatch.context() as patch:
        refuse(patch, "model_last.pth")
        assert tm.main([*flags, "--epochs", "3"]) == 1
    assert f"error: cannot write {out}/model_last.pth: Permission denied" in capsys.readouterr().err
    assert contents(out) == contents(finished.out)
    with monkeypatch.context() as patch:
        refuse(patch, "model_last.pth", times=1)
        assert tm.main([*flags, "--epochs", "3"]) == 0
    shutil.copytree(finished.out, tmp_path / "never refused")
    assert tm.main([*flags, "--epochs", "3", "--output-dir", str(tmp_path / "never refused")]) == 0
    check_same_runs(out, tmp_path / "never refused")


def test_what_a_killed_run_left_is_cleared(copied):
    """Its unfinished files alone."""
    out, flags = copied
    before = contents(out)
    (out / f".{'0123456789abcdef'}.tmp").write_bytes(b"half a checkpoint")
    (out / "notes.tmp").write_bytes(b"mine")
    assert tm.main(flags + ["--epochs", "2"]) == 0
    assert contents(out) == before | {"notes.tmp": b"mine"}


def test_a_full_disk_keeps_the_older_checkpoint(copied, finished, tmp_path, capsys):
    """A limit on the size of files stops the next checkpoint; without it, the run is resumed."""
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
    "whole model": "could run code", "plain tensors": "version", "list": "version",
    "later format": "version",
    "former format": "version .*move it away",
    "missing tensor": "linear.bias", "extra tensor": "linear.more", "shape": "linear.bias",
}


@pytest.mark.parametrize("kind", REASONS)
def test_foreign_checkpoints_are_refused(finished, copied, capsys, kind):
    out, flags = copied
    places = [*folders_to_test(finished.folder), "--output-dir", str(out)]
    for name, script, given in (("model_last.pth", tm, [*flags, "--epochs", "3"]),
                                ("model_best.pth", test_model, places)):
        damage(out / name, kind)
        before = contents(out)
        assert script.main(given) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {out}/{name} ") and "\n" not in error
        assert re.search(REASONS[kind], error), error
        assert "weights_only" not in error
        assert contents(out) == before
    assert not (out / "ran").exists()
