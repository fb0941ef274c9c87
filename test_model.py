"""Test the best checkpoint of train_model.py on paintings that it has not learned from.

    python test_model.py                      the scores, predictions.csv, outliers.csv, report.html
    python test_model.py photo.jpg folder/    the five likeliest classes of pictures of one's own
    python test_model.py --help               every setting as a flag

Reads   model_best.pth in OUTPUT_DIR, which names the test paintings, and those paintings; for the
        learning curve's later epochs, model_last.pth too, where it is there.
Writes  into OUTPUT_DIR predictions.csv (one row a test painting), outliers.csv (paintings that
        might not fit the class they are assigned to) and report.html (all of it to look at).
"""

import contextlib
import html
import io
import math
import platform
import re
import shlex
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_model
from train_model import printable

# ---------------------------------------------------------------------------------------- settings
# DATA_DIR, SMALL_DIR, OUTPUT_DIR, BATCH_SIZE and WORKERS are those of train_model.py.

VIEWS = 3  # squares of a painting whose logits are averaged: 1 is the centre, 3 has both ends too
OUTLIERS_PER_CLASS = 20  # rows a class in outliers.csv, the most doubtful first

VIEW_PLACES = {1: [0.5], 3: [0, 0.5, 1]}  # along the long side, from its start to its end
SHARED = ("DATA_DIR", "SMALL_DIR", "OUTPUT_DIR", "BATCH_SIZE", "WORKERS")
SETTINGS = {name: train_model.SETTINGS[name] for name in SHARED}
SETTINGS |= {"VIEWS": VIEWS, "OUTLIERS_PER_CLASS": OUTLIERS_PER_CLASS}

# ------------------------------------------------------------------------------------------ scores


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
    recall = hits / np.maximum(given, 1)
    f1 = 2 * hits / np.maximum(given + named, 1)
    bins = (confidence * 15).ceil().long() - 1
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, right.double() - confidence)
    top5 = logits.topk(min(5, classes)).indices == labels[:, None]
    return {
        "accuracy": right.double().mean().item(),
        "interval": wilson(int(right.sum()), count),
        "top5": top5.any(1).double().mean().item(),
        "macro_f1": f1[given + named > 0].mean(),
        "balanced_accuracy": recall[given > 0].mean(),
        "calibration_error": gaps.abs().sum().item() / count,
        "precision": hits / np.maximum(named, 1),
        "recall": recall,
        "f1": f1,
        "count": given,
        "confusion": confusion,
    }


