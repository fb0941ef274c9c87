"""Test the best checkpoint of train_model.py on paintings that it has not learned from.

    python test_model.py                      the scores, predictions.csv, outliers.csv, report.html
    python test_model.py photo.jpg folder/    the five likeliest classes of pictures of one's own
    python test_model.py --help               every setting as a flag

Reads   model_best.pth in OUTPUT_DIR, which names the test paintings, and those paintings.
Writes  into OUTPUT_DIR predictions.csv (one row a test painting), outliers.csv (paintings that
        might not fit the class they are assigned to) and report.html (all of it to look at).
"""

import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_model
from train_model import shown

# ---------------------------------------------------------------------------------------- settings
# DATA_DIR, SMALL_DIR, OUTPUT_DIR, BATCH_SIZE and WORKERS are those of train_model.py.

OUTLIERS_PER_CLASS = 20  # rows a class in outliers.csv, the most doubtful first

SHARED = ("DATA_DIR", "SMALL_DIR", "OUTPUT_DIR", "BATCH_SIZE", "WORKERS")
SETTINGS = {name: train_model.SETTINGS[name] for name in SHARED}
SETTINGS["OUTLIERS_PER_CLASS"] = OUTLIERS_PER_CLASS
train_model.NUMBERS["OUTLIERS_PER_CLASS"] = (int, 0, 10**6)

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
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def yardsticks(paths, labels, artists):
    """Return the accuracy of two guesses that look at no picture, as {name: share}.

    One always names the largest class of the test list; the other goes by the artist in the file
    name: that artist's commonest class outside the test, {artist: label} with "" for all others.
    """
    guesses = [artists.get(train_model.artist(path), artists[""]) for path in paths]
    return {
        "always the largest class": Counter(labels).most_common(1)[0][1] / len(labels),
        "the artist's commonest class": np.mean(np.equal(guesses, labels)).item(),
    }


def predict(paths, logits, labels, class_names):
    """Return a row a painting: what it is, what the model says, and how far the two are apart.

    margin: the best other logit over that of the given class; positive where the model disagrees.
    """
    probabilities = logits.double().softmax(1)
    given = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    rows = zip(paths, labels.tolist(), logits.argmax(1).tolist(), others.indices.tolist(),
               (others.values - given[:, 0]).tolist(), (logits > given).sum(1).tolist())
    return [{
        "path": path,
        "class": class_names[label],
        "predicted": class_names[best],
        "probability": round(probabilities[place, best].item(), 6),
        "class_probability": round(probabilities[place, label].item(), 6),
        "class_rank": 1 + better,
        "fits_better": class_names[other],
        "margin": round(margin, 4),
    } for place, (path, label, best, other, margin, better) in enumerate(rows)]


def find_outliers(predictions, class_names, most):
    """Return the `most` paintings of each class that doubt the class they are given, by margin.

    The margin of the given label found planted labels where low confidence in general did not.
    """
    ranked = sorted(predictions, key=lambda row: (-row["margin"], row["path"]))
    return {name: [row for row in ranked if row["class"] == name][:most] for name in class_names}


# ------------------------------------------------------------------------------------ own pictures


def classify(model, class_names, image_size, precision, names):
    """Print the five likeliest classes of each picture; folders stand for the pictures in them.

    Raises ValueError at the end if any could not be read.
    """
    files = []
    for name in map(Path, names):
        inside = sorted(path for path in name.rglob("*") if train_model.is_picture(path.name))
        files += inside if name.is_dir() else [name]
    device, failed = next(model.parameters()).device, 0
    for file in files:
        try:
            with Image.open(io.BytesIO(train_model.encode_small(file))) as image:
                pixels = np.array(train_model.centre(image, image_size))
        except Exception as error:  # of nearly any kind, from Pillow
            print(f"{shown(file)}: cannot be read: {shown(error)}", file=sys.stderr)
            failed += 1
            continue
        images = train_model.to_images(torch.from_numpy(pixels)[None], device)
        with torch.inference_mode(), torch.autocast(device.type, precision, precision is not None):
            logits = model(images)
        best = logits[0].double().softmax(0).topk(min(5, len(class_names)))
        pairs = zip(best.values.tolist(), best.indices.tolist())
        named = [f"{shown(class_names[label])} {100 * share:.1f} %" for share, label in pairs]
        print(f"{shown(file)}: {', '.join(named)}")
    if failed or not files:
        raise ValueError(f"{failed} of {len(files)} pictures could not be read")


