"""Qimera's generator equals the official one; superposition, embeddings and measures as the paper writes them."""

import pytest
import torch
import torch.nn.functional as F
from official import load_official, recorded
from pytorchcv.model_provider import get_model
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.generators.networks import Generator
from dfqlib.methods import qimera
from dfqlib.methods.gdfq import make_student
from dfqlib.methods.qimera import QimeraGenerator, SuperpositionSettings
from dfqlib.models.features import boundary_distance, classifier, penultimate, principal_plane, top_two_margin
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import GeneratorSchedule


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher.from_module(get_model("resnet20_cifar10"), 10, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("prefix", "mapped"), [("plain_no_mapping", 0), ("plain_mapping", 100)])
def test_generator_equals_the_official_one(prefix, mapped):
    tensors = recorded("generator_qimera")
    generator = QimeraGenerator(torch.zeros(10, 64), mapped=mapped, as_released=not mapped)
    load_official(generator, tensors, f"{prefix}/state/")
    z, labels = tensors[f"{prefix}/z"].unsqueeze(1), tensors[f"{prefix}/labels"].unsqueeze(1)
    images = generator(z, labels, torch.ones(labels.shape))
    torch.testing.assert_close(images, tensors[f"{prefix}/images"], rtol=1e-4, atol=1e-5)


def test_each_vector_is_standardised_on_its_own_unless_as_released():
    x = torch.randn(5, 3, 8) * 4 + 2
    own = qimera.standardise(x)
    torch.testing.assert_close(own[1, 2], F.batch_norm(x[1, 2].view(8, 1), None, None, training=True).flatten())
    torch.testing.assert_close(own, torch.stack([qimera.standardise(sample[None])[0] for sample in x]))
    # As released: (B, K, D) transposed to (D, K, B) before a BatchNorm1d of K channels.
    quirk = nn.BatchNorm1d(3, affine=False, track_running_stats=False)(x.transpose(0, 2)).transpose(0, 2)
    torch.testing.assert_close(qimera.standardise(x, over_batch=True), quirk)
    assert not torch.allclose(own, quirk, atol=0.1)


def test_the_latent_is_the_weighted_sum_of_the_mapped_embeddings():
    torch.manual_seed(0)
    generator = QimeraGenerator(torch.randn(4, 8), shape=(3, 8, 8), mapped=6)
    z, labels, weights = torch.randn(3, 2, 8), torch.tensor([[0, 1], [3, 3], [2, 0]]), torch.rand(3, 2)
    weights /= weights.sum(1, keepdim=True)
    seen = []
    generator.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    generator(z, labels, weights)
    each = generator.mapping(qimera.standardise(generator.embedding(labels) + z))
    torch.testing.assert_close(seen[0][0], weights[:, :1] * each[:, 0] + weights[:, 1:] * each[:, 1])
    torch.testing.assert_close(seen[0][1][1], torch.tensor([0.0, 0.0, 0.0, 1.0]))


def test_embeddings_can_be_frozen_their_noise_scaled_and_the_mapping_left_out(teacher):
    schedule, images = GeneratorSchedule(batch=4, generator_iterations=3), {}
    for change in ({}, {"frozen": True}, {"noise_scale": 0.0}, {"mapping": False}):
        stream = qimera.make_stream(teacher, schedule, SuperpositionSettings(embedding="teacher", **change))
        start = stream.generator.embedding.weight.clone()
        images[str(change)] = stream.next_batch().images
        assert torch.equal(start, stream.generator.embedding.weight) == ("frozen" in change)
        assert isinstance(stream.generator.mapping, nn.Identity) == ("mapping" in change)
    assert len({image.sum().item() for image in images.values()}) == 3  # what is frozen begins alike
    assert qimera.published_setting("resnet18", BitWidths(4, 4), SuperpositionSettings(noise_scale=0.5)).k == 500


