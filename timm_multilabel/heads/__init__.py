"""What a head is: its layer, its loss, its prediction, its metrics. A new kind is a subclass of `Head`."""
from timm_multilabel.heads.classes import ArcFaceHead, SoftmaxHead
from timm_multilabel.heads.head import Head
from timm_multilabel.heads.joined import JoinedWeights
from timm_multilabel.heads.numeric import NumericHead
from timm_multilabel.heads.options import options_of, parse_option
from timm_multilabel.heads.plain import PlainViews, heads_of_plain_views
from timm_multilabel.heads.registry import (
    COMMON_OPTIONS,
    REGISTRY,
    create_head,
    default_kind,
    has_own_metrics,
    load_registry,
    resolve_options,
    standard_head,
)
from timm_multilabel.heads.tags import TagsHead
from timm_multilabel.heads.together import Group, group_heads, losses_of_heads, teacher_losses_of_heads

__all__ = [
    'COMMON_OPTIONS',
    'REGISTRY',
    'ArcFaceHead',
    'Group',
    'Head',
    'JoinedWeights',
    'NumericHead',
    'PlainViews',
    'SoftmaxHead',
    'TagsHead',
    'create_head',
    'default_kind',
    'group_heads',
    'has_own_metrics',
    'heads_of_plain_views',
    'load_registry',
    'losses_of_heads',
    'options_of',
    'parse_option',
    'resolve_options',
    'standard_head',
    'teacher_losses_of_heads',
]
