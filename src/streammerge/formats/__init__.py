"""Containers, one module each: recognition of their files, and the places of tensors' bytes.

Each module imports only modules above it::

    records             the names of an output's recipe and receipt
    base                Container, and the layout of an output file
    archive             zip archives
    safetensors
    torch_zip
    torch_legacy
    torch_tar
    plain_pickle        a pickle of numpy's arrays or torch's tensors
    gguf_names          names of llama.cpp, and of transformers
    gguf_file           files of llama.cpp
    gguf                the same, imported when there is one
    file_names          what the names of a folder's files tell
    shards              the files of one checkpoint as one container
    pieces              tensors in pieces of several ranks
    dcp_alike           metadata that tell the same
    dcp_metadata        what the metadata of torch.distributed.checkpoint tell
    dcp_names           what the names of its entries tell
    dcp_items           the bytes of its items
    dcp                 folders of torch.distributed.checkpoint
    dcp_writer          the plan of such a folder
    hf_storage          the same as safetensors
    zero                checkpoints of DeepSpeed
    nemo_folder         such a folder in a NeMo archive
    nemo                NeMo archives
    dtensors            rank files with distributed tensors
    distributed         which checkpoint of several ranks a folder holds
    folder              the checkpoint, or the models, in a folder
    registry            formats by name
    detect              the format of a file, by its content
    safetensors_writer  a safetensors file larger than memory, written in any order
"""
