"""Checkpoints: written whole, loaded safely, and gone on from exactly."""

import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import test_model
import train_model as tm
from tests.paintings import paint_artgan

ROOT = Path(__file__).resolve().parent.parent


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


TIMES = ("seconds", "paintings_per_second")


def check_same_runs(one, other):
    """Fail unless two OUTPUT_DIRs hold the same run, times aside."""
    for name in ("model_last.pth", "model_best.pth"):
        same(tm.load_checkpoint(one / name), tm.load_checkpoint(other / name), name)
    assert (one / "class_names.txt").read_bytes() == (other / "class_names.txt").read_bytes()
    columns = [[line.split(",")[:5] for line in (out / "history.csv").read_text().splitlines()]
               for out in (one, other)]
    assert columns[0] == columns[1]


# --------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """Return the OUTPUT_DIR of a run that Ctrl-C stopped in the middle of epoch 2."""
    out = tmp_path_factory.mktemp("stopped")
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def stop_in_the_sixth_step(*given):
        steps.append(1)
        if len(steps) == 6:  # 4 steps are an epoch
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_sixth_step)
        patch.setattr(tm.signal, "signal", lambda *_: None)  # Ctrl-C goes on to stop the tests
        flags = [*finished.flags, "--output-dir", str(out), "--epochs", "2", "--workers", "1"]
        assert tm.main(flags) == 130
    assert tm.load_checkpoint(out / "model_last.pth")["epoch"] == 1
    return out


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_a_continued_run_is_the_run_never_stopped(finished, stopped, tmp_path, workers):
    """Continued with as many workers as before the stop, and with others: bit for bit."""
    shutil.copytree(stopped, tmp_path / "out")
    flags = [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "2"]
    assert tm.main([*flags, "--workers", workers]) == 0
    check_same_runs(finished.out, tmp_path / "out")


