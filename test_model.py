"""Test the best checkpoint of train_model.py on paintings that it has not learned from.

    python test_model.py                      the scores, predictions.csv, outliers.csv, report.html
    python test_model.py photo.jpg folder/    the five likeliest classes of pictures of one's own
    python test_model.py --help               every setting as a flag

Reads   model_best.pth in OUTPUT_DIR, which names the test paintings, and those paintings; of
        model_last.pth, where it is there, the later epochs and what training noted in early ones.
Writes  into OUTPUT_DIR report.html (all of it to look at), outliers.csv (paintings that might not
        fit the class they are assigned to), twins.csv (those that two classes claim), and for
        programs scores.json, predictions.csv, classes.csv and confusion.csv; own_pictures.csv.
"""

import contextlib
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
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import train_model
from train_model import printable

# ---------------------------------------------------------------------------------------- settings
# DATA_DIR, SMALL_DIR, OUTPUT_DIR, BATCH_SIZE and WORKERS are those of train_model.py.

VIEWS = 3  # squares of a painting whose logits are averaged: 1 is the centre, 3 has both ends too
OUTLIERS_PER_CLASS = 20  # rows a class in outliers.csv, the most doubtful first

VIEW_PLACES = {1: [0.5], 3: [0, 0.5, 1]}  # along the long side, from its start to its end
SETTINGS = {name: train_model.SETTINGS[name] for name in train_model.SHARED}
SETTINGS |= {"VIEWS": VIEWS, "OUTLIERS_PER_CLASS": OUTLIERS_PER_CLASS}

# ------------------------------------------------------------------------------------------ scores

SCORES = (  # beside the accuracy; of five classes or less, the first says nothing
    ("top5", "top-5 accuracy", "the given class is among the five likeliest"),
    ("macro_f1", "macro-F1", "precision and recall in one; every class counts alike"),
    ("balanced_accuracy", "balanced accuracy", "recall, averaged over the classes"),
    ("calibration_error", "expected calibration error", "the gap between confidence and accuracy"))


def score(logits, labels):
    """Return the scores of logits (N, C) against labels (N), N > 0, as a dictionary.

    accuracy, interval (95 %, Wilson 1927), top5, macro_f1, balanced_accuracy (mean recall) and
    calibration_error (expected, in 15 bins; Naeini et al. 2015) are in 0..1; precision, recall, f1
    (0 where undefined) and count are arrays (C,), confusion (C, C) counts with the given class
    down and the predicted class across. Means are over the classes that occur.
    """
    count, classes = logits.shape
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    right = predicted == labels
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.view(classes, classes).numpy()
    hits, given, named = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(named, 1), hits / np.maximum(given, 1)
    f1 = 2 * hits / np.maximum(given + named, 1)
    bins = (confidence * 15).ceil().long() - 1
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, right.double() - confidence)
    top5 = logits.topk(min(5, classes)).indices == labels[:, None]
    return {
        "accuracy": right.double().mean().item(),
        "interval": wilson(int(right.sum()), count),
        "top5": top5.any(1).double().mean().item(),
        "macro_f1": f1[given + named > 0].mean().item(),
        "balanced_accuracy": recall[given > 0].mean().item(),
        "calibration_error": gaps.abs().sum().item() / count,
        "precision": precision, "recall": recall, "f1": f1, "count": given, "confusion": confusion}


