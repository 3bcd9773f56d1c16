"""What several test files share and pytest does not hand out as a fixture."""

import torch

#: Settings of a run that is trained within a second.
TINY = {"train_size": 256, "epochs": 2, "learning_rate": 0.05, "weight_decay": 5e-4, "batch_size": 32}


def same_weights(one, other) -> bool:
    """Whether two state dicts hold, under the same names, bit for bit the same numbers."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
