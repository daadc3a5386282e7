"""DSG's losses equal the official code's and hand-worked values; margins, correlation and synthesis do as they say."""

import pytest
import torch
from official import recorded_forward, recorded_losses, recorded_network
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.finetuning.loop import finetune
from dfqlib.losses import bns_loss
from dfqlib.methods import dsg, gdfq
from dfqlib.methods.dsg import DiversityTerms, Margins
from dfqlib.methods.zeroq import zeroq_statistics_loss
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs, batch_mean_var, weighted_mean_var
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.observers import OBSERVERS
from dfqlib.schedules import DiverseImageSchedule, GeneratorSchedule


@pytest.fixture(scope="module")
def official():
    return recorded_losses()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    network(torch.randn(64, 3, 8, 8))
    return Teacher.from_module(network, 5, (0.5,) * 3, (0.25,) * 3, input_size=8)


def norm_of(mean, variance):
    norm = nn.BatchNorm2d(len(mean)).eval()
    norm.running_mean, norm.running_var = torch.tensor(mean), torch.tensor(variance)
    return norm


def test_statistics_loss_equals_the_official_one(official):
    layers = recorded_forward()[1]
    # The recorded number pairs inputs in the order of execution with statistics in the order of registration, which
    # differ where a residual unit registers its shortcut last and runs it first.
    norms = [module for module in recorded_network().modules() if isinstance(module, nn.BatchNorm2d)]
    recorded = [layer._replace(norm=norm) for layer, norm in zip(layers, norms, strict=True)]
    margins = official["dsg_margin_mean"], official["dsg_margin_std"]
    weights = dsg.sample_weights(len(layers), len(official["images"]), as_released=True)
    loss = dsg.dsg_statistics_loss(official["images"], recorded, margins, weights)
    torch.testing.assert_close(loss, official["dsg_ptq_statistics_loss"], rtol=1e-4, atol=1e-5)


def test_without_its_parts_it_is_zeroq_and_gdfq(official):
    layers, images = recorded_forward()[1], official["images"]
    nothing, ones = (torch.zeros(21), torch.zeros(21)), torch.ones(21, len(images))
    plain = dsg.dsg_statistics_loss(images, layers, nothing, ones)
    torch.testing.assert_close(plain, zeroq_statistics_loss(images, layers))
    torch.testing.assert_close(dsg.slack_bns_loss(layers, nothing, ones), bns_loss(layers), rtol=1e-4, atol=1e-4)


def test_slack_by_hand():
    layer = BatchNormInput("norm", torch.empty(1, 4, 1, 1), norm_of([0.0] * 4, [1.0] * 4))
    gaps, margins = torch.tensor([-3.0, -1.0, 0.5, 2.0]), Margins(torch.tensor([1.5]), torch.tensor([9.0]))
    assert dsg.slack_squares((gaps, gaps), margins, [layer]).tolist() == [1.5**2, 0, 0, 0.5**2]


def test_every_sample_has_a_layer_of_its_own():
    assert dsg.sample_weights(2, 5).tolist() == [[2, 1, 2, 1, 2], [1, 2, 1, 2, 1]]
    published = dsg.sample_weights(25, 45, as_released=True)
    assert torch.equal(published[:20, :20], 1 + 3 * torch.eye(20))
    assert (published[20:] == 1).all() and (published[:, 20:] == 1).all()


