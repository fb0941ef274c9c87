"""Testing: metrics against scikit-learn, predictions, outliers, one's own pictures."""

import csv
import itertools
import json
import os
import re
import shutil
import warnings
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from bs4 import BeautifulSoup
from PIL import Image
from scipy.stats import gmean, rankdata

import test_model
import train_model as tm
from tests.conftest import QUICK, folders
from tests.paintings import paint_artgan, write_lists


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
    yield "certain", 100 * sure, labels
    confidence, predicted = logits.double().softmax(1).max(1)
    even = (15 * confidence).ceil() % 2 == 0
    yield "right in every other bin", logits, torch.where(even, predicted, (predicted + 1) % 9)
    never = torch.cat([sure, torch.full((300, 1), -99.0)], 1)
    yield "a class that nothing names", never, labels


@pytest.mark.parametrize("logits,labels", [case[1:] for case in cases()],
                         ids=[case[0] for case in cases()])
def test_scores_are_those_of_scikit_learn(logits, labels):
    scores, predicted = test_model.score(logits, labels), logits.argmax(1).numpy()
    classes, truth = range(logits.shape[1]), labels.numpy()
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(
        sk.f1_score(truth, predicted, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted but not in the list
        assert scores["balanced_accuracy"] == pytest.approx(
            sk.balanced_accuracy_score(truth, predicted))
    expected = sk.precision_recall_fscore_support(truth, predicted, labels=list(classes),
                                                  zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "count"), expected):
        assert scores[name] == pytest.approx(values), name
    assert (scores["confusion"] == sk.confusion_matrix(truth, predicted, labels=classes)).all()
    if len(classes) > 5:
        assert scores["top5"] == pytest.approx(
            sk.top_k_accuracy_score(truth, logits.numpy(), k=5, labels=list(classes)))
    assert scores["calibration_error"] == pytest.approx(calibration_error(logits, truth), abs=1e-9)
    low, high = scores["interval"]
    assert 0 <= low <= scores["accuracy"] <= high <= 1


def calibration_error(logits, truth):
    """Return the expected calibration error bin by bin, as its definition reads."""
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    total = 0
    for place in range(15):
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_the_interval_is_wilsons():
    assert test_model.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert test_model.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert test_model.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_the_yardsticks():
    split = {"train": {"A/x_1.jpg": 0, "A/x_2.jpg": 0, "B/x_3.jpg": 1, "B/y_1.jpg": 1},
             "validation": {"B/y_2.jpg": 1},
             "test": {"A/y_8.jpg": 0, "A/y_9.jpg": 0, "A/y_4.jpg": 0, "A/q_9.jpg": 0}}
    labels = {"A/x_9.jpg": 0, "A/x_8.jpg": 0, "B/y_7.jpg": 1, "A/unknown_6.jpg": 0,
              "B/other_5.jpg": 1}
    guesses = test_model.yardsticks(labels, split, "style")
    assert list(guesses.values()) == pytest.approx([3 / 5, 4 / 5])
    assert list(test_model.yardsticks(labels, split, "artist").values()) == [3 / 5]


@pytest.mark.parametrize("attribute,largest,share", [("style", 16.0, 81.0), ("genre", 21.7, 58.7)])
def test_the_artists_name_guesses_artgans_classes(shared, attribute, largest, share):
    _, labels, test_list = tm.read_lists(shared / "artgan_lists/zip", attribute)
    tested = {path: labels[path] for path in test_list}
    train = {path: label for path, label in labels.items() if path not in test_list}
    guesses = test_model.yardsticks(tested, {"train": train, "validation": {}}, attribute)
    assert [100 * guess for guess in guesses.values()] == pytest.approx([largest, share], abs=0.06)


# ------------------------------------------------------------------------------ the files it writes


@pytest.fixture(scope="module")
def tested(finished, tmp_path_factory):
    """Return a tested copy of the finished run: its OUTPUT_DIR, flags, and rows of both tables."""
    out = tmp_path_factory.mktemp("tested")
    shutil.copy(finished.out / "model_best.pth", out)
    places = folders(finished.folder)
    flags = [*places[:2], *places[4:6], "--output-dir", str(out)]
    assert test_model.main([*flags, "--workers", "0"]) == 0
    return out, flags, read(out / "predictions.csv"), read(out / "outliers.csv")


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def small_copy(finished, path):
    """Open the small copy of a painting."""
    return Image.open(next((finished.folder / "small").rglob(path)))


@pytest.mark.parametrize("views,places", [("1", [0.5]), ("3", [0, 0.5, 1])])
def test_predictions_are_those_of_a_forward_pass(finished, tested, tmp_path, views, places):
    """Rebuilt here from the checkpoint and the small copies alone, one square at a time."""
    out, flags, _, _ = tested
    run = torch.load(out / "model_best.pth", weights_only=True)
    model = tm.ArtClassifier(5)
    model.load_state_dict(run["model"])
    names = run["class_names"]
    model.eval()
    close = 0.01  # half precision against float32
    shutil.copy(out / "model_best.pth", tmp_path)
    more = ["--output-dir", str(tmp_path), "--workers", "0", "--views", views]
    assert test_model.main([*flags, *more]) == 0
    predictions = read(tmp_path / "predictions.csv")
    assert [row["path"] for row in predictions] == list(run["split"]["test"])
    for row in predictions:
        logits = []
        with small_copy(finished, row["path"]) as image, torch.no_grad():
            for place in places:
                pixels = torch.from_numpy(np.array(tm.square(image, 64, place)))[None]
                logits.append(model(tm.to_images(pixels, torch.device("cpu")))[0])
        share = torch.stack(logits).mean(0).softmax(0)
        given = names.index(row["class"])
        assert row["class"] == finished.painted[row["path"]]
        assert share[names.index(row["predicted"])] >= share.max() - close
        assert float(row["probability"]) == pytest.approx(share.max().item(), abs=close)
        assert float(row["class_probability"]) == pytest.approx(share[given].item(), abs=close)
        above, near = (share > share[given] + close).sum(), (share > share[given] - close).sum()
        assert 1 + above <= int(row["class_rank"]) <= near


def test_the_central_square_is_scored_too(tested, tmp_path, capsys):
    """As the only view, it gives the accuracy that is printed for it beside that of three."""
    shutil.copy(tested[0] / "model_best.pth", tmp_path)
    said = {}
    for views in "13":
        more = ["--output-dir", str(tmp_path), "--workers", "0", "--views", views]
        assert test_model.main([*tested[1], *more]) == 0
        said[views] = re.findall(r"(?:alone|Test accuracy): (\S+ %)", capsys.readouterr().out)
    assert said["1"][0] == said["1"][1] == said["3"][0]


def test_numbers_do_not_depend_on_batches_or_workers(tested, tmp_path):
    out, flags, predictions, _ = tested
    for batch, workers in ((1, 0), (2, 2)):
        shutil.copy(out / "model_best.pth", tmp_path)
        more = ["--batch-size", str(batch), "--workers", str(workers)]
        assert test_model.main([*flags, *more, "--output-dir", str(tmp_path)]) == 0
        rows = read(tmp_path / "predictions.csv")
        for row, other in zip(predictions, rows, strict=True):
            assert (row["path"], row["predicted"]) == (other["path"], other["predicted"])
            assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=5e-3)


