"""Containers, one module each: recognition of their files, and the places of tensors' bytes.

Each module imports only modules above it::

    base                Container, and the layout of an output file
    archive             zip archives
    safetensors
    torch_zip
    torch_legacy
    torch_tar
    plain_pickle        a pickle of numpy's arrays or torch's tensors
    distributed         refusal of checkpoints in parts of several ranks
    folder              shards with an index, or one checkpoint among side files
    detect              the format of a file, by its content
    safetensors_writer  a safetensors file larger than memory, written in any order
"""