def wilson(right, count):
    """Return the 95 % interval of a share, (low, high) in 0..1, after Wilson (1927)."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    shrink = 1 + z * z / count
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def yardsticks(labels, split):
    """Return the accuracy of two guesses on {path: label} that look at no picture, {name: share}.

    One always names the largest class of the test list; the other goes by the artist in the file
    name, to his commonest class outside the test, or to the commonest of all.
    """
    counts = defaultdict(Counter)
    for part in ("train", "validation"):
        for path, label in split[part].items():
            counts[train_model.artist(path)][label] += 1
            counts[""][label] += 1
    commonest = {artist: min(count, key=lambda label: (-count[label], label))
                 for artist, count in counts.items()}
    guesses = [commonest.get(train_model.artist(path), commonest[""]) for path in labels]
    return {
        "always the largest class": max(Counter(labels.values()).values()) / len(labels),
        "the artist's commonest class": np.mean(np.equal(guesses, list(labels.values()))).item(),
    }


def predict(paths, logits, labels, class_names):
    """Return a row a painting: what it is, what the model says, and how far the two are apart.

    margin: the best other logit over that of the given class; positive where the model disagrees.
    """
    probabilities, label = logits.double().softmax(1).round(decimals=6), labels[:, None]
    given = logits.gather(1, label)
    others = logits.scatter(1, label, -torch.inf).max(1)
    columns = {
        "path": paths,
        "class": [class_names[place] for place in labels],
        "predicted": [class_names[place] for place in logits.argmax(1)],
        "probability": probabilities.amax(1).tolist(),
        "class_probability": probabilities.gather(1, label)[:, 0].tolist(),
        "class_rank": (1 + (logits > given).sum(1)).tolist(),
        "fits_better": [class_names[place] for place in others.indices],
        "margin": (others.values - given[:, 0]).double().round(decimals=4).tolist(),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def find_outliers(predictions, class_names, most):
    """Return, for each class, the `most` paintings of the largest margin, as a dictionary.

    The margin of the given label found planted labels where low confidence in general did not.
    """
    ranked = sorted(predictions, key=lambda row: (-row["margin"], row["path"]))
    return {name: [row for row in ranked if row["class"] == name][:most] for name in class_names}


# ------------------------------------------------------------------------------------------ report

GALLERY = 6  # outliers of a class that report.html shows
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
b { color: var(--ink) } ol { padding-left: 1.5rem } .scroll { overflow-x: auto }
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
.classes th { width: 29%; padding: .5rem 0 } .matrix { font-size: .75rem;
  min-width: min(30rem, 100%) }
.classes td, .classes th + th { width: auto; padding: .5rem 0 .5rem .4rem; text-align: right }
.matrix td { min-width: 2.1rem; height: 1.9rem; border: 1px solid var(--paper); text-align: center;
  background: rgb(var(--heat) / var(--s, 0)); white-space: nowrap; vertical-align: middle }
.matrix th { position: sticky; left: 0; z-index: 1; max-width: 12rem; padding-right: .5rem;
  min-width: clamp(6.5rem, 14vw, 10rem); background: var(--paper); vertical-align: middle }
.matrix th + th { position: static; min-width: 0; padding: .4rem; vertical-align: bottom }
.matrix span { max-height: 12rem; writing-mode: vertical-rl; transform: rotate(180deg) }
.matrix caption { position: sticky; left: 0; max-width: min(46rem, 90vw) }
img { display: block; width: 100%; height: 10rem; object-fit: contain; object-position: 0 100% }
@media print { @page { margin: 14mm } body { padding: 0; font-size: 10pt } h2 { margin-top: 2rem }
  h3, .hang, ol { margin: 1rem 0; break-inside: avoid } h2, h3, caption { break-after: avoid }
  tr, figure, dl div { break-inside: avoid } .hang figcaption { font: 7pt/1.3 sans-serif }
  h1 b { font-size: 4.5rem } .wide { --least: 15rem }
  .matrix { font-size: 5pt } .matrix td { min-width: 0; height: 2em } .matrix th { min-width: 5rem }
  .hang { gap: 1rem; grid-template-columns: repeat(6, 1fr) } img { height: 6rem } }"""


def write_report(path, run, scores, guesses, predictions, outliers, small_dir):
    """Write all of it as one page of HTML, which needs no other file, no script, no network."""
    names = [escaped(name) for name in run["class_names"]]
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Test of a classifier of paintings</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CSS}</style></head><body><main>
{headline(run["settings"]["ATTRIBUTE"], names, scores, guesses)}
{learning_curve(run["history"])}
{class_table(names, scores)}{confusion_matrix(names, scores["confusion"])}
{gallery(predictions, outliers, small_dir)}{how_made(run, len(predictions))}
</main></body></html>
"""
    train_model.write_whole(path, page.encode("utf-8"))


def escaped(name):
    """Return a name as HTML that shows it, whatever it holds, with spaces for _."""
    return f"<bdi>{html.escape(printable(name).replace('_', ' '))}</bdi>"


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
    own = ", which is the answer itself here" if attribute == "artist" else ""
    bars = [f'<div>{name} <b>{share:.1%}</b><span style="--s:{share:.4f}">'
            for name, share in ({"this model": accuracy} | guesses).items()]
    bars[0] += f'<i style="left:{low:.2%};width:{high - low:.2%}"></i>'
    others = [
        ("Top-5 accuracy", "top5", "the given class is among the five likeliest"),
        ("Macro-F1", "macro_f1", "precision and recall in one; every class counts alike"),
        ("Balanced accuracy", "balanced_accuracy", "recall, averaged over the classes"),
        ("Calibration error", "calibration_error", "the gap between confidence and accuracy"),
    ][len(names) <= 5:]
    pairs = [(name, f"<b>{scores[key]:.1%}</b>{words}") for name, key, words in others]
    return f"""<header class="wide"><div><h1>Test accuracy, {escaped(attribute)}
