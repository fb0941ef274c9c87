"""What holds on a CUDA GPU; skipped where there is none.

GPU_TESTS_ON_CPU=1 runs on the CPU what has a meaning there, to try the tests themselves.
"""

import copy
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import test_model
import train_model as tm
from tests.conftest import QUICK, ROOT, TINY, folders
from tests.paintings import paint_artgan

CUDA = torch.cuda.is_available()
ON_CPU = bool(os.environ.get("GPU_TESTS_ON_CPU")) and not CUDA
pytestmark = pytest.mark.skipif(not (CUDA or ON_CPU), reason="there is no CUDA GPU")
on_cuda_alone = pytest.mark.skipif(not CUDA, reason="has no meaning on a CPU")


class Pictures(torch.utils.data.Dataset):
    """Random pixels, as `Paintings` gives them."""

    seed = 3

    def __init__(self, count, size=224):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        pixels = np.random.default_rng(key).integers(0, 256, (self.size, self.size, 3), np.uint8)
        return torch.from_numpy(pixels), key[0] % 5


def set_up(count, batch_size, size=64, precision=None):
    """Return what `train_epoch` takes for a pass over random pictures."""
    torch.manual_seed(0)
    model = tm.ArtClassifier(5)
    device = tm.move_to_fastest(model)
    model.precision = precision or model.precision
    loader = tm.make_loader(Pictures(count, size), batch_size, 0, device)
    optimizer = tm.make_optimizer(model, 1e-3, 0.1, 0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision is torch.float16)
    model.start_training(frozen=False)
    return model, loader, optimizer, scaler, [1.0] * len(loader)


@on_cuda_alone
def test_the_precision_is_that_of_the_card(capsys):
    model = tm.ArtClassifier(5)
    device = tm.move_to_fastest(model)
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert device.type == "cuda" and next(model.parameters()).is_cuda
    assert model.precision is (torch.bfloat16 if bf16 else torch.float16)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision,close", [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_logits_are_those_of_the_cpu(real_network, precision, close):
    if precision is torch.float16 and not CUDA:
        pytest.skip("CPUs have no fp16 here")
    torch.manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    model = tm.ArtClassifier(5).eval()
    with torch.no_grad():
        expected = model(images)
        device = tm.move_to_fastest(model)
        model.precision = precision
        logits = model(images.to(device)).cpu()
    assert logits.dtype is torch.float32
    assert (logits - expected).abs().max() < close * max(1, expected.abs().max())


def test_every_convolution_is_in_half_precision_and_channels_last(real_network):
    model, seen = tm.ArtClassifier(5).eval(), []
    device = tm.move_to_fastest(model)
    model.precision = model.precision or torch.bfloat16

    def note(module, given, output):
        layout = given[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((output.dtype, layout, module.weight.is_contiguous(
            memory_format=torch.channels_last)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        model(tm.to_images(pixels, device))
    assert len(seen) == 53
    assert {row[0] for row in seen} == {model.precision} and all(row[1] and row[2] for row in seen)


@on_cuda_alone
def test_steps_wait_for_the_device_once_in_twenty():
    def waits(steps):
        given = set_up(4 * steps, 4)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                tm.train_epoch(*given, "")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    waits(2)  # the first pass chooses algorithms
    assert waits(39) - waits(19) == 1


def test_an_overflow_in_fp16_skips_its_step():
    half = torch.float16 if CUDA else None
    model, loader, optimizer, _, rates = set_up(8, 4, precision=half)
    model.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    scaler = torch.amp.GradScaler("cuda" if CUDA else "cpu", init_scale=2.0**16)
    before = copy.deepcopy(model.state_dict())
    tm.train_epoch(model, loader, optimizer, scaler, rates, "")
    assert scaler.get_scale() == 2.0**14
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, before[name]), name  # both steps were skipped


def test_a_scaler_that_only_skips_is_an_error():
    model, loader, optimizer, _, rates = set_up(8, 4)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, init_scale=0.5)
    with pytest.raises(ValueError, match="not finite"):
        tm.train_epoch(model, loader, optimizer, scaler, rates, "a title")


@on_cuda_alone
def test_batches_of_64_take_at_most_five_and_a_half_gib(real_network):
    given = set_up(128, 64, size=224)
    torch.cuda.reset_peak_memory_stats()
    tm.train_epoch(*given, "")
    assert torch.cuda.max_memory_allocated() < 5.5 * 2**30


def test_loaders_and_none_agree(finished, tmp_path):
    losses = []
    for workers in ("0", "2"):
        flags = [*finished.flags, "--output-dir", str(tmp_path / workers), "--workers", workers]
        assert tm.main([*flags, "--epochs", "1"]) == 0
        run = tm.load_checkpoint(tmp_path / workers / "model_last.pth")
        losses.append(run["history"][0]["training_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_goes_from_one_device_to_another_and_back(tmp_path):
    paint_artgan(tmp_path / "wikiart", each=6, size=(100, 80))
    flags = [*folders(tmp_path), *QUICK]
    for epochs, devices in (("1", None), ("2", ""), ("3", None)):
        hidden = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        run = subprocess.run(
            [sys.executable, "-c", f"{TINY}sys.exit(tm.main(sys.argv[1:]))", *flags, "--epochs",
             epochs], cwd=ROOT, env=os.environ | hidden, text=True, capture_output=True)
        assert run.returncode == 0, run.stderr
    history = tm.load_checkpoint(tmp_path / "out/model_last.pth")["history"]
    assert len(history) == 3 and all(math.isfinite(row["training_loss"]) for row in history)
    assert test_model.main([*flags[:2], *flags[4:8], "--workers", "0"]) == 0


@on_cuda_alone
def test_too_little_memory_is_one_line(finished, tmp_path, capsys, real_network):
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "1"]
        assert tm.main([*flags, "--batch-size", "32"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err.strip().splitlines()
    assert re.match("error: .*out of memory.*--batch-size 16", error[-1])


PLANTED = {  # what goes wrong in the second of two processes
    "loader": "tm.Paintings.__getitem__ = lambda *_: 1 / 0",
    "loss": "tm.nn.functional.cross_entropy = lambda *_, **__: 1 / 0",
    "save": "tm.save_epoch = lambda *_: 1 / 0",
    "stop": "tm.nn.functional.cross_entropy = lambda *_, **__: os.kill(os.getpid(), 2)",
}


@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", PLANTED)
def test_a_failure_of_one_process_ends_all_within_a_minute(finished, tmp_path, kind):
    rank = "0" if kind == "save" else "1"  # the first one saves
    (tmp_path / "run.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{TINY}"
        f"if os.environ['RANK'] == '{rank}':\n    {PLANTED[kind]}\n"
        "sys.exit(tm.main(sys.argv[1:]))")
    shutil.copytree(finished.folder / "wikiart", tmp_path / "wikiart")
    begun = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "run.py"), *folders(tmp_path), *QUICK, "--epochs", "3"],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and time.monotonic() - begun < 60
    assert ("stopped; " if kind == "stop" else "ZeroDivisionError") in run.stderr
