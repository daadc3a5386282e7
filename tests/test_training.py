"""Teacher training: the schedule, the optimizer's geometry, augmentation, and a resume that changes nothing."""

import dataclasses

import pytest
import torch
from torch import nn

from dfqlib.errors import UserError
from dfqlib.models.training import FilterMuon, Recipe, augment, choose_images, orthogonalise, train_teacher

RECIPE = Recipe(epochs=4, batch=8, warmup=1.0, sizes=(6, 8), seed=3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Dark images are class 0, bright ones class 1."""
    torch.manual_seed(1)
    labels = torch.arange(32) % 2
    pixels = torch.randint(0, 100, (32, 3, 8, 8)) + 150 * labels[:, None, None, None]
    return pixels.to(torch.uint8), labels


def train(checkpoint, recipe=RECIPE, stop_after=None):
    def stop(entry: dict[str, float]) -> None:
        if entry["epoch"] == stop_after:
            raise KeyboardInterrupt

    net, normalise = network(), lambda x: x.float() / 255
    return net, train_teacher(net, *data(), normalise, recipe, checkpoint, evaluate=lambda net: 0.0, on_epoch=stop)


def test_rate_sizes_and_pruning_follow_the_recipe():
    recipe = Recipe(epochs=10, warmup=1.0, knots=((0.4, 1.0), (0.6, 0.5), (1.0, 0.0)))
    rates = [recipe.rate(epoch) for epoch in (0.5, 1, 4, 5, 8, 10)]
    assert rates == pytest.approx([0.51, 1, 1, 0.75, 0.25, 0])
    assert [Recipe(epochs=6, sizes=(20, 24, 32)).size(epoch) for epoch in range(6)] == [20] * 2 + [24] * 2 + [32] * 2
    assert [Recipe(epochs=4, prune=0.3, full=0.75).pruned(epoch) for epoch in range(4)] == [0.3] * 3 + [0.0]


def test_images_of_low_loss_are_left_out_and_the_rest_make_up_for_them():
    losses = torch.cat([torch.full((6000,), 0.1), torch.full((2000,), 2.0)])
    order, weights = choose_images(losses, 0.5, torch.Generator().manual_seed(0))
    hard = order >= 6000
    assert hard.sum() == 2000 and len(set(order.tolist())) == len(order)
    assert (~hard).sum().item() == pytest.approx(3000, abs=150)
    assert (weights[hard] == 1).all() and (weights[~hard] == 2).all()
    everything, ones = choose_images(losses, 0.0, torch.Generator().manual_seed(0))
    assert sorted(everything.tolist()) == list(range(8000)) and (ones == 1).all()


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(6, 20), (20, 6)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_filter_step_turns_by_the_rate_and_keeps_the_norm():
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    before = filters.detach().clone()
    filters.grad = torch.randn_like(filters)
    # A gradient orthogonal to the filters, as batch norm makes it, turns them without changing their norm.
    filters.grad -= (filters.grad * before).sum() / before.square().sum() * before
    FilterMuon([filters], lr=0.01, momentum=0.0).step()
    assert filters.detach().norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    assert ((filters.detach() - before).norm() / before.norm()).item() == pytest.approx(0.01, rel=0.05)


def test_augmented_images_are_shifted_or_flipped_originals():
    image = torch.arange(1, 26).float().view(1, 1, 5, 5)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))[0, 0]
    windows = [padded[dy : dy + 5, dx : dx + 5] for dy in range(9) for dx in range(9)]
    for seed in range(20):
        out = augment(image, 5, torch.Generator().manual_seed(seed))[0, 0]
        assert any(torch.equal(out, window) or torch.equal(out, window.flip(1)) for window in windows)
    assert augment(torch.rand(2, 3, 8, 8), 6, torch.Generator().manual_seed(0)).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_stopped_training_continues_to_the_same_weights_but_with_no_other_recipe(tmp_path, average):
    recipe = dataclasses.replace(RECIPE, average=average)
    whole, whole_history = train(tmp_path / "whole.ckpt", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.ckpt", recipe, stop_after=3)
    continued, history = train(tmp_path / "stopped.ckpt", recipe)
    assert history == whole_history and history[-1]["loss"] < 0.7 * history[0]["loss"]
    for a, b in zip(whole.state_dict().values(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"epochs=9 \(it has 4\), seed=4 \(it has 3\)"):
        train(tmp_path / "stopped.ckpt", dataclasses.replace(recipe, epochs=9, seed=4))


def test_the_result_is_the_mean_of_the_last_epochs(tmp_path):
    kept = []
    for epochs in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / f"{epochs}.ckpt", stop_after=epochs)
        kept.append(torch.load(tmp_path / f"{epochs}.ckpt", weights_only=True)["state"]["network"])
    net, _ = train(tmp_path / "mean.ckpt", dataclasses.replace(RECIPE, average=0.5))
    torch.testing.assert_close(net[0].weight, (kept[0]["0.weight"] + kept[1]["0.weight"]) / 2)
    inputs = augment(data()[0].float() / 255, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(net[1].running_mean, net[0](inputs).mean((0, 2, 3)), atol=0.1, rtol=0)
    assert net[1].momentum == 0.1
