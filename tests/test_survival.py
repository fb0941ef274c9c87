"""What a long run must survive: Ctrl-C, kills, full disks, odd pictures, random bytes."""

import contextlib
import functools
import importlib
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
from PIL import Image, features

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, copies_in, folders, folders_to_test, use_precision
from tests.paintings import paint_artgan, write_lists
from tests.test_checkpoints import check_same_runs

FORKS = multiprocessing.get_context("forkserver")  # imports torch once, for all runs it starts
FORKS.set_forkserver_preload(["tests.test_survival"])


def run_forked(flags, folder, code, script, method, precision, largest_file, calls):
    """Run a script in a process group of its own; it prints to folder/log and folder/errors.

    code: what is done before; method: how its workers start; largest_file: bytes that no file may
    exceed; calls: after how many changes of files to die.
    """
    os.setsid()
    use_precision(precision)  # the server may have been started in another
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(method, force=True)
    for number, name in ((1, "log"), (2, "errors")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), number)
    if largest_file:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if calls:
        watch = functools.partial(kill_at, itertools.count(1), calls)
        threading.setprofile(watch)
        sys.setprofile(watch)
    exec(code, {"tm": tm})
    sys.exit(importlib.import_module(script).main(flags))


def kill_at(count, calls, _, event, called):
    """Kill this process before it changes a file for the calls-th time."""
    changes = ("BufferedWriter.write", "fsync", "replace", "unlink", "mkdir")
    if event == "c_call" and called.__qualname__ in changes and next(count) == calls:
        os.kill(os.getpid(), signal.SIGKILL)


def fork(flags, folder, code="", script=tm, method=None, largest_file=None, calls=None):
    """Start `run_forked` in a process."""
    method = method or multiprocessing.get_start_method()
    process = FORKS.Process(
        target=run_forked, args=(flags, folder, code, script.__name__, method,
                                 os.environ["TESTS_PRECISION"], largest_file, calls))
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


def errors_of(run, folder, seconds):
    """Return what a forked run prints as errors; it must fail in time, and leave no process."""
    try:
        run.join(seconds)
        assert run.exitcode == 1
        assert wait_for(lambda: not members(run.pid), 12)
    finally:
        kill_group(run.pid)
    return (folder / "errors").read_text().strip()


def wait_for(condition, seconds):
    """Wait until a condition holds, for so many seconds at most; return whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


STAGES = {  # the script to stop in a stage, and what lets it say that the stage has begun
    "preparing": (tm, """
import time
real = tm.encode_copy
def slow(*given):
    print("HERE", flush=True)
    time.sleep(0.2)
    return real(*given)
tm.encode_copy = slow"""),
    "training": (tm, """
real, steps = tm.nn.utils.clip_grad_norm_, []
def slow(*given):
    steps.append(1)
    if len(steps) > 5:  # 4 are an epoch; after it, validation has workers too
        print("HERE", flush=True)
    return real(*given)
tm.nn.utils.clip_grad_norm_ = slow"""),
    "receiving": (tm, """
import time
from multiprocessing import connection
def stuck(*_):  # when the first batch comes from a worker
    print("HERE", flush=True)
    time.sleep(60)
connection.answer_challenge = stuck"""),
    "testing": (test_model, """
real = tm.evaluate
def slow(*given):
    while True:
        real(*given)
        print("HERE", flush=True)