def wilson(right, count):
    """Return the 95 % interval of a share, (low, high) in 0..1, after Wilson (1927)."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    shrink = 1 + z * z / count
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def yardsticks(labels, split, attribute):
    """Return the accuracy of guesses on {path: label} that look at no picture, {name: share}.

    One always names the commonest class of the test; the other goes by the artist in the file name,
    to his commonest class outside the test, or to the commonest of all. Where artists are the
    classes, that would be the answer.
    """
    counts = defaultdict(Counter)
    for part in ("train", "validation"):
        for path, label in split[part].items():
            counts[train_model.artist(path)][label] += 1
            counts[""][label] += 1
    commonest = {artist: max(sorted(count), key=count.get) for artist, count in counts.items()}
    guesses = [commonest.get(train_model.artist(path), commonest[""]) for path in labels]
    shares = {f"always naming the commonest {attribute}":
              max(Counter(labels.values()).values()) / len(labels)}
    if attribute != "artist":
        shares[f"the artist's usual {attribute}, by the file name"] = (
            np.mean(np.equal(guesses, list(labels.values()))).item())
    return shares


def predict(labels, logits, class_names):
    """Return a row of predictions.csv for each painting of {path: label} and its logits (N, C)."""
    label = torch.tensor(list(labels.values()))[:, None]
    probabilities = logits.double().softmax(1)
    columns = {
        "path": labels,
        "class": [class_names[place] for place in labels.values()],
        "predicted": [class_names[place] for place in logits.argmax(1)],
        "probability": probabilities.amax(1).tolist(),
        "class_probability": probabilities.gather(1, label)[:, 0].tolist(),
        "class_rank": (1 + (logits > logits.gather(1, label)).sum(1)).tolist(),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---------------------------------------------------------------------------------------- outliers


def make_witness(split, attribute, class_names):
    """Return a function of (path, label) that says what else is known of who made a painting.

    The witness is the artist in its file name, or the folder where artists are the classes. His
    other paintings speak: the function returns a dictionary of his name, their number, the share of
    them that has the label, the class that most of the rest have, how many have that, and the
    score: its log share minus that of the given label, each smoothed by one painting of the whole's
    shares; NaN where there are no others. The higher, the more he doubts the label.
    """
    witness_of = train_model.style if attribute == "artist" else train_model.artist
    one = np.eye(len(class_names), dtype=int)  # a painting of each class
    counts = defaultdict(lambda: 0 * one[0])
    for labels in split.values():
        for path, label in labels.items():
            counts[witness_of(path)] += one[label]
    everything = sum(counts.values())

    def testify(path, label):
        others = counts[witness_of(path)] - one[label]  # the painting itself left out
        total = int(others.sum())
        named = attribute == "artist" or "_" in train_model.file_name(path)
        if not (named and 0 < total < 2 / 3 * everything.sum()):  # IMG_1.jpg names no artist
            return {"witness": "", "witness_paintings": 0, "witness_share": "", "witness_class": "",
                    "witness_class_paintings": 0, "score": math.nan}
        shares = np.log((others + everything / everything.sum()).clip(1e-12) / (total + 1))
        best = np.where(one[label], -np.inf, shares).argmax()
        return {"witness": witness_of(path), "witness_paintings": total,
                "witness_share": others[label] / total,
                "witness_class": class_names[best] if others[best] else "",
                "witness_class_paintings": int(others[best]), "score": shares[best] - shares[label]}

    return testify


def rank_shares(values):
    """Return the rank of each value among them, as a share in 0..1, the mean one of equals."""
    ordered = np.sort(values)
    below, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(values))


def find_outliers(run, labels, compared):
    """Return a row for each painting of the run, the one most in doubt first.

    labels: {path: label} of the test; compared: what `train_model.compare` says of them. The run
    brings what was noted of the others: of validation in the best epoch, of training in the early
    epochs, before paintings are learned by heart (after Pleiss et al. 2020, arXiv 2001.10528).
    doubt: the rank in 0..1 of 1 - (1 - margin) ** (1 / 3) * (1 - score) ** (2 / 3), of the ranks of
    the margin in its part and of the witness's score, which counts twice (measured:
    tests/README.md); where there is no witness, the rank of the margin.
    """
    class_names, rows = run["class_names"], []
    noted = run["margins"] | {"test": torch.nn.functional.pad(compared, (0, 1), value=1)}
    testify = make_witness(run["split"], run["settings"]["ATTRIBUTE"], class_names)
    for part, listed in (run["split"] | {"test": labels}).items():
        own = []
        for (path, label), sums in zip(listed.items(), noted[part].tolist()):
            margin, probability, other, epochs = sums
            if epochs:  # else it was not used
                own.append({
                    "path": path, "class": class_names[label], "part": part,
                    "margin": margin / epochs, "fits_better": class_names[int(other)],
                    "class_probability": probability / epochs} | testify(path, label))
        for row, rank in zip(own, rank_shares([row["margin"] for row in own])):
            row["doubt"] = rank
        rows += own
    heard = [row for row in rows if not math.isnan(row["score"])]
    joined = [1 - (1 - row["doubt"]) ** (1 / 3) * (1 - rank) ** (2 / 3)
              for row, rank in zip(heard, rank_shares([row["score"] for row in heard]))]
    for row, rank in zip(heard, rank_shares(joined)):
        row["doubt"] = rank
    rows.sort(key=lambda row: (-row["doubt"], row["path"]))
    places = defaultdict(itertools.count)  # how many of the class come before it
    return [row | {"rank": rank, "rank_in_class": next(places[row["class"]])}
            for rank, row in enumerate(rows, 1)]


def agree(row):
    """Return whether model and witness name the same other class, the given one being rare."""
    return (row["margin"] > 0 and row["fits_better"] == row["witness_class"]
            and row["witness_paintings"] >= 20 and row["witness_share"] < 0.05)


def find_twins(split, class_names):
    """Return a row for each two paintings of one file name in different classes."""
    twins = defaultdict(list)
    for labels in split.values():
        for path, label in labels.items():
            twins[train_model.file_name(path)].append((path, class_names[label]))
    pairs = [pair for same in twins.values() if len(same) < 6  # more are numbers, and no titles
             for pair in itertools.combinations(sorted(same), 2)]
    return [{"path": path, "class": name, "twin": twin, "twin_class": other}
            for (path, name), (twin, other) in sorted(pairs) if name != other]


@torch.inference_mode()
def find_reason(pixels, label, model):
    """Return where in a square (S, S, 3) uint8 stands what speaks most for a label: (x, y) in 0..1.

    Of 6 x 6 patches it is the middle of the one without which the label's probability is lowest
    (occlusion: Zeiler & Fergus 2014, arXiv 1311.2901).
    """
    size, middles = len(pixels), torch.linspace(PATCH / 2, 1 - PATCH / 2, 6)
    near = ((torch.arange(size) + 0.5) / size - middles[:, None]).abs() < PATCH / 2  # (6, S)
    hidden = (near[:, None, :, None] & near[:, None]).view(36, 1, size, size)
    image = train_model.to_images(pixels[None], model.features.mean.device)
    patched = torch.where(hidden.to(image.device), model.features.mean, image)  # (36, 3, S, S)
    logits = torch.cat([model(batch) for batch in patched.split(12)])
    place = logits.log_softmax(1)[:, label].argmin().item()
    return middles[place % 6].item(), middles[place // 6].item()


def note_reasons(rows, run, model, small_dir):
    """Add to the outliers that another class fits better their `reason`, where a copy is here."""
    doubted = [row for row in rows if row["margin"] > 0]
    labels = {row["path"]: run["class_names"].index(row["fits_better"]) for row in doubted}
    squares = train_model.Paintings(small_dir, labels, run["settings"]["IMAGE_SIZE"])
    with train_model.Progress("what speaks for another class", len(doubted)) as bar:
        for place, row in enumerate(doubted):
            with contextlib.suppress(OSError):  # then the page has no picture of it either
                row["reason"] = find_reason(*squares[place, 0], model)
            bar.update()


# ------------------------------------------------------------------------------------------ report

GALLERY, PICTURES = 6, 300  # outliers that report.html shows of a class, and of all at most
MATRIX = 40  # classes that its confusion matrix shows at most
PATCH = 0.3  # width of what `find_reason` hides, and the gallery frames, as a share of the square
CSS = """:root { color-scheme: light dark; print-color-adjust: exact; --heat: 116 163 210;
  --paper: #fff; --ink: #1d1c1a; --soft: #625e58; --line: #dfdcd6; --accent: #1f4e79 }
@media screen and (prefers-color-scheme: dark) { :root { --heat: 42 98 152;
  --paper: #14171a; --ink: #ebe8e2; --soft: #a8a59e; --line: #373b40; --accent: #8dbbe8 } }
* { box-sizing: border-box; min-width: 0; margin: 0; padding: 0 }
body { max-width: 76rem; margin: auto; padding: clamp(2rem, 6vw, 5rem) clamp(1rem, 5vw, 4rem);
  background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1, h2, h3, dd b { display: block; font: 1.8rem/1.2 Palatino, "Palatino Linotype", Georgia, serif }
h1 b { display: block; color: var(--accent); font-weight: 400; font-size: clamp(4rem, 19vw, 8rem) }
h2 { margin-top: 5rem; padding-top: 1.2rem; border-top: 1px solid }
h3 { margin: 2.5rem 0 1rem; font-size: 1.3rem } .bars div + div { --accent: var(--soft) }
p, caption, figcaption { max-width: 46rem; margin: 1rem 0; text-align: left }
caption, figcaption, dd, .bars { padding-bottom: .8rem; color: var(--soft); font-size: .875rem }
a { color: var(--accent) } nav { margin: 2rem 0 } b { color: var(--ink) }
ol { padding-left: 1.5rem } .scroll { overflow: auto; max-height: 92vh }
.wide, .hang, dl { display: grid; gap: 1.5rem; margin: 2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 9.5rem)), 1fr)) }
.hang { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.wide { --least: 24rem; gap: 1rem 4rem } .bars { align-self: end } .bars b { float: right }
.bars span { display: block; position: relative; height: 1rem; margin: .4rem 0 1.2rem }
.bars i { position: absolute; inset: -.3rem auto; border: solid; border-width: 0 2px;
  background: linear-gradient(var(--ink) 0 0) 0/100% 2px no-repeat; color: var(--ink) }
.bars span, .classes td[style] { background: linear-gradient(90deg, var(--accent)
  calc(var(--s)*100%), var(--line) 0) 0 100%/100% var(--thick, 100%) no-repeat content-box }
svg { display: block; width: 100%; font: 13px system-ui, sans-serif; fill: var(--soft) }
path, polyline { fill: none; stroke: var(--line) } .best { stroke: var(--ink) }
.training { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 2 }
.validation { stroke: var(--accent); stroke-width: 2 } .matrix .right { border-color: var(--ink) }
table { border-spacing: 0; font-variant-numeric: tabular-nums; line-height: 1.3 }
th, td { font-weight: 400; text-align: left; vertical-align: bottom; --thick: 3px }
.classes { width: 100%; table-layout: fixed; font-size: clamp(.74rem, 3vw, .95rem) }
.classes th { width: 29%; padding: .5rem 0 } .matrix { font-size: .75rem }
.classes td, .classes th + th { width: auto; padding: .5rem 0 .5rem .4rem; text-align: right }
.matrix td { min-width: 2.1rem; height: 1.9rem; border: 1px solid var(--paper); text-align: center;
  background: rgb(var(--heat) / var(--s, 0)); white-space: nowrap; vertical-align: middle }
.matrix th { position: sticky; left: 0; z-index: 1; max-width: 12rem; padding-right: .5rem;
  min-width: clamp(6.5rem, 14vw, 10rem); background: var(--paper); vertical-align: middle }
.matrix thead th { top: 0; vertical-align: bottom } .matrix thead th:first-child { z-index: 2 }
.matrix th + th { left: auto; min-width: 0; padding: .4rem }
.matrix span { max-height: 12rem; writing-mode: vertical-rl; transform: rotate(180deg) }
img { display: block; width: 100%; height: 10rem; object-fit: contain; object-position: 0 100% }
@media print { @page { margin: 14mm } nav { display: none } .scroll { max-height: none }
  body { padding: 0; font-size: 10pt } h2 { margin-top: 2rem }
  h3, .hang, ol { margin: 1rem 0; break-inside: avoid } h2, h3, caption { break-after: avoid }
  tr, figure, dl div { break-inside: avoid } .hang figcaption { font: 7pt/1.3 sans-serif }
  h1 b { font-size: 4.5rem } .wide { --least: 15rem } .bars { font-size: 8pt }
  .matrix { font-size: 5pt } .matrix td { min-width: 0; height: 2em } .matrix th { min-width: 5rem }
  .hang { gap: 1rem; grid-template-columns: repeat(6, 1fr) } img { height: 6rem } }"""


def write_report(path, run, results, small_dir):
    """Write all of it as one page of HTML, which needs no other file, no script, no network.

    results: the scores, guesses, predictions, outliers and twins; small_dir: the small copies.
    """
    scores, names = results["scores"], [escaped(name) for name in run["class_names"]]
    attribute, predictions = run["settings"]["ATTRIBUTE"], results["predictions"]
    title = (f"{attribute} at {run['settings']['IMAGE_SIZE']} pixels, epoch {results['epoch']}: "
             f"{scores['accuracy']:.1%}, a classifier of paintings tested")
    sections = {
        "The surest paintings": surest(predictions, small_dir),
        "Learning curve": learning_curve(run["history"]),
        "Class by class": class_table(names, scores),
        "What is taken for what": confusion_matrix(names, scores["confusion"]),
        "Paintings that might not fit their class":
            gallery(results["outliers"], run["class_names"], small_dir),
        "How it was made": how_made(run, len(predictions))}
    links = [f'<a href="#{n}">{name}</a>' for n, name in enumerate(sections)]
    parts = [f'<h2 id="{n}">{name}</h2>{body}\n' for n, (name, body) in enumerate(sections.items())]
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<title>{escaped(title, "")}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CSS}</style></head><body><main>
{headline(attribute, names, scores, results["guesses"])}{parts[0]}<nav>{" · ".join(links)}</nav>
{"".join(parts[1:])}</main></body></html>
"""
    train_model.write_whole(path, page.encode("utf-8"))


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


def headline(attribute, names, scores, guesses):
    """Return the accuracy beside its yardsticks, and the other scores in a few words each."""
    accuracy, (low, high) = scores["accuracy"], scores["interval"]
    bars = [f'<div>{escaped(name)} <b>{share:.1%}</b><span style="--s:{share:.4f}">'
            for name, share in ({"this model": accuracy} | guesses).items()]
    bars[0] += f'<i style="left:{low:.2%};width:{high - low:.2%}"></i>'
    pairs = [(name[0].upper() + name[1:], f"<b>{scores[key]:.1%}</b>{words}")
             for key, name, words in SCORES[len(names) <= 5:]]
    commonest, *_ = guesses.values()
    poor = "" if low > commonest else """<p><b>The model is not surely better than a guess: what it
says of single paintings, doubts included, means little yet.</b></p>"""
    return f"""<header class="wide"><div><h1>Test accuracy, {escaped(attribute)}
<b>{accuracy:.2%}</b></h1><p>The model finds the given one of {len(names)} classes for
{scores["confusion"].trace():,} of {scores["count"].sum():,} paintings that it has not learned from.
For paintings like these the 95% interval, marked on the bar, is {low:.1%} to {high:.1%}. By the
central square of each alone, as others test, it is {scores["centre"]:.2%}.</p>{poor}</div>
<div class="bars">{"</span></div>".join(bars)}</span></div></div></header>
{facts(pairs)}"""


def surest(predictions, small_dir):
    """Return the paintings that the model is surest of, rightly and wrongly, six each."""
    def say(row):
        given = "" if row["predicted"] == row["class"] else f", given {escaped(row['class'])}"
        return f"<b>{escaped(row['predicted'])}</b> {row['probability']:.1%}{given}"

    ranked = sorted(predictions, key=lambda row: (-row["probability"], row["path"]))
    right = [row for row in ranked if row["predicted"] == row["class"]][:6]
    wrong = [row for row in ranked if row["predicted"] != row["class"]][:6]
    return f"<h3>Right</h3>{hang(right, say, small_dir)}<h3>Wrong</h3>{hang(wrong, say, small_dir)}"


def learning_curve(history):
    """Return the losses and the validation accuracy of the epochs, as two drawings."""
    best = train_model.best_epoch(history)
    if len(history) == 1:
        row = history[0]
        return f"""<p>One epoch was trained: training loss
{row["training_loss"]:.2f}, validation loss {row["validation_loss"]:.2f}, validation accuracy
{row["validation_accuracy"]:.2%}.</p>"""
    losses = {name: [row[f"{name}_loss"] for row in history] for name in ("validation", "training")}
    accuracy = {"validation": [100 * row["validation_accuracy"] for row in history]}
    return f"""<figure><div class="wide">{draw("Loss", "", losses, best)}
{draw("Accuracy", "%", accuracy, best)}</div><figcaption>Solid: on the validation
paintings, by which the best epoch is chosen. Dashed: on those that the model learns from. Epoch
{best} is tested here.</figcaption></figure>"""


def draw(title, unit, lines, best):
    """Return a drawing (SVG, 400 x 230) of the lines {name: values}, one value an epoch."""
    count = len(lines["validation"])
    said = f"{title}, validation: {lines['validation'][best - 1]:.2f}{unit} in epoch {best}"
    highest = max(map(max, lines.values()))
    step = 20 if unit else next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 100, math.inf)
                                if 5 * step >= highest)
    parts = [f'<path d="M50 {205 - 30 * n}H390"/><text x="42" y="{209 - 30 * n}" text-anchor="end">'
             f"{n * step:g}{unit}</text>" for n in range(6)]
    x = [50 + 340 * place / (count - 1) for place in range(count)]
    for name, line in lines.items():
        points = [f"{a:.1f} {205 - 30 * value / step:.1f}" for a, value in zip(x, line)]
        parts.append(f'<polyline class="{name}" points="{" ".join(points)}"/>'
                     f'<circle transform="translate({points[best - 1]})" r="4"/>')
    return f"""<svg viewBox="0 0 400 230" role="img" aria-label="{said}">{"".join(parts)}
<text y="14" font-size="15">{said}</text><path class="best" d="M{x[best - 1]:.1f} 48V205"/>
<text x="50" y="225">epoch 1</text><text x="390" y="225" text-anchor="end">to {count}</text>
</svg>"""


