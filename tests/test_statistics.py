import pytest
import torch
from torch import nn

from dfqlib.errors import UserError
from dfqlib.models.batch_norm_statistics import BatchNormInputs, batch_mean_var, sample_mean_square, sample_mean_std


class RegisteredBackwards(nn.Module):
    """Runs conv, a, b, a, but registers b before a."""

    def __init__(self):
        super().__init__()
        self.b = nn.BatchNorm2d(2)
        self.a = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(3, 2, 1)
        self.untracked = nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x):
        return self.untracked(self.a(self.b(self.a(self.conv(x)))))


def test_statistics_by_hand():
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[5.0, 7.0]], [[0.0, 8.0]]]])  # (2, 2, 1, 2)
    mean, variance = batch_mean_var(x)
    assert mean.tolist() == [4.0, 2.0]
    assert variance.tolist() == [5.0, 12.0]  # biased: (9 + 1 + 1 + 9) / 4 and (4 + 4 + 4 + 36) / 4
    mean, variance = batch_mean_var(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))  # features without space
    assert mean.tolist() == [2.0, 2.0] and variance.tolist() == [1.0, 0.0]
    mean, std = sample_mean_std(x)
    assert mean.tolist() == [[2.0, 0.0], [6.0, 4.0]]
    torch.testing.assert_close(std.square() - 1e-6, torch.tensor([[2.0, 0.0], [2.0, 32.0]]))  # unbiased: (1 + 1) / 1
    assert sample_mean_square(x).tolist() == [[5.0, 0.0], [37.0, 32.0]]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1)])
def test_a_sample_without_space_has_the_statistics_of_the_batch(shape):
    x = torch.randn(shape, requires_grad=True)
    mean, std = sample_mean_std(x)
    for found, expected in ((mean, x.flatten(1).mean(0)), (std.square() - 1e-6, x.flatten(1).var(0, correction=0))):
        torch.testing.assert_close(found, expected.expand(4, 3))
    mean.square().sum().backward()
    torch.testing.assert_close(x.grad.flatten(1), 2 * mean.detach())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("statistics", [batch_mean_var, sample_mean_std, sample_mean_square])
def test_gradient_is_that_of_the_definition(statistics, memory_format):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(statistics, x)


def test_large_offset_does_not_cancel():
    x = torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(batch_mean_var(x + 1000)[1], batch_mean_var(x)[1], rtol=1e-3, atol=0)


def test_inputs_come_in_execution_order_and_those_of_an_earlier_pass_stay():
    network = RegisteredBackwards().eval()
    with BatchNormInputs(network) as norms:
        network(torch.randn(5, 3, 4, 4))
        earlier = norms.layers
        images = torch.randn(2, 3, 4, 4)
        network(images)
        assert [len(layer.tensor) for layer in earlier] == [5, 5, 5]
        assert [(layer.name, layer.norm) for layer in norms.layers] == [
            ("a", network.a),
            ("b", network.b),
            ("a:2", network.a),
        ]
        torch.testing.assert_close(norms.layers[0].tensor, network.conv(images))
        torch.testing.assert_close(norms.layers[1].tensor, network.a(network.conv(images)))
    with pytest.raises(RuntimeError), norms:
        network(torch.zeros(1, 4, 4, 4))  # four channels do not fit
    assert norms.layers == [] and not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_without_running_statistics_is_refused():
    with pytest.raises(UserError, match="Sequential has no batch norm with running statistics"):
        BatchNormInputs(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)))
