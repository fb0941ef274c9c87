"""Training, as a user runs it: constants edited in a copy of the file, flags, bad input."""

import copy
import csv
import functools
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.models import resnet50

import test_model
import train_model as tm
from tests.conftest import QUICK, folders
from tests.paintings import paint_artgan, write_lists

ROOT = Path(__file__).resolve().parent.parent


def python(script, *flags, cwd=ROOT):
    """Run a script as a user does; return the finished process."""
    return subprocess.run([sys.executable, script, *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=300)


def test_a_user_edits_constants_and_goes_on(tmp_path):
    """EPOCHS edited in the file: 1, then 2, which continues; then the test."""
    paint_artgan(tmp_path / "wikiart", each=6, size=(100, 80))
    for name in ("train_model.py", "test_model.py"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "train_model.py"

    def edit(**constants):
        text = script.read_text()
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value!r}", text)
            assert count == 1
        script.write_text(text)

    edit(EPOCHS=1, WEIGHTS="none", IMAGE_SIZE=64, BATCH_SIZE=8, WORKERS=2)
    first = python(script, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "split: 20 train, 5 validation, 5 test paintings in 5 classes" in first.stdout
    assert "epoch 1/1: training loss" in first.stdout
    edit(EPOCHS=2)
    second = python(script, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "going on after epoch 1" in second.stdout and "epoch 2/2: training" in second.stdout
    assert "epoch 1/2: training" not in second.stdout
    with open(tmp_path / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    names = (tmp_path / "class_names.txt").read_text().splitlines()
    assert names == sorted(path.name for path in (tmp_path / "wikiart").iterdir())

    third = python(tmp_path / "test_model.py", cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    last = third.stdout.splitlines()[-1]
    assert re.fullmatch(r"Test accuracy: \d+\.\d\d % \(\d of 5 paintings\)", last)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert len(rows) == 5 and f"({right} of 5 paintings)" in last


def test_every_setting_is_a_flag(capsys):
    run = python(ROOT / "train_model.py", "--help")
    assert run.returncode == 0
    for name in tm.SETTINGS:
        assert f"--{name.lower().replace('_', '-')} VALUE" in run.stdout
    text = " ".join(run.stdout.split())
    assert "passes over the training paintings; 0 checks and prepares the data only [20]" in text
    with pytest.raises(SystemExit, match="2"):
        tm.main(["--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_model, test_model"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


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
    return folder


BAD_INPUT = [
    (["--data-dir", "{}/nowhere"], "no folder .*nowhere.*ArtGAN.*tests/demo.py"),
    (["--data-dir", "{}/empty"], "no picture in its folders"),
    (["--data-dir", "{}/single"], "needs two classes .* has 1"),
    (["--attribute", "artist"], "needs two classes .* has 0"),
    (["--attribute", "genre"], "genre_train.csv.*https://github.com/cs-chan/ArtGAN"),
    (["--attribute", "colour"], "'colour' needs colour_train.csv"),
    (["--lists-dir", "{}/other_lists"], "none of them is on disk"),
    (["--lists-dir", "{}/wrong_label"], "label 7"),
    (["--lists-dir", "{}/half_lists"], "must hold each of style_class, style_val, style_train"),
    (["--epochs", "-1"], "EPOCHS must be a whole number .* not -1"),
    (["--epochs", "many"], "EPOCHS must be a whole number .* not 'many'"),
    (["--epochs", "1.5"], "EPOCHS must be a whole number .* not 1.5"),
    (["--batch-size", "0"], "BATCH_SIZE must be a whole number from 1 "),
    (["--image-size", "281"], "IMAGE_SIZE .* to 280"),
    (["--learning-rate", "nan"], "LEARNING_RATE must be a number"),
    (["--learning-rate", "1e999"], "LEARNING_RATE must be a number"),
    (["--group-by", "museum"], "GROUP_BY must be painting or artist, not 'museum'"),
    (["--group-by", "artist", "--attribute", "artist", "--min-paintings", "2"], "artists apart"),
    (["--output-dir", "{}/file/out"], "cannot write into .*file/out"),
    (["--small-dir", "{}/file/small"], "cannot write into .*file/small"),
    (["--small-dir", "{}/wikiart/small"], "neither inside the other"),
    (["--data-dir", "{}/wikiart", "--small-dir", "{}"], "neither inside the other"),
    (["--weights", "{}/nowhere.pth"], "no file .*nowhere.pth"),
    (["--weights", "{}/no_weights.pth"], "refused"),
    (["--attribute", ""], "ATTRIBUTE must be text"),
    (["--data-dir", "~nobody_of_this_name/x"], "no folder ~nobody_of_this_name/x"),
    (["--output-dir", "{}/wikiart/out"], "OUTPUT_DIR .* must be outside"),
    (["--output-dir", "{}/small"], "OUTPUT_DIR .* must be outside"),
    (["--lists-dir", "{}/no_rows"], "style_val.csv has no row such as .*its first line is '1;2'"),
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
    assert "error: a classifier needs two classes " in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(small_artgan, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(url, *_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert tm.main([*folders(small_artgan), "--epochs", "1"]) == 1
    error = capsys.readouterr().err
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in error
    assert f"{tmp_path}/checkpoints/resnet50-11ad3fa6.pth" in error and "--weights none" in error
    assert not (small_artgan / "small").exists()


def test_constants_of_a_wrong_type_are_errors(small_artgan, capsys, monkeypatch):
    for name, value in (("EPOCHS", "20"), ("EPOCHS", 2.0), ("EPOCHS", True), ("DATA_DIR", 3)):
        monkeypatch.setitem(tm.SETTINGS, name, value)
        assert tm.main([]) == 1
        assert f"{name} must be" in capsys.readouterr().err
        monkeypatch.undo()


def test_testing_before_training(tmp_path, capsys):
    assert test_model.main(["--output-dir", str(tmp_path)]) == 1
    message = "error: there is no .*model_best.pth: run train_model.py"
    assert re.match(message, capsys.readouterr().err)


def test_testing_on_other_paintings(finished, small_artgan, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "out")
    flags = ["--data-dir", f"{small_artgan}/wikiart", "--small-dir", f"{tmp_path}/small"]
    before = sorted(tmp_path.rglob("*"))
    assert test_model.main([*flags, "--output-dir", f"{tmp_path}/out"]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("error: none of the 5 test paintings is in .*", error)
    assert before == sorted(tmp_path.rglob("*"))


# ----------------------------------------------------------------------------------------- training


def test_the_first_epoch_leaves_pretrained_weights_alone(tmp_path, capsys):
    """Weights of a ResNet-50 as torchvision has them: frozen in epoch 1, trained in epoch 2."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(80, 64))
    torch.manual_seed(9)
    state = resnet50().state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    flags = [*folders(tmp_path), *QUICK, "--weights", str(tmp_path / "resnet50.pth")]
    assert tm.main([*flags, "--epochs", "1"]) == 0
    kept = tm.load_checkpoint(tmp_path / "out/model_last.pth")["model"]
    for name, value in state.items():
        if not name.startswith("fc."):
            assert torch.equal(kept["features.resnet." + name], value), name
    assert tm.main([*flags, "--epochs", "2"]) == 0
    moved = tm.load_checkpoint(tmp_path / "out/model_last.pth")["model"]
    assert not torch.equal(moved["features.resnet.conv1.weight"], state["conv1.weight"])
    assert not torch.equal(moved["features.resnet.bn1.running_mean"], state["bn1.running_mean"])


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
def loaded(finished):
    paths = sorted(finished.painted)[:12]
    return tm.Paintings(finished.folder / "small", paths, list(range(12)), 64, seed=4)


def passes(paintings, workers):
    """Return what two epochs and an evaluation load, with so many workers."""
    batches, seen = tm.Batches(5, seed=4), []
    loader = tm.make_loader(paintings, batches, workers, torch.device("cpu"))
    for epoch in (1, 2):
        batches.shuffle(range(12), epoch)
        seen += [(pixels.clone(), labels.clone()) for pixels, labels in loader]
    batches.keep_order(range(12))
    return seen + [(pixels.clone(), labels.clone()) for pixels, labels in loader]


def test_loading_does_not_depend_on_the_workers(loaded):
    alone = passes(loaded, 0)
    assert [len(labels) for _, labels in alone] == [4] * 9
    first, second, third = (torch.cat([labels for _, labels in alone[n : n + 3]]).tolist()
                            for n in (0, 3, 6))
    assert sorted(first) == sorted(second) == third == list(range(12))
    assert first != second and first != third
    for workers in (1, 3):
        for (pixels, labels), (others, names) in zip(alone, passes(loaded, workers)):
            assert torch.equal(pixels, others) and torch.equal(labels, names)


def test_crops_vary_with_the_epoch_and_not_with_the_rest(loaded):
    state = torch.get_rng_state()
    assert torch.equal(loaded[3, 1][0], loaded[3, 1][0])
    assert not torch.equal(loaded[3, 1][0], loaded[3, 2][0])
    other_seed = tm.Paintings(loaded.small_dir, list(map(os.fsdecode, loaded.paths)), range(12), 64)
    assert not torch.equal(loaded[3, 1][0], other_seed[3, 1][0])
    shutil.copy(*(Path(loaded.small_dir, path) for path in (os.fsdecode(loaded.paths[3]), "x.jpg")))
    twin = tm.Paintings(loaded.small_dir, ["x.jpg"], [0], 64, seed=4)
    assert torch.equal(loaded[3, 0][0], twin[0, 0][0])
    assert not torch.equal(loaded[3, 1][0], twin[0, 1][0])
    assert torch.equal(loaded[3, 0][0], loaded[3, 0][0])
    assert loaded[3, 1][0].shape == (64, 64, 3) and loaded[3, 1][0].dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_sees_the_centre():
    image = np.zeros((320, 640, 3), np.uint8)
    image[20:300, 180:460] = 255
    image[30:290, 190:450] = 128
    centred = np.asarray(tm.centre(tm.Image.fromarray(image), 224))
    assert centred.shape == (224, 224, 3) and (centred[12:-12, 12:-12] == 128).all()
    for turned in map(np.rot90, [centred] * 4, range(4)):
        assert (turned[1:6, 1:-1] == 255).all()


def test_crops_differ_in_size_and_side(tmp_path):
    """A ramp from black to white: its range tells the width of a crop, its slope the flip."""
    ramp = np.tile(np.arange(320)[None, :, None] // 2, (320, 1, 3)).astype(np.uint8)
    tm.Image.fromarray(ramp).save(tmp_path / "x.jpg", quality=95)
    paintings = tm.Paintings(tmp_path, ["x.jpg"], [0], 64)
    crops = [paintings[0, epoch][0].float().mean((0, 2)) for epoch in range(1, 80)]
    slopes = torch.stack([crop[-8:].mean() - crop[:8].mean() for crop in crops])
    assert 20 < (slopes > 0).sum() < 59
    assert slopes.abs().min() < 90 and slopes.abs().max() > 115


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, which on a GPU waits for all that is queued.

    aten's own reads are seen as operators, those of Python (all at once, or moved) by their names.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "cpu", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def read(tensor, *given):
            self.count += 1
            return method(tensor, *given)
        return read

    def __torch_dispatch__(self, operator, types, given=(), options=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*given, **(options or {}))


def test_steps_do_not_wait_for_the_device(monkeypatch):
    """Losses are read every READ_EVERY batches, and logits once a pass, never for each batch."""
    torch.manual_seed(5)
    model, batches = tm.ArtClassifier(3), tm.Batches(2)
    optimizer = tm.make_optimizer(model, 1e-4, 0.1, 0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8), torch.tensor([0, 2])
    loader = DataLoader(defaultdict(int), batch_sampler=batches, collate_fn=lambda _: batch)
    monkeypatch.setattr(tm, "READ_EVERY", 4)

    def reads(work, steps):
        batches.keep_order(range(2 * steps))
        with monkeypatch.context() as patch, Reads(patch) as counter:
            work([0.1] * steps)
        return counter.count

    train = functools.partial(tm.train_epoch, model, loader, optimizer, scaler, title="")
    assert reads(train, 12) - reads(train, 4) == 2
    assert reads(lambda _: [loss.item() for loss in torch.zeros(9)], 1) == 9  # it does count
    evaluate = functools.partial(tm.evaluate, tm.fold_norms(model), loader)
    assert reads(lambda _: evaluate(""), 9) == reads(lambda _: evaluate(""), 3) > 0


def test_a_pass_trains_as_a_plain_loop_does():
    """Rates, clipping, steps and the mean loss, over batches of 3, 3 and 4 pictures."""
    torch.manual_seed(3)
    model, batches, shares = tm.ArtClassifier(3), tm.Batches(4), [0.5, 1.0, 0.3]
    plain = copy.deepcopy(model)
    pixels = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    batches.keep_order(range(10))
    loader = DataLoader({(place, 0): (pixels[place], labels[place]) for place in range(10)},
                        batch_sampler=batches)
    optimizer = tm.make_optimizer(model, 1e-3, 0.1, 0.05)
    loss = tm.train_epoch(model, loader, optimizer, torch.amp.GradScaler(enabled=False), shares, "")

    optimizer, total, norms = tm.make_optimizer(plain, 1e-3, 0.1, 0.05), 0, []
    for part, share in zip(([0, 1, 2], [3, 4, 5], [6, 7, 8, 9]), shares):
        value = nn.functional.cross_entropy(plain(pixels[part].permute(0, 3, 1, 2)), labels[part])
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


def test_every_painting_trains_once_in_every_epoch():
    batches, other = tm.Batches(64), tm.Batches(64, seed=1)
    batches.shuffle(range(64), 1)
    other.shuffle(range(64), 1)
    assert batches != other
    for count in (1, 63, 64, 65, 129):
        batches.shuffle(range(count), 1)
        assert sorted(index for batch in batches for index, _ in batch) == list(range(count))
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_the_run_saves_what_it_says(finished):
    last = tm.load_checkpoint(finished.out / "model_last.pth")
    best = tm.load_checkpoint(finished.out / "model_best.pth")
    assert [len(last["split"][part]) for part in tm.PARTS] == [30, 5, 5]
    assert best["test"] == last["split"]["test"]
    assert best["class_names"] == sorted(set(finished.painted.values()))
    accuracies = [row["validation_accuracy"] for row in last["history"]]
    rates = [1e-3 * tm.rate_at(epoch + 3.5 / 4, 2, 0, 0.5) for epoch in range(2)]  # 4th step of 4
    assert [row["learning_rate"] for row in last["history"]] == pytest.approx(rates)
    peaks = {group["peak"] for group in last["optimizer"]["param_groups"]}
    assert peaks == {1e-3}  # and no epoch is frozen: the weights are random at the start
    assert last["model"]["features.resnet.bn1.num_batches_tracked"] == 2 * 4
    assert best["settings"]["EPOCHS"] == 2 and best["split_from"] == "drawn by painting"
    assert best["validation_accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert {"attribute"} <= {name.lower() for name in best["settings"]}
    for path, label in best["test"].items():
        assert finished.painted[path] == best["class_names"][label]
    names = sorted(path.name for path in finished.out.iterdir())
    assert names == ["bad_files.txt", "class_names.txt", "history.csv", "model_best.pth",
                     "model_last.pth"]


def test_validation_sees_the_centres(finished, monkeypatch, tmp_path):
    """Epoch 0 of `Paintings` is the centre; and these are the five paintings kept for it."""
    real, seen = tm.evaluate, []

    def evaluate(model, loader, title):
        seen.extend(key for batch in loader.batch_sampler for key in batch)
        return real(model, loader, title)

    monkeypatch.setattr(tm, "evaluate", evaluate)
    assert tm.main([*finished.flags, "--output-dir", str(tmp_path), "--epochs", "1"]) == 0
    assert seen == [(index, 0) for index in range(30, 35)]


def test_settings_of_a_run_must_stay(finished):
    """All but EPOCHS, WORKERS and the folders."""
    names = set(tm.SETTINGS) - set(tm.CHANGEABLE)
    assert len(names) == len(tm.SETTINGS) - 6
    class_names = tm.load_checkpoint(finished.out / "model_last.pth")["class_names"]
    options = tm.make_parser("", tm.SETTINGS, tm.__file__).parse_args([*finished.flags])
    same = {name.lower(): value for name, value in tm.SETTINGS.items()} | vars(options)
    same |= {"fresh": False, "epochs": 9, "output_dir": finished.out}
    assert tm.find_earlier_run(SimpleNamespace(**same), class_names)
    for name in names:
        other = SimpleNamespace(**same | {name.lower(): "another"})
        with pytest.raises(ValueError, match=rf"another run \({name}: then .*, now another\)"):
            tm.find_earlier_run(other, class_names)


def test_files_of_weights_of_old_form_are_read(tmp_path):
    """Before 2020 they were no archives; and before batch norms counted, they had no counts."""
    state = resnet50().state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = tm.ArtClassifier(2)
    tm.load_resnet(model, str(tmp_path / "old.pth"))
    for name, value in model.features.resnet.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("attribute,sizes", [("style", "1,063 train, 124 validation, 483 test"),
                                             ("artist", "241 train, 33 validation, 110 test"),
                                             ("genre", "714 train, 80 validation, 328 test")])
def test_the_real_paintings_are_split(shared, tmp_path, capsys, attribute, sizes):
    real = shared / "artgan_subset"
    flags = ["--data-dir", f"{real}/wikiart", "--lists-dir", f"{real}/wikiart_csv",
             "--output-dir", str(tmp_path), "--small-dir", str(shared_small(tmp_path))]
    assert tm.main([*flags, "--attribute", attribute, "--epochs", "0"]) == 0
    out = capsys.readouterr().out
    assert "1,670 paintings in" in out and f"split: {sizes} paintings" in out


def shared_small(tmp_path):
    """Return a folder of small copies that all tests of the real paintings use."""
    return tmp_path.parent / "real_small"


def test_the_real_paintings_train_and_test(shared, tmp_path):
    real = shared / "artgan_subset"
    places = ["--data-dir", f"{real}/wikiart", "--output-dir", str(tmp_path),
              "--small-dir", str(shared_small(tmp_path))]
    quick = ["--weights", "none", "--image-size", "64", "--epochs", "1", "--attribute", "artist"]
    run = python(ROOT / "train_model.py", *places, "--lists-dir", f"{real}/wikiart_csv", *quick)
    assert run.returncode == 0, run.stderr
    assert "test paintings with the file name" not in run.stdout
    run = python(ROOT / "test_model.py", *places)
    assert run.returncode == 0, run.stderr
    assert re.search(r"\nTest accuracy: \d+\.\d\d % \(\d+ of 110 paintings\)\n$", run.stdout)


@pytest.mark.skipif(os.cpu_count() < 2, reason="workers need a second processor")
def test_start_with_all_of_artgan_is_quick_in_memory(tmp_path):
    """4,000 paintings whose copies are ready: nothing is decoded, and little memory is taken."""
    paint_artgan(tmp_path / "wikiart", each=4, size=(60, 50))
    assert tm.main([*folders(tmp_path), "--epochs", "0"]) == 0
    for folder in ("wikiart", "small"):
        for style in (tmp_path / folder).glob("[A-Z]*"):
            source = next(style.iterdir())
            for number in range(800):
                os.link(source, style / f"someone_{number}.jpg")
    code = ("import train_model as tm\n"
            "rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
            f"before = rss(); tm.main({[*folders(tmp_path), '--epochs', '0']!r})\n"
            "print(rss() - before)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "small copies: 0 written, 4,020 were there already" in run.stdout, run.stderr
    assert int(run.stdout.split()[-1]) < 40_000
