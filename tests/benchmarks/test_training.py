"""Images a second in training, against a float32 script with torchvision's transforms in a `DataLoader`."""

from types import SimpleNamespace

import ours
import pytest
import rivals
from measuring import THREADS, Contender, together

from kure_lib.networks import models

STEPS, BATCH = 20, 256  # five times as many steps as the loader's workers fetch ahead while they wait
RUNS = 2  # that a study trains at once on two cores


@pytest.fixture(scope="module", params=["resnet20", "mobilenet_v2_050"])
def contenders(request: pytest.FixtureRequest):
    """Four processes: the script, two runs of a study, and one run that has all threads to itself."""
    name = request.param
    script = Contender(rivals.training, name, STEPS, threads=THREADS)
    runs = [Contender(ours.training, name, STEPS, threads=1) for _ in range(RUNS)]
    alone = Contender(ours.training, name, STEPS, threads=THREADS)
    everyone = [script, *runs, alone]
    try:
        for contender in everyone:
            contender.finish()  # its warm-up
        yield SimpleNamespace(name=name, script=script, runs=runs, alone=alone)
    finally:
        for contender in everyone:
            contender.close()


@pytest.mark.parametrize("name", rivals.NETS)
def test_the_plain_net_is_the_same_net(name):
    plain, library = rivals.NETS[name](), models.build(name, 1, 10)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (plain, library)]
    assert shapes[0] == shapes[1]


def test_two_runs_at_once(compare, contenders):
    images = STEPS * BATCH
    script, runs = (lambda: together([contenders.script])), (lambda: together(contenders.runs))
    compare(contenders.name, script, runs, rounds=4, rival_amount=images, ours_amount=RUNS * images,
            flops=ours.flops(contenders.name, backward=True))  # fmt: skip


def test_one_run_with_all_threads(compare, contenders):
    images = STEPS * BATCH
    script, alone = (lambda: together([contenders.script])), (lambda: together([contenders.alone]))
    compare(f"{contenders.name}_alone", script, alone, rounds=3, rival_amount=images, ours_amount=images,
            flops=ours.flops(contenders.name, backward=True))  # fmt: skip