<b>{accuracy:.2%}</b></h1><p>The model finds the given one of {len(names)} classes for
{scores["confusion"].trace():,} of {scores["count"].sum():,} paintings that it has not learned from.
For paintings like these the 95% interval, marked on the bar, is {low:.1%} to {high:.1%}. By the
central square of each alone, as others test, it is {scores["centre"]:.2%}.</p></div>
<div class="bars">{"</span></div>".join(bars)}</span></div><p>The guesses look at no picture: one
gives the same answer to all, the other goes by the artist in the file name{own}.</p></div></header>
{facts(pairs)}"""


def best_epoch(history):
    """Return the epoch, from 1, of the highest validation accuracy, the first of equals."""
    return max(history, key=lambda row: row["validation_accuracy"])["epoch"]


def learning_curve(history):
    """Return the losses and the validation accuracy of the epochs, as two drawings."""
    best = best_epoch(history)
    losses = {name: [row[f"{name}_loss"] for row in history] for name in ("validation", "training")}
    accuracy = {"validation": [100 * row["validation_accuracy"] for row in history]}
    return f"""<h2>Learning curve</h2><figure><div class="wide">{draw("Loss", "", losses, best)}
{draw("Accuracy", "%", accuracy, best)}</div><figcaption>Solid: on the validation’s
paintings, which choose the best epoch. Dashed: on those that the model learns from. Epoch {best} is
tested here.</figcaption></figure>"""


def draw(title, unit, lines, best):
    """Return a drawing (SVG, 400 x 230) of the lines {name: values}, one value an epoch."""
    count = len(lines["validation"])
    said = f"{title}, validation: {lines['validation'][best - 1]:.2f}{unit} in epoch {best}"
    step = 20 if unit else math.ceil(2 * max(map(max, lines.values()))) / 10 or 1
    parts = [f'<path d="M50 {205 - 30 * n}H390"/><text x="42" y="{209 - 30 * n}" text-anchor="end">'
             f"{n * step:g}{unit}</text>" for n in range(6)]
    x = [50 + 340 * place / max(count - 1, 1) for place in range(count)]
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
    return "<h2>Class by class</h2>" + table("classes", caption, heads, rows)


def confusion_matrix(names, confusion):
    """Return the counts (C, C), given class down, as a heat map, and the largest confusions."""
    shares, rows = confusion / np.maximum(confusion.sum(1, keepdims=True), 1), []
    for given, counts in enumerate(confusion.tolist()):
        cells = [f'<td style="--s:{share**0.6:.2f}">{count}</td>' if count else "<td></td>"
                 for count, share in zip(counts, shares[given])]  # 0.6 brings out small shares
        cells[given] = cells[given].replace("<td", '<td class="right"')
        rows.append((names[given], "".join(cells)))
    wrong = confusion * ~np.eye(len(names), dtype=bool)
    worst = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:8], wrong.shape))
    pairs = [f"<li>{names[a]} → {names[b]}: <b>{wrong[a, b]:,}</b>, {shares[a, b]:.1%} of "
             f"{names[a]}</li>\n" for a, b in worst if wrong[a, b]]
    caption = """Paintings by given class (down) and predicted class (across). Deeper colour: a
larger share of the given class. Framed: the right answers. Empty: 0."""
    return f"""<h2>What is taken for what</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">
{table("matrix", caption, ["", *names], rows)}</div>
<h3>Most often confused: given → predicted</h3>
{f"<ol>{''.join(pairs)}</ol>" if pairs else "<p>None.</p>"}"""


def gallery(predictions, outliers, small_dir):
    """Return the first outliers of each class, with their pictures."""
    apart = sum(row["margin"] > 0 for row in predictions)
    parts = [f'<h3>{escaped(name)}</h3>\n<div class="hang">'
             f"{''.join(outlier(row, small_dir) for row in rows[:GALLERY])}</div>\n"
             for name, rows in outliers.items() if rows]
    return f"""<h2>Paintings that might not fit their class</h2>
<p>The margin says how much likelier than the given class the model finds another: at 0 both are
equally likely, at +1 the other is 2.7 times, and at +3 it is 20 times as likely. It is above 0 for
{apart:,} of {len(predictions):,} paintings: there the model disagrees with the label, which may be
right all the same. They are worth a second look, no more. Below 0 the model agrees, and a painting
here only fits less well than others. Shown are at most {GALLERY} of each class, the largest margins
first; outliers.csv lists as many as OUTLIERS_PER_CLASS says.</p>{"".join(parts)}"""


def outlier(row, small_dir):
    """Return a painting as an inlined JPEG of at most 200 x 200 pixels, and what is said of it."""
    with Image.open(small_dir / train_model.small_name(row["path"])) as image:
        image.thumbnail((200, 200))
        image.save(jpeg := io.BytesIO(), "JPEG", quality=70, comment=b"")
    path = html.escape(printable(row["path"]))
    words = "fits better" if row["margin"] > 0 else "is next"
    margin, name = f"{row['margin']:+.2f}".replace("-", "−"), re.sub("([/_-])", r"\1<wbr>", path)
    return f"""<figure><img src="data:image/jpeg;base64,{b64encode(jpeg.getvalue()).decode()}"
