"""Observers: each derives the range of an activation from the batches it sees."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dfqlib.errors import check_range
from dfqlib.quantizers.fake_quantize import channel_ranges, fake_quantize


class RunningMinMax(nn.Module):
    """Running min of batch minima and running max of batch maxima, both from 0 (ZeroQ; DSG's "minmax").

    Base class of all observers: ``low`` and ``high`` are scalar buffers, NaN until the first ``observe``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    @torch.no_grad()
    def observe(self, x: Tensor, bits: int = 8) -> None:
        """Widen the range to include that of the batch ``x`` (N, ...); only ranges of least error use ``bits``."""
        low, high = self.batch_range(x, bits)
        # fmin and fmax ignore the initial NaN.
        self.low.copy_(torch.fmin(self.low, low.clamp(max=0)))
        self.high.copy_(torch.fmax(self.high, high.clamp(min=0)))

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The range (low, high) of one batch."""
        return x.amin(), x.amax()  # on a CPU twice as fast as aminmax over all elements


class SampleMeanMinMax(RunningMinMax):
    """Mean over the batch of each sample's min (max), then running min (max) from 0: DSG's default, there "ema"."""

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x.flatten(1), dim=1)
        return low.mean(), high.mean()


class Percentile(RunningMinMax):
    """The values below and above which 100 - ``percentile`` per cent of a batch lie, then running min (max) from 0."""

    def __init__(self, percentile: float = 99.999) -> None:
        super().__init__()
        self.percentile = check_range("percentile", percentile, 50, 100)

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        values = x.flatten()
        beyond = round(values.numel() * (1 - self.percentile / 100)) + 1
        return values.topk(beyond, largest=False).values.max(), values.topk(beyond).values.min()


def least_squares_shares(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Of each row of ``x`` (R, N), the share s (R, 1) of its range that is quantized with the least squared error.

    argmin over s = 1, 0.99, ..., 0.21 of ||x - Q(x; s low, s high)||^2, over the row's :func:`channel_ranges`.
    Source: DSG's code; OMSE (Choukroun et al., "Low-bit quantization of neural networks for efficient inference",
    2019).
    """
    low, high = channel_ranges(x, bits, symmetric=symmetric)
    shares = 1 - 0.01 * torch.arange(80, device=x.device)
    errors = [(fake_quantize(x, low * s, high * s, bits) - x).square().mean(1) for s in shares]
    return shares[torch.stack(errors).argmin(0)][:, None]


class MeanSquaredError(RunningMinMax):
    """The range with the least mean squared quantization error among the batch's own shrunk by 0, 1, ..., 79 %."""

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        share = least_squares_shares(x.reshape(1, -1), bits).squeeze()
        return share * x.amin(), share * x.amax()


class MovingAverage(RunningMinMax):
    """Exponential moving average of batch min and max, corrected for its start at 0 (GDFQ and all later papers).

    After t batches the average is divided by ``1 - beta^t``. ``compounding_correction=True`` is a quirk of the released
    code: it stores the divided value back, so the corrections compound, and a constant input of 1 reads 1, 5.3, 17.8,
    ... before it decays towards 1 over some 100 batches.
    """

    def __init__(self, beta: float = 0.9, compounding_correction: bool = False) -> None:
        super().__init__()
        self.beta = check_range("beta", beta, 0, 0.9999)
        self.compounding_correction = compounding_correction
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def observe(self, x: Tensor, bits: int = 8) -> None:
        self.batches += 1
        self.average.mul_(self.beta).add_(torch.stack(self.batch_range(x, bits)), alpha=1 - self.beta)
        corrected = self.average / (1 - self.beta**self.batches)
        if self.compounding_correction:
            self.average.copy_(corrected)
        self.low.copy_(corrected[0])
        self.high.copy_(corrected[1])


class LeastSquares(MovingAverage):
    """Moving average of each batch's range of least squared error, of at most 20,000 of its values, evenly drawn."""

    def batch_range(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        some = x.flatten()[:: -(-x.numel() // 20_000) | 1]  # an odd stride meets every column of an image
        return MeanSquaredError.batch_range(self, some, bits)


class KnownRange(RunningMinMax):
    """A range that is known and not observed, such as that of an image's pixels: of all channels, if given for each."""

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        super().__init__()
        self.low.copy_(torch.as_tensor(low).min())
        self.high.copy_(torch.as_tensor(high).max())

    def observe(self, x: Tensor, bits: int = 8) -> None:
        pass


class CommonRange(nn.Module):
    """The least range with 0 in it that holds those of some observers: of one, or of all whose values are concatenated.

    An integer runtime needs a level for 0 (it pads with it), and one grid for all parts of a concatenation.
    """

    def __init__(self, observers: Iterable[RunningMinMax]) -> None:
        super().__init__()
        self.observers = nn.ModuleList(observers)

    def observe(self, x: Tensor, bits: int, part: int) -> None:
        """Let the observer of the ``part``-th value see it."""
        self.observers[part].observe(x, bits)

    @property
    def low(self) -> Tensor:
        return functools.reduce(torch.fmin, [each.low for each in self.observers]).clamp(max=0)

    @property
    def high(self) -> Tensor:
        return functools.reduce(torch.fmax, [each.high for each in self.observers]).clamp(min=0)


OBSERVERS: dict[str, type[RunningMinMax]] = {
    "minmax": RunningMinMax,
    "sample_mean": SampleMeanMinMax,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "moving_average": MovingAverage,
    "least_squares": LeastSquares,
}
