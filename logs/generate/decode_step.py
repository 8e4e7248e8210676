"""The cost of one more token: the eager step against the compiled one, and texts of unequal lengths against equal ones.

    OMP_NUM_THREADS=1 python logs/generate/decode_step.py

Whole texts take turns, so that whatever else the machine does weighs on all; processor time, the median ratio of
neighbours over the rounds.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import torch

from lm.generate import Decoder
from lm.model import TransformerConfig, TransformerLM

SIZES = {
    "2 layers of 64": TransformerConfig(1024, 128, num_layers=2, d_model=64, d_ff=176),
    "the base model": TransformerConfig(10_000),
}


def milliseconds(model: TransformerLM, text: torch.Tensor, compile: bool, padding: Sequence[int] = ()) -> float:
    """Processor time per token of half a context, after a prompt of a quarter."""
    decoder = Decoder(model, len(text), compile=compile, padding=padding)
    prompt, num_tokens = text.shape[1] // 4, text.shape[1] // 2
    decoder.next_logits(text[:, :prompt])
    began = time.process_time()
    for end in range(prompt + 1, prompt + 1 + num_tokens):
        decoder.next_logits(text[:, :end])
    return 1000 * (time.process_time() - began) / num_tokens


def main(rounds: int = 5) -> None:
    """Print a line per model and batch."""
    torch.set_num_threads(1)
    for name, config in SIZES.items():
        model = TransformerLM(config).eval()
        for batch_size in (1, 8):
            text = torch.randint(1000, (batch_size, config.context_length))
            milliseconds(model, text, compile=True)  # compiles
            found = []
            for _ in range(rounds):
                eager, compiled = (milliseconds(model, text, compile) for compile in (False, True))
                found.append((eager, compiled, milliseconds(model, text, False, [i % 3 for i in range(batch_size)])))
            eager, compiled, unequal = (statistics.median(times) for times in zip(*found, strict=True))
            faster = statistics.median(times[0] / times[1] for times in found)
            print(
                f"{name}, batch {batch_size}: eager {eager:.2f} ms, compiled {compiled:.2f} ms, {faster:.2f} times as "
                f"fast; eager with unequal lengths {unequal:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
