"""Measure how well outliers.csv finds wrong labels, by planting some.

    python tests/planted.py wikiart wikiart_csv [--stand-in] [flags of train_model.py]

Flips 5 % of ArtGAN's style labels, in the training and the test list alike, trains and tests on
them with the two scripts, and prints how well the margin, the artist prior and the doubt that joins
them find the planted ones: AUROC, average precision, and the share of them in the first 5 %. Flips
go to any other style that has paintings, or to the style with which a model without flips confuses
the true one most often. With --stand-in, the network is the small pretrained one of
tests/standin.py, which says what to install.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_model
import train_model
from tests.paintings import write_lists


def train_and_test(data_dir, class_names, listed, folder, flags):
    """Train and test on the lists; return the rows of predictions.csv and of outliers.csv."""
    write_lists(folder / "lists", "style", class_names, list(listed["train"].items()),
                list(listed["test"].items()))
    flags = [f"--cache-dir={folder.parent / 'cache'}", *flags, f"--data-dir={data_dir}",
             f"--output-dir={folder}"]
    if train_model.main([*flags, f"--lists-dir={folder / 'lists'}"]):
        sys.exit(1)
    settings = {name: getattr(train_model, name) for name in train_model.SHARED}
    parser = train_model.make_parser(train_model.__doc__, settings, train_model.__file__)
    shared = vars(parser.parse_known_args(flags)[0])
    if test_model.main([f"--{name.replace('_', '-')}={value}" for name, value in shared.items()]):
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
    parts = {part: np.array([row["part"] == part for row in rows]) for part in train_model.PARTS}
    margins = np.array([float(row["margin"]) for row in rows])
    for inside in parts.values():  # margins of training and of the test differ in size
        margins[inside] = (margins[inside] - margins[inside].mean()) / margins[inside].std()
    prior = test_model.make_prior(run["split"], "style", run["class_names"])
    label_of = {path: label for labels in run["split"].values() for path, label in labels.items()}
    scores = np.array([prior(row["path"], label_of[row["path"]])["score"] for row in rows])
    doubt = np.array([float(row["doubt"]) for row in rows])
    truth = np.array([row["path"] in planted for row in rows])
    for place, inside in ({"all": np.full(len(rows), True)} | parts).items():
        for name, values in (("margin", margins), ("prior", scores),
                             ("doubt", doubt)):  # without a prior, its score is 0
            wrong, found = truth[inside], values[inside]
            first = np.argsort(-found, kind="stable")[: round(len(found) / 20)]
            print(f"{kind}, {place}, {name}: AUROC {roc_auc_score(wrong, found):.3f}, average "
                  f"precision {average_precision_score(wrong, found):.3f}, "
                  f"{wrong[first].sum() / wrong.sum():.0%} of {wrong.sum()} in the first 5 %")


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="All other flags are those of train_model.py.")
    parser.add_argument("data_dir")
    parser.add_argument("lists_dir", type=Path)
    parser.add_argument("--flips", type=int, default=0, dest="seed", help="their seed [0]")
    parser.add_argument("--stand-in", action="store_true", help="a small pretrained network")
    options, flags = parser.parse_known_args()
    data_dir = options.data_dir
    try:
        class_names, labels, test_list = train_model.read_lists(options.lists_dir, "style")
    except (train_model.InputError, OSError) as error:
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
