"""`timm-multilabel probe`."""
import shlex

from timm_multilabel.api.probe import run_probe
from timm_multilabel.cli.output import say
from timm_multilabel.config.commands import ProbeSettings


def run(settings: ProbeSettings) -> None:
    """Fit, and print the best of each head."""
    made = run_probe(settings)
    if made is None:
        return
    for _, row in made.chosen.dropna(axis=1, how='all').iterrows():
        its = row.dropna()
        metrics = '  '.join(f'{name} {its[name]:.4g}' for name in its.index[3:])
        say(f'{its["head"]}: {metrics}  (lr {its["lr"]:g}, weight decay {its["weight_decay"]:g})')
    for note in made.notes:
        say(note)
    say(f'{made.metric}: {made.best:.4g}, {made.best_checkpoint}')
    own = [*(['--head-module', settings.head_module] if settings.head_module else []),
           *['--allow-hub'] * settings.allow_hub]
    say(f'Next: timm-multilabel {shlex.join(["report", str(made.folder), *own])}')
