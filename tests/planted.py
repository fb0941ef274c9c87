"""Measure how well outliers.csv finds wrong labels, by planting some.

    python tests/planted.py wikiart wikiart_csv [--stand-in] [flags of train_model.py]

Flips 5 % of ArtGAN's style labels, in the training and the test list alike, trains and tests on
them with the two scripts, and prints how well the margin alone, the witness alone and both find
the planted ones in the whole collection: AUROC, precision among as many as were planted, and the
share of them in the first 5 %. Flips go to any other style that has paintings, or to the style
that a model without flips takes the true one for most often. With --stand-in, the network is the
small pretrained one of tests/standin.py, which says what to install.
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
    """Train and test on the lists; return the rows of predictions.csv and of outliers.csv."""
    write_lists(folder / "lists", "style", class_names, list(listed["train"].items()),
                list(listed["test"].items()))
    places = [f"--data-dir={data_dir}", f"--small-dir={folder.parent / 'small'}",
              f"--output-dir={folder}"]
    if train_model.main([*places, f"--lists-dir={folder / 'lists'}", *flags]):
        sys.exit(1)
    if test_model.main([*places, "--outliers-per-class=1000000"]):
        sys.exit(1)
    tables = []
    for name in ("predictions.csv", "outliers.csv"):
        with open(folder / name, encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    return tables


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


def describe(kind, rows, run, planted):
    """Print how well three scores find the planted labels among the rows."""
    doubt, margins = [float(row["doubt"]) for row in rows], np.zeros(len(rows))
    for part in train_model.PARTS:
        own = np.array([row["part"] == part for row in rows])
        margins[own] = test_model.rank_shares(
            [float(row["margin"]) for row in rows if row["part"] == part])
    testify = test_model.make_witness(run["split"], "style", run["class_names"])
    label_of = {path: label for labels in run["split"].values() for path, label in labels.items()}
    scores = [testify(row["path"], label_of[row["path"]])["score"] for row in rows]
    witness = np.nan_to_num(scores)  # 0 where there is none
    doubt = np.array(doubt)
    parts = {"the whole collection": np.ones(len(rows), dtype=bool)} | {
        part: np.array([row["part"] == part for row in rows]) for part in train_model.PARTS}
    truth = np.array([row["path"] in planted for row in rows])
    for place, inside in parts.items():
        for name, values in (("margin", margins), ("witness", witness), ("doubt", doubt)):
            order = np.argsort(-values[inside], kind="stable")
            ranked, number = truth[inside][order], truth[inside].sum()
            early = ranked[: round(len(ranked) / 20)].sum()
            print(f"{kind}, {place}, {name}: AUROC "
                  f"{roc_auc_score(truth[inside], values[inside]):.3f}, precision "
                  f"{ranked[:number].mean():.2f}, {early} of {number} planted in the first 5 %")


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="All flags are those of train_model.py.")
    parser.add_argument("data_dir")
    parser.add_argument("lists_dir", type=Path)
    parser.add_argument("--flips", type=int, default=0, dest="seed", help="their seed [0]")
    parser.add_argument("--stand-in", action="store_true", help="a small pretrained network")
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
        if options.stand_in:
            from tests import standin
            flags.append(f"--weights={standin.install(Path(name))}")
        rows, _ = train_and_test(data_dir, class_names, listed, Path(name, "plain"), flags)
        taken = Counter((row["class"], row["predicted"]) for row in rows)
        confused = {
            label: max((other for other in used if other != label),
                       key=lambda other: taken[class_names[label], class_names[other]])
            for label in used}
        ways = {
            "any other": lambda label, random: random.choice(
                [other for other in used if other != label]).item(),
            "most confused": lambda label, random: confused[label]}
        results = []
        for kind, choose in ways.items():
            flipped, planted = flip(listed, choose, options.seed)
            _, rows = train_and_test(data_dir, class_names, flipped, Path(name, kind), flags)
            run = train_model.load_checkpoint(Path(name, kind, "model_best.pth"))
            results.append((kind, rows, run, planted))
        for result in results:
            describe(*result)


if __name__ == "__main__":
    main()
