"""The losses, each a pure function on tensors.

Those over labels come as a sum and the number of labels that it is over, so that a missing label weighs nothing, a
batch without labels gives zero, and several ranks divide by their common number of labels.
"""
from timm_multilabel.losses.arcface import arcface_logits
from timm_multilabel.losses.classification import binary_cross_entropy, dense_cross_entropy, index_cross_entropy
from timm_multilabel.losses.distillation import (
    binary_distillation_loss,
    distillation_loss,
    feature_loss,
    mean_of_classes,
    mean_of_tags,
)
from timm_multilabel.losses.nt_xent import nt_xent_loss
from timm_multilabel.losses.pseudo_labels import (
    alignment,
    binary_alignment,
    binary_pseudo_label_loss,
    pseudo_label_loss,
)
from timm_multilabel.losses.regression import smooth_l1
from timm_multilabel.losses.unlabelled import (
    binary_entropy,
    binary_marginal_entropy,
    categorical_entropy,
    marginal_entropy,
)

__all__ = [
    'alignment',
    'arcface_logits',
    'binary_alignment',
    'binary_cross_entropy',
    'binary_distillation_loss',
    'binary_entropy',
    'binary_marginal_entropy',
    'binary_pseudo_label_loss',
    'categorical_entropy',
    'dense_cross_entropy',
    'distillation_loss',
    'feature_loss',
    'index_cross_entropy',
    'marginal_entropy',
    'mean_of_classes',
    'mean_of_tags',
    'nt_xent_loss',
    'pseudo_label_loss',
    'smooth_l1',
]
