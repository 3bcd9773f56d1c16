"""The time of a training step by KURE, its rivals and quantization-aware training, in multiples of a plain one."""

import ours
from measuring import Side
from reporting import METHODS

from kure_lib.study.profiles import CONTENDERS
from kure_lib.training.configs import KureConfig, QatConfig, RivalConfig

STEPS, ROUNDS = 2, 2


def test_every_method_against_plain_training(measure, keep):
    strengths = {contender.rival: contender.strength for contender in CONTENDERS if contender.rival}
    settings = {name: {"rival": RivalConfig(name=name, strength=strength)} for name, strength in strengths.items()}
    settings |= {name: {"quantization": QatConfig.named(name)} for name in METHODS if name.endswith("4/4")}
    settings |= {"kure": {"regularizer": KureConfig()}}
    settings |= {"kure_of_activations": {"regularizer": KureConfig(of="activations")}}
    assert settings.keys() == METHODS.keys(), "every method is measured"
    taken = measure("training by every method", [Side(training, (STEPS, {})), *(
        Side(training, (STEPS, settings[name])) for name in METHODS)], ROUNDS)  # fmt: skip
    for i, name in enumerate(METHODS, 1):
        keep("methods", name, sorted(each[i].seconds / each[0].seconds for each in taken))


def training(steps: int, method: dict) -> ours.Round:
    return ours.training("resnet20", steps, **method)
