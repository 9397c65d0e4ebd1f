"""Heads that learn from plain views only: which share of the views that is, and what is refused."""
from timm_multilabel.assembly.model import has_one_view
from timm_multilabel.assembly.views import PhotoViews, which_views
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import SettingError, listed
from timm_multilabel.log import Say


def check_plain_views(settings: TrainSettings, heads: tuple[str, ...], views: PhotoViews, say: Say) -> None:
    """Tell which share of the labelled views some heads learn from.

    Args:
        settings: Of the run, or of a phase.
        heads: Those with `views=plain`.
        views: What makes the views of labelled images.
        say: Tells a line.

    Raises:
        SettingError: There are no such views, or a term of the loss would learn from others.
    """
    if not heads:
        return
    augmentation, pool = settings.augmentation, settings.pool
    flag = f'--head {heads[0]}:views=plain'
    if augmentation.mixup or augmentation.cutmix:
        raise SettingError(f'{flag}: --mixup and --cutmix make one picture of two views; leave one of them out')
    if pool.entropy_weight or pool.marginal_entropy_weight:
        raise SettingError(
            f'{flag}: --entropy-weight and --marginal-entropy-weight have heads learn from all views; leave one of '
            'them out')
    shares = views.plain_shares[:1 if settings.objective.classify_views == 'first' else None]
    share = sum(shares) / len(shares)
    if not share:
        raise SettingError(f'{flag}: no view keeps its colors; {_way_out(settings)}')
    if pool.pseudo_label_weight and not views.plain_shares[-1]:
        say(f'views=plain of {listed(heads)}: no pseudo-labels, since no strong view keeps its colors (with --views '
            'simclr some do)')
    say(f'views=plain of {listed(heads)}: {100 * share:.3g} % of the labelled views keep their colors (no color '
        'jitter, no grayscale); learns from these only')


def _way_out(settings: TrainSettings) -> str:
    """What makes some views plain."""
    kind, augmentation = which_views(settings), settings.augmentation
    if kind == 'simclr':
        ways = ['lower --color-jitter-prob or --grayscale-prob, whichever is 1']
    elif kind == 'timm' and augmentation.aa:
        ways = [f'what --aa {augmentation.aa} did to a view is not known; leave it out, with --views simclr']
    else:
        ways = [f'what --views {kind} did to a view is not known; pass --views simclr']
    if not has_one_view(settings) and not augmentation.weak_first_view:
        ways.append('pass --weak-first-view')
    return ', or '.join(ways)
