"""Several processes by torchrun: what the first says is done, and it is what one alone does."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import test_model
import train_model as tm
from tests.conftest import QUICK, TINY, folders

ROOT = Path(__file__).resolve().parent.parent
START = (f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{TINY}"
         "rank = os.environ['RANK']\n")
# Prints the norm of each step's gradient, of all processes; and before an evaluation whether all
# have the same weights and statistics.
WATCHED = """
import torch
clip, evaluate = torch.nn.utils.clip_grad_norm_, tm.evaluate

def clip_and_print(*given):
    norm = clip(*given)
    print(f"norm {norm.item():.6g}")
    return norm

def evaluate_alike(model, *given):
    if tm.WORLD_SIZE > 1:
        sums = [None] * 2
        own = [value.double().sum().item() for value in model.state_dict().values()]
        torch.distributed.all_gather_object(sums, own)
        print("alike" if sums[0] == sums[1] else f"different {sums}")
    return evaluate(model, *given)

torch.nn.utils.clip_grad_norm_, tm.evaluate = clip_and_print, evaluate_alike
"""


def torchrun(script, code):
    """Run code, with the tiny network, in two processes on the CPU; return the finished process."""
    script.write_text(START + code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def norms(text):
    return [float(norm) for norm in re.findall(r"(?m)^norm (\S+)", text)]


@pytest.fixture(scope="module")
def together(finished, tmp_path_factory):
    """Return what two processes print that train, test, and go on with another's run, and flags.

    The second has other flags throughout. Norms are fixed in the first run, and nothing is dropped,
    so that shares of a batch can be compared with the whole.
    """
    folder = tmp_path_factory.mktemp("together")
    torch.manual_seed(6)
    torch.save(tm.resnet50().state_dict(), folder / "resnet.pth")
    shutil.copytree(finished.folder / "wikiart", folder / "wikiart")
    flags = [*folders(folder), *QUICK, "--weights", str(folder / "resnet.pth"), "--dropout", "0",
             "--frozen-epochs", "0", "--epochs", "1"]
    places = [*flags[:2], *flags[4:8], "--workers", "0"]
    shutil.copytree(finished.out, folder / "others")
    going_on = [*finished.flags, "--output-dir", str(folder / "others"), "--epochs", "3"]
    other = ["--batch-size", "7", "--seed", "3", "--epochs", "9", "--data-dir", "nowhere",
             "--output-dir", str(folder / "elsewhere"), "--workers", "1"]
    code = f"""{WATCHED}
tm.distributed.destroy_process_group = lambda: None
other = {other!r} if rank == "1" else []
print("### train")
assert tm.main([*{flags!r}, *other]) == 0
tm.join_processes = lambda: None  # they still are
print("### test")
other = [flag for flag in other if flag not in ("--seed", "3", "--epochs", "9")]
assert test_model.main([*{places!r}, *other]) == 0
print("### go on")
assert tm.main([*{going_on!r}, *other]) == 0
"""
    run = torchrun(folder / "run.py", code)
    assert run.returncode == 0, run.stderr
    printed = dict(part.split("\n", 1) for part in run.stdout.split("### ")[1:])
    return SimpleNamespace(folder=folder, flags=flags, places=places, going_on=going_on,
                           printed=printed)


def test_two_processes_train_as_one(together, tmp_path, monkeypatch, capsys):
    """The same split, batches, crops and gradients, all of them by the first process's flags."""
    out, folder = together.printed["train"], together.folder
    assert len(re.findall(r"(?m)^ +1/1 ", out)) == out.count("small copies: 40 written") == 1
    assert out.count("alike\n") == 1 and not (folder / "elsewhere").exists()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
        patch.setattr(tm, "evaluate", tm.evaluate)
        exec(WATCHED, {"tm": tm})
        assert tm.main([*together.flags, "--output-dir", str(tmp_path)]) == 0
    assert len(norms(out)) == 4
    assert norms(out) == pytest.approx(norms(capsys.readouterr().out), rel=2e-3)
    joint, alone = (tm.load_checkpoint(path / "model_last.pth")
                    for path in (folder / "out", tmp_path))
    for name in ("split", "settings", "class_names", "split_source"):
        assert joint[name] == alone[name]
    for part in ("train", "validation"):
        torch.testing.assert_close(joint["margins"][part], alone["margins"][part], atol=2e-3,
                                   rtol=0)
    for name in ("training_loss", "validation_loss"):
        assert joint["history"][0][name] == pytest.approx(alone["history"][0][name], rel=2e-3)


