"""The methods on an accelerator: no operation mixes devices, and no step of a loop waits for the host.

torch's "meta" device stands in for a GPU: its tensors have shapes and types but no values, so operations that mix
devices or read a value on the host are detected. What CUDA and MPS compute is not tested here.
"""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytorchcv.models.resnet_cifar import CIFARResNet
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfqlib.bits import BitWidths
from dfqlib.data.crops import RandomCrops
from dfqlib.data.image_sets import few_shot
from dfqlib.device import pick_device
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import FirstThen, ImageStream
from dfqlib.methods import dsg, gdfq, hast, plf, qimera, saft, zeroq
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import FakeQuantize, observing
from dfqlib.quantizers.observers import OBSERVERS
from dfqlib.schedules import AlignmentWeights, DiverseImageSchedule, GeneratorSchedule, HardImageSchedule, ImageSchedule

ACCELERATOR = torch.device("meta")
GENERATOR = torch.Generator
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
TRANSFERS = {aten._to_copy.default, aten.copy_.default}


class HostRead(Exception):
    """A value was read on the host, which waits until the accelerator has done everything before it."""


class Refused(Exception):
    """CUDA or MPS would refuse this."""


def there(tensor: torch.Tensor) -> bool:
    return tensor.device == ACCELERATOR


class Accelerator(TorchDispatchMode):
    """Raises Refused and HostRead where they are due; counts other ``operations`` and ``uploads``.

    A CPU scalar (0 dimensions) may enter elementwise operations, as an argument of their kernels. An upload is the copy
    of a CPU tensor, which waits for what runs on the accelerator unless it is ``non_blocking``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.uploads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function in READS and any(map(there, given)):
            raise HostRead(str(function))
        elementwise = torch.Tag.pointwise in function.tags
        strangers = [tensor for tensor in given if not there(tensor) and not (elementwise and tensor.dim() == 0)]
        if function not in TRANSFERS and any(map(there, given)) and strangers:
            raise Refused(f"{function} of {[(tensor.device.type, tuple(tensor.shape)) for tensor in given]}")
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as error:
            if function in TRANSFERS:
                raise HostRead(str(function)) from error
            raise
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and there(leaf)]
        self.operations += bool(made)
        if function in TRANSFERS and made and not there(given[-1]):
            self.uploads += not (kwargs.get("non_blocking") or True in args[2:])
        return result


class Calls(TorchFunctionMode):
    """Raises Refused where random numbers come from another device's generator, and for float64, which Apple's lack."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            target = torch.device(kwargs.get("device") or "cpu")
            if target.type != generator.device.type:
                raise Refused(f"{function.__name__} for {target.type} from a generator of {generator.device.type}")
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and there(result) and result.dtype == torch.float64:
            raise Refused(f"{function.__name__} gives float64")
        return result


@contextlib.contextmanager
def at_work():
    """Watches everything inside; gives the :class:`Accelerator`."""
    with Accelerator() as accelerator, Calls():
        yield accelerator


class ItsGenerator(torch.Generator):
    device = ACCELERATOR


class Generators(torch.Generator):
    """Replaces torch.Generator, which has none for the accelerator."""

    def __new__(cls, device="cpu"):
        return ItsGenerator() if torch.device(device) == ACCELERATOR else GENERATOR(device)


@pytest.fixture(autouse=True)
def generators(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generators)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = CIFARResNet(channels=[[4]], init_block_channels=4, bottleneck=False, in_size=(8, 8), num_classes=10)
    teacher = Teacher.from_module(network, 10, (0.5,) * 3, (0.25,) * 3, input_size=8)
    # Folding reads the weights, once, before any loop.
    teacher.folded.to(ACCELERATOR)
    teacher.network.to(ACCELERATOR)
    return teacher


@pytest.fixture
def readings(monkeypatch):
    """Losses read as 0; gives how many were read together each time."""
    counts = []

    def numbers(losses):
        counts.append(len(losses))
        return [0.0] * len(losses)

    monkeypatch.setattr("dfqlib.loss_terms.to_floats", numbers)
    return counts


