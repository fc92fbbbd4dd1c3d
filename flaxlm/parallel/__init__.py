"""Which device holds what: the mesh, the rule table, the hosts."""

# The axes of the mesh, from the slowest network to the fastest; see mesh.py.
AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
# What splits the rows of a batch; "context" splits the tokens of a row.
BATCH_AXES = ("slice", "data", "fsdp", "expert")