def class_table(names, scores):
    """Return the scores of each class as a table, the highest F1 first."""
    given, named, rows = scores["count"], scores["confusion"].sum(0), []
    defined = {"precision": named, "recall": given, "f1": given + named}
    for place in np.lexsort((-scores["f1"], given == 0)):  # classes without a painting come last
        cells = [f'<td style="--s:{scores[key][place]:.3f}">{scores[key][place]:.1%}</td>'
                 if defined[key][place] else "<td>–</td>" for key in defined]
        rows.append((names[place], f"<td>{given[place]:,}</td>{''.join(cells)}"))
    caption = """Precision: the share of what the model puts into the class that belongs there.
Recall: the share of the class that the model finds. F1: both in one; the highest comes first, and
classes without a test painting last."""
    heads = ("Class", "Paintings", "Precision", "Recall", "F1")
    return table("classes", caption, heads, rows)


def confusion_matrix(names, confusion):
    """Return the counts (C, C), given class down, as a heat map, and the largest confusions."""
    shares, rows = confusion / np.maximum(confusion.sum(1, keepdims=True), 1), []
    wrong, heat = confusion * ~np.eye(len(names), dtype=bool), shares**0.6  # for small shares too
    most = sorted(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MATRIX].tolist())
    for given in most:
        cells = [f'<td{" class=right" * (named == given)} style="--s:{heat[given, named]:.2f}">'
                 f'{confusion[given, named] or ""}</td>' for named in most]
        rows.append((names[given], "".join(cells)))
    worst = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:8], wrong.shape))
    pairs = [f"<li>{names[a]} → {names[b]}: <b>{wrong[a, b]:,}</b>, {shares[a, b]:.1%} of "
             f"{names[a]}</li>\n" for a, b in worst if wrong[a, b]]
    fewer = (f"Shown are the {MATRIX} most confused of {len(names)} classes, and in confusion.csv "
             "all. " if len(names) > MATRIX else "")
    return f"""<p>{fewer}Deeper colour: a larger share of the given class. Framed: the right
answers. Empty: 0.</p><div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">
{table("matrix", "Paintings by given class (down) and predicted class (across)",
       ["", *(names[place] for place in most)], rows)}</div>
<h3>Most often confused: given → predicted</h3>
{f"<ol>{''.join(pairs)}</ol>" if pairs else "<p>None.</p>"}"""


