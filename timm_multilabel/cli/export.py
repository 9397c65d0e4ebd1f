"""Write a checkpoint as ONNX, torch.export, safetensors and a timm backbone, each compared with it on real images."""
import argparse
from pathlib import Path
from types import ModuleType

from timm_multilabel.cli.flags import add_trust_flags
from timm_multilabel.cli.output import say
from timm_multilabel.errors import UserError
from timm_multilabel.export.compare import TOLERANCE, check_finite
from timm_multilabel.export.examples import COUNT, images_of_paths, images_of_run, read_images
from timm_multilabel.export.exportable import Exportable, describe
from timm_multilabel.export.formats import FORMATS, check_free, export, missing_libraries
from timm_multilabel.export.hub import build_folder, check_repo, hub_files, push_folder
from timm_multilabel.heads import load_registry
from timm_multilabel.training.checkpoint import Checkpoint, load_model, read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

NAME = 'export'
HELP = 'write a checkpoint as ONNX, torch.export, safetensors, a timm backbone, or a folder for the Hugging Face hub'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a run')
    parser.add_argument('--formats', nargs='+', choices=tuple(FORMATS), metavar='NAME',
                        help=f'of {", ".join(FORMATS)} (default: all that can be written; with --hub none)')
    parser.add_argument('--out', metavar='DIR', help='folder to write to (default: export/ beside the checkpoint)')
    parser.add_argument('--images', nargs='+', metavar='PATH',
                        help=f'files or folders of images, {COUNT} of which are compared on (default: the validation '
                             'split of the run)')
    parser.add_argument('--weights', choices=('best', 'plain', 'ema'), default='best',
                        help='weights to export (default: those that made the checkpoint what it is)')
    add_trust_flags(parser)
    parser.add_argument('--hub', metavar='DIR',
                        help='build a folder for the Hugging Face hub: model card, weights and configuration')
    parser.add_argument('--push', metavar='USER/NAME',
                        help='upload the folder of --hub there; a repository that is new is private')
    parser.add_argument('--force', action='store_true', help='replace what is there')


def run(args: argparse.Namespace) -> None:
    """Export."""
    checkpoint = read_checkpoint(args.checkpoint)
    has_heads = bool(checkpoint.label_space.heads)
    forms, left_out = choose_formats(args.formats, checkpoint, bool(args.hub))
    out = Path(args.out) if args.out else checkpoint.path.parent / 'export'
    check_outputs(args, forms, out, has_heads)
    weights = checkpoint.best_weights if args.weights == 'best' else args.weights
    model = load_model(checkpoint, weights, load_registry(args.head_module), args.allow_hub)
    paths = images_of_paths(args.images, say) if args.images else images_of_run(checkpoint)
    exportable = Exportable(checkpoint, model, describe(checkpoint, weights, model), read_images(checkpoint, paths))
    check_finite(exportable)

    epochs = exportable.description['epochs']
    after = f' after {epochs} epochs' if epochs else ''
    say(f'{checkpoint.path}: {checkpoint.arch}{after}, {weights} weights; compared on {len(paths)} image'
        f'{"s" * (len(paths) > 1)} such as {paths[0]}, one and {len(exportable.images)} at a time')
    failures = []
    with ProgressBar('Export', len(forms) + bool(args.hub), visible=True) as progress:
        for line in left_out:
            progress.say(line)
        for form in forms:
            try:
                difference = export(exportable, form, out)
            except UserError as error:
                failures.append(error.line)
            else:
                progress.say(_line(out / form.FILES[0], difference, form.note(exportable, out / form.FILES[0])))
            progress.advance()
        if args.hub:
            difference = build_folder(exportable, Path(args.hub), args.push)
            progress.say(_line(Path(args.hub), difference, ', '.join(hub_files(has_heads))))
            progress.advance()
    if failures:
        raise UserError('; '.join(failures))
    if args.push:
        say(f'pushed: {push_folder(Path(args.hub), args.push, has_heads)}')


def choose_formats(
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
        if form.OF_HEADS and not checkpoint.label_space.heads:
            reason = f'{checkpoint.path} was trained with -wlc 0, so it has no heads; it can be written as backbone'
        elif missing:
            reason = f"{', '.join(missing)} not installed; pip install 'timm-multilabel[export]'"
        if reason is None:
            forms.append(form)
        elif names:
            raise UserError(f'--formats {form.NAME}: {reason}')
        else:
            left_out.append(f'{form.NAME}: left out, {reason}')
    return forms, left_out


def check_outputs(args: argparse.Namespace, forms: list[ModuleType], out: Path, has_heads: bool) -> None:
    """Find out that files could not be written before the work, not after it."""
    check_free(out, [name for form in forms for name in form.FILES], args.force)
    if args.hub:
        check_free(Path(args.hub), hub_files(has_heads), args.force)
    if args.push:
        if not args.hub:
            raise UserError(f'--push {args.push}: uploads the folder of --hub; name one, --hub DIR')
        check_repo(args.push)


def _line(path: Path, difference: float, note: str) -> str:
    return f'{path}: largest difference {difference:.1e} (at most {TOLERANCE:.0e}); {note}'
