"""Writes an expert's scores for `--expert`: torchxrayvision's CheXpert classifier and its classifier of views.

    pip install torchxrayvision
    python assets/expert_scores.py current.jpg > scores.json

An example that was never run here: the package and its weights are not part of this project.
"""

import json
import sys

import numpy as np
import torch
import torchxrayvision as xrv
from PIL import Image

# grey values 0 to 255 -> the middle square, 224 pixels wide, in the package's own units [1, 1, 224, 224]
pixels = np.asarray(Image.open(sys.argv[1]).convert("L"), dtype=np.float32)
pixels = xrv.datasets.normalize(pixels, 255)[None]
pixels = xrv.datasets.XRayResizer(224)(xrv.datasets.XRayCenterCrop()(pixels))
pixels = torch.from_numpy(pixels).float()[None]

findings = xrv.models.DenseNet(weights="densenet121-res224-chex").eval()
views = xrv.baseline_models.xinario.ViewModel().eval()
with torch.inference_mode():
    scores = dict(zip(findings.pathologies, findings(pixels)[0].tolist(), strict=True))
    scores |= dict(zip(views.targets, views(pixels).softmax(-1)[0].tolist(), strict=True))
scores.pop("", None)  # what this classifier was not trained on
json.dump(scores, sys.stdout, indent=1)
