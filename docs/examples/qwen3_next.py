"""Time a small Qwen3-Next with and without gdr, on the CPU or a GPU.

    python docs/examples/qwen3_next.py [--device cuda] [--dtype bfloat16] [--batch 4] [--prompt 512] [--tokens 32]

The model is randomly initialised: the linear-attention layers have the shape of Qwen3-Next-80B-A3B's (16 key heads,
32 value heads of 128), everything around them is small.  Prints medians of interleaved runs, and how far apart the
logits are (in 16 bits far: one rounding sends a token to another expert).
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from gdr.integrations.transformers import patched


def make_model(device: str, dtype: str) -> Qwen3NextForCausalLM:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    )
    return Qwen3NextForCausalLM(config).eval().to(device, getattr(torch, dtype))


def run(model: Qwen3NextForCausalLM, prompt: torch.Tensor, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Seconds of the prefill, seconds of a decoded token, and the logits of the prompt."""
    clock = [now(prompt)]
    out = model(prompt, use_cache=True)
    logits = out.logits
    clock.append(now(prompt))
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values)
    clock.append(now(prompt))
    return clock[1] - clock[0], (clock[2] - clock[1]) / tokens, logits


def now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = make_model(args.device, args.dtype)
    prompt = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt), device=args.device)
    variants = {"transformers": nullcontext, "gdr": lambda: patched(model)}
    prefill, decode, logits = ({name: [] for name in variants} for _ in range(3))
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, variant in variants.items():
                with variant():
                    times = run(model, prompt, args.tokens)
                for store, value in zip((prefill, decode, logits), times, strict=True):
                    store[name].append(value)
    print(f"batch {args.batch}, prompt {args.prompt}, {args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    for what, store in (("prefill", prefill), ("decode, a token", decode)):
        ms = {name: statistics.median(values[1:]) * 1e3 for name, values in store.items()}  # the first one compiles
        row = "   ".join(f"{name} {value:8.2f} ms" for name, value in ms.items())
        print(f"{what:16s} {row}   gdr is x{ms['transformers'] / ms['gdr']:.2f}")
    mine, theirs = (logits[name][0].float() for name in ("gdr", "transformers"))
    error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    print(f"largest difference of the logits: {error:.1e} of the largest logit")


if __name__ == "__main__":
    main()
