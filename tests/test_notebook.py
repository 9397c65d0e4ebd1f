"""The notebook of the repository runs from its first cell to its last, and is stored without outputs."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / 'notebooks' / 'quickstart.ipynb'


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    for cell in cells:  # a smaller model on fewer pictures
        cell.source = cell.source.replace('train=240, val=80, test=40', 'train=48, val=24, test=8') \
            .replace('resnet10t', 'test_resnet')
    assert sum('train=48' in cell.source or 'test_resnet' in cell.source for cell in cells) == 2
    resources = {'metadata': {'path': str(tmp_path)}}
    NotebookClient(notebook, timeout=600, startup_timeout=600, resources=resources).execute()
    assert (tmp_path / 'runs' / 'quickstart' / 'report.html').is_file()
    text = [''.join(str(output.get('text') or output.get('data', {}).get('text/plain')) for output in cell.outputs)
            for cell in cells]
    assert 'Epoch 2/2' in ''.join(text) and 'report.html' in text[-1] and 'probability' in text[-2]
