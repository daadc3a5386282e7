"""Schedules: one small dataclass each for image synthesis, generators and fine-tuning, without torch.

The defaults are the published values for CIFAR; a profile overrides them by name.
"""

import math
from dataclasses import dataclass

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError, check_choice
from dfqlib.settings import Settings, setting

#: Where in a run (0 to 1) the learning rate is divided by 10.
FALLS = {"step": (0.25, 0.5, 0.75), "late_step": (0.4, 0.8), "cosine": (), "constant": ()}
DECAYS = tuple(FALLS)
SALIENCY_LAYERS = ("activations", "convolution")
CAMS = ("gradcam", "gradcam++")
FOREVER = 10**9  # iterations
#: Of a comparison: where images come from. ``few-shot`` is one real training image per class, ``real`` ten.
SOURCES = ("noise", "zeroq", "dsg", "gdfq", "qimera", "hast", "few-shot", "real")
#: What is done with the images. ``ranges``: one pass sets the activation ranges, nothing is trained (ZeroQ, DSG).
#: ``gdfq``: cross-entropy and distillation. ``saft``: distillation with selective cross-entropy, attention and
#: saliency, also on harder copies of the images.
USES = ("ranges", "gdfq", "saft")
CALIBRATIONS = ("published", "corrected")  # of the students, before they are tuned


