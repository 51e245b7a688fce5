"""Files written by `torch.save`, read as data: nothing that they name is imported or called."""
