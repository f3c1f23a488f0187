"""The axes of a mesh of devices, by name. `fp4jax.layout` says what each of them shards."""

MESH_AXES = ("data", "fsdp", "expert", "tensor")
"""In the order of the mesh: neighbours along the last are nearest."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Those that split a batch along its sequences."""
