"""What lerobot calls the images of a camera, and what the camera is called here."""

from __future__ import annotations

from collections.abc import Iterable

from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES, OBS_STR


def holds_images(feature: str) -> bool:
    """Whether lerobot's environments and robots deliver images under this name."""
    return feature == OBS_IMAGE or feature.startswith(f"{OBS_IMAGES}.")


def camera_of(feature: str) -> str:
    """`front` for `observation.images.front`, and `image` for `observation.image`, as lerobot calls the images of the
    only camera of an environment."""
    return feature.removeprefix(f"{OBS_IMAGES}.").removeprefix(f"{OBS_STR}.")


def features_of_cameras(features: Iterable[str]) -> dict[str, str]:
    """Camera to its feature, in the order of the features. Raises `ValueError` if two are of the same camera."""
    found: dict[str, str] = {}
    for feature in features:
        other = found.setdefault(camera_of(feature), feature)
        if other != feature:
            raise ValueError(f"{other} and {feature} both name the camera {camera_of(feature)!r}; rename one of them")
    return found
