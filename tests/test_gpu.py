"""What holds on a CUDA GPU; skipped where there is none.

GPU_TESTS_ON_CPU=1 runs on the CPU what has a meaning there, to try the tests themselves.
"""

import copy
import gc
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
from tests.conftest import QUICK, ROOT, TINY, folders, folders_to_test
from tests.paintings import paint_artgan

CUDA = torch.cuda.is_available()
ON_CPU = bool(os.environ.get("GPU_TESTS_ON_CPU")) and not CUDA
pytestmark = pytest.mark.skipif(not (CUDA or ON_CPU), reason="there is no CUDA GPU")
on_cuda_alone = pytest.mark.skipif(not CUDA, reason="has no meaning on a CPU")
# What the script of two processes begins with where they share a GPU, which NCCL refuses.
SHARED_GPU = "" if torch.cuda.device_count() > 1 else """
import torch
join, torch.cuda.set_device = tm.distributed.init_process_group, lambda number: None
tm.distributed.init_process_group = lambda backend, **others: join("gloo", **others)
"""


class Pictures(torch.utils.data.Dataset):
    """Random pixels, as `PaintingDataset` gives them."""

    def __init__(self, count, size=224):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        pixels = np.random.default_rng(key).integers(0, 256, (self.size, self.size, 3), np.uint8)
        return torch.from_numpy(pixels), key[0] % 5


def set_up(count, batch_size, size=64, precision=None, pretrained=False):
    """Return what `train_epoch` takes for an epoch of random pictures, but the title."""
    torch.manual_seed(0)
    model = tm.ArtClassifier(5)
    device = tm.place_on_device(model)
    model.precision = precision or model.precision
    batches = tm.EpochBatchSampler(count, batch_size, seed=3)
    batches.epoch = 1
    loader = torch.utils.data.DataLoader(Pictures(count, size), batch_sampler=batches,
                                         pin_memory=device.type == "cuda")
    optimizer = tm.make_optimizer(model, 1e-3, 0.1, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision is torch.float16)
    model.start_training(pretrained, frozen=False)
    return model, loader, optimizer, schedule, scaler


@on_cuda_alone
def test_the_precision_is_that_of_the_card(capsys):
    model = tm.ArtClassifier(5)
    device = tm.place_on_device(model)
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
        device = tm.place_on_device(model)
        model.precision = precision
        logits = model(images.to(device)).cpu()
    assert logits.dtype is torch.float32
    assert (logits - expected).abs().max() < close * max(1, expected.abs().max())


def test_every_convolution_is_in_half_precision_and_channels_last(real_network):
    model, seen = tm.ArtClassifier(5).eval(), []
    device = tm.place_on_device(model)
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


@pytest.mark.filterwarnings("ignore:Detected call of")  # of an AdamW that is not fused
def test_an_overflow_in_fp16_skips_its_step():
    half = torch.float16 if CUDA else None
    model, loader, optimizer, schedule, _ = set_up(8, 4, precision=half)
    model.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    scaler = torch.amp.GradScaler("cuda" if CUDA else "cpu", init_scale=2.0**16)
    before = copy.deepcopy(model.state_dict())
    tm.train_epoch(model, loader, optimizer, schedule, scaler, "")
    assert scaler.get_scale() == 2.0**14
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, before[name]), name  # both steps were skipped


@on_cuda_alone
@pytest.mark.parametrize("pretrained,most", [(True, 0), (False, 5)])
def test_few_steps_are_skipped_in_fp16(real_network, pretrained, most):
    """With random weights: those of fixed norms have smaller gradients."""
    given = set_up(64, 8, precision=torch.float16, pretrained=pretrained)
    tm.train_epoch(*given, "")
    assert given[-1].get_scale() >= 2.0 ** (16 - most)


def test_a_scaler_that_only_skips_is_an_error():
    model, loader, optimizer, schedule, _ = set_up(8, 4)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, init_scale=0.5)
    with pytest.raises(tm.InputError, match="not finite"):
        tm.train_epoch(model, loader, optimizer, schedule, scaler, "a title")


@on_cuda_alone
def test_batches_of_64_take_at_most_five_and_a_half_gib(real_network):
    """And far less where the norms are fixed."""
    peaks = []
    for pretrained in (False, True):
        given = set_up(128, 64, size=224, pretrained=pretrained)
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        tm.train_epoch(*given, "")
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
        del given
    assert peaks[1] + 0.8 < peaks[0] < 5.5