def hang(rows, say, small_dir):
    """Return paintings, rows with a path, as a gallery with what the function `say` says of each.

    Each is an inlined JPEG of at most 200 x 200 pixels, where its small copy is on this machine.
    """
    figures = []
    for row in rows:
        path, image, jpeg = row["path"], "", io.BytesIO()
        with contextlib.suppress(OSError):
            with Image.open(small_dir / train_model.small_name(path)) as copy:
                copy.thumbnail((200, 200))
                if "reason" in row:
                    frame(copy, *row["reason"])
                copy.save(jpeg, "JPEG", quality=60, comment=b"")
            image = (f'<img src="data:image/jpeg;base64,{b64encode(jpeg.getvalue()).decode()}" '
                     f'alt="{html.escape(printable(path))}">')
        artist, _, title = Path(path).stem.replace("-", " ").partition("_")
        named = f"{escaped(artist)}: {escaped(title, 'i')}" if title else escaped(artist)
        figures.append(f"<figure>{image}<figcaption>{say(row)}<br>{named}</figcaption></figure>")
    return f'<div class="hang">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def frame(image, x, y):
    """Frame the patch of `find_reason` with the middle (x, y) in 0..1 of the central square."""
    side = min(image.size) * (1 - 2 * train_model.MARGIN)
    left = image.width / 2 + (x - 0.5 - PATCH / 2) * side
    top = image.height / 2 + (y - 0.5 - PATCH / 2) * side
    box = left, top, left + PATCH * side, top + PATCH * side
    for colour, width in (("black", 4), ("white", 2)):
        ImageDraw.Draw(image).rectangle(box, outline=colour, width=width)


