"""Proofs: which kernels give the reference's results on a GPU that is here, and so which ones `auto` takes there.

cases.py   small cases of every kernel, compared with the reference
prove.py   runs them, in processes of their own: `python -m inferix_kernels prove`
stored.py  outcomes in the user's cache, and the order of backends that follows from them: on the way of every call
"""
