"""Quantised weights: recognised by the tensors beside them, and given as numbers.

A scheme is a function from the tensors of a checkpoint to its weights, each an expression over what is stored. Nothing is
read and nothing is imported of the programs that wrote them. Each module imports only modules above it::

    stored              the tensors of a checkpoint as schemes look at them
    comfyui             layers that ComfyUI has quantised
    gpt_oss             experts of gpt-oss
    packed_numbers      packs of compressed-tensors and modelopt
    scaled_numbers      8-bit numbers with scales: fp8 in blocks, by rows, by tensor; int8
    dequantised         a checkpoint with its weights as numbers
"""