def say_doubt(row):
    """Return what model and witness say of a painting, as HTML."""
    said = (f"<b>{escaped(row['fits_better'])}</b> "
            f"{'fits better' if row['margin'] > 0 else 'is next'}, the given class has "
            f"{row['class_probability']:.1%} ({row['part']})")
    if row["witness_class"]:
        witness, most = escaped(row["witness"].replace("-", " ")), escaped(row["witness_class"])
        said += (f"<br>{row['witness_class_paintings']} of {row['witness_paintings']} others of "
                 f"{witness} are {most}, {row['witness_share']:.0%} of the given class")
    return said


def select_shown(outliers):
    """Return the outliers to show: the first of each class, and where model and witness agree."""
    return ([row for row in outliers if row["rank_in_class"] < GALLERY][:PICTURES],
            [row for row in outliers if agree(row)][:30])


def gallery(outliers, class_names, small_dir):
    """Return the paintings most in doubt, those of which model and witness agree first."""
    shown, both = select_shown(outliers)
    parts = []
    for name in class_names:
        if rows := [row for row in shown if row["class"] == name]:
            parts.append(f"<h3>{escaped(name)}</h3>\n{hang(rows, say_doubt, small_dir)}\n")
    apart = sum(row["margin"] > 0 for row in outliers)

    def say_both(row):
        return f"given: {escaped(row['class'])}<br>{say_doubt(row)}"

    return f"""<p>For {apart:,} of {len(outliers):,} paintings of the run, the model finds another
class likelier than the given one, or found it, where it has learned from them, in the early epochs.
The witness is the artist in the file name (for artists, the style's folder): what the other
paintings there are. Doubt joins both, as ranks. The first {GALLERY} of each class, at most
{PICTURES} in all, are here, and more in outliers.csv. They are worth a second look, no more: early
and late works stand out too, rightly labelled. Framed, in the central square, is what speaks most
for the class that fits better, to the model as it is now: hidden, it makes that class least
likely.</p>
<h3>Model and witness agree</h3><p>Both name the same other class, and less than 5% of 20 or more
others are of the given one.</p>{hang(both, say_both, small_dir)}{"".join(parts)}"""


