"""ZeroQ's images come close to the batch-norm statistics; the loop that optimises pixels; ranges and outliers."""

import pytest
import torch
from official import recorded_losses, recorded_network
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.generators.optimise_images import synthesise
from dfqlib.methods.dsg import noise_gaps
from dfqlib.methods.zeroq import distil_images, start_images, statistics_gaps, with_outliers
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.quantizers.describe import describe
from dfqlib.schedules import ImageSchedule

W8A8 = BitWidths(8, 8)


def small_teacher():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(8))
    network(torch.randn(64, 3, 8, 8))
    network = nn.Sequential(network, nn.Flatten(), nn.Linear(72, 5))
    return Teacher.from_module(network, 5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), input_size=8)


def quadratic(images):
    return (images - 1).square().sum()


def schedule(**changes):
    return ImageSchedule(**{"synthesis_iterations": 20, "synthesis_lr": 0.1} | changes)


def test_start_images_are_the_official_ones_levels():
    levels = start_images(4, (3, 8, 8)) * 5418.75 + 127.5
    assert levels.shape == (4, 3, 8, 8)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() >= -0.001 and levels.max() <= 254.001
    assert len(levels.round().unique()) > 200


def test_distilled_statistics_come_closer_and_the_teacher_stays_as_it_was():
    teacher = small_teacher()
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    made = distil_images(teacher, ImageSchedule(images=4, synthesis_iterations=60))
    images, [history] = made.images, made.losses
    assert images.shape == (4, 3, 8, 8) and not images.requires_grad and made.labels is None
    assert len(history) == 60 and history[-1] < history[0] / 3
    first, last = statistics_gaps(teacher.network, start_images(4, (3, 8, 8))), statistics_gaps(teacher.network, images)
    assert list(last.index) == ["0.1", "0.4"]
    assert (last["std_gap"] < first["std_gap"] / 3).all()
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in teacher.network.modules())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_a_seed_gives_the_same_images_again_and_another_seed_others():
    first, again, other = (distil_images(small_teacher(), schedule(images=2), seed).images for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_ranges_come_from_the_calibration_images():
    teacher = small_teacher()
    images = torch.randn(4, 3, 8, 8)
    student = calibrated(teacher.network, W8A8, images)
    table = describe(student).set_index("layer")
    expected = teacher.network[0][:3](images).max().item()
    assert table.loc["0.2", "high"] == pytest.approx(expected, rel=1e-2)
    assert (student(images) - teacher.network(images)).abs().max() < 0.1 * teacher.network(images).std()
    wider = calibrated(teacher.network, W8A8, 10 * images)
    assert describe(wider).set_index("layer").loc["0.2", "high"] > 5 * expected


def test_statistics_gaps_by_hand():
    norm = nn.BatchNorm2d(2).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 12.0]))  # mean square of sigma: 8
    one, other = [1.0, 7.0, 4.0], [-1.0, 1.0, 0.0]  # means 4 and 0, standard deviations 3 and 1
    gaps = statistics_gaps(nn.Sequential(norm), torch.tensor([[[one], [other]], [[other], [other]]])).loc["0"]
    assert gaps["mean_gap"] == pytest.approx(((9 + 0 + 1 + 0) / 4 / 8) ** 0.5, rel=1e-5)
    assert gaps["std_gap"] == pytest.approx(((1 + 1 + 2 * (12**0.5 - 1) ** 2) / 4 / 8) ** 0.5, rel=1e-5)


def test_outlier_channels_change_the_ranges_but_not_the_function():
    images, resnet = recorded_losses()["images"], recorded_network()
    network = with_outliers(resnet, factor=8)
    torch.testing.assert_close(network(images), resnet(images), rtol=1e-3, atol=1e-3)
    ranges = [describe(calibrated(each, W8A8, images)).set_index("layer")["high"] for each in (resnet, network)]
    inner = [name for name in ranges[0].index if name.endswith("conv1.activ")]
    assert len(inner) == 9
    assert (ranges[1][inner] > 2 * ranges[0][inner]).all()
    with BatchNormInputs(resnet) as before, BatchNormInputs(network) as after:
        resnet(images), network(images)
        for (_, expected, _), (_, found, _) in zip(before.layers, after.layers, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_teacher_without_batch_norm_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Teacher.from_module(network, 4, (0.5,) * 3, (0.5,) * 3)
    for use in (lambda: distil_images(teacher, schedule(images=2)), lambda: noise_gaps(teacher, 4)):
        with pytest.raises(UserError, match="no batch norm with running statistics"):
            use()


def test_synthesis_finds_the_minimum_and_leaves_the_given_images():
    given = torch.zeros(2, 3, 4, 4)
    made = synthesise(given, quadratic, schedule(synthesis_iterations=200))
    [history] = made.losses
    torch.testing.assert_close(made.images, torch.ones_like(given), rtol=0, atol=1e-2)
    assert history[0] == 96 and len(history) == 200 and not given.any()


def test_learning_rate_falls_exactly_as_pytorchs_plateau_says():
    """The loop reads losses in blocks; the images must be those of reading each loss at once."""
    losses = [5.0, 4.0, 4.5, 4.4, 4.3, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 2.9, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    for patience in (0, 1, 2, 3, 30):
        steps = iter(losses)

        def prescribed(images, steps=steps):
            return images.sum() * 0.5 + (next(steps) - (images.sum() * 0.5).detach())

        found = synthesise(torch.zeros(1, 1, 1, 1), prescribed, schedule(synthesis_patience=patience))
        expected = torch.zeros(1, 1, 1, 1, requires_grad=True)
        adam = torch.optim.Adam([expected], lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=patience, min_lr=1e-4)
        for loss in losses:
            expected.grad = torch.full_like(expected, 0.5)
            adam.step()
            plateau.step(loss)
        assert found.losses == [pytest.approx(losses)]
        torch.testing.assert_close(found.images, expected.detach())


def test_a_loss_that_is_not_finite_stops_and_names_the_iteration():
    count = iter(range(100))

    def breaks(images):
        return quadratic(images) * (float("nan") if next(count) == 7 else 1.0)

    with pytest.raises(RuntimeError, match=r"toy: the loss is nan at iteration 7; synthesis_lr=0\.1 may be too high"):
        synthesise(torch.zeros(1, 3, 2, 2), breaks, schedule(), label="toy")
