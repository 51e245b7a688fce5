"""The sample photographs of scikit-image: something to build from without a dataset."""

from importlib.util import find_spec
from pathlib import Path

from loader.errors import ShardsError

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def sample_photographs() -> list[Path]:
    """Return the colour photographs in the installed scikit-image, without importing it.

    Raises:
        ShardsError: scikit-image is not installed, or lacks some of them.
    """
    package = find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise ShardsError("--sample: expected the package scikit-image, got none; run pip install scikit-image")
    folder = Path(package.submodule_search_locations[0]) / "data"
    paths = [folder / name for name in PHOTOGRAPHS]
    if missing := [path.name for path in paths if not path.exists()]:
        raise ShardsError(f"{folder}: expected the photographs of scikit-image, got no {', '.join(missing)}")
    return paths