def test_statistics_loss_by_hand():
    # Two samples of one channel; the images are 0 with a standard deviation of about 0, so they cost 3 channels each.
    inputs = torch.tensor([[1.0, 5.0], [2.0, 2.0]]).view(2, 1, 1, 2)  # means 3 and 2, deviations 8^0.5 and 0
    layer = BatchNormInput("norm", inputs, norm_of([0.0], [1.0]))
    margins = Margins(torch.tensor([1.0]), torch.tensor([0.5]))
    first, second = 2**2 + (8**0.5 - 1 - 0.5) ** 2, 1**2 + (1 - 0.5) ** 2
    by_hand = (2 * first + second) / 2 + 3 * (1 - 1e-3) ** 2
    loss = dsg.dsg_statistics_loss(torch.zeros(2, 3, 4, 4), [layer], margins, torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(loss, torch.tensor(by_hand), rtol=1e-3, atol=1e-3)


def test_slack_bns_by_hand():
    inputs = torch.tensor([[1.0, 5.0], [2.0, 2.0]]).view(2, 1, 1, 2).repeat(1, 2, 1, 1)
    layer = BatchNormInput("norm", inputs, norm_of([0.0, 2.0], [1.0, 1.0]))
    margins = torch.tensor([1.0]), torch.tensor([0.25])
    # The first sample counts twice: mean (1 + 5 + 1 + 5 + 2 + 2) / 6, mean square (2 * 26 + 8) / 6.
    mean, square = 16 / 6, 60 / 6
    variance = square - mean**2
    by_hand = ((mean - 1) ** 2 + 0 + 2 * (variance - 1 - 0.25) ** 2) / 2
    loss = dsg.slack_bns_loss([layer], margins, torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(loss, torch.tensor(by_hand))
    # As published: mean 2.5, variance 2.25, no weights; |gap| - margin under the square, also where it is negative.
    gaps = [1.5**2 + 1**2, (0.5 - 1) ** 2 + 1**2]
    published = dsg.released_slack_bns_loss([layer], margins)
    torch.testing.assert_close(published, torch.tensor(2 * gaps[0] + gaps[1]))
    plain = dsg.released_slack_bns_loss([layer, layer], (torch.ones(2), torch.full((2,), 0.25)), enhance=False)
    torch.testing.assert_close(plain, torch.tensor(gaps[0] + gaps[1]))
    # In a second layer it is the second channel that counts twice; a third layer has no third channel.
    three = dsg.released_slack_bns_loss([layer] * 3, (torch.ones(3), torch.full((3,), 0.25)))
    torch.testing.assert_close(three, torch.tensor(sum(gaps) * 4 / 3))


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 4)])
def test_weighted_statistics_are_those_of_repeated_samples(shape):
    x = torch.randn(shape, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    repeated = torch.cat([x, x[1:2], x[3:4]])
    for pair in zip(weighted_mean_var(x, weights), batch_mean_var(repeated), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
        direction = torch.randn(4)
        gradients = [torch.autograd.grad((each * direction).sum(), x, retain_graph=True)[0] for each in pair]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_image_prior_by_hand():
    images = torch.zeros(1, 1, 2, 2)
    images[0, 0, 0, 0] = 3.0  # one difference right, one below and one diagonal of 3 each; the other diagonal is 0
    torch.testing.assert_close(dsg.image_prior_loss(images, 0), torch.tensor(3 * 3.0 + 3.0))
    torch.testing.assert_close(dsg.image_prior_loss(images, 2), dsg.image_prior_loss(images, 0))
    edge = torch.zeros(1, 1, 4, 4)
    edge[..., :2] = 1.0  # rolling a half-plane by 1 gives it a second edge
    assert dsg.image_prior_loss(edge, 1) > dsg.image_prior_loss(edge, 0)


def test_similarity_by_hand():
    samples = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    half = 0.5**0.5
    torch.testing.assert_close(dsg.similarity(samples), torch.tensor([[1, 0, half], [0, 1, half], [half, half, 1]]))
    assert dsg.mean_similarity(samples) == pytest.approx(2 * half / 3, rel=1e-5)


def test_eigenpairs_are_ordered_signed_and_have_the_right_gradient():
    torch.manual_seed(0)
    matrix = dsg.similarity(torch.randn(6, 4)).double() + torch.diag(torch.arange(6.0)).double()
    values, vectors = dsg.eigenpairs(matrix)
    assert (values.diff() > 0).all() and (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix)
    matrix.requires_grad_()
    direction = torch.randn(6, 6, dtype=torch.double)

    def function(symmetric):
        values, vectors = dsg.eigenpairs(symmetric)
        return (values.sin() + (vectors * direction).sum(0)).sum()

    gradient = torch.autograd.grad(function(matrix), matrix)[0]
    change = torch.randn(6, 6, dtype=torch.double)
    change = (change + change.T) / 2
    with torch.no_grad():
        difference = (function(matrix + 1e-6 * change) - function(matrix - 1e-6 * change)) / 2e-6
    torch.testing.assert_close((gradient * change).sum(), difference, rtol=1e-4, atol=1e-5)


def test_correlation_is_finite_where_samples_are_the_same():
    noise = torch.randn(5, 3, 4, 4)
    for images in (torch.ones(5, 3, 4, 4), torch.randn(1, 3, 4, 4).repeat(5, 1, 1, 1), torch.zeros(5, 3, 4, 4)):
        images.requires_grad_()
        loss = dsg.spatial_correlation_loss(images, noise)
        loss.backward()
        assert loss.isfinite() and images.grad.isfinite().all()


def test_correlation_by_hand():
    # Similarities 0.6 and -0.6: eigenvalues 0.4 and 1.6 each, the eigenvectors in opposite order.
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    noise = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
    torch.testing.assert_close(dsg.spatial_correlation_loss(images, noise), torch.tensor(0.0), atol=1e-6, rtol=0)
    # Against themselves: equal eigenvalues, of which the larger one counts, and equal eigenvectors.
    torch.testing.assert_close(dsg.spatial_correlation_loss(images, images), torch.tensor(1.0))
    # Similarity 0.28 has the same eigenvectors: eigenvalues 0.72 and 1.28 against 0.4 and 1.6.
    nearer = torch.tensor([[1.0, 0.0], [0.28, 0.96]])
    torch.testing.assert_close(dsg.spatial_correlation_loss(nearer, images), torch.tensor(1.0 + 1e-4 * 0.32**2))


def test_noise_gaps_are_those_of_one_batch(teacher):
    gaps = dsg.noise_gaps(teacher, 200, seed=3)
    noise = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with BatchNormInputs(teacher.network) as norms, torch.no_grad():
        teacher.network(noise)
        for place, (name, inputs, norm) in enumerate(norms.layers):
            (mean, variance), sigma = batch_mean_var(inputs), norm.running_var.sqrt()
            wanted = mean - norm.running_mean, variance.sqrt() - sigma, variance - norm.running_var, sigma
            found = gaps.mean, gaps.std, gaps.variance, gaps.sigma
            assert gaps.layers[place] == name
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours[place], theirs.abs(), rtol=1e-3, atol=1e-4)


def test_margins_are_the_quantile_of_each_layer():
    scales = (1.0, 10.0, 100.0, 1.0)
    gaps = dsg.NoiseGaps(["a", "b"], *([torch.arange(11.0), torch.tensor([s, 2 * s, 3 * s])] for s in scales))
    assert gaps.margins(0.9).mean.tolist() == pytest.approx([9.0, 2.8])
    assert gaps.margins(0.5).spread.tolist() == [5, 20]
    assert gaps.margins(0.5, "variance").spread.tolist() == [5, 200]
    assert gaps.margins(1.0).mean.tolist() == [10, 3]
    assert DiversityTerms(slack=False).margins(gaps).spread.tolist() == [0, 0]


def run(teacher, gaps, **options):
    own = {name: options.pop(name) for name in ("terms", "seed") if name in options}
    schedule = DiverseImageSchedule(**({"images": 6, "synthesis_iterations": 8} | options))
    return dsg.synthesise_diverse(teacher, gaps, schedule, **own)


def test_synthesis_lowers_its_loss_and_leaves_the_teacher(teacher):
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    gaps, options = dsg.noise_gaps(teacher, 32), {"synthesis_iterations": 40, "synthesis_lr": 0.1, "prior_weight": 0.1}
    made, again, other = (run(teacher, gaps, seed=seed, **options) for seed in (0, 0, 1))
    ((*losses,),) = made.losses
    assert made.images.shape == (6, 3, 8, 8) and made.labels.shape == (6,) and len(losses) == 40
    assert losses[-1] < losses[0] and not made.images.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert torch.equal(made.images, again.images) and torch.equal(made.labels, again.labels)
    assert not torch.equal(made.images, other.images)


@pytest.mark.parametrize(
    "change",
    [
        *({"terms": DiversityTerms(**{part: False})} for part in ("slack", "enhancement", "correlation")),
        {"terms": DiversityTerms(slack=False, enhancement=False, correlation=False, as_released=True)},  # another start
        {"terms": DiversityTerms(epsilon=0.1)},
        {"label_weight": 0.0},
        {"prior_weight": 0.0},
    ],
    ids=str,
)
def test_every_part_changes_the_images(teacher, change):
    gaps = dsg.noise_gaps(teacher, 32)
    assert not torch.equal(run(teacher, gaps).images, run(teacher, gaps, **change).images)


@pytest.mark.parametrize("terms", [DiversityTerms(), DiversityTerms(as_released=True)], ids=["paper", "as released"])
def test_a_short_tuning_run_is_the_same_again(teacher, terms):
    schedule = GeneratorSchedule(iterations=4, observe_iterations=2, train_from=2, generator_iterations=4, batch=6)
    gaps, runs = dsg.noise_gaps(teacher, 16), []
    for _ in range(2):
        stream = dsg.make_stream(teacher, schedule, gaps, terms=terms, seed=1)
        runs.append(finetune(stream, {"s": gdfq.make_student(teacher, BitWidths(4, 4), schedule)}, schedule))
    assert runs[0].generator == runs[1].generator and runs[0].students == runs[1].students
    other = dsg.make_stream(teacher, schedule, gaps, terms=DiversityTerms(as_released=not terms.as_released), seed=1)
    other.next_batch()
    assert other.read_losses()[0] != runs[0].generator[0]


def test_images_of_any_size(teacher):
    odd = Teacher.from_module(teacher.network, 5, (0.5,) * 3, (0.25,) * 3, input_size=37)
    gaps = dsg.noise_gaps(odd, 3)
    assert run(odd, gaps, synthesis_iterations=1).images.shape == (6, 3, 37, 37)
    stream = dsg.make_stream(odd, GeneratorSchedule(batch=3), gaps)
    assert stream.generator.embedding is None and stream.next_batch().images.shape == (3, 3, 37, 37)
    assert len(stream.read_losses()) == 1


def test_correlation_is_part_of_the_generators_loss(teacher):
    given = teacher, GeneratorSchedule(batch=6), dsg.noise_gaps(teacher, 16)
    with_it, without = (dsg.make_stream(*given, DiversityTerms(correlation=on)) for on in (True, False))
    images = with_it.next_batch().images
    without.next_batch()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    expected = without.read_losses()[0] + dsg.spatial_correlation_loss(images, noise) / 2
    torch.testing.assert_close(torch.tensor(with_it.read_losses()[0]), expected)


def test_deviations_spread_and_share_within_by_hand():
    network = nn.Sequential(norm_of([1.0, 0.0], [4.0, 1.0]))
    images = torch.tensor([[[[1.0, 5.0]], [[0.0, 0.0]]], [[[7.0, 7.0]], [[2.0, 0.0]]]])
    found = dsg.deviations(network, images)
    torch.testing.assert_close(found["0"], torch.tensor([[1.0, 0.0], [3.0, 1.0]]), rtol=1e-4, atol=1e-4)
    assert dsg.spread_over_samples(found)["0"] == pytest.approx(((2 + 0.5) / 2) ** 0.5, rel=1e-4)
    same = dsg.deviations(network, images[:1].repeat(3, 1, 1, 1))
    assert dsg.spread_over_samples(same)["0"] == pytest.approx(0, abs=1e-4)
    margins = Margins(torch.tensor([1.5]), torch.tensor([0.0]))
    assert dsg.share_within(network, images, margins) == [0.5]  # gaps 2, 0; 6, 1


def test_the_range_rules_are_observers():
    assert set(dsg.RANGE_RULES.values()) <= set(OBSERVERS)