tm.evaluate = slow"""),
}


def copy_of(finished, folder):
    """Copy the finished run, its paintings and resized copies; return flags that use the copy."""
    for name in ("out", "wikiart", "cache"):
        shutil.copytree(finished.folder / name, folder / name)
    return [*folders(folder), *QUICK]


@pytest.fixture
def copied(finished, tmp_path):
    """Return a folder with a copy of the finished run, and flags."""
    return tmp_path, copy_of(finished, tmp_path)


def epochs_in(file):
    """Return how many epochs a checkpoint has, which must load."""
    return len(tm.load_checkpoint(file)["history"])


@pytest.mark.parametrize("stage,number", [
    *((stage, signal.SIGINT) for stage in STAGES), ("training", signal.SIGTERM),
])
def test_a_stop_is_one_line_and_leaves_no_process(copied, stage, number):
    """The whole process group gets the signal, as from a terminal, while two workers run."""
    folder, flags = copied
    script, code = STAGES[stage]
    if script is tm:
        flags += ["--epochs", "99", "--workers", "2"]
    else:
        flags = [*folders_to_test(folder), "--workers", "2"]
    if stage == "preparing":
        shutil.rmtree(folder / "cache")
    run = fork(flags, folder, code, script)
    try:
        log = folder / "log"
        assert wait_for(lambda: log.exists() and "HERE" in log.read_text(), 60)
        time.sleep(0.2)
        os.killpg(run.pid, number)
        run.join(8)
        assert run.exitcode == 128 + number
        assert wait_for(lambda: not members(run.pid), 12)
    finally:
        kill_group(run.pid)
    assert re.fullmatch("stopped.*", (folder / "errors").read_text().strip())  # one line
    assert epochs_in(folder / "out/model_last.pth") >= 2
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("number,code", [(None, 0), (None, 1), (signal.SIGINT, 130),
                                         (signal.SIGTERM, 143)])
def test_handlers_of_signals_are_given_back(copied, monkeypatch, capsys, number, code):
    """To the program, such as a notebook, that calls main()."""
    _, flags = copied
    former = {each: signal.signal(each, lambda *_: None)
              for each in (signal.SIGINT, signal.SIGTERM)}
    own = {each: signal.getsignal(each) for each in former}
    monkeypatch.setattr(tm, "train_epoch", lambda *_: signal.raise_signal(number))
    try:
        epochs = {0: "2", 1: "-1"}.get(code, "3")
        assert tm.main([*flags, "--epochs", epochs]) == code
        assert {each: signal.getsignal(each) for each in former} == own
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err.count("\n") == (code > 0)


@pytest.mark.parametrize("number,method", [
    (signal.SIGTERM, "fork"), (signal.SIGKILL, "fork"), (signal.SIGKILL, "forkserver"),
])
def test_no_worker_outlives_the_script(copied, number, method):
    """The signal is sent to the script alone; training and validation have two workers each."""
    folder, flags = copied
    run = fork([*flags, "--epochs", "9999", "--workers", "2"], folder, method=method)
    try:
        assert wait_for(lambda: epochs_in(folder / "out/model_last.pth") > 2, 60)
        assert len(members(run.pid)) >= 5
        os.kill(run.pid, number)
        run.join(30)
        assert run.exitcode == (143 if number == signal.SIGTERM else -number)
        assert wait_for(lambda: not members(run.pid), 12)
    finally:
        kill_group(run.pid)
    assert epochs_in(folder / "out/model_last.pth") > 2
    errors = (folder / "errors").read_text().strip()
    assert re.fullmatch("stopped.*" if number == signal.SIGTERM else "", errors)


STUCK = {  # what a worker does instead, as on a network disk that is gone or a system with limits
    "reading": ("tm.PaintingDataset, '__getitem__'", "time.sleep(600)"),
    "sending": ("Connection, '_send_bytes'", "time.sleep(600)"),
    "failing": ("Connection, '_send_bytes'", "raise OSError(24, 'Too many open files')"),
}


@pytest.mark.parametrize("kind", STUCK)
def test_a_worker_that_is_stuck_ends_the_run(copied, kind):
    """Within LOADER_TIMEOUT and the time that torch gives workers to end, not never."""
    folder, flags = copied
    place, action = STUCK[kind]
    code = f"""
import os, time
from multiprocessing.connection import Connection
from torch.utils.data import _utils
tm.LOADER_TIMEOUT = _utils.MP_STATUS_CHECK_INTERVAL = 1
real, main = getattr({place}), os.getpid()

def stuck(*given):
    if os.getpid() != main:
        {action}
    return real(*given)