def free_memory():
    """Give memory that is no longer used back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


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
    assert test_model.main([*folders_to_test(tmp_path), "--workers", "0"]) == 0


@pytest.mark.parametrize("half", ["own", "fp16"])
def test_a_resumed_epoch_is_the_one_not_stopped(finished, tmp_path, monkeypatch, half):
    """Within what the order of a GPU's sums does to it; another dropout alone is twice the bound.

    The CPU's is the same bit for bit. Either resumes from the same second of three epochs.
    """
    if half == "fp16":
        if not CUDA:
            pytest.skip("CPUs have no fp16 here")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    save_epoch = tm.save_epoch

    def save_and_copy(run, *others):
        save_epoch(run, *others)
        if len(run["history"]) == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
            shutil.copytree(tmp_path / "whole", tmp_path / "start")

    with monkeypatch.context() as patch:
        patch.setattr(tm, "save_epoch", save_and_copy)
        assert tm.main([*finished.flags, "--epochs", "3", "--output-dir", f"{tmp_path}/whole"]) == 0
    assert tm.main([*finished.flags, "--epochs", "3", "--output-dir", f"{tmp_path}/stopped"]) == 0
    weights = {}
    for name in ("start", "whole", "stopped"):
        model = tm.load_checkpoint(tmp_path / name / "model_last.pth")["model"]
        weights[name] = torch.cat([value.double().flatten() for key, value in model.items()
                                   if not key.endswith(("running_mean", "running_var"))])
    distance = (weights["stopped"] - weights["whole"]).norm()
    assert distance <= 0.25 * CUDA * (weights["whole"] - weights["start"]).norm()


@on_cuda_alone
def test_too_little_memory_is_one_line(finished, tmp_path, capsys, real_network):
    free_memory()
    allowed = torch.cuda.memory_reserved() + 2**28  # bytes; the weights alone are 2**27 or so
    torch.cuda.set_per_process_memory_fraction(
        allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        flags = [*finished.flags, "--output-dir", str(tmp_path), "--epochs", "1"]
        assert tm.main([*flags, "--batch-size", "32"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()
    error = capsys.readouterr().err.strip().splitlines()
    assert re.match("error: .*out of memory.*--batch-size 16", error[-1])


def torchrun(script, code, flags):
    """Run code and then training, with the tiny network, in two processes, on one GPU if need be.

    Return the finished process.
    """
    begin = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{TINY}{SHARED_GPU}"
    script.write_text(f"{begin}{code}\nsys.exit(tm.main(sys.argv[1:]))", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), *flags], cwd=ROOT, capture_output=True, text=True, timeout=180)


def test_two_processes_train_as_one(finished, tmp_path):
    """With fixed norms and without dropout, so that shares of a batch are like the whole."""
    torch.manual_seed(6)
    torch.save(tm.resnet50().state_dict(), tmp_path / "resnet.pth")
    flags = [*finished.flags, "--weights", str(tmp_path / "resnet.pth"), "--dropout", "0",
             "--frozen-epochs", "0", "--epochs", "2", "--output-dir"]
    run = torchrun(tmp_path / "run.py", "", [*flags, str(tmp_path / "two")])
    assert run.returncode == 0, run.stderr
    assert tm.main([*flags, str(tmp_path / "one")]) == 0
    one, two = (tm.load_checkpoint(tmp_path / name / "model_last.pth") for name in ("one", "two"))
    assert one["split"] == two["split"] and one["device"] == two["device"]
    for row, other in zip(one["history"], two["history"], strict=True):
        for name in ("training_loss", "validation_loss"):
            assert row[name] == pytest.approx(other[name], rel=0.02)
    for path, (label, likeliest, *_) in one["margins"].items():
        assert two["margins"][path][:2] == pytest.approx([label, likeliest], abs=0.1), path


PLANTED = {  # what goes wrong in one of two processes
    "loader": "tm.PaintingDataset.__getitem__ = lambda *_: 1 / 0",
    "loss": "tm.nn.functional.cross_entropy = lambda *_, **__: 1 / 0",
    "save": "tm.save_epoch = lambda *_: 1 / 0",
    "stop": "tm.nn.functional.cross_entropy = lambda *_, **__: os.kill(os.getpid(), 2)",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_failure_of_one_process_ends_all_within_a_minute(finished, tmp_path, kind):
    rank = "0" if kind == "save" else "1"  # the first one saves
    begun = time.monotonic()
    run = torchrun(tmp_path / "run.py", f"if os.environ['RANK'] == '{rank}':\n    {PLANTED[kind]}",
                   [*finished.flags, "--output-dir", str(tmp_path / "out"), "--epochs", "3"])
    assert run.returncode != 0 and time.monotonic() - begun < 60
    assert ("stopped; " if kind == "stop" else "ZeroDivisionError") in run.stderr
