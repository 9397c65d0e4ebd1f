"""The program of a process that `train(devices=N)` starts: settings in, result out, through files of one folder."""
import json
import os
import sys
from pathlib import Path

from timm_multilabel.api.processes import write_result
from timm_multilabel.api.train import run_training
from timm_multilabel.cli.main import guarded
from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.training.signals import StopSignals


def main() -> None:
    """Train as the settings in a folder say."""
    folder = Path(sys.argv[1])
    given = json.loads((folder / 'settings.json').read_text(encoding='utf-8'))
    with guarded('train'), StopSignals(visible=not int(os.environ.get('RANK', 0))) as signals:
        run = run_training(build(TrainSettings, given), signals)
    if run is not None:
        write_result(run, folder)


if __name__ == '__main__':
    main()