def test_every_painting_of_the_run_is_an_outlier_once(tested):
    """The classes in their order, the most doubtful first; and no more than the setting says."""
    out, flags, predictions, _ = tested
    assert test_model.main([*flags, "--workers", "0", "--outliers-per-class", "99"]) == 0
    rows, run = read(out / "outliers.csv"), tm.load_checkpoint(out / "model_best.pth")
    assert list(rows[0]) == [
        "path", "class", "part", "doubt", "rank", "margin", "fits_better", "class_probability",
        "witness", "witness_paintings", "witness_share", "witness_class"]
    assert {row["path"]: row["part"] for row in rows} == {
        path: part for part in tm.PARTS for path in run["split"][part]}
    assert len(rows) == 40 and sorted(int(row["rank"]) for row in rows) == list(range(1, 41))
    order = [(run["class_names"].index(row["class"]), -float(row["doubt"])) for row in rows]
    assert order == sorted(order)
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    assert [float(row["doubt"]) for row in by_rank] == sorted(
        (float(row["doubt"]) for row in rows), reverse=True)
    by_path = {row["path"]: row for row in rows}
    for row in predictions:
        doubted = by_path[row["path"]]
        assert doubted["fits_better"] != row["class"]
        assert (float(doubted["margin"]) > 0) == (row["predicted"] != row["class"])
        if row["predicted"] != row["class"]:
            assert doubted["fits_better"] == row["predicted"]
        assert float(doubted["class_probability"]) == pytest.approx(
            float(row["class_probability"]), abs=2e-6)
    assert test_model.main([*flags, "--workers", "0", "--outliers-per-class", "2"]) == 0
    assert read(out / "outliers.csv") == [
        row for name in run["class_names"] for row in rows if row["class"] == name
        and row in [other for other in rows if other["class"] == name][:2]]


def test_the_witness_was_counted():
    """Of seven paintings by x, four are of class 0; z has one alone; nobody painted class 3."""
    labels = {"A/x_1.jpg": 0, "A/x_2.jpg": 0, "A/x_3.jpg": 0, "A/x_4.jpg": 0, "B/x_5.jpg": 1,
              "B/x_6.jpg": 1, "C/x_7.jpg": 2, "B/y_1.jpg": 1, "C/y_2.jpg": 2, "C/z_1.jpg": 2,
              "C/nameless.jpg": 2}
    parts = list(labels.items())
    split = {"train": dict(parts[:5]), "validation": dict(parts[5:7]), "test": dict(parts[7:])}
    testify = test_model.make_witness(split, "style", ["a", "b", "c", "d"])
    prior = [4 / 11, 3 / 11, 4 / 11]
    names = ("witness", "witness_paintings", "witness_share", "witness_class",
             "witness_class_paintings", "score")

    def said(path, label, testify=testify):
        return [testify(path, label)[name] for name in names]

    assert said("C/x_7.jpg", 2) == [
        "x", 6, 0, "a", 4, pytest.approx(np.log((4 + prior[0]) / (0 + prior[2])))]
    assert said("A/x_1.jpg", 0) == [
        "x", 6, 3 / 6, "b", 2, pytest.approx(np.log((2 + prior[1]) / (3 + prior[0])))]
    assert said("B/y_1.jpg", 1)[:5] == ["y", 1, 0, "c", 1]
    for alone in ("C/z_1.jpg", "C/nameless.jpg"):
        assert said(alone, 2)[:5] == ["", 0, "", "", 0] and np.isnan(said(alone, 2)[5])
    of_folder = test_model.make_witness(split, "artist", ["a", "b", "c", "d"])
    assert said("B/x_5.jpg", 1, of_folder)[:4] == ["B", 2, 1, ""]