def test_two_processes_test_as_one(together, capsys):
    table = together.folder / "out/predictions.csv"

    def rows():
        with open(table, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    two = rows()
    table.unlink()
    assert test_model.main(together.places) == 0
    assert len(two) == 5 and [row | {"probability": 0, "class_probability": 0} for row in two] == [
        row | {"probability": 0, "class_probability": 0} for row in rows()]
    for name in ("probability", "class_probability"):
        assert [float(row[name]) for row in two] == pytest.approx(
            [float(row[name]) for row in rows()], abs=1e-4)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Test accuracy: ") and together.printed["test"].splitlines()[-1] == last


def test_going_on_with_another_number_of_processes(together):
    """A run of one process goes on in two, whose norms see shares of batches, and in one again."""
    out = together.printed["go on"]
    assert out.count("going on after epoch 2") == len(re.findall(r"(?m)^ +3/3 ", out)) == 1
    assert out.count("alike\n") == 1
    assert tm.main([*together.going_on, "--epochs", "4"]) == 0
    last = tm.load_checkpoint(together.folder / "others/model_last.pth")
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3, 4]


def test_an_error_of_the_first_process_ends_the_others_without_a_traceback(together, tmp_path):
    """And one process alone classifies one's own pictures, one of which is none."""
    (tmp_path / "junk.jpg").write_text("no picture")
    flags = [str(tmp_path), str(together.folder / "wikiart/Cubism"), *together.places]
    run = torchrun(tmp_path / "run.py", f"""
import signal
if rank == "1":  # else torchrun ends it, perhaps before it says a word
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(test_model.main({flags!r}))
""")
    assert run.returncode != 0 and run.stderr.count("junk.jpg: cannot be read") == 1
    assert run.stdout.count("%\n") == 8
    assert run.stderr.count("error: 1 of 9 pictures could not be read") == 1
    assert "another process stopped; its own message says why" in run.stderr
    assert 'test_model.py", line' not in run.stderr and 'train_model.py", line' not in run.stderr


def test_a_process_that_dies_ends_the_others(together, finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "out")
    before = (tmp_path / "out/model_last.pth").read_bytes()
    run = torchrun(tmp_path / "run.py", f"""
import signal
if rank == "1":
    tm.train_epoch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(tm.main({[*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "9"]!r}))
""")
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    assert (tmp_path / "out/model_last.pth").read_bytes() == before


def test_fewer_paintings_a_batch_than_processes_are_refused_early(monkeypatch):
    monkeypatch.setattr(tm, "WORLD_SIZE", 4)
    parser = tm.make_parser(tm.__doc__, tm.SETTINGS, tm.__file__)
    with pytest.raises(ValueError, match="BATCH_SIZE must be a whole number from 4 to"):
        tm.check_settings(parser.parse_args(["--batch-size", "3"]))


def test_more_processes_than_gpus_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refuse(number):
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be...")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    assert tm.main(["--epochs", "1"]) == 1
    assert "more processes than there are GPUs" in capsys.readouterr().err


def test_batches_that_cannot_be_shared_are_an_error(monkeypatch):
    monkeypatch.setattr(tm, "WORLD_SIZE", 4)
    with pytest.raises(ValueError, match="4 processes cannot share .* 2 paintings.*BATCH_SIZE"):
        tm.Batches(10, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [1, None])
def test_shares_of_a_batch_are_the_batch(monkeypatch, count, seed):
    def batches():
        made = tm.Batches(43, 8, seed)
        made.epoch = 2
        return list(made), made.sizes

    whole, sizes = batches()
    monkeypatch.setattr(tm, "WORLD_SIZE", count)
    taken = []
    for number in range(count):
        monkeypatch.setattr(tm, "RANK", number)
        shares, same_sizes = batches()
        assert same_sizes == sizes == [len(batch) for batch in whole]
        taken.append(shares)
    for place, batch in enumerate(whole):
        assert sorted(key for shares in taken for key in shares[place]) == sorted(batch)
        assert abs(len(taken[0][place]) - len(taken[-1][place])) <= 1
