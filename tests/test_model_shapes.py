"""The model: shapes, the order of the rows, and what the LSTM is there for."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

import train_model as tm

pytestmark = pytest.mark.usefixtures("real_network")


@pytest.fixture
def model(real_network):
    torch.manual_seed(0)
    return tm.ArtClassifier(7).eval()


def test_shapes_on_the_way(model):
    seen = {}
    for name, module in (("features", model.features), ("lstm", model.lstm),
                         ("linear", model.linear)):
        module.register_forward_hook(
            lambda _, given, result, name=name: seen.update({name: (given[0], result)}))
    logits = model(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    assert seen["features"][1].shape == (2, 2048, 7, 7)
    assert seen["lstm"][0].shape == (2, 7, 2048)
    assert seen["lstm"][1][0].shape == (2, 7, 512)
    assert seen["linear"][0].shape == (2, 512)
    assert logits.shape == (2, 7) and logits.dtype == torch.float32


def test_rows_go_from_top_to_bottom(model):
    """Row n of the sequence is the mean over the columns of row n of the map, by channel."""
    feature_map = torch.randn(2, 2048, 7, 7)
    given = []
    hook = model.lstm.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    logits = model.read_rows(feature_map)
    hook.remove()
    outputs, _ = model.lstm(given[0])
    torch.testing.assert_close(logits, model.linear(outputs.sum(1) / 7))
    for row in range(7):
        torch.testing.assert_close(given[0][:, row], feature_map[:, :, row].mean(2))
    assert not torch.allclose(logits, model.read_rows(feature_map.flip(2)), atol=1e-4)
    mirrored = model.read_rows(feature_map.flip(3))  # a row's mean does not tell left from right
    torch.testing.assert_close(logits, mirrored)


def test_mixing_channels_and_places_changes_the_logits(model):
    feature_map = torch.randn(2, 2048, 7, 7)
    mixed = feature_map.reshape(2, 49, 2048).transpose(1, 2).reshape(2, 2048, 7, 7)
    assert not torch.allclose(model.read_rows(feature_map), model.read_rows(mixed), atol=1e-4)


def test_the_features_are_those_of_torchvisions_resnet():
    torch.manual_seed(2)
    features, resnet = tm.FeatureExtractor(), resnet50()
    parts = {name for name in resnet.state_dict() if not name.startswith("fc.")}
    assert features.resnet.state_dict().keys() == parts
    resnet.load_state_dict(features.resnet.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = resnet((images - features.mean) / features.std)  # trains: norms of the batch
    torch.testing.assert_close(features(images).flatten(1), expected)
    for name, value in resnet.state_dict().items():
        if name in parts:
            torch.testing.assert_close(features.resnet.state_dict()[name], value)


def test_images_are_normalised_as_imagenet(model):
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    images = tm.to_images(pixels, torch.device("cpu"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = model.features.resnet((((pixels / 255) - mean) / std).permute(0, 3, 1, 2))
    assert expected.max() > 50  # rounding moves such values by 1e-4, 0.226 for 0.225 by 0.1
    torch.testing.assert_close(model.features(images), expected, rtol=0, atol=0.01)


def test_half_precision_is_for_the_resnet_alone(model):
    """The LSTM, the logits and so the margins are float32, and near those of float32 throughout."""
    torch.manual_seed(4)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    seen = {}
    for name, module in (("resnet", model.features.resnet), ("lstm", model.lstm)):
        module.register_forward_hook(
            lambda _, given, result, name=name: seen.update({name: (given[0], result)}))
    with torch.no_grad():
        whole = model(images)
        model.precision = torch.bfloat16
        half = model(images)
    assert seen["resnet"][1].dtype == torch.bfloat16
    assert seen["lstm"][0].dtype == seen["lstm"][1][0].dtype == half.dtype == torch.float32
    assert not torch.equal(whole, half)
    torch.testing.assert_close(whole, half, rtol=0.05, atol=0.02)


def test_a_frozen_resnet_stays_as_it_is():
    """So do fixed norms after it is unfrozen, but for their weights."""
    torch.manual_seed(1)
    model = tm.ArtClassifier(3)
    before = {name: value.clone() for name, value in model.features.state_dict().items()}
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    def unmoved():
        return all(torch.equal(value, before[name])
                   for name, value in model.features.state_dict().items())

    model.start_training(pretrained=True, frozen=True)
    feature_map = model.features(images)
    assert not feature_map.requires_grad  # no gradient, so no activation is kept for one
    model(images).sum().backward()
    assert all(parameter.grad is None for parameter in model.features.parameters())
    assert model.linear.weight.grad is not None and unmoved()
    model.start_training(pretrained=True, frozen=False)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.features.parameters())
    assert unmoved()
    model.start_training(pretrained=False, frozen=False)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.features.parameters())
    assert not torch.equal(model.features.resnet.bn1.running_mean,
                           before["resnet.bn1.running_mean"])


def test_fixed_norms_are_those_of_torchvisions_resnet():
    """In double precision: the same features, and the same gradient of every weight."""
    torch.manual_seed(2)
    features, resnet = tm.FeatureExtractor().double(), resnet50().double()
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):  # as training leaves them
            for value, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5),
                               (module.running_mean, -0.5)):
                nn.init.uniform_(value, low, low + 1)
    resnet.load_state_dict(features.resnet.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    features.eval()
    resnet.eval()
    images = torch.rand(2, 3, 64, 64, dtype=torch.double) * 255
    own, expected = features(images), resnet((images - features.mean) / features.std)
    torch.testing.assert_close(own.flatten(1), expected)
    weights = torch.rand_like(expected)
    (own.flatten(1) * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(resnet.named_parameters())
    for name, parameter in features.resnet.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)


def test_fixed_norms_halve_what_is_kept_for_the_backward_pass():
    """Of each picture, in half precision."""
    def kept(pretrained, count):
        torch.manual_seed(0)
        model = tm.ArtClassifier(3).to(memory_format=torch.channels_last)
        model.precision = torch.bfloat16
        model.start_training(pretrained, frozen=False)
        tensors = {}  # by their addresses, since several share one memory

        def keep(tensor):
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(0, 256, (count, 3, 96, 96), dtype=torch.uint8))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    trained, fixed = (kept(pretrained, 4) - kept(pretrained, 2) for pretrained in (False, True))
    assert 0 < fixed < 0.6 * trained


def rows_in_order(count, generator):
    """Return feature maps of two classes whose rows are the same, upwards or downwards."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    ramp = torch.linspace(-1, 1, 7).view(1, 1, 7, 1)
    direction = (2 * labels - 1).view(-1, 1, 1, 1)
    noise = 0.3 * torch.randn(count, 2048, 7, 3, generator=generator)
    return ramp * direction + noise, labels


@pytest.mark.parametrize("pooled", [False, True])
def test_the_lstm_does_what_pooling_cannot(pooled):
    """The classes differ only in the order of the rows: the head learns it, a pooled one cannot."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(3)
    head = tm.ArtClassifier(2)
    parameters = [*head.lstm.parameters(), *head.linear.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)

    def read(maps):
        if pooled:
            maps = maps.mean(2, keepdim=True).expand_as(maps)
        return head.read_rows(maps)

    for _ in range(25):
        maps, labels = rows_in_order(32, generator)
        loss = nn.functional.cross_entropy(read(maps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    maps, labels = rows_in_order(400, generator)
    accuracy = (read(maps).argmax(1) == labels).double().mean().item()
    assert accuracy < 0.62 if pooled else accuracy > 0.95
