"""What is convolutions and products alone: no script with PyTorch's kernels for them does without."""

import ours
import pytest
import rivals
from measuring import Side
from reporting import LIMITS

STEPS = {"resnet20": 4, "mobilenet_v2_050": 2, "resnet18": 1, "mobilenet_v2": 1}
EVALUATION = (
    Side(ours.variants, ((1.0,),)),
    Side(rivals.expert_variants, (1,)),
    Side(ours.products, ("resnet20", 10, 1000, False)),
)
ROUNDS = 2


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_what_no_script_does_without(measure, keep, name: str):
    steps, sides = STEPS.get(name, 1), EVALUATION
    if name in STEPS:
        sides = tuple(Side(work, (name, steps)) for work in (ours.training, rivals.expert_training, ours.products))
    taken = measure(LIMITS[name], list(sides), ROUNDS)
    found = [[side.seconds / steps for side in each] for each in taken]
    keep("limits", name, found)
    assert all(alone < step for step, _, alone in found), "a part takes no longer than the whole"
