"""The parameters of each notebook: types, limits, and the published values as defaults.

A notebook's ``parameters`` cell gives the values of the quick profile; ``profiles.toml`` those of the others, and where
the published ones differ from one data set or model to another.
"""

import re
from dataclasses import dataclass, make_dataclass
from typing import Any

from dfqlib import schedules
from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.schedules import CALIBRATIONS, FOREVER, SOURCES, USES, Mixture
from dfqlib.settings import Settings, setting

MAX_SEED = 2**32 - 1  # of NumPy
PRECISIONS = ("float32", "bfloat16", "auto")


@dataclass(frozen=True, kw_only=True)
class Common(Settings):
    """What is run, and where: parameters of every notebook."""

    profile: str = "quick"
    dataset: str = "cifar10"
    model: str = "resnet20_cifar10"
    seed: int = setting(0, 0, MAX_SEED)
    device: str = "auto"
    precision: str = setting("float32", choices=PRECISIONS)  # of convolutions and large products
    out: str = ""
    data_folder: str = ""
    weights: str = ""
    per_class: int = setting(0, 0, 10**6)  # test images of each class behind an accuracy; 0 takes all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"device={self.device!r} is unknown; allowed: auto, cpu, cuda, cuda:<number>, mps.")


@dataclass(frozen=True, kw_only=True)
class Quantizing(Common):
    """Parameters of every notebook that quantizes."""

    bits: list[BitWidths] = setting(["W4A4"], least=1)


#: Parameters that say what is run and where; all others are a method's schedule, which is compared with the published.
RUN_PARAMETERS = tuple(name for name in Quantizing.kinds() if name != "per_class")
#: Of the kit's own students, which no paper has.
CORRECTIONS = (*schedules.Corrections.kinds(), "corrected_crops", "corrected_generator")


@dataclass(frozen=True, kw_only=True)
class Teachers(Common):
    """Notebook 00: the published values are the kit's own recipe, since the papers took teachers trained by others."""

    start: str = ""
    shots: int = setting(0, 0, 10)
    epochs: int = setting(60, 1, 10_000)
    batch: int = setting(128, 1, 2**20)
    watch: int = setting(500, 0, 10**6)
    checkpoint: str = ""
    compiled: bool = False
    download: bool = False


@dataclass(frozen=True, kw_only=True)
class ZeroQ(Quantizing, schedules.ImageSchedule, schedules.Corrected):
    """Notebook 01."""

    layer_bits: list[int] = setting([2, 4, 8], 2, 8, least=2)
    budgets: list[float] = setting([2.5, 3, 3.5, 4, 5], 2, 8, least=1)
    outliers: list[float] = setting([16], 1, 10_000, least=1)


@dataclass(frozen=True, kw_only=True)
class GDFQ(Quantizing, schedules.GeneratorSchedule, schedules.Corrections):
    """Notebook 02."""

    conditional: bool = False
    bias_bits: list[int] = setting([], 2, 8)
    evaluations: int = setting(396, 1, 10**6)
    ablation_generator_iterations: int = setting(4000, 1, FOREVER)
    ablation_iterations: int = setting(4000, 2, FOREVER)
    toy_iterations: int = setting(300, 1, FOREVER)


@dataclass(frozen=True, kw_only=True)
class Qimera(Quantizing, schedules.GeneratorSchedule, schedules.EmbeddingSwitches, schedules.Corrections):
    """Notebook 03."""

    published_bits: list[BitWidths] = setting(["W4A4", "W5A5", "W3A3"])
    ablation: list[Mixture] = setting(
        [{"p": p, "k": 2} for p in (0.0, 0.2, 0.4, 0.7, 1.0)] + [{"p": 0.4, "k": k} for k in (10, 25, 50)], least=1
    )
    ablation_generator_iterations: int = setting(4000, 1, FOREVER)
    ablation_iterations: int = setting(4000, 2, FOREVER)
    pictured: int = setting(300, 1, 10**6)
    pictured_classes: list[int] = setting([3, 5, 8], 0, 999)
    steps: int = setting(9, 2, 1000)
    paths: int = setting(60, 1, 10**6)
    training_images: int = setting(1000, 0, 10**6)
    gdfq_generator: str = ""
    qimera_generator: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.pictured_classes) == 1:
            raise UserError(
                f"pictured_classes={self.pictured_classes!r} is one class; allowed: at least 2, or [] for all."
            )


