"""Masks: the keystream of AES-256-CTR as integers mod 2^32, added to a vector chunk by chunk.

A key makes one mask and nothing else, so the counter starts at zero.
"""

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

CHUNK = 2**20  # numbers made at a time: 8 MiB beside the vector, however long it is
_ZEROS = bytes(4 * CHUNK)


def add(vector: Tensor, key: bytes, sign: int) -> None:
    """Add or subtract (`sign` 1 or -1) the mask of a key, in place; vector is int32, (length,)."""
    if vector.dtype != torch.int32 or not vector.is_contiguous():
        raise ValueError("a mask is added to a contiguous int32 vector")
    numbers = vector.numpy().view("<u4")
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(4 * CHUNK + 15)
    for start in range(0, len(numbers), CHUNK):
        chunk = numbers[start : start + CHUNK]
        stream.update_into(memoryview(_ZEROS)[: 4 * len(chunk)], buffer)
        mask = np.frombuffer(buffer, "<u4", len(chunk))
        (np.add if sign > 0 else np.subtract)(chunk, mask, out=chunk)
