"""What a long run must survive: Ctrl-C, kills, full disks, odd pictures, random bytes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_model as tm
from tests.conftest import QUICK, folders
from tests.paintings import paint_artgan, write_lists
from tests.test_checkpoints import check_same_runs

ROOT = Path(__file__).resolve().parent.parent


def start(code, *flags):
    """Start a script in a process group of its own; code runs first, with the module as tm."""
    text = f"import sys, train_model as tm, test_model\n{code}\n"
    return subprocess.Popen([sys.executable, "-u", "-c", text, *flags], cwd=ROOT, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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


def wait_until_alone(group, seconds=12):
    """Wait until no process of the group is left; return those that stay."""
    end = time.monotonic() + seconds
    while members(group) and time.monotonic() < end:
        time.sleep(0.1)
    return members(group)


STAGES = {  # what says that the stage has begun, and the script to stop in it
    "preparing": ("real = tm.encode_small\n"
                  "def slow(source):\n"
                  "    print('HERE', flush=True)\n"
                  "    import time; time.sleep(0.2); return real(source)\n"
                  "tm.encode_small = slow", "tm"),
    "training": ("real = tm.nn.functional.cross_entropy\n"
                 "def slow(*given):\n"
                 "    print('HERE', flush=True); return real(*given)\n"
                 "tm.nn.functional.cross_entropy = slow", "tm"),
    "validating": ("real = tm.evaluate\n"
                   "def slow(*given):\n"
                   "    print('HERE', flush=True)\n"
                   "    while True: real(*given)\n"
                   "tm.evaluate = slow", "tm"),
    "receiving": ("from multiprocessing import connection\n"  # a batch, from a worker
                  "def stuck(*_):\n"
                  "    print('HERE', flush=True)\n"
                  "    import time; time.sleep(60)\n"
                  "connection.answer_challenge = stuck", "tm"),
    "testing": ("real = tm.evaluate\n"
                "def slow(*given):\n"
                "    print('HERE', flush=True)\n"
                "    while True: real(*given)\n"
                "tm.evaluate = slow", "test_model"),
}


@pytest.fixture
def copied(finished, tmp_path):
    """Return a folder with a copy of the finished run, of its paintings and copies, and flags."""
    for name in ("out", "wikiart", "small"):
        shutil.copytree(finished.folder / name, tmp_path / name)
    return tmp_path, [*folders(tmp_path), *QUICK[:-2]]


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_line_and_leaves_no_process(copied, stage):
    """The whole process group is interrupted, as by a terminal, while two workers run."""
    folder, flags = copied
    code, module = STAGES[stage]
    if module == "tm":
        flags += ["--epochs", "4", "--workers", "2"]
    else:
        flags = [*folders(folder)[:2], *folders(folder)[4:], "--workers", "2"]
    if stage == "preparing":
        shutil.rmtree(folder / "small")
    script = start(f"{code}\nsys.exit({module}.main(sys.argv[1:]))", *flags)
    for line in script.stdout:
        if "HERE" in line:
            break
    time.sleep(0.3)
    begun = time.monotonic()
    os.killpg(script.pid, signal.SIGINT)
    _, error = script.communicate(timeout=30)
    assert time.monotonic() - begun < 8
    assert script.returncode == 130, error
    assert "Traceback" not in error
    message = error.strip().splitlines()[-1]
    if stage == "testing":
        assert message == "stopped: nothing is lost; run the same command again"
    else:
        assert re.match(r"stopped: epoch 2 of 4 is saved in .*model_last.pth; .* goes on", message)
    assert not wait_until_alone(script.pid)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_script(copied, number):
    folder, flags = copied
    code, _ = STAGES["training"]
    script = start(f"{code}\nsys.exit(tm.main(sys.argv[1:]))", *flags, "--epochs", "4",
                   "--workers", "2")
    for line in script.stdout:
        if "HERE" in line:
            break
    os.kill(script.pid, number)
    script.communicate(timeout=30)
    assert script.returncode == -number
    assert not wait_until_alone(script.pid)
    assert tm.load_checkpoint(folder / "out/model_last.pth")["epoch"] == 2


def kill_until_done(folder, flags, kills, seed):
    """Run to the end through kills at random moments; check after each what must always hold."""
    chance, killed = random.Random(seed), 0
    while True:
        script = start("sys.exit(tm.main(sys.argv[1:]))", *flags)
        try:
            wait = chance.uniform(2, 9) if killed < kills else 300
            script.communicate(timeout=wait)
            assert script.returncode == 0
            if killed >= kills:
                return
            killed = kills  # it was done before all kills were spent
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGKILL)
            script.communicate()
            killed += 1
        for name in ("model_last.pth", "model_best.pth"):
            if (folder / "out" / name).exists():
                tm.load_checkpoint(folder / "out" / name)
        assert len(list(folder.rglob("*.tmp"))) <= tm.cores() + 1
        originals = tm.list_pictures(folder / "wikiart")
        copies = tm.list_pictures(folder / "small") if (folder / "small").exists() else {}
        for path, changed in copies.items():
            if changed == originals[path]:  # what is taken for good can be decoded
                Image.open(folder / "small" / path).load()


def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    kill_until_done(tmp_path, [*folders(tmp_path), *QUICK, "--epochs", "2"], kills=4, seed=1)
    check_same_runs(finished.out, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------ disk, numbers


def test_a_full_disk_while_preparing(finished, tmp_path):
    """A limit on the size of files stops a small copy; an error names it; the next run goes on."""
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    flags = [*folders(tmp_path), "--epochs", "0"]
    code = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))\n"
            "sys.exit(tm.main(sys.argv[1:]))")
    script = start(code, *flags)
    _, error = script.communicate(timeout=60)
    assert script.returncode == 1
    message = error.strip().splitlines()[-1]
    assert re.match(r"error: cannot write .*/small/.*\.jpg: File too large", message)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/bad_files.txt").exists()
    assert tm.main(flags) == 0


def test_a_full_tmpfs_keeps_the_older_checkpoint(copied):
    folder, flags = copied
    full = folder / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", full],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        for file in (folder / "out").iterdir():
            shutil.copy(file, full)
        before = {path.name: path.read_bytes() for path in full.iterdir()}
        script = start("sys.exit(tm.main(sys.argv[1:]))", *flags, "--output-dir", str(full),
                       "--epochs", "3")
        _, error = script.communicate(timeout=120)
        assert script.returncode == 1
        message = error.strip().splitlines()[-1]
        assert message.startswith(f"error: cannot write {full}/model_last.pth: No space left")
        assert {path.name: path.read_bytes() for path in full.iterdir()} == before
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.parametrize("name,reason", [("nowhere", "No such file"), ("long" * 30, "too long")])
def test_workers_that_cannot_send_are_an_error(copied, name, reason):
    """Without a socket among the temporary files, batches would never come, with no error."""
    folder, flags = copied
    if name != "nowhere":
        (folder / name).mkdir()
    code = (f"import tempfile\ntempfile.tempdir = {str(folder / name)!r}\n"
            "sys.exit(tm.main(sys.argv[1:]))")
    script = start(code, *flags, "--epochs", "3", "--workers", "2")
    try:
        _, error = script.communicate(timeout=60)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 1
    message = error.strip().splitlines()[-1]
    assert re.match(rf"error: .*{reason}.*epoch 2 of 3 is saved in", message), message


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("how", [lambda path: path.unlink(missing_ok=True),
                                 lambda path: os.truncate(path, 700)], ids=["vanishes", "is cut"])
def test_a_small_copy_that_is_no_more_is_named(copied, capsys, monkeypatch, workers, how):
    folder, flags = copied
    path = next(iter(tm.load_checkpoint(folder / "out/model_last.pth")["split"]["train"]))
    monkeypatch.setattr(tm, "rate_at", lambda *_: how(folder / "small" / path) or 0.1)
    assert tm.main([*flags, "--epochs", "3", "--workers", workers]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: cannot read the small copy .*{re.escape(path)} .*delete it.*"
                    "epoch 2 of 3 is saved in", message), message


def test_numbers_that_are_not_finite_stop_the_run(copied, capsys, monkeypatch):
    folder, flags = copied
    before = (folder / "out/model_best.pth").read_bytes()
    monkeypatch.setattr(tm, "rate_at", lambda *_: float("inf"))
    assert tm.main([*flags, "--epochs", "3", "--workers", "0"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: epoch 3/3, batch 2.* learning rate.*not finite.*epoch 2 of 3 is saved",
                    message), message
    assert tm.load_checkpoint(folder / "out/model_last.pth")["epoch"] == 2
    assert (folder / "out/model_best.pth").read_bytes() == before


def test_outputs_that_are_not_finite_are_never_saved(copied, capsys, monkeypatch):
    """The last step of an epoch spoils the weights: validation notices before anything is saved."""
    folder, flags = copied
    real = tm.train_epoch

    def spoil(model, *given):
        loss = real(model, *given)
        torch.nn.init.constant_(model.linear.bias, torch.nan)
        return loss

    monkeypatch.setattr(tm, "train_epoch", spoil)
    assert tm.main([*flags, "--epochs", "3", "--workers", "0"]) == 1
    assert "epoch 3/3 validation: the model's outputs are not finite" in capsys.readouterr().err
    assert tm.load_checkpoint(folder / "out/model_last.pth")["epoch"] == 2


@pytest.mark.parametrize("error,words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "BATCH_SIZE.*--batch-size 4"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "BATCH_SIZE.*--batch-size 4"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "--workers 0"),
])
def test_lack_of_memory_says_what_to_change(copied, capsys, monkeypatch, error, words):
    _, flags = copied

    def fail(*_):
        raise error

    monkeypatch.setattr(tm, "train_epoch", fail)
    assert tm.main([*flags, "--epochs", "3", "--workers", "0"]) == 1
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
    save("vast.jpg", Image.new("L", (25_000, 16_000), 99), "JPEG")
    for name in ("deep1.webp", "deep2.webp"):  # two at once would take too much memory
        save(name, Image.new("RGBA", (5_600, 5_600), (9, 9, 9, 99)), "WEBP", lossless=True)
    palette = Image.new("P", (8_000, 8_000), 1)
    palette.putpalette([255, 255, 255, 9, 9, 9])
    save("palette.png", palette, "PNG", transparency=0)
    save("bomb.png", Image.new("1", (30_000, 30_000)), "PNG", works=False)
    for name in ("with space.jpg", "q'uo\"te.jpg", "new\nline.jpg", "emoji 🎨.jpg", "comma,.jpg",
                 "bad\udcff\udce9.jpg", "n" * 251 + ".jpg", "-rf.jpg", "100%.jpg", "<b>.jpg"):
        save(name, red, "JPEG")
    save("n" * 251 + ".png", red, "PNG", works=False)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    usable |= dict.fromkeys(("pipe.jpg", "dangling.jpg", "folder.jpg"), False)
    (folder / "link.jpg").symlink_to(folder / "whole.jpg")
    usable["link.jpg"] = True
    (folder / "circle").symlink_to(folder)
    for name in ("._whole.jpg", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"no picture")
    (folder / ".ipynb_checkpoints").mkdir()
    return usable


def test_a_folder_of_every_kind(tmp_path):
    """Each picture is used or listed with its reason, in 1.5 GB, on an ASCII terminal."""
    usable = odd_pictures(tmp_path / "wikiart/Odd")
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    names = {f"Odd/{name}": works for name, works in usable.items()}
    code = ("peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            "before, code = peak(), tm.main(sys.argv[1:])\n"
            "print('PEAK', before // 1024, peak() // 1024)\n"
            "sys.exit(code)")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    script = subprocess.run(
        [sys.executable, "-c", f"import sys, train_model as tm\n{code}", *folders(tmp_path),
         "--epochs", "0"], cwd=ROOT, capture_output=True, env=environment, timeout=240)
    output = script.stdout.decode("ascii")
    assert script.returncode == 0, script.stderr
    imports, peak = map(int, re.search(r"PEAK (\d+) (\d+)", output).groups())
    assert peak < 1_500 and peak - imports < 800
    lines = (tmp_path / "out/bad_files.txt").read_text(encoding="utf-8").splitlines()
    bad = dict(line.split("\t") for line in lines)
    assert bad.keys() == {tm.shown(name) for name, works in names.items() if not works}
    assert all(bad.values())
    found = tm.list_pictures(tmp_path / "wikiart")
    assert {path for path in found if path.startswith("Odd/")} == names.keys()
    copies = tm.list_pictures(tmp_path / "small")
    for name, works in names.items():
        assert (tm.small_name(name) in copies) == works, name
        if works:
            with Image.open(os.fsencode(tmp_path / "small" / tm.small_name(name))) as image:
                image.load()
                assert image.mode == "RGB" and min(image.size) <= 320
    count = f"{len(found):,} paintings in"
    assert count in output and f"pictures that cannot be used: {len(bad)} (" in output


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
    found = tm.list_pictures(data)
    bad = tm.prepare(found, data, tmp_path / "small")
    copies = tm.list_pictures(tmp_path / "small")
    assert len(found) == 400 and 0 < len(bad) < 400
    assert copies.keys() == {tm.small_name(path) for path in found if path not in bad}


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
            _, listed = tm.read_lists(tmp_path, "genre")
            outcomes.add("read")
            exact = [path for part in listed.values() for path in part if path in right]
            assert len(exact) >= 30
        except ValueError as error:
            outcomes.add("refused")
            assert str(error)
        (tmp_path / name).write_bytes(whole[name])
    assert outcomes == {"read", "refused"}


def test_random_bytes_in_checkpoints(tmp_path):
    """Changed bytes are refused, or fall where they change nothing that is read."""
    chance, path = random.Random(4), tmp_path / "x.pth"
    checkpoint = {"format": tm.CHECKPOINT_FORMAT, "names": ["a"],
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
    assert tm.main([*flags, "--epochs", "2", "--workers", "0"]) == 0
    assert (folder / "out/history.csv").read_text().startswith("epoch,training_loss")