def test_moments_in_another_memory_format_change_nothing(finished, copied, tmp_path):
    """On a Mac the optimizer's moments are contiguous; a CPU wants them channels_last."""
    out, flags = copied
    last = tm.load_checkpoint(out / "model_last.pth")
    for moments in last["optimizer"]["state"].values():
        moments |= {name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    torch.save(last, out / "model_last.pth")
    shutil.copytree(finished.out, tmp_path / "own")
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert tm.main([*flags, "--epochs", "3", "--output-dir", str(tmp_path / "own")]) == 0
    check_same_runs(out, tmp_path / "own")


def test_a_kill_between_the_two_checkpoints_is_made_good(finished, copied):
    out, flags = copied
    best = tm.load_checkpoint(out / "model_best.pth")
    last = tm.load_checkpoint(out / "model_last.pth")
    if best["epoch"] != last["epoch"]:
        last["history"][-1]["validation_accuracy"] = 1.0  # make the last epoch the best
        torch.save(last, out / "model_last.pth")
    (out / "model_best.pth").unlink()
    (out / "history.csv").unlink()
    assert tm.main([*flags, "--epochs", "2"]) == 0
    assert tm.load_checkpoint(out / "model_best.pth")["epoch"] == 2
    same(tm.load_checkpoint(out / "model_best.pth")["model"], last["model"])
    assert (out / "history.csv").exists()


def test_other_settings_are_refused_by_name(copied, capsys):
    out, flags = copied
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert tm.main([*flags, "--epochs", "3", "--seed", "5", "--learning-rate", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "SEED: then 0, now 5" in error and "LEARNING_RATE: then 0.001, now 0.5" in error
    assert "--fresh" in error and "EPOCHS" not in error
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_other_classes_are_refused(copied, capsys, finished, tmp_path):
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    shutil.copytree(tmp_path / "wikiart/Cubism", tmp_path / "wikiart/Realism")
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--small-dir", str(tmp_path / "small")]
    assert tm.main([*flags, "--epochs", "3"]) == 1
    assert "another run (class 4: then Ukiyo_e, now Realism; " in capsys.readouterr().err


def test_new_and_gone_paintings_are_said(copied, capsys, finished, tmp_path):
    out, flags = copied
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    split = tm.load_checkpoint(out / "model_last.pth")["split"]
    gone = next(iter(split["train"]))
    (tmp_path / "wikiart" / gone).rename(tmp_path / "wikiart/Cubism/new_one.jpg")
    flags += ["--data-dir", str(tmp_path / "wikiart"), "--small-dir", str(tmp_path / "small")]
    (tmp_path / "small/Cubism").mkdir(parents=True)
    (tmp_path / "small/Cubism/left.jpg").touch()
    assert tm.main([*flags, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "small copies whose painting is gone: 1 (Cubism/left.jpg)" in printed
    assert f"paintings of the run that are gone: 1 ({gone})" in printed
    assert "new since the run began, left out: 1 (Cubism/new_one.jpg)" in printed
    assert "split: 29 train, 5 validation, 5 test" in printed


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
    assert "paintings of the run" not in printed and "new since" not in printed
    assert "split: 30 train, 5 validation, 5 test" in printed


def test_the_wrong_folder_loses_nothing(copied, capsys, tmp_path):
    """The same styles, other paintings: an error; and the right folder goes on as if never left."""
    out, flags = copied
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    paint_artgan(tmp_path / "wrong", each=3, size=(60, 50), seed=5)
    for path in list((tmp_path / "wrong").rglob("*.jpg")):
        path.rename(path.with_name(f"other-{path.name}"))
    wrong = [*flags, "--data-dir", str(tmp_path / "wrong"), "--small-dir", str(tmp_path / "small")]
    assert tm.main([*wrong, "--epochs", "3"]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("error: .* two classes with enough paintings, and has 0.*DATA_DIR.*", error)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert not (tmp_path / "small").exists()
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert "split: 30 train, 5 validation, 5 test" in capsys.readouterr().out


def test_a_finished_run_says_so_and_stays(copied, capsys):
    """Also with a smaller EPOCHS, and where its last epoch, whose files are mended, is the best."""
    out, flags = copied
    last = tm.load_checkpoint(out / "model_last.pth")
    last["history"][0]["validation_accuracy"] = -1.0
    torch.save(last, out / "model_last.pth")
    before = (out / "model_last.pth").read_bytes()
    for epochs in ("2", "1"):
        (out / "model_best.pth").unlink()
        assert tm.main([*flags, "--epochs", epochs]) == 0
        assert "all 2 epochs are trained; a larger EPOCHS trains further" in capsys.readouterr().out
        assert (out / "model_last.pth").read_bytes() == before
        best = tm.load_checkpoint(out / "model_best.pth")
        same(best, {name: last[name] for name in best})


def test_of_equally_good_epochs_the_first_is_the_best(copied, monkeypatch):
    out, flags = copied
    monkeypatch.setattr(tm, "evaluate", lambda *_: (torch.eye(5), torch.arange(5)))  # all right
    assert tm.main([*flags, "--epochs", "2", "--fresh"]) == 0
    best = tm.load_checkpoint(out / "model_best.pth")
    assert best["validation_accuracy"] == 1 and best["epoch"] == 1


def test_a_run_begun_without_a_scaler_goes_on_with_one(copied, monkeypatch):
    """As from a GPU with bf16 to one that has fp16 alone."""
    out, flags = copied
    monkeypatch.setattr(tm, "choose_device", lambda: (torch.device("cpu"), torch.float16))
    assert tm.load_checkpoint(out / "model_last.pth")["scaler"] == {}
    assert tm.main([*flags, "--epochs", "2"]) == 0


def test_fresh_moves_the_earlier_run_aside(copied, capsys):
    out, flags = copied
    old = (out / "model_last.pth").read_bytes()
    for number in (1, 2):
        assert tm.main([*flags, "--epochs", "1", "--fresh"]) == 0
        assert f"the earlier run is now in {out}/previous-{number}" in capsys.readouterr().out
    assert (out / "previous-1/model_last.pth").read_bytes() == old
    assert (out / "previous-2/model_best.pth").exists()
    assert tm.load_checkpoint(out / "model_last.pth")["epoch"] == 1


def test_a_best_checkpoint_alone_is_not_overwritten(copied, capsys):
    out, flags = copied
    (out / "model_last.pth").unlink()
    best = (out / "model_best.pth").read_bytes()
    assert tm.main([*flags, "--epochs", "3"]) == 1
    assert "without model_last.pth" in capsys.readouterr().err
    assert (out / "model_best.pth").read_bytes() == best


# --------------------------------------------------------------------------------------- writing


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "file"
    tm.write_whole(path, b"old")

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
        tm.write_whole(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_older_checkpoint(copied):
    """A limit on the size of files stops the next checkpoint; the older one stays whole."""
    out, flags = copied
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code = ("import resource, signal, sys, train_model as tm\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))\n"
            f"sys.exit(tm.main({[*flags, '--epochs', '3']!r}))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot write {out}/model_last.pth: File too large"), run.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


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
    if "optimizer" in checkpoint:  # two thirds of the file, and not what is refused here
        checkpoint["optimizer"] = {}
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
    elif kind == "format":
        torch.save({**checkpoint, "format": 99}, path)
    elif kind == "no names":
        torch.save({name: checkpoint[name] for name in checkpoint if name != "class_names"}, path)
    elif kind == "missing tensor":
        weights.pop("linear.bias")
    elif kind == "extra tensor":
        weights["linear.more"] = torch.zeros(1)
    elif kind == "shape":
        weights["linear.bias"] = torch.zeros(99)
    elif kind == "nan":
        weights["linear.bias"][0] = torch.nan
    elif kind == "whole numbers":
        weights["linear.bias"] = weights["linear.bias"].long()
    elif kind == "labels":
        checkpoint["test"][next(iter(checkpoint["test"]))] = 5
    elif kind == "history":
        checkpoint["history"].pop()
    elif kind == "names":
        checkpoint["class_names"] = "abcde"
    if path.read_bytes() == content:
        torch.save(checkpoint, path)


REASONS = {
    "cut": "cut off", "empty": "cut off", "text": "cut off, or is no PyTorch",
    "flipped": "damaged .the checksum", "hostile": "could run code", "hostile pickle": "refused",
    "whole model": "could run code", "plain tensors": "did not write it",
    "list": "did not write it", "format": "format is 99",
    "no names": "lacks class_names",
    "missing tensor": "linear.bias", "extra tensor": "linear.more",
    "shape": "linear.bias", "nan": "linear.bias", "whole numbers": "linear.bias",
    "labels": "do not fit together", "history": "do not fit together",
    "names": "class_names, or has another form",
}


@pytest.mark.parametrize("kind", REASONS)
def test_foreign_checkpoints_are_refused(copied, capsys, kind):
    out, flags = copied
    for script, name in ((tm, "model_last.pth"), (test_model, "model_best.pth")):
        if script is tm and "linear" in REASONS[kind]:
            continue  # what holds for the tensors of the one holds for the other
        damage(out / name, kind)
        before = (out / name).read_bytes()
        places = flags if script is tm else flags[:2] + flags[4:6] + ["--output-dir", str(out)]
        more = ["--epochs", "3"] if script is tm else []
        assert script.main([*places, *more]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {out}/{name} is refused") and "\n" not in error
        assert re.search(REASONS[kind], error), error
        assert "weights_only" not in error
        assert (out / name).read_bytes() == before
    assert not (out / "ran").exists()
