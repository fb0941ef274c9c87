"""Test the best checkpoint of train_model.py on paintings that it has never seen.

    python test_model.py                      scores, tables and report.html
    python test_model.py photo.jpg folder/    the likeliest classes of your pictures instead
    python test_model.py --help               every setting as a flag

Reads model_best.pth in OUTPUT_DIR, which names the test paintings, those paintings, and the later
epochs in model_last.pth if it exists. Writes to OUTPUT_DIR report.html, a page to look at;
outliers.csv, all paintings, those that look mislabelled first; near_copies.csv, the most similar
pairs; and for programs scores.json, predictions.csv and, with rows in the same order,
probabilities.npy (N, classes), classes.csv, confusion.csv, features.csv and features.npy (N, 2048).

    main                    settings: those of train_model.py, the constants below, and flags
      run_test
        load_best             the run and its model
        prepare_test          {path: label} of the test paintings, {path: resized copy}
        predict_views         logits of three crops of each
        write_results         scores -> outliers -> tables -> page -> terminal
        find_neighbours       features of all -> near copies -> page with neighbours
      classify_own_pictures
"""

import contextlib
import functools
import glob
import html
import io
import itertools
import json
import math
import os
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

import train_model
from train_model import InputError, printable, style, write_extra

# ---------------------------------------------------------------------------------------- settings
# DATA_DIR, CACHE_DIR, OUTPUT_DIR, BATCH_SIZE and WORKERS are those of train_model.py.

VIEWS = 3  # crops of a painting whose logits are averaged: 1 is the centre, 3 adds both ends
NEIGHBOURS = 3  # most similar paintings below one that looks mislabelled; 0 skips the search

PLACES = {1: [0.5], 3: [0, 0.5, 1]}  # of the crops along the long side, from start to end

# -------------------------------------------------------------------------------------------- test


def run_test(settings):
    """Test the best model on its test paintings, or classify the pictures that are named."""
    if settings.views not in PLACES:
        raise InputError(f"VIEWS must be 1 or 3, not {settings.views}")
    run, model = train_model.broadcast_from_first(load_best, settings.output_dir)
    settings.image_size = run["settings"]["IMAGE_SIZE"]
    if settings.pictures:
        train_model.broadcast_from_first(classify_own_pictures, run, model, settings)
        return
    labels, copies = train_model.broadcast_from_first(prepare_test, run, settings)
    views = predict_views(model, labels, copies, settings)
    results = train_model.broadcast_from_first(write_results, run, labels, views, copies, settings)
    if settings.neighbours:
        find_neighbours(run, model, results, copies, settings)
    train_model.broadcast_from_first(print_accuracy, results, settings.output_dir)


def load_best(output_dir):
    """Return the best run of a folder, with its "class_names", and its model, ready to test."""
    file = Path(output_dir) / "model_best.pth"
    if not file.exists():
        raise InputError(f"{file} is missing: bring it back, or run train_model.py first")
    run = train_model.load_checkpoint(file)
    model = train_model.ArtClassifier(len(run["class_names"]))
    train_model.load_weights(model, run.pop("model"), file)
    return run, model.eval()


def prepare_test(run, settings):
    """Return {path: label} of the test paintings, and {path: resized copy} of all, on this disk."""
    with contextlib.suppress(OSError, InputError):  # the later epochs, if available
        last = train_model.load_checkpoint(settings.output_dir / "model_last.pth")
        if last["history"][: len(run["history"])] == run["history"]:
            names = ("history", "settings", "margins", "split", "corrected")
            run |= {name: last[name] for name in names}
    found = train_model.find_paintings(settings.data_dir)
    train_model.locate_paintings(run, found)
    test, everything = run["split"]["test"], set().union(*run["split"].values())
    copies, _ = train_model.resize_paintings(
        sorted(everything.intersection(found)), settings.data_dir, settings.cache_dir,
        settings.image_size)
    labels = {path: label for path, label in test.items() if path in copies}
    if not labels:
        raise InputError(f"none of the {len(test):,} test paintings is in {settings.data_dir}, "
                         f"where the first is {found[0]}: is that the right --data-dir?")
    return labels, copies


def predict_views(model, labels, copies, settings):
    """Return the logits (views, N, classes) of the paintings {path: label}, on the CPU."""
    device, logits = train_model.place_on_device(model), []
    for number, place in enumerate(PLACES[settings.views], 1):
        loader = train_model.make_loader(labels, copies, settings, device, place=place)
        title = f"test, crop {number} of {settings.views}"
        logits.append(train_model.evaluate(model, loader, title))
    return torch.stack(logits)


