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
from tests.conftest import QUICK, TINY, folders, small_folder
from tests.paintings import paint, paint_artgan, write_lists

ROOT = Path(__file__).resolve().parent.parent


def test_a_user_edits_constants_and_goes_on(tmp_path, monkeypatch, capsys):
    """EPOCHS edited in the file: 1, then 2, which continues; then the test."""
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
    assert "going on after epoch 1" in second and " 2/2 " in second
    assert " 1/2 " not in second
    with open("history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    names = Path("class_names.txt").read_text().splitlines()
    assert names == sorted(path.name for path in Path("wikiart").iterdir())

    last = run("test_model.py").splitlines()[-1]
    assert re.fullmatch(r"Test accuracy: \d+\.\d\d % \(\d of 5 paintings\)", last)
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert len(rows) == 5 and f"({right} of 5 paintings)" in last


def ends_with(code, flags, main=tm.main):
    """Fail unless the parser of a script ends it with this exit code."""
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == code


def test_every_setting_is_a_flag(capsys):
    for script in (tm, test_model):
        ends_with(0, ["--help"], script.main)
        text = capsys.readouterr().out
        for name in script.SETTINGS:
            assert f"--{name.lower().replace('_', '-')} VALUE" in text
        assert "None" not in text  # every one is explained
    ends_with(0, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training paintings; 0 checks and prepares the data only [20]" in text
    ends_with(2, ["--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


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
    (folder / "no_weights.pth").write_text("text")
    torch.save({"conv1.weight": torch.zeros(4)}, folder / "other_weights.pth")
    return folder


BAD_INPUT = [
    (["--data-dir", "{}/nowhere"], "no picture in a folder of .*nowhere.*ArtGAN.*tests/demo.py"),
    (["--data-dir", "{}/empty"], "no picture in a folder of .*empty"),
    (["--data-dir", "{}/file"], "no picture in a folder of .*file"),
    (["--data-dir", "~nobody_of_this_name/x"], "no picture in a folder of .*~nobody"),
    (["--data-dir", "{}/single"], "needs two classes.* has 1"),
    (["--attribute", "artist"], "needs two classes.* has 0 .*MIN_PAINTINGS"),
    (["--attribute", "genre"], "genre_train.csv.*https://github.com/cs-chan/ArtGAN"),
    (["--attribute", "colour"], "'colour' needs colour_train.csv"),
    (["--attribute", ""], "ATTRIBUTE ''"),
    (["--attribute", "stile"], "stile_train.csv.*; did you mean style\\?$"),
    (["--weights", "imagnet"], "no file .*/imagnet; did you mean imagenet\\?$"),
    (["--lists-dir", "{}/nowhere"], "nowhere must hold style_class.* has nothing"),
    (["--lists-dir", "{}/other_lists"], "2 paintings are listed, and none of them is in"),
    (["--lists-dir", "{}/other_lists", "--attribute", "x"], "must hold x_class.* has style_"),
    (["--lists-dir", "{}/wrong_label"], "label 7"),
    (["--lists-dir", "{}/half_lists"], "must hold style_class, style_val, style_train"),
    (["--lists-dir", "{}/no_rows"], "style_val.csv has no row such as .*its first line is '1;2'"),
    (["--epochs", "-1"], "EPOCHS must be a whole number .* not -1"),
    (["--batch-size", "0"], "BATCH_SIZE must be a whole number from 1 "),
    (["--image-size", "63"], "IMAGE_SIZE must be a whole number from 64 to .* not 63"),
    (["--image-size", "9999"], "IMAGE_SIZE must be a whole number from 64 to .* not 9999"),
    (["--learning-rate", "nan"], "LEARNING_RATE must be a number"),
    (["--learning-rate", "1e999"], "LEARNING_RATE must be a number"),
    (["--group-by", "museum"], "GROUP_BY must be .*painting.* not 'museum'"),
    (["--group-by", "artist", "--attribute", "artist"], "GROUP_BY .*artist"),
    (["--batch-norms", "some"], "BATCH_NORMS must be .*fixed.*trained.* not 'some'"),
    (["--output-dir", "{}/file/out"], "cannot write into .*file/out"),
    (["--small-dir", "{}/file/small"], "cannot write into .*file/small"),
    (["--small-dir", "{}/wikiart/small"], "wikiart/small lies in .*wikiart: .* folders apart"),
    (["--data-dir", "{}/wikiart", "--small-dir", "{}"], "wikiart lies in .* folders apart"),
    (["--output-dir", "{}/wikiart/out"], "wikiart/out lies in .*wikiart: .* folders apart"),
    (["--output-dir", "{}/small"], "lies in .*small: .* folders apart"),
    (["--weights", "{}/nowhere.pth"], "no file .*nowhere.pth"),
    (["--weights", "{}/no_weights.pth"], "no_weights.pth is refused"),
    (["--weights", "{}/other_weights.pth"], "other_weights.pth is refused: .* do not fit"),
]


@pytest.mark.parametrize("flags,message", BAD_INPUT, ids=[" ".join(f) for f, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_writes_nothing(small_artgan, flags, message, capsys):
    before = sorted(small_artgan.rglob("*"))
    flags = [flag.format(small_artgan) for flag in flags]
    assert tm.main([*folders(small_artgan), *QUICK, "--epochs", "1", *flags]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1 and re.match(f"error: .*({message})", lines[0]), captured.err
    assert sorted(small_artgan.rglob("*")) == before


def test_a_class_of_broken_pictures_alone_is_an_error(tmp_path, capsys):
    painted = paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    for path, name in painted.items():
        if name != "Cubism":
            (tmp_path / "wikiart" / path).write_bytes(b"broken")
    assert tm.main([*folders(tmp_path), *QUICK, "--epochs", "1"]) == 1
    assert "error: a classifier needs two classes" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [False, True])
def test_a_failed_download_says_what_to_do(small_artgan, capsys, monkeypatch, tmp_path, damaged):
    """Where there is no network, and where an earlier download was cut short."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if damaged:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/resnet50-11ad3fa6.pth").write_bytes(b"PK\3\4")

    def fail(url, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert tm.main([*folders(small_artgan), "--epochs", "1"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: cannot load https://download.pytorch.org/models/resnet50-11ad")
    assert damaged or "(no network)" in error
    assert f"into {tmp_path}/checkpoints, or go without by --weights none" in error
    assert "\n" not in error and "weights_only" not in error
    assert not (small_artgan / "small").exists()


def test_constants_of_a_wrong_type_are_errors(capsys, monkeypatch):
    for name, value in (("EPOCHS", "20"), ("EPOCHS", 2.0), ("EPOCHS", True), ("DATA_DIR", 3)):
        with monkeypatch.context() as patch:
            patch.setitem(tm.SETTINGS, name, value)
            assert tm.main([]) == 1
        assert f"error: {name} must be" in capsys.readouterr().err


def test_testing_before_training(tmp_path, capsys):
    assert test_model.main(["--output-dir", str(tmp_path)]) == 1
    message = "error: there is no .*model_best.pth: run train_model.py"
    assert re.match(message, capsys.readouterr().err)


def test_testing_on_other_paintings(finished, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "wikiart/Cubism").mkdir(parents=True)
    paint("Cubism", 1).save(tmp_path / "wikiart/Cubism/another.jpg")
    places = folders(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert test_model.main([*places[:2], *places[4:]]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("error: none of the 5 test paintings is in .*", error)
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


@pytest.mark.parametrize("norms", ["fixed", "trained"])
def test_the_first_epoch_leaves_pretrained_weights_alone(tmp_path, norms):
    """Frozen in epoch 1, trained in epoch 2; and the file is not needed to go on."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(80, 64))
    torch.manual_seed(9)
    state = tm.resnet50().state_dict()
    torch.save(state, tmp_path / "resnet.pth")
    flags = [*folders(tmp_path), *QUICK, "--weights", str(tmp_path / "resnet.pth")]
    flags += ["--batch-norms", norms]
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
        same = torch.equal(moved["features.resnet." + name], state[name])
        assert same == (norms == "fixed")


def test_the_learning_rate_warms_up_twice_and_ends_at_zero():
    rates = [tm.rate_at(step / 100, 10, 1, 0.5) for step in range(1000)]
    assert rates[0] == 0 and rates[100] == 0  # at the start, and where the ResNet thaws
    assert rates[25] < rates[50] > rates[99] * 0.9 and rates[125] < rates[150]
    assert all(a > b for a, b in zip(rates[150:], rates[151:])) and rates[-1] < 1e-4
    assert [tm.rate_at(step / 10, 2, 0, 0) for step in range(20)] == sorted(
        (tm.rate_at(step / 10, 2, 0, 0) for step in range(20)), reverse=True)


def test_the_resnet_learns_slower_and_norms_do_not_decay():
    groups = tm.make_optimizer(tm.ArtClassifier(3), 1e-3, 0.1, 0.05).param_groups
    table = sorted((group["peak"], group["weight_decay"], len(group["params"])) for group in groups)
    assert [row[:2] for row in table] == [(1e-4, 0.0), (1e-4, 0.05), (1e-3, 0.0), (1e-3, 0.05)]
    assert sum(row[2] for row in table) == len(list(tm.ArtClassifier(3).parameters()))


@pytest.fixture(scope="module")
def open_paintings(finished):
    """Return a function of a seed that opens twelve of the finished run's paintings."""
    labels = {path: label for label, path in enumerate(sorted(finished.painted)[:12])}
    return lambda seed: tm.Paintings(small_folder(finished.folder), labels, 64, seed)


def passes(open_paintings, workers):
    """Return what two epochs and an evaluation load, with so many workers."""
    learning, judging = (tm.make_loader(open_paintings(seed), 5, workers, torch.device("cpu"))
                         for seed in (4, None))
    seen = []
    for epoch in (1, 2):
        learning.batch_sampler.epoch = epoch
        seen += [(pixels.clone(), labels.clone()) for pixels, labels in learning]
    return seen + [(pixels.clone(), labels.clone()) for pixels, labels in judging]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loading_does_not_depend_on_the_workers(open_paintings):
    alone = passes(open_paintings, 0)
    assert [len(labels) for _, labels in alone] == [4] * 9
    first, second, third = (torch.cat([labels for _, labels in alone[n : n + 3]]).tolist()
                            for n in (0, 3, 6))
    assert sorted(first) == sorted(second) == third == list(range(12))
    assert first != second and first != third
    for workers in (1, 3):
        for (pixels, labels), (others, names) in zip(alone, passes(open_paintings, workers)):
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
    labels = dict.fromkeys(names, 0)
    varied, central = (tm.Paintings(tmp_path, labels, 64, seed) for seed in (4, None))
    assert not torch.equal(varied[0, 1][0], varied[1, 1][0])
    assert torch.equal(central[0, 1][0], central[1, 2][0])


def test_evaluation_sees_the_centre():
    image = np.zeros((320, 640, 3), np.uint8)
    image[20:300, 180:460] = 255
    image[30:290, 190:450] = 128
    centred = np.asarray(tm.square(Image.fromarray(image), 224))
    assert centred.shape == (224, 224, 3) and (centred[12:-12, 12:-12] == 128).all()
    for turned in map(np.rot90, [centred] * 4, range(4)):
        assert (turned[1:6, 1:-1] == 255).all()


@pytest.mark.parametrize("turned", [False, True])
def test_other_views_are_at_the_ends_of_the_long_side(turned):
    """A ramp along it: the mean of a square of 280 pixels tells where it is in the 640."""
    ramp = np.tile(np.linspace(0, 255, 640)[None, :, None], (320, 1, 3)).astype(np.uint8)
    image = Image.fromarray(ramp.swapaxes(0, 1) if turned else ramp)
    means = [np.asarray(tm.square(image, 224, place)).mean() for place in (0, 0.5, 1)]
    assert means == pytest.approx([255 * middle / 640 for middle in (180, 320, 460)], abs=1)


def test_crops_differ_in_size_and_side(tmp_path):
    """A ramp from black to white: its range tells the width of a crop, its slope the flip."""
    ramp = np.tile(np.arange(320)[None, :, None] // 2, (320, 1, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.jpg", quality=95)
    paintings = tm.Paintings(tmp_path, {"x.jpg": 0}, 64, seed=0)
    crops = [paintings[0, epoch][0].float().mean((0, 2)) for epoch in range(1, 80)]
    slopes = torch.stack([crop[-8:].mean() - crop[:8].mean() for crop in crops])
    assert 20 < (slopes > 0).sum() < 59
    assert slopes.abs().min() < 90 and slopes.abs().max() > 115


def test_a_pass_trains_as_a_plain_loop_does():
    """Rates, clipping, steps and the mean loss, over batches of 4, 3 and 3 pictures."""
    torch.manual_seed(3)
    model, shares = tm.ArtClassifier(3), [0.5, 1.0, 0.3]
    plain = copy.deepcopy(model)
    pixels = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    loader = DataLoader({(place, 0): (pixels[place], labels[place]) for place in range(10)},
                        batch_sampler=tm.Batches(10, 4))
    optimizer = tm.make_optimizer(model, 1e-3, 0.1, 0.05)
    model.start_training(frozen=False)
    scaler = torch.amp.GradScaler(enabled=False)
    loss, compared = tm.train_epoch(model, loader, optimizer, scaler, shares, "")

    optimizer, total, norms = tm.make_optimizer(plain, 1e-3, 0.1, 0.05), 0, []
    for part, share in zip(([0, 1, 2, 3], [4, 5, 6], [7, 8, 9]), shares):
        logits = plain(pixels[part].permute(0, 3, 1, 2))
        value = nn.functional.cross_entropy(logits, labels[part])
        for place, row in zip(part, logits.detach()):
            given, others = row[labels[place]].item(), row.clone()
            others[labels[place]] = -100
            assert compared[place].tolist() == pytest.approx(
                [others.max().item() - given, row.softmax(0)[labels[place]].item(),
                 others.argmax().item()], abs=1e-4)
        total += value.item() * len(part)
        optimizer.zero_grad()
        value.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
    assert max(norms) > 1.5  # so that clipping matters
    assert loss == pytest.approx(total / 10, rel=1e-5)
    trained = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("frozen,epochs,counted", [(0, 2, [1]), (0, 8, [1, 2]), (1, 5, [2]),
                                                   (1, 8, [2]), (1, 1, [1])])
def test_margins_are_those_of_the_early_epochs(finished, tmp_path, monkeypatch, frozen, epochs,
                                               counted):
    """The sums over the first quarter, after the frozen epoch; of validation, the best epoch's."""
    passes, logits, weights = [], [], tmp_path / "resnet.pth"
    torch.save(tm.resnet50().state_dict(), weights)
    train_epoch, evaluate = tm.train_epoch, tm.evaluate

    def train_and_note(*given):
        loss, compared = train_epoch(*given)
        passes.append(compared)
        return loss, compared

    def evaluate_and_note(*given):
        logits.append(evaluate(*given))
        return logits[-1]

    monkeypatch.setattr(tm, "train_epoch", train_and_note)
    monkeypatch.setattr(tm, "evaluate", evaluate_and_note)
    flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", str(epochs)]
    assert tm.main([*flags, "--weights", str(weights), "--frozen-epochs", str(frozen)]) == 0
    last = tm.load_checkpoint(tmp_path / "model_last.pth")
    sums = last["margins"]["train"]
    assert sums.shape == (30, 4) and (sums[:, 3] == len(counted)).all()
    assert torch.allclose(sums[:, :2], sum(passes[epoch - 1][:, :2] for epoch in counted))
    assert torch.equal(sums[:, 2], passes[counted[-1] - 1][:, 2])
    best = tm.best_epoch(last["history"])
    labels = torch.tensor(list(last["split"]["validation"].values()))
    expected = tm.compare(logits[best - 1], labels)
    assert torch.allclose(last["margins"]["validation"][:, :3], expected)


def test_every_painting_trains_once_in_every_epoch():
    for count in (1, 63, 64, 65, 129):
        batches, orders = tm.Batches(count, 64, seed=0), []
        for batches.epoch in (1, 2):
            keys = [key for batch in batches for key in batch]
            assert sorted(keys) == [(index, batches.epoch) for index in range(count)]
            sizes = [len(batch) for batch in batches]
            assert sizes == batches.sizes and len(sizes) == len(batches)
            assert max(sizes) <= 64 and max(sizes) - min(sizes) <= 1
            orders.append([index for index, _ in keys])
        assert count == 1 or orders[0] != orders[1]
    orders = [[index for batch in tm.Batches(64, 64, seed) for index, _ in batch]
              for seed in (0, 1, None)]
    assert orders[0] != orders[1] and orders[2] == list(range(64))


def test_the_run_saves_what_it_says(finished):
    last = tm.load_checkpoint(finished.out / "model_last.pth")
    best = tm.load_checkpoint(finished.out / "model_best.pth")
    keys = {"format", "settings", "class_names", "split", "split_source", "versions", "history",
            "margins", "device", "model"}
    assert best.keys() == keys and last.keys() == keys | {"optimizer", "scaler"}
    assert [len(last["split"][part]) for part in tm.PARTS] == [30, 5, 5]
    assert best["split"] == last["split"] and best["split_source"] == "drawn by painting"
    assert best["class_names"] == sorted(set(finished.painted.values()))
    for labels in best["split"].values():
        for path, label in labels.items():
            assert finished.painted[path] == best["class_names"][label]
    accuracies = [row["validation_accuracy"] for row in last["history"]]
    assert [row["epoch"] for row in last["history"]] == [1, 2]
    assert best["history"] == last["history"][: 1 + accuracies.index(max(accuracies))]
    rates = [1e-3 * tm.rate_at(epoch + 3.5 / 4, 2, 0, 0.5) for epoch in range(2)]  # 4th step of 4
    assert [row["learning_rate"] for row in last["history"]] == pytest.approx(rates)
    peaks = {group["peak"] for group in last["optimizer"]["param_groups"]}
    assert peaks == {1e-3}  # and no epoch is frozen: the weights are random at the start
    assert last["model"]["features.resnet.bn1.num_batches_tracked"] == 2 * 4
    assert best["settings"]["EPOCHS"] == 2 and best["settings"]["WEIGHTS"] == "none"
    assert best["versions"].keys() == {"torch", "torchvision", "Python"}
    names = sorted(path.name for path in finished.out.glob("[!.]*"))
    assert names == ["bad_files.txt", "class_names.txt", "crops.jpg", "history.csv",
                     "model_best.pth", "model_last.pth"]


def test_validation_sees_the_centres_of_its_paintings(finished, monkeypatch, tmp_path):
    real, seen = tm.evaluate, []

    def evaluate(model, loader, title):
        seen.extend(pixels for pixels, _ in loader)
        return real(model, loader, title)

    monkeypatch.setattr(tm, "evaluate", evaluate)
    assert tm.main([*finished.flags, "--output-dir", str(tmp_path), "--epochs", "1"]) == 0
    small, centres = small_folder(finished.folder), []
    for path in tm.load_checkpoint(tmp_path / "model_last.pth")["split"]["validation"]:
        with Image.open(small / path) as image:
            centres.append(torch.from_numpy(np.array(tm.square(image, 64))))
    assert torch.equal(torch.cat(seen), torch.stack(centres))


@pytest.fixture(scope="module")
def real_paintings(shared, tmp_path_factory):
    """Return a function of an OUTPUT_DIR: flags of both scripts, and those of training alone."""
    folder, small = shared / "artgan_subset", tmp_path_factory.mktemp("real_small")
    return lambda out: (
        ["--data-dir", f"{folder}/wikiart", "--small-dir", str(small), "--output-dir", str(out)],
        ["--lists-dir", f"{folder}/wikiart_csv", *QUICK])


@pytest.mark.parametrize("attribute,sizes", [("style", "1,063 train, 124 validation, 483 test"),
                                             ("artist", "241 train, 33 validation, 110 test"),
                                             ("genre", "714 train, 80 validation, 328 test")])
def test_the_real_paintings_are_split(real_paintings, tmp_path, capsys, attribute, sizes):
    places, flags = real_paintings(tmp_path)
    assert tm.main([*places, *flags, "--attribute", attribute, "--epochs", "0"]) == 0
    out = capsys.readouterr().out
    assert "1,670 paintings in" in out and f"split: {sizes} paintings" in out


def test_the_real_paintings_train_and_test(real_paintings, tmp_path, capsys):
    places, flags = real_paintings(tmp_path)
    assert tm.main([*places, *flags, "--attribute", "artist", "--epochs", "1"]) == 0
    assert test_model.main(places) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nTest accuracy: \d+\.\d\d % \(\d+ of 110 paintings\)\n$", out)


def test_start_with_all_of_artgan_is_quick_in_memory(tmp_path):
    """4,000 paintings whose copies are ready: nothing is decoded, and little memory is taken."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 0
    for folder in (tmp_path / "wikiart", small_folder(tmp_path)):
        for style in folder.glob("[A-Z]*"):
            source = min(style.iterdir())
            for number in range(800):
                os.link(source, style / f"someone_{number}.jpg")
    code = ("rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            f"before = rss(); tm.main({[*folders(tmp_path), '--epochs', '0']!r})\n"
            "print(rss() - before)")
    run = subprocess.run([sys.executable, "-c", TINY + code], cwd=ROOT, capture_output=True,
                         text=True)
    assert "small copies: 0 written, 4,020 were there already" in run.stdout, run.stderr
    assert int(run.stdout.split()[-1]) < 40_000
