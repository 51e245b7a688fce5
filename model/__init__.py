"""The network, its losses, metrics and checkpoints; its training; and the commands that use trained weights.

`evaluate`, `upscale`, `export` and `curves` are commands (`python -m model.evaluate`). `cpu` holds the compiled mixing
kernel, `torchfile` a safe reader of `torch.save` files, and `training` the modules of `train.py`.
"""

from srshards_names import check_names

check_names("model", "loader", "prep")
