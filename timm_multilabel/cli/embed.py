"""`timm-multilabel embed`."""
import sys

from timm_multilabel.api.embed import run_embedding
from timm_multilabel.cli.output import end_with_bad_images, say
from timm_multilabel.config.commands import EmbedSettings

_NAMED = 10  # bad images on standard error


def run(settings: EmbedSettings) -> None:
    """Embed; exit status 1 where an image could not be read."""
    made = run_embedding(settings)
    if made is None:
        return
    bad = made.images - made.count
    for line in made.bad[:_NAMED]:
        say(line, sys.stderr)
    if bad > _NAMED:
        say('...', sys.stderr)
    say(f'{made.path}: {settings.what} of {made.count} images, {made.width} numbers each, by the {made.weights} '
        f'weights of {settings.checkpoint}')
    end_with_bad_images(bad, made.images)
