"""The networks, losses and image metrics, and the evaluation of a trained network.

`shufflemixer`, `losses` and `metrics` stand alone; `checkpoints` reads weights; `evaluate` is the command
`python -m model.evaluate`.
"""