# -------------------------------------------------------------------------------------------- main


def judge(settings):
    """Score the best checkpoint, or classify the pictures that the command line names."""
    checkpoint_file = settings.output_dir / "model_best.pth"
    if not checkpoint_file.exists():
        raise FileNotFoundError(f"there is no {shown(checkpoint_file)}: run train_model.py first")
    checkpoint = train_model.load_checkpoint(checkpoint_file)
    class_names, image_size = checkpoint["class_names"], checkpoint["settings"]["IMAGE_SIZE"]
    model = train_model.ArtClassifier(len(class_names))
    train_model.load_state(model, checkpoint["model"], checkpoint_file)
    device, precision = train_model.choose_device()
    train_model.to_device(model, device).eval()
    if settings.pictures:
        return classify(model, class_names, image_size, precision, settings.pictures)

    found, listed = train_model.find_paintings(settings.data_dir), checkpoint["test"]
    train_model.check_folders(settings.data_dir, settings.small_dir, settings.output_dir)
    places = train_model.match(listed, found)
    tested = {places[path]: found[places[path]] for path in listed if path in places}
    bad = train_model.prepare(tested, settings.data_dir, settings.small_dir)
    paths = [path for path in listed if path in places and places[path] not in bad]
    if not paths:
        raise ValueError(f"none of the {len(listed):,} test paintings of {shown(checkpoint_file)} "
                         f"is in {shown(settings.data_dir)}")
    paintings = train_model.Paintings(settings.small_dir, [places[path] for path in paths],
                                      [listed[path] for path in paths], image_size)
    batches = train_model.Batches(settings.batch_size)
    batches.keep_order(range(len(paths)))
    loader = train_model.make_loader(paintings, batches, settings.workers, device)
    logits, labels = train_model.evaluate(model, loader, precision, "test")

    scores = score(logits, labels)
    guesses = yardsticks(paths, labels.tolist(), checkpoint["artists"])
    predictions = predict([places[path] for path in paths], logits, labels, class_names)
    outliers = find_outliers(predictions, class_names, settings.outliers_per_class)
    columns = ("path", "class", "predicted", "probability", "class_probability", "class_rank")
    train_model.write_table(settings.output_dir / "predictions.csv",
                            [{column: row[column] for column in columns} for row in predictions])
    columns = ("path", "class", "fits_better", "margin", "class_probability")
    train_model.write_table(settings.output_dir / "outliers.csv",
                            [{column: row[column] for column in columns}
                             for rows in outliers.values() for row in rows])

    low, high = scores["interval"]
    print(f"{checkpoint['settings']['ATTRIBUTE']}, {len(class_names)} classes; model of epoch "
          f"{checkpoint['epoch']}, validation accuracy {checkpoint['validation_accuracy']:.2%}")
    print(f"95 % interval {low:.2%} to {high:.2%}; macro-F1 {scores['macro_f1']:.2%}; balanced "
          f"accuracy {scores['balanced_accuracy']:.2%}; calibration error "
          f"{scores['calibration_error']:.2%}")
    for name, share in guesses.items():
        print(f"yardstick, {name}: {share:.2%}")
    if len(class_names) > 5:
        print(f"top-5 accuracy: {scores['top5']:.2%}")
    missing = len(listed) - len(paths)
    print(f"{missing:,} of {len(listed):,} test paintings are missing or cannot be read")
    right = int(scores["confusion"].trace())
    print(f"Test accuracy: {100 * right / len(paths):.2f} % "
          f"({right:,} of {len(paths):,} paintings)")


def main(argv=None):
    """Run the script with the flags in `argv`, by default the command line's."""
    parser = train_model.make_parser(__doc__, SETTINGS, train_model.__file__, __file__)
    parser.add_argument("pictures", nargs="*", help="classify these pictures and folders instead")
    return train_model.run_script(judge, parser, SETTINGS, argv)


if __name__ == "__main__":
    sys.exit(main())
