"""Data sets of other programs -> tables of ours; one file per form. See CONTRIBUTING.md for another one."""
from timm_multilabel.converters import celeba, coco, label_studio
from timm_multilabel.converters.form import Form

FORMS: tuple[Form, ...] = (celeba.FORM, coco.FORM, label_studio.FORM)
"""In the order in which they are tried."""
