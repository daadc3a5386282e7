"""One iteration of each method in plain torch, as the authors' code computes it: what the kit is measured against.

Written from the papers and from the order of computation in the authors' code, without any of the kit's shortcuts:
batch norms unfolded, memory in torch's default format, upsampling before the convolution, ``mean`` and ``var`` one
after the other, every step of the quantizer a tensor of its own, hooks for statistics and for Grad-CAM. What only some
of the authors' code does, and what slows it down for nothing, is left out: weight gradients of the teacher, hooks added
anew at every iteration, metrics brought to the CPU. These steps are the better case of theirs.

Every class with ``step()``, one iteration, which returns its losses, also has ``trained``, the tensors it changes.
Random numbers are drawn as the kit draws them, so that both compute the same.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 20.0


class Rounding(torch.autograd.Function):
    """``x`` on the 2^bits levels over (low, high); the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
        scale = (2**bits - 1) / torch.clamp(high - low, min=1e-8)
        zero = torch.round(scale * low) + 2 ** (bits - 1)
        q = torch.clamp(torch.round(scale * x - zero), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (q + zero) / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def rounded_rows(weight: Tensor, bits: int) -> Tensor:
    """``weight`` (O, ...) with one range per output channel."""
    rows = weight.detach().contiguous().view(len(weight), -1)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return Rounding.apply(weight, rows.min(1).values.view(shape), rows.max(1).values.view(shape), bits)


class QuantizedConv(nn.Module):
    """A convolution whose weight is rounded anew at each forward."""

    def __init__(self, layer: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, rounded_rows(self.layer.weight, self.bits)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is rounded anew at each forward."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rounded_rows(self.layer.weight, self.bits), self.layer.bias)


class QuantizedReLU(nn.Module):
    """A ReLU, then rounding over the moving averages, beta 0.9, of batch minima and maxima while ``observing``."""

    def __init__(self, relu: nn.Module, bits: int) -> None:
        super().__init__()
        self.relu, self.bits, self.observing, self.batches = relu, bits, False, 0
        self.register_buffer("averages", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        if self.observing:
            self.batches += 1
            self.averages = 0.9 * self.averages + 0.1 * torch.stack([x.detach().min(), x.detach().max()])
        low, high = self.averages / (1 - 0.9**self.batches)
        return Rounding.apply(x, low, high, self.bits)


def quantized(network: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """A copy of ``network`` with every convolution, linear layer and ReLU replaced, whose parameters train."""
    network = copy.deepcopy(network).eval().requires_grad_(True)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, QuantizedConv(child, weight_bits))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, QuantizedLinear(child, weight_bits))
            elif isinstance(child, nn.ReLU):
                setattr(parent, name, QuantizedReLU(child, activation_bits))
    return network.to(next(network.parameters()).device)


def observe(network: nn.Module, images: Tensor) -> None:
    """One forward pass in which the activation ranges of a quantized ``network`` are learned."""
    relus = [module for module in network.modules() if isinstance(module, QuantizedReLU)]
    for relu in relus:
        relu.observing = True
    with torch.no_grad():
        network(images)
    for relu in relus:
        relu.observing = False


def by_name(network: nn.Module) -> list[Tensor]:
    """Parameters in the order of their names, which is the same where a layer is wrapped."""
    return [parameter for _, parameter in sorted(network.named_parameters(), key=lambda named: named[0])]


def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The students' optimizer."""
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)


class Watched:
    """A teacher with hooks on its batch norms: called with images, its logits and (batch norm, its input) for each."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.inputs = copy.deepcopy(teacher), []
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda norm, given, _: self.inputs.append((norm, given[0])))

    def __call__(self, images: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
        self.inputs.clear()
        return self.teacher(images), self.inputs


def bns_loss(inputs: list[tuple[nn.Module, Tensor]]) -> Tensor:
    """L_BNS of a batch: GDFQ."""
    loss = 0
    for norm, x in inputs:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        loss = loss + F.mse_loss(mean, norm.running_mean) + F.mse_loss(variance, norm.running_var)
    return loss / len(inputs)


def sample_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, C) of each sample of ``x`` (B, C, H, W) over space."""
    flat = x.view(x.shape[0], x.shape[1], -1)
    return flat.mean(2), torch.sqrt(flat.var(2) + 1e-6)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """tau^2 KL(T || S) of logits (B, classes)."""
    log_student = F.log_softmax(student / TEMPERATURE, 1)
    return TEMPERATURE**2 * F.kl_div(log_student, F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")


class GdfqInput(nn.Module):
    """Embedding of the label times noise."""

    features = latent = 100

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.embedding = classes, nn.Embedding(classes, self.latent)

    def draw(self, count: int, random: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        z = torch.randn(count, self.latent, generator=random, device=random.device)
        labels = torch.randint(self.classes, (count,), generator=random, device=random.device)
        return (z, labels), labels

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.embedding(labels) * z


class QimeraInput(nn.Module):
    """Noisy embeddings of K classes, standardised and mapped, then superposed; K is 1 for some batches."""

    def __init__(self, classes: int, latent: int, features: int, p: float, k: int, seed: int) -> None:
        super().__init__()
        self.classes, self.latent, self.features, self.p, self.k = classes, latent, features, p, k
        self.embedding, self.mapping = nn.Embedding(classes, latent), nn.Linear(latent, features)
        self.coin = torch.Generator().manual_seed(seed)

    def draw(self, count: int, random: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        slots = (count, self.k if torch.rand((), generator=self.coin).item() < self.p else 1)
        z = torch.randn(*slots, self.latent, generator=random, device=random.device)
        labels = torch.randint(self.classes, slots, generator=random, device=random.device)
        weights = torch.randn(slots, generator=random, device=random.device).softmax(1)
        return (z, labels, weights), (weights.unsqueeze(2) * F.one_hot(labels, self.classes)).sum(1)

    def forward(self, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        noisy = (self.embedding(labels) + z).flatten(0, 1)
        each = F.batch_norm(noisy.T, None, None, training=True).T.view(z.shape)
        return (weights.unsqueeze(2) * self.mapping(each)).sum(1)


class Generator(nn.Module):
    """``entry`` and the body for 32 x 32: upsample, then convolve."""

    def __init__(self, entry: nn.Module) -> None:
        super().__init__()
        self.entry, self.linear, self.norm0 = entry, nn.Linear(entry.features, 128 * 8 * 8), nn.BatchNorm2d(128)
        self.conv1, self.norm1 = nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128, 0.8)
        self.conv2, self.norm2 = nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64, 0.8)
        self.conv3, self.norm3 = nn.Conv2d(64, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.norm0(self.linear(self.entry(*inputs)).view(-1, 128, 8, 8))
        x = F.leaky_relu(self.norm1(self.conv1(F.interpolate(x, scale_factor=2))), 0.2)
        x = F.leaky_relu(self.norm2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


class GeneratorTuning:
    """GDFQ and Qimera: a step of the generator, then one of the student, which only observes in the first iteration."""

    def __init__(self, teacher: nn.Module, generator: Generator, bits: tuple[int, int], batch: int, seed: int) -> None:
        device = next(teacher.parameters()).device
        self.teacher, self.generator, self.batch = Watched(teacher), generator.to(device), batch
        self.student, self.started = quantized(teacher, *bits), False
        self.adam = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.sgd = sgd(self.student, 1e-4)
        self.random = torch.Generator(device).manual_seed(seed)
        self.trained = [*generator.parameters(), *by_name(self.student)]

    def step(self) -> list[float]:
        inputs, labels = self.generator.entry.draw(self.batch, self.random)
        images = self.generator(*inputs)
        logits, norms = self.teacher(images)
        loss = F.cross_entropy(logits, labels) + 0.1 * bns_loss(norms)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return [loss.item(), *self.tune(images.detach(), labels, logits.detach())]

    def tune(self, images: Tensor, labels: Tensor, logits: Tensor) -> list[float]:
        if not self.started:
            self.started = True
            observe(self.student, images)
            return []
        output = self.student(images)
        loss = F.cross_entropy(output, labels) + distillation(output, logits)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return [loss.item()]


class Table:
    """Several runs, one bit width each, one after the other."""

    def __init__(self, runs: list[GeneratorTuning]) -> None:
        self.runs = runs
        self.trained = [*runs[0].generator.parameters(), *(x for run in runs for x in by_name(run.student))]

    def step(self) -> list[float]:
        losses = [run.step() for run in self.runs]
        return [losses[0][0], *(loss for each in losses for loss in each[1:])]


class Synthesis:
    """Adam on the pixels of ``images`` (B, 3, H, W); ``loss_of`` takes them, the logits and the batch norms' inputs."""

    def __init__(
        self, teacher: nn.Module, images: Tensor, loss_of: Callable[..., Tensor], lr: float, patience: int
    ) -> None:
        self.teacher, self.loss_of = Watched(teacher), loss_of
        self.images = images.clone().requires_grad_()
        self.adam = torch.optim.Adam([self.images], lr=lr)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.adam, patience=patience, min_lr=1e-4)
        self.trained = [self.images]

    def step(self) -> list[float]:
        loss = self.loss_of(self.images, *self.teacher(self.images))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.plateau.step(loss.item())
        return [loss.item()]


def zeroq_loss(images: Tensor, logits: Tensor, inputs: list[tuple[nn.Module, Tensor]]) -> Tensor:
    """Squared gaps of each sample's statistics, those of the images included."""
    mean, std = sample_statistics(images)
    loss = (mean**2).sum() + ((std - 1) ** 2).sum()
    for norm, x in inputs:
        mean, std = sample_statistics(x)
        loss = loss + ((mean - norm.running_mean) ** 2).sum()
        loss = loss + ((std - torch.sqrt(norm.running_var + 1e-6)) ** 2).sum()
    return loss / len(images)


def hast_loss(labels: Tensor, beta: float, gamma: float) -> Callable[..., Tensor]:
    """L_BNS + beta mean((1 - p_y)^gamma CE) for ``labels`` (B,)."""

    def loss_of(images: Tensor, logits: Tensor, inputs: list[tuple[nn.Module, Tensor]]) -> Tensor:
        probabilities = F.softmax(logits, 1)[torch.arange(len(labels)), labels]
        hard = (1 - probabilities) ** gamma * F.cross_entropy(logits, labels, reduction="none")
        return bns_loss(inputs) + beta * hard.mean()

    return loss_of


def eigenvectors(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the cosines between ``samples`` (B, ...), the greatest entry of each positive."""
    flat = F.normalize(samples.view(len(samples), -1))
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    greatest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.sign(greatest)


def correlation(images: Tensor, noise: Tensor) -> Tensor:
    """DSG's spatial correlation of ``images`` with ``noise``, both (B, 3, H, W)."""
    (values, vectors), (wanted, directions) = eigenvectors(images), eigenvectors(noise)
    weights = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    return 1e-4 * F.mse_loss(values, wanted) + (weights * -(vectors * directions).sum(0)).sum().abs()


def image_prior(images: Tensor, shift: int) -> Tensor:
    """Total variation and length of ``images`` (B, 3, H, W), rolled by ``shift`` pixels."""
    x = torch.roll(images, (shift, shift), (2, 3))
    across, down = x[:, :, :, :-1] - x[:, :, :, 1:], x[:, :, :-1, :] - x[:, :, 1:, :]
    rising, falling = x[:, :, 1:, :-1] - x[:, :, :-1, 1:], x[:, :, :-1, :-1] - x[:, :, 1:, 1:]
    variation = torch.norm(across) + torch.norm(down) + torch.norm(rising) + torch.norm(falling)
    return variation + torch.norm(x.view(len(x), -1), dim=1).mean()


def dsg_loss(labels: Tensor, margins: tuple[Tensor, Tensor], shift: int, seed: int) -> Callable[..., Tensor]:
    """Slack and enhanced statistics + correlation / L + 2 CE + 0.01 image prior; ``margins`` (L,) each."""
    layers, random = len(margins[0]), torch.Generator(labels.device).manual_seed(seed + 2)
    rolls = torch.Generator().manual_seed(seed + 1)
    torch.randint(10, labels.shape, generator=rolls)  # the labels come first from this stream

    def loss_of(images: Tensor, logits: Tensor, inputs: list[tuple[nn.Module, Tensor]]) -> Tensor:
        mean, std = sample_statistics(images)
        loss = (mean**2).sum() + ((std - 1) ** 2).sum()
        for index, (norm, x) in enumerate(inputs):
            mean, std = sample_statistics(x)
            gap = torch.clamp((mean - norm.running_mean).abs() - margins[0][index], min=0) ** 2
            wanted = torch.sqrt(norm.running_var + 1e-6)
            gap = gap + torch.clamp((std - wanted).abs() - margins[1][index], min=0) ** 2
            counts = torch.ones(len(images), device=images.device)
            counts[index::layers] = 2
            loss = loss + (counts * gap.sum(1)).sum()
        noise = torch.randn(images.shape, generator=random, device=images.device)
        roll = int(torch.randint(-shift, shift, (1,), generator=rolls))
        loss = loss / len(images) + correlation(images, noise) / layers
        return loss + 2 * F.cross_entropy(logits, labels) + 0.01 * image_prior(images, roll)

    return loss_of


class Looked:
    """A network with hooks: logits and channel attentions of a pass, and Grad-CAM maps of a pass of their own."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.attentions, self.features = network, [], None
        for name, module in network.named_modules():
            if name.endswith(".body"):
                module.register_forward_hook(lambda _, given, output: self.attentions.append(attention(output)))
        network.features.final_pool.register_forward_pre_hook(self.keep)

    def keep(self, pool: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.features = given[0]

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.attentions = []
        return self.network(images), self.attentions

    def grad_cam(self, images: Tensor) -> Tensor:
        """Maps (B, H, W) of each image's own top class, for which the network runs again."""
        logits = self.network(images)
        top = logits.gather(1, logits.argmax(1, keepdim=True)).sum()
        (gradient,) = torch.autograd.grad(top, self.features, retain_graph=True)
        weights = torch.clamp(gradient.mean((2, 3), keepdim=True), min=0)
        maps = F.relu((weights * self.features).sum(1, keepdim=True))
        maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps - low) / torch.clamp(high - low, min=1e-8)


def attention(x: Tensor) -> Tensor:
    """Share of each channel in the energy of ``x`` (B, C, h, w)."""
    return F.normalize((x**2).mean((2, 3)), dim=1)


class Alignment:
    """SaFT and SynQ: agreement on images, on perturbed copies, of Grad-CAM maps; the first iteration only observes."""

    def __init__(self, teacher: nn.Module, images: Tensor, labels: Tensor, bits: tuple[int, int], seed: int) -> None:
        student = quantized(teacher, *bits)
        self.teacher, self.student = Looked(copy.deepcopy(teacher)), Looked(student)
        self.images, self.labels, self.started = images, labels, False
        self.sgd, self.random = sgd(student, 1e-5), torch.Generator().manual_seed(seed)
        self.trained = by_name(student)

    def agreement(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted, looks = self.teacher(images)
        output, ours = self.student(images)
        easy = 1 - F.softmax(wanted, 1)[torch.arange(len(labels)), labels] < 0.5
        losses = F.cross_entropy(output, labels, reduction="none")
        cross_entropy = (losses * easy).sum() / torch.clamp(easy.sum(), min=1)
        gaps = sum(F.mse_loss(mine, theirs) for mine, theirs in zip(ours, looks, strict=True))
        return 20 * distillation(output, wanted) + 0.05 * cross_entropy + 2000 * gaps

    def step(self) -> list[float]:
        order = torch.randperm(len(self.labels), generator=self.random).to(self.labels.device)
        images, labels = self.images[order], self.labels[order]
        if not self.started:
            self.started = True
            observe(self.student.network, images)
            return []
        images.requires_grad_()
        loss = self.agreement(images, labels)
        (slope,) = torch.autograd.grad(loss, images, retain_graph=True)
        harder = (images + 0.02 * torch.sign(slope)).detach()
        maps = self.student.grad_cam(images), self.teacher.grad_cam(images).detach()
        loss = loss + self.agreement(harder, labels) + 20 * F.mse_loss(*maps)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return [loss.item()]
