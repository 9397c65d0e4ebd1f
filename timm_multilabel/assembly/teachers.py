"""From `--teacher` to soft labels: which heads are taught, and what the teachers say of each image, made once."""
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import timm
import torch
from timm.data import resolve_data_config

from timm_multilabel.assembly.data import Data
from timm_multilabel.assembly.device import loader_workers
from timm_multilabel.assembly.model import try_out
from timm_multilabel.assembly.run_settings import read_run_settings
from timm_multilabel.assembly.splits import read_split_table
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.pool import join_rows, real_paths
from timm_multilabel.data.split_names import split_path
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows, find_images, missing_targets
from timm_multilabel.distributed import all_objects, ranks_here, world
from timm_multilabel.errors import CheckpointError, SettingError, UserError, listed
from timm_multilabel.files import open_regular
from timm_multilabel.heads import Head
from timm_multilabel.inference.loaded import LoadedModel
from timm_multilabel.inference.teachers import Adapter, FeatureTeacher, Teachers
from timm_multilabel.labels import Labels, LabelSpace, Quantity
from timm_multilabel.loading.cache import stamps_of
from timm_multilabel.loading.shared import SharedBytes, format_size
from timm_multilabel.loading.soft_labels import Answers, SoftLabels
from timm_multilabel.log import Say
from timm_multilabel.model import create_backbone
from timm_multilabel.places import absolute, local_path, path_of
from timm_multilabel.task import FeatureTeaching
from timm_multilabel.temporary import RANDOM_NAME, remove_leftovers
from timm_multilabel.training.checkpoint import Checkpoint, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Precision

_FORMAT = 1  # of the files of answers; another one is another file


@dataclass(frozen=True)
class Teacher:
    """A checkpoint to learn from.

    Args:
        name: What messages call it.
        label_space: Its heads.
        checkpoint: What it holds; None of an earlier phase that has yet to make it.
    """
    name: str
    label_space: LabelSpace
    checkpoint: Checkpoint | None


def find_teachers(
        names: Sequence[str],
        earlier: Mapping[str, LabelSpace],
        made: Mapping[str, Path],
) -> list[Teacher]:
    """The teachers that `--teacher` names.

    Args:
        names: Files, or earlier phases.
        earlier: The heads of the earlier phases.
        made: The best checkpoints of those that are done.

    Raises:
        CheckpointError: A file is no checkpoint.
    """
    found = []
    for name in names:
        if name in earlier and name not in made:
            found.append(Teacher(name, earlier[name], None))
            continue
        if name not in earlier and not path_of(name).exists():
            phases = f', nor an earlier phase (there are: {listed(earlier)})' if earlier else ''
            raise CheckpointError(f'--teacher {name}: no such checkpoint{phases}')
        checkpoint = read_checkpoint(made.get(name, name))
        found.append(Teacher(name, checkpoint.label_space, checkpoint))
    return found


def taught_heads(
        settings: TrainSettings,
        data: Data,
        heads: Mapping[str, Head],
        teachers: Sequence[Teacher],
        say: Say,
) -> LabelSpace:
    """The heads that learn from the teachers, told in a line.

    Raises:
        CheckpointError: There is none, or a teacher has other classes for one.
        SettingError: The labelled or unlabelled images are streamed, and nothing can be kept for them.
    """
    streams = [rows for rows in (data.train_rows, data.pool_rows) if isinstance(rows, StreamedRows)]
    if streams and not settings.teaching.teacher_views:
        raise SettingError(
            f'--teacher: nothing is kept of shards, such as {streams[0].source}; pass --teacher-views')
    theirs = {labels.name for teacher in teachers for labels in teacher.label_space.heads}
    taught = [head.labels for name, head in heads.items() if name in theirs and head.can_be_taught]
    said = ', '.join(teacher.name for teacher in teachers)
    if not taught:
        raise CheckpointError(
            f'--teacher {said}: no head in common: the teacher has {listed(sorted(theirs)) or "none"}, and the data '
            f'{listed(heads)}')
    for teacher in teachers:
        for labels in teacher.label_space.heads:
            if labels.name in heads and heads[labels.name].labels in taught:
                _check_labels(teacher.name, labels, heads[labels.name].labels,
                              settings.data.unknown_labels == 'ignore', say)
    others = [name for name in heads if name not in [labels.name for labels in taught]]
    say(f'teacher{"s" * (len(teachers) > 1)} {said}: for {listed([labels.name for labels in taught])}'
        + (f'; from labels alone: {listed(others)}' if others else ''))
    return LabelSpace(tuple(taught))


