"""Several processes by torchrun: what the first says is done, and it is what one alone does."""

import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, folders, folders_to_test

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


def command_of(script, code, *flags):
    """Return the command that runs code, with the tiny network, in two processes."""
    script.write_text(START + code, encoding="utf-8")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *flags, str(script)]


def torchrun(script, code):
    """Run code in two processes on the CPU; return the finished process."""
    return subprocess.run(command_of(script, code), cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


def norms(text):
    return [float(norm) for norm in re.findall(r"(?m)^norm (\S+)", text)]


@pytest.fixture(scope="module")
def together(finished_in, tmp_path_factory):
    """Return what two processes print that train, test, and resume another's run, and flags.

    The second has other flags throughout. They train and test in float32, so that shares of a batch
    can be compared with the whole, for which nothing is dropped and norms are fixed; and resume a
    run in bfloat16.
    """
    folder, finished = tmp_path_factory.mktemp("together"), finished_in("bfloat16")
    torch.manual_seed(6)
    torch.save(tm.resnet50().state_dict(), folder / "resnet.pth")
    shutil.copytree(finished.folder / "wikiart", folder / "wikiart")
    flags = [*folders(folder), *QUICK, "--weights", str(folder / "resnet.pth"), "--dropout", "0",
             "--frozen-epochs", "0", "--epochs", "1"]
    flags_to_test = [*folders_to_test(folder), "--workers", "0"]
    shutil.copytree(finished.out, folder / "others")
    resuming = [*finished.flags, "--output-dir", str(folder / "others"), "--epochs", "3"]
    other = ["--batch-size", "7", "--data-dir", "nowhere", "--output-dir",
             str(folder / "elsewhere"), "--workers", "1"]
    code = f"""{WATCHED}
tm.distributed.destroy_process_group = lambda: None
other = {other!r} if rank == "1" else []
print("### train")
assert tm.main([*{flags!r}, *other, *(["--seed", "3", "--epochs", "9"] if other else [])]) == 0
tm.join_processes = lambda: None  # they still are
print("### test")
assert test_model.main([*{flags_to_test!r}, *other]) == 0
print("### resume")
from tests.conftest import use_precision
use_precision("bfloat16")
assert tm.main([*{resuming!r}, *other]) == 0
"""
    run = torchrun(folder / "run.py", code)
    assert run.returncode == 0, run.stderr
    printed = dict(part.split("\n", 1) for part in run.stdout.split("### ")[1:])
    return SimpleNamespace(folder=folder, flags=flags, flags_to_test=flags_to_test,
                           resuming=resuming, printed=printed)


def test_two_processes_train_as_one(together, tmp_path, monkeypatch, capsys):
    """The same split, batches, crops and gradients, all of them by the first process's flags."""
    out, folder = together.printed["train"], together.folder
    assert len(re.findall(r"(?m)^ +1/1 ", out)) == out.count("resized copies: 40 made") == 1
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
    assert joint["margins"].keys() == alone["margins"].keys() and len(alone["margins"]) == 35
    for path, values in alone["margins"].items():
        assert joint["margins"][path] == pytest.approx(values, abs=2e-3), path
    for name in ("training_loss", "validation_loss"):
        assert joint["history"][0][name] == pytest.approx(alone["history"][0][name], rel=2e-3)


def test_two_processes_test_as_one(together, capsys):
    table = together.folder / "out/predictions.csv"

    def rows():
        with open(table, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    two = rows()
    table.unlink()
    assert test_model.main(together.flags_to_test) == 0
    alone = rows()
    assert len(two) == len(alone) == 5
    for name in alone[0]:
        if "probability" in name:
            assert [float(row[name]) for row in two] == pytest.approx(
                [float(row[name]) for row in alone], abs=1e-4)
        else:
            assert [row[name] for row in two] == [row[name] for row in alone]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Test accuracy: ") and together.printed["test"].splitlines()[-1] == last


def test_resuming_with_another_number_of_processes(together):
    """A run of one process resumes in two, whose norms see shares of batches, and in one again."""
    out = together.printed["resume"]
    assert out.count("resuming after epoch 2") == len(re.findall(r"(?m)^ +3/3 ", out)) == 1
    assert out.count("alike\n") == 1 and "bfloat16" in out
    assert tm.main([*together.resuming, "--epochs", "4"]) == 0
    last = tm.load_checkpoint(together.folder / "others/model_last.pth")
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3, 4]


def test_an_error_of_the_first_process_ends_the_others_without_a_traceback(together, tmp_path):
    """And one process alone classifies one's own pictures, one of which is none."""
    (tmp_path / "junk.jpg").write_text("no picture")
    flags = [str(tmp_path), str(together.folder / "wikiart/Cubism"), *together.flags_to_test]
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


def test_processes_and_torchrun_may_die(finished, tmp_path):
    """One that dies ends the other; torchrun, if told to, starts both again, which resume.

    And where torchrun is killed alone, none of them is left.
    """
    last = shutil.copytree(finished.out, tmp_path / "out") / "model_last.pth"
    shutil.copy(last, tmp_path / "before.pth")
    flags = [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "9"]
    command = command_of(tmp_path / "run.py", f"""
import signal, time
from pathlib import Path
folder, train_epoch = Path({str(tmp_path)!r}), tm.train_epoch

def train_one_and_wait(*given):
    tm.train_epoch = wait
    return train_epoch(*given)

def wait(*_):
    (folder / f"{{os.getpid()}}.pid").touch()
    time.sleep(300)

tm.train_epoch = train_one_and_wait
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if rank == "1":
        tm.train_epoch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
elif rank == "0":
    assert Path({str(last)!r}).read_bytes() == (folder / "before.pth").read_bytes()
sys.exit(tm.main({flags!r}))
""", "--max-restarts", "1")
    numbers, deadline = [], time.monotonic() + 120
    with (open(tmp_path / "printed", "w") as printed,
          subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed) as run):
        while len(numbers) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            numbers = [int(file.stem) for file in tmp_path.glob("*.pid")]
        run.kill()
    printed = (tmp_path / "printed").read_text()
    assert len(numbers) == 2, printed
    assert printed.count("resuming after epoch 2") == 2
    history = tm.load_checkpoint(last)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    deadline = time.monotonic() + 30
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, numbers))


def is_running(number):
    """Return whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_fewer_paintings_a_batch_than_processes_are_refused_early(monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("one_of_four", tm.__file__)
    first = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first)
    settings = SimpleNamespace(batch_size=3)
    with pytest.raises(first.InputError, match="BATCH_SIZE must be from 4 to"):
        first.check_settings(settings)


def test_more_processes_than_gpus_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(tm, "TORCHRUN", True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refuse(number):
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be...")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    assert tm.main(["--epochs", "1"]) == 1
    assert "--nproc-per-node" in capsys.readouterr().err


def test_batches_that_cannot_be_shared_are_an_error(monkeypatch):
    monkeypatch.setattr(tm, "WORLD_SIZE", 4)
    with pytest.raises(tm.InputError, match="4 processes cannot share a batch of 2"):
        tm.EpochBatchSampler(10, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [1, None])
def test_shares_of_a_batch_are_the_batch(monkeypatch, count, seed):
    def batches():
        made = tm.EpochBatchSampler(43, 8, seed)
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
