"""Files of pictures: read, and written while they are made.

output_file.py    a file in the making: its temporary name, its lock, its errors, Ctrl-C
video_writer.py   H.264 in an MP4; latent_writer.py: latents in a .npy, for models without a decoder
contact_sheets.py frames of a video side by side in one picture
pictures.py       picture and video files that a world begins with
journal.py        the latents of a video in the making, to resume it from
"""

from .contact_sheets import contact_sheet
from .latent_writer import LatentWriter
from .pictures import read_picture, read_video
from .video_writer import VideoWriter

__all__ = ["LatentWriter", "VideoWriter", "contact_sheet", "read_picture", "read_video"]