@dataclass(frozen=True, kw_only=True)
class DSG(Quantizing, schedules.DiverseImageSchedule, schedules.GeneratorSchedule, schedules.Corrected):
    """Notebook 04."""

    schemes: list[str] = setting(["ptq", "qat"], choices=("ptq", "qat", "control"), least=1)
    as_released: bool = False
    epsilon: float = setting(0.9, 0, 1)
    epsilons: list[float] = setting([0.0, 0.1, 0.3, 0.5, 0.7, 1.0], 0, 1)
    noise_images: int = setting(1024, 1, 10**7)
    ablation_images: int = setting(40, 2, 10**6)
    ablation_iterations: int = setting(500, 1, FOREVER)
    few_per_class: int = setting(0, 0, 10**6)


@dataclass(frozen=True, kw_only=True)
class SaFT(
    Quantizing, schedules.HardImageSchedule, schedules.TuningSchedule, schedules.AlignmentWeights, schedules.Corrections
):
    """Notebook 05."""

    centres: int = setting(0, 0, FOREVER)
    cutoff: float = setting(80.0, 1e-3, 1e6)
    shots: list[int] = setting([10, 5, 1], 1, 10, least=1)
    few_bits: list[BitWidths] = setting(["W6A6", "W5A5", "W4A4", "W3A3"])
    hast_bits: list[BitWidths] = setting(["W6A6", "W5A5", "W4A4", "W3A3"])
    generated_ranges: bool = True
    ablation_iterations: int = setting(2000, 2, FOREVER)
    evaluations: int = setting(46, 0, 10**6)
    corrected_crops: bool = True
    corrected_generator: int = setting(0, 0, FOREVER)


@dataclass(frozen=True, kw_only=True)
class PLF(Quantizing, schedules.HardImageSchedule, schedules.TuningSchedule, schedules.Corrections):
    """Notebook 09; the paper names neither batch nor iterations: they are SynQ's."""

    label_weight: float = setting(10.0, 0, 1e6)
    upper: float = setting(0.5, 0, 1)
    lower: float = setting(0.2, 0, 1)
    low_weight: float = setting(0.3, 0, 1e6)
    feature_weight: float = setting(100.0, 0, 1e9)
    iterations: int = setting(20_000, 2, FOREVER)
    batch: int = setting(256, 2, 2**20)
    student_lr: float = setting(1e-3, 1e-12, 1e3)
    evaluations: int = setting(96, 1, 10**6)
    ablation_iterations: int = setting(2000, 2, FOREVER)
    corrected_crops: bool = True
    corrected_generator: int = setting(0, 0, FOREVER)


@dataclass(frozen=True, kw_only=True)
class Compare(Quantizing, schedules.Budget):
    """Notebook 06."""

    sources: list[str] = setting(list(SOURCES), choices=SOURCES, least=1)
    uses: list[str] = setting(list(USES), choices=USES, least=1)
    calibrations: list[str] = setting(list(CALIBRATIONS), choices=CALIBRATIONS, least=1)
    repeats: int = setting(3, 1, 100)


@dataclass(frozen=True, kw_only=True)
class Calibration(Quantizing, schedules.Budget):
    """Notebook 07; ``student_lr`` is Adam's, as in ``corrected_lr``."""

    sources: list[str] = setting(["noise", "gdfq", "qimera", "real"], choices=SOURCES, least=1)
    student_lr: float = setting(5e-4, 1e-12, 1e3)


@dataclass(frozen=True, kw_only=True)
class Deploy(Quantizing, schedules.HardImageSchedule):
    """Notebook 08: no paper has it, and its longest schedule is that of the other calibrated students."""

    bits: list[BitWidths] = setting(["W8A8", "W4A8", "W4A4"], least=1)
    images: int = setting(512, 8, 10**7)
    training_iterations: int = setting(1000, 1, FOREVER)
    tuning_iterations: int = setting(400, 1, FOREVER)
    budget: float = setting(5.0, 2.5, 8)


#: By the notebook's key in ``profiles.toml``.
NOTEBOOKS: dict[str, type[Settings]] = {"teachers": Teachers}
NOTEBOOKS |= {each.__name__.lower(): each for each in Quantizing.__subclasses__()}


def declared_by(defaults: dict[str, Any]) -> type[Settings]:
    """The parameters of a notebook that is not the kit's, by the ``defaults`` of its parameters cell."""
    kinds, common = Quantizing.kinds(), Quantizing.__dataclass_fields__
    own = []
    for name, value in defaults.items():
        limits = common[name].metadata if name in common else {}
        own.append((name, kinds.get(name, type(value)), setting(value, **limits)))
    return make_dataclass("Parameters", own, bases=(Settings,), frozen=True, kw_only=True)