def test_doubt_is_as_defined():
    """By scipy's ranks and geometric mean; without a witness it is the rank of the margin."""
    chance, names = np.random.default_rng(4), ["a", "b", "c"]
    labels = {part: {f"S/artist-{chance.integers(9)}_{part}-{n}.jpg": int(chance.integers(3))
                     for n in range(50)} for part in tm.PARTS}
    labels["train"]["S/nameless.jpg"] = 1
    margins = {part: chance.normal(size=len(labels[part])) for part in tm.PARTS}
    noted = {part: torch.tensor([[3 * margin, 1.5, 0, 3] for margin in margins[part]])
             for part in ("train", "validation")}
    noted["train"][7] = 0  # it was not used
    run = {"class_names": names, "split": labels, "margins": noted,
           "settings": {"ATTRIBUTE": "style"}}
    compared = torch.tensor([[margin, 0.5, 0] for margin in margins["test"]])
    rows = test_model.find_outliers(run, labels["test"], compared)
    unused = list(labels["train"])[7]
    assert {row["path"] for row in rows} == {
        path for part in tm.PARTS for path in labels[part]} - {unused}
    testify, doubts, scores = test_model.make_witness(labels, "style", names), {}, {}
    for part in tm.PARTS:
        used = [(path, margin) for path, margin in zip(labels[part], margins[part])
                if path != unused]
        for (path, _), rank in zip(used, rankdata([margin for _, margin in used])):
            doubts[path] = (rank - 0.5) / len(used)
            scores[path] = testify(path, labels[part][path])["score"]
    heard = [path for path, value in scores.items() if not np.isnan(value)]
    assert set(doubts) - set(heard) == {"S/nameless.jpg"}
    for path, rank in zip(heard, rankdata([scores[path] for path in heard])):
        trust = 1 - (rank - 0.5) / len(heard)
        doubts[path] = 1 - gmean([1 - doubts[path], trust, trust])
    for path, rank in zip(heard, rankdata([doubts[path] for path in heard])):
        doubts[path] = (rank - 0.5) / len(heard)
    assert [row["doubt"] for row in rows] == pytest.approx(sorted(doubts.values(), reverse=True))
    for row in rows:
        assert row["doubt"] == pytest.approx(doubts[row["path"]])
        assert row["class_probability"] == 0.5


def test_a_cameras_names_are_no_witness():
    """IMG_1.jpg, IMG_2.jpg and so on: who made over two thirds of all is no artist."""
    labels = {f"A/IMG_{n}.jpg": n % 2 for n in range(30)} | {"A/x_1.jpg": 0, "A/x_2.jpg": 1}
    testify = test_model.make_witness({"train": labels}, "style", ["a", "b"])
    assert np.isnan(testify("A/IMG_1.jpg", 1)["score"])
    assert testify("A/x_1.jpg", 0)["witness_class"] == "b"


def test_twins_are_listed():
    """Of three files of one name, one is of the same class as another; numbers are no twins."""
    split = {"train": {"A/x_1.jpg": 0, "B/x_1.jpg": 1, "A/y_1.jpg": 0}, "validation": {},
             "test": {"C/x_1.jpg": 1, "B/y_2.jpg": 1} | {f"{n}/7.jpg": n % 2 for n in range(6)}}
    assert test_model.find_twins(split, ["a", "b"]) == [
        {"path": "A/x_1.jpg", "class": "a", "twin": "B/x_1.jpg", "twin_class": "b"},
        {"path": "A/x_1.jpg", "class": "a", "twin": "C/x_1.jpg", "twin_class": "b"}]


SIMILAR = {"Impressionism": "Post_Impressionism", "Post_Impressionism": "Impressionism",
           "High_Renaissance": "Northern_Renaissance", "Northern_Renaissance": "High_Renaissance",
           "Cubism": "Synthetic_Cubism", "Synthetic_Cubism": "Cubism", "Fauvism": "Expressionism",
           "Symbolism": "Art_Nouveau_Modern", "Art_Nouveau_Modern": "Symbolism",
           "Rococo": "Romanticism", "Romanticism": "Realism", "Realism": "Romanticism"}


