"""What a long run must survive: Ctrl-C, kills, full disks, odd pictures, random bytes."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, folders
from tests.paintings import paint_artgan, write_lists
from tests.test_checkpoints import check_same_runs

SMALL = "small/92"  # where the small copies for 64 pixels are
STOPPED = "stopped; the same command resumes a training after its last whole epoch"
FORKS = multiprocessing.get_context("forkserver")  # imports torch once, for all runs it starts
FORKS.set_forkserver_preload(["tests.test_survival"])


def run_forked(start_method, flags, log, largest_file=None, calls=None):
    """Train in a process group of its own, with its output in a file.

    largest_file: bytes that no file may exceed; calls: after how many changes of files to die.
    """
    os.setsid()
    multiprocessing.set_start_method(start_method, force=True)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest_file:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if calls:
        watch = functools.partial(kill_at, itertools.count(1), calls)
        threading.setprofile(watch)
        sys.setprofile(watch)
    sys.exit(tm.main(flags))


def kill_at(count, calls, _, event, called):
    """Kill this process before it changes a file for the calls-th time."""
    changes = ("BufferedWriter.write", "fsync", "replace", "unlink")
    if event == "c_call" and called.__qualname__ in changes and next(count) == calls:
        os.kill(os.getpid(), signal.SIGKILL)


def fork(flags, log, **options):
    """Start `run_forked` in a process."""
    process = FORKS.Process(
        target=run_forked, args=(multiprocessing.get_start_method(), flags, log), kwargs=options)
    process.start()
    return process


def members(group):
    """Return the processes of a group that are alive, from /proc."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            alive.append(stat.parent.name)
    return alive


def kill_group(group):
    """Kill what is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for(condition, seconds):
    """Wait until a condition holds, for so many seconds at most; return whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


STAGES = {  # what says that the stage has begun, and the script to stop in it
    "preparing": ("real = tm.encode_small\n"
                  "def slow(*given):\n"
                  "    print('HERE', flush=True)\n"
                  "    import time; time.sleep(0.2); return real(*given)\n"
                  "tm.encode_small = slow", "tm"),
    "training": ("real, steps = tm.nn.utils.clip_grad_norm_, []\n"
                 "def slow(*given):\n"
                 "    steps.append(1)\n"  # 4 are an epoch; after it, validation has workers too
                 "    if len(steps) > 5: print('HERE', flush=True)\n"
                 "    return real(*given)\n"
                 "tm.nn.utils.clip_grad_norm_ = slow", "tm"),
    "receiving": ("from multiprocessing import connection\n"  # a batch, from a worker
                  "def stuck(*_):\n"
                  "    print('HERE', flush=True)\n"
                  "    import time; time.sleep(60)\n"
                  "connection.answer_challenge = stuck", "tm"),
    "testing": ("real = tm.evaluate\n"
                "def slow(*given):\n"
                "    while True: real(*given), print('HERE', flush=True)\n"
                "tm.evaluate = slow", "test_model"),
}


def copy_of(finished, folder):
    """Copy the finished run, its paintings and small copies; return flags that use the copy."""
    for name in ("out", "wikiart", "small"):
        shutil.copytree(finished.folder / name, folder / name)
    return [*folders(folder), *QUICK]


@pytest.fixture
def copied(finished, tmp_path):
    """Return a folder with a copy of the finished run, and flags."""
    return tmp_path, copy_of(finished, tmp_path)


