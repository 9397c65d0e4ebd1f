"""Write a checkpoint as ONNX, torch.export, safetensors and a timm backbone, each compared with it on real images."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import ExportSettings
from timm_multilabel.errors import UserError
from timm_multilabel.exports.compare import TOLERANCE, check_finite
from timm_multilabel.exports.examples import images_of_paths, images_of_run, read_images
from timm_multilabel.exports.exportable import Exportable, describe
from timm_multilabel.exports.formats import FORMATS, check_free, missing_libraries
from timm_multilabel.exports.formats import export as write_format
from timm_multilabel.exports.hub import build_folder, check_repo, hub_files, push_folder
from timm_multilabel.heads import load_registry
from timm_multilabel.log import say
from timm_multilabel.model_names import is_joined
from timm_multilabel.places import local_path
from timm_multilabel.training.checkpoint import Checkpoint, load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        files: The file of each format, or folder of the hub, with the largest difference of its outputs to the
            checkpoint's.
        pushed: The address that a folder was uploaded to, if it was.
    """
    files: Mapping[Path, float]
    pushed: str | None


@api_function(ExportSettings)
def export(checkpoint: str | Path, **settings: Any) -> Exported:
    """Write a checkpoint as ONNX, torch.export, safetensors and a timm backbone, each compared with it on real images.

    Args:
        checkpoint: A checkpoint of a run.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Checkpoint or settings do not allow it.
    """
    return run_export(make_settings(ExportSettings, {**settings, 'checkpoint': checkpoint}))


def run_export(settings: ExportSettings) -> Exported:
    """Export, and tell a line on each file.

    Raises:
        UserError: Checkpoint or settings do not allow it, or a format could not be written.
    """
    checkpoint = read_checkpoint(settings.checkpoint)
    has_heads = bool(checkpoint.label_space.heads)
    forms, left_out = _choose_formats(settings.formats, checkpoint, bool(settings.hub))
    out = local_path(settings.out or checkpoint.path.parent / 'export')
    _check_outputs(settings, forms, out, has_heads)
    weights = checkpoint.best_weights if settings.weights == 'best' else settings.weights
    model = load_model(checkpoint, weights, load_registry(settings.head_module), settings.allow_hub)
    paths = images_of_paths(settings.images, say) if settings.images else images_of_run(checkpoint)
    exportable = Exportable(checkpoint, model, describe(checkpoint, weights, model), read_images(checkpoint, paths))
    check_finite(exportable)

    epochs = exportable.description['epochs']
    after = f' after {epochs} epochs' if epochs else ''
    say(f'{checkpoint.path}: {checkpoint.arch}{after}, {weights} weights; compared on {len(paths)} image'
        f'{"s" * (len(paths) > 1)} such as {paths[0]}, one and {len(exportable.images)} at a time')
    failures, files = [], {}
    with ProgressBar('Export', len(forms) + bool(settings.hub), visible=True) as progress:
        for line in left_out:
            progress.say(line)
        for form in forms:
            try:
                difference = write_format(exportable, form, out)
            except UserError as error:
                failures.append(error.line)
            else:
                path = out / form.FILES[0]
                files[path] = difference
                progress.say(_line(path, difference, form.note(exportable, path)))
            progress.advance()
        if settings.hub:
            difference = build_folder(exportable, Path(settings.hub), settings.push)
            files[Path(settings.hub)] = difference
            progress.say(_line(Path(settings.hub), difference, ', '.join(hub_files(has_heads))))
            progress.advance()
    if failures:
        raise UserError('; '.join(failures))
    pushed = push_folder(Path(settings.hub), settings.push, has_heads) if settings.hub and settings.push else None
    if pushed:
        say(f'pushed: {pushed}')
    return Exported(files, pushed)


def _choose_formats(
        names: list[str] | None,
        checkpoint: Checkpoint,
        with_hub: bool,
) -> tuple[list[ModuleType], list[str]]:
    """The formats to write, and lines on those that cannot be and were not asked for.

    Raises:
        UserError: One that was asked for cannot be written.
    """
    forms, left_out = [], []
    for form in FORMATS.values():
        if form.NAME not in (names or ([] if with_hub else FORMATS)):
            continue
        missing, reason = missing_libraries(form), None
        if form.NAME == 'backbone' and is_joined(checkpoint.arch, checkpoint.state.get('model_kwargs') or {}):
            reason = f'{checkpoint.path} has several backbones, or mirrored images, and timm has no such model'
        elif form.OF_HEADS and not checkpoint.label_space.heads:
            reason = f'{checkpoint.path} was trained with -wlc 0, so it has no heads; it can be written as backbone'
        elif missing:
            reason = f"{', '.join(missing)} not installed; pip install '.[export]'"
        if reason is None:
            forms.append(form)
        elif names:
            raise UserError(f'--formats {form.NAME}: {reason}')
        else:
            left_out.append(f'{form.NAME}: left out, {reason}')
    return forms, left_out


def _check_outputs(settings: ExportSettings, forms: list[ModuleType], out: Path, has_heads: bool) -> None:
    """Find out that files could not be written before the work, not after it."""
    check_free(out, [name for form in forms for name in form.FILES], settings.force)
    if settings.hub:
        check_free(Path(settings.hub), hub_files(has_heads), settings.force)
    if settings.push:
        if not settings.hub:
            raise UserError(f'--push {settings.push}: uploads the folder of --hub; name one, --hub DIR')
        check_repo(settings.push)


def _line(path: Path, difference: float, note: str) -> str:
    return f'{path}: largest difference {difference:.1e} (at most {TOLERANCE:.0e}); {note}'
