"""The networks behind the published metrics, in plain torch, under the key names of their published weights.

vit.py    the transformer that CLIP, DINO and MUSIQ share
clip.py   CLIP's image encoder and the aesthetic head
dino.py   DINO
musiq.py  MUSIQ
amt.py    AMT-S
load.py   weight files into networks
"""
