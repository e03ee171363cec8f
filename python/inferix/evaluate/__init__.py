"""The quality of long videos: how they drift, chunk by chunk, and what separates two of them.

metric.py     the registry of metrics
drift.py      from the scores of chunks to Video Drift Error and its relatives
video.py      videos decoded into chunks, a few frames in memory at a time
proxies.py    metrics without weights
published.py  the metrics of VBench and LV-Bench; backbones/: the networks behind them
weights.py    the weight files that those need
perceptual.py metrics whose packages ship their parameters
pair.py       two videos compared
judging.py    a video through its metrics
report.py     what is written, printed and drawn
dataset.py    captions of a dataset, and what is published of it
processes.py  independent pieces of work, several at a time
tiny_world.py tiny_studies.py   variants of the tiny world, judged by its simulator as well
"""