def epochs_in(file):
    """Return how many epochs a checkpoint has, which must load."""
    return len(tm.load_checkpoint(file)["history"])


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_line_and_leaves_no_process(copied, stage):
    """The whole process group is interrupted, as by a terminal, while two workers run."""
    folder, flags = copied
    code, module = STAGES[stage]
    if module == "tm":
        flags += ["--epochs", "99", "--workers", "2"]
    else:
        flags = [*folders(folder)[:2], *folders(folder)[4:], "--workers", "2"]
    if stage == "preparing":
        shutil.rmtree(folder / "small")
    text = f"{TINY}{code}\nsys.exit({module}.main(sys.argv[1:]))"
    script = subprocess.Popen(
        [sys.executable, "-u", "-c", text, *flags], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in script.stdout:
        if "HERE" in line:
            break
    time.sleep(0.2)
    begun = time.monotonic()
    os.killpg(script.pid, signal.SIGINT)
    try:
        _, error = script.communicate(timeout=30)
        assert time.monotonic() - begun < 8
        assert wait_for(lambda: not members(script.pid), 12)
    finally:
        kill_group(script.pid)
    assert script.returncode == 130, error
    assert error.strip().splitlines()[-1] == STOPPED and "Traceback" not in error
    assert epochs_in(folder / "out/model_last.pth") >= 2
    assert not list(folder.rglob("*.tmp"))


def test_no_worker_outlives_the_script(finished, tmp_path):
    """Two runs with two workers each are killed, one by SIGTERM, one by SIGKILL."""
    runs = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / number.name
        flags = [*copy_of(finished, folder), "--epochs", "9999", "--workers", "2"]
        runs[number] = fork(flags, folder / "log")
    try:
        for number, run in runs.items():
            assert wait_for(lambda run=run: len(members(run.pid)) >= 3, 60)
            os.kill(run.pid, number)
            run.join(30)
            assert run.exitcode == -number
        for number, run in runs.items():
            assert wait_for(lambda run=run: not members(run.pid), 12)
            assert epochs_in(tmp_path / number.name / "out/model_last.pth") >= 2
    finally:
        for run in runs.values():
            kill_group(run.pid)


def check_what_a_kill_left(folder):
    """Fail where a checkpoint does not load, or what is taken for a small copy is none."""
    for name in ("model_last.pth", "model_best.pth"):
        if (folder / "out" / name).exists():
            tm.load_checkpoint(folder / "out" / name)
    assert len(list(folder.rglob("*.tmp"))) <= tm.cores() + 1
    for copy in (folder / SMALL).glob("*/*.jpg"):
        Image.open(copy).load()


def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    """A run is killed, and started again, until it is done; it is the run never killed."""
    chance, exits = random.Random(3), []
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    flags = [*folders(tmp_path), *QUICK, "--epochs", "2"]
    while 0 not in exits:
        run = fork(flags, tmp_path / "log", calls=chance.randrange(1, 30))
        run.join(60)
        exits.append(run.exitcode)
        check_what_a_kill_left(tmp_path)
    assert set(exits) == {-signal.SIGKILL, 0} and len(exits) > 5
    check_same_runs(finished.out, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------ disk, numbers


def test_a_full_disk_while_preparing(finished, tmp_path):
    """A limit on the size of files stops a small copy; an error names it; the next run goes on."""
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    flags = [*folders(tmp_path), "--epochs", "0"]
    run = fork(flags, tmp_path / "log", largest_file=6_000)
    run.join(60)
    assert run.exitcode == 1
    message = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert re.match(r"error: cannot write .*/small/320/.*\.jpg: File too large", message)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/bad_files.txt").exists()
    assert tm.main(flags) == 0
    assert (tmp_path / "out/bad_files.txt").read_text() == ""


def test_a_full_disk_keeps_checkpoints_that_load(copied, capsys):
    """After a failed save, and when there is room again, the same command goes on."""
    folder, flags = copied
    full = folder / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", full], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        for file in (folder / "out").glob("[!.]*"):
            shutil.copy(file, full)
        size = sum(file.stat().st_size for file in full.iterdir())
        free = (full / "model_last.pth").stat().st_size // 2
        subprocess.run(["mount", "-o", f"remount,size={size + free}", full], check=True)
        flags += ["--output-dir", str(full), "--epochs", "3"]
        assert tm.main(flags) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"error: cannot write {full}/model_\w+.pth: No space left", message)
        assert epochs_in(full / "model_last.pth") == 2
        assert epochs_in(full / "model_best.pth") <= 3
        assert not list(full.rglob("*.tmp"))
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", full], check=True)
        assert tm.main(flags) == 0
        assert epochs_in(full / "model_last.pth") == 3
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.parametrize("how,workers", [
    (lambda path: path.unlink(missing_ok=True), "0"), (lambda path: os.truncate(path, 700), "1"),
], ids=["vanishes", "is cut, by a worker"])
def test_a_small_copy_that_is_no_more_is_named(copied, capsys, monkeypatch, how, workers):
    folder, flags = copied
    flags += ["--epochs", "3", "--workers", workers]
    path = next(iter(tm.load_checkpoint(folder / "out/model_last.pth")["split"]["train"]))
    with monkeypatch.context() as patch:
        patch.setattr(tm, "rate_at", lambda *_: how(folder / SMALL / path) or 0.1)
        assert tm.main(flags) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: cannot read the small copy .*{re.escape(path)} .*delete it", message)
    (folder / SMALL / path).unlink(missing_ok=True)
    assert tm.main([*flags, "--workers", "0"]) == 0
    assert epochs_in(folder / "out/model_last.pth") == 3


def test_numbers_that_are_not_finite_stop_the_run(copied, capsys, monkeypatch):
    folder, flags = copied
    before = (folder / "out/model_best.pth").read_bytes()
    monkeypatch.setattr(tm, "rate_at", lambda *_: float("inf"))
    assert tm.main([*flags, "--epochs", "3"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: epoch 3/3, batch \d.* learning rate.*not finite.*LEARNING_RATE",
                    message), message
    assert epochs_in(folder / "out/model_last.pth") == 2
    assert (folder / "out/model_best.pth").read_bytes() == before


def test_outputs_that_are_not_finite_are_never_saved(copied, capsys, monkeypatch):
    """The last step of an epoch spoils the weights: validation notices before anything is saved."""
    folder, flags = copied
    before = (folder / "out/model_best.pth").read_bytes()
    real = tm.train_epoch

    def spoil(model, *given):
        loss = real(model, *given)
        torch.nn.init.constant_(model.linear.bias, torch.nan)
        return loss

    monkeypatch.setattr(tm, "train_epoch", spoil)
    assert tm.main([*flags, "--epochs", "3"]) == 1
    assert "epoch 3/3 validation: the model's outputs are not finite" in capsys.readouterr().err
    assert epochs_in(folder / "out/model_last.pth") == 2
    assert (folder / "out/model_best.pth").read_bytes() == before


@pytest.mark.parametrize("error,words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "BATCH_SIZE.*--batch-size 4"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "BATCH_SIZE.*--batch-size 4"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "BATCH_SIZE.*size 4"),
    (MemoryError(), "BATCH_SIZE.*--batch-size 4"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "--workers 0"),
])
def test_lack_of_memory_says_what_to_change(copied, capsys, monkeypatch, error, words):
    _, flags = copied

    def fail(*_):
        raise error

    monkeypatch.setattr(tm, "train_epoch", fail)
    assert tm.main([*flags, "--epochs", "3"]) == 1
    captured = capsys.readouterr().err.strip()
    assert re.match(f"error: .*{words}", captured) and "\n" not in captured


# ----------------------------------------------------------------------------------------- pictures


def odd_pictures(folder):
    """Fill a folder with what real ones hold; return {name: whether it can be used}."""
    folder.mkdir(parents=True)
    red = Image.new("RGB", (400, 350), (200, 30, 40))
    red.save(folder / "whole.jpg")
    whole, usable = (folder / "whole.jpg").read_bytes(), {"whole.jpg": True}

    def save(name, image, kind, works=True, **options):
        image.save(os.path.join(os.fsencode(folder), os.fsencode(name)), kind, **options)
        usable[name] = works

    def write(name, content):
        (folder / name).write_bytes(content)
        usable[name] = False

    for share in (10, 50, 90, 99):
        write(f"cut{share}.jpg", whole[: len(whole) * share // 100])
    write("empty.jpg", b"")
    write("text.jpg", b"a text")
    write("page.jpg", b"<!doctype html><title>404</title>")
    write("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    save("png.jpg", red, "PNG")
    save("webp.jpg", red, "WEBP")
    save("x.gif", red, "GIF")
    save("x.jfif", red, "JPEG")
    save("UPPER.JPG", red, "JPEG")
    save("cmyk.jpg", red.convert("CMYK"), "JPEG")
    save("grey.jpg", red.convert("L"), "JPEG")
    save("la.png", red.convert("LA"), "PNG")
    save("rgba.png", red.convert("RGBA"), "PNG")
    save("bit.png", red.convert("1"), "PNG")
    save("deep.png", Image.fromarray(np.full((40, 50), 30_000, np.uint16)), "PNG")
    save("long.tif", Image.new("I", (40, 50), 90_000), "TIFF", works=False)
    save("float.tif", Image.new("F", (40, 50), 0.5), "TIFF", works=False)
    save("progressive.jpg", red, "JPEG", progressive=True)
    save("dot.png", Image.new("RGB", (1, 1)), "PNG")
    save("line.png", Image.new("RGB", (1, 20_000)), "PNG")
    save("longer.png", Image.new("RGB", (1, 70_000)), "PNG", works=False)  # beyond JPEG's 65,535
    save("vast.jpg", Image.new("L", (16_000, 12_000), 99), "JPEG")
    save("large1.webp", Image.new("RGBA", (6_300, 6_300), (9, 9, 9, 99)), "WEBP", lossless=True)
    palette = Image.new("P", (6_300, 6_300), 1)
    palette.putpalette([255, 255, 255, 9, 9, 9])
    save("large1.png", palette, "PNG", transparency=0)
    for name in ("large2.webp", "large2.png"):  # two at once, just below the limit
        shutil.copy(folder / name.replace("2", "1"), folder / name)
        usable[name] = True
    save("larger.png", Image.new("P", (8_000, 8_000), 1), "PNG", works=False)
    save("bomb.png", Image.new("1", (14_000, 14_000)), "PNG", works=False)
    for name in ("with space.jpg", "q'uo\"te.jpg", "new\nline.jpg", "emoji 🎨.jpg", "comma,.jpg",
                 "bad\udcff\udce9.jpg", "n" * 251 + ".jpg", "-rf.jpg", "100%.jpg", "<b>.jpg"):
        save(name, red, "JPEG")
    save("n" * 251 + ".png", red, "PNG", works=False)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    usable |= dict.fromkeys(("pipe.jpg", "dangling.jpg"), False)
    (folder / "link.jpg").symlink_to(folder / "whole.jpg")
    usable["link.jpg"] = True
    (folder / "circle").symlink_to(folder)
    for name in ("._whole.jpg", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"no picture")
    (folder / ".ipynb_checkpoints").mkdir()
    return usable


def test_a_folder_of_every_kind(tmp_path, capsys):
    """All are used, or listed with reasons, in 2 GB on two cores, on an ASCII terminal."""
    usable = odd_pictures(tmp_path / "wikiart/Odd")
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    names = {f"Odd/{name}": works for name, works in usable.items()}
    code = ("peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "tm.cores = lambda: 2\n"
            "code = tm.main(sys.argv[1:])\n"
            "print('PEAK', peak() // 1024)\n"
            "sys.exit(code)")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    script = subprocess.run(
        [sys.executable, "-c", f"{TINY}{code}", *folders(tmp_path), "--epochs", "0"],
        cwd=ROOT, capture_output=True, env=environment, timeout=240)
    output = script.stdout.decode("ascii")
    assert script.returncode == 0, script.stderr
    assert int(re.search(r"PEAK (\d+)", output)[1]) < 2_000
    lines = (tmp_path / "out/bad_files.txt").read_text(encoding="utf-8").splitlines()
    bad = dict(line.split("\t") for line in lines)
    folder = {"Odd/folder.jpg"}  # which may be listed or not
    assert bad.keys() - folder == {tm.printable(name) for name, works in names.items() if not works}
    assert all(bad.values())
    assert bad["Odd/larger.png"] == "8000 x 8000 is more than 40,000,000 pixels"
    found = tm.find_paintings(tmp_path / "wikiart")
    assert {path for path in found if path.startswith("Odd/")} - folder == names.keys()
    for name, works in names.items():
        small = os.fsencode(tmp_path / "small/320" / tm.small_name(name))
        assert os.path.exists(small) == works, name
        if works:
            with Image.open(small) as image:
                image.load()
                assert image.mode == "RGB" and min(image.size) <= 320
    count = f"{len(found):,} paintings in"
    assert count in output and f"pictures that cannot be used: {len(bad)} (" in output
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 0
    assert "small copies: 0 written" in capsys.readouterr().out


def test_odd_names_train_and_test(tmp_path):
    """Names with spaces, quotes, newlines, emoji and invalid UTF-8 go the whole way."""
    import test_model
    painted = paint_artgan(tmp_path / "wikiart", each=8, size=(60, 50))
    odd = ["a b_'q\".jpg", "a_new\nline.jpg", "a_🎨.jpg", "a_bad\udcff.jpg", "<i>_&.jpg"]
    for number, path in enumerate(sorted(painted)[::2]):
        name = f"{number}{odd[number % len(odd)]}"
        (tmp_path / "wikiart" / path).rename((tmp_path / "wikiart" / path).with_name(name))
    flags = folders(tmp_path)
    assert tm.main([*flags, *QUICK, "--epochs", "1"]) == 0
    assert tm.main([*flags, *QUICK, "--epochs", "2"]) == 0
    assert test_model.main([*flags[:2], *flags[4:], "--workers", "0"]) == 0
    (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- random abuse


def garble(content, chance):
    """Return the content with a few random bytes changed, or a piece cut out or doubled."""
    content = bytearray(content)
    kind = chance.randrange(3)
    place, length = chance.randrange(len(content)), chance.randrange(1, 200)
    if kind == 0:
        for _ in range(chance.randrange(1, 12)):
            content[chance.randrange(min(len(content), 700))] = chance.randrange(256)
    elif kind == 1:
        del content[place : place + length]
    else:
        content[place:place] = content[place : place + length]
    return bytes(content)


def test_random_bytes_in_pictures(tmp_path, capsys):
    chance = random.Random(2)
    data = tmp_path / "wikiart"
    (data / "A").mkdir(parents=True)
    Image.effect_noise((90, 70), 60).save(tmp_path / "x.jpg")
    Image.effect_noise((90, 70), 60).save(tmp_path / "x.png")
    for number in range(400):
        ending = chance.choice(("jpg", "png"))
        content = garble((tmp_path / f"x.{ending}").read_bytes(), chance)
        (data / f"A/{number}.{ending}").write_bytes(content)
    found = tm.find_paintings(data)
    bad = tm.prepare_copies(found, data, tmp_path / "92")
    copies = {f"A/{path.name}" for path in (tmp_path / "92/A").iterdir()}
    assert len(found) == 400 and 0 < len(bad) < 400
    assert copies == {tm.small_name(path) for path in found if path not in bad}


def test_random_bytes_in_lists(tmp_path):
    """A list is read, with right labels for the rows that are whole, or refused by ValueError."""
    chance, rows = random.Random(3), [(f"S/artist_{n}.jpg", n % 3) for n in range(60)]
    write_lists(tmp_path, "genre", ["a", "b", "c"], rows[:40], rows[40:])
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    right, outcomes = dict(rows), set()
    for _ in range(300):
        name = chance.choice(sorted(whole))
        (tmp_path / name).write_bytes(garble(whole[name], chance))
        try:
            _, labels, test_list = tm.read_lists(tmp_path, "genre")
            outcomes.add("read")
            assert len(labels.keys() & right) >= 30 and test_list <= labels.keys()
        except ValueError as error:
            outcomes.add("refused")
            assert str(error)
        (tmp_path / name).write_bytes(whole[name])
    assert outcomes == {"read", "refused"}


def test_random_bytes_in_checkpoints(tmp_path):
    """Changed bytes are refused, or fall where they change nothing that is read."""
    chance, path = random.Random(4), tmp_path / "x.pth"
    checkpoint = {"format": tm.FORMAT, "names": ["a"],
                  "model": {"weight": torch.arange(1000.0)}}
    torch.save(checkpoint, path)
    whole, outcomes = path.read_bytes(), set()
    for _ in range(300):
        path.write_bytes(garble(whole, chance))
        try:
            read = tm.load_checkpoint(path)
            assert torch.equal(read["model"]["weight"], checkpoint["model"]["weight"])
            outcomes.add("read")
        except ValueError as error:
            assert "refused" in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_history_is_written_and_never_read(copied):
    folder, flags = copied
    (folder / "out/history.csv").write_bytes(os.urandom(500))
    (folder / "out/class_names.txt").write_bytes(os.urandom(500))
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert (folder / "out/history.csv").read_text().startswith("epoch,training_loss")
