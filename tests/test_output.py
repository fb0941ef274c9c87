"""What people see while the scripts run: lines, sheets and functions to call from Python."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from onnx.reference import ReferenceEvaluator
from PIL import Image

import test_model
import train_model as tm
from tests.conftest import ROOT, copies_in, folders


def test_the_lines_of_a_run(finished, tmp_path, capsys):
    """They fit into 80 columns and line up; the best is marked; the end says what to do next."""
    output_dir = tmp_path / "an odd name (1) & more"
    flags = [*finished.flags, "--output-dir", str(output_dir), "--epochs", "3"]
    assert tm.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("   epoch "))
    heading, *rows = lines[start : start + 4]
    history = tm.load_checkpoint(output_dir / "model_last.pth")["history"]
    best = tm.best_epoch(history)
    for row, saved in zip(rows, history, strict=True):
        assert len(row) <= len(heading) < 80
        epoch, loss, validation, accuracy, rate, left = row.split()
        assert epoch == f"{saved['epoch']}/3" and loss == f"{saved['training_loss']:.3f}"
        assert validation == f"{saved['validation_loss']:.3f}"
        share = f"{100 * saved['validation_accuracy']:.2f}%"
        assert accuracy == share + "*" * accuracy.endswith("*")
        assert rate == f"{saved['paintings_per_second']:,.1f}"
        minutes, seconds = map(int, left.split(":"))
        assert 60 * minutes + seconds == int(saved["seconds"] * (3 - saved["epoch"]))
        for name, value in (("training loss", loss), ("accuracy", share), ("paintings/s", rate)):
            assert row.index(value) + len(value) == heading.index(name) + len(name)
    assert [row.split()[3].endswith("*") for row in rows] == [
        tm.best_epoch(history[:epoch]) == epoch for epoch in (1, 2, 3)]
    accuracy = 100 * history[best - 1]["validation_accuracy"]
    assert re.search(rf"epoch {best}\b.* {accuracy:.2f} %", lines[-2])
    command = shlex.split(lines[-1])
    assert command[:3] == ["next:", "python", "test_model.py"]
    given = dict(zip(command[3::2], command[4::2]))
    assert given == {"--data-dir": f"{finished.folder}/wikiart", "--output-dir": str(output_dir),
                     "--cache-dir": f"{finished.folder}/cache", "--batch-size": "8",
                     "--workers": "0"}
    assert test_model.main(command[3:]) == 0
    named = re.findall(r"\w+\.(?:csv|json|html)", capsys.readouterr().out)
    assert "report.html" in named and all((output_dir / name).exists() for name in named)


def test_a_log_gets_a_bar_a_minute(capsys):
    """Where stderr is no terminal; nothing in the first minute, and nothing at the end."""
    with tm.progress_bar("epoch 1/20", 51_322) as bar:
        bar.update(64)
        assert not capsys.readouterr().err
        for moment in ("start_t", "last_print_t"):
            setattr(bar, moment, getattr(bar, moment) - 61)
        bar.set_postfix_str("loss 2.310", refresh=False)
        bar.update(12_736)
        bar.update(64)
        printed = capsys.readouterr().err.strip()
    assert re.fullmatch(r"epoch 1/20:.* 12800/51322 .*\d paintings/s, loss 2\.310\]", printed)
    assert not capsys.readouterr().err.strip()


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    """After a second; it leaves nothing there."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with tm.progress_bar("resizing", 10) as bar:
        bar.update(1)
        assert not capsys.readouterr().err
        bar.start_t -= 100
        bar.last_print_t -= 100
        bar.update(8)
        assert re.search(r"resizing:  90%\|.* 9/10 .*\]$", capsys.readouterr().err)
    assert re.fullmatch(r"\r *\r", capsys.readouterr().err)


def test_the_sheet_shows_what_the_model_sees(finished):
    """Thirty paintings, eight a row, each with its class name under it."""
    run = tm.load_checkpoint(finished.out / "model_best.pth")
    dataset = tm.PaintingDataset(run["split"]["train"], copies_in(finished.folder), 64, seed=0)
    sheet = np.asarray(Image.open(finished.out / "crops.jpg").convert("RGB")).astype(float)
    height, width = sheet.shape[0] / 4, sheet.shape[1] / 8
    assert 64 < height < 100 < width < 200

    def look(top, left):
        """Return how far the sheet is from a crop there, and how dark it is below."""
        below = sheet[top + 64 : round(top + height), left : left + 64]
        return np.abs(sheet[top : top + 64, left : left + 64] - crop).mean(), below.min()

    for place, index in enumerate(np.random.default_rng((0, 1)).permutation(30)):
        top, left = int(place // 8 * height), int(place % 8 * width)
        crop = dataset[index, 1][0].numpy()
        distance, darkest = min(look(top + down, left + right)
                                for down in range(8) for right in range(8))
        assert distance < 12 and darkest < 100, place  # something is written
    assert sheet[round(-height) :, round(-2 * width) :].min() > 200  # no 31st and 32nd


def test_the_sheet_is_there_before_a_long_run(finished, tmp_path):
    flags = [*finished.flags, *folders(tmp_path)[4:], "--epochs", "0"]
    assert tm.main([*flags, "--data-dir", f"{finished.folder}/wikiart"]) == 0
    assert (tmp_path / "out/crops.jpg").read_bytes() == (finished.out / "crops.jpg").read_bytes()


def test_paintings_of_a_renamed_folder_are_counted(finished, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "out")
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    (tmp_path / "wikiart/Cubism").rename(tmp_path / "wikiart/Kubismus")
    assert tm.main([*finished.flags, *folders(tmp_path), "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    for pattern in (r": 8 \(Cubism/", r": 8 \(Kubismus/", r"no train.*: 1 \(Cubism\)"):
        assert len(re.findall(pattern, out)) == 1, out


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
    run, model = test_model.load_best("demo")
    assert printed.startswith(str(run["class_names"]))
    best = test_model.likeliest_classes(Path("photo.jpg"), run, model, most=3)
    assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] > 0
    assert all(str(pair) in printed for pair in best)
    many = test_model.likeliest_classes(["photo.jpg"] * 20, run, model, most=3)
    assert len(many) == 20 and all([name for name, _ in row] == [name for name, _ in best]
                                   for row in many)
    assert test_model.main(["photo.jpg", "--output-dir", "demo"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"photo.jpg: {best[0][0]} {best[0][1]:.1%}, ")
    images = 255 * torch.rand(3, 3, 224, 224)
    with torch.no_grad():
        logits, embeddings = model(images), named["model"](images)
    assert embeddings.shape == (3, 2 * tm.LSTM_UNITS)
    assert torch.allclose(model.linear(embeddings), logits, atol=1e-4)
    exported = ReferenceEvaluator("model.onnx").run(None, {"images": images.numpy()})[0]
    assert exported == pytest.approx(logits.numpy(), abs=1e-4)
