"""Find the images of a file of `timm-multilabel embed` that are nearest to query images, as a table or a picture."""
import argparse
import io
import sys

import torch

from timm_multilabel.cli.flags import positive
from timm_multilabel.cli.images import (
    add_image_flags,
    batches_of,
    end,
    load_checkpoint_model,
    new_file,
    read_rows,
    workers_of,
)
from timm_multilabel.cli.output import say
from timm_multilabel.data.arguments import HELP as IMAGES_HELP
from timm_multilabel.errors import UserError, shortened
from timm_multilabel.files import write_atomic
from timm_multilabel.inference.embeddings import Embeddings, check_maker, embed_part
from timm_multilabel.inference.neighbours import nearest
from timm_multilabel.reports.contact_sheet import SheetRow, draw_sheet, sheet_size
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

NAME = 'search'
HELP = 'find the images nearest to others'

_PICTURES = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('embeddings', metavar='FILE', help='embeddings that timm-multilabel embed wrote')
    parser.add_argument('images', nargs='+', metavar='QUERY_IMAGE...', help=IMAGES_HELP)
    parser.add_argument('--checkpoint', required=True, metavar='FILE', help='the checkpoint that made the embeddings')
    parser.add_argument('-k', '--count', type=positive, default=10, metavar='K', help='images to find for each query')
    parser.add_argument('--sheet', metavar='FILE', help='draw queries and what was found as a picture (.png or .jpg)')
    parser.add_argument('--force', action='store_true', help='overwrite what is there')
    add_image_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Search; print the table, or write the sheet."""
    embeddings = Embeddings.load(args.embeddings)
    made_by = embeddings.made_by
    checkpoint = read_checkpoint(args.checkpoint)
    if checkpoint.arch != made_by['arch']:
        raise UserError(f'{args.embeddings}: made by a {made_by["arch"]}, and {checkpoint.path} is a '
                        f'{checkpoint.arch}; name the checkpoint that made it')
    loaded = load_checkpoint_model(args, checkpoint, made_by['weights'])
    check_maker(embeddings, args.embeddings, loaded)
    rows = read_rows(args, args.images, checkpoint, loaded.model.label_space)
    count = min(args.count, len(embeddings))
    sheet = None
    if args.sheet is not None:
        sheet = new_file(args.sheet, '--sheet', tuple(_PICTURES), args.force)
        sheet_size(len(rows), count)  # which raises where it is too large
    with ProgressBar('Embed queries', batches_of(args, checkpoint, rows), visible=True) as progress:
        queries, bad = embed_part(
            loaded, loaded.part(rows, keep_bad=True), made_by['what'], args.batch_size, workers_of(args), progress)
    for line in bad:
        say(line, sys.stderr)
    if queries.vectors.shape[1] != embeddings.vectors.shape[1]:
        raise UserError(f'{args.embeddings}: its {embeddings.vectors.shape[1]} numbers an image are not what the '
                        'checkpoint makes; embed the images again')
    device = loaded.precision.device
    cosines, indices = nearest(
        torch.from_numpy(queries.vectors).to(device), torch.from_numpy(embeddings.vectors).to(device), count)
    found = [
        SheetRow(query, [(embeddings.images[index], cosine) for index, cosine in zip(*pair)])
        for query, *pair in zip(queries.images, indices.tolist(), cosines.tolist())]
    if sheet is None:
        print('\n'.join(table_lines(found)))
    else:
        picture = io.BytesIO()
        draw_sheet(found).save(picture, format=_PICTURES[sheet.suffix], quality=90)
        write_atomic(sheet, picture.getvalue())
        say(f'sheet: {sheet}')
    end(len(bad), len(rows))


def table_lines(rows: list[SheetRow]) -> list[str]:
    """A line for each image found: query, rank, similarity, image."""
    width = max(len('query'), *(len(_path(row.query)) for row in rows))
    lines = [f'{"query":<{width}}  rank  similarity  image']
    for row in rows:
        lines += [f'{_path(row.query):<{width}}  {rank:>4}  {cosine:>10.4f}  {_path(image)}'
                  for rank, (image, cosine) in enumerate(row.found, 1)]
    return lines


def _path(path: str) -> str:
    return shortened(path, 4096)
