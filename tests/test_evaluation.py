"""Testing: scores against scikit-learn, predictions, mislabelled paintings, your pictures."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shutil
import time
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from bs4 import BeautifulSoup
from PIL import Image
from scipy.stats import rankdata

import test_model
import train_model as tm
from tests.conftest import QUICK, copies_in, folders, folders_to_test
from tests.paintings import paint_artgan, write_lists


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def examine(finished, out, *more):
    """Test a copy of a finished run in `out`; return its flags, printed lines and tables."""
    out.mkdir(exist_ok=True)
    shutil.copy(finished.out / "model_best.pth", out)
    flags = [*folders_to_test(finished.folder), "--output-dir", str(out), "--workers", "0"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert test_model.main([*flags, *more]) == 0
    tables = {name: read(out / f"{name}.csv") for name in ("predictions", "outliers")
              if (out / f"{name}.csv").exists()}
    return SimpleNamespace(out=out, flags=flags, lines=printed.getvalue().splitlines(), **tables)


@pytest.fixture(scope="module")
def tested(finished, tmp_path_factory):
    """Return the finished run as it is tested, by `examine`."""
    return examine(finished, tmp_path_factory.mktemp("tested"))


# ------------------------------------------------------------------------------------------ scores


def cases():
    """Yield (name, logits, labels): random ones and degenerate ones."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (300,), generator=random)
    logits = 2 * torch.randn(300, 9, generator=random)
    logits[range(300), labels] += 1.5
    yield "random", logits, labels
    yield "two classes", logits[:, :2], labels % 2
    yield "a class absent from the list", logits, labels.clamp(max=6)
    yield "one painting", logits[:1], labels[:1]
    sure = 20 * torch.nn.functional.one_hot(labels, 9) + logits / 100
    yield "all right", sure, labels
    yield "all wrong", sure, (labels + 1) % 9
    yield "one class alone", logits[:40], torch.full((40,), 3)
    never = torch.cat([sure, torch.full((300, 1), -99.0)], 1)
    yield "a class that nothing names", never, labels


@pytest.mark.parametrize("logits,labels", [case[1:] for case in cases()],
                         ids=[case[0] for case in cases()])
def test_scores_are_those_of_scikit_learn(logits, labels):
    scores, predicted = test_model.score(logits, labels), logits.argmax(1).numpy()
    classes, truth = range(logits.shape[1]), labels.numpy()
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert (scores["right"], scores["paintings"]) == ((truth == predicted).sum(), len(truth))
    assert scores["macro_f1"] == pytest.approx(
        sk.f1_score(truth, predicted, average="macro", zero_division=0))
    expected = sk.precision_recall_fscore_support(truth, predicted, labels=list(classes),
                                                  zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "count"), expected):
        assert scores[name] == pytest.approx(values), name
    assert (scores["confusion"] == sk.confusion_matrix(truth, predicted, labels=classes)).all()
    if len(classes) > 5:
        assert scores["top5"] == pytest.approx(
            sk.top_k_accuracy_score(truth, logits.numpy(), k=5, labels=list(classes)))
    low, high = scores["interval"]
    assert 0 <= low <= scores["accuracy"] <= high <= 1


def test_the_interval_is_wilsons():
    assert test_model.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert test_model.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert test_model.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_the_baselines_were_counted():
    split = {"train": {"A/x_1.jpg": 0, "A/x_2.jpg": 0, "B/x_3.jpg": 1, "B/y_1.jpg": 1},
             "validation": {"B/y_2.jpg": 1},
             "test": {"A/y_8.jpg": 0, "A/y_9.jpg": 0, "A/y_4.jpg": 0, "A/q_9.jpg": 0}}
    labels = {"A/x_9.jpg": 0, "A/x_8.jpg": 0, "B/y_7.jpg": 1, "A/unknown_6.jpg": 0,
              "B/other_5.jpg": 1}
    shares = test_model.baselines(labels, split, "style")
    assert list(shares.values()) == pytest.approx([3 / 5, 4 / 5])
    assert list(test_model.baselines(labels, split, "artist").values()) == [3 / 5]


@pytest.mark.parametrize("attribute,commonest,artists", [("style", 16.0, 81.0),
                                                         ("genre", 21.7, 58.7)])
def test_the_artists_name_guesses_artgans_classes(shared, attribute, commonest, artists):
    _, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", attribute)
    tested = {path: labels[path] for path in test_list}
    train = {path: label for path, label in labels.items() if path not in test_list}
    shares = test_model.baselines(tested, {"train": train, "validation": {}}, attribute)
    assert [100 * share for share in shares.values()] == pytest.approx(
        [commonest, artists], abs=0.06)


# ------------------------------------------------------------------------------------- predictions


def crop(copy, place):
    """Return what a copy shows at a place of its long side: 7/8 of the short one, 64 pixels."""
    with Image.open(copy) as image:
        side = min(image.size) * 7 / 8
        left, top = (length / 16 + (length * 7 / 8 - side) * place for length in image.size)
        box = (left, top, left + side, top + side)
        return torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BILINEAR, box)))


@pytest.mark.parametrize("views,places", [(1, [0.5]), (3, [0, 0.5, 1])])
def test_predictions_are_those_of_a_forward_pass(finished_in, precision, tmp_path, monkeypatch,
                                                 views, places):
    """Rebuilt here in float32 from the checkpoint and the copies alone, one crop at a time."""
    finished, close = finished_in(precision), {"float32": 1e-5, "bfloat16": 0.01}[precision]
    monkeypatch.setattr(test_model, "VIEWS", views)  # edited in the file
    tested, copies = examine(finished, tmp_path), copies_in(finished.folder)
    run = torch.load(tmp_path / "model_best.pth", weights_only=True)
    names = run["class_names"]
    model = tm.ArtClassifier(len(names))
    model.load_state_dict(run["model"])
    model.eval()
    assert [row["path"] for row in tested.predictions] == list(run["split"]["test"])
    for row in tested.predictions:
        with torch.no_grad():
            logits = [model(crop(copies[row["path"]], place)[None].permute(0, 3, 1, 2).float())
                      for place in places]
        share = torch.cat(logits).mean(0).softmax(0)
        own = share[names.index(row["class"])]
        assert row["class"] == finished.painted[row["path"]]
        assert share[names.index(row["predicted"])] >= share.max() - close
        assert float(row["probability"]) == pytest.approx(share.max().item(), abs=close)
        assert float(row["class_probability"]) == pytest.approx(own.item(), abs=close)
        assert 1 + (share > own + close).sum() <= int(row["class_rank"]) <= (
            share > own - close).sum()


