"""What a training step needs on machines that are not there: `python -m fp4jax.plan` compiles it for them and looks.

Nothing runs. A description of the GPU, or the name of a TPU topology, is enough for XLA to compile for it on a CPU.
"""