def _check_labels(name: str, theirs: Labels, ours: Labels, ignore: bool, say: Say) -> None:
    """Raise CheckpointError where a teacher's head cannot teach ours."""
    where = f"--teacher {name}: head '{ours.name}'"
    if theirs.kind != ours.kind:
        raise CheckpointError(f'{where} is of {theirs.kind} there and of {ours.kind} here; leave it out of --heads, or '
                              'name another teacher')
    if isinstance(ours, Quantity):
        return
    more, less = ([text for text in one.classes if text not in set(other.classes)]
                  for one, other in ((theirs, ours), (ours, theirs)))
    if not more and not less:
        return
    differs = '; '.join(
        f'{what} {listed(texts)}' for what, texts in (('only the teacher has', more), ('it lacks', less)) if texts)
    if len(less) == len(ours.classes):
        raise CheckpointError(f'{where} has no {ours.noun[0]} in common with the data; name another teacher')
    if not ignore:
        raise CheckpointError(f'{where} has other {ours.noun[1]} than the data: {differs}; name another teacher, or '
                              'pass --unknown-labels ignore to learn from the others')
    say(f'{where} has other {ours.noun[1]} than the data, which are left out: {differs}')


def load_teachers(
        settings: TrainSettings,
        data: Data,
        data_config: Mapping[str, Any],
        teachers: Sequence[Teacher],
        taught: LabelSpace,
        precision: Precision,
        say: Say,
) -> Teachers:
    """The teachers' models on the device; the run's random numbers are left as they are.

    Raises:
        CheckpointError: One cannot be made, or has a head that predicts classes without probabilities.
    """
    loaded = []
    with torch.random.fork_rng(devices=[]):  # new weights are drawn on the CPU
        for teacher in teachers:
            assert teacher.checkpoint is not None  # only a rehearsal has none
            model = LoadedModel.of(
                teacher.checkpoint, 'best', precision, data.registry, settings.data.allow_hub)
            for name, head in model.model.named_heads.items():
                if name in taught.names and not head.can_teach:
                    raise CheckpointError(
                        f"--teacher {teacher.name}: head '{name}' is of a kind without probabilities, from which none "
                        'can learn; leave it out of --heads, or name another teacher')
            loaded.append(model)
            if line := _scored_images(settings, data, teacher.checkpoint.path):
                say(f'--teacher {teacher.name}: {line}')
    return Teachers(loaded, taught, data_config['mean'], data_config['std'])


def create_feature_teaching(
        settings: TrainSettings,
        data_config: Mapping[str, Any],
        precision: Precision,
        say: Say,
) -> FeatureTeaching | None:
    """What the backbone learns from `--teacher-features`, if anything; the run's random numbers are left as they are.

    Raises:
        SettingError: There is no such model, it has no pooled features, or its weights cannot be had.
    """
    def of_teacher(line: str) -> str:
        """A line about the flags of the student's model, as one about those of the teacher."""
        for flag, its in (('--pretrained-path', '--teacher-features-path'), ('--pretrained:', '--teacher-features:'),
                          ('--model ', '--teacher-features ')):
            line = line.replace(flag, its)
        return line

    wanted = settings.teaching
    if wanted.teacher_features is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            backbone = create_backbone(
                wanted.teacher_features, pretrained=True, pretrained_path=wanted.teacher_features_path,
                say=lambda line: say(of_teacher(line)))
        config = resolve_data_config({}, model=backbone)
        try_out(wanted.teacher_features, backbone, list(config['input_size']))
    except SettingError as error:
        raise SettingError(of_teacher(error.line)) from error
    backbone.to(precision.device)
    teacher = FeatureTeacher(backbone, Adapter(config, data_config['mean'], data_config['std'], precision))
    size = 'x'.join(map(str, config['input_size'][1:]))
    width = backbone.head_hidden_size
    assert isinstance(width, int)  # as `create_backbone` makes sure
    say(f'teacher of features {wanted.teacher_features}: {width} features of views of {size}')
    return FeatureTeaching(width, teacher.of_views, wanted.teacher_features_weight)


def _scored_images(settings: TrainSettings, data: Data, path: Path) -> str | None:
    """A warning where a teacher, by the args.yaml of its run, was trained on images that this run is scored on."""
    if world()[0] or not isinstance(data.eval_rows, Rows):
        return None
    run = next((folder for folder in path.absolute().parents[:2] if (folder / 'args.yaml').is_file()), None)
    ours = split_path(path_of(settings.data.data_dir), settings.data.train_split)
    trained: set[str] = set()
    with suppress(UserError):  # its data may be elsewhere by now
        theirs = read_run_settings(run, settings.data.head_module) if run is not None else None
        phases = [] if theirs is None else [phase.settings for phase in theirs.phases] or [theirs]
        for each in phases:
            table = split_path(path_of(each.data.data_dir), each.data.train_split)
            if table.exists() and table.resolve() != ours.resolve():
                trained.update(real_paths(find_images(read_split_table(each.data, table), passing_over=True)))
    both = trained.intersection(real_paths(data.eval_rows.images)) if trained else ()
    if not both:
        return None
    return (f'was trained on {len(both)} of {len(data.eval_rows)} images of {data.eval_rows.source} (so says {run}/'
            'args.yaml), so scores on them say too much')


