# SPDX-License-Identifier: GPL-2.0-or-later
"""The targets of scripts/fuzz on their corpus, and on what chance makes of it; each once more than coverage does."""

import random

import pytest
import targets

MUTATIONS = 300


def mutated(data, chance):
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0:
                changed[at:at] = chance.randbytes(chance.randint(1, 8))
            case 1:
                del changed[at : at + chance.randint(1, 16)]
            case 2:
                changed[at:at] = changed[at : at + chance.randint(1, 64)]
            case _ if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_and_what_is_near(name):
    chance = random.Random(name)
    for seed in targets.CORPUS[name]:
        targets.TARGETS[name](seed)
        for _ in range(MUTATIONS // len(targets.CORPUS[name]) + 1):
            targets.TARGETS[name](mutated(seed, chance))


def test_each_target_has_a_corpus():
    assert targets.CORPUS.keys() == targets.TARGETS.keys()
