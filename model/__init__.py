"""The networks, losses and image metrics; what is done with a trained network; and the parts of its training.

`shufflemixer`, `losses` and `metrics` need nothing else but kernels; `checkpoints` reads weights. `evaluate`,
`upscale`, `export` and `curves` are commands (`python -m model.evaluate`); `training` holds what `train.py` is made of.
"""

from srshards_names import check_names

check_names("model", "loader", "prep")