def test_planted_labels_are_found_in_the_whole_collection(shared, tmp_path):
    """Twice 5 % of the real subset's labels are wrong; a tiny network, 3 epochs, 64 pixels."""
    subset = shared / "artgan_subset"
    names, labels, test_list = tm.read_lists(subset / "wikiart_csv", "style")
    chance, used = np.random.default_rng(0), sorted(set(labels.values()))
    planted = chance.choice(sorted(labels), (2, len(labels) // 20), replace=False).tolist()
    flipped = labels.copy()
    for path in planted[0]:  # any other style
        flipped[path] = int(chance.choice([label for label in used if label != labels[path]]))
    for path in planted[1]:
        flipped[path] = names.index(SIMILAR.get(names[labels[path]], "Symbolism"))
    write_lists(tmp_path / "lists", "style", names,
                [row for row in flipped.items() if row[0] not in test_list],
                [row for row in flipped.items() if row[0] in test_list])
    places = ["--data-dir", str(subset / "wikiart"), "--output-dir", str(tmp_path / "out"),
              "--small-dir", str(tmp_path / "small"), "--workers", "0", "--batch-size", "32"]
    flags = [*QUICK, *places, "--lists-dir", str(tmp_path / "lists"), "--epochs", "3"]
    assert tm.main(flags) == 0
    assert test_model.main([*places, "--outliers-per-class", "9999", "--views", "1"]) == 0
    doubt = {row["path"]: float(row["doubt"]) for row in read(tmp_path / "out/outliers.csv")}
    assert doubt.keys() == labels.keys() and len(labels) == 1670
    right = labels.keys() - {path for paths in planted for path in paths}
    for paths, least in zip(planted, (0.85, 0.72)):
        truth = [*[True] * len(paths), *[False] * len(right)]
        found = sk.roc_auc_score(truth, [doubt[path] for path in (*paths, *right)])
        assert found >= least, found


def test_outliers_have_their_pictures_on_a_fresh_disk(finished, tested, tmp_path):
    """Those of training too, whose small copies testing does not need."""
    shutil.copy(tested[0] / "model_best.pth", tmp_path)
    places = ["--data-dir", f"{finished.folder}/wikiart", "--small-dir", str(tmp_path / "small"),
              "--output-dir", str(tmp_path), "--workers", "0"]
    assert test_model.main(places) == 0
    page = BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")
    shown = {image["alt"] for image in page.select("figure img")}
    assert len(page.select("figure")) == len(page.select("figure img")) and len(shown) > 25
    run = tm.load_checkpoint(tmp_path / "model_best.pth")
    for path in run["split"]["train"]:
        if (copy := tmp_path / "small/92" / path).exists():
            copy.write_bytes(copy.read_bytes()[:200])  # damaged after it was made
    assert test_model.main(places) == 0
    page = BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")
    assert 0 < len(page.select("figure img")) < len(page.select("figure"))


def test_the_reason_is_the_motif_that_decides():
    """On a blurred ground a square of one of four colours decides, .22 wide, or that there is none.

    Without that fifth class, one of the four would be what the model names where it sees nothing.
    """
    chance, size, wide = np.random.default_rng(0), 64, 14
    labels, places = torch.arange(350) % 5, chance.integers(0, size - wide, (350, 2))
    colours = torch.tensor([(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)])
    pixels = torch.zeros(350, size, size, 3, dtype=torch.uint8)
    for image, label, (left, top) in zip(pixels, labels, places.tolist()):
        ground = Image.fromarray(chance.integers(90, 150, (5, 5, 3), dtype=np.uint8))
        image[:] = torch.from_numpy(np.array(ground.resize((size, size))))
        if label < 4:
            image[top : top + wide, left : left + wide] = colours[label]
    images = tm.to_images(pixels, torch.device("cpu"))
    torch.manual_seed(0)
    model = tm.ArtClassifier(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in itertools.count(1):
        rows = torch.from_numpy(chance.integers(0, 300, 32))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
        if step % 15 == 0:
            with torch.inference_mode():
                predicted = model.eval()(images[300:]).argmax(1)
            if (predicted == labels[300:]).float().mean() >= 0.95:
                break
    tested = [number for number in range(300, 350) if labels[number] < 4]
    reasons = [test_model.find_reason(pixels[n], labels[n], model) for n in tested]
    off = size * np.array(reasons) - places[tested]
    assert ((off >= 0) & (off <= wide)).all(1).mean() >= 0.8


def test_the_frame_is_round_the_patch():
    """Of a picture of 320 x 160, the model sees a square of 140 in the middle."""
    image = Image.new("RGB", (320, 160), "grey")
    test_model.frame(image, 0.5, 0.25)
    down, across = np.nonzero(np.asarray(image)[..., 0] == 255)
    assert (across.min(), across.max(), down.min(), down.max()) == (139, 181, 24, 66)


class Page(HTMLParser):
    """Collect what a page holds, and fail where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.images = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("img", "meta", "br", "wbr", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def check_page(content):
    """Return the parsed page after checking that it stands alone."""
    page = Page(content.decode("utf-8"))
    names = {tag for tag, _ in page.tags}
    assert {"h1", "h2", "table", "caption", "figure", "img"} <= names
    assert not {"script", "link", "iframe", "object", "b onclick"} & names
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
    assert all(image["alt"] for image in page.images)
    return page


def test_the_page_of_a_run(tested):
    out, _, predictions, _ = tested
    page = check_page((out / "report.html").read_bytes())
    text = " ".join(page.text.split())
    right = sum(row["class"] == row["predicted"] for row in predictions)
    assert f"{100 * right / 5:.2f}%" in text and f"{right} of 5 paintings" in text
    assert {row["path"] for row in predictions} <= {image["alt"] for image in page.images}
    for words in ("always naming the commonest style", "the artist's usual style, by the file name",
                  "Learning curve", "1 of 2 epochs were trained", "One epoch was trained: training",
                  "Macro-F1", "Precision", "drawn by painting: 30 for train", "--image-size 64",
                  "--epochs 2"):
        assert words in text, words


HOSTILE = ["<script>alert(1)</script>", 'a" onerror="x', "b'&amp;</td>", "new\nline",
           "\udce9\udcff", "x" * 200, "\u202egnp.exe", "100%"]


def test_a_page_of_27_classes_with_hostile_names(tmp_path):
    """Names from disk stay text, and the page of ArtGAN's size stays under 6 MB."""
    names = [f"{HOSTILE[n % len(HOSTILE)]} {n}" for n in range(27)]
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 27, (24_421,), generator=random)
    logits = torch.randn(24_421, 27, generator=random)
    paths = [f"{HOSTILE[n % 6]}/{HOSTILE[n % len(HOSTILE)]}{n}.jpg".replace("</", "<|")
             for n in range(24_421)]
    given = dict(zip(paths, labels.tolist()))
    run = {"class_names": names, "split": {"train": {}, "validation": {}, "test": given},
           "margins": {part: torch.zeros(0, 4) for part in ("train", "validation")}}
    run["settings"] = {"ATTRIBUTE": "<i>"}
    predictions = test_model.predict(given, logits, names)
    outliers = test_model.find_outliers(run, given, tm.compare(logits, labels))
    noise = Image.effect_noise((420, 320), 80).convert("RGB")
    shown = [row for name in names
             for row in [row for row in outliers if row["class"] == name][:test_model.GALLERY]]
    sure = sorted(predictions, key=lambda row: -row["probability"])
    for right in (True, False):
        shown += [row for row in sure if (row["class"] == row["predicted"]) == right][:6]
    for row in shown:
        place = os.path.join(os.fsencode(tmp_path), os.fsencode(tm.small_name(row["path"])))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        noise.save(place, "JPEG")
    settings = dict.fromkeys(tm.SETTINGS, "<b>") | {"ATTRIBUTE": "<i>", "GROUP_BY": "painting"}
    row = {"epoch": 1, "training_loss": 1.0, "validation_loss": 2.0, "validation_accuracy": 0.5,
           "seconds": 60.0}
    run |= {"history": [row] * 3, "settings": settings, "split_source": "<s>", "device": "<u>",
            "versions": {"torch": "<u>"}}
    results = {"scores": test_model.score(logits, labels) | {"centre": 0.3}, "twins": [],
               "guesses": {"always naming the commonest style": 0.1}, "outliers": outliers,
               "predictions": predictions, "epoch": 1}
    test_model.write_report(tmp_path / "report.html", run, results, tmp_path)
    content = (tmp_path / "report.html").read_bytes()
    assert len(content) < 6_000_000
    page = check_page(content)
    assert "<script>alert(1)</script> 0" in page.text
    assert len(page.images) == 27 * test_model.GALLERY + 12
    assert not {"i onclick", "u", "s"} & {tag for tag, _ in page.tags}


COUNTED = [  # given class, predicted class, by how much
    (0, 0, 3.0), (0, 0, 2.0), (0, 1, 1.5), (0, 1, 0.5), (0, 2, 2.5), (0, 2, 0.8), (1, 1, 1.0),
    (1, 0, 0.7), (1, 1, 4.0), (1, 1, 1.1), (2, 2, 2.0), (2, 1, 1.2)]


@pytest.fixture
def counted(tmp_path, monkeypatch, capsys):
    """Write the results of twelve paintings that can be counted by hand; return all that is said.

    Each picture's small copy is of a grey of its own; two of the three epochs of the run are in the
    best checkpoint, the third in the last one. The central square of each says the second class.
    """
    names, test = ["Cubism", "Naive_Art", "Ukiyo_e"], {}
    logits = torch.tensor([[0, -0.01, -0.02]] * 12)
    for place, (given, predicted, strength) in enumerate(COUNTED):
        logits[place, predicted] += strength
        path = f"{names[given]}/{'a' if place in (0, 1, 2, 3, 7) else 'z'}_{place}.jpg"
        test[path] = given
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40 + place, 30), (20 * place,) * 3).save(tmp_path / path)
    second = torch.tensor([0.0, 64.0, 0.0])
    views = torch.stack([logits - second, logits + second, logits])
    history = [
        {"epoch": epoch, "training_loss": a, "validation_loss": b, "validation_accuracy": c,
         "seconds": 2000.0}
        for epoch, a, b, c in ((1, 3.0, 2.9, 0.2), (2, 2.0, 2.2, 0.6), (3, 1.0, 2.5, 0.5))]
    train = {f"Cubism/a_{n}.jpg": 0 for n in range(50, 55)}
    train |= {f"Naive_Art/b_{n}.jpg": 1 for n in range(15)}
    validation = {f"Naive_Art/b_{n}.jpg": 1 for n in range(15, 19)}
    run = {
        "class_names": names, "history": history[:2], "split_source": "drawn by painting",
        "settings": tm.SETTINGS | {"ATTRIBUTE": "a style", "EPOCHS": 3},
        "split": {"train": train, "validation": validation,
                  "test": test | {"Cubism/missing_1.jpg": 0}},
        "margins": {"train": torch.zeros(20, 4), "validation": torch.zeros(4, 4)},
        "device": "cpu, torch.float32", "versions": {"torch": "9.9"}}
    monkeypatch.setattr(test_model, "GALLERY", 2)
    model = tm.ArtClassifier(3).eval()
    settings = SimpleNamespace(output_dir=tmp_path, data_dir=tmp_path, outliers_per_class=3)

    def write(last):
        """Write the results where model_last.pth has this history; return the page."""
        last = {"history": last, "margins": run["margins"], "settings": run["settings"]}
        monkeypatch.setattr(tm, "load_checkpoint", lambda _: last)
        test_model.write_results(dict(run), model, test, views, tmp_path, settings)
        return BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")

    page, printed = write(history), capsys.readouterr().out.splitlines()
    return SimpleNamespace(page=page, printed=printed, folder=tmp_path, history=history,
                           write=write)