def write_results(run, labels, views, copies, settings):
    """Write and print what the logits (views, N, C) of the tested paintings say; return it."""
    folder, class_names = settings.output_dir, run["class_names"]
    best = run["history"][train_model.best_epoch(run["history"]) - 1]
    logits, truth = views.mean(0), torch.tensor(list(labels.values()))
    probabilities = logits.double().softmax(1)
    margins = dict(run["margins"])
    train_model.update_margins(margins, labels, train_model.label_margins(logits, truth), True)
    results = {
        "epoch": best["epoch"], "validation_accuracy": best["validation_accuracy"],
        **score(logits, truth),
        "centre_accuracy": (views[len(views) // 2].argmax(1) == truth).double().mean().item(),
        "baselines": baselines(labels, run["split"], run["settings"]["ATTRIBUTE"]),
        "listed": len(run["split"]["test"]),
        "predictions": predict(labels, logits, probabilities, class_names),
        "probabilities": probabilities.float().numpy(),
        "outliers": find_outliers(run, labels, margins), "near_copies": []}
    results["beats_guessing"] = results["interval"][0] > next(iter(results["baselines"].values()))
    results["agreed"], results["shown"] = select_outliers(
        [row for row in results["outliers"] if row["path"] in copies])
    write_tables(folder, class_names, results)
    write_extra(folder / "report.html", make_page(run, results, copies, settings))
    print_scores(run, results)
    return results


def print_scores(run, results):
    """Print the scores, beside their baselines, and what looks mislabelled."""
    attribute, classes = run["settings"]["ATTRIBUTE"], len(run["class_names"])
    print(f"{attribute}, {classes} classes; epoch {results['epoch']} of {len(run['history'])}, "
          f"validation accuracy {100 * results['validation_accuracy']:.2f} %")
    shares = {"accuracy": results["accuracy"]}
    shares |= {name: results[key] for key, name, _ in SCORES[classes <= 5:]}
    shares["accuracy with the centre crop only, as most papers report"] = results["centre_accuracy"]
    print("test " + "; ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items()))
    guesses = "; ".join(f"{name} {100 * share:.1f} %"
                        for name, share in results["baselines"].items())
    print(f"baselines that never look at the picture: {guesses}")
    agreed = sum(map(agree, results["outliers"]))
    print(f"{agreed:,} of {len(results['outliers']):,} paintings look mislabelled, by model and by "
          "artist (outliers.csv)")
    if missing := results["listed"] - results["paintings"]:
        print(f"{missing:,} of {results['listed']:,} test paintings are missing or cannot be read")


def print_accuracy(results, folder):
    """Print where the page is, and last the accuracy."""
    right, count, (low, high) = results["right"], results["paintings"], results["interval"]
    guess = "" if results["beats_guessing"] else " - no better than guessing"
    print(f"the page, with tables beside it:\n{printable(folder / 'report.html')}")
    print(f"Test accuracy: {100 * right / count:.2f} % ({right:,} of {count:,} paintings; 95 % "
          f"interval {100 * low:.1f} to {100 * high:.1f} %){guess}")


# ------------------------------------------------------------------------------------------ scores

SCORES = (  # beside the accuracy; with five classes or fewer, the first says nothing
    ("top5", "top-5 accuracy", "the label is among the five likeliest classes"),
    ("macro_f1", "macro-F1", "balances precision and recall; every class weighs the same"))


def score(logits, labels):
    """Return the scores of logits (N, C) against labels (N), N > 0, as a dictionary.

    accuracy, interval (95 %, Wilson 1927), top5 and macro_f1 (over the classes that occur) are in
    0..1; precision, recall, f1 (0 where undefined) and count are arrays (C,), confusion (C, C)
    counts with the label down and the predicted class across; right and paintings are counts.
    """
    count, classes = logits.shape
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.view(classes, classes).numpy()
    hits, labelled, named = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(named, 1), hits / np.maximum(labelled, 1)
    f1 = 2 * hits / np.maximum(labelled + named, 1)
    top5 = logits.topk(min(5, classes)).indices == labels[:, None]
    return {
        "accuracy": hits.sum().item() / count, "interval": wilson(hits.sum().item(), count),
        "top5": top5.any(1).double().mean().item(),
        "macro_f1": f1[labelled + named > 0].mean().item(),
        "right": hits.sum().item(), "paintings": count,
        "precision": precision, "recall": recall, "f1": f1, "count": labelled,
        "confusion": confusion}


def wilson(right, count):
    """Return the 95 % interval of a share, (low, high) in 0..1, after Wilson (1927)."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def baselines(labels, split, attribute):
    """Return the accuracy of guesses on {path: label} that never look at the picture.

    The second names the commonest class, outside the test, of the artist in the file name.
    """
    counts = defaultdict(Counter)
    for part in ("train", "validation"):
        for path, label in split[part].items():
            for name in {train_model.artist(path), ""}:  # "" is all of them
                counts[name][label] += 1
    commonest = {artist: max(sorted(count), key=count.get) for artist, count in counts.items()}
    guesses = [commonest.get(train_model.artist(path), commonest[""]) for path in labels]
    shares = {f"always the commonest {attribute}":
              max(Counter(labels.values()).values()) / len(labels)}
    if attribute != "artist":
        shares[f"each artist's usual {attribute}, from the file name"] = (
            np.mean(np.equal(guesses, list(labels.values()))).item())
    return shares


def predict(labels, logits, probabilities, class_names):
    """Return a row of predictions.csv for each of {path: label}, from its logits (N, C)."""
    label = torch.tensor(list(labels.values()))[:, None]
    columns = {
        "path": labels,
        "class": [class_names[place] for place in labels.values()],
        "predicted": [class_names[place] for place in logits.argmax(1)],
        "probability": probabilities.amax(1).tolist(),
        "class_probability": probabilities.gather(1, label)[:, 0].tolist(),
        "class_rank": (1 + (logits > logits.gather(1, label)).sum(1)).tolist()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ------------------------------------------------------------------------------------ label errors


def make_prior(split, attribute, class_names):
    """Return a function of (path, label): how the artist's other paintings are labelled.

    Where artists are the classes, it is those of the folder. score: log share of the likeliest
    other class minus that of the label, smoothed by one painting of the whole; 0 if unknown.
    """
    name_of = style if attribute == "artist" else train_model.artist
    one = np.eye(len(class_names), dtype=int)  # a painting of each class
    counts = defaultdict(lambda: 0 * one[0])
    for labels in split.values():
        for path, label in labels.items():
            counts[name_of(path)] += one[label]
    everything = sum(counts.values())

    def prior(path, label):
        name, others = name_of(path), counts[name_of(path)] - one[label]  # without the painting
        total = int(others.sum())
        if not name or not 0 < total < 2 / 3 * everything.sum():  # a name on most is no artist
            return {"prior_paintings": 0, "prior_class": "", "score": 0.0}
        shares = np.log((others + everything / everything.sum()).clip(1e-12) / (total + 1))
        best = np.where(one[label], -np.inf, shares).argmax()
        return {"prior": name, "prior_paintings": total, "prior_share": others[label] / total,
                "prior_class": class_names[best] if others[best] else "",
                "prior_class_share": others[best] / total, "score": shares[best] - shares[label]}

    return prior


def find_outliers(run, tested, margins):
    """Return a row for each painting, those most likely to be mislabelled first.

    tested: {path: label} of the test; margins: see `train_model.update_margins`. doubt adds the
    margin, standardised within its part, and the log odds of the artist prior, at least -1. The
    margin's weight is the log of how many errors the commonest class makes for each of the model's.
    """
    class_names, split, rows = run["class_names"], run["split"], []
    prior = make_prior(split, run["settings"]["ATTRIBUTE"], class_names)
    paintings = len(split["validation"])
    commonest = max(Counter(split["validation"].values()).values()) / paintings
    accuracy = max(row["validation_accuracy"] for row in run["history"])
    baseline, errors = (max(1 - share, 1 / paintings) for share in (commonest, accuracy))
    weight = max(0.01, math.log(baseline / errors))
    for part, labels in (split | {"test": tested}).items():
        paths = [path for path in labels if path in margins]
        values = np.array([margins[path][1] - margins[path][0] for path in paths] or [0.0])
        standard = (values - values.mean()) / (values.std() or 1)  # training's are smaller
        for path, value, margin in zip(paths, standard.tolist(), values.tolist()):
            own, others, other, _ = margins[path]  # log probabilities, and a label
            row = {"path": path, "class": class_names[labels[path]], "part": part,
                   "margin": margin, "class_probability": math.exp(own),
                   "model_class": class_names[other], "model_probability": math.exp(others),
                   **prior(path, labels[path])}
            rows.append(row | {"doubt": weight * value + max(row["score"], -1)})
    return sorted(rows, key=lambda row: (-row["doubt"], row["path"]))


def agree(row):
    """Return whether model and artist prior name the same other class, and both are sure."""
    return (row["margin"] > 0 and row["model_class"] == row["prior_class"]
            and row["prior_paintings"] >= 20
            and row["prior_share"] < 0.05 and row["prior_class_share"] > 0.5)


NEAR_COPIES = 100  # pairs of each kind in near_copies.csv, or one for each 50 paintings if more


def find_neighbours(run, model, results, copies, settings):
    """Compare the feature vectors of all paintings, and write what they show."""
    rows = [row for row in results["outliers"] if row["path"] in copies]
    device, labels = next(model.parameters()).device, {row["path"]: 0 for row in rows}
    loader = train_model.make_loader(labels, copies, settings, device)
    normalize = torch.nn.functional.normalize
    model.read_rows = lambda feature_map: normalize(feature_map.mean((2, 3))).half()
    features = train_model.evaluate(model, loader, "features of all paintings")
    train_model.broadcast_from_first(write_neighbours, run, results, rows, features.to(device),
                                     copies, settings)


def write_neighbours(run, results, rows, features, copies, settings):
    """Write the features (N, 2048) of rows, their near copies, and the page with neighbours."""
    folder = settings.output_dir
    write_array(folder / "features.npy", features.cpu().numpy())
    write_extra(folder / "features.csv", train_model.csv_table(("path", "part", "class"), rows))
    features = features.float()
    results["near_copies"] = find_near_copies(rows, features)
    columns = ("path", "class", "part", "copy", "copy_class", "copy_part", "similarity")
    write_extra(folder / "near_copies.csv", train_model.csv_table(columns, results["near_copies"]))
    if results["near_copies"]:
        print(f"{describe_copies(results['near_copies'])} (near_copies.csv)")
    places = {row["path"]: place for place, row in enumerate(rows)}
    for row in itertools.chain(results["agreed"], results["shown"]):
        similarity = features @ features[places[row["path"]]]
        nearest = similarity.topk(min(settings.neighbours + 1, len(rows))).indices.tolist()
        others = [rows[place] for place in nearest if rows[place] is not row]
        row["neighbours"] = others[: settings.neighbours]
    write_extra(folder / "report.html", make_page(run, results, copies, settings))


def find_near_copies(rows, features):
    """Return the most similar pairs of rows, of two classes first, then of one, two parts first.

    features: (N, C), L2-normalised. Of each painting the five most similar later rows count.
    """
    classes = torch.tensor(np.unique([row["class"] for row in rows], return_inverse=True)[1])
    classes, most = classes.to(features.device), max(NEAR_COPIES, len(rows) // 50)
    pairs = {False: [], True: []}  # by whether they are of one class
    for start in range(0, len(rows), 128):  # 128 x 81,446 similarities take 42 MB
        similarity = (features[start : start + 128] @ features[start:].T).triu(1)
        same = classes[start : start + 128, None] == classes[start:]
        for kind in pairs:
            best = similarity.where(same == kind, 0).topk(min(5, similarity.shape[1]))
            for a, (values, others) in enumerate(zip(*(x.tolist() for x in best)), start):
                pairs[kind] += [(value, a, start + b) for value, b in zip(values, others) if value]
            pairs[kind] = sorted(pairs[kind], reverse=True)[:most]
    found = [{"path": rows[a]["path"], "class": rows[a]["class"], "part": rows[a]["part"],
              "copy": rows[b]["path"], "copy_class": rows[b]["class"],
              "copy_part": rows[b]["part"], "similarity": value}
             for values in pairs.values() for value, a, b in values]
    return sorted(found, key=lambda pair: [pair["class"] == pair["copy_class"],
                                           pair["part"] == pair["copy_part"]])


def describe_copies(pairs):
    """Return how similar the most similar pairs are, and how many share what, in words."""
    similar = [pair["similarity"] for pair in pairs]
    classes = sum(pair["class"] != pair["copy_class"] for pair in pairs)
    leaks = sum({pair["part"], pair["copy_part"]} == {"train", "test"} for pair in pairs)
    return (f"the {len(pairs):,} most similar pairs ({min(similar):.2f} to {max(similar):.2f}, "
            f"identical is 1): {classes:,} span two classes, {leaks:,} training and test")


# ----------------------------------------------------------------------------------- your pictures


def likeliest_classes(pictures, run, model, most=5):
    """Return the likeliest classes of a picture file, pairs (class name, probability in 0..1).

    pictures: a path, or a list of paths, for which it returns a list. run, model: those of
    `load_best`. Raises nearly any error of Pillow where a picture cannot be read.
    """
    if isinstance(pictures, (str, os.PathLike)):
        return likeliest_classes([pictures], run, model, most)[0]
    named, size = [], run["settings"]["IMAGE_SIZE"]
    for start in range(0, len(pictures), 16):
        crops = [read_crops(Path(file), size, VIEWS) for file in pictures[start : start + 16]]
        named += name_classes(np.stack(crops), run, model, most)
    return named


def read_crops(file, image_size, views):
    """Return the crops of a picture that the model looks at, (views, S, S, 3) uint8."""
    copy = train_model.encode_copy(file, train_model.copy_side(image_size))
    with Image.open(io.BytesIO(copy)) as image:
        return np.stack([train_model.center_crop(image, image_size, place)
                         for place in PLACES[views]])


@torch.inference_mode()
def name_classes(crops, run, model, most=5):
    """Return for each picture of crops (N, views, S, S, 3) its likeliest (class, probability)."""
    device = next(model.parameters()).device
    images = train_model.to_images(torch.from_numpy(crops).flatten(0, 1), device)
    logits = model(images).cpu().double().unflatten(0, crops.shape[:2]).mean(1)
    best = logits.softmax(1).topk(min(most, len(run["class_names"])))
    return [[(run["class_names"][label], share) for label, share in zip(*pair)]
            for pair in zip(best.indices.tolist(), best.values.tolist())]


def find_own_pictures(names):
    """Return the pictures that the command names, and those in folders that it names."""
    files, others = [], []
    for name in names:
        if not name:
            raise InputError("the command names an empty path")
        found = [] if os.path.lexists(name) else sorted(glob.glob(name))  # as Windows does not
        for path in map(Path, found or [name]):
            inside = sorted(file for file in path.rglob("*") if not file.is_dir()
                            and "/." not in f"/{file.relative_to(path).as_posix()}")
            pictures = [file for file in inside
                        if file.name.lower().endswith(train_model.ENDINGS)]
            files += pictures or [path]
            others += [file for file in inside if file not in pictures]
    train_model.print_examples("skipped (not the ending of a picture)", others)
    return files


def classify_own_pictures(run, model, settings):
    """Print the likeliest classes of your pictures, and write them to own_pictures.csv."""
    def read(file):
        try:
            return read_crops(file, settings.image_size, settings.views)
        except Exception as error:  # of nearly any kind, from Pillow
            return printable(error) or type(error).__name__

    files, rows = find_own_pictures(settings.pictures), []
    step = max(1, settings.batch_size // settings.views)
    train_model.place_on_device(model)
    bar = train_model.progress_bar("your pictures", len(files))
    write = bar.write if sys.stderr.isatty() else print  # which would draw the bar again
    with bar, ThreadPoolExecutor(train_model.cores()) as pool:
        for start in range(0, len(files), step):
            batch = files[start : start + step]
            crops = list(pool.map(read, batch))
            good = [crop for crop in crops if not isinstance(crop, str)]
            named = iter(name_classes(np.stack(good), run, model) if good else [])
            for file, crop in zip(batch, crops):
                if isinstance(crop, str):
                    write(f"{printable(file)}: cannot be read: {crop}", file=sys.stderr)
                    continue
                best = next(named)
                words = ", ".join(f"{printable(name)} {share:.1%}" for name, share in best)
                write(f"{printable(file)}: {words}")
                rows.append([str(file), *itertools.chain(*best)])
            bar.update(len(batch))
    columns = ["picture", "class", "probability"]
    columns += [f"{kind}_{place}" for place in range(2, 6) for kind in columns[1:]]
    if rows:
        table = train_model.csv_table(columns, [dict(zip(columns, row)) for row in rows])
        write_extra(settings.output_dir / "own_pictures.csv", table)
    if len(rows) < len(files):
        raise InputError(f"{len(files) - len(rows)} of {len(files)} pictures could not be read")


# ---------------------------------------------------------------------------------- tables and page


def write_array(file, array):
    """Write an array as NumPy's .npy."""
    np.save(content := io.BytesIO(), array)
    write_extra(file, content.getbuffer())


def write_tables(folder, class_names, results):
    """Write what programs read: scores.json, and the tables as CSV."""
    plain = {name: value for name, value in results.items()
             if isinstance(value, (int, float, tuple, dict))}
    write_extra(folder / "scores.json", json.dumps(plain, indent=1, ensure_ascii=False))
    classes = ("precision", "recall", "f1")
    tables = {
        "predictions": (results["predictions"][0], results["predictions"]),
        "outliers": (("path", "class", "part", "doubt", "margin", "class_probability",
                      "model_class", "model_probability", "prior", "prior_paintings", "prior_share",
                      "prior_class"), results["outliers"]),
        "classes": (("class", "paintings", *classes), [
            {"class": name, "paintings": results["count"][label]}
            | {key: results[key][label].item() for key in classes}
            for label, name in enumerate(class_names)]),
        "confusion": (("", *class_names), [
            dict(zip(("", *class_names), (name, *counts)))
            for name, counts in zip(class_names, results["confusion"].tolist())])}
    write_array(folder / "probabilities.npy", results["probabilities"])
    for name, (columns, rows) in tables.items():
        write_extra(folder / f"{name}.csv", train_model.csv_table(columns, rows))


GALLERY, PICTURES = 6, 300  # paintings that the page shows of a class, and of all, at most
MATRIX = 28  # classes that its confusion matrix shows at most, as many as a printed page holds
CSS = """:root { color-scheme: light dark; --blue: 70 130 200;
  --soft: color-mix(in srgb, CanvasText 70%, Canvas); --line: rgb(128 128 128 / .35) }
* { box-sizing: border-box; min-width: 0; margin: 0; padding: 0 }
body { max-width: 76rem; margin: auto; padding: 2rem clamp(1rem, 4vw, 4rem); background: Canvas;
  color: CanvasText; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { font: 1.7rem/1.2 Georgia, serif } h1 b { display: block; font-weight: 400;
  font-size: clamp(3.5rem, 14vw, 7rem) }
h2 { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid } h3 { margin: 2rem 0 .8rem;
  font-size: 1.25rem } a { color: LinkText } nav { margin: 1.5rem 0 }
p, caption, figcaption { max-width: 46rem; margin: .8rem 0; text-align: left }
caption, figcaption, dd, .bars { color: var(--soft); font-size: .875rem }
ol { padding-left: 1.5rem } .scroll { overflow-x: auto }
.wide, .gallery, dl { display: grid; gap: 1.5rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 9.5rem)), 1fr)) }
.wide { --least: 22rem; gap: 1rem 4rem } .bars { align-self: end } .bars b { float: right }
.bars span { display: block; position: relative; height: 1rem; margin: .3rem 0 1rem;
  background: linear-gradient(90deg, rgb(var(--blue)) calc(var(--s)*100%), var(--line) 0) }
.bars i { position: absolute; inset: -.3rem auto; border: solid CanvasText; border-width: 0 2px }
svg { display: block; width: 100%; font: 13px system-ui, sans-serif; fill: var(--soft) }
path, polyline { fill: none; stroke: var(--line) } .best { stroke: CanvasText }
.training { stroke: var(--soft); stroke-dasharray: 5 4 } .validation { stroke: rgb(var(--blue)) }
polyline { stroke-width: 2 } .matrix .right { outline: 1px solid; outline-offset: -1px }
table { border-spacing: 0; font-variant-numeric: tabular-nums; line-height: 1.3 }
th, td { font-weight: 400; text-align: left; padding: .35rem .35rem .35rem 0 }
.classes { width: 100%; font-size: clamp(.7rem, 3vw, 1rem) }
.classes td, .classes th + th { text-align: right; white-space: nowrap }
.matrix { font-size: .75rem } .matrix td { min-width: 1.8rem; height: 1.55rem; padding: 0 .2rem;
  text-align: center; background: rgb(var(--blue) / calc(var(--s, 0) * .75)) }
.matrix th { min-width: 7rem } .matrix th + th { min-width: 0; vertical-align: bottom }
.matrix th span { max-height: 12rem; writing-mode: vertical-rl; transform: rotate(180deg) }
img { display: block; width: 100%; height: 10rem; object-fit: contain; object-position: 0 100% }
.nearest { display: flex; gap: .3rem; color: var(--soft); font-size: .62rem; line-height: 1.3;
  hyphens: auto }
.nearest div { flex: 1 } .nearest img { height: 3.5rem }
@media print { body { padding: 0; font-size: 10pt; print-color-adjust: exact } nav { display: none }
  .gallery { grid-template-columns: repeat(6, 1fr) } figure, tr { break-inside: avoid }
  .matrix { font-size: 5pt } .matrix td, .matrix th { min-width: 0 } }"""


def make_page(run, results, copies, settings):
    """Return all results as one HTML page that needs no other file, no script and no network."""
    originals = settings.data_dir  # from the page's folder, if they are on one drive
    if originals.drive == settings.output_dir.drive:
        originals = Path(os.path.relpath(originals, settings.output_dir))
    show = functools.partial(gallery, copies=copies, originals=originals.as_posix())
    names, attribute = [escaped(name) for name in run["class_names"]], run["settings"]["ATTRIBUTE"]
    title = f"{attribute}: {results['accuracy']:.1%} of {results['paintings']:,} test paintings"
    sections = {
        "Most confident": most_confident(results["predictions"], show),
        "Learning curve": learning_curve(run["history"]),
        "Class by class": class_table(names, results),
        "Confusions": confusions(names, results["confusion"]),
        "Paintings that look mislabelled": doubted(results, run["class_names"], show),
        "This run": this_run(run, results)}
    links = [f'<a href="#{n}">{name}</a>' for n, name in enumerate(sections)]
    parts = [f'<h2 id="{n}">{name}</h2>{body}\n' for n, (name, body) in enumerate(sections.items())]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escaped(title, "")}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CSS}</style></head><body><main>
{headline(attribute, names, results)}<nav>{" · ".join(links)}</nav>
{"".join(parts)}</main></body></html>
"""


def escaped(name, tag="bdi"):
    """Return a name as HTML that shows it, whatever it holds, with spaces for _."""
    words = html.escape(printable(name).replace("_", " "))
    return f"<{tag}>{words}</{tag}>" if tag else words


def facts(pairs):
    """Return terms and what is said of them, pairs of HTML, as a list."""
    return f"<dl>{''.join(f'<div><dt>{a}</dt><dd>{b}</dd></div>' for a, b in pairs)}</dl>"


def table(kind, caption, heads, rows):
    """Return a table of the rows (name, cells), all HTML."""
    top = "".join(f'<th scope="col"><span>{head}</span></th>' for head in heads)
    body = "".join(f'<tr><th scope="row">{name}</th>{cells}</tr>\n' for name, cells in rows)
    return (f'<table class="{kind}"><caption>{caption}</caption>\n<thead><tr>{top}</tr></thead>\n'
            f"<tbody>\n{body}</tbody></table>")


def headline(attribute, names, results):
    """Return the accuracy beside its baselines, and the other scores in a few words each."""
    accuracy, (low, high) = results["accuracy"], results["interval"]
    bars = [f'<div>{escaped(name)} <b>{share:.1%}</b><span style="--s:{share:.4f}">'
            for name, share in ({"this model": accuracy} | results["baselines"]).items()]
    bars[0] += f'<i style="left:{low:.2%};width:{high - low:.2%}"></i>'
    pairs = [(name[0].upper() + name[1:], f"<b>{results[key]:.1%}</b> {words}")
             for key, name, words in SCORES[len(names) <= 5:]]
    poor = "" if results["beats_guessing"] else """<p><b>No better than guessing, within the
margin of error: do not trust what the page says about single paintings.</b></p>"""
    return f"""<header class="wide"><div><h1>Test accuracy, {escaped(attribute)}
<b>{accuracy:.2%}</b></h1><p>The model named the labelled class, one of {len(names)}, for
{results["right"]:,} of {results["paintings"]:,} paintings it had never seen. For paintings like
these the 95% interval, marked on the bar, is {low:.1%} to {high:.1%}. With the centre crop only, as
most papers report, the accuracy is {results["centre_accuracy"]:.2%}.</p>{poor}</div>
<div class="bars">{"</span></div>".join(bars)}</span></div></div></header>
{facts(pairs)}"""


def most_confident(predictions, show):
    """Return the most confident predictions, right and wrong, one a class and six each."""
    def words(row):
        label = "" if row["predicted"] == row["class"] else f"labelled {escaped(row['class'])}; "
        return f"{label}model: {escaped(row['predicted'])} {row['probability']:.0%}"

    chosen = {True: {}, False: {}}
    for row in sorted(predictions, key=lambda row: (-row["probability"], row["path"])):
        chosen[row["predicted"] == row["class"]].setdefault(row["class"], row)
    right, wrong = (show(list(rows.values())[:6], words) for rows in chosen.values())
    return f"<h3>Right</h3>{right}<h3>Wrong</h3>{wrong}"


def learning_curve(history):
    """Return the losses and the validation accuracy of the epochs, as two drawings."""
    best = train_model.best_epoch(history)
    losses = {name: [row[f"{name}_loss"] for row in history] for name in ("validation", "training")}
    accuracy = {"validation": [100 * row["validation_accuracy"] for row in history]}
    return f"""<figure><div class="wide">{draw("Loss", "", losses, best)}
{draw("Accuracy", "%", accuracy, best)}</div><figcaption>Solid: validation, by which the best epoch
is chosen. Dashed: training. Epoch {best} is tested here.</figcaption></figure>"""


def draw(title, unit, lines, best):
    """Return a drawing (SVG, 400 x 230) of the lines {name: values}, one value an epoch."""
    count, highest = len(lines["validation"]), max(map(max, lines.values()))
    said = f"{title}, validation: {lines['validation'][best - 1]:.2f}{unit} in epoch {best}"
    step = 20 if unit else next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 100, math.inf)
                                if 5 * step >= highest)
    parts = [f'<path d="M50 {205 - 30 * n}H390"/><text x="42" y="{209 - 30 * n}" text-anchor="end">'
             f"{n * step:g}{unit}</text>" for n in range(6)]
    x = [50 + 340 * place / max(1, count - 1) for place in range(count)]
    for name, line in lines.items():
        points = [f"{a:.1f} {205 - 30 * value / step:.1f}" for a, value in zip(x, line)]
        parts.append(f'<polyline class="{name}" points="{" ".join(points)}"/>'
                     f'<circle transform="translate({points[best - 1]})" r="4"/>')
    return f"""<svg viewBox="0 0 400 230" role="img" aria-label="{said}">{"".join(parts)}
<text y="14" font-size="15">{said}</text><path class="best" d="M{x[best - 1]:.1f} 48V205"/>
<text x="50" y="225">epoch 1</text><text x="390" y="225" text-anchor="end">to {count}</text>
</svg>"""


def class_table(names, results):
    """Return the scores of each class as a table, the highest F1 first."""
    labelled, named, rows = results["count"], results["confusion"].sum(0), []
    defined = {"precision": named, "recall": labelled, "f1": labelled + named}
    for label in np.lexsort((-results["f1"], labelled == 0)):  # those never labelled come last
        cells = [f"<td>{results[key][label]:.1%}</td>" if defined[key][label] else "<td>–</td>"
                 for key in defined]
        rows.append((names[label], f"<td>{labelled[label]:,}</td>{''.join(cells)}"))
    caption = """Precision: the share of paintings predicted as the class that belong to it.
Recall: the share of the class that is found. F1: both in one; the highest comes first."""
    return table("classes", caption, ("Class", "Paintings", "Precision", "Recall", "F1"), rows)


def confusions(names, confusion):
    """Return the counts (C, C), labels down, as a heat map, and the largest confusions."""
    shares, rows = confusion / np.maximum(confusion.sum(1, keepdims=True), 1), []
    wrong, heat = confusion * ~np.eye(len(names), dtype=bool), shares**0.6  # for small shares too
    occurs = np.flatnonzero(confusion.sum(0) + confusion.sum(1)).tolist()
    errors = wrong.sum(0) + wrong.sum(1)
    shown = sorted(sorted(occurs, key=lambda label: -errors[label])[:MATRIX])
    for label in shown:
        cells = [f'<td{" class=right" * (named == label)} style="--s:{heat[label, named]:.2f}">'
                 f'{confusion[label, named] or ""}</td>' for named in shown]
        rows.append((names[label], "".join(cells)))
    worst = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:8], wrong.shape))
    pairs = [f"<li>{names[a]} → {names[b]}: <b>{wrong[a, b]:,}</b>, {shares[a, b]:.1%} of "
             f"{names[a]}</li>\n" for a, b in worst if wrong[a, b]]
    return f"""<h3>Largest: label → prediction</h3>
{f"<ol>{''.join(pairs)}</ol>" if pairs else "<p>None.</p>"}
<p>Deeper colour: a larger share of the row's paintings. Framed: right. Empty: 0. Of the
{len(occurs)} classes that are labelled or predicted, the {len(shown)} most confused.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">
{table("matrix", "Paintings by label (down) and prediction (across)",
["", *(names[label] for label in shown)], rows)}</div>"""


def gallery(rows, words, copies, originals):
    """Return paintings, rows with a path, with what a function says of each, as HTML."""
    def picture(path, side):
        name, jpeg = html.escape(printable(path)), io.BytesIO()
        with contextlib.suppress(OSError, KeyError):
            with Image.open(copies[path]) as copy:
                copy.thumbnail((side, side))
                copy.save(jpeg, "JPEG", quality=60, comment=b"")
            return (f'<a href="{quote(os.fsencode(f"{originals}/{path}"))}" title="{name}">'
                    f'<img src="data:image/jpeg;base64,{b64encode(jpeg.getvalue()).decode()}" '
                    f'alt="{name}"></a>')
        return ""

    figures = []
    for row in rows:
        artist, _, title = Path(row["path"]).stem.replace("-", " ").partition("_")
        name = f"{escaped(artist.title())}, {escaped(title, 'i')}" if title else escaped(artist)
        nearest = [f"<div>{picture(other['path'], 80)}{escaped(other['class'])}</div>"
                   for other in row.get("neighbours", ())]
        figures.append(f"<figure>{picture(row['path'], 200)}<figcaption>{name}<br>{words(row)}"
                       f'</figcaption><div class="nearest">{"".join(nearest)}</div></figure>')
    return f'<div class="gallery">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def caption(row):
    """Return what model and artist prior say of a painting, as HTML."""
    words = (f"labelled {escaped(row['class'])} {row['class_probability']:.0%} ({row['part']}); "
             f"model: {escaped(row['model_class'])} {row['model_probability']:.0%}")
    if row["prior_class"]:
        artist = escaped(row["prior"].replace("-", " ").title())
        words += (f"<br>{artist}: {row['prior_share']:.0%} of {row['prior_paintings']} others have "
                  f"this label, {row['prior_class_share']:.0%} {escaped(row['prior_class'])}")
    return words


def select_outliers(outliers):
    """Return the paintings to show: where model and artist agree, and the first of each class."""
    doubtful = [row for row in outliers if row["margin"] > 0
                or row["doubt"] > 0 and row["model_class"] == row["prior_class"]]
    shown, counts = [], Counter()
    for row in doubtful:
        counts[row["class"]] += 1
        shown += [row] if counts[row["class"]] <= GALLERY else []
    return [row for row in doubtful if agree(row)][:30], shown[:PICTURES]


def doubted(results, class_names, show):
    """Return the paintings most likely to be mislabelled, those on which both agree first."""
    shown, pairs = results["shown"], results["near_copies"]
    groups = {name: [row for row in shown if row["class"] == name] for name in class_names}
    parts = [f"<h3>{escaped(name)}</h3>\n{show(rows, caption)}\n"
             for name, rows in groups.items() if rows]
    similar = f"""Below each are the most similar paintings with their labels. In the whole
collection, {describe_copies(pairs)}.""" if pairs else ""
    return f"""<p>Of {len(results["outliers"]):,} paintings, training included, these are the most
likely to be mislabelled; all are in outliers.csv. The ranking combines the model's margin (for
training, that of early epochs), weighted by its validation accuracy, with the labels of the
artist's other paintings. They are worth a second look, no more. Expect false alarms: an artist's
early and late works stand out too. {similar}</p>
<h3>Start here: model and artist agree</h3><p>Both name the same other class, which more than half
of 20 or more other paintings by the artist have, and less than 5% this
label.</p>{show(results["agreed"], caption)}
{"".join(parts)}"""


def this_run(run, results):
    """Return what the model and this page were made with."""
    settings, split, history = run["settings"], run["split"], run["history"]
    sizes = ", ".join(f"{len(paintings):,} {part}" for part, paintings in split.items())
    spent = train_model.tqdm.format_interval(sum(row["seconds"] for row in history))
    words = (f"A ResNet-50 whose feature map an LSTM reads row by row was trained on "
             f"{settings['ATTRIBUTE']}: {len(history)} of {settings['EPOCHS']} epochs, in {spent}, "
             f"on {run['device']}, with torch {run['torch']}. Epoch {results['epoch']} is tested. "
             f"The split ({run['split_source']}): {sizes}. Of the last, "
             f"{results['listed'] - results['paintings']:,} are missing or cannot be read. Page "
             f"made on {time.strftime('%Y-%m-%d')}.")
    if run["corrected"]:
        tested = len(set(run["corrected"]).intersection(split["test"]))
        words += (f" {len(run['corrected']):,} labels were changed by {settings['CORRECTIONS']}; "
                  f"{tested:,} of them are test paintings, so this accuracy is of another test.")
    return f"""<p>{html.escape(printable(words))}</p>
{facts((name, html.escape(printable(value))) for name, value in settings.items())}"""


# ------------------------------------------------------------------------------------ command line


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    settings = {name: getattr(train_model, name) for name in train_model.SHARED}
    settings |= {"VIEWS": VIEWS, "NEIGHBOURS": NEIGHBOURS}
    parser = train_model.make_parser(__doc__, settings, train_model.__file__, __file__)
    parser.add_argument("pictures", nargs="*", help="classify these files and folders instead")
    return train_model.run_script(run_test, parser.parse_args(argv), "stopped")


if __name__ == "__main__":
    sys.exit(main())