def test_the_centre_crop_is_scored_too(finished, tested, tmp_path):
    """It alone gives the accuracy that is told for it beside that of three crops."""
    alone = examine(finished, tmp_path, "--views", "1")
    scores, both = (json.loads((place.out / "scores.json").read_text(encoding="utf-8"))
                    for place in (alone, tested))
    assert scores["accuracy"] == scores["centre_accuracy"] == both["centre_accuracy"]


def test_numbers_do_not_depend_on_batches_or_workers(finished_in, precision, tmp_path):
    finished = finished_in(precision)
    first, *others = (
        examine(finished, tmp_path, "--batch-size", batch, "--workers", workers).predictions
        for batch, workers in (("64", "0"), ("1", "0"), ("2", "2")))
    for row, other in itertools.chain(*(zip(first, rows, strict=True) for rows in others)):
        assert row["path"] == other["path"]
        assert row["predicted"] == other["predicted"] or precision == "bfloat16"
        for name in ("probability", "class_probability"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=5e-3)


def test_outputs_that_are_not_finite_are_no_result(finished, tested, tmp_path, capsys):
    best = tm.load_checkpoint(tested.out / "model_best.pth")
    best["model"]["linear.bias"][0] = torch.nan
    torch.save(best, tmp_path / "model_best.pth")
    assert test_model.main([*tested.flags, "--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("error: .* not finite.*", error)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["model_best.pth"]


def test_other_numbers_of_views_are_refused(tested, capsys):
    for views in ("0", "2", "-3"):
        assert test_model.main([*tested.flags, f"--views={views}"]) == 1
        assert re.fullmatch(f"error: VIEWS .* {views}", capsys.readouterr().err.strip())


# ---------------------------------------------------------------------------- mislabelled paintings


def test_every_painting_of_the_run_is_an_outlier_once(finished, tested):
    rows, run = tested.outliers, tm.load_checkpoint(tested.out / "model_best.pth")
    parts = {path: part for part in tm.PARTS for path in run["split"][part]}
    assert {row["path"]: row["part"] for row in rows} == parts
    assert len(rows) == len(parts) == 40
    assert {row["path"]: row["class"] for row in rows} == finished.painted
    doubts = [float(row["doubt"]) for row in rows]
    assert doubts == sorted(doubts, reverse=True) and doubts[-1] < 0 < doubts[0]
    for row in rows:
        assert row["model_class"] in set(run["class_names"]) - {row["class"]}
        if row["part"] != "test":
            label, likeliest, other, _ = run["margins"][row["path"]]  # log probabilities
            for name, value in (("margin", likeliest - label), ("class_probability", np.exp(label)),
                                ("model_probability", np.exp(likeliest))):
                assert float(row[name]) == pytest.approx(value, rel=1e-4)
            assert row["model_class"] == run["class_names"][other]
    by_path = {row["path"]: row for row in rows}
    for row in tested.predictions:
        outlier = by_path[row["path"]]
        assert (float(outlier["margin"]) > 0) == (row["predicted"] != row["class"])
        if row["predicted"] != row["class"]:
            assert outlier["model_class"] == row["predicted"]
        assert float(outlier["class_probability"]) == pytest.approx(
            float(row["class_probability"]), abs=2e-6)


def test_the_artist_prior_was_counted():
    """Of seven paintings by x, four are of class 0; z has one alone; nobody painted class 3."""
    labels = {"A/x_1.jpg": 0, "A/x_2.jpg": 0, "A/x_3.jpg": 0, "A/x_4.jpg": 0, "B/x_5.jpg": 1,
              "B/x_6.jpg": 1, "C/x_7.jpg": 2, "B/y_1.jpg": 1, "C/y_2.jpg": 2, "C/z_1.jpg": 2,
              "C/nameless.jpg": 2}
    parts = list(labels.items())
    split = {"train": dict(parts[:5]), "validation": dict(parts[5:7]), "test": dict(parts[7:])}
    of_artist, of_folder = (test_model.make_prior(split, attribute, ["a", "b", "c", "d"])
                            for attribute in ("style", "artist"))
    one = [4 / 11, 3 / 11, 4 / 11]  # a painting more, of the whole's shares

    def known(path, label, prior=of_artist):
        row = prior(path, label)
        return [row.get(name, "") for name in (
            "prior", "prior_paintings", "prior_share", "prior_class")]

    assert known("C/x_7.jpg", 2) == ["x", 6, 0, "a"]
    assert of_artist("C/x_7.jpg", 2)["score"] == pytest.approx(np.log((4 + one[0]) / one[2]))
    assert known("A/x_1.jpg", 0) == ["x", 6, 3 / 6, "b"]
    assert of_artist("A/x_1.jpg", 0)["score"] == pytest.approx(
        np.log((2 + one[1]) / (3 + one[0])))
    assert known("B/y_1.jpg", 1) == ["y", 1, 0, "c"]
    for alone in ("C/z_1.jpg", "C/nameless.jpg"):
        assert known(alone, 2) == ["", 0, "", ""] and of_artist(alone, 2)["score"] == 0
    assert known("B/x_5.jpg", 1, of_folder) == ["B", 2, 1, ""]


@pytest.mark.parametrize("name", ["IMG", "me"])
def test_a_name_on_nearly_all_is_no_artist(name):
    """IMG_1.jpg, IMG_2.jpg and so on say nothing of a painting."""
    labels = {f"A/{name}_{n}.jpg": n % 2 for n in range(30)} | {"A/x_1.jpg": 0, "A/x_2.jpg": 1}
    prior = test_model.make_prior({"train": labels}, "style", ["a", "b"])
    assert prior(f"A/{name}_1.jpg", 1)["score"] == 0
    assert prior("A/x_1.jpg", 0)["prior_class"] == "b"


@pytest.mark.parametrize("accuracy,weight", [
    (0.1, 0.01), (0.4, 0.01), (0.7, np.log(2)), (0.9, np.log(6)), (1.0, np.log(30))])
def test_doubt_is_as_defined(accuracy, weight):
    """The margin's weight: the commonest class is wrong for 60 % of 50 paintings in validation."""
    chance, names = np.random.default_rng(4), ["a", "b", "c"]
    labels = {part: {f"S/artist-{n % 8}_{part}-{n}.jpg": n % 8 % 3 if chance.random() < 0.8 else
                     int(chance.integers(3)) for n in range(50)} for part in tm.PARTS}
    labels["train"] |= {f"S/nameless-{n}.jpg": n % 3 for n in range(4)}
    labels["validation"] = dict(zip(labels["validation"], [0] * 20 + [1, 2] * 15))
    unused = list(labels["train"])[7]
    margins = {path: [3 * chance.normal() - 4, -3.0, (label + 1) % 3, 3]
               for part in labels.values() for path, label in part.items() if path != unused}
    history = [{"validation_accuracy": share} for share in (0.05, accuracy, 0.08)]
    run = {"class_names": names, "split": labels, "settings": {"ATTRIBUTE": "style"},
           "history": history}
    rows = test_model.find_outliers(run, labels["test"], margins)
    prior, doubts = test_model.make_prior(labels, "style", names), {}
    for part in labels.values():
        own = {path: -3 - margins[path][0] for path in part.keys() - {unused}}
        mean, spread = np.mean(list(own.values())), np.std(list(own.values()))
        for path, margin in own.items():
            score = prior(path, part[path])["score"]
            assert (score == 0) == ("nameless" in path)
            doubts[path] = weight * (margin - mean) / spread + max(score, -1)
    assert len(doubts) == 153
    assert [row["doubt"] for row in rows] == pytest.approx(sorted(doubts.values(), reverse=True))
    assert {row["path"]: row["doubt"] for row in rows} == pytest.approx(doubts)


def test_near_copies_are_the_most_similar_pairs():
    """Many blocks of rows, against all pairs at once; five copies of one class."""
    random = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(1200, 16, generator=random).abs())
    features[1100] = features[3]  # of two classes, far apart
    features[600:606] = features[600]
    classes = np.array([place % 3 if not 600 <= place < 606 else 0 for place in range(1200)])
    rows = [{"path": f"{n}.jpg", "class": "abc"[label], "part": tm.PARTS[n // 7 % 3]}
            for n, label in enumerate(classes)]
    found = test_model.find_near_copies(rows, features)
    left, right = np.triu_indices(1200, 1)
    similarity = (features @ features.T).numpy()[left, right]
    for same in (False, True):
        kind = [pair for pair in found if (pair["class"] == pair["copy_class"]) == same]
        expected = np.sort(similarity[(classes[left] == classes[right]) == same])[::-1][:100]
        assert sorted((pair["similarity"] for pair in kind), reverse=True) == pytest.approx(
            expected.tolist(), abs=1e-6)
        for pair in kind:
            places = [int(pair[key].partition(".")[0]) for key in ("path", "copy")]
            assert pair["similarity"] == pytest.approx(
                float(features[places[0]] @ features[places[1]]), abs=1e-6)
            assert [pair["class"], pair["copy_class"]] == ["abc"[classes[n]] for n in places]
    order = [(pair["class"] == pair["copy_class"], pair["part"] == pair["copy_part"],
              -pair["similarity"]) for pair in found]
    assert order == sorted(order) and len({kinds[:2] for kinds in order}) == 4
    assert {"3.jpg", "1100.jpg"} in [{pair["path"], pair["copy"]} for pair in found]


def test_features_and_neighbours(finished, tested, tmp_path):
    """Features are pooled maps of centre crops; the page shows the three most similar of each."""
    features, rows = np.load(tested.out / "features.npy"), read(tested.out / "features.csv")
    assert [row["path"] for row in rows] == [row["path"] for row in tested.outliers]
    assert {(row["path"], row["class"], row["part"]) for row in rows} == {
        (row["path"], row["class"], row["part"]) for row in tested.outliers}
    _, model = test_model.load_best(tested.out)
    copies = copies_in(finished.folder)
    for place in (0, 17, 39):
        image = crop(copies[rows[place]["path"]], 0.5)[None]
        with torch.inference_mode():
            vector = model.features(tm.to_images(image, torch.device("cpu"))).mean((2, 3))[0]
        assert features[place] == pytest.approx((vector / vector.norm()).numpy(), abs=2e-3)
    similarity = features.astype(np.float32) @ features.astype(np.float32).T
    places = {row["path"]: place for place, row in enumerate(rows)}
    figures = [figure for figure in page_of(tested.out).select(".gallery figure")
               if figure.select(".nearest img")]
    assert figures
    for figure in figures:
        path, *nearest = [image["alt"] for image in figure.select("img")]
        nearest_of = np.argsort(-similarity[places[path]], kind="stable")
        expected = [similarity[places[path], place] for place in nearest_of
                    if place != places[path]][:3]
        assert [similarity[places[path], places[name]] for name in nearest] == pytest.approx(
            expected, abs=1e-3)
        assert texts(figure.select(".nearest div")) == [
            rows[places[name]]["class"].replace("_", " ") for name in nearest]
    without = examine(finished, tmp_path, "--neighbours", "0")
    assert without.lines[-1] == tested.lines[-1] and not (tmp_path / "near_copies.csv").exists()
    assert not page_of(tmp_path).select(".nearest img")


def write_corrections(path, rows):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # as Excel saves it
        table = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def test_corrected_labels_are_trained_and_tested_on(finished, tested, tmp_path, capsys):
    """outliers.csv with ten classes edited; the split stays, and a resumed run keeps its labels."""
    styles, out = sorted(set(finished.painted.values())), tmp_path / "out"
    rows = [row.copy() for row in tested.outliers]
    for row in rows[:10]:
        row["class"] = styles[(styles.index(row["class"]) + 1) % len(styles)]
    changed = {row["path"]: row["class"] for row in rows[:10]}
    write_corrections(tmp_path / "corrected.csv", [
        *rows, rows[0] | {"path": "Nowhere/x.jpg"}, dict.fromkeys(rows[0], "")])
    flags = [*finished.flags, "--output-dir", str(out),
             "--corrections", str(tmp_path / "corrected.csv")]
    assert tm.main([*flags, "--epochs", "1"]) == 0
    assert re.search(r"(?m)^10 labels .* 1 of its paths", capsys.readouterr().out)
    write_corrections(tmp_path / "corrected.csv", rows[10:])
    assert tm.main([*flags, "--epochs", "2"]) == 0
    assert "keeps its labels" in capsys.readouterr().out
    run, former = (tm.load_checkpoint(folder / "model_last.pth") for folder in (out, finished.out))
    assert former["corrected"] == {} and {
        path: styles[label] for path, label in run["corrected"].items()} == {
        path: finished.painted[path] for path in changed}
    for part in tm.PARTS:
        assert list(run["split"][part]) == list(former["split"][part])
        assert {path: styles[label] for path, label in run["split"][part].items()} == {
            path: changed.get(path, finished.painted[path]) for path in run["split"][part]}
    assert test_model.main([*folders_to_test(finished.folder), "--output-dir", str(out)]) == 0
    count = len(changed.keys() & run["split"]["test"].keys())
    assert 0 < count < 10  # of both kinds
    assert re.search(rf"10 labels .* {count} of them are test", " ".join(page_of(out).text.split()))


@pytest.mark.parametrize("row", [{"path": "a", "class": "Cubisme"}, {"file": "a", "kind": "b"},
                                 {"path;class": "a;Cubism"}, {"path": " ", "class": ""}])
def test_corrections_of_no_class_are_an_error(finished, tmp_path, capsys, row):
    write_corrections(tmp_path / "wrong.csv", [row])
    flags = [*finished.flags, "--output-dir", str(tmp_path / "out")]
    assert tm.main([*flags, "--corrections", str(tmp_path / "wrong.csv")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*wrong.csv.*\n", error) and row.get("class", "path") in error
    assert tm.main([*flags, "--corrections", str(tmp_path / "nowhere.csv")]) == 1
    assert re.fullmatch("error: .*nowhere.csv.*\n", capsys.readouterr().err)


def plant_and_test(data_dir, folder, names, labels, test_list, *more):
    """Train and test on labels, some of them wrong; return outliers.csv and the last line."""
    write_lists(folder / "lists", "style", names,
                [row for row in labels.items() if row[0] not in test_list],
                [row for row in labels.items() if row[0] in test_list])
    places = ["--data-dir", str(data_dir), *folders(folder)[4:], "--workers", "0"]
    flags = [*QUICK, *places, "--lists-dir", str(folder / "lists"), "--epochs", "2", *more]
    assert tm.main(flags) == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert test_model.main([*places, "--views", "1"]) == 0
    return read(folder / "out/outliers.csv"), printed.getvalue().splitlines()[-1]


SIMILAR = {"Impressionism": "Post_Impressionism", "Post_Impressionism": "Impressionism",
           "High_Renaissance": "Northern_Renaissance", "Northern_Renaissance": "High_Renaissance",
           "Cubism": "Synthetic_Cubism", "Synthetic_Cubism": "Cubism", "Fauvism": "Expressionism",
           "Symbolism": "Art_Nouveau_Modern", "Art_Nouveau_Modern": "Symbolism",
           "Rococo": "Romanticism", "Romanticism": "Realism", "Realism": "Romanticism"}


def test_planted_labels_are_found_in_the_whole_collection(shared, tmp_path):
    """Twice 5 % of the real subset's labels are wrong; a tiny network, 2 epochs, 64 pixels."""
    subset = shared / "artgan_subset"
    names, labels, test_list = tm.read_lists(subset / "wikiart_csv", "style")
    chance, used = np.random.default_rng(0), sorted(set(labels.values()))
    planted = chance.choice(sorted(labels), (2, len(labels) // 20), replace=False).tolist()
    wrong = labels.copy()
    for path in planted[0]:  # any other style
        wrong[path] = int(chance.choice([label for label in used if label != labels[path]]))
    for path in planted[1]:
        wrong[path] = names.index(SIMILAR.get(names[labels[path]], "Symbolism"))
    rows, _ = plant_and_test(subset / "wikiart", tmp_path, names, wrong, test_list,
                             "--batch-size", "32")
    doubt = {row["path"]: float(row["doubt"]) for row in rows}
    assert doubt.keys() == labels.keys() and len(labels) == 1670
    right = labels.keys() - {path for paths in planted for path in paths}
    for paths, least in zip(planted, (0.92, 0.85)):
        truth = [*[True] * len(paths), *[False] * len(right)]
        found = sk.roc_auc_score(truth, [doubt[path] for path in (*paths, *right)])
        assert found >= least, found


def test_planted_labels_of_painted_pictures_are_found(tmp_path):
    """5 % of the labels are wrong, in training too."""
    painted = paint_artgan(tmp_path / "wikiart", each=40, size=(100, 80))
    names = sorted(set(painted.values()))
    labels = {path: names.index(painted[path]) for path in sorted(painted)}
    chance = np.random.default_rng(1)
    test_list = set(chance.choice(list(labels), 50, replace=False).tolist())
    planted = chance.choice(list(labels), len(labels) // 20, replace=False).tolist()
    for path in planted:
        labels[path] = (labels[path] + int(chance.integers(1, 5))) % 5
    rows, last = plant_and_test(tmp_path / "wikiart", tmp_path, names, labels, test_list,
                                "--epochs", "6", "--batch-size", "16")
    assert last.endswith(")")  # better than guessing
    truth = [row["path"] in planted for row in rows]
    for name, least in (("margin", 0.93), ("doubt", 0.9)):
        found = sk.roc_auc_score(truth, [float(row[name]) for row in rows])
        assert found >= least, (name, found)


# -------------------------------------------------------------------------------------------- page


class Nesting(HTMLParser):
    """Fail where a tag is not closed in order."""

    void, open = ("img", "meta", "br", "wbr", "path", "circle", "polyline"), ()

    def handle_starttag(self, tag, _):
        self.open = (*self.open, tag) if tag not in self.void else self.open

    def handle_endtag(self, tag):
        assert tag in self.void or self.open[-1] == tag
        self.open = self.open[:-1] if tag not in self.void else self.open

    def handle_startendtag(self, tag, _):
        assert tag in self.void


def page_of(folder):
    """Return the parsed page in a folder after checking that it stands alone."""
    content = (folder / "report.html").read_text(encoding="utf-8")
    nesting = Nesting()
    nesting.feed(content)
    assert not nesting.open
    page = BeautifulSoup(content, "html.parser")
    assert all(map(page.find, ("h1", "h2", "table", "caption", "figure", "img")))
    assert not page.find(["script", "link", "iframe", "object", "base"])
    for tag in page.find_all():
        assert not any(name.startswith("on") for name in tag.attrs)
        assert tag.get("src", "data:").startswith("data:")
        assert re.match(r"#\d+$|(\.\./)*[^:]+$", tag.get("href", "#0"))  # no scheme, no script
        assert "url(" not in tag.get("style", "")
    assert all(image["alt"] for image in page.find_all("img"))
    return page


def test_the_page_of_a_run(tested):
    page = page_of(tested.out)
    text = " ".join(page.get_text().split())
    assert "missing" not in "\n".join(tested.lines)  # for none is
    right = sum(row["class"] == row["predicted"] for row in tested.predictions)
    assert f"{100 * right / 5:.2f}%" in text and f"{right} of 5 paintings" in text
    shown = {image["alt"] for image in page.find_all("img")}
    assert {row["path"] for row in tested.predictions} <= shown
    for name, value in tm.load_checkpoint(tested.out / "model_best.pth")["settings"].items():
        assert f"{name}{value}" in text, name
    for image in page.find_all("img"):  # it links to the original of the same name
        original = tested.out / unquote(image.parent["href"])
        assert original.is_file() and original.as_posix().endswith(image["alt"])


def test_probabilities_are_those_of_the_predictions(tested):
    table = np.load(tested.out / "probabilities.npy")
    assert table.shape == (5, 5) and table.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert table.max(1) == pytest.approx(
        [float(row["probability"]) for row in tested.predictions], abs=1e-5)


HOSTILE = ["<script>alert(1)</script>", 'a" onerror="x', "b'&amp;</td>", "new\nline",
           "\udce9\udcff", "x" * 200, "\u202egnp.exe", "100%"]


def test_a_page_of_27_classes_with_hostile_names(tmp_path):
    """Names from disk stay text, and the page of ArtGAN's size stays under 6 MB.

    Each of 27 artists paints in one style; of their 24,421 paintings, 3 % are labelled otherwise.
    """
    names = [f"{HOSTILE[n % len(HOSTILE)]} {n}" for n in range(27)]
    random, count = np.random.default_rng(0), 24_421
    own = np.arange(count) % 27
    labels = np.where(random.random(count) < 0.03, random.integers(0, 27, count), own)
    logits = torch.from_numpy(random.normal(size=(count, 27))).float()
    logits[labels != own, own[labels != own]] += 9
    words = [name.replace("/", "|") for name in HOSTILE]
    test = {f"{words[n % 6]}/{words[own[n] % 8]}{own[n]}_{words[n % 7]}-{n}.jpg": label
            for n, label in enumerate(labels.tolist())}
    Image.effect_noise((420, 320), 80).convert("RGB").save(tmp_path / "noise.jpg")
    row = {"epoch": 1, "training_loss": 1.0, "validation_loss": 2.0, "validation_accuracy": 0.5,
           "seconds": 60.0}
    run = {"class_names": names, "split_source": "<s>", "device": "<u>", "torch": "<u>",
           "split": {"train": {"<b>_1.jpg": 0}, "validation": {"<b>_2.jpg": 0}, "test": test},
           "margins": {"<b>_1.jpg": [-2.0, -1.0, 1, 1]}, "history": [row] * 3, "corrected": {},
           "settings": {"EPOCHS": 3, "WEIGHTS": "<b>", "ATTRIBUTE": "<i>"}}
    settings = SimpleNamespace(output_dir=tmp_path, data_dir=tmp_path,
                               cache_dir=tmp_path / "cache", image_size=64)
    test_model.write_results(run, test, logits[None],
                             dict.fromkeys(test, tmp_path / "noise.jpg"), settings)
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    page = page_of(tmp_path)
    assert "<script>alert(1)</script> 0" in page.get_text()
    assert len(page.find_all("img")) > 27 * 7  # six of each class, and those at the top
    assert not page.find(["u", "s"])
    assert len(read(tmp_path / "outliers.csv")) == count + 1


COUNTED = [  # label, predicted class, by how much
    (0, 0, 3.0), (0, 0, 2.0), (0, 1, 1.5), (0, 1, 0.5), (0, 2, 2.5), (0, 2, 0.8), (1, 1, 1.0),
    (1, 0, 0.7), (1, 1, 4.0), (1, 1, 1.1), (2, 2, 2.0), (2, 1, 1.2)]


@pytest.fixture
def counted(tmp_path, capsys):
    """Write the results of twelve paintings that can be counted by hand; return all that is told.

    Each picture has a grey of its own. The centre crop of each says the second class, and nothing
    is of the fourth. In training, artist b has 20 Naive_Art and one Cubism, doubted.
    """
    names, test, copies = ["Cubism", "Naive_Art", "Ukiyo_e", "Zen"], {}, {}
    data, out = tmp_path / "wikiart", tmp_path / "out"
    logits = torch.tensor([[0, -0.01, -0.02, -99]] * 12)
    out.mkdir()
    for place, (label, predicted, strength) in enumerate(COUNTED):
        logits[place, predicted] += strength
        path = f"{names[label]}/{'a' if place in (0, 1, 2, 3, 7) else 'z'}_{place}.jpg"
        test[path], copies[path] = label, tmp_path / f"{place}.jpg"
        Image.new("RGB", (40 + place, 30), (20 * place,) * 3).save(copies[path])
    (data / "Cubism").mkdir(parents=True)
    Image.new("RGB", (52, 30), (240,) * 3).save(data / "Cubism/b_12.jpg")
    second = torch.tensor([0.0, 64.0, 0.0, 0.0])
    views = torch.stack([logits - second, logits + second, logits])
    history = [
        {"epoch": epoch, "training_loss": a, "validation_loss": b, "validation_accuracy": c,
         "seconds": 2000.0}
        for epoch, a, b, c in ((1, 3.0, 2.9, 0.2), (2, 2.0, 2.2, 0.6), (3, 1.0, 2.5, 0.5))]
    train = {f"Cubism/a_{n}.jpg": 0 for n in range(50, 55)}
    train |= {f"Naive_Art/b_{n}.jpg": 1 for n in range(20, 36)} | {"Cubism/b_12.jpg": 0}
    validation = {f"Naive_Art/b_{n}.jpg": 1 for n in range(36, 40)}
    margins = {path: [-0.2, -2.2 - label, 1 - label, 1]
               for path, label in (train | validation).items()} | {
               "Cubism/b_12.jpg": [-1.2, -0.7, 1, 1]}
    settings = {name: getattr(tm, name) for name in tm.SETTINGS if "_DIR" not in name}
    run = {
        "class_names": names, "history": history, "split_source": "drawn by painting",
        "corrected": {},
        "settings": settings | {"ATTRIBUTE": "a style", "EPOCHS": 3}, "margins": margins,
        "split": {"train": train, "validation": validation,
                  "test": test | {"Cubism/missing_1.jpg": 0}},
        "device": "cpu, torch.float32", "torch": "9.9"}
    places = SimpleNamespace(output_dir=out, data_dir=data, cache_dir=tmp_path / "cache",
                             image_size=64)
    copies["Cubism/b_12.jpg"] = data / "Cubism/b_12.jpg"
    test_model.print_accuracy(test_model.write_results(run, test, views, copies, places), out)
    return SimpleNamespace(page=page_of(out), lines=capsys.readouterr().out.splitlines(), out=out,
                           history=history)


def texts(tags):
    return [" ".join(tag.get_text(" ", strip=True).split()) for tag in tags]


def cells(table):
    return [texts(row.find_all(["th", "td"])) for row in table.find_all("tr")]


def number(path):
    """Return the number of a painting from its path."""
    return int(re.search(r"_(\d+)\.jpg$", path)[1])


def test_what_is_printed_was_counted(counted):
    text = "\n".join(counted.lines)
    for value in ("60.00 %", "48.15 %", "33.33 %", "50.0 %", "58.3 %", "1 of 38", "1 of 13 test",
                  str(counted.out / "report.html")):
        assert value in text, value
    assert "top-5" not in text  # of four classes
    assert counted.lines[-1] == ("Test accuracy: 50.00 % (6 of 12 paintings; 95 % interval 25.4 to "
                                 "74.6 %) - no better than guessing")


def test_the_tables_for_programs_were_counted(counted):
    scores = json.loads((counted.out / "scores.json").read_text(encoding="utf-8"))
    assert [scores[name] for name in ("right", "paintings", "listed", "epoch")] == [6, 12, 13, 2]
    for name, share in (("accuracy", 1 / 2), ("centre_accuracy", 1 / 3), ("macro_f1", 0.481481),
                        ("validation_accuracy", 0.6), ("top5", 1)):
        assert scores[name] == pytest.approx(share, abs=1e-6), name
    assert scores["interval"] == pytest.approx([0.2538, 0.7462], abs=1e-4)
    assert list(scores["baselines"].values()) == pytest.approx([1 / 2, 7 / 12])
    classes = read(counted.out / "classes.csv")
    assert [[row["class"], *(float(row[name]) for name in ("paintings", "precision", "recall",
                                                           "f1"))] for row in classes] == [
        ["Cubism", 6, 0.666667, 0.333333, 0.444444], ["Naive_Art", 4, 0.5, 0.75, 0.6],
        ["Ukiyo_e", 2, 0.333333, 0.5, 0.4], ["Zen", 0, 0, 0, 0]]
    assert (counted.out / "confusion.csv").read_text(encoding="utf-8").splitlines() == [
        ",Cubism,Naive_Art,Ukiyo_e,Zen", "Cubism,2,2,2,0", "Naive_Art,1,3,0,0",
        "Ukiyo_e,0,1,1,0", "Zen,0,0,0,0"]
    margins = {0: -3.01, 4: 2.48, 5: 0.78, 7: 0.71, 6: -0.99, 11: 1.21, 10: -1.98, 12: 0.5}
    outliers = {number(row["path"]): row for row in read(counted.out / "outliers.csv")}
    for place, margin in margins.items():
        assert float(outliers[place]["margin"]) == pytest.approx(margin, abs=1e-4)
    assert [outliers[12][name] for name in (
        "class", "part", "model_class", "prior", "prior_paintings", "prior_share",
        "prior_class")] == ["Cubism", "train", "Naive_Art", "b", "20", "0", "Naive_Art"]
    assert next(iter(outliers)) == 12


def test_the_tables_of_the_page_were_counted(counted):
    page = counted.page
    assert page.find("h1").find("b").get_text() == "50.00%"
    for part, values in (
            (page.find("header"), ("25.4% to 74.6%", "33.33%", "6 of 12 paintings", "guessing")),
            (page, ("22 train", "4 validation", "13 test", "3 of 3 epochs", "1:40:00", "torch 9.9",
                    "cpu, torch.float32"))):
        words = " ".join(part.get_text().split())
        assert all(value in words for value in values), words
    assert [bar[-5:] for bar in texts(page.select(".bars > div"))] == ["50.0%", "50.0%", "58.3%"]
    assert page.select_one(".bars i")["style"] == "left:25.38%;width:49.24%"
    assert texts(page.select("header ~ dl b"))[:1] == ["48.1%"]  # of four classes no top five
    assert cells(page.find("table", "classes"))[1:] == [
        ["Naive Art", "4", "50.0%", "75.0%", "60.0%"], ["Cubism", "6", "66.7%", "33.3%", "44.4%"],
        ["Ukiyo e", "2", "33.3%", "50.0%", "40.0%"], ["Zen", "0", "–", "–", "–"]]
    matrix = page.find("table", "matrix")  # of the classes that occur
    assert cells(matrix) == [["", "Cubism", "Naive Art", "Ukiyo e"], ["Cubism", "2", "2", "2"],
                             ["Naive Art", "1", "3", ""], ["Ukiyo e", "", "1", "1"]]
    depth = [float(cell["style"].partition(":")[2]) for cell in matrix.find_all("td")]
    shares = [1 / 3, 1 / 3, 1 / 3, 1 / 4, 3 / 4, 0, 0, 1 / 2, 1 / 2]
    assert (rankdata(depth) == rankdata(shares)).all()
    assert texts(matrix.select(".right")) == ["2", "3", "1"]
    pairs = texts(page.select("ol li"))
    assert [re.findall("Cubism|Naive|Ukiyo|[0-9.]+%?", pair)[:4] for pair in pairs] == [
        ["Cubism", "Naive", "2", "33.3%"], ["Cubism", "Ukiyo", "2", "33.3%"],
        ["Naive", "Cubism", "1", "25.0%"], ["Ukiyo", "Naive", "1", "50.0%"]]


def read_off(drawing, name):
    """Return the values of a line, as the labels of the axis tell them, and of its dot."""
    heights = [float(height) for path in drawing.find_all("path")
               for height in re.findall(r"^M[\d.]+ ([\d.]+)H", path["d"])]
    labels = [float(text.rstrip("%")) for text in texts(drawing.find_all("text"))
              if re.fullmatch(r"[\d.]+%?", text)]
    slope, start = np.polyfit(heights, labels, 1)
    line = drawing.find("polyline", name)
    points = np.array(re.findall(r"[\d.]+", line["points"]), float).reshape(-1, 2)
    dot = np.array(re.findall(r"[\d.]+", line.find_next("circle")["transform"]), float)
    steps = np.diff(points[:, 0])  # of the epochs, to the right
    assert (steps > 0).all() and steps == pytest.approx(steps[:1].repeat(len(steps)), abs=0.2)
    return slope * points[:, 1] + start, points.tolist().index(dot.tolist())


def test_the_drawings_of_the_page_were_counted(counted):
    loss, accuracy = counted.page.find_all("svg")
    for drawing, name, column, scale in (
            (loss, "training", "training_loss", 1), (loss, "validation", "validation_loss", 1),
            (accuracy, "validation", "validation_accuracy", 100)):
        values, dot = read_off(drawing, name)
        assert values == pytest.approx([scale * row[column] for row in counted.history], abs=0.02)
        assert dot == 1  # the second epoch is the best
    assert "2.20" in loss["aria-label"] and "60.00%" in accuracy["aria-label"]


@pytest.mark.parametrize("kind", ["of this run", "of another run", "damaged"])
def test_later_epochs_count_if_they_are_of_this_run(finished, tested, tmp_path, kind):
    """In the drawing, and for the margins in training; model_best.pth is enough without them."""
    best = tm.load_checkpoint(finished.out / "model_best.pth")
    doubted = min(best["split"]["train"])
    row = best["history"][-1] | {"epoch": len(best["history"]) + 1, "validation_accuracy": 0.0}
    last = best | {"history": [*best["history"], row],
                   "margins": best["margins"] | {doubted: [-99.0, 0.0, 1, 3]}}
    if kind == "of another run":
        last["history"][0] = last["history"][0] | {"training_loss": 0.5}
    torch.save(last, tmp_path / "model_last.pth")
    if kind == "damaged":
        (tmp_path / "model_last.pth").write_bytes(b"damaged")
    other = examine(finished, tmp_path)
    assert other.lines[-1] == tested.lines[-1] and other.predictions == tested.predictions
    values, dot = read_off(page_of(tmp_path).find_all("svg")[1], "validation")
    drawn = (last if kind == "of this run" else best)["history"]
    assert values == pytest.approx([100 * row["validation_accuracy"] for row in drawn], abs=0.02)
    assert dot == len(best["history"]) - 1
    margin = next(float(row["margin"]) for row in other.outliers if row["path"] == doubted)
    if kind == "of this run":
        assert margin == 99
    else:
        assert other.outliers == tested.outliers


def test_the_gallery_shows_the_right_paintings(counted):
    """The most confident, one a class; where model and artist agree; the doubtful by class."""
    order = [number(row["path"]) for row in read(counted.out / "outliers.csv")
             if float(row["margin"]) > 0]
    assert sorted(order) == [2, 3, 4, 5, 7, 11, 12]
    expected = [[8, 0, 10], [4, 11, 7], [12], [place for place in order if place not in (7, 11)],
                [7], [11]]
    galleries = counted.page.select(".gallery")
    for gallery, places in zip(galleries, expected, strict=True):
        for figure, place in zip(gallery.select("figure"), places, strict=True):
            image = Image.open(io.BytesIO(b64decode(figure.img["src"].partition(",")[2])))
            assert np.median(image) == pytest.approx(20 * place, abs=3)
            assert image.size == (40 + place, 30) and number(figure.img["alt"]) == place
    said = [texts(gallery.select("figcaption")) for gallery in galleries]
    assert "96%" in said[0][0] and "86%" in said[1][0] and "Ukiyo e" in said[1][0]
    fourth = next(words for words in said[3] if " 4 " in words)
    assert {"Cubism", "7%", "Ukiyo"} <= set(re.split(r"[ ,;:]+", fourth))
    assert {"Cubism", "30%", "Naive", "20", "0%"} <= set(re.split(r"[ ,;:]+", said[2][0]))


def test_outliers_have_their_pictures_on_a_fresh_disk(finished, tmp_path):
    """Those of training too, which testing itself does not need; a damaged copy does no harm."""
    more = ["--cache-dir", str(tmp_path / "cache")]
    tested = examine(finished, tmp_path / "out", *more)
    figures, images = map(page_of(tested.out).select, (".gallery figure", "figure > a > img"))
    assert len(figures) == len(images)
    doubtful = [row for row in tested.outliers if float(row["margin"]) > 0 or
                float(row["doubt"]) > 0 and row["model_class"] == row["prior_class"]]
    first = [row for name in set(finished.painted.values()) for row in
             [row for row in doubtful if row["class"] == name][:test_model.GALLERY]]
    assert "train" in {row["part"] for row in first}
    assert {image["alt"] for image in images} == {
        row["path"] for row in first + tested.predictions}
    paths = {row["path"] for row in tested.predictions}
    names = {Path(file).name for path, file in copies_in(finished.folder).items() if path in paths}
    for copy in (tmp_path / "cache").rglob("*.jpg"):
        if copy.name not in names:
            copy.write_bytes(copy.read_bytes()[:200])
    examine(finished, tmp_path / "out", *more, "--neighbours", "0")
    assert 0 < len(page_of(tested.out).select("figure > a > img")) < len(figures)


# --------------------------------------------------------------- other machines, disks that refuse


def test_another_machine_needs_the_checkpoint_and_the_paintings(finished, tested, tmp_path):
    """Only the test paintings are there, one under another spelling, one gone, one broken."""
    paths = [row["path"] for row in tested.predictions]
    for path in paths:
        (tmp_path / "wikiart" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished.folder / "wikiart" / path, tmp_path / "wikiart" / path)
    (tmp_path / "wikiart" / paths[0]).unlink()
    (tmp_path / "wikiart" / paths[1]).write_bytes(b"broken")
    spelling = paths[2].replace("_study", "_\u0301study")
    (tmp_path / "wikiart" / paths[2]).rename(tmp_path / "wikiart" / spelling)
    other = examine(finished, tmp_path / "out", *folders_to_test(tmp_path))
    assert "2 of 5 test paintings" in "\n".join(other.lines)
    right = sum(row["class"] == row["predicted"] for row in tested.predictions[2:])
    assert f"({right} of 3 paintings; " in other.lines[-1]
    assert [row["path"] for row in other.predictions] == [spelling, *paths[3:]]
    assert [row["predicted"] for row in other.predictions] == [
        row["predicted"] for row in tested.predictions[2:]]
    assert len(other.outliers) == 38


@pytest.mark.parametrize("resumed", [False, True])
def test_margins_follow_their_paintings(finished, tested, tmp_path, resumed):
    """To a disk with another spelling; where a run was resumed there, the last epoch knows it."""
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    best = tm.load_checkpoint(finished.out / "model_best.pth")
    path = min(best["split"]["train"])
    spelling = path.replace("_study", "_\u0301study")
    (tmp_path / "wikiart" / path).rename(tmp_path / "wikiart" / spelling)
    if resumed:
        for holder in (best["split"]["train"], best["margins"]):
            holder[spelling] = holder.pop(path)
        torch.save(best | {"corrected": {spelling: 0}}, tmp_path / "model_last.pth")
    other = examine(finished, tmp_path, "--data-dir", str(tmp_path / "wikiart"))
    margins = {row["path"]: row["margin"] for row in other.outliers}
    before = {row["path"]: row["margin"] for row in tested.outliers}
    assert margins == {spelling if name == path else name: value
                       for name, value in before.items()}
    assert ("1 labels were changed" in page_of(tmp_path).text) == resumed


WRITTEN = ("report.html", "scores.json", "predictions.csv", "probabilities.npy", "outliers.csv",
           "near_copies.csv", "features.npy", "features.csv", "classes.csv", "confusion.csv")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_refused_file_leaves_the_scores_printed(finished, tested, tmp_path, capsys, monkeypatch,
                                                  name):
    """A spreadsheet has it open: a warning names it, and all others are written."""
    refuse_to_replace(name, monkeypatch)
    refused = examine(finished, tmp_path)
    assert refused.lines[-1] == tested.lines[-1]
    assert len(refused.lines) == len(tested.lines)
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(tmp_path / name) in warning and "Permission denied" in warning
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_best.pth", *WRITTEN} - {name}


def refuse_to_replace(name, monkeypatch):
    """Let nothing be moved to a file of this name, and nobody wait for it."""
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == name:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)


# ----------------------------------------------------------------------------------- your pictures


def test_your_pictures(finished, tested, tmp_path, capsys, monkeypatch):
    path = tested.predictions[0]["path"]
    original = finished.folder / "wikiart" / path
    (tmp_path / "some/more").mkdir(parents=True)
    with Image.open(original) as image:
        image.convert("RGBA").save(tmp_path / "some/more/x y.png")
        image.save(tmp_path / "some/z.avif", quality=95)
    (tmp_path / "some/notes.txt").write_text("skipped")
    (tmp_path / "some/folder.jpg").mkdir()
    (tmp_path / "some/.ipynb_checkpoints").mkdir()
    shutil.copy(original, tmp_path / "some/.ipynb_checkpoints")
    names = [str(original), f"{tmp_path}/some/more/x y.png", f"{tmp_path}/some/z.avif"]
    assert test_model.main([*tested.flags, str(original), str(tmp_path / "some")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"1 ({tmp_path}/some/notes.txt)" in first
    assert [line.rpartition(": ")[0] for line in lines] == names
    rows = read(tested.out / "own_pictures.csv")
    assert [row["picture"] for row in rows] == names
    for line, row in zip(lines, rows):
        pairs = re.findall(r"(\w+) (\d+\.\d)%", line.rpartition(": ")[2])
        assert len(pairs) == 5 and sum(float(share) for _, share in pairs) == pytest.approx(
            100, abs=0.3)
        columns = list(zip(*[iter(list(row.values())[1:])] * 2))
        assert [name for name, _ in columns] == [name for name, _ in pairs]
        assert [100 * float(share) for _, share in columns] == pytest.approx(
            [float(share) for _, share in pairs], abs=0.06)
        assert float(row["probability"]) == pytest.approx(
            float(tested.predictions[0]["probability"]), abs=0.003 if row is rows[0] else 0.05)
    assert rows[0]["class"] == tested.predictions[0]["predicted"]
    best = test_model.likeliest_classes(original, *test_model.load_best(tested.out), most=2)
    assert best == [(rows[0][f"class{n}"], pytest.approx(float(rows[0][f"probability{n}"]),
                                                         abs=1e-5)) for n in ("", "_2")]


def test_your_pictures_by_pattern_and_odd_names(finished, tested, tmp_path):
    original = finished.folder / "wikiart" / tested.predictions[0]["path"]
    shutil.copy(original, tmp_path / "p[1].jpg")
    assert test_model.main([*tested.flags, str(tmp_path / "p[1].jpg")]) == 0
    rows = read(tested.out / "own_pictures.csv")
    assert [row["picture"] for row in rows] == [f"{tmp_path}/p[1].jpg"]
    more = ["--batch-size", "1", f"{original.parent}/*.jpg"]  # which no shell has resolved
    assert test_model.main([*tested.flags, *more]) == 0
    assert len(read(tested.out / "own_pictures.csv")) == 8


def test_a_refused_table_of_your_pictures_is_a_warning(finished, tested, capsys, monkeypatch):
    (tested.out / "own_pictures.csv").unlink(missing_ok=True)
    refuse_to_replace("own_pictures.csv", monkeypatch)
    picture = str(finished.folder / "wikiart" / tested.predictions[0]["path"])
    assert test_model.main([*tested.flags, picture]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{picture}: ") and "own_pictures.csv" in captured.err
    assert not (tested.out / "own_pictures.csv").exists()


def test_a_bad_picture_does_not_stop_the_others(finished, tested, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("text")
    os.mkfifo(tmp_path / "pipe.jpg")
    good = str(finished.folder / "wikiart" / tested.predictions[0]["path"])
    names = [str(tmp_path / "bad.jpg"), good, "nowhere.jpg", str(tmp_path / "pipe.jpg")]
    assert test_model.main([*tested.flags, *names]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(good) and captured.out.count("%\n") == 1
    for name in (names[0], names[2], names[3]):
        assert f"{name}: " in captured.err
    assert re.fullmatch("error: 3 of 4 .*", captured.err.strip().splitlines()[-1])
    assert [row["picture"] for row in read(tested.out / "own_pictures.csv")] == [good]


def test_nothing_to_classify_is_an_error(tested, tmp_path, capsys):
    (tested.out / "own_pictures.csv").write_text("of an earlier command")
    assert test_model.main([*tested.flags, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: " in error and "error: 1 of 1 " in error
    assert (tested.out / "own_pictures.csv").read_text() == "of an earlier command"
    assert test_model.main([*tested.flags, ""]) == 1
    assert "error: " in capsys.readouterr().err
