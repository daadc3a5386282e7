"""The first step of every notebook: its parameters checked, its teacher, its test images and its run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dfqlib import plotting
from dfqlib.data.image_sets import ImageSet, balanced_subset, load_test
from dfqlib.device import pick_device, seed_everything
from dfqlib.errors import check_choice
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.notebook.run import Run
from dfqlib.papers import profiles
from dfqlib.settings import Settings
from dfqlib.speed import precision


class Started(NamedTuple):
    """What a notebook works with; ``teacher`` is None in one that quantizes nothing."""

    teacher: Teacher | None
    test: ImageSet
    run: Run
    settings: Settings


def start(key: str, values: Mapping[str, Any]) -> Started:
    """Begin the notebook ``key`` of ``profiles.toml`` with the ``values`` of its parameters, such as ``globals()``.

    All parameters are checked before any work: UserError in one sentence, naming the parameter as typed. Afterwards
    figures have the kit's look, all random generators are seeded, and the teacher's accuracy is known and printed.
    """
    paper = profiles.paper(key)
    settings: Any = paper.parameters.of(values)
    check_choice("profile", settings.profile, profiles.load()[0])
    plotting.style()
    seed_everything(settings.seed)
    device = pick_device(settings.device)
    computed = {"precision": precision.use(getattr(settings, "precision", "float32"), device)}
    teacher = load_teacher(settings.model, settings.weights, device) if paper.methods else None
    download = getattr(settings, "download", False)
    test = load_test(settings.dataset, settings.data_folder, download, teacher and teacher.entry.input_size)
    if settings.per_class:
        test = balanced_subset(test, settings.per_class, f"{test.name}, {settings.per_class} per class")
    run = Run(key, settings.values() | computed, teacher, test)
    if teacher:
        print(f"{teacher.name}: {run.fp32_top1:.2f} % of {test.name} ({len(test):,} images)")
    return Started(teacher, test, run, settings)
