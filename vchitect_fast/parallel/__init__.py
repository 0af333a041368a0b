"""Many ranks: the mesh, sequence parallelism of the blocks, sharded parameters, the VAE by frames, and their recipe in order.

One process needs nothing of it, and importing this package loads nothing: take what you need from its modules.
"""