def texts(tags):
    return [" ".join(tag.get_text(" ", strip=True).split()) for tag in tags]


def cells(table):
    return [texts(row.find_all(["th", "td"])) for row in table.find_all("tr")]


def test_what_is_printed_was_counted(counted):
    assert counted.printed == [
        "model of epoch 2, a style, 3 classes; validation accuracy 60.00 %",
        "macro-F1: 48.15 %",
        "balanced accuracy: 52.78 %",
        counted.printed[3],
        "accuracy of the central square alone: 33.33 %",
        "yardsticks, which look at no picture: always naming the commonest a style: 50.0 %; the "
        "artist's usual a style, by the file name: 58.3 %",
        "model and witness agree on another class for 0 of 12 paintings; 0 pairs have one name in "
        "two classes",
        f"page to look at: {counted.folder}/report.html; beside it, for programs: scores.json, "
        "predictions.csv, outliers.csv, twins.csv, classes.csv, confusion.csv",
        "1 of 13 test paintings are missing or cannot be read",
        "95 % interval of the test accuracy: 25.38 to 74.62 %",
        "Test accuracy: 50.00 % (6 of 12 paintings)"]
    assert counted.printed[3].startswith("expected calibration error: ")


def test_the_tables_for_programs_were_counted(counted):
    scores = json.loads((counted.folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["accuracy"] == 0.5 and scores["centre"] == pytest.approx(1 / 3)
    assert [scores[name] for name in ("right", "paintings", "listed", "epoch")] == [6, 12, 13, 2]
    assert scores["interval"] == pytest.approx([0.2538, 0.7462], abs=1e-4)
    assert list(scores["guesses"].values()) == pytest.approx([0.5, 7 / 12])
    assert read(counted.folder / "classes.csv") == [
        {"class": "Cubism", "paintings": "6", "precision": "0.666667", "recall": "0.333333",
         "f1": "0.444444"},
        {"class": "Naive_Art", "paintings": "4", "precision": "0.5", "recall": "0.75", "f1": "0.6"},
        {"class": "Ukiyo_e", "paintings": "2", "precision": "0.333333", "recall": "0.5",
         "f1": "0.4"}]
    assert (counted.folder / "confusion.csv").read_text(encoding="utf-8") == (
        ",Cubism,Naive_Art,Ukiyo_e\nCubism,2,2,2\nNaive_Art,1,3,0\nUkiyo_e,0,1,1\n")


def test_the_tables_of_the_page_were_counted(counted):
    page = counted.page
    assert page.find("h1").find("b").get_text() == "50.00%"
    words = " ".join(page.find("header").get_text().split())
    assert "interval, marked on the bar, is 25.4% to 74.6%" in words
    assert "By the central square of each alone, as others test, it is 33.33%" in words
    assert texts(page.select(".bars > div")) == [
        "this model 50.0%", "always naming the commonest a style 50.0%",
        "the artist's usual a style, by the file name 58.3%"]
    assert page.select_one(".bars i")["style"] == "left:25.38%;width:49.24%"
    assert texts(page.select("header ~ dl b"))[:2] == ["48.1%", "52.8%"]  # of three no top five
    assert cells(page.find("table", "classes")) == [
        ["Class", "Paintings", "Precision", "Recall", "F1"],
        ["Naive Art", "4", "50.0%", "75.0%", "60.0%"],
        ["Cubism", "6", "66.7%", "33.3%", "44.4%"],
        ["Ukiyo e", "2", "33.3%", "50.0%", "40.0%"]]
    matrix = page.find("table", "matrix")
    assert cells(matrix) == [["", "Cubism", "Naive Art", "Ukiyo e"], ["Cubism", "2", "2", "2"],
                             ["Naive Art", "1", "3", ""], ["Ukiyo e", "", "1", "1"]]
    assert [cell.get("style") for cell in matrix.find_all("td")][3:5] == ["--s:0.44", "--s:0.84"]
    assert texts(matrix.select(".right")) == ["2", "3", "1"]
    assert texts(page.select("ol li")) == [
        "Cubism → Naive Art : 2 , 33.3% of Cubism", "Cubism → Ukiyo e : 2 , 33.3% of Cubism",
        "Naive Art → Cubism : 1 , 25.0% of Naive Art",
        "Ukiyo e → Naive Art : 1 , 50.0% of Ukiyo e"]


def test_the_drawings_of_the_page_were_counted(counted):
    loss, accuracy = counted.page.find_all("svg")
    assert loss["aria-label"] == "Loss, validation: 2.20 in epoch 2"
    assert accuracy["aria-label"] == "Accuracy, validation: 60.00% in epoch 2"
    lines = {line["class"][0]: line["points"] for line in loss.find_all("polyline")}
    assert lines == {"training": "50.0 115.0 220.0 145.0 390.0 175.0",
                     "validation": "50.0 118.0 220.0 139.0 390.0 130.0"}
    assert [dot["transform"] for dot in loss.find_all("circle")] == [
        "translate(220.0 139.0)", "translate(220.0 145.0)"]
    assert loss.select_one(".best")["d"] == "M220.0 48V205"
    assert {"0", "1", "5", "to 3"} <= set(texts(loss.find_all("text")))
    assert accuracy.find("polyline")["points"] == "50.0 175.0 220.0 115.0 390.0 130.0"
    _, alone = counted.write(counted.history[::-1]).find_all("svg")  # the last is of another run
    assert alone.find("polyline")["points"] == "50.0 175.0 390.0 115.0"


def test_the_gallery_shows_the_right_paintings(counted):
    """First the surest, right and wrong; then two of each class, in the order of outliers.csv."""
    figures = counted.page.select(".hang figure")
    heads = texts(counted.page.find_all("h3"))
    assert heads == ["Right", "Wrong", "Most often confused: given → predicted",
                     "Model and witness agree", "Cubism", "Naive Art", "Ukiyo e"]
    rows = read(counted.folder / "outliers.csv")
    assert {row["path"].rpartition("_")[2] for row in rows[:3]} <= {f"{n}.jpg" for n in range(6)}
    margins = {4: 2.48, 2: 1.49, 5: 0.78, 7: 0.71, 6: -0.99, 9: -1.09, 11: 1.21, 10: -1.98}
    assert {int(row["path"].rpartition("_")[2][:-4]) for row in rows} >= {7, 6, 11, 10}
    for row in rows:
        place = int(row["path"].rpartition("_")[2][:-4])
        if place in margins:
            assert float(row["margin"]) == pytest.approx(margins[place], abs=1e-4)
    expected = [8, 0, 1, 10, 9, 6, 4, 2, 11, 5, 7, 3]  # by the size of what was added
    expected += [int(row["path"].rpartition("_")[2][:-4]) for row in
                 (*rows[:2], *rows[3:5], *rows[6:])]
    for figure, place in zip(figures, expected, strict=True):
        image = Image.open(BytesIO(b64decode(figure.img["src"].partition(",")[2])))
        assert image.size == (40 + place, 30)
        assert np.median(image) == pytest.approx(20 * place, abs=3)  # beside a frame
        assert figure.img["alt"].endswith(f"_{place}.jpg")
    said = texts(figure.figcaption for figure in figures)
    assert said[0] == "Naive Art 96.5% z : 8" and said[6].startswith("Ukiyo e 85.7%, given Cubism")
    fourth = next(words for words in said[12:] if words.endswith("z : 4"))
    assert "Ukiyo e fits better, the given class has 7.2% (test)" in fourth
    assert "another class likelier than the given one" in " ".join(counted.page.get_text().split())
    assert "For 6 of 12 paintings" in " ".join(counted.page.get_text().split())


def test_the_page_says_how_it_was_made(counted):
    words = " ".join(counted.page.get_text().split())
    assert ("The split is drawn by painting: 20 for train, 4 for validation, 13 for test. Of the "
            "last, 12 were tested and 1 are missing") in words
    commands = counted.page.find("code").get_text("\n").splitlines()
    assert "3 of 3 epochs were trained, in 1 h 40 min, on cpu, torch.float32; epoch 2 is" in words
    assert commands == ['python train_model.py --epochs 3 --attribute "a style"',
                        "python test_model.py"]
    assert "torch 9.9" in texts([counted.page.find_all("dl")[-1]])[0]


def test_planted_labels_are_found(tmp_path):
    """5 % of the labels of painted pictures are flipped; the margin finds them again."""
    names = ["Color_Field_Painting", "Cubism", "Impressionism", "Pointillism", "Ukiyo_e"]
    painted = paint_artgan(tmp_path / "wikiart", each=60, size=(100, 80))
    paths = sorted(painted)
    labels = np.array([names.index(painted[path]) for path in paths])
    random = np.random.default_rng(1)
    flipped = np.zeros(len(paths), bool)
    flipped[random.choice(len(paths), len(paths) // 20, replace=False)] = True
    given = np.where(flipped, (labels + random.integers(1, 5, len(paths))) % 5, labels)

    features = []
    for path in paths:  # colours and their contrast at 4 x 4 places: enough for painted styles
        image = Image.open(tmp_path / "wikiart" / path).resize((64, 64))
        cells = np.asarray(image, float).reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, -1, 3)
        features.append(np.concatenate([cells.mean(1).ravel(), cells.std(1).ravel()]) / 64)
    features = torch.tensor(np.array(features), dtype=torch.float32)
    learned = torch.arange(len(paths)) % 2 == 0  # one half teaches, the other is judged; and back
    margins, doubts = np.zeros(len(paths)), np.zeros(len(paths))
    for half in (learned, ~learned):
        torch.manual_seed(0)
        model = torch.nn.Linear(features.shape[1], 5)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(model(features[half]),
                                                     torch.tensor(given)[half])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        judged = (~half).numpy()
        with torch.no_grad():
            logits = model(features[~half])
        probability = logits.softmax(1).amax(1)
        margins[judged] = tm.compare(logits, torch.tensor(given)[~half])[:, 0]
        doubts[judged] = -probability
    assert sk.roc_auc_score(flipped, margins) >= 0.95
    worst = np.argsort(-margins)[: flipped.sum()]
    assert flipped[worst].mean() >= 0.75
    assert sk.roc_auc_score(flipped, doubts) < sk.roc_auc_score(flipped, margins)


# -------------------------------------------------------------------- another machine, own pictures


def test_another_machine_needs_the_checkpoint_and_the_paintings(finished, tested, tmp_path, capsys):
    """Only the test paintings are there, one under another spelling, one gone, one broken."""
    out, _, predictions, _ = tested
    shutil.copy(out / "model_best.pth", tmp_path)
    paths = [row["path"] for row in predictions]
    for path in paths:
        (tmp_path / "wikiart" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished.folder / "wikiart" / path, tmp_path / "wikiart" / path)
    (tmp_path / "wikiart" / paths[0]).unlink()
    (tmp_path / "wikiart" / paths[1]).write_bytes(b"broken")
    spelling = paths[2].replace("_", "_\u0301")
    (tmp_path / "wikiart" / paths[2]).rename(tmp_path / "wikiart" / spelling)
    flags = [*folders(tmp_path)[:2], *folders(tmp_path)[4:6], "--output-dir", str(tmp_path)]
    assert test_model.main([*flags, "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "2 of 5 test paintings are missing or cannot be read"
    right = sum(row["class"] == row["predicted"] for row in predictions[2:])
    assert re.fullmatch(rf"Test accuracy: .* % \({right} of 3 paintings\)", lines[-1])
    rows = read(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == [spelling, *paths[3:]]
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in predictions[2:]]


def test_outputs_that_are_not_finite_are_no_result(finished, tested, tmp_path, capsys):
    best = tm.load_checkpoint(tested[0] / "model_best.pth")
    best["model"]["linear.bias"][0] = torch.nan
    torch.save(best, tmp_path / "model_best.pth")
    more = ["--workers", "0", "--output-dir", str(tmp_path)]
    assert test_model.main([*tested[1], *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: test: the model's outputs are not finite"
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["model_best.pth"]


def test_ones_own_pictures(finished, tested, tmp_path, capsys):
    out, flags, predictions, _ = tested
    path = predictions[0]["path"]
    original = finished.folder / "wikiart" / path
    (tmp_path / "some/more").mkdir(parents=True)
    Image.open(original).convert("RGBA").save(tmp_path / "some/more/x y.png")
    (tmp_path / "some/notes.txt").write_text("passed over")
    (tmp_path / "some/folder.jpg").mkdir()
    (tmp_path / "some/.ipynb_checkpoints").mkdir()
    shutil.copy(original, tmp_path / "some/.ipynb_checkpoints")
    assert test_model.main([*flags, str(original), str(tmp_path / "some")]) == 0
    first, *lines, written = capsys.readouterr().out.splitlines()
    assert written == f"written to {out}/own_pictures.csv"
    assert first.endswith(f"passed over: 1 ({tmp_path}/some/notes.txt)")
    assert len(lines) == 2 and lines[1].startswith(f"{tmp_path}/some/more/x y.png: ")
    pairs = re.findall(r"(\w+) (\d+\.\d)%", lines[0].rpartition(": ")[2])
    assert len(pairs) == 5 and pairs[0][0] == predictions[0]["predicted"]
    assert float(pairs[0][1]) == pytest.approx(100 * float(predictions[0]["probability"]), abs=0.3)
    assert sum(float(share) for _, share in pairs) == pytest.approx(100, abs=0.3)
    rows = read(out / "own_pictures.csv")
    assert list(rows[0])[:5] == ["picture", "class", "probability", "class_2", "probability_2"]
    assert [row["picture"] for row in rows] == [str(original), f"{tmp_path}/some/more/x y.png"]
    assert rows[0]["class"] == pairs[0][0] and len(rows[0]) == 11
    assert float(rows[0]["probability"]) == pytest.approx(float(pairs[0][1]) / 100, abs=1e-3)
    shutil.copy(original, tmp_path / "p[1].jpg")
    assert test_model.main([*flags, str(tmp_path / "p[1].jpg")]) == 0
    assert [row["picture"] for row in read(out / "own_pictures.csv")] == [f"{tmp_path}/p[1].jpg"]
    more = ["--batch-size", "1", f"{original.parent}/*.jpg"]  # which no shell has resolved
    assert test_model.main([*flags, *more]) == 0
    assert len(read(out / "own_pictures.csv")) == 8


def test_a_bad_picture_does_not_stop_the_others(finished, tested, tmp_path, capsys):
    _, flags, predictions, _ = tested
    (tmp_path / "bad.jpg").write_text("text")
    os.mkfifo(tmp_path / "pipe.jpg")
    good = str(finished.folder / "wikiart" / predictions[0]["path"])
    names = [str(tmp_path / "bad.jpg"), good, "nowhere.jpg", str(tmp_path / "pipe.jpg")]
    assert test_model.main([*flags, *names]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(good) and len(captured.out.splitlines()) == 2
    assert f"{tmp_path}/bad.jpg: " in captured.err and "nowhere.jpg: " in captured.err
    last = captured.err.strip().splitlines()[-1]
    assert last == "error: 3 of 4 pictures could not be read"


def test_nothing_to_classify_is_an_error(tested, tmp_path, capsys):
    (tested[0] / "own_pictures.csv").write_text("of an earlier command")
    assert test_model.main([*tested[1], str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: cannot be read: no regular file, or a folder without pictures" in error
    assert "error: 1 of 1 pictures could not be read" in error
    assert (tested[0] / "own_pictures.csv").read_text() == "of an earlier command"
    assert test_model.main([*tested[1], ""]) == 1
    assert "error: the command names an empty path" in capsys.readouterr().err