def how_made(run, tested):
    """Return what the model and this page were made with, and how to make them again."""
    settings, split, history = run["settings"], run["split"], run["history"]
    flags = train_model.flags_of(settings)
    made = settings | run["versions"]
    sizes = ", ".join(f"{len(paintings):,} for {part}" for part, paintings in split.items())
    best, spent = train_model.best_epoch(history), sum(row["seconds"] for row in history)
    told = (f"{len(history)} of {settings['EPOCHS']} epochs were trained, in "
            f"{train_model.duration(spent)}, on {run['device']}; epoch {best} is tested. The split "
            f"is {run['split_source']}: {sizes}. Of the last, {tested:,} were tested and "
            f"{len(split['test']) - tested:,} are missing or cannot be read.")
    return f"""<p>A ResNet-50, read row by row by an LSTM, learned {escaped(settings["ATTRIBUTE"])}.
{html.escape(printable(told))} This page was made on {time.strftime("%Y-%m-%d")}. To do it all
again, with the folders of that run:</p>
<p><code>python train_model.py{html.escape(printable(flags))}<br>python test_model.py</code>
</p>{facts((name, html.escape(printable(value))) for name, value in made.items())}"""


# ------------------------------------------------------------------------------------ own pictures


def find_own_pictures(names):
    """Return the pictures that the command names, and those in folders that it names."""
    files, others = [], []
    for name in names:
        if not name:
            raise ValueError("the command names an empty path")
        found = [] if os.path.lexists(name) else sorted(glob.glob(name))  # as Windows does not
        for path in map(Path, found or [name]):
            inside = sorted(file for file in path.rglob("*") if not file.is_dir()
                            and "/." not in f"/{file.relative_to(path).as_posix()}")
            pictures = [file for file in inside if train_model.is_picture(file.name)]
            files += pictures or [path]
            others += [file for file in inside if not train_model.is_picture(file.name)]
    train_model.report(others, "no pictures by their endings, passed over")
    return files


def read_views(file, run, views):
    """Return the squares of a picture that the model looks at, (views, S, S, 3) uint8."""
    size = run["settings"]["IMAGE_SIZE"]
    if file.exists() and not file.is_file():
        raise ValueError("no regular file, or a folder without pictures")
    small = train_model.encode_small(file, int(train_model.copies_folder(Path(), size).name))
    with Image.open(io.BytesIO(small)) as image:
        return np.stack([train_model.square(image, size, place) for place in VIEW_PLACES[views]])


