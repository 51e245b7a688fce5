"""Process-wide settings of Pillow and OpenCV, for commands: these own their process.

The rest of `prep.images` leaves the settings alone, at import and when called.
"""

import warnings

import cv2
from PIL import Image


def configure_decoders() -> None:
    """Silence Pillow's and OpenCV's own messages and lift Pillow's size limit: `prep.images` reports and checks.

    OpenCV's size limit is an environment variable that it reads when it is loaded; see `prep.cli`.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module="PIL")  # on metadata; what matters of it is checked here
    logging = getattr(getattr(cv2, "utils", None), "logging", None)  # OpenCV 4.10 to 4.12 have setLogLevel elsewhere
    set_level = getattr(logging or cv2, "setLogLevel", None)
    if set_level:
        set_level(0)  # LOG_LEVEL_SILENT
