"""Training, as a user runs it: constants edited in a copy of the file, flags, bad input."""

import copy
import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, copies_in, folders, folders_to_test
from tests.paintings import paint, paint_artgan, write_lists


def test_a_user_edits_constants_and_resumes(tmp_path, monkeypatch, capsys):
    """EPOCHS edited in the file: 1, then 2, which resumes; then the test."""
    paint_artgan(tmp_path / "wikiart", each=6, size=(100, 80))
    for name in ("train_model.py", "test_model.py"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "train_model.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train_model")  # so that the test imports the copy
    monkeypatch.setattr(torchvision.models, "resnet50", tm.resnet50)

    def edit(**constants):
        text = script.read_text(encoding="utf-8")
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value!r}", text)
            assert count == 1
        script.write_text(text, encoding="utf-8")

    def run(name):
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(name, run_name="__main__")
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out

    edit(EPOCHS=1, WEIGHTS="none", IMAGE_SIZE=64, BATCH_SIZE=8, WORKERS=0)
    first = run("train_model.py")
    assert "split: 20 train, 5 validation, 5 test paintings in 5 classes" in first
    assert " 1/1 " in first
    edit(EPOCHS=2)
    second = run("train_model.py")
    assert "resuming after epoch 1" in second and " 2/2 " in second
    assert " 1/2 " not in second
    with open("history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    names = Path("class_names.txt").read_text().splitlines()
    assert names == sorted(path.name for path in Path("wikiart").iterdir())

    last = run("test_model.py").splitlines()[-1]
    assert re.match(r"Test accuracy: \d+\.\d\d % \(\d of 5 paintings; 95 % interval "
                    r"\d+\.\d to \d+\.\d %\)", last)
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert len(rows) == 5 and f"({right} of 5 paintings;" in last


def ends_with(code, flags, main=tm.main):
    """Fail unless the parser of a script ends it with this exit code."""
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == code


def test_every_setting_is_a_flag(capsys):
    """With its default and its comment."""
    for script in (tm, test_model):
        ends_with(0, ["--help"], script.main)
        text = " ".join(capsys.readouterr().out.split())
        for name in tm.SETTINGS if script is tm else (*tm.SHARED, "VIEWS"):
            flag, default = f"--{name.lower().replace('_', '-')}", getattr(script, name, None)
            default = getattr(tm, name) if default is None else default
            assert re.search(rf"{flag} [A-Z]+ [^\[\]]{{10,}} \[{re.escape(str(default))}\]", text)
    ends_with(2, ["--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


def test_settings_changed_on_the_module_count(tmp_path, monkeypatch, capsys):
    """As in a notebook: `train_model.EPOCHS = 0; train_model.main([])`; flags go before them."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    changed = {"DATA_DIR": "wikiart", "CACHE_DIR": "cache", "OUTPUT_DIR": "out"}
    for name, value in changed.items():
        monkeypatch.setattr(tm, name, f"{tmp_path}/{value}")
    for name, value in {"LISTS_DIR": "none", "IMAGE_SIZE": 70, "EPOCHS": 0}.items():
        monkeypatch.setattr(tm, name, value)
    assert tm.main([]) == 0
    assert "20 paintings" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"100"}
    assert tm.main(["--image-size", "77"]) == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"100", "110"}


@pytest.mark.parametrize("flag,kind", [("--epochs=many", "int"), ("--epochs=1.5", "int"),
                                       ("--seed=", "int"), ("--dropout=half", "float")])
def test_values_of_another_type_are_refused(capsys, flag, kind):
    ends_with(2, [flag])
    name, _, value = flag.partition("=")
    assert f"argument {name}: invalid {kind} value: {value!r}" in capsys.readouterr().err


def test_importing_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("train_model", "test_model"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def small_artgan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    paint_artgan(folder / "wikiart", each=4, size=(60, 50))
    (folder / "file").write_text("no folder")
    (folder / "empty" / "Cubism").mkdir(parents=True)
    (folder / "single" / "Cubism").mkdir(parents=True)
    shutil.copy(next((folder / "wikiart/Cubism").iterdir()), folder / "single/Cubism")
    write_lists(folder / "other_lists", "style", ["a", "b"], [("X/x.jpg", 0)], [("X/y.jpg", 1)])
    write_lists(folder / "wrong_label", "style", ["a", "b"], [("X/x.jpg", 7)], [("X/y.jpg", 1)])
    write_lists(folder / "half_lists", "style", ["a", "b"], [("X/x.jpg", 0)], [("X/y.jpg", 1)])
    (folder / "half_lists" / "style_val.csv").unlink()
    write_lists(folder / "no_rows", "style", ["a", "b"], [("X/x.jpg", 0)], [("X/y.jpg", 1)])
    (folder / "no_rows" / "style_val.csv").write_text("1;2\n")
    for number, path in enumerate(sorted((folder / "wikiart").glob("*/*"))):
        for place in (f"two_artists/{path.parent.name}/{'ab'[number % 2]}_{path.name}",
                      f"parts/{('Train', 'val')[number % 2]}/{path.name}"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / place)
    (folder / "no_weights.pth").write_text("text")
    torch.save({"conv1.weight": torch.zeros(4)}, folder / "other_weights.pth")
    return folder


BAD_INPUT = [
    (["--data-dir", "{}/nowhere"], "no folder .*/nowhere.*ArtGAN.*tests/demo.py"),
    (["--data-dir", "{}/empty"], "no picture .*/empty"),
    (["--data-dir", "{}/file"], "no folder .*/file"),
    (["--data-dir", "~nobody_of_this_name/x"], "no folder .*~nobody"),
    (["--data-dir", "{}/single"], "1 class.*DATA_DIR"),
    (["--data-dir", "{}/parts"], "Train, val .*--data-dir"),
    (["--attribute", "artist"], "0 class.*MIN_PAINTINGS"),
    (["--attribute", "genre"], "genre_train.csv.*https://github.com/cs-chan/ArtGAN"),
    (["--attribute", "colour"], "'colour' .*colour_train.csv"),
    (["--attribute", ""], "ATTRIBUTE ''"),
    (["--weights", "imagnet"], "no file .*/imagnet"),
    (["--lists-dir", "{}/nowhere"], "/nowhere .*style_class.* nothing"),
    (["--lists-dir", "{}/other_lists"], "0 class.*LISTS_DIR"),
    (["--lists-dir", "{}/other_lists", "--attribute", "x"], "x_class.* has .*style_"),
    (["--lists-dir", "{}/wrong_label"], "X/x.jpg .*label 7"),
    (["--lists-dir", "{}/half_lists"], "style_val,.* has style_class.txt, style_train.csv"),
    (["--lists-dir", "{}/no_rows"], "style_val.csv .*'1;2'"),
    (["--epochs", "-1"], "EPOCHS .* 0 .* -1"),
    (["--batch-size", "0"], "BATCH_SIZE .* 1 .* 0"),
    (["--image-size", "63"], "IMAGE_SIZE .* 64 .* 512.* 63"),
    (["--image-size", "513"], "IMAGE_SIZE .* 64 .* 512.* 513"),
    (["--learning-rate", "nan"], "LEARNING_RATE .* nan"),
    (["--learning-rate", "1e999"], "LEARNING_RATE .* inf"),
    (["--dropout", "1"], "DROPOUT .* 1"),
    (["--weight-decay", "-1"], "WEIGHT_DECAY .* -1"),
    (["--workers", "-2"], "WORKERS .* -2"),
    (["--seed", "-1"], "SEED .* -1"),
    (["--group-by", "museum"], "GROUP_BY .*painting.*artist.* 'museum'"),
    (["--group-by", "artist", "--attribute", "artist"], "GROUP_BY .*artist"),
    (["--group-by", "artist", "--data-dir", "{}/two_artists"], "GROUP_BY artist .*three artists"),
    (["--output-dir", "{}/file/out"], "/file/out"),
    (["--cache-dir", "{}/file/cache"], "/file/cache"),
    (["--cache-dir", "{}/wikiart/cache"], "/wikiart/cache .*/wikiart: "),
    (["--data-dir", "{}/wikiart", "--cache-dir", "{}"], "/wikiart .*DATA_DIR, CACHE_DIR"),
    (["--output-dir", "{}/wikiart/out"], "/wikiart/out .*/wikiart: "),
    (["--output-dir", "{}/cache"], "/cache .*/cache: .*OUTPUT_DIR"),
    (["--weights", "{}/nowhere.pth"], "no file .*nowhere.pth"),
    (["--weights", "{}/nowhere.pth", "--output-dir", "{}/new/folders"], "no file .*nowhere.pth"),
    (["--weights", "{}/no_weights.pth"], "/no_weights.pth "),
    (["--weights", "{}/other_weights.pth"], "/other_weights.pth .*fit"),
]


@pytest.mark.parametrize("flags,message", BAD_INPUT, ids=[" ".join(f) for f, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_writes_nothing(small_artgan, flags, message, capsys):
    before = sorted(small_artgan.rglob("[!.]*.*"))
    flags = [flag.format(small_artgan) for flag in flags]
    assert tm.main([*folders(small_artgan), *QUICK, "--epochs", "1", *flags]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1 and re.match(f"error: .*({message})", lines[0]), captured.err
    assert sorted(small_artgan.rglob("[!.]*.*")) == before


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_a_bug_shows_its_traceback(small_artgan, capsys, monkeypatch, kind):
    """Whatever is no error of the user's or the system's."""
    def find_paintings(_):
        raise kind("a bug")

    before = sorted(small_artgan.rglob("[!.]*.*"))
    monkeypatch.setattr(tm, "find_paintings", find_paintings)
    assert tm.main([*folders(small_artgan), *QUICK]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "in find_paintings" in error
    assert re.search(rf"(?m)^{kind.__name__}: .*a bug", error)
    assert sorted(small_artgan.rglob("[!.]*.*")) == before


def test_a_class_of_broken_pictures_alone_is_an_error(tmp_path, capsys):
    painted = paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    for path, name in painted.items():
        if name != "Cubism":
            (tmp_path / "wikiart" / path).write_bytes(b"broken")
    assert tm.main([*folders(tmp_path), *QUICK, "--epochs", "1"]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("error: .*1 class.*", error)
    assert len((tmp_path / "out/bad_files.txt").read_text().splitlines()) == 16


@pytest.mark.parametrize("damaged", [False, True])
def test_a_failed_download_says_what_to_do(small_artgan, capsys, monkeypatch, tmp_path, damaged):
    """Where there is no network, and where an earlier download was cut short."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if damaged:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/resnet50-11ad3fa6.pth").write_bytes(b"PK\3\4")

    def fail(url, *_, **__):
        raise OSError("no network")

    before = sorted(small_artgan.rglob("*"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert tm.main([*folders(small_artgan), "--epochs", "1"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: cannot load https://download.pytorch.org/models/resnet50-11ad")
    assert damaged or "(no network)" in error
    assert f"{tmp_path}/checkpoints" in error and "--weights none" in error
    assert "\n" not in error and "weights_only" not in error
    assert sorted(small_artgan.rglob("*")) == before


def test_testing_before_training(tmp_path, capsys):
    assert test_model.main(["--output-dir", str(tmp_path)]) == 1
    assert re.fullmatch("error: .*model_best.pth.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_testing_on_other_paintings(finished, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "wikiart/Cubism").mkdir(parents=True)
    paint("Cubism", 1).save(tmp_path / "wikiart/Cubism/another.jpg")
    before = sorted(tmp_path.rglob("*"))
    assert test_model.main(folders_to_test(tmp_path)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*5 test paintings.*{tmp_path}/wikiart.*\n", error)
    assert before == sorted(tmp_path.rglob("*"))


# ----------------------------------------------------------------------------------------- training


def test_weights_of_torchvisions_resnet_are_taken(tmp_path, real_network):
    """With its last layer, which is not used, as torchvision's own file has it."""
    torch.manual_seed(9)
    state = resnet50().state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    model = tm.ArtClassifier(2)
    tm.load_resnet(model.features.resnet, str(tmp_path / "resnet50.pth"))
    own = model.features.resnet.state_dict()
    assert own.keys() == {name for name in state if not name.startswith("fc.")}
    for name, value in own.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_weights_saved_in_other_ways_are_taken(tmp_path, wrapped, zipped):
    """Before torch 1.6, and as PyTorch's ImageNet example saves them from several GPUs."""
    torch.manual_seed(9)
    state, file = tm.resnet50().state_dict(), tmp_path / "resnet.pth.tar"
    content = {"epoch": 90, "arch": "resnet50", "state_dict": {
        f"module.{name}": value for name, value in state.items()}} if wrapped else state
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    resnet = tm.ArtClassifier(2).features.resnet
    tm.load_resnet(resnet, str(file))
    for name, value in resnet.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_first_epoch_leaves_pretrained_weights_alone(tmp_path):
    """Frozen in epoch 1, trained in epoch 2, its norms fixed; the file is not needed to resume."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(80, 64))
    torch.manual_seed(9)
    state = tm.resnet50().state_dict()
    torch.save(state, tmp_path / "resnet.pth")
    flags = [*folders(tmp_path), *QUICK, "--weights", str(tmp_path / "resnet.pth")]
    assert tm.main([*flags, "--epochs", "1"]) == 0
    (tmp_path / "resnet.pth").unlink()
    kept = tm.load_checkpoint(tmp_path / "out/model_last.pth")["model"]
    for name, value in state.items():
        if not name.startswith("fc."):
            assert torch.equal(kept["features.resnet." + name], value), name
    assert tm.main([*flags, "--epochs", "2"]) == 0
    moved = tm.load_checkpoint(tmp_path / "out/model_last.pth")["model"]
    for name in ("conv1.weight", "bn1.weight"):
        assert not torch.equal(moved["features.resnet." + name], state[name])
    for name in ("bn1.running_mean", "layer4.0.bn3.running_var"):
        assert torch.equal(moved["features.resnet." + name], state[name])


def test_the_learning_rate_warms_up_twice_and_ends_at_zero():
    rates = [tm.rate_at(step / 100, 10, 1, 0.5) for step in range(1000)]
    assert rates[0] == 0 and rates[100] == 0  # at the start, and where the ResNet is unfrozen
    assert rates[25] < rates[50] > rates[99] * 0.9 and rates[125] < rates[150]
    assert all(a > b for a, b in zip(rates[150:], rates[151:])) and rates[-1] < 1e-4
    assert [tm.rate_at(step / 10, 2, 0, 0) for step in range(20)] == sorted(
        (tm.rate_at(step / 10, 2, 0, 0) for step in range(20)), reverse=True)


def test_the_resnet_learns_slower_and_norms_do_not_decay():
    groups = tm.make_optimizer(tm.ArtClassifier(3), 1e-3, 0.1, 0.05).param_groups
    table = sorted((group["lr"], group["weight_decay"], len(group["params"])) for group in groups)
    assert [row[:2] for row in table] == [(1e-4, 0.0), (1e-4, 0.05), (1e-3, 0.0), (1e-3, 0.05)]
    assert sum(row[2] for row in table) == len(list(tm.ArtClassifier(3).parameters()))


def test_each_step_has_its_rate(finished, tmp_path, monkeypatch):
    """Of a resumed run too, by the number of epochs that it now has."""
    train_epoch, rates = tm.train_epoch, []

    def train_and_note(model, loader, optimizer, *others):
        optimizer.register_step_pre_hook(lambda *_: rates.append(
            [group["lr"] for group in optimizer.param_groups]))
        return train_epoch(model, loader, optimizer, *others)

    monkeypatch.setattr(tm, "train_epoch", train_and_note)
    shutil.copytree(finished.out, tmp_path / "out")
    flags = [*finished.flags, "--output-dir", f"{tmp_path}/out", "--learning-rate", "0.01"]
    assert tm.main([*flags, "--epochs", "3"]) == 0  # the third
    expected = [0.01 * tm.rate_at(2 + (step + 0.5) / 4, 3, 0, 0.5) for step in range(4)]
    assert rates == [pytest.approx([rate] * 4) for rate in expected]
    history = tm.load_checkpoint(tmp_path / "out/model_last.pth")["history"]
    assert history[-1]["learning_rate"] == pytest.approx(rates[-1][0])


def loader_of(labels, copies, seed, workers=0):
    """Return a loader of crops of 64 pixels in batches of up to 5."""
    settings = SimpleNamespace(workers=workers, image_size=64, batch_size=5)
    return tm.make_loader(labels, copies, settings, torch.device("cpu"), seed)


@pytest.fixture(scope="module")
def twelve(finished):
    """Return labels and copies of twelve of the finished run's paintings."""
    labels = {path: label for label, path in enumerate(sorted(finished.painted)[:12])}
    return labels, copies_in(finished.folder)


@pytest.fixture(scope="module")
def open_paintings(twelve):
    """Return a function of a seed that opens them."""
    return lambda seed: tm.PaintingDataset(*twelve, 64, seed)


def batches_of(twelve, workers):
    """Return what two epochs and an evaluation load, with so many workers."""
    training, evaluation = (loader_of(*twelve, seed, workers) for seed in (4, None))
    seen = []
    for loader, epoch in ((training, 1), (training, 2), (evaluation, 0)):
        loader.batch_sampler.epoch = epoch
        seen += [(pixels.clone(), labels.clone()) for pixels, labels in loader]
    return seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loading_does_not_depend_on_the_workers(twelve):
    alone = batches_of(twelve, 0)
    assert [len(labels) for _, labels in alone] == [4] * 9
    first, second, third = (torch.cat([labels for _, labels in alone[n : n + 3]]).tolist()
                            for n in (0, 3, 6))
    assert sorted(first) == sorted(second) == third == list(range(12))
    assert first != second and first != third
    for workers in (1, 3):
        for (pixels, labels), (others, names) in zip(alone, batches_of(twelve, workers)):
            assert torch.equal(pixels, others) and torch.equal(labels, names)


def test_crops_vary_with_the_epoch_and_not_with_the_rest(open_paintings, tmp_path):
    state, paintings = torch.get_rng_state(), open_paintings(4)
    first, label = paintings[3, 1]
    assert first.shape == (64, 64, 3) and first.dtype == torch.uint8 and label == 3
    assert torch.equal(first, paintings[3, 1][0]) and torch.equal(first, open_paintings(4)[3, 1][0])
    assert not torch.equal(first, paintings[3, 2][0])
    assert not torch.equal(first, open_paintings(0)[3, 1][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_vary_with_the_painting(tmp_path):
    """Of the same picture under two names, while the centre is the same, and in every epoch."""
    names = ("A/x.jpg", "B/y.jpg")
    for path in names:
        (tmp_path / path).parent.mkdir()
        paint("Cubism", 1).save(tmp_path / path)
    labels, copies = dict.fromkeys(names, 0), {path: str(tmp_path / path) for path in names}
    varied, central = (tm.PaintingDataset(labels, copies, 64, seed) for seed in (4, None))
    assert not torch.equal(varied[0, 1][0], varied[1, 1][0])
    assert torch.equal(central[0, 1][0], central[1, 2][0])


def test_evaluation_sees_the_centre():
    image = np.zeros((320, 640, 3), np.uint8)
    image[20:300, 180:460] = 255
    image[30:290, 190:450] = 128
    centred = np.asarray(tm.center_crop(Image.fromarray(image), 224))
    assert centred.shape == (224, 224, 3) and (centred[12:-12, 12:-12] == 128).all()
    for turned in map(np.rot90, [centred] * 4, range(4)):
        assert (turned[1:6, 1:-1] == 255).all()


@pytest.mark.parametrize("turned", [False, True])
def test_other_views_are_at_the_ends_of_the_long_side(turned):
    """A ramp along it: the mean of a square of 280 pixels tells where it is in the 640."""
    ramp = np.tile(np.linspace(0, 255, 640)[None, :, None], (320, 1, 3)).astype(np.uint8)
    image = Image.fromarray(ramp.swapaxes(0, 1) if turned else ramp)
    means = [np.asarray(tm.center_crop(image, 224, place)).mean() for place in (0, 0.5, 1)]
    assert means == pytest.approx([255 * middle / 640 for middle in (180, 320, 460)], abs=1)


def test_crops_differ_in_size_and_side(tmp_path):
    """A ramp from black to white: its range tells the width of a crop, its slope the flip."""
    ramp = np.tile(np.arange(320)[None, :, None] // 2, (320, 1, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.jpg", quality=95)
    paintings = tm.PaintingDataset({"x.jpg": 0}, {"x.jpg": f"{tmp_path}/x.jpg"}, 64, seed=0)
    crops = [paintings[0, epoch][0].float().mean((0, 2)) for epoch in range(1, 80)]
    slopes = torch.stack([crop[-8:].mean() - crop[:8].mean() for crop in crops])
    assert 20 < (slopes > 0).sum() < 59
    assert slopes.abs().min() < 90 and slopes.abs().max() > 115


def test_an_epoch_trains_as_a_plain_loop_does():
    """Rates, clipping, steps and the mean loss, over batches of 4, 3 and 3 pictures."""
    torch.manual_seed(3)
    model, shares = tm.ArtClassifier(3), [0.5, 1.0, 0.3]
    plain = copy.deepcopy(model)
    pixels = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    loader = DataLoader({(index, 1): (pixels[index], labels[index]) for index in range(10)},
                        batch_sampler=tm.EpochBatchSampler(10, 4, seed=5))
    loader.batch_sampler.epoch = 1
    batches = [[index for index, _ in batch] for batch in loader.batch_sampler]
    optimizer = tm.make_optimizer(model, 1e-3, 0.1, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [*shares, 0].__getitem__)
    model.start_training(pretrained=False, frozen=False)
    scaler = torch.amp.GradScaler(enabled=False)
    loss, margins = tm.train_epoch(model, loader, optimizer, schedule, scaler, "")
    assert margins.shape == (10, 3)

    optimizer, total, norms = tm.make_optimizer(plain, 1e-3, 0.1, 0.05), 0, []
    peaks = [group["lr"] for group in optimizer.param_groups]
    for part, share in zip(batches, shares, strict=True):
        logits = plain(pixels[part].permute(0, 3, 1, 2))
        value = nn.functional.cross_entropy(logits, labels[part])
        for index, row in zip(part, logits.detach()):
            label, others = labels[index].item(), row.clone()
            others[label] = -100
            shares, other = row.log_softmax(0).tolist(), others.argmax().item()
            assert margins[index].tolist() == pytest.approx(
                [shares[label], shares[other], other], abs=1e-4)
        total += value.item() * len(part)
        optimizer.zero_grad()
        value.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * share
        optimizer.step()
    assert max(norms) > 1.5  # so that clipping matters
    assert loss == pytest.approx(total / 10, rel=1e-5)
    trained = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("epochs,counted", [(1, [1]), (2, [2]), (8, [2, 3, 4])])
def test_margins_are_those_of_the_early_epochs(finished, tmp_path, monkeypatch, epochs, counted):
    """Their mean, in a run that is stopped and resumed and extended too; of validation, the best's.

    A frozen epoch is not counted where there are others.
    """
    margins, logits, weights = [], [], tmp_path / "resnet.pth"
    torch.save(tm.resnet50().state_dict(), weights)
    train_epoch, evaluate, stops = tm.train_epoch, tm.evaluate, [3]

    def train_and_note(*given):
        if len(margins) in stops:
            stops.remove(len(margins))
            raise KeyboardInterrupt
        loss, of_paintings = train_epoch(*given)
        margins.append(of_paintings.tolist())
        return loss, of_paintings

    def evaluate_and_note(*given):
        logits.append(evaluate(*given))
        return logits[-1]

    monkeypatch.setattr(tm, "train_epoch", train_and_note)
    monkeypatch.setattr(tm, "evaluate", evaluate_and_note)
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--weights", str(weights)]
    ends = [(130, 8), (0, 10)] if epochs == 8 else [(0, epochs)]
    for code, last in ends:
        assert tm.main([*flags, "--epochs", str(last)]) == code
    run = tm.load_checkpoint(tmp_path / "model_last.pth")
    assert len(margins) == len(run["history"]) == ends[-1][1]
    expected = {}
    for place, path in enumerate(run["split"]["train"]):
        rows = [margins[epoch - 1][place] for epoch in counted]
        means = [sum(column) / len(counted) for column in zip(*rows)]
        expected[path] = [*means[:2], int(rows[-1][2]), len(counted)]
    best = logits[tm.best_epoch(run["history"]) - 1]
    for (path, label), row in zip(run["split"]["validation"].items(), best):
        others = row.clone()
        others[label] = -torch.inf
        shares, other = row.log_softmax(0), others.argmax().item()
        expected[path] = [shares[label].item(), shares[other].item(), other, 1]
    assert run["margins"].keys() == expected.keys() and len(expected) == 35
    for path, values in expected.items():
        assert run["margins"][path] == pytest.approx(values, abs=1e-5), path


def test_every_painting_trains_once_in_every_epoch():
    for count in (1, 63, 64, 65, 129):
        batches, orders = tm.EpochBatchSampler(count, 64, seed=0), []
        assert not list(batches)  # before the first epoch
        for batches.epoch in (1, 2):
            keys = [key for batch in batches for key in batch]
            assert sorted(keys) == [(index, batches.epoch) for index in range(count)]
            sizes = [len(batch) for batch in batches]
            assert sizes == batches.sizes and len(sizes) == len(batches)
            assert max(sizes) <= 64 and max(sizes) - min(sizes) <= 1
            orders.append([index for index, _ in keys])
        assert count == 1 or orders[0] != orders[1]
    orders = []
    for seed in (0, 1, None):
        batches = tm.EpochBatchSampler(64, 64, seed)
        batches.epoch = 1
        orders.append([index for batch in batches for index, _ in batch])
    assert orders[0] != orders[1] and orders[2] == list(range(64))


def test_the_run_saves_what_it_says(finished):
    last = tm.load_checkpoint(finished.out / "model_last.pth")
    best = tm.load_checkpoint(finished.out / "model_best.pth")
    keys = {"format", "settings", "class_names", "split", "split_source", "planned_epochs",
            "history", "margins", "corrected", "torch", "device", "model"}
    assert best.keys() == keys and last.keys() == keys | {"optimizer", "scaler"}
    assert [len(last["split"][part]) for part in tm.PARTS] == [30, 5, 5]
    assert best["split"] == last["split"] and "by painting" in best["split_source"]
    assert best["class_names"] == sorted(set(finished.painted.values()))
    for labels in best["split"].values():
        for path, label in labels.items():
            assert finished.painted[path] == best["class_names"][label]
    accuracies = [row["validation_accuracy"] for row in last["history"]]
    assert [row["epoch"] for row in last["history"]] == [1, 2]
    assert best["history"] == last["history"][: 1 + accuracies.index(max(accuracies))]
    rates = [1e-3 * tm.rate_at(epoch + 3.5 / 4, 2, 0, 0.5) for epoch in range(2)]  # 4th step of 4
    assert [row["learning_rate"] for row in last["history"]] == pytest.approx(rates)
    parameters = [value for value in last["model"].values() if value.is_floating_point()]
    assert 0 < len(last["optimizer"]) < len(parameters)
    assert {state["step"].item() for state in last["optimizer"].values()} == {2 * 4}
    # No norm is fixed and no epoch is frozen: the weights are random at the start.
    assert last["model"]["features.resnet.bn1.num_batches_tracked"] == 2 * 4
    assert best["settings"]["EPOCHS"] == 2 and best["settings"]["WEIGHTS"] == "none"
    assert best["planned_epochs"] == 2 and best["torch"] == str(torch.__version__)
    assert best["device"] == "cpu, torch.float32"
    names = sorted(path.name for path in finished.out.iterdir())
    assert names == [".lock", "bad_files.txt", "class_names.txt", "crops.jpg", "history.csv",
                     "model_best.pth", "model_last.pth"]


def test_validation_sees_the_centres_of_its_paintings(finished, monkeypatch, tmp_path):
    real, seen = tm.evaluate, []

    def evaluate(model, loader, title):
        loader.batch_sampler.epoch = 0
        seen.extend(pixels for pixels, _ in loader)
        return real(model, loader, title)

    monkeypatch.setattr(tm, "evaluate", evaluate)
    assert tm.main([*finished.flags, "--output-dir", str(tmp_path), "--epochs", "1"]) == 0
    copies, centres = copies_in(finished.folder), []
    for path in tm.load_checkpoint(tmp_path / "model_last.pth")["split"]["validation"]:
        with Image.open(copies[path]) as image:
            centres.append(torch.from_numpy(np.array(tm.center_crop(image, 64))))
    assert torch.equal(torch.cat(seen), torch.stack(centres))


@pytest.fixture(scope="module")
def real_paintings(shared, tmp_path_factory):
    """Return a function of an OUTPUT_DIR: flags of both scripts, and those of training alone."""
    folder, cache = shared / "artgan_subset", tmp_path_factory.mktemp("real_cache")
    return lambda out: (
        ["--data-dir", f"{folder}/wikiart", "--cache-dir", str(cache), "--output-dir", str(out)],
        ["--lists-dir", f"{folder}/wikiart_csv", *QUICK])


@pytest.mark.parametrize("attribute,listed,test", [("style", 1187, 483), ("artist", 274, 110),
                                                   ("genre", 794, 328)])
def test_the_real_paintings_are_split(real_paintings, tmp_path, capsys, attribute, listed, test):
    """ArtGAN's test list is the test; a tenth of each class of the other one is validation."""
    places, flags = real_paintings(tmp_path)
    assert tm.main([*places, *flags, "--attribute", attribute, "--epochs", "0"]) == 0
    out = capsys.readouterr().out
    assert "1,670 paintings in" in out
    pattern = r"split: (\S+) train, (\S+) validation, (\S+) test paintings in (\d+) classes"
    train, validation, tested, classes = (
        int(number.replace(",", "")) for number in re.search(pattern, out).groups())
    assert train + validation == listed and tested == test
    assert abs(validation - listed / 10) < classes / 2


def test_the_real_paintings_train_and_test(real_paintings, tmp_path, capsys):
    places, flags = real_paintings(tmp_path)
    assert tm.main([*places, *flags, "--attribute", "artist", "--epochs", "1"]) == 0
    assert test_model.main(places) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nTest accuracy: \d+\.\d\d % \(\d+ of 110 paintings;.*\n$", out)


def test_start_with_all_of_artgan_is_quick_in_memory(tmp_path, monkeypatch):
    """4,000 paintings whose copies are there: nothing is decoded, and little memory is taken."""
    paint_artgan(tmp_path / "few/wikiart", each=10, size=(60, 50))
    for folder in (tmp_path / "few/wikiart").iterdir():
        file, many = min(folder.iterdir()), tmp_path / "all/wikiart" / folder.name
        many.mkdir(parents=True)
        for number in range(800):
            os.link(file, many / f"someone_{number}.jpg")
    jpeg = tm.encode_copy(file, 60)
    few, everything = ([*folders(tmp_path / name), "--epochs", "0"] for name in ("few", "all"))
    with monkeypatch.context() as patch:
        patch.setattr(tm, "encode_copy", lambda *_: jpeg)
        patch.setattr(os, "fsync", lambda _: None)
        assert tm.main(everything) == 0
    code = ("rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            f"assert tm.main({few!r}) == 0\n"
            "import gc; gc.collect(); tm.encode_copy = None\n"
            f"before = rss(); assert tm.main({everything!r}) == 0\n"
            "print(rss() - before)")
    run = subprocess.run([sys.executable, "-c", TINY + code], cwd=ROOT, capture_output=True,
                         text=True)
    assert "resized copies: 0 made, 4,000 were there" in run.stdout, run.stderr
    assert int(run.stdout.split()[-1]) < 15_000