def make_soft_labels(
        settings: TrainSettings,
        data: Data,
        teachers: Teachers,
        say: Say,
) -> list[SoftLabels]:
    """What the teachers say of the images of the training rows and of the pool, as evaluation sees them.

    They are made once, and kept in a file of `--cache-dir` whose name tells the teachers' weights, the classes and the
    images, so that a run that goes on, and other runs on these images, read them. All ranks call it together; those of
    one machine share the work and the file.

    Raises:
        UserError: An image is bad and such are not left out, or the file cannot be written.
    """
    parts = [rows for rows in (data.train_rows, data.pool_rows) if isinstance(rows, Rows)]  # others are refused
    joined, paths = join_rows(parts, LabelSpace(())), [real_paths(part.images) for part in parts]
    # In one order, whatever rows have labels in this run.
    its = real_paths(joined.images)
    order = np.array(sorted(range(len(its)), key=its.__getitem__))
    rows = replace(
        joined, images=joined.images[order], numbers=joined.numbers[order], which=joined.which[order])
    answers = _shared_answers(settings, rows, teachers, say)
    place = {its[row]: number for number, row in enumerate(order)}
    return [SoftLabels(answers, np.array([place[path] for path in those])) for those in paths]


def _shared_answers(settings: TrainSettings, rows: Rows, teachers: Teachers, say: Say) -> Answers:
    """The answers for all rows, from the file or made now."""
    here, rank = ranks_here(), world()[0]
    folder, length = local_path(settings.data.cache_dir).expanduser(), Answers.size(len(rows), teachers.width)
    offer, path, wrong = None, Path(), None
    if rank == here[0]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f'teacher-{_key(settings, rows, teachers)}.bin'
            remove_leftovers(folder.glob(f'.teacher-*-{RANDOM_NAME}'))
            with suppress(OSError, ValueError):
                offer = SharedBytes.of_file(path, length), True
            offer = offer or (SharedBytes.in_file(folder, path.stem, length), False)
        except OSError as error:
            wrong = (f'--teacher: {format_size(length)} of predictions cannot be kept in {folder} '
                     f'({error.strerror or error}); name another --cache-dir, or pass --teacher-views')
    everyone = all_objects((offer, path, wrong))
    for _, _, theirs in everyone:
        if theirs is not None:
            raise SettingError(theirs)
    shared, ready = offer or everyone[here[0]][0]
    path = everyone[here[0]][1]
    answers = Answers(shared, teachers.width)
    say(f'teacher: reads the predictions on {len(rows):,} images from {path}' if ready else
        f'teacher: predicts {len(rows):,} images once, kept in {path} ({format_size(length)})')
    try:
        if not ready:
            _fill(settings, rows, teachers, answers.array, here.index(rank), len(here))
        all_objects(None)  # all parts are there; on all machines, of which some may have the file already
        if not ready and rank == here[0]:
            answers.finish(path)
    finally:
        if not ready and rank == here[0]:
            Path(shared.path).unlink(missing_ok=True)
    all_objects(None)
    return answers if ready else Answers(SharedBytes.of_file(path, length), teachers.width)


def _fill(settings: TrainSettings, rows: Rows, teachers: Teachers, out: np.ndarray, place: int, places: int) -> None:
    """Write the answers for every `places`-th row from `path_of` on into `out` (M, S)."""
    mine = np.arange(len(rows)) % places == place
    asked = settings.run.validation_batch_size or settings.run.micro_batch or settings.run.batch_size
    size = min(each.checkpoint.batch_size(asked) for each in teachers.loaded)
    workers = -(-loader_workers(settings.data.workers) // len(teachers.loaded))
    batches = []
    for loaded in teachers.loaded:
        some = replace(rows, targets=missing_targets(loaded.model.label_space, len(rows))).select(mine)
        batches.append(loaded.batches(loaded.part(some, keep_bad=settings.data.skip_bad_images), size, workers))
    at = place
    with ProgressBar('Teacher', -(-int(mine.sum()) // size), visible=world()[0] == 0) as progress:
        for images in zip(*batches, strict=True):
            said = teachers.answers(images, check=True).half().cpu().numpy()
            out[at:at + places * len(said):places] = said
            at += places * len(said)
            progress.advance()


def _key(settings: TrainSettings, rows: Rows, teachers: Teachers) -> str:
    """What tells the answers from those of other teachers, for other classes, or for other images."""
    digest = hashlib.sha256(json.dumps([
        _FORMAT, simplejpeg.__version__, PIL.__version__, timm.__version__, torch.__version__,
        str(teachers.loaded[0].precision.amp_dtype), teachers.taught.to_dict(), settings.data.skip_bad_images,
        [each.weights for each in teachers.loaded]]).encode())
    files = [each.checkpoint.path for each in teachers.loaded]
    for file in [*files, *([Path(settings.data.head_module)] if settings.data.head_module else [])]:
        digest.update(_digest(file))
    images = real_paths(rows.images)
    for image, stamp in zip(images, stamps_of(images).tolist()):
        digest.update(os.fsencode(absolute(image)) + repr(tuple(stamp)).encode())
    return digest.hexdigest()[:16]


def _digest(path: Path) -> bytes:
    """That of a file's content."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(2 ** 24):
            digest.update(part)
    return digest.digest()
