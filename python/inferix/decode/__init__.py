"""Decoding: from noise to latents, block by block.

contract.py    what a model and a schedule are asked for: everything another network has to bring
decoder.py     what every decode loop offers a World, and what the loops share
sequential.py  one block at a time (Self Forcing, CausVid, LongLive, the tiny world, Wan itself)
branch.py      its keys and values: the open block, and the block whose clean pass is pending
graphs.py      its forwards, captured and replayed; timesteps.py: timesteps on the model's device
pipeline.py    several blocks in flight, each at another noise level (MAGI-1)
rolling.py     a schedule for it, of blocks that see each other (Rolling Forcing)
samplers.py    from one noise level to the next
traffic.py     how much of the past a pipeline reads
"""