SCHEDULE = GeneratorSchedule(batch=4, generator_iterations=9, observe_iterations=1, train_from=1)
W4A4 = BitWidths(4, 4)
PLAIN_STUDENT = partial(gdfq.make_student, schedule=SCHEDULE)


def tune(teacher, iterations, stream, widths=(W4A4,), make_student=PLAIN_STUDENT):
    """One iteration observes, the others train; gives the stream's and the students' tensors."""
    students = {str(bits): make_student(teacher, bits=bits) for bits in widths}
    for module in (module for student in students.values() for module in student.network.modules()):
        if isinstance(module, FakeQuantize):
            module._has_range = True  # each asks for it once, at the first forward pass without observing
    finetune(stream, students, replace(SCHEDULE, iterations=iterations), evaluate_every=1000)
    batch = stream.next_batch()
    parameters = [p for student in students.values() for p in student.network.parameters()]
    return [batch.images, batch.labels, batch.teacher_logits, *parameters, *(p.grad for p in parameters)]


def run_gdfq(teacher, iterations):
    return tune(teacher, iterations, gdfq.make_stream(teacher, SCHEDULE), (W4A4, BitWidths(3, 8)))


def run_qimera(teacher, iterations):
    setting = qimera.SuperpositionSettings(p=1.0, k=3, embedding="random")
    return tune(teacher, iterations, qimera.make_stream(teacher, SCHEDULE, setting))


def run_dsg_qat(teacher, iterations, **terms):
    gaps, terms = dsg.noise_gaps(teacher, 8), dsg.DiversityTerms(**terms)
    return tune(teacher, iterations, dsg.make_stream(teacher, SCHEDULE, gaps, terms=terms))


def run_saft(teacher, iterations):
    """On a generator's images first, on photographs from the second batch on."""
    probe, shots = NetworkProbe(teacher.network), few_shot("cifar10", 1)
    photographs = teacher.normalise(shots.pixels[..., 12:20, 12:20])
    stream = ImageStream(teacher.network, photographs, shots.labels.to(teacher.device), 4)
    stream = saft.WithTeacherView(FirstThen(gdfq.make_stream(teacher, SCHEDULE), 1, stream), probe)
    make_student = partial(saft.make_student, probe=probe, weights=AlignmentWeights())
    return tune(teacher, iterations, stream, make_student=make_student)


def run_plf(teacher, iterations):
    images, labels = torch.zeros(6, 3, 8, 8, device=ACCELERATOR), torch.zeros(6, dtype=torch.long, device=ACCELERATOR)
    seen = saft.WithTeacherView(ImageStream(teacher.network, images, labels, 4), NetworkProbe(teacher.network), False)
    return tune(teacher, iterations, plf.PseudoLabelled(seen, iterations), make_student=plf.make_student)


def run_zeroq(teacher, iterations):
    return [zeroq.distil_images(teacher, ImageSchedule(images=4, synthesis_iterations=iterations)).images]


def run_dsg_ptq(teacher, iterations):
    schedule = DiverseImageSchedule(images=4, synthesis_iterations=iterations)
    made = dsg.synthesise_diverse(teacher, dsg.noise_gaps(teacher, 8), schedule)
    return [made.images, made.labels]


def run_hast(teacher, iterations, guided=False):
    """``guided``, as in TexQ, by centres and on crops."""
    schedule = HardImageSchedule(images=4, synthesis_batch=4, synthesis_iterations=iterations)
    centres = hast.calibration_centres(teacher, replace(schedule, synthesis_iterations=1)) if guided else None
    made = hast.hard_images(teacher, schedule, crops=RandomCrops(8) if guided else None, centres=centres)
    return [made.images, made.labels]