def decay_factor(decay: str, progress: float) -> float:
    """What the learning rate is multiplied by at ``progress`` (0 to 1) of its run.

    ``"step"``: 0.1 at epochs 100, 200 and 300 of the published 400; ``"late_step"``: 0.1 at epochs 20 and 40 of SaFT's
    50; ``"cosine"``: half a cosine from 1 to 0, with a linear warm-up from 0.1 over the first tenth, without which the
    loss of students of many bits first rises; ``"constant"``: 1.
    """
    check_choice("decay", decay, DECAYS)
    if decay == "cosine":
        return min(1, 0.1 + 9 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 ** sum(progress >= fall for fall in FALLS[decay])


@dataclass(frozen=True, kw_only=True)
class ImageSchedule(Settings):
    """Images made by optimising their pixels with Adam. The defaults are ZeroQ's."""

    images: int = setting(32, 1, 10**7)
    synthesis_iterations: int = setting(500, 1, FOREVER)
    synthesis_lr: float = setting(0.5, 1e-12, 1e6)  # in units of the normalised pixels
    synthesis_patience: int = setting(100, 0, FOREVER)  # iterations without gain until the rate is divided by 10
    synthesis_min_lr: float = setting(1e-4, 0, 1e6)  # where that ends

    def __post_init__(self) -> None:
        super().__post_init__()
        end, begin = self.synthesis_min_lr, self.synthesis_lr
        if end > begin:
            raise UserError(f"synthesis_min_lr={end!r} is above synthesis_lr={begin!r}; allowed: at most {begin!r}.")


@dataclass(frozen=True, kw_only=True)
class DiverseImageSchedule(ImageSchedule):
    """DSG's images, by its published script."""

    images: int = setting(40, 2, 10**7)  # one sample is like no other
    synthesis_lr: float = setting(0.9, 1e-12, 1e6)
    synthesis_patience: int = setting(260, 0, FOREVER)
    label_weight: float = setting(2.0, 0, 1e6)  # of the cross-entropy to random labels
    prior_weight: float = setting(0.01, 0, 1e6)  # of the image prior


@dataclass(frozen=True, kw_only=True)
class HardImageSchedule(ImageSchedule):
    """HAST's images, made in batches."""

    images: int = setting(5120, 1, 10**7)
    synthesis_batch: int = setting(256, 2, 2**20)
    synthesis_iterations: int = setting(1000, 1, FOREVER)
    synthesis_patience: int = setting(50, 0, FOREVER)


@dataclass(frozen=True, kw_only=True)
class TuningSchedule(Settings):
    """The fine-tuning of students. The defaults are SaFT's: 50 epochs of 200 iterations."""

    iterations: int = setting(10_000, 2, FOREVER)  # the observing ones included
    observe_iterations: int = setting(800, 1, FOREVER)  # in which students only learn their activation ranges
    train_from: int = setting(800, 1, FOREVER)  # the iteration at which students begin to train
    batch: int = setting(64, 2, 2**20)
    student_lr: float = setting(1e-5, 1e-12, 1e3)  # SGD, Nesterov momentum 0.9, weight decay 1e-4
    decay: str = setting("late_step", choices=DECAYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        iterations, observe_iterations, train_from = self.iterations, self.observe_iterations, self.train_from
        if not observe_iterations <= train_from < iterations:
            raise UserError(
                f"{observe_iterations=}, {train_from=}, {iterations=} leave nothing to observe or to train; allowed: "
                "0 < observe_iterations <= train_from < iterations."
            )


@dataclass(frozen=True, kw_only=True)
class CalibratedSchedule(TuningSchedule):
    """The fine-tuning of students that are calibrated already, and so need not observe."""

    observe_iterations: int = setting(0, 0, 0)
    train_from: int = setting(0, 0, FOREVER)


@dataclass(frozen=True, kw_only=True)
class GeneratorSchedule(TuningSchedule):
    """A generator's training and the fine-tuning on its images. The defaults are GDFQ's: 400 epochs of 200."""

    iterations: int = setting(80_000, 2, FOREVER)
    batch: int = setting(200, 2, 2**20)  # a batch norm cannot learn from one image
    student_lr: float = setting(1e-4, 1e-12, 1e3)
    decay: str = setting("step", choices=DECAYS)  # of both learning rates
    generator_warmup: int = setting(0, 0, FOREVER)  # iterations of the generator alone, before a student sees an image
    generator_iterations: int = setting(80_000, 0, FOREVER)  # in all; afterwards the generator is left as it is
    generator_lr: float = setting(1e-3, 1e-12, 1e3)  # Adam, betas (0.5, 0.999)
    bns_weight: float = setting(0.1, 0, 1e6)  # of L_BNS in L_G
    ce_weight: float = setting(1.0, 0, 1e9)  # of CE in L_S
    kl_weight: float = setting(1.0, 0, 1e9)  # alpha, of tau^2 KL in L_S
    temperature: float = setting(20.0, 1e-6, 1e6)  # tau
    kl_mean_over_classes: bool = False  # True is the published quirk: KL divided by the number of classes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.kl_weight or self.ce_weight):
            raise UserError("kl_weight and ce_weight are both 0: nothing to learn; allowed: at least one above 0.")


@dataclass(frozen=True, kw_only=True)
class Corrected(Settings):
    """The students beside a method's own that get the kit's calibration on the method's images."""

    corrected_bits: list[BitWidths] = setting(["W4A4", "W5A5", "W3A3"])


@dataclass(frozen=True, kw_only=True)
class Corrections(Corrected):
    """The kit's calibration and its tuning of these students."""

    corrected_images: int = setting(4096, 2, 10**7)
    corrected_iterations: int = setting(150, 1, FOREVER)
    corrected_batch: int = setting(32, 2, 2**20)
    corrected_lr: float = setting(5e-4, 1e-12, 1e3)  # of Adam, on the outputs of residual units and the logits
    corrected_refinement: int = setting(0, 0, FOREVER)  # iterations by HAST's loss of the images first
    corrected_mixed: int = setting(0, 0, 100)  # times that they are so refined anew, for labels mixed of two classes


@dataclass(frozen=True, kw_only=True)
class AlignmentWeights(Settings):
    """The weights of SaFT's fine-tuning loss; 0 switches a term off.

    ``epsilon`` is how far the perturbed copies are moved, in normalised pixels. ``perturbed_attention=False`` is the
    published code on CIFAR: a slip of operator precedence drops FA from the perturbed copies, which halves its weight.
    ``saliency_of`` as for :class:`dfqlib.finetuning.network_views.NetworkProbe`: the published code takes the last
    ``"convolution"``; ``cam`` as for :func:`dfqlib.finetuning.grad_cam.grad_cam`.
    """

    kl_weight: float = setting(20.0, 0, 1e9)  # alpha, of tau^2 KL
    temperature: float = setting(20.0, 1e-6, 1e6)  # tau
    ce_weight: float = setting(0.05, 0, 1e9)  # lambda_CE
    easy_below: float = setting(0.5, 0, 2)  # cross-entropy only where the difficulty 1 - p_T(y) is less
    attention_weight: float = setting(2000.0, 0, 1e9)  # lam, of FA
    epsilon: float = setting(0.02, 0, 1e9)
    perturbed_weight: float = setting(1.0, 0, 1e9)  # lambda_pert, of all terms on the perturbed copies
    saliency_weight: float = setting(20.0, 0, 1e9)  # lambda_CAM
    perturbed_attention: bool = True
    saliency_of: str = setting("activations", choices=SALIENCY_LAYERS)
    cam: str = setting("gradcam", choices=CAMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.kl_weight or self.ce_weight or self.attention_weight or self.saliency_weight):
            raise UserError("kl_weight, ce_weight, attention_weight and saliency_weight are all 0: nothing to learn.")


@dataclass(frozen=True, kw_only=True)
class Mixture(Settings):
    """How often (``p``, per batch) and of how many classes (``k``) Qimera's samples are superposed."""

    p: float = setting(0.4, 0, 1)
    k: int = setting(2, 1, 10**6)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSwitches(Settings):
    """Of Qimera's class embeddings: ``frozen`` ones stay as they start, ``mapping`` is the disentanglement mapping."""

    frozen: bool = False
    noise_scale: float = setting(1.0, 0, 1e6)  # of the noise that is added to them
    mapping: bool = True


@dataclass(frozen=True, kw_only=True)
class Budget(Settings):
    """What every source and every use of a comparison may spend: the same for all, or they could not be compared.

    No paper has this table: the defaults are what the two-stage papers share, within an hour on a GPU.
    """

    images: int = setting(5120, 2, 10**7)  # in a pool, at most: real images may be fewer
    synthesis_iterations: int = setting(1000, 1, FOREVER)  # of an image optimisation, or of a generator's training
    synthesis_lr: float = setting(0.5, 1e-12, 1e6)  # of Adam on pixels
    batch: int = setting(256, 2, 2**20)  # images an iteration, in a generator's training and in fine-tuning
    generator_lr: float = setting(1e-3, 1e-12, 1e3)
    tuning_iterations: int = setting(10_000, 2, FOREVER)
    student_lr: float = setting(1e-5, 1e-12, 1e3)
    kl_weight: float = setting(100.0, 0, 1e9)  # of GDFQ's fine-tuning, whose KL is not divided by the classes here
