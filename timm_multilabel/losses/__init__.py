"""The losses, each a pure function on tensors."""
from timm_multilabel.losses.classification import dense_cross_entropy, index_cross_entropy
from timm_multilabel.losses.nt_xent import nt_xent_loss

__all__ = ['dense_cross_entropy', 'index_cross_entropy', 'nt_xent_loss']
