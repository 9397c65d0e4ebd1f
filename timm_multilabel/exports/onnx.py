"""ONNX: one file with the weights, the description as metadata."""
import json
import logging
import warnings
from pathlib import Path

import torch

from timm_multilabel.exports.compare import Run
from timm_multilabel.exports.exportable import DESCRIPTION, INPUT, Exportable, ReadableModel

NAME = 'onnx'
FILES = ('multilabel.onnx',)
OF_HEADS = True
LIBRARIES = ('onnx', 'onnxscript', 'onnxruntime')

OPSET = 18
"""Of operators, from 2022: what runtimes of the last years know."""

_LARGEST = 2 ** 31 - 2 ** 24  # bytes of weights: a file of protobuf is less than 2 GiB


def note(exportable: Exportable, path: Path) -> str:
    """What to say of a file that was written."""
    return f'opset {OPSET}, outputs {", ".join(exportable.names)}'


def write(exportable: Exportable, path: Path) -> None:
    """Write the model with a free batch size.

    Raises:
        ValueError: It is too large.
        Exception: Whatever PyTorch finds in a model that it cannot export.
    """
    import onnx

    size = sum(weight.nbytes for weight in exportable.model.state_dict().values())
    if size > _LARGEST:
        raise ValueError(f'its {size:,} bytes of weights are more than an ONNX file takes')
    places = [f'output/{number}' for number in range(len(exportable.names))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter's own deprecations
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        program = torch.onnx.export(
            ReadableModel(exportable.model, exportable.names),
            (exportable.images[:2],),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=places,
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            external_data=False,
            verbose=False,
        )
    assert program is not None  # it is what this exporter returns
    graph = program.model.graph
    # Inner values are called after PyTorch's operators, as a column may be (`linear`): those get a sign that no name of
    # an output has.
    inner = [value for node in graph.all_nodes() for value in node.outputs] + list(graph.initializers.values())
    for value in inner:
        if value.name in exportable.names:
            value.name = f'/{value.name}'
    for output, name in zip(graph.outputs, exportable.names, strict=True):
        output.name = name
    program.model.metadata_props[DESCRIPTION] = exportable.text
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)


def load(exportable: Exportable, path: Path) -> Run:
    """The model of a file, by onnxruntime on the CPU.

    Raises:
        ValueError: Its description or its names are others.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    stored = json.loads(session.get_modelmeta().custom_metadata_map[DESCRIPTION])
    names = [output.name for output in session.get_outputs()]
    if stored != exportable.description or names != exportable.names:
        raise ValueError('its metadata or its names come back other than they were written')
    return lambda images: list(map(torch.from_numpy, session.run(exportable.names, {INPUT: images.numpy()})))
