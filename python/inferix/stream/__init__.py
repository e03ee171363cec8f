"""A world you steer: a live page over WebRTC or a WebSocket, pushed to RTMP, HLS or a file. Extra `stream`.

worker.py    the worlds, in a process of their own: one request, one block
remote.py    that process as the server sees it: awaitable requests, crashes as exceptions
playout.py   when a block is begun and when a picture is shown
session.py   the show: commands and controls in, pictures and events out; commands.py: what the driver may ask
video.py     one encoder for all who watch; bounded queues that drop to the next keyframe
push.py      RTMP, SRT, HLS, files; recorder.py: what is kept on the server
protocol.py  messages, checked against asyncapi.json, which is their definition
client.py    viewers: limits, replies, who drives
webrtc.py    aiortc, handed our packets
server.py    the page, the WebSocket, the recordings
measured.py  where the time goes: for the page, for Prometheus, in a folder
door.py      connections: strangers are few and short; access.py: who may come in; log.py: a line a second
"""

from __future__ import annotations

MAX_FILES = 200  # saved worlds and recordings in the folder of `play`, before one more is begun
MAX_GB = 50.0  # and what they take, in 10^9 bytes
