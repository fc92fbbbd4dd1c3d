"""Which device holds what, and how processes work together.

Only JAX and NumPy are imported here, so that models and kernels can use this room.
"""

# Axes of the mesh, from the slowest network to the fastest; mesh.py explains them.
AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
# Axes that split the rows of a batch; "context" splits the tokens of a row.
BATCH_AXES = ("slice", "data", "fsdp", "expert")