def test_conditional_gain_and_bias_are_superposed_and_as_released_averaged():
    inputs = torch.randn(2, 2, 8), torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    given = {}
    for released in (False, True):
        generator = QimeraGenerator(torch.randn(3, 8), shape=(3, 8, 8), conditional=True, as_released=released)
        generator.body.norm1.register_forward_pre_hook(lambda _, seen, key=released: given.update({key: seen[1]}))
        generator(*inputs)
        assert generator.body.norm1.gain.shape == (3, 128)
    torch.testing.assert_close(given[False], torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(given[True], given[False] / 2)


def test_repeated_labels_add_up_in_the_targets():
    targets = qimera.soft_targets(torch.tensor([[1, 1, 0]]), torch.tensor([[0.2, 0.3, 0.5]]), 3)
    torch.testing.assert_close(targets, torch.tensor([[0.5, 0.5, 0.0]]))


def test_superposition_draws_k_labels_in_a_share_p_of_the_batches():
    generator, random = QimeraGenerator(torch.zeros(5, 8), shape=(3, 4, 4)), torch.Generator()
    draw, slots = qimera.Superposition(0.4, 3, seed=0), []
    for _ in range(400):
        (z, labels, weights), targets = draw(generator, 4, random)
        assert z.shape == (*labels.shape, 8) and weights.shape == labels.shape and targets.shape == (4, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        slots.append(labels.shape[1])
    assert set(slots) == {1, 3} and slots.count(3) / 400 == pytest.approx(0.4, abs=0.07)
    again, state = qimera.Superposition(0.4, 3, seed=7), draw.state_dict()
    again.load_state_dict(state)
    for _ in range(20):  # what is drawn after a stop is what would have been drawn without it
        assert again(generator, 1, random)[0][1].shape == draw(generator, 1, random)[0][1].shape


def test_embeddings_start_at_the_teachers_last_layer_or_random(teacher):
    weight, schedule = teacher.network.output.weight, GeneratorSchedule(batch=2)
    random = qimera.make_stream(teacher, schedule, SuperpositionSettings()).generator.embedding.weight
    stream = qimera.make_stream(teacher, schedule, SuperpositionSettings(embedding="teacher"))
    before = stream.generator.embedding.weight.clone()
    assert torch.equal(before, weight) and random.shape == weight.shape and not torch.equal(random, weight)
    stream.next_batch()
    assert not torch.equal(before, stream.generator.embedding.weight)  # they train,
    assert torch.equal(weight, stream.teacher.output.weight) and not weight.requires_grad  # the teacher does not


def test_the_classifier_may_be_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1, bias=False), nn.Flatten())
    assert classifier(network) is network[2]
    features, logits = penultimate(network, torch.randn(4, 3, 6, 6), batch=3)
    assert features.shape == (4, 8)
    torch.testing.assert_close(features @ network[2].weight.flatten(1).T, logits)
    assert boundary_distance(network, features).shape == (4,)
    assert classifier(get_model("mobilenetv2_w1")).weight.shape[:2] == (1000, 1280)
    with pytest.raises(UserError, match="Sequential does not end in"):
        classifier(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_margin_and_distance_to_the_boundary_by_hand():
    torch.testing.assert_close(top_two_margin(torch.tensor([[1.0, 1.0, -9.0]])), torch.tensor([0.0]))
    head = nn.Linear(2, 3)
    head.weight.data, head.bias.data = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-9.0, -9.0]]), torch.tensor([1.0, 0, 0])
    features = torch.tensor([[2.0, 0.5]])  # logits 7, 2: gap 5, and |w_0 - w_1| = 5
    torch.testing.assert_close(boundary_distance(head, features), torch.tensor([1.0]))
    on_boundary = features + torch.tensor([[-3.0, 4.0]]) / 5
    torch.testing.assert_close(head(on_boundary)[:, 0], head(on_boundary)[:, 1])


def test_plane_holds_the_directions_of_greatest_spread():
    torch.manual_seed(0)
    points = torch.randn(500, 3) * torch.tensor([0.1, 5.0, 1.0]) + 7
    flat = principal_plane(points)(points)
    torch.testing.assert_close(flat[:, 0], points[:, 1] - points[:, 1].mean(), atol=0.3, rtol=0)
    torch.testing.assert_close(flat[:, 1], points[:, 2] - points[:, 2].mean(), atol=0.3, rtol=0)


def test_paths_run_from_one_class_to_the_other():
    z, labels, weights = qimera.path_between(torch.tensor([[0, 3], [1, 2]]), 5, 8, torch.Generator().manual_seed(0))
    assert z.shape == (10, 2, 8) and torch.equal(z[0], z[4]) and not torch.equal(z[4], z[5])
    torch.testing.assert_close(weights[5:, 1], torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    targets = qimera.soft_targets(labels, weights, 4)
    ends = [0, 4, 5, 9]
    assert targets.argmax(1)[ends].tolist() == [0, 3, 1, 2]
    for conditional in (False, True):
        generator = Generator(4, latent=8, shape=(3, 8, 8), conditional=conditional)
        mixed = qimera.mix_in_gdfq(generator, z[ends, 0], labels[ends], weights[ends])
        torch.testing.assert_close(mixed, generator(z[ends, 0], torch.tensor([0, 3, 1, 2])))


@pytest.mark.parametrize("as_released", [False, True])
def test_a_short_run_on_resnet20(teacher, as_released):
    schedule = GeneratorSchedule(iterations=4, observe_iterations=2, train_from=2, generator_iterations=4, batch=4)
    runs = []
    for _ in range(2):
        stream = qimera.make_stream(teacher, schedule, SuperpositionSettings(p=0.5, k=3), as_released, seed=1)
        students = {str(bits): make_student(teacher, bits, schedule) for bits in (BitWidths(3, 3), BitWidths(4, 4))}
        runs.append(finetune(stream, students, schedule))
    assert len(runs[0].generator) == 4 and runs[0] == runs[1]
    assert isinstance(stream.generator.mapping, nn.Identity if as_released else nn.Linear)


def test_published_settings_by_model_and_bits():
    of = {width: qimera.published_setting("resnet20_cifar100", BitWidths(width, width)) for width in (3, 4, 5)}
    assert of[4] == SuperpositionSettings(p=0.4, k=10, embedding="teacher")
    assert (of[3].k, of[5].k) == (10, 50)
    assert qimera.published_setting("own", BitWidths(4, 4)) == SuperpositionSettings(p=0.4, k=2, embedding="random")


def test_wrong_settings_are_refused():
    for name, value in (("p", 1.5), ("k", 0), ("embedding", "zero")):
        with pytest.raises(UserError, match=f"{name}={value!r}"):
            SuperpositionSettings(**{name: value})
