"""Files of pictures: videos, latents and contact sheets written, pictures and videos read, the journal of a run."""

from .pictures import read_picture as read_picture
from .pictures import read_video as read_video
from .video_writer import LatentWriter as LatentWriter
from .video_writer import OutputFile as OutputFile
from .video_writer import VideoWriter as VideoWriter
from .video_writer import contact_sheet as contact_sheet
