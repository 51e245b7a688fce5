"""Files written by `torch.save`, read as data: nothing in them is imported or called."""
