"""gdr under the names that other projects call; each module is imported on its own.

`gdr.integrations.transformers` patches Qwen3-Next and Qwen3.5 models, `gdr.integrations.sglang` and
`gdr.integrations.fla` offer the functions of SGLang and flash-linear-attention with their own signatures.
"""