@torch.inference_mode()
def name_classes(pixels, run, model, most=5):
    """Return for each picture of pixels (N, views, S, S, 3) uint8 its likeliest classes.

    They are pairs (class name, probability), the likeliest first.
    """
    device = next(model.parameters()).device
    images = train_model.to_images(torch.from_numpy(pixels).flatten(0, 1), device)
    logits = model(images).cpu().double().unflatten(0, pixels.shape[:2]).mean(1)
    best = logits.softmax(1).topk(min(most, len(run["class_names"])))
    return [[(run["class_names"][label], share) for label, share in zip(*pair)]
            for pair in zip(best.indices.tolist(), best.values.tolist())]


def likeliest_classes(picture, run, model, most=5):
    """Return the likeliest classes of a picture file, pairs (class name, probability in 0..1).

    run, model: those of `load_best`. Raises OSError or ValueError where it cannot be read.
    """
    return name_classes(read_views(Path(picture), run, VIEWS)[None], run, model, most)[0]


def classify(model, run, settings):
    """Print the likeliest classes of one's own pictures, and write them into own_pictures.csv.

    Raises ValueError, after all others are done, if any cannot be read.
    """
    def read(file):
        try:
            return read_views(file, run, settings.views)
        except Exception as error:  # of nearly any kind, from Pillow
            return printable(error)

    files, rows = find_own_pictures(settings.pictures), []
    step = max(1, settings.batch_size // settings.views)
    train_model.move_to_fastest(model)
    bar = train_model.Progress("own pictures", len(files))
    with bar, ThreadPool(train_model.cores()) as pool:
        for start in range(0, len(files), step):
            batch = files[start : start + step]
            views = pool.map(read, batch)
            pixels = [view for view in views if not isinstance(view, str)]
            named = iter(name_classes(np.stack(pixels), run, model) if pixels else [])
            for file, view in zip(batch, views):
                if isinstance(view, str):
                    print(f"{printable(file)}: cannot be read: {view}", file=sys.stderr)
                    continue
                best = next(named)
                words = ", ".join(f"{printable(name)} {share:.1%}" for name, share in best)
                bar.say(f"{printable(file)}: {words}")
                rows.append([str(file), *itertools.chain(*best)])
            bar.update(len(batch))
    columns = ["picture", "class", "probability"]
    columns += [f"{kind}_{place}" for place in range(2, 6) for kind in columns[1:]]
    if rows:
        table = settings.output_dir / "own_pictures.csv"
        train_model.write_table(table, columns, [
            dict(itertools.zip_longest(columns, row, fillvalue="")) for row in rows])
        print(f"written to {printable(table)}")
    if len(rows) < len(files):
        raise ValueError(f"{len(files) - len(rows)} of {len(files)} pictures could not be read")


# -------------------------------------------------------------------------------------------- main


def load_best(output_dir):
    """Return the best run of a folder, with its "class_names", and its model, ready to test."""
    file = Path(output_dir) / "model_best.pth"
    if not file.exists():
        raise ValueError(f"there is no {file}: run train_model.py first")
    run = train_model.load_checkpoint(file)
    model = train_model.ArtClassifier(len(run["class_names"]))
    train_model.load_weights(model, run.pop("model"), file)
    return run, model.eval()


def prepare_test(run, folder, settings):
    """Return {path: label} of the test paintings that are there and can be read.

    folder: that of their small copies. The run's paths become those on this disk.
    """
    train_model.check_folders(settings.data_dir, settings.small_dir, settings.output_dir)
    found = train_model.find_paintings(settings.data_dir)
    run["split"] = train_model.locate(run["split"], found)
    tested = set(found).intersection(run["split"]["test"])
    if tested:  # else nothing is written
        tested -= train_model.prepare_copies(sorted(tested), settings.data_dir, folder).keys()
    if not tested:
        raise ValueError(f"none of the {len(run['split']['test']):,} test paintings is in "
                         f"{settings.data_dir}, which begins with {found[0]}")
    return {path: label for path, label in run["split"]["test"].items() if path in tested}


def write_results(run, model, labels, views, copies, settings):
    """Write the tables and report.html, and print the scores.

    labels: {path: label} of the tested paintings; views: their logits (views, N, C); copies: the
    folder of their small copies.
    """
    folder, class_names, best = settings.output_dir, run["class_names"], run["history"][-1]
    with contextlib.suppress(OSError, ValueError):  # the epochs after the best, if they are here
        last = train_model.load_checkpoint(folder / "model_last.pth")
        if last["history"][: best["epoch"]] == run["history"]:
            run |= {"history": last["history"], "settings": last["settings"]}
            run["margins"]["train"] = last["margins"]["train"]
    logits, truth = views.mean(0), torch.tensor(list(labels.values()))
    scores = score(logits, truth)
    scores["centre"] = (views[len(views) // 2].argmax(1) == truth).double().mean().item()
    results = {
        "scores": scores,
        "guesses": yardsticks(labels, run["split"], run["settings"]["ATTRIBUTE"]),
        "predictions": predict(labels, logits, class_names),
        "outliers": find_outliers(run, labels, train_model.compare(logits, truth)),
        "twins": find_twins(run["split"], class_names),
        "epoch": best["epoch"], "validation_accuracy": best["validation_accuracy"],
        "right": int(scores["confusion"].trace()), "paintings": len(labels),
        "listed": len(run["split"]["test"]),
    }
    shown = {row["path"]: row for rows in select_shown(results["outliers"]) for row in rows}
    lacking = [path for path in sorted(shown) if (settings.data_dir / path).exists()
               and not (copies / train_model.small_name(path)).exists()]
    if lacking:
        train_model.prepare_copies(lacking, settings.data_dir, copies)
    write_tables(folder, class_names, results, settings.outliers_per_class)
    note_reasons(shown.values(), run, model, copies)
    write_report(folder / "report.html", run, results, copies)
    print_scores(run, results, folder)


def write_tables(folder, class_names, results, most):
    """Write what programs read: scores.json, and the tables as CSV."""
    scores = results["scores"]
    plain = {name: value for name, value in (scores | results).items()
             if isinstance(value, (int, float, tuple))} | {"guesses": results["guesses"]}
    text = json.dumps(plain, indent=1, ensure_ascii=False)
    train_model.write_whole(folder / "scores.json", text.encode("utf-8", "backslashreplace"))
    predictions = results["predictions"]
    train_model.write_table(folder / "predictions.csv", predictions[0], predictions)
    columns = ("path", "class", "part", "doubt", "rank", "margin", "fits_better",
               "class_probability", "witness", "witness_paintings", "witness_share",
               "witness_class")
    rows = [row for row in results["outliers"] if row["rank_in_class"] < most]
    rows.sort(key=lambda row: class_names.index(row["class"]))
    train_model.write_table(folder / "outliers.csv", columns, rows)
    columns = ("path", "class", "twin", "twin_class")
    train_model.write_table(folder / "twins.csv", columns, results["twins"])
    columns = ("class", "paintings", "precision", "recall", "f1")
    values = [scores[kind].tolist() for kind in ("count", *columns[2:])]
    rows = [dict(zip(columns, row)) for row in zip(class_names, *values)]
    train_model.write_table(folder / "classes.csv", columns, rows)
    rows = [dict(zip(["", *class_names], [name, *counts]))
            for name, counts in zip(class_names, scores["confusion"].tolist())]
    train_model.write_table(folder / "confusion.csv", ["", *class_names], rows)


def print_scores(run, results, folder):
    """Print the scores, where all of it lies, and last the accuracy."""
    scores = results["scores"]
    print(f"model of epoch {results['epoch']}, {run['settings']['ATTRIBUTE']}, "
          f"{len(run['class_names'])} classes; validation accuracy "
          f"{100 * results['validation_accuracy']:.2f} %")
    for key, name, _ in SCORES[len(run["class_names"]) <= 5:]:
        print(f"{name}: {100 * scores[key]:.2f} %")
    print(f"accuracy of the central square alone: {100 * scores['centre']:.2f} %")
    guesses = "; ".join(f"{name}: {100 * share:.1f} %" for name, share in
                        results["guesses"].items())
    print(f"yardsticks, which look at no picture: {guesses}")
    agreed, pairs = sum(map(agree, results["outliers"])), len(results["twins"])
    print(f"model and witness agree on another class for {agreed:,} of "
          f"{len(results['outliers']):,} paintings; {pairs:,} pairs have one name in two classes")
    print(f"page to look at: {printable(folder / 'report.html')}; beside it, for programs: "
          "scores.json, predictions.csv, outliers.csv, twins.csv, classes.csv, confusion.csv")
    right, count, listed = (results[name] for name in ("right", "paintings", "listed"))
    low, high = scores["interval"]
    print(f"{listed - count:,} of {listed:,} test paintings are missing or cannot be read")
    print(f"95 % interval of the test accuracy: {100 * low:.2f} to {100 * high:.2f} %")
    print(f"Test accuracy: {100 * right / count:.2f} % ({right:,} of {count:,} paintings)")


def predict_views(run, model, labels, folder, settings):
    """Return the logits (views, N, classes) of the paintings {path: label}, on the CPU."""
    device, logits = train_model.move_to_fastest(model), []
    image_size = run["settings"]["IMAGE_SIZE"]
    for view in VIEW_PLACES[settings.views]:
        paintings = train_model.Paintings(folder, labels, image_size, view=view)
        loader = train_model.make_loader(paintings, settings.batch_size, settings.workers, device)
        logits.append(train_model.evaluate(model, loader, "test"))
    return torch.stack(logits)


def predict_and_score(settings):
    """Score the best model on its test paintings, or classify the pictures that are named."""
    run, model = train_model.from_first(load_best, settings.output_dir)
    if settings.pictures:
        train_model.from_first(classify, model, run, settings)
        return
    folder = train_model.copies_folder(settings.small_dir, run["settings"]["IMAGE_SIZE"])
    labels = train_model.from_first(prepare_test, run, folder, settings)
    views = predict_views(run, model, labels, folder, settings)
    train_model.from_first(write_results, run, model, labels, views, folder, settings)


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    parser = train_model.make_parser(__doc__, SETTINGS, train_model.__file__, __file__)
    parser.add_argument("pictures", nargs="*", help="classify these pictures and folders instead")
    return train_model.run_script(predict_and_score, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
