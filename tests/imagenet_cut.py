"""What a test cuts of the profile `imagenet`, so that two cores finish it in minutes; its plan is the real one."""

from kure_lib.networks import device
from kure_lib.quantization import calibration, lapq
from kure_lib.study import profiles

FEW = 2
IMAGES = {"train_size": FEW, "batch_size": FEW}  # a network is trained on so many, and tested on as many
SEARCH = 10  # evaluations of the loss by LAPQ
PARAMETERS = {
    **profiles.PARAMETERS["smoke"],
    "02": {"image_count": FEW},
    "06": {"points": 3, "calibration": FEW},
    "07": {"settings": "3/FP", "calibration": FEW},
    "12": {"seeds": [1], "bits": [4, 2], "ratios": [1.0], "searched": [4], "calibration": FEW},
    "13": {"settings": "3/FP", "calibration": FEW},
    "14": {"seeds": [1], "bits": [4, 2], "images": FEW},
    "16": {"images": FEW, "shown": FEW},
}


def recipes(networks: int) -> tuple[profiles.Recipe, ...]:
    """The first recipes of the profile, for one epoch of a few images."""
    whole = profiles.PROFILES["imagenet"][:networks]
    return tuple(profiles._with(recipe, IMAGES, {**IMAGES, "epochs": 1}) for recipe in whole)


def apply(networks: int) -> None:
    """Cut the profile in this process, which is a kernel's; calibration, search and reading are cut as well."""
    profiles.PROFILES["imagenet"] = recipes(networks)
    images = calibration.images
    calibration.images = lambda name, size=FEW: images(name, min(size, FEW))
    lapq.loss_aware_steps.__defaults__ = (SEARCH,)
    device.cores = lambda: 1  # processes that read images: more take longer to start than to read