LOOPS = {
    "GDFQ": run_gdfq,
    "Qimera": run_qimera,
    "DSG, QAT": run_dsg_qat,
    "DSG, QAT, as released": partial(run_dsg_qat, as_released=True),
    "SaFT": run_saft,
    "PLF": run_plf,
    "ZeroQ": run_zeroq,
    "DSG, PTQ": run_dsg_ptq,
    "HAST": run_hast,
    "TexQ": partial(run_hast, guided=True),
}


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)
def test_a_loop_stays_on_its_device_and_more_steps_wait_no_more_often(teacher, readings, run):
    seen = []
    for iterations in (2, 3):
        readings.clear()
        with at_work() as accelerator:
            results = run(teacher, iterations)
        assert all(map(there, results))
        seen.append((accelerator.operations, accelerator.uploads, len(readings), sum(readings)))
    (few, *before), (more, *after) = seen
    assert few < more and before[-1] < after[-1]  # one more step, whose losses were read with the others
    assert before[:-1] == after[:-1]


def test_the_stand_in_finds_what_an_accelerator_refuses_or_waits_for():
    here, far, rows = torch.ones(2, 3), torch.ones(2, 3, device=ACCELERATOR), torch.tensor([0, 1])
    refused = [lambda: far + here, lambda: far @ here.T, lambda: here[rows.to(ACCELERATOR)], lambda: far.double()]
    refused += [lambda: far[rows], lambda: torch.randn(3, generator=torch.Generator(), device=ACCELERATOR)]
    waits = [far.sum().item, far.tolist, far.cpu, far.nonzero, lambda: bool((far > 0).all()), lambda: here.copy_(far)]
    for error, operations in (((Refused, RuntimeError), refused), (HostRead, waits)):
        for operation in operations:
            with at_work(), pytest.raises(error):
                operation()
    with at_work():
        assert there(far + here.sum()) and there(far[rows.to(ACCELERATOR)]) and far.add_(1) is far


def test_a_step_that_reads_or_uploads_is_found(teacher):
    """The counter-examples to the loops above."""
    for image_loss, uploads in ((lambda x: x.mean(), 0), (lambda x: torch.zeros(1).to(x).sum() + x.mean(), 1)):
        stream = gdfq.make_stream(teacher, SCHEDULE, image_loss=image_loss)
        with at_work() as accelerator:
            stream.next_batch()
        assert accelerator.uploads == uploads
    stream = gdfq.make_stream(teacher, SCHEDULE, image_loss=lambda x: x.mean() * x.mean().item())
    with at_work(), pytest.raises(HostRead):
        stream.next_batch()


@pytest.mark.parametrize("name", OBSERVERS)
def test_ranges_are_observed_without_reading_them(name):
    observer = OBSERVERS[name]().to(ACCELERATOR)
    with at_work() as accelerator:
        observer.observe(torch.rand(4, 3, device=ACCELERATOR), 4)
    assert there(observer.low) and there(observer.high) and accelerator.uploads == 0


def test_data_and_teacher_meet_on_the_teachers_device(teacher):
    pixels = few_shot("cifar10", 1).pixels[..., 12:20, 12:20]
    with at_work() as accelerator:
        images = teacher.normalise(pixels)
        assert there(images) and images.dtype == torch.float32 and there(teacher.network(images))
    assert accelerator.uploads  # the pixels, before any loop
    student = quantize_model(teacher.network, W4A4)
    with observing(student):
        assert there(student(images))


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for cuda, mps, taken in [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto") == torch.device(taken)
        for name, present in (("cuda", cuda), ("cuda:1", cuda), ("mps", mps), ("mps:0", mps), ("cpu", True)):
            refused = pytest.raises(UserError, match=f"device='{name}' is not available")
            with contextlib.nullcontext() if present else refused:
                assert pick_device(name) == torch.device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cuda:2", "cuda:x", "cpu:", "cpu:1", "mps:1", "gpu"):
        with pytest.raises(UserError, match=f"device='{name}'"):
            pick_device(name)
