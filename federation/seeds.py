"""Random numbers that nobody can foretell; all others are derived (`common.seeds`)."""

import os
import secrets

import numpy as np
import torch

WORDS, BEFORE = 624, 24
"""Of the Mersenne Twister, and bytes of PyTorch's state that stand before them (each word fills eight)."""


def unforeseeable() -> torch.Generator:
    """A generator that nobody can foretell.

    `manual_seed` folds every seed to 32 bits, so that whoever tries them all finds the noise; here the system draws the
    whole state.
    """
    source = torch.Generator().manual_seed(0)
    state = source.get_state()
    words = np.frombuffer(os.urandom(4 * WORDS), np.uint32).astype(np.uint64)
    state[BEFORE : BEFORE + 8 * WORDS] = torch.from_numpy(words.view(np.uint8))
    return source.set_state(state)


def forget() -> None:
    """Let nobody foretell what networks draw by themselves from here on (dropout, cells that fire), on any device."""
    torch.manual_seed(secrets.randbits(63))
    torch.set_rng_state(unforeseeable().get_state())  # the processor's, whose seed is folded
