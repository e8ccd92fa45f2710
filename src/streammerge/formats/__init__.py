"""One file per container: which files are such, and where the bytes of their tensors lie.

Each module imports only modules above it::

    base                Container, and the layout of an output file
    archive             zip archives
    safetensors
    torch_zip
    torch_legacy
    torch_tar
    folder              shards with an index, or one checkpoint among side files
    detect              what a file is, by its content
    safetensors_writer  a safetensors file larger than memory, written in any order
"""
