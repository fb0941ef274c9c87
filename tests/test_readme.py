"""What is written is true: the commands run, the files exist, the flags and tests are there."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

import test_model
import train_model as tm
from tests import benchmark
from tests.conftest import folders_to_test

ROOT = Path(__file__).resolve().parent.parent
README = "".join(path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", ROOT / "tests/README.md") if path.exists())
COMMANDS = [shlex.split(part, comments=True)
            for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() for part in line.split("&&") if part.strip()]
SCRIPTS = {"train_model": tm, "test_model": test_model}
COMMANDS += [shlex.split(line) for line in re.findall(r"`(python [^`]+)`", README)]
OF_ARTGAN = {"wikiart.zip", "wikiart_csv.zip"}


@functools.cache
def explained(script):
    """Return what a script says with --help; run here, where torch is imported already."""
    try:
        with (contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as end,
              mock.patch("sys.argv", [str(script), "--help"])):
            runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError:  # it needs packages of its own
        return script.read_text(encoding="utf-8")
    assert end.value.code in (0, None)
    return output.getvalue()


def test_the_top_level_is_the_closed_list():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git checkout")
    top = {name.partition("/")[0] for name in run.stdout.split()}
    assert {name for name in top if name[0] != "."} - {"LICENSE"} == {
        "README.md", "class_names.txt", "requirements.txt", "test_model.py", "tests",
        "train_model.py"}


def test_run_time_packages_are_the_five():
    names = re.findall(r"(?m)^[a-z]+", (ROOT / "requirements.txt").read_text())
    assert sorted(names) == ["numpy", "pillow", "torch", "torchvision", "tqdm"]
    for script in ("train_model.py", "test_model.py"):
        text = (ROOT / script).read_text(encoding="utf-8")
        imported = set(re.findall(r"(?m)^(?:from|import) (\w+)", text))
        foreign = imported - sys.stdlib_module_names
        assert foreign <= {"numpy", "PIL", "torch", "torchvision", "tqdm", "train_model"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_is_right(command, monkeypatch):
    if command[0] == "cp":
        return
    if command[0] == "pip":
        assert command[1] == "install"
        named = [name for flag, name in zip(command, command[1:]) if flag == "-r"]
        assert all((ROOT / name).exists() for name in named)
        return
    if command[0] == "torchrun":
        command = ["python", *command[command.index("train_model.py"):]]
    assert command[0] == "python"
    if command[1] == "-m":
        assert command[2] == "pytest" and (ROOT / command[3]).is_dir()
        return
    script, flags = ROOT / command[1], command[2:]
    assert script.is_file()
    if script.stem in SCRIPTS and flags != ["--help"]:  # exits with 2 at an unknown flag
        def check(_, settings, *others):
            with contextlib.suppress(OSError):  # of folders that are not on this machine
                tm.check_settings(settings)

        monkeypatch.setattr(tm, "run_script", check)
        SCRIPTS[script.stem].main(flags)
        return
    for flag in flags:  # the scripts themselves say whether they know it
        if flag.startswith("--"):
            assert flag in explained(script) + explained(ROOT / "train_model.py")


def test_every_file_of_the_readme_exists_or_is_written(finished, tmp_path):
    shutil.copy(finished.out / "model_best.pth", tmp_path)
    flags = [*folders_to_test(finished.folder), "--output-dir", str(tmp_path), "--workers", "0"]
    picture = next((finished.folder / "wikiart").rglob("*.jpg"))
    assert test_model.main(flags) == test_model.main([*flags, str(picture)]) == 0
    written = {path.name for place in (finished.out, tmp_path) for path in place.glob("[!.]*")}
    named = set(re.findall(r"`([\w./-]+\.(?:py|txt|pth|csv|npy|html|zip|md|json|jpg))`", README))
    assert named >= written
    for name in named - written - OF_ARTGAN:
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name


def test_every_constant_of_the_readme_is_a_setting():
    named = set(re.findall(r"`([A-Z]{2,}(?:_[A-Z]+)*)(?: = [^`]*)?`", README))
    assert named - {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR"} <= {*tm.SETTINGS, "VIEWS"}
    assert "EPOCHS" in named


def test_every_test_of_the_readme_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named and all(f"def {name}(" in tests for name in named), [
        name for name in named if f"def {name}(" not in tests]


def test_the_benchmark_in_small_prints_its_table(tmp_path, monkeypatch, capsys):
    """Three rows with rates above 0, their ratios, and nothing left behind; in this process."""
    monkeypatch.setattr(benchmark, "new_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(benchmark, "WIKIART", 270)
    monkeypatch.setattr(tm, "cores", lambda: 1)  # fewer large pictures
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = ["--pictures=4", "--batch-size=2", "--image-size=64", "--rounds=1", "--workers=0"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    benchmark.main()
    printed = capsys.readouterr().out
    for row, rates in (("plain script", 3), ("this project", 4), ("ceiling", 3)):
        numbers = re.search(rf"(?m)^{row} +([-\d. ]+) MB", printed)[1].replace("-", "").split()
        assert len(numbers) == rates + 1 and all(float(number) > 0 for number in numbers)
    assert len(re.findall(r"(?m)^(?:training|evaluation|epochs), .*: +\d", printed)) == 6
    assert "EPOCHS = 0 with 270 resized copies ready: " in printed
    assert not list(tmp_path.iterdir())