alt="{path}"><figcaption>given {escaped(row["class"])}<br><b>{escaped(row["fits_better"])}</b>
{words}<br>margin {margin}<br><small>{name}</small></figcaption></figure>"""


def how_made(run, tested):
    """Return what the model and this page were made with, and how to make them again."""
    settings, split = run["settings"], run["split"]
    flags = "".join(f" --{name.lower().replace('_', '-')} {shlex.quote(str(value))}"
                    for name, value in settings.items() if value != train_model.SETTINGS.get(name))
    made = settings | run["versions"] | {"Python": platform.python_version()}
    sizes = ", ".join(f"{len(paintings):,} for {part}" for part, paintings in split.items())
    return f"""<h2>How it was made</h2>
<p>A ResNet-50, read row by row by an LSTM, learned to tell {escaped(settings["ATTRIBUTE"])}.
The split is {html.escape(run["split_source"])}: {sizes}. Of the last, {tested:,} paintings were
tested and {len(split["test"]) - tested:,} are missing or cannot be read. This page was made on
{time.strftime("%Y-%m-%d")}. To do it all again, with the folders of that run:</p>
<p><code>python train_model.py{html.escape(printable(flags))}<br>python test_model.py</code>
</p>{facts((name, html.escape(printable(value))) for name, value in made.items())}"""


# ------------------------------------------------------------------------------------ own pictures


def find_own_pictures(names):
    """Return the pictures that the command names, and those in folders that it names."""
    files, others = [], []
    for name in names:
        if not name:
            raise ValueError("the command names an empty path")
        inside = sorted(path for path in Path(name).rglob("*") if not path.is_dir()
                        and "/." not in f"/{path.relative_to(name).as_posix()}")
        pictures = [path for path in inside if train_model.is_picture(path.name)]
        files += pictures or [Path(name)]
        others += [path for path in inside if not train_model.is_picture(path.name)]
    train_model.report(others, "no pictures by their endings, passed over")
    return files


def classify(model, run, views, files):
    """Print the five likeliest classes of each picture; raise ValueError if any cannot be read."""
    device, failed, class_names = train_model.move_to_fastest(model), 0, run["class_names"]
    size = run["settings"]["IMAGE_SIZE"]
    side = int(train_model.copies_folder(Path(), size).name)
    for file in files:
        try:
            if file.exists() and not file.is_file():
                raise ValueError("no regular file, or a folder without pictures")
            with Image.open(io.BytesIO(train_model.encode_small(file, side))) as image:
                squares = [train_model.square(image, size, place) for place in views]
        except Exception as error:  # of nearly any kind, from Pillow
            print(f"{printable(file)}: cannot be read: {printable(error)}", file=sys.stderr)
            failed += 1
            continue
        pixels = torch.from_numpy(np.stack(squares))  # (views, size, size, 3)
        with torch.inference_mode():
            logits = model(train_model.to_images(pixels, device)).cpu()
        best = logits.double().mean(0).softmax(0).topk(min(5, len(class_names)))
        pairs = zip(best.values.tolist(), best.indices.tolist())
        named = [f"{printable(class_names[label])} {100 * share:.1f} %" for share, label in pairs]
        print(f"{printable(file)}: {', '.join(named)}")
    if failed:
        raise ValueError(f"{failed} of {len(files)} pictures could not be read")


# -------------------------------------------------------------------------------------------- main


def load_best(output_dir):
    """Return the best run of a folder and its model."""
    file = output_dir / "model_best.pth"
    if not file.exists():
        raise ValueError(f"there is no {file}: run train_model.py first")
    run = train_model.load_checkpoint(file)
    model = train_model.ArtClassifier(len(run["class_names"]))
    train_model.load_weights(model, run.pop("model"), file)
    return run, model.eval()


def prepare_test(run, folder, settings):
    """Return {path: path on disk} of the test paintings that are there and can be read.

    folder: that of their small copies.
    """
    train_model.check_folders(settings.data_dir, settings.small_dir, settings.output_dir)
    found, listed = train_model.find_paintings(settings.data_dir), run["split"]["test"]
    of_all = train_model.locate([path for part in run["split"].values() for path in part], found)
    places = {path: of_all[path] for path in listed if path in of_all}
    if places:  # else nothing is written
        tested = {place: found[place] for place in places.values()}
        bad = train_model.prepare_copies(tested, settings.data_dir, folder)
        places = {path: places[path] for path in listed
                  if path in places and places[path] not in bad}
    if not places:
        raise ValueError(f"none of the {len(listed):,} test paintings is in {settings.data_dir}, "
                         f"which begins with {min(found)}")
    return places


def write_results(run, places, views, copies, settings):
    """Write predictions.csv, outliers.csv and report.html, and print the scores.

    views: logits (views, N, C) of the paintings; copies: the folder of their small copies.
    """
    folder, class_names, split = settings.output_dir, run["class_names"], run["split"]
    tested = {path: split["test"][path] for path in places}
    logits, labels = views.mean(0), torch.tensor(list(tested.values()))
    scores, guesses = score(logits, labels), yardsticks(tested, split)
    scores["centre"] = (views[len(views) // 2].argmax(1) == labels).double().mean().item()
    predictions = predict(places.values(), logits, labels, class_names)
    outliers = find_outliers(predictions, class_names, settings.outliers_per_class)
    columns = ("path", "class", "predicted", "probability", "class_probability", "class_rank")
    train_model.write_table(folder / "predictions.csv", columns, predictions)
    columns = ("path", "class", "fits_better", "margin", "class_probability")
    train_model.write_table(folder / "outliers.csv", columns, sum(outliers.values(), []))
    best = run["history"][-1]
    with contextlib.suppress(OSError, ValueError):  # the epochs after the best, if they are here
        later = train_model.load_checkpoint(folder / "model_last.pth")["history"]
        if later[: best["epoch"]] == run["history"]:
            run["history"] = later
    write_report(folder / "report.html", run, scores, guesses, predictions, outliers, copies)

    print(f"model of epoch {best['epoch']}, {run['settings']['ATTRIBUTE']}, "
          f"{len(class_names)} classes")
    low, high = scores["interval"]
    print(f"95 % interval of the test accuracy: {100 * low:.2f} to {100 * high:.2f} %")
    print(f"validation accuracy: {100 * best['validation_accuracy']:.2f} %")
    if len(class_names) > 5:
        print(f"top-5 accuracy: {100 * scores['top5']:.2f} %")
    print(f"macro-F1: {100 * scores['macro_f1']:.2f} %")
    print(f"balanced accuracy: {100 * scores['balanced_accuracy']:.2f} %")
    print(f"expected calibration error: {100 * scores['calibration_error']:.2f} %")
    for name, accuracy in guesses.items():
        print(f"yardstick, {name}: {100 * accuracy:.2f} %")
    print(f"accuracy of the central square alone: {100 * scores['centre']:.2f} %")
    right, count, listed = int(scores["confusion"].trace()), len(places), len(split["test"])
    print(f"{listed - count:,} of {listed:,} test paintings are missing or cannot be read")
    print(f"Test accuracy: {100 * right / count:.2f} % ({right:,} of {count:,} paintings)")


def predict_views(model, labels, places, folder, image_size, settings):
    """Return the logits (views, N, classes) of the paintings {path: label}, on the CPU."""
    device, logits = train_model.move_to_fastest(model), []
    for view in VIEW_PLACES[settings.views]:
        paintings = train_model.Paintings(folder, labels, places, image_size, view=view)
        loader = train_model.make_loader(paintings, settings.batch_size, settings.workers, device)
        logits.append(train_model.evaluate(model, loader, "test"))
    return torch.stack(logits)


def predict_and_score(settings):
    """Score the best model on its test paintings, or classify the pictures that are named."""
    run, model = train_model.from_first(load_best, settings.output_dir)
    if settings.pictures:
        files = find_own_pictures(settings.pictures)
        train_model.from_first(classify, model, run, VIEW_PLACES[settings.views], files)
        return
    image_size = run["settings"]["IMAGE_SIZE"]
    folder = train_model.copies_folder(settings.small_dir, image_size)
    places = train_model.from_first(prepare_test, run, folder, settings)
    labels = {path: run["split"]["test"][path] for path in places}
    views = predict_views(model, labels, places, folder, image_size, settings)
    train_model.from_first(write_results, run, places, views, folder, settings)


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    parser = train_model.make_parser(__doc__, SETTINGS, train_model.__file__, __file__)
    parser.add_argument("pictures", nargs="*", help="classify these pictures and folders instead")
    return train_model.run_script(predict_and_score, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