setattr({place}, stuck)
"""
    run = fork([*flags, "--epochs", "3", "--workers", "1"], folder, code, method="fork")
    errors = errors_of(run, folder, 30)
    assert re.match("error: .*--workers 0", errors.splitlines()[-1]), errors
    assert errors.count("error: ") == 1 and "train_model.py" not in errors
    assert epochs_in(folder / "out/model_last.pth") == 2


def test_a_long_folder_for_temporary_files(copied):
    """The path of a socket, by which a worker sends, has room for 108 bytes."""
    folder, flags = copied
    long = folder / ("t" * 120)
    long.mkdir()
    code = f"{TINY}tm.LOADER_TIMEOUT = 20\nsys.exit(tm.main(sys.argv[1:]))"
    script = subprocess.run(
        [sys.executable, "-c", code, *flags, "--epochs", "3", "--workers", "1"], cwd=ROOT,
        env=os.environ | {"TMPDIR": str(long)}, capture_output=True, text=True, timeout=120)
    assert (script.returncode, script.stderr) == (0, "")
    assert epochs_in(folder / "out/model_last.pth") == 3


def check_what_a_kill_left(folder, kills):
    """Fail where a checkpoint or a resized copy does not load; return what is unfinished in out."""
    for name in ("model_last.pth", "model_best.pth"):
        if (folder / "out" / name).exists():
            tm.load_checkpoint(folder / "out" / name)
    for copy in (folder / "cache").glob("*/*/*.jpg"):
        Image.open(copy).load()
    assert len(list((folder / "cache").rglob("*.tmp"))) <= kills * tm.cores()
    unfinished = list((folder / "out").rglob("*.tmp"))
    assert len(unfinished) <= 1
    return unfinished


def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    """A run is killed, and started again, until it is done; it is the run never killed."""
    chance, exits, unfinished = random.Random(3), [], []
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    flags = [*folders(tmp_path), *QUICK, "--epochs", "2"]
    while 0 not in exits:
        run = fork(flags, tmp_path, calls=chance.randrange(1, 30))
        run.join(60)
        exits.append(run.exitcode)
        unfinished += check_what_a_kill_left(tmp_path, len(exits))
    assert set(exits) == {-signal.SIGKILL, 0} and len(exits) > 5 and unfinished
    check_same_runs(finished.out, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in finished.out.iterdir()}
    for name in ("bad_files.txt", "crops.jpg"):
        assert (tmp_path / "out" / name).read_bytes() == (finished.out / name).read_bytes()


# ------------------------------------------------------------------------------------ disk, numbers


def test_a_full_disk_while_preparing(finished, tmp_path):
    """A limit on the size of files stops a copy; an error names it; the next run makes it."""
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    flags = [*folders(tmp_path), "--epochs", "0"]
    run = fork(flags, tmp_path, largest_file=6_000)
    run.join(60)
    assert run.exitcode == 1
    message = (tmp_path / "errors").read_text().strip()
    copy = f"{tmp_path}/cache/320/.*.jpg"
    assert re.fullmatch(f"error: cannot write {copy}: File too large", message)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/bad_files.txt").exists()
    assert tm.main(flags) == 0
    assert (tmp_path / "out/bad_files.txt").read_text() == ""


def test_a_full_disk_keeps_checkpoints_that_load(copied, capsys):
    """After a failed save, and when there is room again, the same command resumes."""
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
        assert epochs_in(full / "model_best.pth") <= 2
        assert not list(full.rglob("*.tmp"))
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", full], check=True)
        assert tm.main(flags) == 0
        assert epochs_in(full / "model_last.pth") == 3
    finally:
        subprocess.run(["umount", full], check=True)


def training_copy(folder):
    """Return the resized copy of a painting that the run of a folder trains on."""
    split = tm.load_checkpoint(folder / "out/model_last.pth")["split"]
    return Path(copies_in(folder)[next(iter(split["train"]))])


def test_a_resized_copy_that_is_gone_is_named(copied, capsys, monkeypatch):
    """The next run makes it again."""
    folder, flags = copied
    flags += ["--epochs", "3"]
    copy = training_copy(folder)
    with monkeypatch.context() as patch:
        patch.setattr(tm, "rate_at", lambda *_, **__: copy.unlink(missing_ok=True) or 0.1)
        assert tm.main(flags) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: cannot read {copy} .*delete it", message)
    assert tm.main(flags) == 0
    assert epochs_in(folder / "out/model_last.pth") == 3


def test_a_copy_that_is_cut_is_named_by_a_worker(copied):
    """In one line, and no process is left."""
    folder, flags = copied
    os.truncate(copy := training_copy(folder), 700)
    run = fork([*flags, "--epochs", "3", "--workers", "2"], folder)
    errors = errors_of(run, folder, 60)
    assert re.fullmatch(f"error: cannot read {copy} .*delete it.*", errors)


def test_numbers_that_are_not_finite_stop_the_run(copied, capsys, monkeypatch):
    folder, flags = copied
    before = (folder / "out/model_best.pth").read_bytes()
    monkeypatch.setattr(tm, "rate_at", lambda *_, **__: float("inf"))
    assert tm.main([*flags, "--epochs", "3"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: epoch 3/3, batch \d.*not finite.*LEARNING_RATE", message), message
    assert epochs_in(folder / "out/model_last.pth") == 2
    assert (folder / "out/model_best.pth").read_bytes() == before
    monkeypatch.undo()
    assert tm.main([*flags, "--epochs", "3", "--learning-rate", "1e-4"]) == 0  # as advised


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
    assert re.match("error: epoch 3/3.*outputs are not finite", capsys.readouterr().err)
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
    """And that advice can be taken."""
    folder, flags = copied

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tm, "train_epoch", fail)
        assert tm.main([*flags, "--epochs", "3"]) == 1
    captured = capsys.readouterr().err.strip()
    assert re.match(f"error: .*{words}", captured) and "\n" not in captured
    advice = re.search(r"--(batch-size|workers) \d+", captured)[0].split()
    assert tm.main([*flags, "--epochs", "3", *advice]) == 0
    assert epochs_in(folder / "out/model_last.pth") == 3


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
    if features.check("avif"):
        save("x.avif", red, "AVIF")
    write("heic.jpg", b"\0\0\0\x18ftypheic" + bytes(99))
    save("deep.png", Image.fromarray(np.full((40, 50), 30_000, np.uint16)), "PNG")
    save("long.tif", Image.new("I", (40, 50), 90_000), "TIFF", works=False)
    save("float.tif", Image.new("F", (40, 50), 0.5), "TIFF", works=False)
    save("progressive.jpg", red, "JPEG", progressive=True)
    save("dot.png", Image.new("RGB", (1, 1)), "PNG")
    save("line.png", Image.new("RGB", (1, 20_000)), "PNG")
    save("longer.png", Image.new("RGB", (1, 70_000)), "PNG")  # beyond JPEG's 65,535
    save("longest.png", Image.new("RGB", (70_000, 40), (200, 120, 40)), "PNG")
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
    save("n" * 251 + ".png", red, "PNG")
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
    assert f"{len(found):,} paintings in" in output and f"bad_files.txt: {len(bad)} (" in output
    capsys.readouterr()
    data, cache = tmp_path / "wikiart", tmp_path / "cache"
    copies, reasons = tm.resize_paintings(found, data, cache, tm.IMAGE_SIZE)
    assert "resized copies: 0 made" in capsys.readouterr().out
    assert {tm.printable(path): reason for path, reason in reasons.items()} == bad
    for name, works in names.items():
        assert (name in copies) == works, name
        if works:
            with Image.open(copies[name]) as image:
                image.load()
                assert image.mode == "RGB" and min(image.size) <= 320
    with Image.open(copies["Odd/longest.png"]) as image:
        mean = np.asarray(image).mean((0, 1))
        assert image.width > 65_000 and abs(mean - (200, 120, 40)).max() < 3


def test_odd_names_train_and_test(tmp_path):
    """Names with spaces, quotes, newlines, emoji and invalid UTF-8 go the whole way."""
    painted = paint_artgan(tmp_path / "wikiart", each=8, size=(60, 50))
    odd = ["a b_'q\".jpg", "a_new\nline.jpg", "a_🎨.jpg", "a_bad\udcff.jpg", "<i>_&.jpg"]
    for number, path in enumerate(sorted(painted)[::2]):
        name = f"{number}{odd[number % len(odd)]}"
        (tmp_path / "wikiart" / path).rename((tmp_path / "wikiart" / path).with_name(name))
    flags = folders(tmp_path)
    assert tm.main([*flags, *QUICK, "--epochs", "1"]) == 0
    assert tm.main([*flags, *QUICK, "--epochs", "2"]) == 0
    assert test_model.main([*folders_to_test(tmp_path), "--workers", "0"]) == 0
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
    copies, bad = tm.resize_paintings(found, data, tmp_path / "cache", 64)
    assert len(found) == 400 and 0 < len(bad) < 400 and all(bad.values())
    assert sorted([*copies, *bad]) == found
    assert {str(path) for path in (tmp_path / "cache").rglob("*.*")} == set(copies.values())
    for copy in copies.values():
        Image.open(copy).load()


def test_random_bytes_in_lists(tmp_path):
    """A list is read, with right labels for the rows that are whole, or refused by InputError."""
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
        except tm.InputError as error:
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
        except tm.InputError as error:
            assert "refused" in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_history_is_written_and_never_read(copied):
    folder, flags = copied
    (folder / "out/history.csv").write_bytes(os.urandom(500))
    (folder / "out/class_names.txt").write_bytes(os.urandom(500))
    assert tm.main([*flags, "--epochs", "3"]) == 0
    assert (folder / "out/history.csv").read_text().startswith("epoch,training_loss")
