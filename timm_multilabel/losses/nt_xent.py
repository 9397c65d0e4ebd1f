"""NT-Xent, the contrastive loss of SimCLR."""
import torch
import torch.nn.functional as F

from timm_multilabel.distributed import gather, world


def nt_xent_loss(view_a: torch.Tensor, view_b: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy over all pairs of the global batch.

    With z the 2N normalised projections of all ranks and p(i) the other view of i's image, the mean over the anchors i
    of -log(exp(z_i . z_p(i) / T) / sum over k != i of exp(z_i . z_k / T)) (Chen et al. 2020, "A Simple Framework for
    Contrastive Learning of Visual Representations", eq. 1).

    With several ranks the loss is the mean over this rank's anchors, against the views of all ranks: its mean over
    ranks is the loss of one process on the whole batch, and so is the gradient that DDP averages. All ranks must have
    the same N.

    Args:
        view_a: Projections (N, D) of one view of each image; they need not be normalised.
        view_b: Projections (N, D) of the other view; row i is of the same image as row i of `view_a`.
        temperature: T, more than 0.

    Returns:
        The loss, a scalar, computed in float32 (in float64 for float64 input) whatever the autocast.

    Raises:
        ValueError: The shapes differ or are not (N, D), or the temperature is not more than 0.
    """
    if view_a.ndim != 2 or view_a.shape != view_b.shape:
        raise ValueError(
            f'NT-Xent expects two tensors of one shape (N, D), got {tuple(view_a.shape)} and {tuple(view_b.shape)}')
    if not temperature > 0:
        raise ValueError(f'NT-Xent expects a temperature of more than 0, got {temperature}')
    with torch.autocast(view_a.device.type, enabled=False):
        dtype = torch.promote_types(view_a.dtype, torch.float32)
        anchors = F.normalize(torch.cat([view_a, view_b]).to(dtype), dim=1)
        # Columns are rank-major, so rank r's anchors are columns 2N * r to 2N * (r + 1).
        similarity = anchors @ gather(anchors).T
        n = len(view_a)
        column = torch.arange(similarity.shape[1], device=anchors.device)
        itself = column[:2 * n, None] + 2 * n * world()[0]
        positive = itself.roll(n, dims=0)
        # Relative to the positive pair the loss is softplus(logsumexp over negatives), which keeps its digits where
        # the pair is much closer than the rest and log(1 + tiny) would round to 0.
        logits = (similarity - similarity.gather(1, positive)) / temperature
        mask = (column == itself) | (column == positive)
        # A finite fill: with no negatives at all (one image) a row of -inf would give NaN gradients.
        negatives = logits.masked_fill(mask, torch.finfo(dtype).min).logsumexp(dim=1)
        return F.softplus(negatives, threshold=40).mean()
