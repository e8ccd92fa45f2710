"""Codebooks of ggml, against digests of those in its Python package; signs, against their rule."""

from __future__ import annotations

import hashlib

import pytest
import torch

from streammerge.sources.codebooks import codebook, even_signs, signs

DIGESTS = {
    "IQ1": "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a",
    "IQ2_XXS": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "IQ2_XS": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "IQ2_S": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "IQ3_XXS": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "IQ3_S": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
}
"""SHA-256 of the vectors of each codebook as int8, which gguf 0.19 has."""


@pytest.mark.parametrize("name", DIGESTS)
def test_codebooks_are_those_of_ggml(name: str) -> None:
    assert hashlib.sha256(codebook(name).to(torch.int8).numpy().tobytes()).hexdigest() == DIGESTS[name]


def test_signs_are_the_bits_of_a_byte() -> None:
    assert signs()[0b10000010].tolist() == [1, -1, 1, 1, 1, 1, 1, -1]
    assert torch.equal(even_signs()[:, :7], signs()[:128, :7])
    assert (even_signs().prod(1) == 1).all()
