"""Measure how well outliers.csv finds wrong labels, by planting some.

    python tests/planted.py wikiart wikiart_csv [flags of train_model.py]

Flips 5 % of ArtGAN's style labels, in the training and the test list alike, trains and tests on
them with the two scripts, and prints how well the margin, and for comparison low confidence in
general, find the planted ones among the test paintings: AUROC, and precision among as many as were
planted. Uniform flips go to any other style that has paintings; most-confused flips go to the
style that a model without flips takes the true one for most often.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_model
import train_model
from tests.paintings import write_lists


def train_and_test(data_dir, class_names, listed, folder, flags):
    """Train and test on the lists; return {path: row of predictions.csv and outliers.csv}."""
    write_lists(folder / "lists", "style", class_names, list(listed["train"].items()),
                list(listed["test"].items()))
    places = [f"--data-dir={data_dir}", f"--small-dir={folder.parent / 'small'}",
              f"--output-dir={folder}"]
    if train_model.main([*places, f"--lists-dir={folder / 'lists'}", *flags]):
        sys.exit(1)
    if test_model.main([*places, "--outliers-per-class=1000000"]):
        sys.exit(1)
    rows = {}
    for name in ("predictions.csv", "outliers.csv"):
        with open(folder / name, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["path"], {}).update(row)
    return rows


def flip(listed, choose, seed):
    """Return the lists with 5 % of their labels flipped to choose(label), and the flipped paths."""
    random = np.random.default_rng(seed)
    flipped, planted = {}, set()
    for part, labels in listed.items():
        paths = sorted(labels)
        chosen = random.choice(len(paths), round(len(paths) / 20), replace=False)
        planted |= {paths[place] for place in chosen}
        flipped[part] = {path: choose(label, random) if path in planted else label
                         for path, label in labels.items()}
    return flipped, planted


def describe(kind, rows, planted):
    """Print how well two scores find the planted labels among the rows."""
    truth = np.array([path in planted for path in rows])
    scores = {"margin of the given label": [float(row["margin"]) for row in rows.values()],
              "low confidence in general": [-float(row["probability"]) for row in rows.values()]}
    for name, values in scores.items():
        first = np.argsort(-np.array(values), kind="stable")[: truth.sum()]
        print(f"{kind}, {name}: AUROC {roc_auc_score(truth, values):.2f}, precision "
              f"{truth[first].mean():.2f} ({truth[first].sum()} of {truth.sum()} planted among "
              f"{len(rows)})")


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="All flags are those of train_model.py.")
    parser.add_argument("data_dir")
    parser.add_argument("lists_dir", type=Path)
    options, flags = parser.parse_known_args()
    data_dir = options.data_dir
    try:
        class_names, labels, test_list = train_model.read_lists(options.lists_dir, "style")
    except ValueError as error:
        sys.exit(f"error: {error}")
    listed = {"train": {path: label for path, label in labels.items() if path not in test_list},
              "test": {path: labels[path] for path in labels if path in test_list}}
    used = sorted(set(labels.values()))
    with tempfile.TemporaryDirectory() as name:
        rows = train_and_test(data_dir, class_names, listed, Path(name, "plain"), flags)
        taken = Counter((row["class"], row["predicted"]) for row in rows.values())
        confused = {
            label: max((other for other in used if other != label),
                       key=lambda other: taken[class_names[label], class_names[other]])
            for label in used}
        ways = {
            "uniform": lambda label, random: random.choice([x for x in used if x != label]).item(),
            "most confused": lambda label, random: confused[label]}
        results = []
        for kind, choose in ways.items():
            flipped, planted = flip(listed, choose, seed=0)
            rows = train_and_test(data_dir, class_names, flipped, Path(name, kind), flags)
            results.append((kind, rows, planted & rows.keys()))
        for result in results:
            describe(*result)


if __name__ == "__main__":
    main()
