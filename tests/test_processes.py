"""Several processes by torchrun: the same split, the same counts, the same accuracy."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_model
import train_model as tm
from tests.conftest import QUICK, folders

ROOT = Path(__file__).resolve().parent.parent
DIFFERENT = "error: the processes see different settings, paintings or checkpoints: "


def torchrun(script, *flags, code=None, count=2):
    """Run a script in so many processes on the CPU, or code that calls its main."""
    if code:
        flags = (str(script), *flags)
        script = flags[0]
        Path(script).write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n")
        flags = flags[1:]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), str(script), *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def accuracies(text):
    return re.findall(r"Test accuracy: .*", text)


@pytest.fixture(scope="module")
def pair(finished, tmp_path_factory):
    """Return a folder in which two processes have trained one epoch, their output, and flags.

    Each time before they evaluate, both must have the same weights.
    """
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(finished.folder / "wikiart", folder / "wikiart")
    flags = [*folders(folder), *QUICK]
    code = ("import train_model as tm\n"
            "evaluate = tm.evaluate\n"
            "def evaluate_alike(model, *given):\n"
            "    tm.check_alike(*(value.double().sum().item() for value in model.parameters()))\n"
            "    return evaluate(model, *given)\n"
            "tm.evaluate = evaluate_alike\n"
            "sys.exit(tm.main(sys.argv[1:]))")
    run = torchrun(folder / "run.py", *flags, "--epochs", "1", code=code)
    assert run.returncode == 0, run.stderr
    return folder, flags, run.stdout


def test_two_processes_train_as_one_says_it(pair, finished):
    folder, _, out = pair
    assert out.count("epoch 1/1: training loss") == 1 and out.count("small copies: 40 written") == 1
    together = tm.load_checkpoint(folder / "out/model_last.pth")
    alone = tm.load_checkpoint(finished.out / "model_last.pth")
    assert together["split"] == alone["split"]
    # the same batches and crops, so nearly the same loss; norms see halves of the batches
    loss = together["history"][0]["training_loss"]
    assert loss == pytest.approx(alone["history"][0]["training_loss"], rel=0.25)


def test_two_processes_test_as_one(pair, capsys):
    folder, flags, _ = pair
    places = [*flags[:2], *flags[4:8], "--workers", "0"]
    run = torchrun(ROOT / "test_model.py", *places)
    assert run.returncode == 0, run.stderr
    with open(folder / "out/predictions.csv", newline="") as file:
        together = list(csv.DictReader(file))
    assert test_model.main(places) == 0
    with open(folder / "out/predictions.csv", newline="") as file:
        alone = list(csv.DictReader(file))
    assert accuracies(run.stdout) == accuracies(capsys.readouterr().out)
    assert [(row["path"], row["predicted"]) for row in together] == [
        (row["path"], row["predicted"]) for row in alone]


def test_going_on_with_another_number_of_processes(pair):
    folder, flags, _ = pair
    assert tm.main([*flags, "--epochs", "2"]) == 0
    run = torchrun(ROOT / "train_model.py", *flags, "--epochs", "3")
    assert run.returncode == 0, run.stderr
    assert tm.load_checkpoint(folder / "out/model_last.pth")["epoch"] == 3


def with_other_flags(*others):
    """Return code in which the second process has further flags, as on another machine."""
    return ("import os, train_model, test_model\nflags = sys.argv[1:]\n"
            f"flags += {list(map(str, others))} * int(os.environ['RANK'])\n")


def test_different_paintings_are_an_error(pair, tmp_path):
    """The second process sees another folder, in training and in testing."""
    folder, flags, _ = pair
    shutil.copytree(folder / "wikiart", tmp_path / "wikiart")
    for path in tm.load_checkpoint(folder / "out/model_best.pth")["test"]:
        (tmp_path / "wikiart" / path).unlink()
        break
    code = with_other_flags("--data-dir", tmp_path / "wikiart")
    run = torchrun(tmp_path / "run.py", *flags, "--output-dir", tmp_path / "out", "--epochs", "1",
                   code=code + "sys.exit(train_model.main(flags))")
    assert run.returncode != 0 and DIFFERENT in run.stderr
    assert not (tmp_path / "out/model_last.pth").exists()
    run = torchrun(tmp_path / "run.py", *flags[:2], *flags[4:8], "--workers", "0",
                   code=code + "sys.exit(test_model.main(flags))")
    assert run.returncode != 0 and DIFFERENT in run.stderr
    assert not accuracies(run.stdout)


def test_different_settings_are_an_error(pair, tmp_path):
    """Other batches on the second machine would leave both waiting for ever."""
    run = torchrun(tmp_path / "run.py", *pair[1], "--output-dir", tmp_path / "out", "--epochs", "1",
                   code=with_other_flags("--batch-size", 7) + "sys.exit(train_model.main(flags))")
    assert run.returncode != 0 and DIFFERENT in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_first_process_ends_the_others_without_a_traceback(pair, tmp_path):
    code = ("import os, time, train_model\n"
            "def fail(*_):\n    raise OSError('the disk is full')\n"
            "train_model.prepare = fail\n"
            "code = train_model.main(sys.argv[1:])\n"
            "if os.environ['RANK'] == '0':\n"  # which outlives the other: torchrun would stop that
            "    train_model.distributed.destroy_process_group()\n    time.sleep(4)\n"
            "sys.exit(code)")
    run = torchrun(tmp_path / "run.py", *pair[1], "--output-dir", tmp_path / "out", "--epochs", "1",
                   code=code)
    assert run.returncode != 0 and "error: the disk is full" in run.stderr
    assert "error: another process stopped" in run.stderr and "rank1]: Trace" not in run.stderr


def test_one_process_classifies_ones_own_pictures(pair, tmp_path):
    folder, flags, _ = pair
    (tmp_path / "junk.jpg").write_text("no picture")
    run = torchrun(ROOT / "test_model.py", tmp_path, folder / "wikiart/Cubism", *flags[4:8])
    assert run.returncode != 0 and run.stderr.count("junk.jpg: cannot be read") == 1
    assert run.stdout.count(" %\n") == 8


def test_a_process_that_dies_ends_the_others(pair, tmp_path):
    folder, flags, _ = pair
    shutil.copytree(folder / "out", tmp_path / "out")
    before = tm.load_checkpoint(tmp_path / "out/model_last.pth")["epoch"]
    code = ("import os, signal, train_model\n"
            "if os.environ['RANK'] == '1':\n"
            "    train_model.train_epoch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "sys.exit(train_model.main(sys.argv[1:]))")
    run = torchrun(tmp_path / "run.py", *flags, "--output-dir", tmp_path / "out", "--epochs", "9",
                   code=code)
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    assert tm.load_checkpoint(tmp_path / "out/model_last.pth")["epoch"] == before


def test_more_processes_than_gpus_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tm.main(["--epochs", "1"]) == 1
    assert "more processes than the 2 GPUs here" in capsys.readouterr().err


def test_batches_that_cannot_be_shared_are_an_error(monkeypatch):
    monkeypatch.setattr(tm, "processes", lambda: (3, 4))
    with pytest.raises(ValueError, match="4 processes cannot share 2 paintings"):
        tm.Batches(2).shuffle(range(10), 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_of_a_batch_are_the_batch(monkeypatch, count):
    taken = []
    for rank in range(count):
        monkeypatch.setattr(tm, "processes", lambda rank=rank: (rank, count))
        batches = tm.Batches(8, seed=1)
        batches.shuffle(range(43), 2)
        taken.append(list(batches))
    monkeypatch.setattr(tm, "processes", lambda: (0, 1))
    whole = tm.Batches(8, seed=1)
    whole.shuffle(range(43), 2)
    for place, batch in enumerate(whole):
        assert sorted(key for batches in taken for key in batches[place]) == sorted(batch)
        assert abs(len(taken[0][place]) - len(taken[-1][place])) <= 1
