"""What people see while the scripts run: lines, sheets and functions to call from Python."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import test_model
import train_model as tm
from tests.conftest import ROOT, folders, small_folder


def test_the_lines_of_a_run(finished, tmp_path, capsys):
    """They fit into 80 columns and line up; the best is marked; the end says what to do next."""
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "3"]
    assert tm.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("   epoch "))
    heading, *rows = lines[start : start + 4]
    history = tm.load_checkpoint(tmp_path / "model_last.pth")["history"]
    best = tm.best_epoch(history)
    for row, saved in zip(rows, history, strict=True):
        assert len(row) <= len(heading) < 80
        epoch, loss, validation, accuracy, rate, *left = row.split()
        assert epoch == f"{saved['epoch']}/3" and loss == f"{saved['training_loss']:.3f}"
        assert validation == f"{saved['validation_loss']:.3f}"
        share = f"{100 * saved['validation_accuracy']:.2f}%"
        assert accuracy == share + "*" * accuracy.endswith("*")
        assert rate == f"{saved['paintings_per_second']:,.1f}" and left
        for name, value in (("training loss", loss), ("accuracy", share), ("paintings/s", rate)):
            assert row.index(value) + len(value) == heading.index(name) + len(name)
    assert [row.split()[3].endswith("*") for row in rows] == [
        tm.best_epoch(history[:epoch]) == epoch for epoch in (1, 2, 3)]
    assert re.fullmatch(rf"trained 3 epochs in \d+ s; best: epoch {best}, validation accuracy "
                        rf"\d+\.\d\d %, {tmp_path}/model_best.pth", lines[-2])
    assert lines[-1] == (f"next: python test_model.py --data-dir {finished.folder}/wikiart "
                         f"--small-dir {finished.folder}/small --output-dir {tmp_path} "
                         "--batch-size 8 --workers 0")
    assert test_model.main(shlex.split(lines[-1])[3:]) == 0
    line = capsys.readouterr().out.splitlines()[-4]
    assert line.startswith(f"page to look at: {tmp_path}/report.html; beside it, ")
    assert all((tmp_path / name).exists() for name in re.findall(r"\w+\.csv|\w+\.json", line))


@pytest.mark.parametrize("seconds,words", [
    (0.4, "0 s"), (29.4, "29 s"), (59.4, "59 s"), (59.6, "1 min"), (3540, "59 min"),
    (3599, "1 h 00 min"), (3900, "1 h 05 min"), (18_720, "5 h 12 min"), (400_000, "111 h 07 min")])
def test_durations_in_words(seconds, words):
    assert tm.duration(seconds) == words


def test_a_log_gets_a_line_a_minute(capsys):
    """Where stderr is no terminal; nothing in the first minute, and nothing at the end."""
    with tm.Progress("epoch 1/20", 51_322) as bar:
        bar.update(64)
        assert not capsys.readouterr().err
        for moment in ("start_t", "last_print_t"):
            setattr(bar, moment, getattr(bar, moment) - 61)
        bar.set_postfix_str("loss 2.310", refresh=False)
        bar.update(12_736)
        bar.update(64)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.fullmatch(
        r"epoch 1/20: 12,800 of 51,322 paintings, loss 2\.310, 20\d\.\d paintings/s, 3 min left",
        lines[0])


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    """Slow as it may be, its rate is one; and what is printed begins at the left."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with tm.Progress("small copies", 10) as bar:
        bar.start_t -= 100
        bar.last_print_t -= 100
        bar.update(9)
        assert re.search(r"small copies:  90%\|.* 0\.09 paintings/s\]$", capsys.readouterr().err)
        bar.say("a line")
        captured = capsys.readouterr()
        assert captured.out == "a line\n" and re.fullmatch(r"\r +\r", captured.err)
        bar.start_t -= 1
        bar.last_print_t -= 1
        bar.update(1)
    assert capsys.readouterr().err.endswith("\r")


def test_the_sheet_shows_what_the_model_sees(finished):
    """Thirty paintings, eight a row, each with its class name under it."""
    run = tm.load_checkpoint(finished.out / "model_best.pth")
    paintings = tm.Paintings(small_folder(finished.folder), run["split"]["train"], 64, seed=0)
    sheet = np.asarray(Image.open(finished.out / "crops.jpg").convert("RGB")).astype(float)
    assert sheet.shape == (4 * 84, 8 * 144, 3)
    for place, index in enumerate(np.random.default_rng((0, 1)).permutation(30)):
        top, left = place // 8 * 84, place % 8 * 144
        crop = paintings[index, 1][0].numpy()
        assert np.abs(sheet[top : top + 64, left : left + 64] - crop).mean() < 12, place
        assert sheet[top + 64 : top + 84, left : left + 64].min() < 100  # something is written
    assert sheet[-84:, 6 * 144 :].min() > 200  # no 31st and 32nd


def test_the_sheet_is_there_before_a_long_run(finished, tmp_path):
    flags = [*finished.flags, *folders(tmp_path)[4:], "--epochs", "0"]
    assert tm.main([*flags, "--data-dir", f"{finished.folder}/wikiart"]) == 0
    assert (tmp_path / "out/crops.jpg").read_bytes() == (finished.out / "crops.jpg").read_bytes()


def test_folders_that_are_renamed_are_named(finished, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "out")
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    (tmp_path / "wikiart/Cubism").rename(tmp_path / "wikiart/Kubismus")
    assert tm.main([*finished.flags, *folders(tmp_path), "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "folders of the run that are gone: 1 (Cubism)" in out
    assert "folders without a painting of the run: 1 (Kubismus)" in out
    assert "classes without a train painting: 1 (Cubism)" in out


def test_the_python_of_the_readme_runs(finished, tmp_path, monkeypatch, capsys):
    """As it stands, on a finished run and one of its pictures; the export gives the same logits."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    shutil.copytree(finished.out, tmp_path / "demo")
    path = min(finished.painted)
    shutil.copy(finished.folder / "wikiart" / path, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "resnet50", tm.resnet50)
    named = {"torch": torch, "torchvision": torchvision}
    exec(code, named)
    printed = capsys.readouterr().out
    assert printed.startswith(str(named["run"]["class_names"]))
    best = test_model.likeliest_classes(Path("photo.jpg"), named["run"], named["model"], most=3)
    assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] > 0
    assert all(str(pair) in printed for pair in best)
    assert test_model.main(["photo.jpg", "--output-dir", "demo"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"photo.jpg: {best[0][0]} {best[0][1]:.1%}, ")
    images = 255 * torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(named["program"].module()(images), named["model"](images), atol=1e-4)
