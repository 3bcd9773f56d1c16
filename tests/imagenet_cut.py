"""What a test cuts of the profile `imagenet`, so that two cores finish it in minutes; its plan is the real one."""

from collections.abc import Callable

from kure_lib.networks import device
from kure_lib.quantization import calibration
from kure_lib.study import profiles

FEW = 2
IMAGES = {"train_size": FEW, "batch_size": FEW}  # a network is trained on so many, and tested on as many
CUT = {
    "calibration": FEW, "images": FEW, "shown": FEW, "search": 10, "searched": [4], "ratios": [1.0],
}  # fmt: skip
PARAMETERS = {
    number: {name: CUT.get(name, value) for name, value in parameters.items()}
    for number, parameters in profiles.PARAMETERS["smoke"].items()
}


def recipes(networks: int) -> tuple[profiles.Recipe, ...]:
    """The first recipes of the profile, for one epoch of a few images."""
    whole = profiles.PROFILES["imagenet"][:networks]
    return tuple(profiles._with(recipe, IMAGES, {**IMAGES, "epochs": 1}) for recipe in whole)


def few(images: Callable) -> Callable:
    """`calibration.images` cut to a few."""
    return lambda name, size=FEW: images(name, min(size, FEW))


def apply(networks: int) -> None:
    """Cut the profile in this process, which is a kernel's; calibration and reading are cut as well."""
    profiles.PROFILES["imagenet"] = recipes(networks)
    calibration.images = few(calibration.images)
    device.cores = lambda: 1  # processes that read images: more take longer to start than to read
