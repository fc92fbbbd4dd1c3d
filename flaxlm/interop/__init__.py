"""Other people's formats: read and written here, with numpy alone.

torch, transformers and safetensors are not imported: the tests prove that what is read
and written here is what they read and write.
"""
